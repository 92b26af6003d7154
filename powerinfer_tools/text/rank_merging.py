"""SPM vocabularies with ranked merges, as in a tokenizer.json of the Llama 2 kind.

A list says which neighbours may be joined, and in which order. Without the list, the score of the resulting
token decides. The two rules agree for most texts, but not for all. `tokenizers` does the work.
"""

import re
from collections.abc import Sequence

from powerinfer_tools.errors import TokenizerError
from powerinfer_tools.text.special_tokens import TokenType
from powerinfer_tools.text.vocabulary import Vocabulary
from powerinfer_tools.text.words import WordEncoder


class RankEncoder(WordEncoder):
    """Characters without a token are written in bytes, else become the unknown token, else vanish."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        from tokenizers import Tokenizer, models

        super().__init__(vocabulary)
        unknown = [
            text
            for text, kind in zip(vocabulary.texts, vocabulary.types, strict=True)
            if kind == TokenType.UNKNOWN
        ]
        model = models.BPE(
            vocab=dict(vocabulary.ids),
            merges=_pairs(vocabulary),
            byte_fallback=TokenType.BYTE in vocabulary.types,
            unk_token=unknown[0] if unknown else None,
            fuse_unk=True,
        )
        self._backend = Tokenizer(model)

    def _merge(self, word: str) -> Sequence[int]:
        ids: list[int] = self._backend.encode(word, add_special_tokens=False).ids
        return ids


class LineEncoder(RankEncoder):
    """Gemma 4's vocabulary: no merge crosses the end of a line, and a run of line ends may be one token."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__(vocabulary)
        self._ids = vocabulary.ids

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``."""
        ids: list[int] = []
        for run in re.findall(r"[^\n]+|\n+", text):
            token = self._ids.get(run) if run[0] == "\n" else None
            ids += super().encode(run) if token is None else [token]
        return ids


def _pairs(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in vocabulary.merges)]
    for index, (left, right) in enumerate(pairs):
        for text in (left, right, left + right):
            if text not in vocabulary.ids:
                raise TokenizerError(f"tokenizer.ggml.merges[{index}] needs {text[:40]!r}, which is no token")
    return pairs
