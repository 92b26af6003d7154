"""What a file is and holds: told from its content, not from its name."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from powerinfer_formats import predictors, thresholds
from powerinfer_formats.block_types import type_name
from powerinfer_formats.delta import Delta
from powerinfer_formats.file_types import file_type_name
from powerinfer_formats.gguf_layout import MAGIC, ORIGINAL_MAGIC
from powerinfer_formats.gguf_reader import StringArray
from powerinfer_formats.hardware import HardwareProfile
from powerinfer_formats.model_source import ModelSource
from powerinfer_formats.plan import Plan
from powerinfer_formats.profile import Profile
from powerinfer_formats.records import parse_json, to_plain
from powerinfer_formats.safetensors_file import open_safetensors
from powerinfer_formats.split import SplitFile, SplitLayer, is_split
from powerinfer_formats.trace import TraceFile, is_seekable
from powerinfer_tools.errors import PowerInferError
from powerinfer_tools.inspect.curve import summarize_profile
from powerinfer_tools.model.original import is_original
from powerinfer_tools.model.sources import open_source

#: An array of metadata longer than this is described by its length.
SHOWN_ITEMS = 8


class UnknownFile(PowerInferError):
    """The file is of no kind that powerinfer reads."""


@dataclass(frozen=True)
class TensorRow:
    """One tensor: name, type, shape (rows first), bytes."""

    name: str
    row_type: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Description:
    """``kind``: "model", "split file", "profile", "trace", "predictors", "thresholds", "delta",
    "plan", "hardware profile", "model of the original PowerInfer"; ``facts``: JSON values."""

    kind: str
    facts: dict[str, Any]
    tensors: tuple[TensorRow, ...] = ()
    profile: Profile | None = None


def describe(path: Path) -> Description:
    """Look into ``path``. Raises FormatError for a damaged file and UnknownFile for one of another kind."""
    if path.is_dir():
        return _describe_model(path)
    with path.open("rb") as file:
        start = file.read(64)
    return _reader(start, path)(path)


def _reader(start: bytes, path: Path) -> Callable[[Path], Description]:
    if start[:4] in (MAGIC, ORIGINAL_MAGIC, b"FUGG"):
        return _describe_model
    if start[8:9] == b"{":  # safetensors: 8 bytes of length, then JSON
        return _describe_safetensors
    if start[:4] == b"\x28\xb5\x2f\xfd":  # a zstd frame
        return _describe_trace if is_seekable(path) else _describe_delta
    if start.lstrip()[:1] == b"{":
        return _describe_plan
    if start.lstrip()[:6] == b"format":
        return _describe_hardware
    kinds = "GGUF file, profile, trace, predictors, thresholds, delta, plan or hardware profile"
    raise UnknownFile(f"{path} is no {kinds}")


def _describe_model(path: Path) -> Description:
    with open_source(path) as gguf:
        tensors = tuple(
            TensorRow(name, type_name(info.row_type), info.shape, info.nbytes)
            for name, info in gguf.tensors.items()
        )
        facts = _model_facts(gguf, tensors)
        if is_original(gguf):
            return Description("model of the original PowerInfer", facts, tensors)
        if is_split(gguf):
            return Description("split file", facts | _split_facts(path), tensors)
        return Description("model", facts, tensors)


def _model_facts(gguf: ModelSource, tensors: tuple[TensorRow, ...]) -> dict[str, Any]:
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[tensor.row_type] += tensor.nbytes
    return {
        "name": gguf.metadata.get("general.name"),
        "architecture": gguf.metadata.get("general.architecture"),
        "file_type": file_type_name(gguf.metadata.get("general.file_type")),
        "container": gguf.container,
        "bytes": gguf.nbytes,
        "tensor_count": len(tensors),
        "parameters": sum(int(np.prod(tensor.shape, dtype=object)) for tensor in tensors),
        "types": dict(sizes.most_common()),
        "metadata": {key: _shown(value) for key, value in gguf.metadata.items()},
    }


def _shown(value: Any) -> Any:
    """A metadata value for output: long arrays by their length only."""
    if isinstance(value, StringArray | np.ndarray):
        if len(value) > SHOWN_ITEMS:
            return f"[{len(value)} items]"
        return value.tolist() if isinstance(value, np.ndarray) else list(value)
    return value


def _split_facts(path: Path) -> dict[str, Any]:
    split = SplitFile.open(path)
    try:
        header = split.header
        facts = {
            "source_fingerprint": header.source_fingerprint,
            "hot_share": sum(units.hot for units in split.units)
            / max(sum(len(units.order) for units in split.units), 1),
            "corpus_tokens": header.corpus_tokens,
            "tool_version": header.tool_version,
            "head_device": split.devices.head,
        }
        if header.experts:
            return facts | {"layers": [_expert_units(split, index) for index in range(len(split.units))]}
        return facts | {
            "activation": header.activation,
            "group": header.group,
            "requantization_error": list(header.requantization_error),
            "prediction": to_plain(header.prediction),
            "layers": [_neuron_units(split, layer) for layer in split.layers],
        }
    finally:
        split.close()


def _neuron_units(split: SplitFile, layer: SplitLayer) -> dict[str, Any]:
    return {
        "index": layer.index,
        "neurons": layer.neurons,
        "hot_neurons": layer.hot_neurons,
        "mode": layer.mode,
        "threshold_factor": layer.threshold.factor if layer.threshold else "none",
        "predictor": layer.predictor.kind if layer.predictor else "none",
        "predictor_bytes": layer.predictor.nbytes if layer.predictor else 0,
        "predictor_device": split.devices.predictor[layer.index],
        "attention_device": split.devices.attention[layer.index],
        "types": [row_type.name for row_type in layer.layout.types],
    }


def _expert_units(split: SplitFile, index: int) -> dict[str, Any]:
    units, has_shared = split.units[index], bool(split.header.hot_shared)
    return {
        "index": index,
        "experts": len(units.order),
        "hot_experts": units.hot,
        "shared_expert": ("hot" if units.shared_hot else "cold") if has_shared else "none",
        "attention_device": split.devices.attention[index],
        "hottest": units.order[:SHOWN_ITEMS].tolist(),
    }


def _describe_safetensors(path: Path) -> Description:
    with open_safetensors(path) as reader:
        document = parse_json(reader.document(), path)
    if isinstance(document, dict) and document.get("format") == predictors.FORMAT:
        header = predictors.Predictors.load(path).header
        return Description("predictors", to_plain(header))
    if isinstance(document, dict) and document.get("format") == thresholds.FORMAT:
        return Description("thresholds", to_plain(thresholds.Thresholds.load(path).header))
    return _describe_profile(path)


def _describe_trace(path: Path) -> Description:
    with TraceFile(path) as trace:
        header = trace.header
    facts = to_plain(header) | {"records": header.records, "chunks": len(header.chunks)}
    return Description("trace", facts | {"record_bytes": header.record_bytes})


def _describe_delta(path: Path) -> Description:
    return Description("delta", to_plain(Delta.load(path).header))


def _describe_profile(path: Path) -> Description:
    profile = Profile.load(path)
    return Description("profile", summarize_profile(profile), profile=profile)


def _describe_plan(path: Path) -> Description:
    return Description("plan", Plan.load(path).to_document())


def _describe_hardware(path: Path) -> Description:
    return Description("hardware profile", to_plain(HardwareProfile.load(path)))
