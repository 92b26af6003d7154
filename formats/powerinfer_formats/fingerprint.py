"""A model's fingerprint: a hash that changes with its weights and takes milliseconds to compute."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from powerinfer_formats.model_source import ModelSource

SAMPLE_BYTES = 4096


def model_fingerprint(source: ModelSource) -> str:
    """SHA-256 (64 hex digits) over the model's identity and three samples of every tensor.

    Hashed are the source's ``identity`` (of a GGUF file: bytes [0, end of the directory)), then for each
    tensor of n bytes, in directory order, up to 4,096 bytes at its start, from (n − 4096)//2 and at its end
    (the whole tensor each time if n ≤ 4096). Reading all of a 40 GB file to name it would take minutes. Two
    models have different fingerprints unless they differ only in a few unsampled weights.
    """
    digest = hashlib.sha256()
    for part in source.identity():
        digest.update(part)
    for name in source.tensors:
        pieces = source.pieces(name)
        nbytes = sum(len(piece) for piece in pieces)
        size = min(SAMPLE_BYTES, nbytes)
        spare = nbytes - size
        for skipped in (0, spare // 2, spare):
            for sample in _range(pieces, skipped, size):
                digest.update(sample.data)
    return digest.hexdigest()


def _range(pieces: Sequence[NDArray[np.uint8]], first: int, size: int) -> Iterator[NDArray[np.uint8]]:
    """Bytes [first, first + size) of ``pieces``, one after the other."""
    for piece in pieces:
        if first < len(piece) and size:
            part = piece[first : first + size]
            yield part
            size -= len(part)
        first = max(0, first - len(piece))
