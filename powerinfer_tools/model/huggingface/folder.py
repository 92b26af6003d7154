"""A Hugging Face directory behind the interface of a GGUF file.

Weights stay on disk, mapped, except for the few that GGUF keeps otherwise: vectors and routers (always
float32) and, in the llama family, rows of query and key, which are reordered in memory. GGUF's stacks of
experts are tensors of their own here: they are handed out one by one, and joined only where someone asks for
a whole stack.
"""

import hashlib
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
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
from powerinfer_formats.safetensors_header import StoredTensor
from powerinfer_tools.model.huggingface.block_scales import FP8, SCALES_ENDING, BlockScales
from powerinfer_tools.model.huggingface.changes import Change, HeadShape
from powerinfer_tools.model.huggingface.config import Config
from powerinfer_tools.model.huggingface.families import find_family
from powerinfer_tools.model.huggingface.family import Family, Rule
from powerinfer_tools.model.huggingface.hyperparameters import Shape, add_hyperparameters
from powerinfer_tools.model.huggingface.vocabulary import add_vocabulary, tokenizer_files

CONFIG_FILE = "config.json"
#: FP8 is widened by its scales.
_TYPES = {"F32": TensorType.F32, "F16": TensorType.F16, "BF16": TensorType.BF16, FP8: TensorType.F32}
_OUTPUT = Rule("output.weight", "lm_head.weight")
_LAYER = re.compile(r"model\.layers\.(\d{1,5})\.")
#: Left over in old checkpoints; computed from config.json everywhere today.
_DERIVED = (".rotary_emb.inv_freq",)


@dataclass(frozen=True)
class _Origin:
    """Where a tensor comes from: ``stored`` in the weights, then changed; or ``values`` made here. ``stack``:
    of one matrix for each expert."""

    stored: tuple[str, ...] = ()
    stack: bool = False
    change: Change | None = None
    values: npt.NDArray[np.float32] | None = None


