"""The windows of token ids that relufy learns from and is judged by."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from powerinfer_tools.errors import CorpusError
from powerinfer_tools.model.loading import Model
from powerinfer_tools.progress import Progress
from powerinfer_tools.stages.profile.corpus import documents, find_files
from powerinfer_tools.text import Tokenizer

Tokens = npt.NDArray[np.int64]
#: Of twenty consecutive windows, the last is held out: every file contributes, and none is seen in training.
HOLD_OUT_EVERY = 20


def text_windows(
    model: Model, corpus: Sequence[Path], window: int, progress: Progress
) -> tuple[Tokens, Tokens]:
    """Windows (n, window) to train with and to validate with; documents are joined, with BOS between them
    where the model has one.

    Raises CorpusError for a corpus of fewer than twenty windows.
    """
    tokenizer = Tokenizer.from_gguf(model.source)
    separator = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ids: list[int] = []
    for file in find_files(corpus):
        for document in documents(file, progress):
            ids += separator + tokenizer.encode(document, add_bos=False)
    count = len(ids) // window
    if count < HOLD_OUT_EVERY:
        raise CorpusError(
            f"the corpus has {len(ids):,} tokens, fewer than {HOLD_OUT_EVERY} windows of {window}; "
            "give more text or a smaller --ctx"
        )
    windows = np.asarray(ids[: count * window], dtype=np.int64).reshape(count, window)
    held = np.arange(count) % HOLD_OUT_EVERY == HOLD_OUT_EVERY - 1
    return windows[~held], windows[held]


def training_order(count: int, needed: int, seed: int) -> npt.NDArray[np.int64]:
    """``needed`` indices of ``count`` windows: every window once in random order, then again."""
    generator = np.random.default_rng(seed)
    rounds = [generator.permutation(count) for _ in range(max(1, -(-needed // count)))]
    return np.concatenate(rounds)[:needed]
