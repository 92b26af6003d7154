"""What names a model: a hash that changes with its weights and costs milliseconds to compute."""

from __future__ import annotations

import hashlib

from powerinfer_formats.model_source import ModelSource

SAMPLE_BYTES = 4096


def model_fingerprint(source: ModelSource) -> str:
    """SHA-256 (64 hex digits) over what identifies the model and three samples of every tensor.

    Hashed are the source's ``identity`` (of a GGUF file: bytes [0, end of the directory)), then for each
    tensor of n bytes, in directory order, up to 4,096 bytes at its start, from (n − 4096)//2 and at its end
    (the whole tensor each time where n ≤ 4096). Reading all of a 40 GB file to name it would take minutes;
    two models that differ in anything but a few unsampled weights differ here.
    """
    digest = hashlib.sha256()
    for part in source.identity():
        digest.update(part)
    for name in source.tensors:
        data = source.tensor(name)
        size = min(SAMPLE_BYTES, len(data))
        spare = len(data) - size
        for skipped in (0, spare // 2, spare):
            digest.update(data[skipped : skipped + size].data)
    return digest.hexdigest()
