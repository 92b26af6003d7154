"""What a plan means, in words: what limits it, and the plain truth when the accelerator does not help."""

from collections.abc import Sequence

from powerinfer_formats.modes import MODES
from powerinfer_tools.stages.plan.capabilities import THIS_VERSION
from powerinfer_tools.stages.plan.disk_levels import NO_LOCALITY, seconds_of
from powerinfer_tools.stages.plan.greedy import fastest_alike, nothing_hot
from powerinfer_tools.stages.plan.levels import LevelTable
from powerinfer_tools.stages.plan.memory import expert_bytes, experts_of
from powerinfer_tools.stages.plan.planner import Outcome

_MIB = 1 << 20


def time_parts(outcome: Outcome) -> dict[str, float]:
    """Seconds of one token by part. Where both sides of an FFN work at once, the slower one counts: ``hot``
    and ``cold`` hold the layers in which that side was the slower; ``disk``, where there is some, the time
    that computing waits for it."""
    return parts_of(outcome.placement.tables, outcome.placement.solution.choice)


def parts_of(tables: Sequence[LevelTable], choice: Sequence[int]) -> dict[str, float]:
    """As :func:`time_parts`, for any choice of levels of the layers and, last, the head."""
    parts = dict.fromkeys(("attention", "predictor", "hot", "cold", "sync", "head"), 0.0)
    waits = sum(float(t.seconds[k] - t.computing_seconds[k]) for t, k in zip(tables, choice, strict=True))
    if waits:
        parts["disk"] = waits
    for index, (table, k) in enumerate(zip(tables, choice, strict=True)):
        parts["head" if index == len(tables) - 1 else "attention"] += float(table.block_seconds[k])
        hot, cold = float(table.hot_seconds[k]), float(table.cold_seconds[k])
        predictor = float(table.predictor_seconds[k])
        first = bool(table.predictor_hot[k])
        if first or cold >= hot:
            parts["predictor"] += predictor
        uneven = float(table.uneven_seconds[k])
        if hot > cold:
            parts["hot"] += hot + uneven
        else:
            parts["cold"] += (cold if first else cold - predictor) + uneven
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
        "predictor": f"{side} (predictors)",
        "hot": "GPU memory bandwidth (hot neurons)",
        "cold": "CPU memory bandwidth (cold neurons)",
        "sync": "synchronisation between CPU and GPU",
        "head": f"{side} (output head)",
        "disk": "the disk (what is not in memory)",
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
    elif outcome.fits_whole and hot == outcome.shape.total_neurons and _shared(outcome, cold=True) == 0:
        text = (
            "Fits whole: everything that may be placed is on the GPU "
            f"({outcome.memory.vram_used / _MIB:,.1f} MiB), {speed:.1f} tok/s against {cpu_only:.1f} on the "
            "CPU alone."
        )
    else:
        text = ""
        if outcome.fits_whole:
            text = "Fits whole, yet both sides working at once are faster than the GPU alone: "
        text += f"{_hot_units(outcome)}{_activity(outcome)}: {speed:.1f} tok/s, "
        text += f"{speed / cpu_only:.2f} × the {cpu_only:.1f} of the CPU alone."
        if speed < cpu_only and outcome.options.objective == "time":
            text += " Single tokens are slower so than on the CPU alone, and the whole request is faster."
        elif speed < cpu_only:
            text += " Here that is slower than the CPU alone; --objective time is never."
    return " ".join(
        part for part in (text, _from_disk(outcome), *_not_exact(outcome), _stays(outcome)) if part
    )


