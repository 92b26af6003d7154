"""Split files some of whose layers have experts, and others one FFN."""

from dataclasses import replace
from pathlib import Path

from hybrid_profiles import TOKENS, made
from plan_cases import granted
from powerinfer_formats.hardware import HardwareProfile
from powerinfer_formats.plan import Plan
from powerinfer_formats.profile import Profile
from powerinfer_tools.measure.hardware.presets import PC_LOW
from powerinfer_tools.model.loading import load_model
from powerinfer_tools.model.shapes import shape_of_model
from powerinfer_tools.stages.convert.conversion import ConvertOptions, convert
from powerinfer_tools.stages.plan.planner import PlanOptions
from powerinfer_tools.stages.plan.request import make_plan

GROUP = 8
#: An accelerator that pays for the smallest model: no wait, and a CPU that is far slower.
EAGER = replace(
    PC_LOW,
    cpu=replace(
        PC_LOW.cpu,
        bandwidth_bytes_per_s=1e6,
        sparse_bandwidth_bytes_per_s=tuple(1e6 for _ in PC_LOW.cpu.sparse_densities),
    ),
    gpu=replace(PC_LOW.gpu, launch_seconds=0.0, sync_seconds=0.0),  # type: ignore[type-var]
    link=replace(PC_LOW.link, latency_seconds=0.0),  # type: ignore[type-var]
)


def planned(path: Path, profile: Profile, vram: int = 0, hardware: HardwareProfile = PC_LOW) -> Plan:
    """By the planner, for a machine with an accelerator, of which ``vram`` bytes may be taken."""
    model = load_model(path)
    try:
        shape = shape_of_model(model)
    finally:
        model.close()
    options = PlanOptions(context=len(TOKENS), group=GROUP)
    return make_plan(shape, profile, hardware, granted(vram), options)


class Split:
    """A split file as the planner, or ``change``, wants it."""

    def __init__(self, folder: Path, case: str, activation: str | None = None) -> None:
        self.source, self.saved, self.profile = made(folder, case, activation)
        self.plan, self.folder = planned(self.source, self.profile), folder
        model = load_model(self.source)
        self.facts = model.hyper.facts
        model.close()
        self.dense = [index for index, facts in enumerate(self.facts) if facts.ffn == "dense"]
        self.routed = [index for index, facts in enumerate(self.facts) if facts.ffn == "experts"]

    def convert(self, plan: Plan | None = None, **options: object) -> Path:
        """Another file, from ``plan``, or else from the planner's."""
        file, output = self.folder / "plan.json", self.folder / "split.powerinfer.gguf"
        output.unlink(missing_ok=True)
        (plan or self.plan).save(file)
        convert(ConvertOptions(self.source, self.saved, file, output, **options))  # type: ignore[arg-type]
        return output

    def changed(self, index: int, **changes: object) -> Plan:
        """The plan with another layer."""
        layers = list(self.plan.layers)
        layers[index] = replace(layers[index], **changes)  # type: ignore[arg-type]
        return replace(self.plan, layers=tuple(layers))
