"""The plan: what is placed where, how each layer is computed, and the expected result. A JSON file.

Units are bytes, seconds and neurons. The planner makes plans; this module only checks their consistency.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from powerinfer_formats.atomic import write_atomic
from powerinfer_formats.errors import BadDocument, BadField, OtherModel, UnsupportedVersion
from powerinfer_formats.modes import Mode
from powerinfer_formats.plan_checks import check_plan
from powerinfer_formats.records import RecordReader, dump_json, parse_json, read_text, to_plain

VERSION = 1
#: The version of plans for models with experts.
EXPERTS_VERSION = 2
#: The version of plans with experts, or dense FFNs, that are on disk alone.
DISK_VERSION = 3
#: The version of plans whose models also have layers with one FFN.
MIXED_VERSION = 4
_READ = (VERSION, EXPERTS_VERSION, DISK_VERSION, MIXED_VERSION)
FORMAT = "powerinfer-plan"
Device = Literal["gpu", "cpu"]


@dataclass(frozen=True)
class PlanDense:
    """The ``layers`` (ascending) that have one FFN of ``neurons``, placed in groups of ``group``, where
    others have experts."""

    layers: tuple[int, ...]
    neurons: int
    group: int


@dataclass(frozen=True)
class PlanExperts:
    """The experts of each layer: ``count``, of which a token takes ``used``, and the neurons of the expert
    that every token takes (0: there is none); ``dense``: of the layers without."""

    count: int
    used: int
    shared_neurons: int
    dense: PlanDense | None = None


@dataclass(frozen=True)
class PlanModel:
    """The model planned for; ``fingerprint`` is None for a shape without a file. ``neurons`` per layer, of
    all experts where there are ``experts``; of single layers see :meth:`Plan.neurons_of`."""

    name: str
    fingerprint: str | None
    architecture: str
    activation: str
    layers: int
    neurons: int
    width: int
    experts: PlanExperts | None = None


@dataclass(frozen=True)
class PlanHardware:
    """The machine the plan is for; ``gpu`` is None without an accelerator."""

    name: str
    source: Literal["measured", "preset"]
    cpu: str
    gpu: str | None


@dataclass(frozen=True)
class Budgets:
    """The plan's budgets: bytes on both sides, positions of context in a KV cache of ``kv_type``, and the
    share by which the perplexity may grow (0: exact modes only)."""

    vram_bytes: int
    ram_bytes: int
    context: int
    kv_type: Literal["f16", "q8_0"] = "f16"
    max_ppl_increase: float = 0.0


@dataclass(frozen=True)
class LayerSeconds:
    """Expected time of one token in one layer, by part; ``hot`` and ``cold`` overlap in ``total``. The time
    of a predictor on the CPU is also in ``cold``; on the accelerator it passes before both."""

    attention: float
    hot: float
    cold: float
    sync: float
    total: float
    predictor: float = 0.0


@dataclass(frozen=True)
class LayerPlan:
    """One layer. ``hot_activation_share`` is the share of all activations that the hot neurons make, or of
    what routers choose that hot experts are; ``predictor`` is where the predictor lives, in mode predicted
    only, ``shared_expert`` where the expert that every token takes does. Bytes are those of the neurons;
    ``disk_bytes`` would be in RAM, and are on disk alone. ``neurons`` are said where layers with one FFN
    differ: 0 of a layer without."""

    index: int
    hot_neurons: int
    mode: Mode
    attention: Device
    hot_activation_share: float
    vram_bytes: int
    ram_bytes: int
    seconds: LayerSeconds
    predictor: Device | None = None
    shared_expert: Device | None = None
    disk_bytes: int = 0
    neurons: int | None = None


@dataclass(frozen=True)
class PlanUnit:
    """A unit that is placed as a whole (embedding, head, KV cache, scratch, ...)."""

    name: str
    device: Device
    bytes: int


@dataclass(frozen=True)
class PlanMemory:
    """Bytes used and available, on both sides. ``disk_used``: the bytes on disk alone, counted as they would
    be in RAM."""

    vram_used: int
    vram_capacity: int
    ram_used: int
    ram_capacity: int
    disk_used: int = 0


@dataclass(frozen=True)
class PlanSolver:
    """How the placement was found. ``greedy`` holds the objective of each simple answer that was feasible.

    ``objective`` and ``bound`` in the unit of the objective; ``gap`` is (objective − bound) / objective.
    """

    status: str
    objective: float
    bound: float
    gap: float
    nodes: int
    greedy: Mapping[str, float]


@dataclass(frozen=True)
class PlanPrediction:
    """The expected speed. ``seconds``: the time of one token by part."""

    tokens_per_second: float
    limited_by: str
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class PlanRequested:
    """The request for which the plan was made: tokens of prompt and of answer, and the expected seconds for
    the prompt and for the whole request. If ``objective`` is time, the solver's values are the latter seconds
    per generated token."""

    prompt_tokens: int
    generate_tokens: int
    prompt_seconds: float
    seconds: float


@dataclass(frozen=True)
class PlanProvenance:
    """The profile behind the plan: hashes of its corpora, tokens, and what was counted
    (:attr:`~powerinfer_formats.profile.Profile.counting`, empty in plans of earlier versions); ``source``
    says so in words where there was none. ``predictors`` says
    which predictors the plan may use, or why none, ``thresholds`` the same of a thresholds file (empty: there
    was none); ``engine`` whose abilities it counts on."""

    source: str
    corpus_hashes: tuple[str, ...] = ()
    corpus_tokens: int = 0
    predictors: str = ""
    engine: str = ""
    thresholds: str = ""
    counting: str = ""


@dataclass(frozen=True)
class Plan:
    """A whole plan; see ``SPEC.md`` for every field.

    ``predictions`` holds this plan and other ways to run the model on the same machine; ``sensitivity``
    tokens per second with better hardware.
    """

    tool_version: str
    model: PlanModel
    hardware: PlanHardware
    budgets: Budgets
    objective: Literal["time", "frequency"]
    group: int
    layers: tuple[LayerPlan, ...]
    units: tuple[PlanUnit, ...]
    memory: PlanMemory
    solver: PlanSolver
    predicted: PlanPrediction
    verdict: str
    provenance: PlanProvenance = field(default=PlanProvenance("none"))
    predictions: Mapping[str, PlanPrediction] = field(default_factory=dict)
    sensitivity: Mapping[str, float] = field(default_factory=dict)
    request: PlanRequested | None = None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read and check ``path``; raises ``FormatError`` naming the field."""
        return cls.parse(read_text(path), path)

    @classmethod
    def parse(cls, text: str, file: str | os.PathLike[str]) -> Self:
        """Check JSON ``text``; ``file`` is named in errors."""
        document = parse_json(text, file)
        if type(document) is not dict or document.pop("format", None) != FORMAT:
            raise BadDocument(file, f'is not a plan: "format": "{FORMAT}" is missing')
        version = document.pop("version", None)
        if version not in _READ or type(version) is not int:
            raise UnsupportedVersion(
                file,
                f"is a plan of version {version!r}, {VERSION}, {EXPERTS_VERSION} (with experts), "
                f"{DISK_VERSION} (from disk) and {MIXED_VERSION} (with layers without experts besides) are "
                "read; plan again",
            )
        plan = RecordReader(file).read(cls, document)
        if version != plan.version:
            raise BadField(
                file,
                f"version is {version}, and plans with experts have {EXPERTS_VERSION}, from disk "
                f"{DISK_VERSION}, with layers without experts besides {MIXED_VERSION}",
            )
        check_plan(plan, file)
        return plan

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``path`` atomically; raises ``BadField`` rather than write what ``load`` would refuse."""
        text = dump_json(self.to_document()) + "\n"
        type(self).parse(text, Path(path))
        with write_atomic(path) as stream:
            stream.write(text.encode("utf-8"))

    def to_document(self) -> dict[str, Any]:
        """The file's content as plain dicts and lists."""
        fields: dict[str, Any] = to_plain(self)
        if self.model.experts is None:
            fields = _without_experts(fields)
        elif self.model.experts.dense is None:
            del fields["model"]["experts"]["dense"]
        if self.request is None:
            del fields["request"]
        if not self.memory.disk_used:
            fields = _without_disk(fields)
        for layer in fields["layers"]:
            if layer["neurons"] is None:
                del layer["neurons"]
        return {"format": FORMAT, "version": self.version, **fields}

    @property
    def version(self) -> int:
        """The version of the file."""
        experts = self.model.experts
        if experts is not None and experts.dense is not None:
            return MIXED_VERSION
        if self.memory.disk_used:
            return DISK_VERSION
        return VERSION if experts is None else EXPERTS_VERSION

    def experts_of(self, layer: int) -> PlanExperts | None:
        """The experts of ``layer``; None where it has one FFN, or none."""
        experts = self.model.experts
        dense = experts is not None and experts.dense is not None and layer in experts.dense.layers
        return None if dense or self.layers[layer].neurons == 0 else experts

    def neurons_of(self, layer: int) -> int:
        """The number of neurons of ``layer`` that are placed."""
        own = self.layers[layer].neurons
        return self._dense(layer).neurons if own is None else own

    def group_of(self, layer: int) -> int:
        """How many neurons of ``layer`` are placed together: the neurons of an expert if it has experts."""
        return self._dense(layer).group

    def _dense(self, layer: int) -> PlanDense:
        experts = self.model.experts
        if experts is not None and experts.dense is not None and layer in experts.dense.layers:
            return experts.dense
        return PlanDense((), self.model.neurons, self.group)

    def require_model(self, fingerprint: str, name: str, file: str | os.PathLike[str]) -> None:
        """Raise ``OtherModel``, with both names, unless the plan was made for this very model."""
        if self.model.fingerprint is None:
            raise OtherModel(
                file,
                f"was made from the shape of {self.model.name!r} alone, not for {name!r}; "
                "plan again with --model",
            )
        if self.model.fingerprint != fingerprint:
            raise OtherModel(
                file, f"was made for the model {self.model.name!r}, not for {name!r}; plan again"
            )


def _without_experts(document: dict[str, Any]) -> dict[str, Any]:
    """A plan's fields as in version 1."""
    model = {name: value for name, value in document["model"].items() if name != "experts"}
    layers = [
        {name: value for name, value in layer.items() if name != "shared_expert"}
        for layer in document["layers"]
    ]
    return document | {"model": model, "layers": layers}


def _without_disk(document: dict[str, Any]) -> dict[str, Any]:
    """A plan's fields if nothing is on disk alone."""
    layers = [
        {name: value for name, value in layer.items() if name != "disk_bytes"} for layer in document["layers"]
    ]
    memory = {name: value for name, value in document["memory"].items() if name != "disk_used"}
    return document | {"layers": layers, "memory": memory}
