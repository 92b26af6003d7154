"""What a plan for a mixture of experts says besides, and what must be true of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from powerinfer_formats.plan import Plan

#: The version of plans with experts; without, 1.
VERSION = 2
#: Says what must hold at a place of the file, and what it is otherwise.
Require = Callable[[bool, str, str], None]


@dataclass(frozen=True)
class PlanExperts:
    """The experts of each layer: ``count``, of which a token takes ``used``, and the neurons of the expert
    that every token takes (0: there is none)."""

    count: int
    used: int
    shared_neurons: int


def check_experts(plan: Plan, require: Require) -> None:
    """Experts are whole groups of neurons, in the one mode that they have; and are said where there are
    some."""
    experts = plan.model.experts
    if experts is not None:
        _check_sizes(plan, experts, require)
    for index, layer in enumerate(plan.layers):
        wanted = experts is not None and experts.shared_neurons > 0
        problem = "is missing" if wanted else "is there, but no shared expert is"
        require(wanted == (layer.shared_expert is not None), f"layers[{index}].shared_expert", problem)
        suits = experts is None or layer.mode == "dense"
        require(suits, f"layers[{index}].mode", f"is {layer.mode!r}, experts are computed dense")


def _check_sizes(plan: Plan, experts: PlanExperts, require: Require) -> None:
    neurons, group = plan.model.neurons, plan.group
    require(experts.count > 0, "model.experts.count", f"is {experts.count}, expected 1 or more")
    require(
        1 <= experts.used <= experts.count,
        "model.experts.used",
        f"is {experts.used}, expected 1 to {experts.count}",
    )
    require(
        experts.shared_neurons >= 0,
        "model.experts.shared_neurons",
        f"is {experts.shared_neurons}, expected 0 or more",
    )
    whole = group * experts.count == neurons
    require(whole, "group", f"is {group}, expected the neurons of one of {experts.count} experts")


def without_experts(document: dict[str, Any]) -> dict[str, Any]:
    """A plan's fields as version 1 has them."""
    model = {name: value for name, value in document["model"].items() if name != "experts"}
    layers = [
        {name: value for name, value in layer.items() if name != "shared_expert"}
        for layer in document["layers"]
    ]
    return document | {"model": model, "layers": layers}
