"""SPM vocabularies: merging neighbours by the score of the token that they make.

Of all neighbours whose joined text is a token, the pair with the highest score is joined first, the leftmost
of equals; text that is not a token at the end is written as bytes. This is llama.cpp's rule, and gives its
ids. `tokenizers` has no model for it: its BPE needs ranked pairs (a 260,000-token vocabulary has millions of
possible pairs), and its Unigram searches for the best path, which is not the same.
"""

import heapq

import numpy as np

from powerinfer_tools.errors import TokenizerError
from powerinfer_tools.text.vocabulary import Vocabulary
from powerinfer_tools.text.words import SPACE, WordEncoder

__all__ = ["SPACE", "ScoreEncoder"]

_LENGTH_BITS, _PLACE_BITS = 25, 32
_LENGTH_MASK, _PLACE_MASK = (1 << _LENGTH_BITS) - 1, (1 << _PLACE_BITS) - 1


class ScoreEncoder(WordEncoder):
    """Raises TokenizerError for a character that the vocabulary cannot express."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__(vocabulary)
        self._ids = vocabulary.ids
        self._keys = _keys(vocabulary)
        self._bytes = [_byte_token(vocabulary, value) for value in range(256)]

    def _merge(self, word: str) -> list[int]:
        keys, ids = self._keys, self._ids
        if len(word) < 2:
            return self._spell(word)
        pieces = list(word)  # a joined text is at its first character's place, with "" at its other places
        before, after = list(range(-1, len(word) - 1)), [*range(1, len(word)), -1]
        # A candidate is one number that orders as (score descending, place, length of the joined text). It is
        # stale if the text now at that place and the next one together have another length; otherwise they
        # make the same token.
        heap = [
            keys[token] + (left << _LENGTH_BITS)
            for left, pair in enumerate(map(str.__add__, word, word[1:]))
            if (token := ids.get(pair)) is not None
        ]
        heapq.heapify(heap)
        while heap:
            candidate = heapq.heappop(heap)
            left = (candidate >> _LENGTH_BITS) & _PLACE_MASK
            right = after[left]
            joined = pieces[left] + pieces[right] if right >= 0 else ""
            if len(joined) != candidate & _LENGTH_MASK or not pieces[left]:
                continue
            pieces[left], pieces[right] = joined, ""
            following, preceding = after[right], before[left]
            after[left] = following
            if following >= 0:
                before[following] = left
                if (token := ids.get(joined + pieces[following])) is not None:
                    heapq.heappush(heap, keys[token] + (left << _LENGTH_BITS))
            if preceding >= 0 and (token := ids.get(pieces[preceding] + joined)) is not None:
                heapq.heappush(heap, keys[token] + (preceding << _LENGTH_BITS))
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


def _keys(vocabulary: Vocabulary) -> list[int]:
    """Each token's part of a candidate: the rank of its score (the highest first) and its length."""
    scores = vocabulary.scores if vocabulary.scores is not None else np.zeros(len(vocabulary), np.float32)
    _, ranks = np.unique(-scores, return_inverse=True)
    high = _LENGTH_BITS + _PLACE_BITS
    return [(rank << high) + len(text) for rank, text in zip(ranks.tolist(), vocabulary.texts, strict=True)]


def _byte_token(vocabulary: Vocabulary, value: int) -> int | None:
    token = vocabulary.ids.get(f"<0x{value:02X}>")
    if token is None and value < 128:  # a token of one ASCII character stands in for a missing byte token
        token = vocabulary.ids.get(chr(value))
    return token
