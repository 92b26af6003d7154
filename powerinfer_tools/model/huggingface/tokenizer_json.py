"""tokenizer.json of the ``tokenizers`` package: byte-level BPE, and BPE over characters with byte fallback.

Everything that the file asks for is either carried over or refused by name.
"""

from collections.abc import Iterator
from typing import Any

from powerinfer_tools.errors import TokenizerError
from powerinfer_tools.model.huggingface.config import Config
from powerinfer_tools.model.huggingface.pretokenizers import byte_level_name
from powerinfer_tools.model.huggingface.vocabulary_contents import FoundVocabulary
from powerinfer_tools.text.score_merging import SPACE
from powerinfer_tools.text.special_tokens import TokenType
from powerinfer_tools.text.vocabulary import AddedTokens, SpacePrefix

_MAX_TOKENS = 1 << 22
_PROPERTIES = ("lstrip", "rstrip", "normalized", "single_word")
_PREPEND = {"always": "unless-space", "first": "first-unless-space", "never": "never"}


def read_tokenizer_json(document: Config) -> FoundVocabulary:
    """The vocabulary of a tokenizer.json. Raises BadField, or TokenizerError for what is not supported."""
    model = document.section("model")
    _check_model(document, model)
    before = list(_steps(document, "normalizer", "normalizers"))
    splits = list(_steps(document, "pre_tokenizer", "pretokenizers"))
    byte_level = any(step.get("type") == "ByteLevel" for step in splits)
    tokens, added = _tokens(document, model, spelt_bytes=not byte_level)
    bos, eos = _template(document)
    merges = _merges(model)
    common: dict[str, Any] = {
        "tokens": tokens,
        "merges": merges,
        "strips_left": added["lstrip"],
        "strips_right": added["rstrip"],
        "added": AddedTokens(added["id"], added["normalized"], added["single_word"]),
        "adds_bos": bos,
        "adds_eos": eos,
    }
    if byte_level:
        name, prefix = byte_level_name(document, splits, ignore_merges=model.flag("ignore_merges", False))
        normalizer = _normalizer(document, before)
        return FoundVocabulary("gpt2", pre=name, space_prefix=prefix, normalizer=normalizer, **common)
    prefix = _space_prefix(document, before, splits)
    return FoundVocabulary("llama", space_prefix=prefix, scores=_scores(merges, tokens), **common)


def unsupported(document: Config, what: str) -> TokenizerError:
    """The error about a part of the file that is not carried over."""
    return TokenizerError(f"{document.file}: {what} is not supported")


def _check_model(document: Config, model: Config) -> None:
    kind = model.text("type", "BPE")
    if kind != "BPE":
        raise unsupported(document, f"a tokeniser of type {kind[:40]!r}")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name) not in (None, "", 0, 0.0):
            raise unsupported(document, f"model.{name}")


def _steps(document: Config, name: str, inner: str) -> Iterator[Config]:
    """The steps of a normaliser or pre-tokeniser in order; sequences are opened up, one level deep."""
    if not document.has(name):
        return
    step = document.section(name)
    if step.text("type") != "Sequence":
        yield step
        return
    for index, item in enumerate(step.items(inner)):
        yield Config(document.file, item, f"{name}[{index}].")


def _tokens(
    document: Config, model: Config, *, spelt_bytes: bool
) -> tuple[dict[int, tuple[str, TokenType]], dict[str, frozenset[int]]]:
    """All tokens, and ids of the added ones by the properties that they have."""
    tokens: dict[int, tuple[str, TokenType]] = {}
    spelt = (
        {f"<0x{value:02X}>" for value in range(256)}
        if spelt_bytes and model.flag("byte_fallback", False)
        else ()
    )
    for text, token in model.section("vocab").values.items():
        _check_id(document, text, token)
        if token in tokens:
            raise document.fail("model.vocab", f"has two tokens of id {token}")
        tokens[token] = (text, TokenType.BYTE if text in spelt else TokenType.NORMAL)
    unknown = model.text("unk_token", "")
    ids: dict[str, set[int]] = {name: set() for name in ("id", *_PROPERTIES)}
    for item in document.items("added_tokens"):
        added = Config(document.file, item, "added_tokens[].")
        text, token = added.text("content"), added.integer("id", low=0, high=_MAX_TOKENS)
        if token in tokens and tokens[token][0] != text:
            raise document.fail(
                "added_tokens", f"names token {token} {text!r}, the vocabulary {tokens[token][0]!r}"
            )
        special = added.flag("special", False)
        kind = TokenType.CONTROL if special else TokenType.USER_DEFINED
        tokens[token] = (text, TokenType.UNKNOWN if text == unknown else kind)
        ids["id"].add(token)
        for name in _PROPERTIES:
            if added.flag(name, name == "normalized" and not special):
                ids[name].add(token)
    return tokens, {name: frozenset(numbers) for name, numbers in ids.items()}


