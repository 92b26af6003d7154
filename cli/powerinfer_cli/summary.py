"""What a run cost: the figures printed when it ends, and the object that --json prints."""

from typing import TYPE_CHECKING, Any

from powerinfer_cli.console import say
from powerinfer_cli.drafts import draft_figures, drafts_line
from powerinfer_cli.engines import measured_bandwidth
from powerinfer_cli.sizes import format_size

if TYPE_CHECKING:
    from powerinfer_tools.engine import Engine
    from powerinfer_tools.generate.generation import Generation


def engine_figures(engine: "Engine") -> dict[str, Any]:
    """What the engine tells about all of its work so far, and the share of the bandwidth that it used."""
    report = engine.report()
    bandwidth = measured_bandwidth(engine)
    return {
        "reused_tokens": 0,
        **report.as_dict(),
        "bandwidth_bytes_per_second": bandwidth,
        "bandwidth_share": report.bytes_per_second / bandwidth if bandwidth else 0.0,
        "predicted_density": engine.stack.predicted_density(),
        "recall_by_layer": engine.stack.recall_by_layer(),
        "prediction_cost": prediction_cost(engine),
        "model": engine.model.name,
        "path": str(engine.model.path),
        "threshold_cost": threshold_cost(engine),
        "drafts": draft_figures(engine),
    }


def prediction_cost(engine: "Engine") -> dict[str, float] | None:
    """What predicting costs in quality, as measured when the predictors were made; None for exact modes and
    where it was not measured."""
    split = engine.model.split
    prediction = split.header.prediction if split is not None else None
    if prediction is None or prediction.cost is None or "predicted" not in engine.stack.modes:
        return None
    names = ("perplexity", "predicted_perplexity", "divergence", "max_increase")
    return dict(zip(names, prediction.cost, strict=True))


def threshold_cost(engine: "Engine") -> dict[str, float] | None:
    """What leaving neurons out costs, as it was measured when the thresholds were chosen; None where none
    are used."""
    split = engine.model.split
    if split is None or split.header.thresholding is None or "thresholded" not in engine.stack.modes:
        return None
    thresholding = split.header.thresholding
    _, _, error, kl, allowed = thresholding.cost
    return {"perplexity_increase": thresholding.increase, "error": error, "kl": kl, "allowed": allowed}


def run_figures(engine: "Engine", generation: "Generation") -> dict[str, Any]:
    """Everything known about the only generation of an engine, as plain JSON values."""
    statistics, figures = generation.statistics, engine_figures(engine)
    speed, bandwidth = statistics.decode_tokens_per_second, figures["bandwidth_bytes_per_second"]
    return figures | {
        "text": generation.text,
        "tokens": len(generation.tokens),
        "ids": generation.tokens,
        "outcome": str(generation.outcome),
        "prompt_tokens": statistics.prompt_tokens,
        "prompt_tokens_per_second": statistics.prompt_tokens_per_second,
        "decode_tokens_per_second": speed,
        "first_token_seconds": statistics.first_token_seconds,
        "bandwidth_share": figures["bytes_per_token"] * speed / bandwidth if bandwidth else 0.0,
        "logits_hash": generation.logits_hash,
        "seed": generation.sampler.seed,
        "timings": {
            "prompt": statistics.prompt_seconds,
            "decode": statistics.decode_seconds,
            "sampling": statistics.sampling_seconds,
            **figures["timings"],
        },
    }


def say_line(engine: "Engine", generation: "Generation") -> None:
    """One line on what the only generation of an engine cost; nothing is measured for it."""
    statistics, tokens = generation.statistics, len(generation.tokens)
    parts = [
        f"prompt: {statistics.prompt_tokens} tokens at {statistics.prompt_tokens_per_second:.1f} tok/s",
        f"decode: {tokens} tokens at {statistics.decode_tokens_per_second:.1f} tok/s",
        *_mode_parts(engine),
    ]
    if generation.outcome != "end":
        parts.append(f"ended: {generation.explanation}")
    say(", ".join(parts))


