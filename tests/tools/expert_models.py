"""Split files of tiny mixtures of experts, with the placements that a test asks for."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from powerinfer_formats.plan import Plan, PlanExperts
from powerinfer_formats.profile import Profile
from powerinfer_tools.model.loading import load_model
from powerinfer_tools.stages.convert.conversion import ConvertOptions, ConvertReport, convert
from small_plans import plan_for
from split_models import Profiled
from tiny_models import TinySpec


class PreparedExperts(Profiled):
    """A tiny model with its profile, and split files of it on demand."""

    def __init__(self, folder: Path, case: str | TinySpec) -> None:
        super().__init__(folder, case)
        model = load_model(self.tiny.path)
        assert model.hyper.routing is not None
        self.routing, self.neurons = model.hyper.routing, model.hyper.neurons
        model.close()

    @property
    def all_hot(self) -> tuple[list[int], list[bool]]:
        """Every expert of every layer, for :meth:`split`."""
        return [self.routing.experts] * self.layers, [self.routing.shared_neurons > 0] * self.layers

    def plan(
        self,
        hot: Sequence[int],
        shared: Sequence[bool] | None = None,
        attention: Sequence[int] = (),
        *,
        head: bool = False,
    ) -> Plan:
        """A plan with so many hot experts of each layer, the attention of these layers and the head on the
        hot device."""
        profile, routing = Profile.load(self.profile), self.routing
        counts, width = [self.neurons * count for count in hot], self.tiny.spec.width
        plan = plan_for(profile, counts, group=self.neurons, width=width, attention=attention, head=head)
        places = [False] * len(hot) if shared is None else shared
        layers = tuple(
            replace(layer, shared_expert=("gpu" if there else "cpu") if routing.shared_neurons else None)
            for layer, there in zip(plan.layers, places, strict=True)
        )
        experts = PlanExperts(routing.experts, routing.used, routing.shared_neurons)
        sizes = replace(plan.model, neurons=self.neurons * routing.experts, experts=experts)
        return replace(plan, model=sizes, layers=layers)

    def convert(
        self,
        hot: Sequence[int],
        shared: Sequence[bool] | None = None,
        quant: str | None = None,
        attention: Sequence[int] = (),
        *,
        head: bool = False,
    ) -> ConvertReport:
        """Write the split file of :meth:`plan`."""
        places = "" if shared is None else "".join("cg"[there] for there in shared)
        placed = f"{'-'.join(map(str, hot))}-{places}-a{'-'.join(map(str, attention))}{'-head' * head}"
        plan = self.folder / f"split-{placed}.plan.json"
        self.plan(hot, shared, attention, head=head).save(plan)
        output = self.folder / f"split-{placed}.powerinfer.gguf"
        return convert(ConvertOptions(self.tiny.path, self.profile, plan, output, quant))

    def split(
        self,
        hot: Sequence[int],
        shared: Sequence[bool] | None = None,
        attention: Sequence[int] = (),
        *,
        head: bool = False,
    ) -> Path:
        """The split file with so many hot experts of each layer, and all else where it is asked for."""
        return Path(self.convert(hot, shared, attention=attention, head=head).output)
