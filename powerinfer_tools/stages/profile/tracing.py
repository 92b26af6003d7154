"""Taking samples for a trace while a corpus is profiled."""

import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from powerinfer_formats.atomic import require_space
from powerinfer_formats.trace import TraceHeader, encode_frame, record_bytes, write_trace
from powerinfer_tools import __version__
from powerinfer_tools.engine.layers import Watch
from powerinfer_tools.model.loading import Model
from powerinfer_tools.stages.profile.windows import Window

Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]
#: Tokens sampled from one window: enough to compress and to read in one go, few enough to vary the text.
RECORDS_PER_WINDOW = 64
_LARGEST_HALF = float(np.finfo(np.float16).max)


def unfinished_trace(output: Path) -> Path:
    """Where the records of interrupted work wait: frames, each after its length (u32)."""
    return output.with_name(output.name + ".unfinished")


def sample(lengths: Sequence[int], records: int, seed: int = 0) -> dict[int, Rows]:
    """The rows to record of some windows (by index), ``records`` in all or as many as there are.

    Random windows, each with :data:`RECORDS_PER_WINDOW` random rows, or more where there are few windows.
    The choice depends on the arguments alone.
    """
    generator = np.random.default_rng(seed)
    chosen: dict[int, Rows] = {}
    share = max(RECORDS_PER_WINDOW, -(-records // max(1, len(lengths))))
    order = generator.permutation(len(lengths))
    rows = [generator.permutation(lengths[window]) for window in order]
    left = records
    # The second round takes from long windows what short ones could not give.
    for limit in (share, max(lengths, default=0)):
        for window, some in zip(order.tolist(), rows, strict=True):
            had = len(chosen.get(window, ()))
            take = min(limit, len(some), had + left)
            if take > had:
                chosen[window] = np.sort(some[:take])
                left -= take - had
    return chosen


class TraceRecorder:
    """Collects the sampled rows of every layer, window by window, in a file that survives interrupts."""

    def __init__(self, model: Model, windows: Sequence[Window], records: int, output: Path) -> None:
        self.model, self.output = model, output
        self.rows = sample([len(window.tokens) for window in windows], records)
        self.chunks = [len(self.rows[window]) for window in sorted(self.rows)]
        size = record_bytes(model.hyper.width, model.hyper.neurons) * model.hyper.layers
        # Once as it grows, and once more when it is put together.
        require_space(output, 2 * size * sum(self.chunks))
        self._frames: list[bytes] = []

    def watcher(self, window: int) -> Watch | None:
        """What is to look on while ``window`` is read; None where nothing of it is recorded."""
        rows = self.rows.get(window)
        if rows is None:
            return None

        def record(layer: int, normed: Floats, hidden: Floats) -> None:
            inputs = np.clip(normed[rows], -_LARGEST_HALF, _LARGEST_HALF).astype(np.float16)
            self._frames.append(encode_frame(inputs, hidden[rows] != 0))

        return record

    def begin(self) -> None:
        """Forget the records of earlier work."""
        unfinished_trace(self.output).unlink(missing_ok=True)

    def close_window(self) -> None:
        """Keep what the last window gave."""
        with unfinished_trace(self.output).open("ab") as stream:
            for frame in self._frames:
                stream.write(struct.pack("<I", len(frame)) + frame)
        self._frames.clear()

    def sync(self) -> None:
        """Make everything that was kept durable."""
        with unfinished_trace(self.output).open("ab") as stream:
            os.fsync(stream.fileno())

    def resume(self, windows: int) -> bool:
        """Go on after ``windows`` windows, without what came later. False where records are missing."""
        path = unfinished_trace(self.output)
        records = sum(window < windows for window in self.rows) * self.model.hyper.layers
        if not path.exists():
            return records == 0
        with path.open("r+b") as stream:
            for _ in range(records):
                if _next_frame(stream) is None:
                    return False
            stream.truncate(stream.tell())
        return True

    def finish(self, window: int, corpus_hashes: tuple[str, ...]) -> None:
        """Write the trace."""
        hyper = self.model.hyper
        header = TraceHeader(
            fingerprint=self.model.fingerprint,
            model_name=self.model.name,
            activation=hyper.activation,
            width=hyper.width,
            neurons=hyper.neurons,
            layers=hyper.layers,
            window=window,
            corpus_hashes=corpus_hashes,
            tool_version=__version__,
            chunks=tuple(self.chunks),
        )
        write_trace(self.output, header, self._kept())

    def _kept(self) -> Iterator[bytes]:
        with unfinished_trace(self.output).open("rb") as stream:
            while (frame := _next_frame(stream)) is not None:
                yield frame


def _next_frame(stream: BinaryIO) -> bytes | None:
    """The next frame; None at the end, and for one that a kill cut off."""
    head = stream.read(4)
    if len(head) < 4:
        return None
    (size,) = struct.unpack("<I", head)
    frame = stream.read(size)
    return frame if len(frame) == size else None
