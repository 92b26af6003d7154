"""The vocabulary of a GGUF file: token texts, types, scores and special ids, checked before use."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, cast, get_args

import numpy as np
import numpy.typing as npt

from powerinfer_tools.errors import TokenizerError
from powerinfer_tools.text.pretokenizers import PreTokenizer, pre_tokenizer
from powerinfer_tools.text.special_tokens import TokenType, settle_types_and_ends

Kind = Literal["bpe", "spm", "rwkv"]
#: Which pieces between special tokens get a space in front: none; every one; each that does not begin with a
#: space; the first alone, if it does not begin with a space.
SpacePrefix = Literal["never", "always", "unless-space", "first-unless-space"]

_SPECIAL_KEYS = (
    "bos_token_id", "eos_token_id", "eot_token_id", "eom_token_id", "unknown_token_id", "padding_token_id",
    "prefix_token_id", "suffix_token_id", "middle_token_id", "fim_pre_token_id", "fim_suf_token_id",
    "fim_mid_token_id", "fim_pad_token_id", "fim_rep_token_id", "fim_sep_token_id",
)  # fmt: skip
# llama.cpp's values for ids that a file does not name.
_DEFAULT_IDS: Mapping[Kind, Mapping[str, int]] = {
    "bpe": {"bos_token_id": 11, "eos_token_id": 11},
    "spm": {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0},
    "rwkv": {},
}
_ABSENT = object()


class MetadataSource(Protocol):
    """The parts of an opened GGUF file that are needed."""

    @property
    def metadata(self) -> Mapping[str, Any]:
        """All metadata of the file by key."""
        ...


@dataclass(frozen=True)
class AddedTokens:
    """Ids of tokens that are cut out of a text before it is split into words, as in ``tokenizers``: tokens
    that are searched in normalised text, and tokens that have to be words of their own."""

    ids: frozenset[int]
    normalized: frozenset[int]
    single_word: frozenset[int]


@dataclass(frozen=True)
class Vocabulary:
    """Token `i` has text `texts[i]`, type `types[i]` (a TokenType) and, in an SPM vocabulary, `scores[i]`.

    Each character of a byte-level (bpe) text stands for one byte; SPM texts write a space as "▁"; RWKV's are
    written as Python writes bytes. An SPM vocabulary with merges is merged by their rank, one without merges
    by scores. ``normalizer`` comes before everything else. ``added``: the tokens that are cut out of texts by
    the rules of ``tokenizers``; None: all tokens that are not ordinary are cut out, by llama.cpp's rules.
    ``absent``: control tokens for which the model has no row.
    """

    kind: Kind
    texts: Sequence[str]
    ids: Mapping[str, int]
    types: Sequence[int]
    scores: npt.NDArray[np.float32] | None
    merges: Sequence[str]
    pre: PreTokenizer | None
    bos_id: int | None
    eos_id: int | None
    end_ids: frozenset[int]
    add_bos: bool
    add_eos: bool
    space_prefix: SpacePrefix
    normalizer: Literal["", "nfc"] = ""
    strips_left: frozenset[int] = field(default=frozenset())
    strips_right: frozenset[int] = field(default=frozenset())
    added: AddedTokens | None = None
    absent: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.texts)

    @classmethod
    def from_gguf(cls, gguf: MetadataSource) -> "Vocabulary":
        """Read and check the `tokenizer.ggml.*` metadata. Raises TokenizerError."""
        return _Reader(gguf.metadata).read()


def require_supported(metadata: Mapping[str, Any]) -> None:
    """Raise TokenizerError unless the vocabulary is of a supported kind. Reads no token."""
    _Reader(metadata).pre()


class _Reader:
    """Reads one file's metadata; collects messages for the user in `notices`."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self.metadata = metadata
        self.notices: list[str] = []

    def read(self) -> Vocabulary:
        pre = self.pre()
        kind: Kind = "spm" if pre is None or pre.raw else "bpe"
        if self.value("model") == "rwkv":
            kind = "rwkv"
        texts = self.texts()
        ids = {text: index for index, text in enumerate(texts)}
        if len(ids) != len(texts):
            raise TokenizerError(_duplicate_message(texts, ids))
        types = self.types(len(texts))
        named = self.named_ids(kind, pre, len(texts))
        end_ids = settle_types_and_ends(ids, types, named) | self.end_ids(len(texts))
        bos_id, eos_id = named.get("bos_token_id"), named.get("eos_token_id")
        add_bos = self.flag("add_bos_token", kind != "rwkv" and (pre is None or pre.add_bos))
        add_eos = self.flag("add_eos_token", False)
        if (add_bos and bos_id is None) or (add_eos and eos_id is None):
            raise TokenizerError(
                "the file asks for a beginning- or end-of-text token to be added, but names no such token"
            )
        left, right = self.stripping(ids, types)
        return Vocabulary(
            kind=kind, texts=texts, ids=ids, types=types, scores=self.scores(len(texts)),
            merges=self.merges(pre), pre=pre, bos_id=bos_id, eos_id=eos_id,
            end_ids=end_ids, add_bos=add_bos, add_eos=add_eos, space_prefix=self.space_prefix(pre),
            normalizer=self.normalizer(), strips_left=left, strips_right=right,
            added=self.added(len(texts)), absent=self.absent(), notices=tuple(self.notices),
        )  # fmt: skip

    def value(self, key: str, default: Any = _ABSENT) -> Any:
        value = self.metadata.get(f"tokenizer.ggml.{key}", default)
        if value is _ABSENT:
            raise TokenizerError(f"the file has no tokenizer.ggml.{key}: it carries no usable vocabulary")
        return value

    def pre(self) -> PreTokenizer | None:
        """How text is cut into words; None for SPM and for RWKV's vocabulary, which does not cut."""
        model = self.value("model")
        if model in ("llama", "rwkv"):
            return None
        if model == "gemma4":
            return pre_tokenizer("gemma4")
        if model == "gpt2":
            return self.named_pre()
        raise TokenizerError(f"vocabulary type {model!r} (tokenizer.ggml.model) is not supported; "
                             "supported are: gpt2 (byte-level BPE), llama (SPM), gemma4, rwkv")  # fmt: skip

    def named_pre(self) -> PreTokenizer:
        name = self.value("pre", "")
        if not isinstance(name, str):
            raise TokenizerError("tokenizer.ggml.pre is not a string")
        if not name:
            self.notices.append(
                "the file names no pre-tokeniser (tokenizer.ggml.pre); llama.cpp's default is used, "
                "which may not be what the model was trained with"
            )
        return pre_tokenizer(name or "default")

    def strings(self, key: str) -> list[str]:
        values = self.value(key)
        if isinstance(values, str | bytes | bytearray) or not isinstance(values, Sequence):
            raise TokenizerError(f"tokenizer.ggml.{key} is not an array of strings")
        values = list(values)  # all at once: the reader decodes its strings each time they are read
        if set(map(type, values)) <= {str}:
            return values
        try:
            return [value if isinstance(value, str) else bytes(value).decode() for value in values]
        except (UnicodeDecodeError, TypeError, ValueError) as error:
            raise TokenizerError(f"tokenizer.ggml.{key} holds a string that is not UTF-8: {error}") from None

    def texts(self) -> list[str]:
        texts = self.strings("tokens")
        if not texts:
            raise TokenizerError("tokenizer.ggml.tokens is empty")
        return texts if all(texts) else [text or f"[EMPTY_{index}]" for index, text in enumerate(texts)]

    def numbers(self, key: str, count: int) -> npt.NDArray[Any] | None:
        values = self.value(key, None)
        if values is None:
            return None
        array = np.asarray(values)
        if array.ndim != 1 or array.dtype.kind not in "iuf":
            raise TokenizerError(f"tokenizer.ggml.{key} is not an array of numbers")
        if len(array) < count:
            raise TokenizerError(f"tokenizer.ggml.{key} has {len(array)} entries for {count} tokens")
        return array[:count]

    def types(self, count: int) -> list[int]:
        types = self.numbers("token_type", count)
        if types is None:
            return [TokenType.NORMAL] * count
        if types.dtype.kind == "f":
            raise TokenizerError("tokenizer.ggml.token_type is not an array of integers")
        valid = (types >= min(TokenType)) & (types <= max(TokenType))
        result: list[int] = np.where(valid, types, TokenType.UNDEFINED).tolist()
        return result

    def scores(self, count: int) -> npt.NDArray[np.float32] | None:
        scores = self.numbers("scores", count)
        if scores is None:
            return None
        scores = scores.astype(np.float32)
        if not np.isfinite(scores).all():
            index = int(np.argmin(np.isfinite(scores)))
            raise TokenizerError(f"tokenizer.ggml.scores[{index}] is not finite")
        return scores

    def named_ids(self, kind: Kind, pre: PreTokenizer | None, count: int) -> dict[str, int]:
        defaults = {} if self.own("ids_complete", bool, False) else _DEFAULT_IDS[kind]
        named = {key: token for key, token in defaults.items() if token < count}
        if pre is not None and not pre.names_bos:
            named.pop("bos_token_id", None)
        for key in _SPECIAL_KEYS:
            token = self.value(key, None)
            if token is None:
                continue
            if isinstance(token, bool) or not isinstance(token, int | np.integer):
                raise TokenizerError(f"tokenizer.ggml.{key} is not an integer")
            if 0 <= token < count:
                named[key] = int(token)
            else:
                self.notices.append(f"tokenizer.ggml.{key} = {token} is beyond the {count} tokens: not used")
        return named

    def merges(self, pre: PreTokenizer | None) -> list[str]:
        """The merges; an SPM vocabulary has merges only if its file asks for ranks rather than scores."""
        if (pre is None or pre.may_lack_merges) and "tokenizer.ggml.merges" not in self.metadata:
            return []
        return self.strings("merges")

    def own(self, key: str, type_: type[Any], default: Any) -> Any:
        """A value that only files written by this program have."""
        value = self.metadata.get(f"powerinfer.tokenizer.{key}", default)
        if not isinstance(value, type_):
            raise TokenizerError(f"powerinfer.tokenizer.{key} is not of type {type_.__name__}")
        return value

    def own_ids(self, key: str, count: int) -> frozenset[int]:
        tokens = self.own(key, np.ndarray, np.zeros(0, np.int32))
        if tokens.dtype.kind != "i" or (tokens.size and not 0 <= tokens.min() <= tokens.max() < count):
            raise TokenizerError(f"powerinfer.tokenizer.{key} holds what is no token id below {count}")
        return frozenset(tokens.tolist())

    def added(self, count: int) -> AddedTokens | None:
        if "powerinfer.tokenizer.added_token_ids" not in self.metadata:
            return None
        names = ("added_token_ids", "normalized_token_ids", "single_word_token_ids")
        return AddedTokens(*(self.own_ids(name, count) for name in names))

    def absent(self) -> tuple[str, ...]:
        values = self.metadata.get("powerinfer.tokenizer.absent_tokens", ())
        absent = tuple(values) if isinstance(values, Sequence) else (None,)
        if not all(isinstance(text, str) and text for text in absent):
            raise TokenizerError("powerinfer.tokenizer.absent_tokens is not an array of strings")
        if not absent:
            return ()
        self.notices.append(
            f"the tokeniser has {len(absent)} token(s) that the model has no row for, such as "
            f"{absent[0][:40]!r}: left out"
        )
        return absent

    def end_ids(self, count: int) -> frozenset[int]:
        return self.own_ids("end_token_ids", count)

    def space_prefix(self, pre: PreTokenizer | None) -> SpacePrefix:
        spm = pre is None and self.value("model") != "rwkv"
        adds_space = self.flag("add_space_prefix", spm) and spm
        prefix = self.own("space_prefix", str, "always" if adds_space else "never")
        if prefix not in get_args(SpacePrefix):
            raise TokenizerError(f"powerinfer.tokenizer.space_prefix {prefix!r} is unknown")
        return cast(SpacePrefix, prefix)

    def normalizer(self) -> Literal["", "nfc"]:
        name = self.own("normalizer", str, "")
        if name not in ("", "nfc"):
            raise TokenizerError(f"powerinfer.tokenizer.normalizer {name!r} is unknown")
        return cast(Literal["", "nfc"], name)

    def flag(self, key: str, default: bool) -> bool:
        value = self.value(key, default)
        if not isinstance(value, bool | np.bool_):
            raise TokenizerError(f"tokenizer.ggml.{key} is not a boolean")
        return bool(value)

    def stripping(
        self, ids: Mapping[str, int], types: Sequence[int]
    ) -> tuple[frozenset[int], frozenset[int]]:
        """Special tokens that swallow the white space on their left or right.

        GGUF has no field for these attributes; llama.cpp knows two families by name, our files name the ids.
        """
        own = [self.own_ids(f"strips_{side}", len(types)) for side in ("left", "right")]
        if any(own) or "powerinfer.tokenizer.added_token_ids" in self.metadata:
            return own[0], own[1]
        name = str(self.metadata.get("general.name", "")).lower()
        if any(part in str(self.value("pre", "")) for part in ("jina-v2-de", "jina-v2-es", "jina-v2-code")):
            return frozenset({ids["<mask>"]} if "<mask>" in ids else ()), frozenset()
        if "phi-3" in name or "phi3" in name:
            special = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
            right = {index for index, type_ in enumerate(types) if type_ in special}
            right |= {ids[text] for text in ("</s>",) if text in ids}
            right -= {ids[text] for text in ("<unk>", "<s>", "<|endoftext|>") if text in ids}
            return frozenset(), frozenset(right)
        if "modern-bert" in name:
            return frozenset({ids["[MASK]"]} if "[MASK]" in ids else ()), frozenset()
        return frozenset(), frozenset()


def _duplicate_message(texts: Sequence[str], ids: Mapping[str, int]) -> str:
    first = next(index for index, text in enumerate(texts) if ids[text] != index)
    return f"tokens {first} and {ids[texts[first]]} have the same text {texts[first]!r}"
