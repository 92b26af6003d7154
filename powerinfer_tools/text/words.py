"""Shared by encoders of SPM vocabularies: words that can be merged separately, and a cache of them."""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence

from powerinfer_tools.text.vocabulary import Vocabulary

SPACE = "▁"
_CACHE_LIMIT = 1 << 16
_CACHED_LENGTH = 64


class WordEncoder(ABC):
    """Text without special tokens → ids. Spaces must not be escaped yet."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._cuts = _cut_pattern(vocabulary)
        self._cache: dict[str, tuple[int, ...]] = {}

    def encode(self, text: str) -> list[int]:
        """Ids of `text`."""
        ids: list[int] = []
        cache = self._cache
        for word in self._cuts.split(text.replace(" ", SPACE)) if text else ():
            cached = cache.get(word)
            if cached is None:
                cached = tuple(self._merge(word))
                if len(cache) >= _CACHE_LIMIT:
                    cache.clear()
                if len(word) <= _CACHED_LENGTH:
                    cache[word] = cached
            ids += cached
        return ids

    @abstractmethod
    def _merge(self, word: str) -> Sequence[int]:
        """Ids of one word, whose spaces are escaped."""


def _cut_pattern(vocabulary: Vocabulary) -> re.Pattern[str]:
    """Matches (as an empty match) where a text can be cut into words that are merged separately.

    A cut before "▁" is safe after every character that no token has directly before a "▁": no merge reaches
    across such a cut. So each distinct word has to be merged only once.
    """
    bridges = set(re.findall(f"[^{SPACE}\\n](?={SPACE})", "\n".join(vocabulary.texts)))
    if any(f"\n{SPACE}" in text for text in vocabulary.texts):
        bridges.add("\n")
    stays = "".join(sorted(map(re.escape, bridges | {SPACE})))
    return re.compile(f"(?<=[^{stays}])(?={SPACE})")