class ModelFolder(ModelSource):
    """Use ``ModelFolder.open``."""

    def __init__(
        self,
        path: Path,
        weights: SafetensorsFolder,
        metadata: Metadata,
        heads: HeadShape,
        plan: dict[str, tuple[TensorInfo, _Origin]],
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
            planner = _Planner(folder, weights, family, shape, scales)
            plan = planner.plan()
            add_vocabulary(metadata, folder, whole, plan["token_embd.weight"][0].shape[0])
            source = cls(folder, weights, metadata, shape.heads, plan, scales)
            source.notices = tuple(planner.notices)
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
        if origin.values is None and origin.change is None and self._usable(info, origin.stored[0]):
            return self._weights.data(origin.stored[0])
        if self._is_fp8(origin):  # not kept, for the same reason
            return self._make(info, origin)
        if info.name not in self._changed:
            self._changed[info.name] = self._make(info, origin)
        return self._changed[info.name]

    def _is_fp8(self, origin: _Origin) -> bool:
        return bool(origin.stored) and self._weights.tensors[origin.stored[0]].dtype == FP8

    def _stored_rows(self, info: TensorInfo, stored: str) -> npt.NDArray[Any]:
        """A matrix of a stack as GGUF has it."""
        is_fp8 = self._weights.tensors[stored].dtype == FP8
        return self._float32(stored).reshape(-1).view(np.uint8) if is_fp8 else self._weights.data(stored)

    def _float32(self, stored: str) -> npt.NDArray[np.float32]:
        tensor = self._weights.tensors[stored]
        if tensor.dtype != FP8:
            return _as_float32(self._weights.data(stored), tensor.dtype)
        assert self._scales is not None, "the planner has found the scales"
        scales = stored + SCALES_ENDING
        place = self._weights.tensors[scales]
        factors = _as_float32(self._weights.data(scales), place.dtype).reshape(place.shape)
        return self._scales.values(self._weights.data(stored).reshape(tensor.shape), factors)

    def _usable(self, info: TensorInfo, stored: str) -> bool:
        """Whether the stored bytes are those of GGUF, and aligned to their values."""
        tensor = self._weights.tensors[stored]
        same = tensor.dtype != FP8 and _TYPES[tensor.dtype] == info.row_type
        return same and tensor.offset % 4 == 0

    def _make(self, info: TensorInfo, origin: _Origin) -> npt.NDArray[np.uint8]:
        if origin.values is not None:
            values: npt.NDArray[Any] = origin.values
        elif info.row_type == TensorType.F32:
            (stored,) = origin.stored
            values = self._float32(stored).reshape(info.shape)
        else:
            values = self._weights.data(origin.stored[0]).reshape(info.shape[0], -1)
        if origin.change is not None:
            try:
                values = origin.change(values, self._heads)
            except ValueError as error:
                raise errors.WrongShape(self.path, f"tensor {self._title(info)}: {error}") from None
        return _own(values)


class _Planner:
    """Finds for every tensor of GGUF the one that is stored."""

    def __init__(
        self,
        folder: Path,
        weights: SafetensorsFolder,
        family: Family,
        shape: Shape,
        scales: BlockScales | None,
    ) -> None:
        self.folder, self.weights, self.family, self.shape = folder, weights, family, shape
        self.scales = scales
        self.found: dict[str, tuple[TensorInfo, _Origin]] = {}
        self.used: set[str] = set()
        self.notices: list[str] = []
        self.start = self._start()

    def plan(self) -> dict[str, tuple[TensorInfo, _Origin]]:
        """Every tensor by its name in GGUF. Raises FormatError."""
        own_head = not self.shape.tied or self._differing_head()
        names = [name for name in self.family.head_names if name in self.weights.tensors]
        head = replace(_OUTPUT, stored=names[0]) if names else _OUTPUT
        for rule in (*self.family.rules, *((head,) if own_head else ())):
            for index in range(self.shape.layers) if "{i}" in rule.name else (0,):
                self._place(rule, index)
        for name, table in self.shape.rope.tables.items():
            info = TensorInfo(name, TensorType.F32, table.shape, 0, table.nbytes)
            self.found[name] = (info, _Origin(values=table))
        self._refuse_others()
        return self.found

    def _differing_head(self) -> bool:
        """Whether a model that says that its head is the embedding has another one, which then is taken, as
        transformers does."""
        head, embedding = (
            next((name for name in self._spellings(wanted) if name in self.weights.tensors), None)
            for wanted in (_OUTPUT.stored, "model.embed_tokens.weight")
        )
        if head is None or embedding is None:
            return False
        places = [self.weights.tensors[name] for name in (head, embedding)]
        same = (places[0].dtype, places[0].shape) == (places[1].dtype, places[1].shape)
        if same and np.array_equal(self.weights.data(head), self.weights.data(embedding)):
            return False
        self.notices.append(
            f"config.json says that the head is the embedding (tie_word_embeddings), but there is a {head!r} "
            "of its own: that one is used"
        )
        return True

    def _place(self, rule: Rule, index: int) -> None:
        name, wanted = rule.name.replace("{i}", str(index)), rule.stored.replace("{i}", str(index))
        if "{e}" in wanted:
            self._place_stack(name, wanted, optional=rule.optional)
            return
        stored = self._stored(wanted)
        if stored is None:
            if rule.optional:
                return
            raise self._missing(wanted)
        if name in self.found:
            raise errors.DuplicateTensor(
                self.folder, f"tensor {stored!r} stands for {name!r}, as another does"
            )
        tensor = self.weights.tensors[stored]
        shape = tensor.shape[1:] if rule.vector and tensor.shape[0] == 1 else tensor.shape
        kind = self._row_type(tensor)
        if rule.single or len(shape) == 1:
            kind = TensorType.F32
        nbytes = 4 * math.prod(shape) if kind == TensorType.F32 else tensor.nbytes
        info = TensorInfo(name, kind, shape, tensor.offset, nbytes)
        self.found[name] = (info, _Origin((stored,), change=rule.change))

    def _place_stack(self, name: str, wanted: str, *, optional: bool) -> None:
        """One tensor for each expert, all of the same shape and type."""
        tensors: list[StoredTensor] = []
        for expert in range(self.shape.experts):
            stored = self._stored(wanted.replace("{e}", str(expert)))
            if stored is None:
                if optional and not expert:
                    return
                raise self._missing(wanted.replace("{e}", str(expert)))
            tensors.append(self.weights.tensors[stored])
            first, last = tensors[0], tensors[-1]
            if (last.shape, last.dtype) != (first.shape, first.dtype):
                raise errors.WrongShape(
                    self.folder / self.weights.file_of(stored),
                    f"tensor {stored!r} is {_described(last)}, that of the first expert {_described(first)}",
                )
        shape, kind = (len(tensors), *tensors[0].shape), self._row_type(tensors[0])
        widened = tensors[0].dtype == FP8
        nbytes = sum(4 * math.prod(tensor.shape) if widened else tensor.nbytes for tensor in tensors)
        info = TensorInfo(name, kind, shape, tensors[0].offset, nbytes)
        self.found[name] = (info, _Origin(tuple(tensor.name for tensor in tensors), stack=True))

    def _stored(self, wanted: str) -> str | None:
        """The name that a tensor has here, which is in use from now on; None where there is none."""
        stored = next((spelt for spelt in self._spellings(wanted) if spelt in self.weights.tensors), None)
        if stored is not None:
            self.used.add(stored)
            self._find_scales(stored)
        return stored

    def _missing(self, wanted: str) -> errors.MissingTensor:
        return errors.MissingTensor(self.folder, f"has no tensor {wanted!r}, which is needed here")

    def _spellings(self, wanted: str) -> Iterator[str]:
        for start in self.family.spellings:
            yield start + wanted.removeprefix("model.") if wanted.startswith("model.") else wanted
        if self.start is not None:
            inside = wanted.startswith("model.")
            start = self.start if inside else self.start.removesuffix("model.")
            yield start + wanted.removeprefix("model.")

    def _start(self) -> str | None:
        """What stands before the embedding's name, and so before all others: of a model without head it is
        nothing, and wrappers put their own names in front. None where several tensors could be it."""
        embedding = next(rule.stored for rule in self.family.rules if rule.name == "token_embd.weight")
        end = embedding.removeprefix("model.")
        starts = [name[: -len(end)] for name in self.weights.tensors if name.endswith(end)]
        return starts[0] if len(starts) == 1 and starts[0][-1:] in ("", ".") else None

    def _row_type(self, tensor: StoredTensor) -> TensorType:
        if tensor.dtype not in _TYPES:
            raise errors.WrongType(
                self.folder / self.weights.file_of(tensor.name),
                f"tensor {tensor.name!r} is of type {tensor.dtype}, which cannot be used here "
                f"(can: {', '.join(_TYPES)})",
            )
        return _TYPES[tensor.dtype]

    def _find_scales(self, stored: str) -> None:
        """Check that an FP8 matrix has its scales. Raises FormatError."""
        tensor, scales = self.weights.tensors[stored], stored + SCALES_ENDING
        file = self.folder / self.weights.file_of(stored)
        if tensor.dtype != FP8:
            return
        if self.scales is None or len(tensor.shape) != 2:
            raise errors.WrongType(
                file, f"tensor {stored!r} is of type {FP8}, but config.json names no blocks of scales for it"
            )
        place = self.weights.tensors.get(scales)
        if place is None:
            raise errors.MissingTensor(file, f"has no tensor {scales!r}, the scales of {stored!r}")
        rows, columns = tensor.shape
        expected = self.scales.shape(rows, columns)
        if place.shape != expected or place.dtype not in ("F32", "BF16", "F16"):
            raise errors.WrongShape(
                file,
                f"tensor {scales!r} is {_described(place)}, expected {expected[0]} × {expected[1]} floats",
            )
        self.used.add(scales)

    def _refuse_others(self) -> None:
        for name in self.weights.tensors:
            spare = name.endswith(_DERIVED) or name.startswith(self.family.ignored)
            if self.family.further_layers and _layer_of(name) >= self.shape.layers:
                spare = True  # predicts further tokens
            if self.shape.tied and name.endswith("lm_head.weight"):
                spare = True  # a copy of the embedding, which transformers reads past, too
            if name not in self.used and not spare:
                raise errors.UnexpectedTensor(
                    self.folder / self.weights.file_of(name),
                    f"has a tensor {name!r}, which a model of type {self.family.model_type!r} does not have",
                )


def _layer_of(name: str) -> int:
    """The layer that a tensor is in; -1 for none."""
    found = _LAYER.match(name)
    return int(found[1]) if found else -1


def _own(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """A copy of the bytes: aligned, and our own."""
    data = np.array(values, order="C").reshape(-1).view(np.uint8)
    data.flags.writeable = False
    return data


def _described(tensor: StoredTensor) -> str:
    return f"{' × '.join(map(str, tensor.shape))} of {tensor.dtype}"


def _as_float32(data: npt.NDArray[np.uint8], dtype: str) -> npt.NDArray[np.float32]:
    """Values of a vector; bfloat16 is the upper half of a float32."""
    if dtype == "BF16":
        return (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return np.asarray(data.view("<f2" if dtype == "F16" else "<f4"), dtype=np.float32)
