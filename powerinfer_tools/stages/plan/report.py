"""A plan as text for a person: what is where, hot share per layer, what to expect and what limits it."""

from collections.abc import Sequence

from powerinfer_formats.plan import LayerPlan, Plan
from powerinfer_tools.stages.plan.frequencies import UNKNOWN

_MIB = 1 << 20


def render_plan(plan: Plan) -> str:
    """The whole report; frequencies and verdict are sentences, the rest is narrow tables."""
    parts = [_header(plan), _layer_table(plan), _totals(plan), _beside(plan), _solver(plan), [plan.verdict]]
    return "\n\n".join("\n".join(part) for part in parts if part)


def layer_rows(plan: Plan) -> list[tuple[str, ...]]:
    """One row per run of equal layers: layers, hot neurons, hot share, share of activations, mode, attention,
    VRAM, RAM and time of each layer in the run."""
    rows, first = [], 0
    for index in range(1, len(plan.layers) + 1):
        if index < len(plan.layers) and _alike(plan.layers[index], plan.layers[first]):
            continue
        rows.append(_row(plan, first, index - 1))
        first = index
    return rows


def _alike(one: LayerPlan, other: LayerPlan) -> bool:
    return _cells(one) == _cells(other)


def _cells(layer: LayerPlan) -> tuple[str, ...]:
    return (
        f"{100 * layer.hot_activation_share:.1f} %",
        layer.mode,
        layer.attention.upper(),
        f"{layer.vram_bytes / _MIB:,.2f}",
        f"{layer.ram_bytes / _MIB:,.2f}",
        f"{1e6 * layer.seconds.hot:,.0f}",
        f"{1e6 * layer.seconds.cold:,.0f}",
        f"{1e6 * layer.seconds.total:,.0f}",
        f"{layer.hot_neurons:,}",
        layer.shared_expert or "",
    )


def _row(plan: Plan, first: int, last: int) -> tuple[str, ...]:
    layer = plan.layers[first]
    activity, *cells, hot, _ = _cells(layer)
    if plan.provenance.source == UNKNOWN:
        activity = "–"
    name = str(first) if first == last else f"{first}–{last}"
    return (
        name,
        _hot(plan, layer, hot),
        f"{100 * layer.hot_neurons / max(1, plan.neurons_of(first)):.1f} %",
        activity,
        *cells,
    )


def _hot(plan: Plan, layer: LayerPlan, neurons: str) -> str:
    """Hot neurons, or hot experts, and "+1" where the shared one is hot, too."""
    if plan.experts_of(layer.index) is None:
        return neurons
    return f"{layer.hot_neurons // plan.group:,}{' +1' if layer.shared_expert == 'gpu' else ''}"


def _units(plan: Plan) -> str:
    """What a layer has, in words."""
    model, experts = plan.model, plan.model.experts
    if experts is None:
        return f"{model.neurons:,} neurons"
    shared = f" and a shared one of {experts.shared_neurons:,}" if experts.shared_neurons else ""
    text = f"{experts.count} experts of {plan.group:,} neurons, {experts.used} for a token{shared}"
    if experts.dense is None:
        return text
    return f"{text}, {len(experts.dense.layers)} of them of {experts.dense.neurons:,} neurons instead"


def _header(plan: Plan) -> list[str]:
    model, hardware, budgets = plan.model, plan.hardware, plan.budgets
    gpu = hardware.gpu or "no GPU"
    peaks = " (published figures, not measured)" if hardware.source == "preset" else ""
    return [
        f"{model.name}: {model.layers} layers of {_units(plan)}, {model.activation}",
        f"for {hardware.name}: {hardware.cpu}, {gpu}{peaks}",
        f"budgets: {budgets.vram_bytes / _MIB:,.1f} MiB VRAM, {budgets.ram_bytes / _MIB:,.1f} MiB RAM, "
        f"context {budgets.context:,} ({budgets.kv_type}); objective: {plan.objective}",
        f"frequencies: {plan.provenance.source}",
        f"predictors: {plan.provenance.predictors or 'none'}",
        *([f"thresholds: {plan.provenance.thresholds}"] if plan.provenance.thresholds else []),
    ]


def _layer_table(plan: Plan) -> list[str]:
    headings = (
        "layers",
        "hot",
        "share",
        "activity",
        "mode",
        "attn",
        "hot MiB",
        "cold MiB",
        "hot µs",
        "cold µs",
        "µs",
    )
    return _columns([headings, *layer_rows(plan)], left=(4, 5))