def _check_id(document: Config, text: str, token: Any) -> None:
    if type(token) is not int or not 0 <= token < _MAX_TOKENS:
        raise document.fail("model.vocab", f"gives {text[:40]!r} an id that is no number below {_MAX_TOKENS}")


def _merges(model: Config) -> list[str]:
    """Each merge as "left right"; the file has that or a pair."""
    merges = []
    for index, merge in enumerate(model.items("merges")):
        pair = merge.split(" ") if type(merge) is str else merge
        if (
            type(pair) is not list
            or len(pair) != 2
            or not all(type(p) is str and p and " " not in p for p in pair)
        ):
            raise model.fail("merges", f"has no two parts without spaces at {index}")
        merges.append(f"{pair[0]} {pair[1]}")
    if not merges:
        raise model.fail("merges", "is missing or empty")
    return merges


def _scores(merges: list[str], tokens: dict[int, tuple[str, TokenType]]) -> dict[int, float]:
    """Scores for readers that merge by them: minus the rank of the merge that makes a token first."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", ""), rank)
    return {
        token: -float(ranks.get(text, len(merges)))
        for token, (text, kind) in tokens.items()
        if kind == TokenType.NORMAL
    }


def _normalizer(document: Config, steps: list[Config]) -> str:
    kinds = [step.text("type") for step in steps]
    if kinds not in ([], ["NFC"]):
        raise unsupported(document, f"the normaliser {' + '.join(kinds)[:80]}")
    return "nfc" if kinds else ""


def _space_prefix(document: Config, before: list[Config], splits: list[Config]) -> SpacePrefix:
    """How spaces become "▁": by normalising, as Llama 2 and Gemma have it, or by a Metaspace step."""
    kinds = [step.text("type") for step in before]
    if kinds in (["Prepend", "Replace"], ["Replace"]) and _replaces_spaces(before[-1]):
        if kinds[0] == "Prepend" and before[0].text("prepend") != SPACE:
            raise unsupported(document, f"a normaliser that prepends {before[0].text('prepend')[:20]!r}")
        if not splits or (len(splits) == 1 and _splits_nothing(splits[0])):
            return "always" if kinds[0] == "Prepend" else "never"
    elif not kinds and len(splits) == 1 and splits[0].text("type") == "Metaspace":
        return _metaspace(document, splits[0])
    names = [step.text("type") for step in (*before, *splits)]
    raise unsupported(document, f"the way from text to words ({' + '.join(names)[:120] or 'none'})")


def _replaces_spaces(step: Config) -> bool:
    return bool(step.section("pattern").get("String") == " " and step.get("content") == SPACE)


def _splits_nothing(step: Config) -> bool:
    """A split at spaces (Gemma has one), of which none are left by then."""
    return bool(step.text("type") == "Split" and step.section("pattern").get("String") == " ")


def _metaspace(document: Config, step: Config) -> SpacePrefix:
    scheme = step.text("prepend_scheme", "always" if step.flag("add_prefix_space", True) else "never")
    if step.text("replacement") != SPACE or step.flag("split", True) or scheme not in _PREPEND:
        raise unsupported(
            document, "a Metaspace step that splits words or replaces spaces otherwise than by '▁'"
        )
    prefix: SpacePrefix = _PREPEND[scheme]  # type: ignore[assignment]
    return prefix


def _template(document: Config) -> tuple[bool, bool]:
    """Whether a special token is put in front of a text, and behind it."""
    for step in _steps(document, "post_processor", "processors"):
        if step.text("type") == "TemplateProcessing":
            single = [
                Config(document.file, item, "post_processor.single[].") for item in step.items("single")
            ]
            if single:
                return single[0].has("SpecialToken"), single[-1].has("SpecialToken")
    return False, False
