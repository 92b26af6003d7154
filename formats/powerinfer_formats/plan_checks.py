"""The rules for plans beyond the types of their fields."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING

from powerinfer_formats.errors import BadField
from powerinfer_formats.modes import EXPERT_MODES

if TYPE_CHECKING:
    from powerinfer_formats.plan import LayerPlan, Plan, PlanDense, PlanExperts

#: States a condition at a place of the file, and the fault if it does not hold.
Require = Callable[[bool, str, str], None]


def check_plan(plan: Plan, file: str | os.PathLike[str]) -> None:
    """Raise ``BadField`` for violations of rules that types cannot express."""

    def require(condition: bool, path: str, problem: str) -> None:
        if not condition:
            raise BadField(file, f"{path} {problem}")

    model, memory = plan.model, plan.memory
    if model.fingerprint is not None:
        digits = len(model.fingerprint) == 64 and set(model.fingerprint) <= set("0123456789abcdef")
        require(digits, "model.fingerprint", "is not 64 hexadecimal digits")
    for name in ("layers", "neurons", "width"):
        require(getattr(model, name) > 0, f"model.{name}", "is not positive")
    require(1 <= plan.group <= model.neurons, "group", f"is {plan.group}, expected 1 to {model.neurons}")
    for table, record in (("budgets", plan.budgets), ("memory", memory)):
        for name, value in vars(record).items():
            if name != "kv_type":
                require(value >= 0, f"{table}.{name}", f"is {value}, expected 0 or more")
    require(memory.vram_used <= memory.vram_capacity, "memory.vram_used", "is more than the capacity")
    require(memory.ram_used <= memory.ram_capacity, "memory.ram_used", "is more than the capacity")
    require(
        len(plan.layers) == model.layers, "layers", f"has {len(plan.layers)} items, expected {model.layers}"
    )
    if model.experts is not None and model.experts.dense is not None:
        _check_dense(model.layers, model.experts.dense, require)
    _check_sums(plan, require)
    for index, layer in enumerate(plan.layers):
        _check_layer(plan, index, layer, require)
    _check_experts(plan, require)
    for index, unit in enumerate(plan.units):
        require(unit.bytes >= 0, f"units[{index}].bytes", f"is {unit.bytes}, expected 0 or more")
    require(plan.solver.nodes >= 0, "solver.nodes", f"is {plan.solver.nodes}, expected 0 or more")
    require(plan.predicted.tokens_per_second > 0, "predicted.tokens_per_second", "is not positive")
    for name, prediction in plan.predictions.items():
        path = f"predictions.{name}.tokens_per_second"
        require(prediction.tokens_per_second > 0, path, "is not positive")
    if plan.request is not None:
        for name, number in vars(plan.request).items():
            require(number > 0, f"request.{name}", "is not positive")
    for name, speed in plan.sensitivity.items():
        require(speed > 0, f"sensitivity.{name}", "is not positive")
    require(plan.provenance.corpus_tokens >= 0, "provenance.corpus_tokens", "is negative")


def _check_sums(plan: Plan, require: Require) -> None:
    """The used memory is the sum over the layers and the units on that side, to the byte."""
    placed = {"gpu": 0, "cpu": 0}
    for unit in plan.units:
        placed[unit.device] += unit.bytes
    vram = placed["gpu"] + sum(layer.vram_bytes for layer in plan.layers)
    ram = placed["cpu"] + sum(layer.ram_bytes for layer in plan.layers)
    memory = plan.memory
    require(
        memory.vram_used == vram, "memory.vram_used", f"is {memory.vram_used}, layers and units make {vram}"
    )
    disk = sum(layer.disk_bytes for layer in plan.layers)
    require(memory.disk_used == disk, "memory.disk_used", f"is {memory.disk_used}, layers make {disk}")
    require(memory.ram_used == ram, "memory.ram_used", f"is {memory.ram_used}, layers and units make {ram}")


def _check_layer(plan: Plan, index: int, layer: LayerPlan, require: Require) -> None:
    path = f"layers[{index}]"
    require(layer.index == index, f"{path}.index", f"is {layer.index}, expected {index}")
    own, most = layer.neurons, 0 if plan.model.experts else plan.model.neurons
    require(own is None or 0 <= own <= most, f"{path}.neurons", f"is {own}, expected 0 to {most}")
    hot, neurons, group = layer.hot_neurons, plan.neurons_of(index), plan.group_of(index)
    fits = 0 <= hot <= neurons and (hot % group == 0 or hot == neurons)
    require(fits, f"{path}.hot_neurons", f"is {hot}, expected a multiple of {group} up to {neurons}, or all")
    has_none = layer.predictor is None or layer.mode == "predicted"
    require(has_none, f"{path}.predictor", f"is {layer.predictor!r} in a layer of mode {layer.mode}")
    share = layer.hot_activation_share
    require(0 <= share <= 1, f"{path}.hot_activation_share", f"is {share}, expected 0 to 1")
    for name in ("vram_bytes", "ram_bytes", "disk_bytes"):
        value = getattr(layer, name)
        require(value >= 0, f"{path}.{name}", f"is {value}, expected 0 or more")
    for name, seconds in vars(layer.seconds).items():
        require(seconds >= 0, f"{path}.seconds.{name}", f"is {seconds}, expected 0 or more")


def _check_experts(plan: Plan, require: Require) -> None:
    """Experts are whole groups of neurons, computed whole or without their zeros. A plan of a model with
    experts describes them."""
    experts = plan.model.experts
    if experts is not None:
        _check_expert_sizes(plan, experts, require)
    for index, layer in enumerate(plan.layers):
        own = plan.experts_of(index)
        has_shared = own is not None and own.shared_neurons > 0
        problem = "is missing" if has_shared else "is there, but no shared expert is"
        require(has_shared == (layer.shared_expert is not None), f"layers[{index}].shared_expert", problem)
        suits = plan.model.experts is None or own is not None or layer.disk_bytes == 0
        require(suits, f"layers[{index}].disk_bytes", "is there, but beside experts they alone are on disk")
        suits = own is None or layer.mode in EXPERT_MODES
        require(suits, f"layers[{index}].mode", f"is {layer.mode!r}, experts are {' or '.join(EXPERT_MODES)}")
        suits = own is None or layer.mode == "dense" or not layer.disk_bytes
        require(suits, f"layers[{index}].mode", f"is {layer.mode!r}, but experts on disk are dense")


def _check_dense(layers: int, dense: PlanDense, require: Require) -> None:
    """Some layers have one FFN, and others experts."""
    path, some = "model.experts.dense", dense.layers
    ascending = all(before < after for before, after in pairwise(some))
    within = 0 < len(some) < layers and ascending and some[0] >= 0 and some[-1] < layers
    require(within, f"{path}.layers", f"are {list(some)}, expected some of {layers} layers, ascending")
    require(dense.neurons > 0, f"{path}.neurons", "is not positive")
    require(
        1 <= dense.group <= dense.neurons,
        f"{path}.group",
        f"is {dense.group}, expected 1 to {dense.neurons}",
    )


def _check_expert_sizes(plan: Plan, experts: PlanExperts, require: Require) -> None:
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
