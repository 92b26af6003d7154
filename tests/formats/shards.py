"""Shards as llama.cpp's tools write them, made of a whole GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from gguf_bytes import text, u32, u64
from powerinfer_formats.gguf_reader import GGUFFile

KEYS = ("split.no", "split.count", "split.tensors.count")


def number_entry(key: str, value: int) -> bytes:
    """A number as ``gguf-split`` stores it: uint16, and int32 for the number of tensors."""
    if key == "split.tensors.count":
        return text(key.encode()) + u32(5) + value.to_bytes(4, "little", signed=True)
    return text(key.encode()) + u32(2) + value.to_bytes(2, "little")


def write_shards(
    model: Path, out: Path, counts: list[int], changes: dict[int, dict[str, Any]] | None = None
) -> list[Path]:
    """Shards of ``model`` in folder ``out``, with so many tensors each; ``changes`` of single files' numbers
    by key (None: left out), and ``extra``: bytes of one more entry."""
    with GGUFFile.open(model) as whole:
        entries = [data for _, data in whole.metadata_bytes()]
        names = list(whole.tensors)
        assert sum(counts) == len(names)
        paths, first = [], 0
        for number, count in enumerate(counts):
            told = {"split.no": number, "split.count": len(counts), "split.tensors.count": len(names)}
            change = dict((changes or {}).get(number, {}))
            extra = change.pop("extra", b"")
            own = [number_entry(key, value) for key, value in (told | change).items() if value is not None]
            kept = (entries if number == 0 else []) + own + ([extra] if extra else [])
            path = out / f"{model.stem}-{number + 1:05}-of-{len(counts):05}.gguf"
            path.write_bytes(_file(whole, kept, names[first : first + count]))
            paths.append(path)
            first += count
    return paths


def _file(whole: GGUFFile, entries: list[bytes], names: list[str]) -> bytes:
    directory, data = b"", b""
    for name in names:
        info = whole.tensors[name]
        shape = b"".join(map(u64, info.shape[::-1]))
        directory += text(name.encode()) + u32(len(info.shape)) + shape + u32(info.row_type) + u64(len(data))
        rows = np.asarray(whole.tensor(name)).tobytes()
        data += rows + bytes(-len(rows) % 32)
    head = b"GGUF" + u32(3) + u64(len(names)) + u64(len(entries)) + b"".join(entries) + directory
    return head + bytes(-len(head) % 32) + data