def say_chat_line(engine: "Engine") -> None:
    """The same for a whole chat."""
    report = engine.report()
    parts = [f"decode: {report.decode_tokens} tokens at {report.decode_tokens_per_second:.1f} tok/s"]
    say(", ".join([*parts, *_mode_parts(engine)]))


def _mode_parts(engine: "Engine") -> list[str]:
    """What is not the plain case: drafts, sparse modes with the share of neurons, inexact results."""
    report, drafts = engine.report(), draft_figures(engine)
    parts = [] if drafts is None else [drafts_line(drafts)]
    if report.mode == "dense":
        return parts
    exact = "" if report.mode == "gate-first" else ", not exact"
    return [*parts, f"{report.mode}: {report.density:.0%} of the neurons computed{exact}"]


def say_summary(figures: dict[str, Any]) -> None:
    """The figures in a few lines on standard error."""
    reused = f" ({figures['reused_tokens']} more reused)" if figures["reused_tokens"] else ""
    memory = figures["memory"]
    vram = f", {format_size(memory['vram'])} on the device" if memory["vram"] else ""
    if memory["vram_peak"] is not None:
        vram += f" as planned, at most {format_size(memory['vram_peak'])} held there"
    timings = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in figures["timings"].items())
    speed = f"{figures['prompt_tokens_per_second']:.1f} tok/s"
    say(f"prompt: {figures['prompt_tokens']} tokens{reused}, {speed}")
    speed = f"{figures['decode_tokens_per_second']:.1f} tok/s"
    say(f"decode: {figures['decode_tokens']} tokens, {speed}")
    if figures["drafts"] is not None:
        say(drafts_line(figures["drafts"]))
    share, rate = figures["bandwidth_share"], figures["bandwidth_bytes_per_second"]
    size = format_size(round(figures["bytes_per_token"]))
    of = (
        f"{share:.0%} of the {rate / 1e9:.1f} GB/s measured"
        if rate
        else "bandwidth not measured: too little memory"
    )
    say(f"traffic: {size} a token, {of}")
    experts = figures["experts"]
    computed = f"{experts['used']} of {experts['count']} experts a token, " if experts else ""
    say(
        f"mode: {figures['mode']}, {computed}density {figures['density']:.3f}, device {figures['device']}, "
        f"{figures['threads']} threads, {figures['isa']}"
    )
    if figures["recall"] is not None:
        say(
            f"recall: predictors found {figures['recall']:.2%} of the active neurons by naming "
            f"{figures['predicted_density']:.2%} of all"
        )
    if figures["prediction_cost"] is not None:
        cost = figures["prediction_cost"]
        more = cost["predicted_perplexity"] / cost["perplexity"] - 1
        say(f"predicting costs: {more:+.2%} of perplexity, as measured when the predictors were made")
    cost = figures["threshold_cost"]
    if cost:
        say(
            f"thresholded: perplexity {cost['perplexity_increase']:+.2%} ± {cost['error']:.2%}, KL "
            f"{cost['kl']:.1e}, as measured when the thresholds were chosen ({cost['allowed']:.2%} allowed)"
        )
    say(f"time: {timings}")
    if figures["overlap"] is not None:
        say(f"overlap: {figures['overlap']:.0%} of the hot side's time passed while the CPU computed")
    parts = ("weights", "kv_cache", "scratch")
    sizes = ", ".join(f"{part.replace('kv_', 'KV ')} {format_size(memory[part])}" for part in parts)
    cache = "" if figures["kv_type"] == "f16" else f", KV cache of {figures['kv_type']}"
    say(f"memory: {format_size(memory['total'])} ({sizes}){vram}{cache}")
    say(f"load: weights laid out for the kernels in {figures['load_seconds']:.2f} s")
    if "seed" in figures:
        say(f"seed: {figures['seed']}, logits {figures['logits_hash']}")
