"""An engine without a model, for tests of what drives engines: a given text, or a function of all tokens so
far."""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from powerinfer_tools.errors import ContextFull
from powerinfer_tools.progress import Progress


class ScriptedEngine:
    """Keeps the ids that a KV cache would hold; `next_token` says which token follows them."""

    def __init__(self, next_token: Callable[[list[int]], int], vocabulary: int, context: int = 1000) -> None:
        self.cache: list[int] = []
        self.context = context
        self.prefilled: list[list[int]] = []
        self.interrupt_at: int | None = None
        self._next_token = next_token
        self._logits = np.zeros(vocabulary, np.float32)

    @property
    def position(self) -> int:
        return len(self.cache)

    def prefill(self, tokens: Sequence[int], progress: Progress | None = None) -> npt.NDArray[np.float32]:
        assert tokens
        if len(self.cache) + len(tokens) > self.context:
            raise ContextFull(f"{len(tokens)} more tokens do not fit")
        self.prefilled.append(list(tokens))
        self.cache += tokens
        return self._forward()

    def decode(self, token: int) -> npt.NDArray[np.float32]:
        assert len(self.cache) < self.context
        self.cache.append(token)
        if self.interrupt_at == len(self.cache):
            raise KeyboardInterrupt
        return self._forward()

    def rewind(self, position: int) -> int:
        assert 0 <= position <= len(self.cache)
        del self.cache[position:]
        return position

    def _forward(self) -> npt.NDArray[np.float32]:
        """The same array each time, as an engine may do: whoever keeps old logits sees them change."""
        self._logits[:] = np.random.default_rng(self.cache).standard_normal(len(self._logits))
        self._logits[self._next_token(self.cache)] = 10
        return self._logits


def script(prompt: Sequence[int], answer: Sequence[int]) -> Callable[[list[int]], int]:
    """After `prompt` comes `answer`, whose last token then repeats."""
    start = len(prompt)
    return lambda cache: answer[min(len(cache) - start, len(answer) - 1)]
