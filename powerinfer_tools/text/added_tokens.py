"""Cutting added tokens out of a text as the ``tokenizers`` package does, for vocabularies of Hugging Face.

At each position from the left, the longest token is taken. A token may swallow the white space beside it, or
be taken only where it is a word of its own. Tokens marked as normalised are searched in a second pass over
the remaining text. In this pass that text is normalised like the model's text, and so are the tokens' texts.
"""

import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from powerinfer_tools.text.partition import Fragment
from powerinfer_tools.text.score_merging import SPACE
from powerinfer_tools.text.special_tokens import TokenType, can_control
from powerinfer_tools.text.vocabulary import AddedTokens, Vocabulary

#: White space as Unicode defines it; Python's own `isspace` also counts four ASCII separators.
_WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)
_JOINERS = "\u200c\u200d"
#: Symbols that count as letters: circled, squared and negative ones.
_LETTER_SYMBOLS = ((0x24B6, 0x24E9), (0x1F130, 0x1F149), (0x1F150, 0x1F169), (0x1F170, 0x1F189))


class NormalizedText(str):
    """A piece that already has the leading space that the vocabulary wants."""


@dataclass(frozen=True)
class _Finder:
    """Tokens by their text, and the lengths of tokens by their first character, longest first."""

    tokens: Mapping[str, int]
    lengths: Mapping[str, tuple[int, ...]]
    first: re.Pattern[str]

    @classmethod
    def of(cls, tokens: Mapping[str, int]) -> "_Finder":
        lengths: dict[str, set[int]] = {}
        for text in tokens:
            lengths.setdefault(text[0], set()).add(len(text))
        first = re.compile(f"[{re.escape(''.join(lengths))}]" if lengths else "(?!)")
        return cls(
            tokens, {char: tuple(sorted(sizes, reverse=True)) for char, sizes in lengths.items()}, first
        )

    def matches(self, text: str) -> Iterator[tuple[int, int, int]]:
        """Start, end and token of each match; they do not overlap."""
        at = 0
        while (candidate := self.first.search(text, at)) is not None:
            start = candidate.start()
            ends = (start + length for length in self.lengths[text[start]])
            end = next((end for end in ends if text[start:end] in self.tokens), None)
            if end is None:
                at = start + 1
            else:
                yield start, end, self.tokens[text[start:end]]
                at = end


class LeftmostPartition:
    """The partition of a vocabulary with `added` tokens; the same interface as `SpecialPartition`."""

    def __init__(self, vocabulary: Vocabulary, added: AddedTokens, normalize: Callable[[str], str]) -> None:
        self._vocabulary, self._added, self._normalize = vocabulary, added, normalize
        self._prefixes = vocabulary.kind == "spm" and vocabulary.space_prefix == "always"
        self._finder = cache(self._make_finder)

    def split(self, text: str, *, parse_special: bool) -> list[Fragment]:
        """`text` as fragments in order; control tokens count if `parse_special` is set."""
        return self._split(text, self._special if parse_special else self._ordinary)

    def split_message(self, text: str) -> list[Fragment]:
        """A chat user's `text` as fragments: tokens that can control a chat are text."""
        return self._split(text, self._harmless)

    @staticmethod
    def _special(text: str, type_: int) -> bool:
        return True

    @staticmethod
    def _ordinary(text: str, type_: int) -> bool:
        return type_ == TokenType.USER_DEFINED

    @staticmethod
    def _harmless(text: str, type_: int) -> bool:
        return type_ == TokenType.USER_DEFINED and not can_control(text, type_)

    def _make_finder(self, belongs: Callable[[str, int], bool], normalized: bool) -> _Finder:
        texts, types = self._vocabulary.texts, self._vocabulary.types
        tokens: dict[str, int] = {}
        for token in sorted(self._added.ids):
            if (token in self._added.normalized) == normalized and belongs(texts[token], types[token]):
                text = self._normal(texts[token]) if normalized else texts[token]
                if text:
                    tokens.setdefault(text, token)
        return _Finder.of(tokens)

    def _normal(self, text: str) -> str:
        normal = self._normalize(text)
        if self._vocabulary.kind == "spm" and self._prefixes and normal:
            normal = SPACE + normal.replace(" ", SPACE)
        return normal

    def _split(self, text: str, belongs: Callable[[str, int], bool]) -> list[Fragment]:
        raw, normalized = self._finder(belongs, False), self._finder(belongs, True)
        fragments = self._cut(text, raw)
        if not normalized.tokens:
            return fragments
        parts: list[Fragment] = []
        for fragment in fragments:
            if isinstance(fragment, int):
                parts.append(fragment)
                continue
            pieces = self._cut(self._normal(fragment), normalized)
            done = NormalizedText if self._prefixes else str
            parts += (piece if isinstance(piece, int) else done(piece) for piece in pieces)
        return parts

    def _cut(self, text: str, finder: _Finder) -> list[Fragment]:
        parts: list[Fragment] = []
        behind = 0  # the end of the token before, with the white space that it took
        for start, end, token in finder.matches(text):
            if token in self._added.single_word and not _is_word(text, start, end):
                continue
            if token in self._vocabulary.strips_left:
                start = max(len(text[:start].rstrip(_WHITE_SPACE)), behind)
            if token in self._vocabulary.strips_right:
                end = len(text) - len(text[end:].lstrip(_WHITE_SPACE))
            if behind < start:
                parts.append(text[behind:start])
            parts.append(token)
            behind = end
        if behind < len(text):
            parts.append(text[behind:])
        return parts


def _is_word(text: str, start: int, end: int) -> bool:
    return not (start and _in_words(text[start - 1])) and not (end < len(text) and _in_words(text[end]))


def _in_words(character: str) -> bool:
    r"""Whether Unicode's ``\w`` matches."""
    kind = unicodedata.category(character)
    return (
        kind[0] in "LM"
        or kind in ("Nd", "Nl", "Pc")
        or character in _JOINERS
        or any(low <= ord(character) <= high for low, high in _LETTER_SYMBOLS)
    )
