"""How a model is laid out for the engine."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from powerinfer_tools.engine.factor_thresholds import FactorThresholds
from powerinfer_tools.engine.observation import LayerCounters
from powerinfer_tools.engine.packed import PackedWeights
from powerinfer_tools.engine.weights_on_disk import Budget, WeightsOnDisk
from powerinfer_tools.progress import Progress


@dataclass(frozen=True)
class StackOptions:
    """How to lay a model out: tokens at a time, context, mode (None: the file's), device, VRAM limit (None:
    none).

    ``observed``: counters of each layer, to which every forward pass adds, for source models and gate-first.
    ``check_recall``: also compute which neurons are really active, to check every prediction. ``thresholds``:
    thresholds of each layer of a source model. ``residency``: the weights that are read from disk, and the
    memory that they get (``budget``). ``packed``: weights shared with other layouts of the model.
    ``progress`` is told about steps that take long.
    """

    batch: int
    context: int
    mode: str | None
    device: str
    vram: int | None
    kv_type: str = "f16"
    observed: Sequence[LayerCounters | None] | None = None
    check_recall: bool = False
    thresholds: Sequence[FactorThresholds] | None = None
    residency: WeightsOnDisk | None = None
    budget: Budget | None = None
    packed: PackedWeights = field(default_factory=PackedWeights)
    progress: Progress | None = None
