"""Split files of tiny mixtures of experts, with the placements that a test asks for."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from powerinfer_formats.plan import Plan
from powerinfer_formats.plan_experts import PlanExperts
from powerinfer_formats.profile import Profile
from powerinfer_tools.conversion import ConvertOptions, ConvertReport, convert
from powerinfer_tools.model import load_model
from powerinfer_tools.profiling import ProfileOptions, run_profile
from small_plans import plan_for
from split_models import CORPUS
from tiny_models import CASES, make_tiny_model


class PreparedExperts:
    """A tiny model with its profile, and split files of it on demand."""

    def __init__(self, folder: Path, case: str) -> None:
        self.folder = folder
        self.tiny = make_tiny_model(folder, CASES[case])
        text = folder / "corpus.txt"
        text.write_text(CORPUS)
        self.profile = folder / "tiny.profile.safetensors"
        run_profile(ProfileOptions(self.tiny.path, (text,), self.profile, window=64, threads=1))
        model = load_model(self.tiny.path)
        assert model.hyper.routing is not None
        self.routing, self.neurons, self.layers = model.hyper.routing, model.hyper.neurons, model.hyper.layers
        model.close()

    def plan(self, hot: Sequence[int], shared: Sequence[bool] | None = None) -> Plan:
        """A plan with so many hot experts of each layer."""
        profile, routing = Profile.load(self.profile), self.routing
        counts = [self.neurons * count for count in hot]
        plan = plan_for(profile, counts, group=self.neurons, width=self.tiny.spec.width)
        places = [False] * len(hot) if shared is None else shared
        layers = tuple(
            replace(layer, shared_expert=("gpu" if there else "cpu") if routing.shared_neurons else None)
            for layer, there in zip(plan.layers, places, strict=True)
        )
        experts = PlanExperts(routing.experts, routing.used, routing.shared_neurons)
        sizes = replace(plan.model, neurons=self.neurons * routing.experts, experts=experts)
        return replace(plan, model=sizes, layers=layers)

    def convert(
        self, hot: Sequence[int], shared: Sequence[bool] | None = None, quant: str | None = None
    ) -> ConvertReport:
        """Write the split file of :meth:`plan`."""
        name = f"split-{'-'.join(map(str, hot))}-{'' if shared is None else ''.join('cg'[s] for s in shared)}"
        plan = self.folder / f"{name}.plan.json"
        self.plan(hot, shared).save(plan)
        output = self.folder / f"{name}.powerinfer.gguf"
        return convert(ConvertOptions(self.tiny.path, self.profile, plan, output, quant))

    def split(self, hot: Sequence[int], shared: Sequence[bool] | None = None) -> Path:
        """The split file with so many hot experts of each layer."""
        return Path(self.convert(hot, shared).output)