def _from_disk(outcome: Outcome) -> str:
    """What is on disk alone, and what that costs."""
    placement, disk = outcome.placement, outcome.machine.disk
    if not placement.disk_bytes or disk is None:
        return ""
    every = zip(outcome.shape.layers, placement.tables, placement.solution.choice, strict=False)
    pairs = [unit for unit in every if unit[0].routed or not outcome.shape.routed]
    reading = sum(float(table.disk_seconds[k]) for _, table, k in pairs)
    computing = sum(
        float(t.computing_seconds[k])
        for t, k in zip(placement.tables, placement.solution.choice, strict=True)
    )
    beside = f"takes {1e3 * reading:.1f} ms beside {1e3 * computing:.1f} ms of computing"
    if not outcome.shape.routed:
        absent = sum(table.disk[k] > 0 for _, table, k in pairs)
        return (
            f"{NO_LOCALITY} The FFNs of {absent} of {len(pairs)} layers are on disk alone, and reading them "
            f"{beside}: disk speed over their size."
        )
    absent = sum(int(table.disk[k]) // expert_bytes(layer).ram for layer, table, k in pairs)
    experts = sum(experts_of(layer).count for layer, _, _ in pairs)
    taken = sum(
        float(table.disk_seconds[k]) / seconds_of(layer, disk) * expert_bytes(layer).vram
        for layer, table, k in pairs
    )
    basis = "by the profile" if outcome.frequencies.layers is not None else "if all are taken equally often"
    return (
        f"{absent:,} of {experts:,} experts are on disk alone: {basis}, a token reads {taken / 1e6:,.1f} MB "
        f"of them, which {beside}; a text that stays with a topic reads less."
    )


def cpu_only_seconds(outcome: Outcome) -> float:
    """Time of one token with nothing on the accelerator and the residual stream at home on the CPU."""
    return sum(cpu_only_parts(outcome).values())


def cpu_only_parts(outcome: Outcome) -> dict[str, float]:
    """As :func:`time_parts`, with nothing on the accelerator, every layer in its fastest mode."""
    tables = outcome.placement.tables
    return parts_of(tables, fastest_alike(tables, nothing_hot(tables))) | {"sync": 0.0}


def hot_neurons(outcome: Outcome) -> int:
    """Hot neurons of all layers."""
    choice = outcome.placement.solution.choice
    return sum(int(table.hot[k]) for table, k in zip(outcome.placement.tables, choice, strict=True))


def activation_share(outcome: Outcome) -> float:
    """Share of all activations that the hot neurons make (of the choices of routers that fall on hot
    experts); of all neurons where nothing is known."""
    choice, tables = outcome.placement.solution.choice, outcome.placement.tables
    hot = sum(float(table.activations[k]) for table, k in zip(tables, choice, strict=True))
    total = sum(table.total_activations for table in tables)
    for layer in outcome.shape.expert_layers[:1]:  # every token takes shared experts: that says nothing
        neurons = experts_of(layer).shared_neurons
        hot, total = hot - neurons * _shared(outcome), total - neurons * len(outcome.shape.expert_layers)
    return hot / total if total else 0.0


def _shared(outcome: Outcome, *, cold: bool = False) -> int:
    """Layers whose shared expert is hot (or cold); 0 where there are none."""
    layers = sum(bool(experts_of(layer).shared) for layer in outcome.shape.expert_layers)
    choice, tables = outcome.placement.solution.choice, outcome.placement.tables
    hot = sum(int(table.shared_hot[k]) for table, k in zip(tables, choice, strict=True))
    return layers - hot if cold else hot


def _hot_units(outcome: Outcome) -> str:
    """How much is hot, in words."""
    hot, shape = hot_neurons(outcome), outcome.shape
    if len(shape.expert_layers) < len(shape.layers):
        return f"{100 * hot / shape.total_neurons:.1f} % of the neurons are hot"
    layer = shape.layers[0]
    count = hot // layer.up.rows
    text = f"{count:,} of {len(shape.layers) * experts_of(layer).count:,} experts"
    if experts_of(layer).shared:
        text += f" and {_shared(outcome)} of {len(shape.layers)} shared ones"
    return f"{text} are hot"


def _activity(outcome: Outcome) -> str:
    if outcome.frequencies.layers is None:
        return ""
    of_what = "what the routers choose" if outcome.shape.routed else "the activations"
    return f", with {100 * activation_share(outcome):.1f} % of {of_what}"


def _nothing_hot(outcome: Outcome, speed: float) -> str:
    if outcome.memory.vram_capacity == 0:
        return f"No VRAM is granted: everything stays on the CPU, {speed:.1f} tok/s."
    if outcome.shape.placement_limit is not None:
        return (
            f"This version places nothing of models with {outcome.shape.placement_limit} on an accelerator: "
            f"everything stays on the CPU, {speed:.1f} tok/s."
        )
    gpu = outcome.machine.gpu
    assert gpu is not None
    layers = outcome.placement.tables[:-1]
    on_cpu = max(float(table.cold_seconds[table.fastest_like(0)]) for table in layers)
    sync = min(float(table.sync_seconds[table.counts - 1]) for table in layers)
    what = "the experts of a token take" if outcome.shape.routed else "a layer's whole FFN takes"
    return (
        f"The GPU does not help: {what} the CPU {1e6 * on_cpu:.0f} µs, and handing it to "
        f"{gpu.name} and waiting costs {1e6 * sync:.0f} µs before any work is done; everything stays on the "
        f"CPU, {speed:.1f} tok/s."
    )


def _not_exact(outcome: Outcome) -> list[str]:
    """A sentence for each mode that changes answers."""
    choice, tables = outcome.placement.solution.choice, outcome.placement.tables
    modes = [MODES[int(table.mode[k])] for table, k in zip(tables, choice, strict=True)]
    what = {
        "predicted": "predictors name the neurons to compute",
        "thresholded": "neurons with a small factor are left out",
    }
    return [
        f"In {modes.count(mode)} of {len(tables) - 1} layers {done}: not exact."
        for mode, done in what.items()
        if mode in modes
    ]


def _stays(outcome: Outcome) -> str:
    names = {
        "ffn": "experts" if outcome.shape.routed else "FFN neurons",
        "attention": "attention with its KV cache",
        "head": "the output head",
    }
    if outcome.frequencies.predictors:
        names["predictors"] = "predictors"
    stays = [name for unit, name in names.items() if unit not in outcome.options.engine.placeable]
    if "attention" not in outcome.options.engine.placeable:
        stays += ["routers", "norms"] if outcome.shape.routed else ["norms"]
    text = f"Not placed by this plan, always on the CPU: {', '.join([*stays, 'embedding'])}."
    if outcome.frequencies.inside:
        text += (
            " Experts are placed as wholes: the neurons inside are counted, and priced where a layer is "
            "gate-first, but neither sorted nor placed one by one."
        )
    if outcome.options.engine != THIS_VERSION:
        text += (
            " It counts on an engine that can place all else and skips hot neurons too; what this version "
            "does stands beside it (powerinfer-this-version)."
        )
    return text
