"""How fast the stages are that pass over a whole model or a corpus, on this machine.

    python benchmarks/stages.py prepare          write the synthetic models (about 4 GB), once
    python benchmarks/stages.py convert          MB of the source a second, processor time, private memory
    python benchmarks/stages.py profile          share of the speed of prompts, in every way of counting

The source is read before convert is timed, so that it is in the page cache; the file is written, synced and
renamed as for a user.
"""

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from comparison_table import print_lines

from powerinfer_tools.engine import Engine
from powerinfer_tools.measure.synthetic.cache import Request, cached, default_cache
from powerinfer_tools.model.loading import Model, load_model
from powerinfer_tools.stages.convert.conversion import ConvertOptions, convert
from powerinfer_tools.stages.profile.tally import Tally

CONVERTED = Request("mistral-7b", "Q4_0", 8)
#: What a profile counts, and a model that is counted so.
COUNTED: dict[str, Request | Path] = {
    "sizes, demo model": Path("models/SmolLM2-135M-Instruct.Q4_1.gguf"),
    "sizes, gated, wide": Request("mistral-7b", "Q4_0", 2),
    "zeros, gated": Request("sparselm-2b", "Q4_0", 6),
    "zeros, without gate": Request("opt-1.3b", "Q4_0", 6),
    "experts": Request("smallthinker-4b-a0.6b", "Q4_0", 6),
}
_CORPUS = Path("powerinfer_tools/data/corpus/us-declaration-of-independence.txt")
_WINDOW, _ROUNDS = 512, 3


def _file(source: Request | Path) -> Path:
    return source if isinstance(source, Path) else cached(source, default_cache())[0]


def prepare() -> None:
    """Write the models, and a profile and a plan of the one that is converted."""
    for source in (CONVERTED, *COUNTED.values()):
        print(_file(source), flush=True)
    model, hardware = _file(CONVERTED), default_cache() / "bench-hardware.toml"
    stages = [["profile", "-m", str(model), "--corpus", str(_CORPUS), "--tokens", "64"]]
    if not hardware.is_file():
        stages.append(["doctor", "--measure", "-o", str(hardware)])
    stages.append(["plan", "-m", str(model), "--hardware", str(hardware)])
    for stage in stages:
        subprocess.run([sys.executable, "-m", "powerinfer_cli", *stage], check=True)


def measure_convert() -> None:
    """Three conversions in turn."""
    model = _file(CONVERTED)
    stem = model.name.removesuffix(".gguf")
    profile, plan = (model.with_name(f"{stem}.{end}") for end in ("profile.safetensors", "plan.json"))
    size = model.stat().st_size
    with model.open("rb") as source:
        while source.read(1 << 24):
            pass
    with tempfile.TemporaryDirectory(dir=model.parent) as folder:
        output = Path(folder) / "out.powerinfer.gguf"
        for _ in range(3):
            with _PrivateMemory() as memory:
                started, before = time.perf_counter(), os.times()
                report = convert(ConvertOptions(model, profile, plan, output))
                wall, after = time.perf_counter() - started, os.times()
            user, system = after.user - before.user, after.system - before.system
            print(
                f"convert: {size / wall / 1e6:.0f} MB/s of {size / 1e6:.0f} MB into "
                f"{report.nbytes / 1e6:.0f} MB ({report.down_type} down rows), {wall:.2f} s, processor "
                f"{user:.2f} + {system:.2f} s, at most {memory.largest >> 20} MiB private beyond the start",
                flush=True,
            )


class _PrivateMemory:
    """Watches how much private memory the process gets."""

    def __enter__(self) -> "_PrivateMemory":
        self._start, self.largest, self._end = _private(), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(0.02):
            self.largest = max(self.largest, _private() - self._start)


def _private() -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon:")).split()[1]) << 10


def measure_profile() -> None:
    """Passes with and without counters in turn; medians of neighbours' ratios, and the extremes."""
    lines = []
    for name, source in COUNTED.items():
        model = load_model(_file(source))
        ratios = list(_ratios(model))
        model.close()
        lines.append((name, f"{median(ratios):.3f}", f"{min(ratios):.3f} to {max(ratios):.3f}", "0.9"))
        print_lines(lines[-1:])
        sys.stdout.flush()


def _ratios(model: Model) -> Iterator[float]:
    tally = Tally(model, 1)
    kinds = (None, tally.observed)
    engines = [
        Engine(model, context=_WINDOW, batch=_WINDOW, mode="dense", observed=observed) for observed in kinds
    ]
    tokens = [(index * 7919 + 1) % engines[0].vocabulary for index in range(_WINDOW)]
    try:
        for number in range(_ROUNDS + 1):
            seconds = []
            for engine in engines if number % 2 else engines[::-1]:
                started = time.perf_counter()
                engine.absorb(tokens)
                if engine is engines[1]:
                    tally.close_window(0, len(tokens))
                seconds.append(time.perf_counter() - started)
            plain, counted = seconds if number % 2 else seconds[::-1]
            if number:
                yield plain / counted
    finally:
        for engine in engines:
            engine.close()


def main() -> int:
    """The command line; returns the exit code."""
    pieces = {"prepare": prepare, "convert": measure_convert, "profile": measure_profile}
    if not sys.argv[1:] or set(sys.argv[1:]) - set(pieces):
        print(__doc__, file=sys.stderr)
        return 2
    for piece in sys.argv[1:]:
        pieces[piece]()
    return 0


if __name__ == "__main__":
    sys.exit(main())
