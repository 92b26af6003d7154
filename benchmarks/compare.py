"""Our engine beside llama.cpp on the same model, machine and minute.

    python benchmarks/compare.py -m MODEL.gguf [--peer-python PYTHON] [--json FILE]
    python benchmarks/compare.py -m MODEL.gguf --ours SPLIT.powerinfer.gguf --mode gate-first
    python benchmarks/compare.py -m MODEL.gguf --depth 4096 -p 0

Each program keeps the model loaded in a process of its own; every repetition runs every test on every program
in turn, so that what slows the machine down for a while slows all of them. Reported are medians, and the
median of the ratios of neighbours. Without ``llama-cpp-python`` our own rows are measured alone, and the
table says so.
"""

import argparse
import datetime
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from comparison_table import print_table
from kernels_alone import measure_kernels
from worker_process import Worker, WorkerError

FOLDER = Path(__file__).resolve().parent
PEER = FOLDER / "worker_llama_cpp.py"
OURS = FOLDER / "worker_powerinfer.py"
#: Between runs: time for the other program's threads to fall asleep.
PAUSE_SECONDS = 0.05


@dataclass(frozen=True)
class Row:
    """One test with one thread count. Speeds in tokens per second, medians; ``ratio`` ours/peer.

    ``bandwidth_share``: bytes that our engine touched per second over the read probe of the same repetitions.
    ``low`` and ``high`` are the extremes of the ratio.
    """

    test: str
    threads: int
    ours: float
    peer: float | None
    ratio: float | None
    low: float | None
    high: float | None
    bandwidth_share: float | None
    bandwidth: float
    repetitions: int


def measure(
    ours: Worker,
    peer: Worker | None,
    threads: int,
    tests: list[tuple[str, int]],
    depth: int,
    repetitions: int,
) -> list[Row]:
    """Rows for one thread count, after one untimed round."""
    touched = float(ours.about["bytes_per_token"])
    workers = [ours] if peer is None else [ours, peer]
    speeds: dict[tuple[str, str, int], list[float]] = {}
    bandwidths: list[float] = []
    for repetition in range(repetitions + 1):
        bandwidth = ours.ask({"test": "bandwidth"})["bytes_per_second"]
        for kind, count in tests:
            # Who goes first alternates: the second finds the machine as the first left it.
            for worker in workers if repetition % 2 else reversed(workers):
                time.sleep(PAUSE_SECONDS)
                answer = worker.ask({"test": kind, "tokens": count, "depth": depth})
                seconds = answer["seconds"]
                touched = answer.get("bytes_per_token", touched)
                if repetition:
                    speeds.setdefault((worker.name, kind, count), []).append(count / seconds)
        if repetition:
            bandwidths.append(bandwidth)
    ours.about["bytes_per_token"] = touched
    return [
        _row((kind, count, depth), threads, speeds, bandwidths, touched, peer is not None)
        for kind, count in tests
    ]


def _row(
    test: tuple[str, int, int],
    threads: int,
    speeds: dict[tuple[str, str, int], list[float]],
    bandwidths: list[float],
    touched: float,
    has_peer: bool,
) -> Row:
    kind, count, depth = test
    mine = speeds["powerinfer", kind, count]
    theirs = speeds["llama.cpp", kind, count] if has_peer else []
    ratios = [a / b for a, b in zip(mine, theirs, strict=True)] if has_peer else []
    bandwidth = median(bandwidths)
    return Row(
        test=f"{kind}{count}" + (f"@d{depth}" if depth else ""),
        threads=threads,
        ours=median(mine),
        peer=median(theirs) if theirs else None,
        ratio=median(ratios) if ratios else None,
        low=min(ratios) if ratios else None,
        high=max(ratios) if ratios else None,
        # A prompt reads the weights once for many tokens: memory is not its limit, so a share would mislead.
        bandwidth_share=median(mine) * touched / bandwidth if kind == "tg" else None,
        bandwidth=bandwidth,
        repetitions=len(mine),
    )


def compare(options: argparse.Namespace, note: str | None) -> dict[str, Any]:
    """Everything that was measured, as plain JSON values. Raises WorkerError."""
    kernels = measure_kernels(options.threads, options.repetitions) if options.kernels else []
    tests = [(kind, count) for kind, count in (("pp", options.p), ("tg", options.n)) if count]
    context = str(options.depth + max(count for _, count in tests))
    rows: list[Row] = []
    about: dict[str, Any] = {}
    for threads in options.threads:
        settings = ["--threads", str(threads), "--context", context]
        arguments = [str(options.model), *settings]
        own = [str(options.ours or options.model), *settings]
        own += ["--mode", options.mode] if options.mode else []
        with Worker(sys.executable, OURS, own) as ours:
            about[ours.name] = ours.about
            if note is None:
                with Worker(options.peer_python, PEER, arguments) as peer:
                    about[peer.name] = peer.about
                    rows += measure(ours, peer, threads, tests, options.depth, options.repetitions)
            else:
                rows += measure(ours, None, threads, tests, options.depth, options.repetitions)
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": about["powerinfer"]["model"],
        "file": (options.ours or options.model).name,
        "file_bytes": (options.ours or options.model).stat().st_size,
        "peer_file": options.model.name,
        "mode": options.mode,
        "kernels": [asdict(row) for row in kernels],
        "bytes_per_token": about["powerinfer"]["bytes_per_token"],
        "programs": about,
        "note": note,
        "rows": [asdict(row) for row in rows],
    }


def _peer_note(python: str) -> str | None:
    """Why the peer cannot be measured, or None."""
    code = "import llama_cpp"
    if Worker.succeeds(python, code):
        return None
    return (
        "llama.cpp is not measured: this Python has no llama-cpp-python "
        "(pip install llama-cpp-python compiles it from source; or name a Python that has it: --peer-python)"
    )


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("-m", "--model", type=Path, required=True, help="a GGUF file that both programs read")
    parser.add_argument("--ours", type=Path, help="a file that ours reads instead: the same model, split")
    parser.add_argument("--mode", choices=("dense", "gate-first", "predicted"), help="mode of our engine")
    parser.add_argument("--depth", type=int, default=0, help="tokens in the context before each test")
    parser.add_argument("--kernels", action="store_true", help="measure the memory and single kernels first")
    parser.add_argument("-p", type=int, default=512, help="prompt tokens; 0 leaves the test out")
    parser.add_argument("-n", type=int, default=128, help="generated tokens; 0 leaves the test out")
    parser.add_argument("-r", "--repetitions", type=int, default=7)
    parser.add_argument("-t", "--threads", type=_thread_counts, default=_default_threads(), help="e.g. 1,2")
    parser.add_argument("--peer-python", default=sys.executable, help="a Python that has llama-cpp-python")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    options = parser.parse_args(arguments)
    for path in (options.model, options.ours):
        if path is not None and not path.is_file():
            parser.error(f"{path} is no file")
    counts = (options.p, options.n, options.depth)
    if min(counts) < 0 or not (options.p or options.n) or options.repetitions < 1:
        parser.error("-p, -n and --depth must not be negative, -p and -n not both 0, and -r at least 1")
    return options


def _thread_counts(text: str) -> list[int]:
    counts = [int(part) for part in text.split(",")]
    if min(counts) < 1:
        raise ValueError(text)
    return counts


def _default_threads() -> list[int]:
    cores = len(os.sched_getaffinity(0))
    return [1, 2] if cores >= 2 else [1]


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = _options(arguments)
    note = _peer_note(options.peer_python)
    try:
        result = compare(options, note)
    except WorkerError as error:
        print(error, file=sys.stderr)
        return 1
    print_table(result)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
