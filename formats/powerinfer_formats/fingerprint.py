"""What names a model: a hash that changes with its weights and costs milliseconds to compute."""

from __future__ import annotations

import hashlib

from powerinfer_formats.gguf_reader import GGUFFile

SAMPLE_BYTES = 4096


def model_fingerprint(gguf: GGUFFile) -> str:
    """SHA-256 (64 hex digits) over header and directory and three samples of every tensor.

    Hashed are bytes [0, end of the directory), then for each tensor of n bytes, in directory order, up to
    4,096 bytes at its start, from (n − 4096)//2 and at its end (the whole tensor each time where n ≤ 4096).
    Reading all of a 40 GB file to name it would take minutes; two models that differ in anything but a few
    unsampled weights differ here.
    """
    digest = hashlib.sha256(gguf.raw(0, gguf.directory_bytes).data)
    for info in gguf.tensors.values():
        size = min(SAMPLE_BYTES, info.nbytes)
        spare = info.nbytes - size
        for skipped in (0, spare // 2, spare):
            digest.update(gguf.raw(info.offset + skipped, size).data)
    return digest.hexdigest()
