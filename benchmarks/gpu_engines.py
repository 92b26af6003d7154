"""The whole engine on the device: checked against the CPU alone, timed beside it in turn, beside what memory
allows, and beside llama.cpp with as many layers in as much of the GPU's memory."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
from gpu_run import Row, Run
from worker_process import Worker, WorkerError

from powerinfer_kernels import Pool, read_bandwidth
from powerinfer_tools import detect
from powerinfer_tools.engine import Engine
from powerinfer_tools.model.loading import load_model

PEER = Path(__file__).resolve().parent / "worker_llama_cpp.py"
CORPUS = "powerinfer_tools/data/corpus/us-constitution.txt"
ROOT = Path(__file__).resolve().parents[1]
#: Of the largest logit: rounded activations of quantised models that tip over, as the tests allow.
TOLERANCE = 0.02
PROMPT = [1, 2, 3, 4, 5, 6, 7]
REPETITIONS = 4
#: Tokens that are decoded with a timeline, for how much of the device's work is overlapped.
TRACED = 4


@dataclass(frozen=True)
class Speeds:
    """Bytes per second: of the device's memory (as a plain read has it), and of the machine's."""

    device: float
    host: float


def make_split(run: Run, source: Path, folder: Path) -> Path | None:
    """A split file of ``source`` whose plan may have everything on the GPU, by the command's stages, in
    ``folder``; None where a stage fails. The machine is measured on the way."""
    profile, plan, output = (
        folder / name for name in ("profile.safetensors", "plan.json", "split.powerinfer.gguf")
    )
    model = ["-m", str(source)]
    # Of the GPU that was measured, all that is free; without one, of pc-low's.
    vram = [] if run.kind == "cuda" else ["--hardware", "pc-low", "--vram", "8GiB"]
    stages = {
        "doctor --measure": (["doctor", "--measure"], 90.0),
        "profile": (
            ["profile", *model, "--tokens", "2048", "--corpus", str(ROOT / CORPUS), "-o", str(profile)],
            60.0,
        ),
        "plan": (
            ["plan", *model, "--profile", str(profile), *vram, "--ctx", "128", "-o", str(plan)],
            60.0,
        ),
        "convert": (
            [
                "convert",
                *model,
                "--profile",
                str(profile),
                "--plan",
                str(plan),
                "-o",
                str(output),
                "--anyway",
            ],
            60.0,
        ),
    }
    environment = os.environ | {"POWERINFER_HARDWARE": str(folder / "hardware.toml")}
    for name, (arguments, seconds) in stages.items():

        def stage(arguments: list[str] = arguments) -> None:
            done = subprocess.run(
                [sys.executable, "-m", "powerinfer_cli", *arguments],
                capture_output=True, text=True, check=False, env=environment, timeout=run.seconds_left,
            )  # fmt: skip
            if done.returncode:
                raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])

        if not run.attempt(f"{name} of {source.name}", seconds, stage):
            return None
    return output


def measure_host(run: Run) -> float:
    """Bytes per second that the CPU reads."""
    with Pool(detect.cores()) as pool:
        speed = max(read_bandwidth(pool, 256 << 20, 0.2) for _ in range(3))
    run.add(Row(f"read by the CPU, {detect.cores()} cores", speed / 1e9, "GB/s"))
    return speed


def measure_engines(
    run: Run, path: Path, budgets: Sequence[int | None], tokens: int, speeds: Speeds
) -> list[int]:
    """Decoding with each of ``budgets`` bytes of the GPU's memory, and on the CPU alone; how many bytes each
    took."""
    alone = Engine(load_model(path), context=tokens + 16)
    taken = []
    try:
        expected, _ = _decoded(alone, tokens)
        for budget in budgets:
            shown = "all that fits" if budget is None else f"a budget of {budget >> 20} MiB"

            def one(budget: int | None = budget) -> None:
                taken.append(_measure_budget(run, path, budget, tokens, speeds, alone, expected))

            run.attempt(f"the whole engine with {shown}", 45, one)
    finally:
        alone.close()
    return taken


def _measure_budget(
    run: Run, path: Path, budget: int | None, tokens: int, speeds: Speeds, alone: Engine, expected: np.ndarray
) -> int:
    hybrid = Engine(load_model(path), device=run.kind, vram=budget, context=tokens + 16)
    try:
        run.missing += hybrid.notices
        got, _ = _decoded(hybrid, tokens)
        error = float(np.abs(got - expected).max() / (TOLERANCE * np.abs(expected).max()))
        pairs = [(_decoded(hybrid, tokens)[1], _decoded(alone, tokens)[1]) for _ in range(REPETITIONS - 1)]
        hybrid.trace()
        _decoded(hybrid, TRACED)
        report, stack = hybrid.report(), hybrid.stack
        hot = stack._hot.weight_bytes if stack._hot else 0
        # What each side has to read of its memory, both at once.
        limit = 1 / max(hot / speeds.device, (report.bytes_per_token - hot) / speeds.host)
        if not any(row.name.endswith("CPU alone") for row in run.rows):
            cpu = median(there for _, there in pairs)
            bytes_alone = alone.report().bytes_per_token
            run.add(Row("ours, CPU alone", cpu, "tok/s", cpu * bytes_alone / speeds.host, 1.0))
        speed, ratio = median(here for here, _ in pairs), median(here / there for here, there in pairs)
        name = f"ours, {report.memory.vram >> 20} MiB on {report.device}"
        name += f", {report.overlap:.0%} overlapped" if report.overlap is not None else ""
        run.add(Row(name, speed, "tok/s", speed / limit, ratio, error))
        return report.memory.vram
    finally:
        hybrid.close()


def _decoded(engine: Engine, tokens: int) -> tuple[np.ndarray, float]:
    """Logits after a prompt and of a few tokens that follow; tokens per second of those after."""
    engine.rewind(0)
    rows = [engine.prefill(PROMPT).copy(), *(engine.decode(token).copy() for token in PROMPT[:3])]
    started = time.perf_counter()
    for _ in range(tokens):
        engine.decode(5)
    return np.stack(rows), tokens / (time.perf_counter() - started)


def measure_peer(run: Run, path: Path | None, taken: Sequence[int], tokens: int, python: str) -> None:
    """llama.cpp with as many whole layers on the GPU as each of ``taken`` bytes hold."""
    if path is None:
        run.missing.append("llama.cpp's layer offload: it needs the dense model (--peer FILE)")
        return
    if not Worker.succeeds(python, "import llama_cpp; assert llama_cpp.llama_supports_gpu_offload()"):
        run.missing.append(f"llama.cpp's layer offload: {python} has no llama-cpp-python that uses the GPU")
        return
    model = load_model(path)
    layers, size = model.hyper.layers, path.stat().st_size
    model.close()
    for nbytes in taken:
        offloaded = min(layers + 1, int(nbytes * layers // size))
        name = f"llama.cpp, {min(layers, offloaded)} of {layers} layers in as much of the GPU's memory"
        run.attempt(name, 40, lambda n=name, o=offloaded: _measure_peer(run, n, path, o, tokens, python))  # type: ignore[misc]


def _measure_peer(run: Run, name: str, path: Path, offloaded: int, tokens: int, python: str) -> None:
    arguments = [str(path), "--threads", str(detect.cores()), "--context", str(tokens + 16)]
    try:
        with Worker(python, PEER, [*arguments, "--gpu-layers", str(offloaded)]) as worker:
            asked = {"test": "tg", "tokens": tokens, "depth": len(PROMPT)}
            seconds = [worker.ask(asked)["seconds"] for _ in range(REPETITIONS)]
    except WorkerError as error:
        raise RuntimeError(str(error)) from None
    cpu = next((row.speed for row in run.rows if row.name.endswith("CPU alone")), None)
    speed = tokens / median(seconds[1:])
    run.add(Row(name, speed, "tok/s", of_cpu=speed / cpu if cpu else None))
