"""The kind and contents of a file, judged by its content, not by its name."""

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from powerinfer_formats import predictors, thresholds
from powerinfer_formats.block_types import type_name
from powerinfer_formats.delta import Delta
from powerinfer_formats.errors import FormatError
from powerinfer_formats.file_types import file_type_name
from powerinfer_formats.gguf_layout import MAGIC, ORIGINAL_MAGIC
from powerinfer_formats.gguf_reader import StringArray, read_readable
from powerinfer_formats.gguf_scan import TensorInfo
from powerinfer_formats.hardware import HardwareProfile
from powerinfer_formats.plan import Plan
from powerinfer_formats.profile import Profile
from powerinfer_formats.records import parse_json, read_text, to_plain
from powerinfer_formats.safetensors_file import open_safetensors
from powerinfer_formats.split import SplitFile, SplitLayer, is_split
from powerinfer_formats.trace import TraceFile, is_seekable
from powerinfer_tools.errors import PowerInferError
from powerinfer_tools.inspect.curve import summarize_profile
from powerinfer_tools.inspect.verdict import judge, refused, weigh
from powerinfer_tools.model.original import is_original
from powerinfer_tools.model.sources import open_source

#: An array of metadata longer than this is described by its length.
SHOWN_ITEMS = 8


class UnknownFile(PowerInferError):
    """The file is not of a kind that powerinfer reads."""


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
    "plan", "hardware profile", "model of the original PowerInfer", "damaged model"; ``facts``: JSON values.
    ``fault``: why a model cannot be opened."""

    kind: str
    facts: dict[str, Any]
    tensors: tuple[TensorRow, ...] = ()
    profile: Profile | None = None
    fault: Exception | None = None


def describe(path: Path) -> Description:
    """Examine ``path``. Raises FormatError for a damaged file and UnknownFile for a file of another kind."""
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
    try:
        source = open_source(path)
    except (FormatError, PowerInferError) as error:
        return _describe_refused(path, error)
    with source as gguf:
        facts = _model_facts(gguf.metadata, gguf.tensors, gguf.container, gguf.nbytes)
        rows = _rows(gguf.tensors)
        family = facts["architecture"] or ""
        facts["verdict"] = judge(path, str(family), gguf.tensors).as_dict()
        if is_original(gguf):
            return Description("model of the original PowerInfer", facts, rows)
        if is_split(gguf):
            return Description("split file", facts | _split_facts(path), rows)
        return Description("model", facts, rows)


def _describe_refused(path: Path, error: Exception) -> Description:
    """A model that cannot be opened: its header's contents, and the reason. Raises ``error`` if the header
    says nothing."""
    metadata: dict[str, Any] = {}
    if path.is_dir():
        config = _config(path)
        family, container = config.get("model_type"), "Hugging Face directory"
        metadata = {key: value for key, value in config.items() if not isinstance(value, dict | list)}
        tensors: Mapping[str, TensorInfo] = {}
        nbytes = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    else:
        metadata, tensors = read_readable(path)
        family, container, nbytes = metadata.get("general.architecture"), "GGUF", path.stat().st_size
    if not family:
        raise error
    facts = _model_facts(metadata, tensors, container, nbytes)
    facts["architecture"] = family
    facts["verdict"] = refused(path, str(family), error, *weigh(tensors)).as_dict()
    damaged = isinstance(error, FormatError) and not path.is_dir()
    return Description("damaged model" if damaged else "model", facts, _rows(tensors), fault=error)


def _config(folder: Path) -> dict[str, Any]:
    with suppress(FormatError):
        document = parse_json(read_text(folder / "config.json"), folder / "config.json")
        return document if type(document) is dict else {}
    return {}


def _rows(tensors: Mapping[str, TensorInfo]) -> tuple[TensorRow, ...]:
    return tuple(
        TensorRow(name, type_name(info.row_type), info.shape, info.nbytes) for name, info in tensors.items()
    )


def _model_facts(
    metadata: Mapping[str, Any], tensors: Mapping[str, TensorInfo], container: str, nbytes: int
) -> dict[str, Any]:
    sizes: Counter[str] = Counter()
    for info in tensors.values():
        sizes[info.type_name] += info.nbytes
    return {
        "name": metadata.get("general.name"),
        "architecture": metadata.get("general.architecture"),
        "file_type": file_type_name(metadata.get("general.file_type")),
        "container": container,
        "bytes": nbytes,
        "tensor_count": len(tensors),
        "parameters": sum(prod(info.shape) for info in tensors.values()),
        "types": dict(sizes.most_common()),
        "verdict": {},
        "metadata": {key: _shown(value) for key, value in metadata.items()},
    }


def _shown(value: Any) -> Any:
    """A metadata value for output; of a long array only its length."""
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
        by_index = [split.layer(index) for index in range(len(split.units))]
        layers = [
            _expert_units(split, index) if layer is None else _neuron_units(split, layer)
            for index, layer in enumerate(by_index)
        ]
        if not split.layers:
            return facts | {"layers": layers}
        return facts | {
            "activation": header.activation,
            "group": header.ffn_group,
            "requantization_error": list(header.requantization_error),
            "prediction": to_plain(header.prediction),
            "layers": layers,
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
        "mode": split.modes[index],
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
