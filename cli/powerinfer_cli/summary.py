"""What a run cost: the figures printed when it ends, and the object that --json prints."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from powerinfer_cli.console import say
from powerinfer_cli.drafts import drafts_line
from powerinfer_cli.sizes import format_size

if TYPE_CHECKING:
    from powerinfer import Generated, Model, Session
    from powerinfer_tools.engine.disk_report import DiskReport


def engine_figures(model: "Model", session: "Session") -> dict[str, Any]:
    """What a session tells about all of its work so far, and the share of the bandwidth that it used."""
    report = session.report()
    bandwidth = model.read_bandwidth()
    return {
        "reused_tokens": 0,
        **report.as_dict(),
        "bandwidth_bytes_per_second": bandwidth,
        "bandwidth_share": report.bytes_per_second / bandwidth if bandwidth else 0.0,
    }


def run_figures(model: "Model", session: "Session", done: "Generated") -> dict[str, Any]:
    """Everything known about the only text of a session, as plain JSON values."""
    statistics, figures = done.statistics, engine_figures(model, session)
    speed, bandwidth = statistics.decode_tokens_per_second, figures["bandwidth_bytes_per_second"]
    return figures | {
        "text": done.text,
        "reasoning": done.reasoning,
        "answer": done.answer,
        "tokens": len(done.tokens),
        "ids": list(done.tokens),
        "outcome": done.ended,
        "prompt_tokens": statistics.prompt_tokens,
        "prompt_tokens_per_second": statistics.prompt_tokens_per_second,
        "decode_tokens_per_second": speed,
        "first_token_seconds": statistics.first_token_seconds,
        "bandwidth_share": figures["bytes_per_token"] * speed / bandwidth if bandwidth else 0.0,
        "logits_hash": done.logits_hash,
        "seed": done.seed,
        "timings": {
            "prompt": statistics.prompt_seconds,
            "decode": statistics.decode_seconds,
            "sampling": statistics.sampling_seconds,
            **figures["timings"],
        },
    }


def say_line(session: "Session", done: "Generated") -> None:
    """One line on what the only text of a session cost; nothing is measured for it."""
    statistics, tokens = done.statistics, len(done.tokens)
    parts = [
        f"prompt: {statistics.prompt_tokens} tokens at {statistics.prompt_tokens_per_second:.1f} tok/s",
        f"decode: {tokens} tokens at {statistics.decode_tokens_per_second:.1f} tok/s",
        *_mode_parts(session),
    ]
    if done.ended != "end":
        parts.append(f"ended: {done.explanation}")
    say(", ".join(parts))


def say_chat_line(session: "Session") -> None:
    """The same for a whole chat."""
    report = session.report()
    parts = [f"decode: {report.decode_tokens} tokens at {report.decode_tokens_per_second:.1f} tok/s"]
    say(", ".join([*parts, *_mode_parts(session)]))


def disk_line(disk: "DiskReport") -> str:
    """What was read from disk, in a few words."""
    size = format_size(disk.read_bytes)
    return f"{disk.what}: {disk.hit_share:.0%} in memory when taken, {size} read from disk"


def _mode_parts(session: "Session") -> list[str]:
    """What is not the plain case: drafts, sparse modes with the share of neurons, inexact results."""
    report = session.report()
    parts = [] if report.drafts is None else [drafts_line(vars(report.drafts))]
    if report.disk is not None:
        parts.append(disk_line(report.disk))
    if report.mode == "dense":
        return parts
    exact = "" if report.mode == "gate-first" else ", not exact"
    return [*parts, f"{report.mode}: {report.density:.0%} of the neurons computed{exact}"]


def say_summary(figures: dict[str, Any]) -> None:
    """The figures in a few lines on standard error."""
    for part in (_speed_lines, _mode_lines, _disk_lines, _cost_lines, _time_lines, _memory_lines):
        for line in part(figures):
            say(line)


def _speed_lines(figures: dict[str, Any]) -> Iterator[str]:
    reused = f" ({figures['reused_tokens']} more reused)" if figures["reused_tokens"] else ""
    speed = f"{figures['prompt_tokens_per_second']:.1f} tok/s"
    yield f"prompt: {figures['prompt_tokens']} tokens{reused}, {speed}"
    yield f"decode: {figures['decode_tokens']} tokens, {figures['decode_tokens_per_second']:.1f} tok/s"
    if figures["drafts"] is not None:
        yield drafts_line(figures["drafts"])
    share, rate = figures["bandwidth_share"], figures["bandwidth_bytes_per_second"]
    of = (
        f"{share:.0%} of the {rate / 1e9:.1f} GB/s measured"
        if rate
        else "bandwidth not measured: too little memory"
    )
    yield f"traffic: {format_size(round(figures['bytes_per_token']))} a token, {of}"


def _mode_lines(figures: dict[str, Any]) -> Iterator[str]:
    experts = figures["experts"]
    computed = f"{experts['used']} of {experts['count']} experts a token, " if experts else ""
    yield (
        f"mode: {figures['mode']}, {computed}density {figures['density']:.3f}, device {figures['device']}, "
        f"{figures['threads']} threads, {figures['isa']}"
    )


def _disk_lines(figures: dict[str, Any]) -> Iterator[str]:
    disk = figures["disk"]
    if disk is None:
        return
    yield (
        f"{disk['what']}: {disk['hits']:,} of {disk['taken']:,} in memory when taken "
        f"({disk['hit_share']:.1%}), {disk['late']:,} on their way; "
        f"{format_size(disk['memory_bytes'])} from memory, {format_size(disk['read_bytes'])} from disk, "
        f"{disk['moved']:,} made room for others"
    )
    yield (
        f"read ahead: {disk['ahead_used']:,} of {disk['ahead']:,} that were expected were taken; "
        f"waited for the disk {disk['wait_seconds']:.2f} s"
    )


def _cost_lines(figures: dict[str, Any]) -> Iterator[str]:
    """What modes that are not exact leave out, and what that costs."""
    if figures["recall"] is not None:
        yield (
            f"recall: predictors found {figures['recall']:.2%} of the active neurons by naming "
            f"{figures['predicted_density']:.2%} of all"
        )
    if figures["prediction_cost"] is not None:
        cost = figures["prediction_cost"]
        more = cost["predicted_perplexity"] / cost["perplexity"] - 1
        yield f"predicting costs: {more:+.2%} of perplexity, as measured when the predictors were made"
    cost = figures["threshold_cost"]
    if cost:
        yield (
            f"thresholded: perplexity {cost['perplexity_increase']:+.2%} ± {cost['error']:.2%}, KL "
            f"{cost['kl']:.1e}, as measured when the thresholds were chosen ({cost['allowed']:.2%} allowed)"
        )


def _time_lines(figures: dict[str, Any]) -> Iterator[str]:
    yield "time: " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in figures["timings"].items())
    if figures["overlap"] is not None:
        yield f"overlap: {figures['overlap']:.0%} of the hot side's time passed while the CPU computed"


def _memory_lines(figures: dict[str, Any]) -> Iterator[str]:
    memory, parts = figures["memory"], ("weights", "kv_cache", "scratch")
    vram = f", {format_size(memory['vram'])} on the device" if memory["vram"] else ""
    if memory["vram_peak"] is not None:
        vram += f" as planned, at most {format_size(memory['vram_peak'])} held there"
    sizes = ", ".join(f"{part.replace('kv_', 'KV ')} {format_size(memory[part])}" for part in parts)
    cache = "" if figures["kv_type"] == "f16" else f", KV cache of {figures['kv_type']}"
    yield f"memory: {format_size(memory['total'])} ({sizes}){vram}{cache}"
    yield f"load: weights laid out for the kernels in {figures['load_seconds']:.2f} s"
    if "seed" in figures:
        yield f"seed: {figures['seed']}, logits {figures['logits_hash']}"
