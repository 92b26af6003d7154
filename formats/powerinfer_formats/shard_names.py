"""Names of the files of a GGUF model in shards: ``NAME-00001-of-0000N.gguf``. Opens nothing."""

from __future__ import annotations

import re
from pathlib import Path

MAX_SHARDS = 1024
_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


def model_name(file_name: str) -> str:
    """The name of all files of a set without their numbers; ``file_name`` where it is no shard."""
    match = _NAME.fullmatch(file_name)
    return f"{match[1]}.gguf" if match else file_name


def shard_files(path: Path, count: int | None = None) -> list[Path]:
    """All files of the set that ``path`` is of by its name, in order; ``path`` alone where it is no shard.

    ``count``: how many there have to be, if that is known; else what the name says. Nothing is looked for.
    """
    match = _NAME.fullmatch(path.name)
    if match is None:
        return [path]
    total = int(match[3]) if count is None else count
    names = (f"{match[1]}-{place:05}-of-{total:05}.gguf" for place in range(1, min(total, MAX_SHARDS) + 1))
    return [path.with_name(name) for name in names]
