"""Sampled records of a model at work: the input of every FFN and which of its neurons were active.

A file in the seekable format of zstd (frames, then a table of their sizes in a skippable frame), so that the
records of one layer are read without the others, and ``zstd -d`` still takes the whole.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import zstandard
from numpy.typing import NDArray

from powerinfer_formats import errors
from powerinfer_formats.atomic import write_atomic
from powerinfer_formats.frames import require_ratio
from powerinfer_formats.records import dump_header, read_header

FORMAT, VERSION = "powerinfer-trace", 1
#: Magic numbers of the seekable format: of the skippable frame, and at the very end of the file.
_TABLE_MAGIC, _END_MAGIC = 0x184D2A5E, 0x8F92EAB1
_FOOTER = struct.Struct("<IBI")
MAX_DOCUMENT_BYTES = 16 << 20
MAX_FRAMES = 1 << 24
MAX_FRAME_BYTES = 1 << 30
#: Fast; half-precision activations hardly compress.
_LEVEL = 1


@dataclass(frozen=True)
class TraceHeader:
    """The origin of a trace. ``chunks`` are the numbers of records that were sampled together, in order."""

    fingerprint: str
    model_name: str
    activation: str
    width: int
    neurons: int
    layers: int
    window: int
    corpus_hashes: tuple[str, ...]
    tool_version: str
    chunks: tuple[int, ...]

    @property
    def records(self) -> int:
        """Sampled tokens."""
        return sum(self.chunks)

    @property
    def record_bytes(self) -> int:
        """Bytes of one record of one layer, uncompressed."""
        return record_bytes(self.width, self.neurons)


def record_bytes(width: int, neurons: int) -> int:
    """Bytes of one token's record in one layer: half-precision inputs and a bit for every neuron."""
    return 2 * width + -(-neurons // 8)


def encode_frame(inputs: NDArray[np.float16], active: NDArray[np.bool_]) -> bytes:
    """A frame of records: ``inputs`` (t, width), ``active`` (t, neurons)."""
    masks = np.packbits(active, axis=1, bitorder="little")
    data = np.ascontiguousarray(inputs, "<f2").tobytes() + masks.tobytes()
    return zstandard.ZstdCompressor(level=_LEVEL, write_content_size=True).compress(data)


def write_trace(path: str | os.PathLike[str], header: TraceHeader, frames: Iterable[bytes]) -> None:
    """Write ``frames`` (from :func:`encode_frame`; of every chunk, all layers in order) atomically."""
    document = dump_header(header, (FORMAT, VERSION))
    sizes: list[tuple[int, int]] = []
    with write_atomic(path) as stream:
        first = zstandard.ZstdCompressor(level=_LEVEL).compress(document.encode("utf-8"))
        for frame in _chain(first, frames):
            stream.write(frame)
            sizes.append((len(frame), zstandard.frame_content_size(frame)))
        if len(sizes) != 1 + len(header.chunks) * header.layers:
            raise errors.WriteOrder(path, f"{len(sizes) - 1} frames do not make whole chunks")
        table = b"".join(struct.pack("<II", *size) for size in sizes)
        footer = _FOOTER.pack(len(sizes), 0, _END_MAGIC)
        stream.write(struct.pack("<II", _TABLE_MAGIC, len(table) + len(footer)) + table + footer)


def is_seekable(path: str | os.PathLike[str]) -> bool:
    """Whether the file ends as a trace does, with a table of frames."""
    with Path(path).open("rb") as stream:
        stream.seek(max(0, stream.seek(0, os.SEEK_END) - 4))
        return stream.read() == struct.pack("<I", _END_MAGIC)


class TraceFile:
    """An open trace; a context manager. :meth:`read` hands out the records of one layer."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open and check everything but the records.

        Raises ``CannotRead``, ``NotARegularFile``, ``TruncatedFile``, ``BadMagic``, ``BadFrame``,
        ``BadDocument`` or ``BadField``.
        """
        self.path = Path(path)
        if self.path.exists() and not self.path.is_file():
            raise errors.NotARegularFile(self.path, "is not a regular file")
        try:
            self._stream: BinaryIO = self.path.open("rb")
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise errors.CannotRead(self.path, f"cannot be opened: {reason}") from None
        try:
            self._sizes = self._read_table()
            self._offsets = np.concatenate(([0], np.cumsum(self._sizes[:, 0])))
            self.header = self._read_header()
            self._check_sizes()
        except BaseException:
            self._stream.close()
            raise

    def __enter__(self) -> TraceFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def require_model(self, fingerprint: str, name: str, shape: tuple[int, int, int]) -> None:
        """Raise ``OtherModel``, with both names, unless the trace is of this very model; ``shape`` is its
        number of layers, width and neurons."""
        header = self.header
        if header.fingerprint != fingerprint or shape != (header.layers, header.width, header.neurons):
            raise errors.OtherModel(
                self.path, f"is a trace of {self.header.model_name!r}, not of {name!r}; profile again"
            )

    def read(
        self, layer: int, chunks: Sequence[int] | None = None
    ) -> tuple[NDArray[np.float16], NDArray[np.bool_]]:
        """Inputs (t, width) and active neurons (t, neurons) of ``layer`` in ``chunks`` (None: all).

        Raises ``BadFrame`` for records that are damaged.
        """
        header = self.header
        chosen = range(len(header.chunks)) if chunks is None else chunks
        inputs = np.empty((sum(header.chunks[chunk] for chunk in chosen), header.width), np.float16)
        active = np.empty((len(inputs), header.neurons), np.bool_)
        row = 0
        for chunk in chosen:
            count = header.chunks[chunk]
            data = self._frame(1 + chunk * header.layers + layer)
            half = 2 * header.width * count
            inputs[row : row + count] = np.frombuffer(data[:half], "<f2").reshape(count, -1)
            masks = np.frombuffer(data[half:], np.uint8).reshape(count, -1)
            bits = np.unpackbits(masks, axis=1, bitorder="little")
            if bits[:, header.neurons :].any():
                raise errors.BadFrame(self.path, f"chunk {chunk}, layer {layer}: bits beyond the last neuron")
            active[row : row + count] = bits[:, : header.neurons]
            row += count
        if not np.isfinite(inputs).all():
            raise errors.BadFrame(self.path, f"layer {layer} has inputs that are not finite")
        return inputs, active

    def _read_table(self) -> NDArray[np.int64]:
        size = os.fstat(self._stream.fileno()).st_size
        if size < 8 + _FOOTER.size:
            raise errors.TruncatedFile(self.path, f"has {size} bytes, too few for a trace")
        self._stream.seek(size - _FOOTER.size)
        count, flags, magic = _FOOTER.unpack(self._stream.read(_FOOTER.size))
        if magic != _END_MAGIC or flags:
            raise errors.BadMagic(
                self.path, "does not end as a trace does; it is another file, or was cut off"
            )
        table = 8 * count + _FOOTER.size
        if not 1 <= count <= MAX_FRAMES or size < table + 8:
            raise errors.BadFrame(self.path, f"announces {count} frames, which its size does not allow")
        self._stream.seek(size - table - 8)
        head = struct.unpack("<II", self._stream.read(8))
        sizes = np.frombuffer(self._stream.read(8 * count), "<u4").reshape(count, 2).astype(np.int64)
        if head != (_TABLE_MAGIC, table) or sizes[:, 0].sum() != size - table - 8:
            raise errors.BadFrame(self.path, "its table of frames contradicts its size")
        return sizes

    def _read_header(self) -> TraceHeader:
        if self._sizes[0, 1] > MAX_DOCUMENT_BYTES:
            raise errors.BadFrame(self.path, f"its document has {self._sizes[0, 1]} bytes, too many")
        try:
            text = self._frame(0).decode("utf-8")
        except UnicodeDecodeError as error:
            raise errors.InvalidUTF8(self.path, f"its document is not UTF-8 at byte {error.start}") from None
        header = read_header(TraceHeader, text, self.path, (FORMAT, VERSION), "a trace")
        for name, value in vars(header).items():
            if isinstance(value, int) and not 1 <= value <= 1 << 24:
                raise errors.BadField(self.path, f"{name} is {value}, expected 1 to 2^24")
        if not header.chunks or min(header.chunks) < 1:
            raise errors.BadField(self.path, "chunks are empty")
        return header

    def _check_sizes(self) -> None:
        header = self.header
        if len(self._sizes) != 1 + len(header.chunks) * header.layers:
            raise errors.BadFrame(
                self.path,
                f"has {len(self._sizes) - 1} frames, expected {len(header.chunks)} of {header.layers} layers",
            )
        expected = np.repeat(np.array(header.chunks, np.int64) * header.record_bytes, header.layers)
        if (self._sizes[1:, 1] != expected).any() or expected.max() > MAX_FRAME_BYTES:
            raise errors.BadFrame(self.path, "a frame is not as large as its records")

    def _frame(self, index: int) -> bytes:
        packed, plain = (int(n) for n in self._sizes[index])
        self._stream.seek(int(self._offsets[index]))
        data = self._stream.read(packed)
        try:
            # Without a size of its own, or with another, a frame could grow beyond what was checked.
            require_ratio(self.path, packed, plain)
            if zstandard.frame_content_size(data) != plain:
                raise errors.BadFrame(self.path, f"frame {index} has another size than the table says")
            result = zstandard.ZstdDecompressor().decompress(data, max_output_size=plain)
        except zstandard.ZstdError as error:
            raise errors.BadFrame(self.path, f"frame {index} cannot be unpacked: {error}") from None
        if len(result) != plain:
            raise errors.BadFrame(self.path, f"frame {index} has another size than the table says")
        return result


def _chain(first: bytes, others: Iterable[bytes]) -> Iterator[bytes]:
    yield first
    yield from others
