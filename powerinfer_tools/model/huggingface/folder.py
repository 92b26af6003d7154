"""A Hugging Face directory behind the interface of a GGUF file.

Weights stay on disk, mapped, except for the few that GGUF keeps otherwise: vectors and routers (always
float32) and, in the llama family, rows of query and key, which are reordered in memory. GGUF's stacks of
experts are tensors of their own here: they are handed out one by one, and joined only where someone asks for
a whole stack.
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from powerinfer_formats import errors
from powerinfer_formats.block_types import TensorType
from powerinfer_formats.gguf_scan import Entry, TensorInfo
from powerinfer_formats.mapped_file import MappedFile
from powerinfer_formats.metadata import Metadata
from powerinfer_formats.model_source import ModelSource
from powerinfer_formats.safetensors_folder import SafetensorsFolder
from powerinfer_tools.model.huggingface.block_scales import FP8, SCALES_ENDING, BlockScales
from powerinfer_tools.model.huggingface.changes import HeadShape
from powerinfer_tools.model.huggingface.config import Config
from powerinfer_tools.model.huggingface.families import find_family
from powerinfer_tools.model.huggingface.hyperparameters import add_hyperparameters
from powerinfer_tools.model.huggingface.origins import TYPES, Origin, as_float32
from powerinfer_tools.model.huggingface.parts import mxfp4_rows
from powerinfer_tools.model.huggingface.planner import Planner
from powerinfer_tools.model.huggingface.unread import refuse_unread
from powerinfer_tools.model.huggingface.vocabulary import add_vocabulary, tokenizer_files

CONFIG_FILE = "config.json"
#: Integers as wide as a value of a type: rows are moved, whatever is in them.
_WIDTHS = {TensorType.F32: "<f4", TensorType.F16: "<u2", TensorType.BF16: "<u2"}


class ModelFolder(ModelSource):
    """Use ``ModelFolder.open``."""

    def __init__(
        self,
        path: Path,
        weights: SafetensorsFolder,
        metadata: Metadata,
        heads: HeadShape,
        plan: dict[str, tuple[TensorInfo, Origin]],
        scales: BlockScales | None = None,
    ) -> None:
        super().__init__(path, metadata.entries, {name: info for name, (info, _) in plan.items()})
        self._weights, self._encoded, self._heads, self._scales = weights, metadata, heads, scales
        self._origins = {name: origin for name, (_, origin) in plan.items()}
        self._changed: dict[str, npt.NDArray[np.uint8]] = {}

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Read and check the directory. Raises FormatError for what is not well-formed, and ModelError or
        TokenizerError for what is not supported."""
        folder = Path(path)
        if not (folder / CONFIG_FILE).is_file():
            raise errors.MissingFile(folder, f"is a directory without {CONFIG_FILE}: it holds no model")
        whole = Config.read(folder / CONFIG_FILE)
        family, config = find_family(whole)
        scales = BlockScales.read(whole)
        metadata = Metadata(folder)
        metadata.add("general.architecture", family.architecture)
        metadata.add("general.name", folder.resolve().name)
        shape = add_hyperparameters(metadata, family, config)
        weights = SafetensorsFolder.open(folder)
        try:
            planner = Planner(folder, weights, family, shape, scales)
            plan = planner.plan()
            for key, numbers in planner.numbers.items():
                metadata.add(f"{family.architecture}.{key}", numbers)
            add_vocabulary(metadata, folder, whole, plan["token_embd.weight"][0].shape[0])
            source = cls(folder, weights, metadata, shape.heads, plan, scales)
            source.notices = tuple(planner.notices)
            refuse_unread(config, family)
            if config is not whole:
                refuse_unread(whole, family, text=config.path)
            return source
        except BaseException:
            weights.close()
            raise

    def close(self) -> None:
        """Let go of the weight files; each is unmapped once no view of it is in use."""
        self._changed.clear()
        self._weights.close()

    def require_unchanged(self) -> None:
        """Raises FileChanged where a weight file is no longer what it was when it was opened."""
        self._weights.require_unchanged()

    @property
    def container(self) -> str:
        """The kind of directory and its weight files."""
        return f"Hugging Face directory, weights in {len(self._weights.files)} file(s)"

    @property
    def nbytes(self) -> int:
        """Size of the weight files."""
        return self._weights.nbytes

    @property
    def mappings(self) -> tuple[MappedFile, ...]:
        """The weight files."""
        return self._weights.mappings

    def metadata_bytes(self) -> Iterator[tuple[Entry, bytes]]:
        """Every entry with its bytes in a GGUF file."""
        yield from self._encoded.encoded()

    def identity(self) -> Iterator[bytes | memoryview]:
        """Names and hashes of the files that say what the model is, then the headers of the weights.

        The files rather than the keys made of them: so the model keeps its name when later versions of this
        program make more of the same files.
        """
        for name in (CONFIG_FILE, *tokenizer_files(self.path)):
            if (self.path / name).is_file():
                yield name.encode()
                yield hashlib.sha256((self.path / name).read_bytes()).digest()
        yield from self._weights.headers()

    def _title(self, info: TensorInfo) -> str:
        stored = self._origins[info.name].stored
        if not stored:
            return repr(info.name)
        more = f" and {len(stored) - 1} more" if len(stored) > 1 else ""
        return f"{stored[0]!r} in {self._weights.file_of(stored[0])}{more}"

    def _pieces_of(self, info: TensorInfo) -> tuple[npt.NDArray[np.uint8], ...]:
        origin = self._origins[info.name]
        if not origin.stack:
            return (self._bytes_of(info),)
        usable = [self._usable(info, stored) for stored in origin.stored]
        data = [self._stored_rows(info, stored) for stored in origin.stored]
        return tuple(piece if whole else _own(piece) for piece, whole in zip(data, usable, strict=True))

    def _bytes_of(self, info: TensorInfo) -> npt.NDArray[np.uint8]:
        origin = self._origins[info.name]
        if origin.stack:  # not kept: all stacks together are nearly the whole model
            return _own(np.concatenate(self._pieces_of(info)))
        if origin.as_stored and self._usable(info, origin.stored[0]):
            return self._weights.data(origin.stored[0])
        if self._is_fp8(origin) or len(info.shape) > 2:  # not kept, for the same reason
            return self._make(info, origin)
        if info.name not in self._changed:
            self._changed[info.name] = self._make(info, origin)
        return self._changed[info.name]

    def _is_fp8(self, origin: Origin) -> bool:
        return bool(origin.stored) and self._weights.tensors[origin.stored[0]].dtype == FP8

    def _stored_rows(self, info: TensorInfo, stored: str) -> npt.NDArray[Any]:
        """A matrix of a stack as GGUF has it."""
        is_fp8 = self._weights.tensors[stored].dtype == FP8
        return self._float32(stored).reshape(-1).view(np.uint8) if is_fp8 else self._weights.data(stored)

    def _float32(self, stored: str) -> npt.NDArray[np.float32]:
        tensor = self._weights.tensors[stored]
        if tensor.dtype != FP8:
            return as_float32(self._weights.data(stored), tensor.dtype)
        assert self._scales is not None, "the planner has found the scales"
        scales = stored + SCALES_ENDING
        place = self._weights.tensors[scales]
        factors = as_float32(self._weights.data(scales), place.dtype).reshape(place.shape)
        return self._scales.values(self._weights.data(stored).reshape(tensor.shape), factors)

    def _usable(self, info: TensorInfo, stored: str) -> bool:
        """Whether the stored bytes are those of GGUF, and aligned to their values."""
        tensor = self._weights.tensors[stored]
        same = tensor.dtype != FP8 and TYPES[tensor.dtype] == info.row_type
        return same and tensor.offset % 4 == 0

    def _make(self, info: TensorInfo, origin: Origin) -> npt.NDArray[np.uint8]:
        try:
            return _own(self._changed_values(info, origin))
        except ValueError as error:
            raise errors.WrongShape(self.path, f"tensor {self._title(info)}: {error}") from None

    def _changed_values(self, info: TensorInfo, origin: Origin) -> npt.NDArray[Any]:
        if origin.mxfp4:
            blocks, scales = (
                origin.rearranged(self._weights.data(name).reshape(self._weights.tensors[name].shape))
                for name in origin.stored
            )
            return mxfp4_rows(blocks, scales)
        values: npt.NDArray[Any] | None = origin.values
        if values is None:
            values = self._typed(info, origin.stored[0])
            values = origin.rearranged(values.reshape(self._weights.tensors[origin.stored[0]].shape))
            values = values.reshape(info.shape)
        return values if origin.change is None else origin.change(values, self._heads)

    def _typed(self, info: TensorInfo, stored: str) -> npt.NDArray[Any]:
        if info.row_type == TensorType.F32:
            return self._float32(stored)
        return self._weights.data(stored).view(_WIDTHS[TensorType(info.row_type)])


def _own(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """A copy of the bytes: aligned, and our own."""
    data = np.array(values, order="C").reshape(-1).view(np.uint8)
    data.flags.writeable = False
    return data
