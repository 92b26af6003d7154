"""How far a model with thresholds is from dense, on windows of text whose dense answers are kept."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from powerinfer_tools.engine import Engine
from powerinfer_tools.quality.perplexity import log_softmax

Floats = npt.NDArray[np.float32]


class Judge:
    """Keeps dense ln p of the last ``scored`` positions of each window: float32, vocabulary · scored values
    a window. The engine must be dense when this is made."""

    def __init__(self, engine: Engine, windows: Sequence[list[int]], scored: int) -> None:
        self.engine, self.windows = engine, windows
        self.first = max(0, len(windows[0]) - 1 - scored)
        self._dense = [self._log_probabilities(window) for window in windows]

    def increase(self, count: int | None = None) -> float:
        """The relative increase of perplexity over dense on the first ``count`` windows.

        The larger of two estimates: the measured ratio, and exp of the Kullback-Leibler divergence, which is
        what ln of the ratio would be on text that the dense model itself has written. The second has far less
        noise, and keeps a lucky sample from looking like a gain.
        """
        divergence, difference, positions = 0.0, 0.0, 0
        for window, dense in zip(self.windows[:count], self._dense[:count], strict=True):
            own = self._log_probabilities(window)
            divergence += float((np.exp(dense) * (dense - own)).sum(dtype=np.float64))
            rows = np.arange(len(own))
            targets = window[self.first + 1 : self.first + 1 + len(own)]
            difference += float((dense[rows, targets] - own[rows, targets]).sum(dtype=np.float64))
            positions += len(own)
        return math.exp(max(divergence, difference) / positions) - 1

    def _log_probabilities(self, window: list[int]) -> Floats:
        rows = [log_softmax(logits).astype(np.float32) for logits in self.engine.score(window, self.first)]
        return np.concatenate(rows)[: len(window) - 1 - self.first]
