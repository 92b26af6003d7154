"""The tokeniser of a model, from its GGUF metadata; ids agree exactly with llama.cpp's."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cached_property

from powerinfer_tools.errors import TokenizerError
from powerinfer_tools.text.added_tokens import LeftmostPartition, NormalizedText
from powerinfer_tools.text.byte_pair import BytePairEncoder
from powerinfer_tools.text.longest_match import LongestMatchEncoder
from powerinfer_tools.text.partition import Fragment, SpecialPartition
from powerinfer_tools.text.pieces import Pieces, StreamDecoder
from powerinfer_tools.text.rank_merging import LineEncoder, RankEncoder
from powerinfer_tools.text.score_merging import SPACE, ScoreEncoder
from powerinfer_tools.text.special_tokens import TokenType, can_control
from powerinfer_tools.text.stand_ins import StandIns
from powerinfer_tools.text.vocabulary import MetadataSource, Vocabulary
from powerinfer_tools.text.words import WordEncoder


class Tokenizer:
    """Text ↔ token ids of one vocabulary."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        # Merges are only needed to build the encoder, and are hundreds of thousands of strings.
        self.tokens = replace(vocabulary, merges=())
        self._encoder = _encoder(vocabulary)
        self._normalize = _normalizer(vocabulary)
        added = self.tokens.added
        self._partition = (
            SpecialPartition(self.tokens)
            if added is None
            else LeftmostPartition(self.tokens, added, self._normalize)
        )
        self._pieces = Pieces(self.tokens)

    @classmethod
    def from_gguf(cls, gguf: MetadataSource) -> "Tokenizer":
        """The tokeniser of an opened GGUF file. Raises TokenizerError."""
        return cls(Vocabulary.from_gguf(gguf))

    @property
    def vocabulary(self) -> int:
        """The number of tokens."""
        return len(self.tokens)

    @property
    def bos_id(self) -> int | None:
        """The beginning-of-text token, if there is one."""
        return self.tokens.bos_id

    @property
    def eos_ids(self) -> frozenset[int]:
        """All tokens that end a generation: end of text, of turn, of message, …"""
        return self.tokens.end_ids

    @property
    def adds_bos(self) -> bool:
        """Whether the model wants its beginning-of-text token in front of every text."""
        return self.tokens.add_bos

    @cached_property
    def control_texts(self) -> frozenset[str]:
        """Texts of tokens that must not come from a user's message."""
        pairs = zip(self.tokens.texts, self.tokens.types, strict=True)
        return frozenset(text for text, type_ in pairs if can_control(text, type_))

    @property
    def notices(self) -> tuple[str, ...]:
        """Notices for the user about oddities of this vocabulary that were tolerated."""
        return self.tokens.notices

    def encode(
        self,
        text: str,
        *,
        add_bos: bool | None = None,
        parse_special: bool = False,
        stand_ins: StandIns | None = None,
    ) -> list[int]:
        """Ids of `text`.

        add_bos: whether to put the model's beginning-of-text token in front (and, if the model asks for it,
        its end-of-text token behind); None does what the model asks for. parse_special: whether control
        tokens written in the text (`<|im_start|>`) count as control tokens; not for untrusted text.
        stand_ins: the marks of untrusted parts; they are undone once control tokens are cut out. Raises
        TokenizerError for text with lone surrogates, and for add_bos without such a token.
        """
        _check_encodable(text)
        if parse_special:
            self._check_present(text)
        ids: list[int] = []
        if self.tokens.add_bos if add_bos is None else add_bos:
            if self.tokens.bos_id is None:
                raise TokenizerError("this vocabulary has no beginning-of-text token to add")
            ids.append(self.tokens.bos_id)
        for index, fragment in enumerate(self._fragments(text, parse_special, stand_ins)):
            if isinstance(fragment, int):
                ids.append(fragment)
            elif isinstance(fragment, NormalizedText):
                ids += self._encoder.encode(fragment)
            else:
                ids += self._encoder.encode(self._prefixed(self._normalize(fragment), first=index == 0))
        if self.tokens.add_eos and add_bos is not False and self.tokens.eos_id is not None:
            ids.append(self.tokens.eos_id)
        return ids

    def _check_present(self, text: str) -> None:
        for absent in self.tokens.absent:
            if absent in text:
                raise TokenizerError(
                    f"the text needs the token {absent[:40]!r}, for which the model's embedding has no row"
                )

    def _fragments(self, text: str, parse_special: bool, stand_ins: StandIns | None) -> Iterator[Fragment]:
        for fragment in self._partition.split(text, parse_special=parse_special):
            if stand_ins is None or isinstance(fragment, int):
                yield fragment
            else:
                yield from self._partition.split_message(stand_ins.undo(fragment))

    @property
    def _drops_space(self) -> bool:
        return self.tokens.kind == "spm" and self.tokens.space_prefix != "never"

    def _prefixed(self, fragment: str, *, first: bool) -> str:
        """``fragment`` with the space in front that the vocabulary wants."""
        rule = self.tokens.space_prefix
        if rule == "never" or (rule == "first-unless-space" and not first):
            return fragment
        # SPM writes a space as "▁" at this point, so that a "▁" of the text counts as a space.
        spaced = fragment.startswith((" ", SPACE) if self.tokens.kind == "spm" else " ")
        return fragment if rule != "always" and spaced else f" {fragment}"

    def decode(self, ids: Iterable[int], *, show_special: bool = False) -> str:
        """The text of `ids`, taken as a whole text: the space that SPM puts in front is dropped again."""
        decoder = StreamDecoder(self._pieces, show_special=show_special, drop_leading_space=self._drops_space)
        return decoder.push_all(ids) + decoder.finish()

    def stream(self, *, show_special: bool = False) -> StreamDecoder:
        """A decoder for ids that continue a text: its leading space is kept, control tokens are hidden."""
        return StreamDecoder(self._pieces, show_special=show_special)

    @property
    def control_ids(self) -> frozenset[int]:
        """Tokens that are not text: control tokens and tokens that end a generation."""
        types = enumerate(self.tokens.types)
        hidden = {token for token, kind in types if kind in (TokenType.CONTROL, TokenType.UNKNOWN)}
        return frozenset(hidden | self.tokens.end_ids)

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token; control tokens as written. Raises TokenizerError."""
        return self._pieces.of(token, show_special=True)

    def token_text(self, token: int) -> str:
        """One token for people to read: control tokens as written, incomplete characters as U+FFFD."""
        return self._pieces.of(token, show_special=True).decode(errors="replace")


def _encoder(vocabulary: Vocabulary) -> BytePairEncoder | WordEncoder | LongestMatchEncoder:
    if vocabulary.kind == "rwkv":
        return LongestMatchEncoder(vocabulary)
    if vocabulary.kind == "bpe":
        return BytePairEncoder(vocabulary)
    if vocabulary.pre is not None:
        return LineEncoder(vocabulary)
    return RankEncoder(vocabulary) if vocabulary.merges else ScoreEncoder(vocabulary)


def _normalizer(vocabulary: Vocabulary) -> Callable[[str], str]:
    if not vocabulary.normalizer:
        return str
    from tokenizers import normalizers

    # Not Python's own function, which knows the characters of another version of Unicode.
    normalize: Callable[[str], str] = normalizers.NFC().normalize_str
    return normalize


def _check_encodable(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"the text is not valid Unicode: lone surrogate at character {error.start}"
        ) from None
