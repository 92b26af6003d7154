"""Cutting special tokens out of a text before it is tokenised, in llama.cpp's order.

The longest special token is searched first, in the whole text; then the next longest in the remaining text,
and so on. This differs from one scan that takes the longest token at each position: `abcd` beats `xab` in
"xabcd".
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from powerinfer_tools.text.special_tokens import TokenType, can_control
from powerinfer_tools.text.vocabulary import Vocabulary

Fragment = str | int
"""A piece of text still to be tokenised, or the id of a special token."""

_WHITE_SPACE = " \t\n\v\f\r"  # the characters that C's isspace() accepts: other Unicode spaces are kept
_PREFIX = 4


class SpecialPartition:
    """Always finds user-defined tokens, but control and unknown tokens only if the caller trusts the text."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._texts = vocabulary.texts
        self._strips_left = vocabulary.strips_left
        self._strips_right = vocabulary.strips_right
        types = np.array(vocabulary.types)
        always = types == TokenType.USER_DEFINED
        trusted = (types == TokenType.CONTROL) | (types == TokenType.UNKNOWN)
        user_defined = np.flatnonzero(always).tolist()
        self._always = self._group(user_defined)
        self._in_messages = self._group(
            [token for token in user_defined if not can_control(self._texts[token], types[token])]
        )
        self._all = self._group(np.flatnonzero(always | trusted).tolist())

    def _group(self, tokens: Sequence[int]) -> dict[str, list[int]]:
        """Tokens by the first characters of their text, so that a text without these is passed quickly.

        Some vocabularies have thousands of special tokens, but in a few dozen groups.
        """
        groups: dict[str, list[int]] = defaultdict(list)
        for token in tokens:
            groups[self._texts[token][:_PREFIX]].append(token)
        return dict(groups)

    def split(self, text: str, *, parse_special: bool) -> list[Fragment]:
        """`text` as fragments in order. Empty text gives no fragments."""
        return self._split(text, self._all if parse_special else self._always)

    def split_message(self, text: str) -> list[Fragment]:
        """A chat user's `text` as fragments: tokens that can control a chat are text."""
        return self._split(text, self._in_messages)

    def _split(self, text: str, groups: Mapping[str, Sequence[int]]) -> list[Fragment]:
        present = [
            token
            for prefix, tokens in groups.items()
            if prefix in text
            for token in tokens
            if self._texts[token] in text
        ]
        present.sort(key=lambda token: (-len(self._texts[token].encode()), token))
        fragments: list[Fragment] = [text] if text else []
        for token in present:
            fragments = [
                part
                for fragment in fragments
                for part in (self._cut(fragment, token) if isinstance(fragment, str) else (fragment,))
            ]
        return fragments

    def _cut(self, text: str, token: int) -> list[Fragment]:
        pieces = text.split(self._texts[token])
        parts: list[Fragment] = []
        for index, piece in enumerate(pieces):
            if index > 0:
                parts.append(token)
                if token in self._strips_right:
                    piece = piece.lstrip(_WHITE_SPACE)
            if index < len(pieces) - 1 and token in self._strips_left:
                piece = piece.rstrip(_WHITE_SPACE)
            if piece:
                parts.append(piece)
        return parts
