"""Plans written by hand, for tests that need a certain split and not the planner's."""

from collections.abc import Sequence

from powerinfer_formats.plan import (
    Budgets,
    LayerPlan,
    LayerSeconds,
    Plan,
    PlanHardware,
    PlanMemory,
    PlanModel,
    PlanPrediction,
    PlanSolver,
)
from powerinfer_formats.profile import Profile


def plan_for(profile: Profile, hot: Sequence[int], *, mode: str = "dense", group: int, width: int) -> Plan:
    """A plan that places ``hot[i]`` neurons of layer i on the hot device."""
    layers = tuple(
        LayerPlan(
            index=index,
            hot_neurons=count,
            mode=mode,  # type: ignore[arg-type]
            attention="cpu",
            hot_activation_share=0.0,
            vram_bytes=0,
            ram_bytes=0,
            seconds=LayerSeconds(0.0, 0.0, 0.0, 0.0, 0.0),
        )
        for index, count in enumerate(hot)
    )
    return Plan(
        tool_version="test",
        model=PlanModel(
            name=profile.model_name,
            fingerprint=profile.fingerprint,
            architecture=profile.architecture,
            activation=profile.activation,
            layers=len(hot),
            neurons=profile.neurons(0),
            width=width,
        ),
        hardware=PlanHardware("by hand", "preset", "none", None),
        budgets=Budgets(0, 0, 64),
        objective="time",
        group=group,
        layers=layers,
        units=(),
        memory=PlanMemory(0, 0, 0, 0),
        solver=PlanSolver("by hand", 0.0, 0.0, 0.0, 0, {}),
        predicted=PlanPrediction(1.0, "nothing", {}),
        verdict="written by hand",
    )
