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
    PlanUnit,
)
from powerinfer_formats.profile import Profile


def plan_for(
    profile: Profile,
    hot: Sequence[int],
    *,
    mode: str = "dense",
    group: int,
    width: int,
    attention: Sequence[int] = (),
    predictors: Sequence[int] = (),
    head: bool = False,
) -> Plan:
    """A plan that places ``hot[i]`` neurons of layer i on the hot device, and there, too, the attention of
    the layers in ``attention``, the predictors of those in ``predictors``, and the head."""
    layers = tuple(
        LayerPlan(
            index=index,
            hot_neurons=count,
            mode=mode,  # type: ignore[arg-type]
            attention="gpu" if index in attention else "cpu",
            predictor=("gpu" if index in predictors else "cpu") if mode == "predicted" else None,
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
        units=(PlanUnit("head", "gpu", 0),) if head else (),
        memory=PlanMemory(0, 0, 0, 0),
        solver=PlanSolver("by hand", 0.0, 0.0, 0.0, 0, {}),
        predicted=PlanPrediction(1.0, "nothing", {}),
        verdict="written by hand",
    )
