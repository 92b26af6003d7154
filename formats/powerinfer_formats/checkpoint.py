"""An unfinished profile, as Ctrl-C leaves it behind: the sums so far, and the position in the corpus."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from powerinfer_formats.profile import Profile
from powerinfer_formats.profile_document import CorpusPosition
from powerinfer_formats.profile_file import load_checkpoint, save_profile

__all__ = ["CorpusPosition", "ProfileCheckpoint"]


@dataclass(frozen=True, eq=False)
class ProfileCheckpoint:
    """``profile`` holds the counts so far, ``position`` says where to go on."""

    profile: Profile
    position: CorpusPosition

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read and check ``path``; raises ``FormatError``, ``UnfinishedProfile`` for a finished profile."""
        fields, position = load_checkpoint(Path(path))
        return cls(Profile(**fields), position)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``path`` atomically, so that a kill while writing leaves the previous checkpoint."""
        save_profile(self.profile, Path(path), self.position)
