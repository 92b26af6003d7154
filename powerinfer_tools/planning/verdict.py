"""What a plan means, in words: what limits it, and the plain truth when the accelerator does not help."""

from powerinfer_tools.planning.planner import Outcome

_MIB = 1 << 20


def time_parts(outcome: Outcome) -> dict[str, float]:
    """Seconds of one token by part. Where both sides of an FFN work at once, the slower one counts: ``hot``
    and ``cold`` hold the layers in which that side was the slower."""
    parts = {"attention": 0.0, "hot": 0.0, "cold": 0.0, "sync": 0.0, "head": 0.0}
    layers = len(outcome.shape.layers)
    for index, (table, k) in enumerate(
        zip(outcome.placement.tables, outcome.placement.solution.choice, strict=True)
    ):
        parts["head" if index == layers else "attention"] += float(table.block_seconds[k])
        hot, cold = float(table.hot_seconds[k]), float(table.cold_seconds[k])
        parts["hot" if hot > cold else "cold"] += max(hot, cold)
        parts["sync"] += float(table.sync_seconds[k])
    return parts


def limited_by(outcome: Outcome) -> str:
    """The part that takes most of the time, and the resource behind it."""
    tables, choice = outcome.placement.tables, outcome.placement.solution.choice
    moved = any(bool(table.block_hot[k]) for table, k in zip(tables, choice, strict=True))
    return limit_of(time_parts(outcome), moved=moved)


def limit_of(parts: dict[str, float], *, moved: bool) -> str:
    """The largest of ``parts`` (as of :func:`time_parts`) in words; ``moved``: whether blocks besides FFNs
    are on the accelerator."""
    name = max(parts, key=lambda part: parts[part])
    side = "both sides' memory bandwidth" if moved else "CPU memory bandwidth"
    reasons = {
        "attention": f"{side} (attention and KV cache)",
        "hot": "GPU memory bandwidth (hot neurons)",
        "cold": "CPU memory bandwidth (cold neurons)",
        "sync": "synchronisation between CPU and GPU",
        "head": f"{side} (output head)",
    }
    total = sum(parts.values())
    return f"{reasons[name]}: {100 * parts[name] / total:.0f} % of the time"


def verdict(outcome: Outcome) -> str:
    """One or two sentences for a person."""
    speed = 1.0 / outcome.placement.seconds
    cpu_only = 1.0 / cpu_only_seconds(outcome)
    hot = hot_neurons(outcome)
    if outcome.machine.gpu is None:
        text = (
            f"{outcome.machine.name} has no GPU in its hardware profile: everything stays on the CPU, "
            f"{speed:.1f} tok/s."
        )
    elif outcome.memory.vram_used == 0:
        text = _nothing_hot(outcome, speed)
    elif outcome.fits_whole and hot == outcome.shape.total_neurons:
        text = (
            "Fits whole: everything that may be placed is on the GPU "
            f"({outcome.memory.vram_used / _MIB:,.1f} MiB), {speed:.1f} tok/s against {cpu_only:.1f} on the "
            "CPU alone."
        )
    else:
        text = ""
        if outcome.fits_whole:
            text = "Fits whole, yet both sides working at once are faster than the GPU alone: "
        share = 100 * hot / outcome.shape.total_neurons
        text += f"{share:.1f} % of the neurons are hot{_activity(outcome)}: {speed:.1f} tok/s, "
        text += f"{speed / cpu_only:.2f} × the {cpu_only:.1f} of the CPU alone."
        if speed < cpu_only:
            text += " Here that is slower than the CPU alone; --objective time is never."
    return f"{text} {_stays(outcome)}"


def cpu_only_seconds(outcome: Outcome) -> float:
    """Time of one token with nothing on the accelerator and the residual stream at home on the CPU."""
    tables = outcome.placement.tables
    parts = (float(table.block_seconds[0] + table.cold_seconds[0]) for table in tables)
    return sum(parts)


def hot_neurons(outcome: Outcome) -> int:
    """Hot neurons of all layers."""
    choice = outcome.placement.solution.choice
    return sum(int(table.hot[k]) for table, k in zip(outcome.placement.tables, choice, strict=True))


def activation_share(outcome: Outcome) -> float:
    """Share of all activations that the hot neurons make; of all neurons where nothing is known."""
    choice, tables = outcome.placement.solution.choice, outcome.placement.tables
    hot = sum(float(table.activations[k]) for table, k in zip(tables, choice, strict=True))
    total = sum(table.total_activations for table in tables)
    return hot / total if total else 0.0


def _activity(outcome: Outcome) -> str:
    if outcome.frequencies.layers is None:
        return ""
    return f", with {100 * activation_share(outcome):.1f} % of the activations"


def _nothing_hot(outcome: Outcome, speed: float) -> str:
    if outcome.memory.vram_capacity == 0:
        return f"No VRAM is granted: everything stays on the CPU, {speed:.1f} tok/s."
    gpu = outcome.machine.gpu
    assert gpu is not None
    on_cpu = max(float(table.cold_seconds[0]) for table in outcome.placement.tables)
    sync = min((float(t.sync_seconds[-1]) for t in outcome.placement.tables[:-1]), default=0.0)
    return (
        f"The GPU does not help: a layer's whole FFN takes the CPU {1e6 * on_cpu:.0f} µs, and handing it to "
        f"{gpu.name} and waiting costs {1e6 * sync:.0f} µs before any work is done; everything stays on the "
        f"CPU, {speed:.1f} tok/s."
    )


def _stays(outcome: Outcome) -> str:
    names = {"ffn": "FFN neurons", "attention": "attention with its KV cache", "head": "the output head"}
    stays = [name for unit, name in names.items() if unit not in outcome.options.placeable]
    return f"Not placed by this plan, always on the CPU: {', '.join([*stays, 'norms', 'embedding'])}."
