"""SPM vocabularies: merging neighbours by the score of the token that they make.

Of all neighbours whose joined text is a token, the pair with the highest score is joined first, the leftmost
of equals; what is no token at the end is written as bytes. This is llama.cpp's rule, and gives its ids.
`tokenizers` has no model for it: its BPE wants ranked pairs (a 260,000-token vocabulary has millions of
possible ones), its Unigram searches for the best path, which is not the same.
"""

import heapq
import re

import numpy as np

from powerinfer_tools.errors import TokenizerError
from powerinfer_tools.text.vocabulary import Vocabulary

SPACE = "▁"
_CACHE_LIMIT = 1 << 16
_CACHED_LENGTH = 64


class ScoreEncoder:
    """Text without special tokens → ids. Spaces must not be escaped yet."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._ids = vocabulary.ids
        scores = vocabulary.scores if vocabulary.scores is not None else np.zeros(len(vocabulary), np.float32)
        self._scores: list[float] = scores.tolist()
        self._cuts = _cut_pattern(vocabulary)
        self._bytes = [_byte_token(vocabulary, value) for value in range(256)]
        self._cache: dict[str, tuple[int, ...]] = {}

    def encode(self, text: str) -> list[int]:
        """Ids of `text`. Raises TokenizerError for a character that the vocabulary cannot express."""
        ids: list[int] = []
        cache = self._cache
        for word in self._cuts.split(text.replace(" ", SPACE)) if text else ():
            known = cache.get(word)
            if known is None:
                known = tuple(self._merge(word))
                if len(cache) >= _CACHE_LIMIT:
                    cache.clear()
                if len(word) <= _CACHED_LENGTH:
                    cache[word] = known
            ids += known
        return ids

    def _merge(self, word: str) -> list[int]:
        token = self._ids.get(word) if len(word) == 1 else None
        if token is not None:
            return [token]
        pieces = list(word)  # joined text at its first character's place, "" where it was joined away
        count = len(pieces)
        before, after = list(range(-1, count - 1)), [*range(1, count), -1]
        heap: list[tuple[float, int, int, int]] = []  # (-score, left, right, length), compared in this order

        def offer(left: int, right: int) -> None:
            joined = pieces[left] + pieces[right]
            token = self._ids.get(joined)
            if token is not None:
                heapq.heappush(heap, (-self._scores[token], left, right, len(joined)))

        for right in range(1, count):
            offer(right - 1, right)
        while heap:
            _, left, right, length = heapq.heappop(heap)
            if not pieces[left] or not pieces[right] or len(pieces[left]) + len(pieces[right]) != length:
                continue  # one of them has been joined to another meanwhile
            pieces[left] += pieces[right]
            pieces[right] = ""
            after[left] = after[right]
            if after[left] >= 0:
                before[after[left]] = left
                offer(left, after[left])
            if before[left] >= 0:
                offer(before[left], left)
        return [token for piece in pieces if piece for token in self._spell(piece)]

    def _spell(self, piece: str) -> list[int]:
        token = self._ids.get(piece)
        if token is not None:
            return [token]
        tokens = [self._bytes[value] for value in piece.encode()]
        if None in tokens:
            raise TokenizerError(
                f"character {piece!r} cannot be tokenised: the vocabulary has neither a token for it nor the "
                "byte tokens (<0x00> to <0xFF>) to spell it"
            )
        return [token for token in tokens if token is not None]


def _byte_token(vocabulary: Vocabulary, value: int) -> int | None:
    token = vocabulary.ids.get(f"<0x{value:02X}>")
    if token is None and value < 128:  # a token of one ASCII character stands in for a missing byte token
        token = vocabulary.ids.get(chr(value))
    return token


def _cut_pattern(vocabulary: Vocabulary) -> re.Pattern[str]:
    """Matches (emptily) where a text can be cut into words that are merged apart from each other.

    A cut before "▁" is safe after every character that no token holds directly before a "▁": no merge reaches
    over it. So each distinct word has to be merged only once.
    """
    bridges = set(re.findall(f"[^{SPACE}\\n](?={SPACE})", "\n".join(vocabulary.texts)))
    if any(f"\n{SPACE}" in text for text in vocabulary.texts):
        bridges.add("\n")
    stays = "".join(sorted(map(re.escape, bridges | {SPACE})))
    return re.compile(f"(?<=[^{stays}])(?={SPACE})")
