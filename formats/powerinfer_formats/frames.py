"""zstd frames of untrusted files: the unpacked size is limited before anything is unpacked."""

import os
from pathlib import Path
from typing import IO, BinaryIO

import zstandard

from powerinfer_formats.errors import BadFrame

#: The size to which any frame may unpack; beyond it, a frame may unpack to so many times its own size.
FREE_BYTES, MAX_RATIO = 64 << 20, 1000
_CHUNK = 1 << 20


def require_ratio(path: Path, packed: int, plain: int) -> None:
    """Raise ``BadFrame`` for a frame that announces a much larger size than data of its kind could have."""
    if plain > FREE_BYTES and plain > MAX_RATIO * packed:
        raise BadFrame(path, f"{packed} bytes announce {plain}: over {MAX_RATIO} times as many")


def require_one_frame(path: Path, stream: BinaryIO, head: bytes) -> None:
    """Raise ``BadFrame`` unless one frame, which begins with ``head``, fills the file. Reads the heads of its
    blocks alone (RFC 8878, 3.1.1.2) and leaves the stream somewhere."""
    size = stream.seek(0, os.SEEK_END)
    at, last = zstandard.frame_header_size(head), False
    while not last:
        stream.seek(at)
        block = int.from_bytes(stream.read(3), "little")
        last, kind = bool(block & 1), block >> 1 & 3
        at += 3 + (1 if kind == 1 else block >> 3)
        if at > size:
            raise BadFrame(path, "is not one whole zstd frame: it was cut off")
    at += 4 if zstandard.get_frame_parameters(head).has_checksum else 0
    if at != size:
        raise BadFrame(path, f"is not one whole zstd frame: that ends at byte {at}, the file has {size}")


class FrameReader:
    """The content of the one frame that ``stream`` holds, in pieces and never more than it announces."""

    def __init__(self, path: Path, stream: BinaryIO, announced: int) -> None:
        self.path, self.left = path, announced
        self._packed = stream
        self._stream = zstandard.ZstdDecompressor().stream_reader(stream, closefd=False)

    def take(self, nbytes: int) -> bytes:
        """The next ``nbytes``. Raises ``BadFrame``."""
        data = self._read(nbytes)
        if len(data) != nbytes:
            raise BadFrame(self.path, f"ends {nbytes - len(data)} bytes before what its frame announces")
        self.left -= nbytes
        return data

    def copy_to(self, target: IO[bytes]) -> None:
        """Write the whole rest to ``target``. Raises ``BadFrame``."""
        while self.left:
            target.write(self.take(min(_CHUNK, self.left)))
        if self._read(1):
            raise BadFrame(self.path, "holds more than its frame announces")

    def _read(self, nbytes: int) -> bytes:
        try:
            return self._stream.read(nbytes)
        except zstandard.ZstdError as error:
            raise BadFrame(self.path, f"is not one whole zstd frame: {error}") from None
