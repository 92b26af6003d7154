"""What can be done with a model's file, from its header alone.

It says whether the model runs, how much memory it takes, and which speed to expect. Nothing is measured, and
no matrix is read.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from powerinfer_formats.block_types import TensorType
from powerinfer_formats.errors import FormatError
from powerinfer_formats.gguf_scan import TensorInfo
from powerinfer_formats.hardware import HardwareProfile
from powerinfer_tools import detect
from powerinfer_tools.engine.memory import MARGIN
from powerinfer_tools.errors import PowerInferError, TokenizerError
from powerinfer_tools.inspect.advice import dense_seconds
from powerinfer_tools.measure.hardware.store import default_profile_path
from powerinfer_tools.model.architectures import ARCHITECTURES, RELU_FAMILY
from powerinfer_tools.model.footprint import footprint_of
from powerinfer_tools.model.loading import Model, load_model
from powerinfer_tools.model.matrices import MatrixShape
from powerinfer_tools.model.shapes import shape_of_model
from powerinfer_tools.model.tensors import MATRIX_TYPES
from powerinfer_tools.stages.plan.machine import machine_of
from powerinfer_tools.stages.plan.memory import Workload
from powerinfer_tools.stages.plan.planner import DEFAULT_CONTEXT
from powerinfer_tools.text.vocabulary import require_supported

#: Parts of a model by the beginnings of its tensors' names after "blk.N."; the first match counts.
_PARTS = (
    ("experts", ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps", "ffn_gate_up_exps")),
    ("router", ("ffn_gate_inp", "exp_probs_b")),
    ("FFN", ("ffn_",)),
    ("attention", ("attn_", "wo", "q_", "k_", "v_")),
    ("recurrent", ("ssm_", "shortconv", "time_mix", "channel_mix")),
    ("draft layers, not used", ("nextn",)),
)


@dataclass(frozen=True)
class Verdict:
    """``reason``: why the model does not run. ``parts``: bytes in the file. ``memory_bytes``: the weights in
    the form used for computing; ``packed``: those of its matrices, by row type. ``products``: multiplications
    per token. ``cache_bytes``: keys and values for ``context`` tokens. ``fits``: weights and cache are below
    the free memory. ``tokens_per_second``: predicted, if this machine has been measured. None: not known."""

    family: str
    runs: bool
    reason: str
    activation: str | None
    true_zeros: bool | None
    parts: dict[str, int]
    memory_bytes: int
    packed: dict[str, int] | None = None
    products: int | None = None
    cache_bytes: int | None = None
    context: int | None = None
    free_bytes: int | None = None
    fits: bool | None = None
    tokens_per_second: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values, without unknown ones."""
        return {name: value for name, value in vars(self).items() if value is not None and value != ""}


def judge(path: Path, family: str, tensors: Mapping[str, TensorInfo]) -> Verdict:
    """The verdict on the model at ``path``, which contains ``tensors`` and names ``family`` as its family."""
    parts, memory = weigh(tensors)
    try:
        model = load_model(path)
    except (PowerInferError, FormatError) as error:
        return refused(path, family, error, parts, memory)
    try:
        if "tokenizer.ggml.model" in model.source.metadata:
            require_supported(model.source.metadata)
        return _accepted(model, parts)
    except TokenizerError as error:
        silent = TokenizerError(f"its weights can be computed with, but no text read or written: {error}")
        return refused(path, family, silent, parts, memory)
    finally:
        model.close()


def weigh(tensors: Mapping[str, TensorInfo]) -> tuple[dict[str, int], int]:
    """Bytes of each part of a model in the file, and of all its tensors in memory."""
    return _parts(tensors), sum(_memory(info) for info in tensors.values())


def refused(
    path: Path, family: str, error: Exception, parts: dict[str, int] | None = None, memory: int = 0
) -> Verdict:
    """The verdict on a model that ``error`` keeps from running."""
    spec = ARCHITECTURES.get(family)
    reason = str(error).removeprefix(f"{path}: ").partition(" (supported:")[0]  # --families lists them
    zeros = None if spec is None else spec.activation in RELU_FAMILY or spec.top_layers > 0
    return Verdict(family, False, reason, spec.activation if spec else None, zeros, parts or {}, memory)


def _accepted(model: Model, parts: dict[str, int]) -> Verdict:
    hyper, counted = model.hyper, footprint_of(model)
    memory = counted.packed_nbytes + counted.body.table_bytes
    memory += counted.body.vector_bytes + counted.head.vector_bytes
    context = min(DEFAULT_CONTEXT, hyper.trained_context)
    cache = counted.session_bytes(context, "f16")
    free = detect.available_ram_bytes()
    return Verdict(
        family=model.spec.name,
        runs=True,
        reason="",
        activation=hyper.activation,
        true_zeros=model.exact_zeros,
        parts=parts,
        memory_bytes=memory,
        packed={name: packed for name, (_, packed) in counted.bytes_by_type.items()},
        products=counted.body.products + counted.head.products,
        cache_bytes=cache,
        context=context,
        free_bytes=free or None,
        fits=memory + cache + MARGIN <= free if free else None,
        tokens_per_second=_expected(model, context),
    )


def _expected(model: Model, context: int) -> float | None:
    """Tokens per second of decoding, by this machine's stored profile; None without a profile, and for a
    model that the cost model does not know."""
    stored = default_profile_path()
    if not stored.is_file():
        return None
    try:
        machine = machine_of(HardwareProfile.load(stored))
        return 1.0 / dense_seconds(shape_of_model(model), machine, Workload(context, 1, "f16"))
    except (FormatError, PowerInferError):
        return None


def _parts(tensors: Mapping[str, TensorInfo]) -> dict[str, int]:
    sizes: Counter[str] = Counter()
    for name, info in tensors.items():
        sizes[_part(name)] += info.nbytes
    return dict(sizes.most_common())


def _part(name: str) -> str:
    if name.startswith(("token_embd.weight", "position_embd", "per_layer_")):
        return "embedding"
    if name.startswith("output."):
        return "head"
    if name.startswith(("v.", "a.", "mm.")):
        return "images and sound, not used"
    kind = name.split(".", 2)[2] if name.startswith("blk.") and name.count(".") > 1 else ""
    for part, beginnings in _PARTS:
        if kind.startswith(beginnings) and "norm" not in kind:
            return part
    return "norms and others"


def _memory(info: TensorInfo) -> int:
    """Bytes of a tensor in memory, rewritten in the form that the kernels read."""
    if info.row_type not in MATRIX_TYPES or len(info.shape) < 2:
        return info.nbytes
    return MatrixShape(TensorType(info.row_type), prod(info.shape[:-1]), info.shape[-1]).nbytes
