"""Which stored tensor of a Hugging Face directory each tensor of GGUF is made of."""

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from powerinfer_formats import errors
from powerinfer_formats.block_types import TensorType
from powerinfer_formats.gguf_scan import TensorInfo
from powerinfer_formats.safetensors_folder import SafetensorsFolder
from powerinfer_formats.safetensors_header import StoredTensor
from powerinfer_tools.model.huggingface.block_scales import FP8, SCALES_ENDING, BlockScales
from powerinfer_tools.model.huggingface.family import Family, Rule
from powerinfer_tools.model.huggingface.hyperparameters import Shape
from powerinfer_tools.model.huggingface.origins import TYPES, Origin, as_float32, described

#: What stands after the name of experts in MXFP4.
BLOCKS_ENDING, MXFP4_SCALES_ENDING = "_blocks", "_scales"
_OUTPUT = Rule("output.weight", "lm_head.weight")
_LAYER = re.compile(r"model\.layers\.(\d{1,5})\.")
#: Left over in old checkpoints; computed from config.json everywhere today.
_DERIVED = (".rotary_emb.inv_freq",)


class Planner:
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
        self.found: dict[str, tuple[TensorInfo, Origin]] = {}
        self.used: set[str] = set()
        self.notices: list[str] = []
        #: Keys with a number of each layer.
        self.numbers: dict[str, npt.NDArray[np.float32]] = {}
        self.start = self._start()

    def plan(self) -> dict[str, tuple[TensorInfo, Origin]]:
        """Every tensor by its name in GGUF. Raises FormatError."""
        own_head = not self.shape.tied or self._differing_head()
        names = [name for name in self.family.head_names if name in self.weights.tensors]
        head = replace(_OUTPUT, stored=names[0]) if names else _OUTPUT
        for rule in (*self.family.rules, *((head,) if own_head else ())):
            for index in range(self.shape.layers) if "{i}" in rule.name else (0,):
                self._place(rule, index)
        for name, table in self.shape.rope.tables.items():
            info = TensorInfo(name, TensorType.F32, table.shape, 0, table.nbytes)
            self.found[name] = (info, Origin(values=table))
        for key, stored in self.family.numbers:
            self.numbers[key] = np.concatenate([self._number(stored, i) for i in range(self.shape.layers)])
        self._refuse_others()
        return self.found

    def _number(self, pattern: str, index: int) -> npt.NDArray[np.float32]:
        """The one value of a tensor."""
        pattern = pattern.replace("{i}", str(index))
        stored = self._stored(pattern)
        if stored is None:
            raise self._missing(pattern)
        tensor = self.weights.tensors[stored]
        if math.prod(tensor.shape) != 1 or tensor.dtype not in ("F32", "F16", "BF16"):
            raise errors.WrongShape(
                self.folder / self.weights.file_of(stored),
                f"tensor {stored!r} is {described(tensor)}, expected one number",
            )
        return as_float32(self.weights.data(stored), tensor.dtype)

    def _differing_head(self) -> bool:
        """Whether a model that says that its head is the embedding has another one, which then is taken, as
        transformers does."""
        head, embedding = (
            next((name for name in self._spellings(stored) if name in self.weights.tensors), None)
            for stored in (_OUTPUT.stored, "model.embed_tokens.weight")
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
        name, source_name = rule.name.replace("{i}", str(index)), rule.stored.replace("{i}", str(index))
        if "{e}" in source_name:
            self._place_stack(name, source_name, optional=rule.optional)
            return
        blocks = self._stored(source_name + BLOCKS_ENDING)
        stored = blocks or self._stored(source_name)
        if stored is None:
            if rule.optional:
                return
            raise self._missing(source_name)
        if name in self.found:
            raise errors.DuplicateTensor(
                self.folder, f"tensor {stored!r} stands for {name!r}, as another does"
            )
        place = self._mxfp4 if blocks is not None else self._one
        self.found[name] = place(name, rule, stored)

    def _one(self, name: str, rule: Rule, stored: str) -> tuple[TensorInfo, Origin]:
        tensor = self.weights.tensors[stored]
        origin = Origin((stored,), change=rule.change, part=rule.part, transposed=rule.transposed)
        shape = self._shape(origin, stored, tensor.shape, squeezed=rule.squeezed)
        kind = self._row_type(tensor)
        if rule.single or len(shape) == 1:
            kind = TensorType.F32
        values = math.prod(shape)
        nbytes = 4 * values if kind == TensorType.F32 else tensor.nbytes // math.prod(tensor.shape) * values
        return TensorInfo(name, kind, shape, tensor.offset, nbytes), origin

    def _mxfp4(self, name: str, rule: Rule, stored: str) -> tuple[TensorInfo, Origin]:
        """Blocks (…, rows, blocks, 16) with scales (…, rows, blocks)."""
        base = stored.removesuffix(BLOCKS_ENDING)
        scales = self._stored(base + MXFP4_SCALES_ENDING)
        if scales is None:
            raise self._missing(base + MXFP4_SCALES_ENDING)
        blocks, places = self.weights.tensors[stored], self.weights.tensors[scales]
        whole = len(blocks.shape) == 4 and blocks.shape == (*places.shape, 16)
        if not whole or blocks.dtype != "U8" or places.dtype != "U8":
            raise errors.WrongShape(
                self.folder / self.weights.file_of(stored),
                f"tensor {stored!r} is {described(blocks)}, and {scales!r} {described(places)}: no blocks of "
                "32 codes, 16 bytes, with a scale each",
            )
        origin = Origin((stored, scales), part=rule.part, mxfp4=True)
        experts, rows, count = self._shape(origin, stored, places.shape, squeezed=False)
        info = TensorInfo(
            name, TensorType.MXFP4, (experts, rows, 32 * count), blocks.offset, experts * rows * count * 17
        )
        return info, origin

    def _shape(
        self, origin: Origin, stored: str, shape: tuple[int, ...], *, squeezed: bool
    ) -> tuple[int, ...]:
        try:
            return origin.shape(shape, squeezed=squeezed)
        except ValueError as error:
            file = self.folder / self.weights.file_of(stored)
            raise errors.WrongShape(file, f"tensor {stored!r}: {error}") from None

    def _place_stack(self, name: str, pattern: str, *, optional: bool) -> None:
        """One tensor for each expert, all of the same shape and type."""
        tensors: list[StoredTensor] = []
        for expert in range(self.shape.stacked):
            stored = self._stored(pattern.replace("{e}", str(expert)))
            if stored is None:
                if optional and not expert:
                    return
                raise self._missing(pattern.replace("{e}", str(expert)))
            tensors.append(self.weights.tensors[stored])
            first, last = tensors[0], tensors[-1]
            if (last.shape, last.dtype) != (first.shape, first.dtype):
                raise errors.WrongShape(
                    self.folder / self.weights.file_of(stored),
                    f"tensor {stored!r} is {described(last)}, that of the first expert {described(first)}",
                )
        shape, kind = (len(tensors), *tensors[0].shape), self._row_type(tensors[0])
        widened = tensors[0].dtype == FP8
        nbytes = sum(4 * math.prod(tensor.shape) if widened else tensor.nbytes for tensor in tensors)
        info = TensorInfo(name, kind, shape, tensors[0].offset, nbytes)
        self.found[name] = (info, Origin(tuple(tensor.name for tensor in tensors), stack=True))

    def _stored(self, name: str) -> str | None:
        """The name that a tensor has here, which is in use from now on; None where there is none."""
        stored = next((spelt for spelt in self._spellings(name) if spelt in self.weights.tensors), None)
        if stored is not None:
            self.used.add(stored)
            self._find_scales(stored)
        return stored

    def _missing(self, name: str) -> errors.MissingTensor:
        return errors.MissingTensor(self.folder, f"has no tensor {name!r}, which is needed here")

    def _spellings(self, name: str) -> Iterator[str]:
        for start in self.family.spellings:
            yield start + name.removeprefix("model.") if name.startswith("model.") else name
        if self.start is not None:
            inside = name.startswith("model.")
            start = self.start if inside else self.start.removesuffix("model.")
            yield start + name.removeprefix("model.")

    def _start(self) -> str | None:
        """What stands before the embedding's name, and so before all others: of a model without head it is
        nothing, and wrappers put their own names in front. None where several tensors could be it."""
        embedding = next(rule.stored for rule in self.family.rules if rule.name == "token_embd.weight")
        end = embedding.removeprefix("model.")
        starts = [name[: -len(end)] for name in self.weights.tensors if name.endswith(end)]
        return starts[0] if len(starts) == 1 and starts[0][-1:] in ("", ".") else None

    def _row_type(self, tensor: StoredTensor) -> TensorType:
        if tensor.dtype not in TYPES:
            raise errors.WrongType(
                self.folder / self.weights.file_of(tensor.name),
                f"tensor {tensor.name!r} is of type {tensor.dtype}, which cannot be used here "
                f"(can: {', '.join(TYPES)})",
            )
        return TYPES[tensor.dtype]

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
                f"tensor {scales!r} is {described(place)}, expected {expected[0]} × {expected[1]} floats",
            )
        self.used.add(scales)

    def _refuse_others(self) -> None:
        for name in self.weights.tensors:
            spare = name.endswith((*_DERIVED, *self.family.derived)) or name.startswith(self.family.ignored)
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
    match = _LAYER.match(name)
    return int(match[1]) if match else -1