def _totals(plan: Plan) -> list[str]:
    predicted = plan.predicted
    parts = ", ".join(
        f"{name} {1e3 * s:.2f}" for name, s in predicted.seconds.items() if s and name != "total"
    )
    return [
        *_columns(_unit_rows(plan), left=(0,)),
        "",
        f"expected: {predicted.tokens_per_second:.2f} tok/s, ms per token: {parts}",
        f"limited by: {predicted.limited_by}",
        *_request(plan),
    ]


def _request(plan: Plan) -> list[str]:
    """What the request takes, here and placed in simpler ways within the same budgets."""
    request = plan.request
    if request is None:
        return []
    lines = [
        f"a request of {request.prompt_tokens:,} tokens and {request.generate_tokens:,} generated: "
        f"{request.seconds:.1f} s",
        f"of which the prompt: {request.prompt_seconds:.1f} s (the rate of batches is assumed, not measured)",
    ]
    others = {name: request.generate_tokens * value for name, value in plan.solver.greedy.items()}
    if plan.objective == "time" and others:
        best = min(others, key=lambda name: others[name])
        said = f"the best of the simple placements, {best!r}, takes {others[best]:.1f} s"
        same = others[best] <= request.seconds * 1.001
        lines.append(f"{said}: it is taken" if same else said)
    return lines


def _beside(plan: Plan) -> list[str]:
    """The plan beside other ways to run the model, and what better hardware would bring."""
    if not plan.predictions:
        return []
    rows = [("same machine, same cost model", "tok/s")]
    rows += [(name, f"{ours.tokens_per_second:.2f}") for name, ours in plan.predictions.items()]
    names = {
        "vram_plus_1_gib": "with 1 GiB more VRAM",
        "ram_plus_1_gib": "with 1 GiB more RAM",
        "ram_bandwidth_times_1.25": "with CPU memory 1.25 × as fast",
    }
    rows += [(names.get(key, key), f"{speed:.2f}") for key, speed in plan.sensitivity.items()]
    return _columns(rows, left=(0,))


def _unit_rows(plan: Plan) -> list[tuple[str, str, str]]:
    """Bytes of every unit on both sides, then bytes used and available."""
    memory = plan.memory
    sizes = {
        "neurons" if plan.model.experts is None else "experts": (
            sum(layer.vram_bytes for layer in plan.layers),
            sum(layer.ram_bytes for layer in plan.layers),
        )
    }
    for unit in plan.units:
        gpu, cpu = sizes.get(unit.name, (0, 0))
        added = (unit.bytes, 0) if unit.device == "gpu" else (0, unit.bytes)
        sizes[unit.name] = (gpu + added[0], cpu + added[1])
    if memory.disk_used:
        sizes["on disk alone"] = (0, memory.disk_used)
    sizes["used"] = (memory.vram_used, memory.ram_used)
    sizes["budget"] = (memory.vram_capacity, memory.ram_capacity)
    rows = (
        (name.replace("kv_", "KV ").replace("_", " "), f"{gpu:,}", f"{cpu:,}")
        for name, (gpu, cpu) in sizes.items()
    )
    return [("bytes", "GPU", "CPU"), *rows]


def _solver(plan: Plan) -> list[str]:
    solver, time = plan.solver, plan.objective == "time"

    def shown(value: float) -> str:
        if time and plan.request is not None:
            return f"{plan.request.generate_tokens * value:.2f} s a request"
        if time:
            return f"{1 / value:.2f} tok/s" if value > 0 else "–"
        return f"{value:.1f} activations left to the CPU per token"

    rows = [(name, shown(value)) for name, value in solver.greedy.items()]
    rows += [("this plan", shown(solver.objective)), ("bound", shown(solver.bound))]
    state = f"solver: {solver.status}, gap {100 * solver.gap:.4f} %, {solver.nodes} nodes"
    if solver.status == "time limit":
        state += " (stopped by the clock: another run may end elsewhere)"
    return [*_columns(rows, left=(0,)), state]


def _columns(rows: Sequence[Sequence[str]], left: tuple[int, ...]) -> list[str]:
    """Rows with aligned columns; those in ``left`` to the left, others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = (
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join(cells).rstrip())
    return lines
