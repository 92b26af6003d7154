"""A long chat, and whether its memory stays flat.

    python benchmarks/soak.py -m MODEL.gguf --seconds 3600 [--json FILE]

`powerinfer run -i` answers questions, regenerates, takes back, forgets and runs over its context, again and
again. Anonymous memory (what is not a mapped file) is read after every exchange. The first quarter fills
caches and is left out; after it the mean of the last quarter may exceed that of the second by 1 % and 2 MiB:
the exit code says whether it does.
"""

import argparse
import json
import random
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

WORDS = (
    "why", "is", "the", "sky", "blue", "and", "what", "does", "a", "river", "say", "of", "naïve", "café",
    "größer", "数学", "🙂", "<|im_end|>", "\t", "\\x1b[2J", "1234567890", "{{", "tell", "me", "of",
)  # fmt: skip
MARK = "soak-mark"
#: What may be added between the second and the last quarter: a share, and bytes.
GROWTH, MARGIN = 0.01, 2 << 20


@dataclass(frozen=True)
class Sample:
    """After so many seconds, so many bytes."""

    seconds: float
    nbytes: int


def anonymous_bytes(process: int) -> int:
    """Memory of a process that is not mapped from files."""
    text = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="ascii")
    found = re.search(r"^Anonymous:\s+(\d+) kB$", text, re.MULTILINE)
    assert found is not None, text
    return int(found[1]) * 1024


def line(rng: random.Random) -> str:
    """A question, mostly; else a command of the chat."""
    draw = rng.random()
    if draw < 0.08:
        return "/regen"
    if draw < 0.14:
        return "/undo"
    if draw < 0.17:
        return "/reset"
    if draw < 0.2:
        return "/system " + " ".join(rng.choices(WORDS, k=6))
    return " ".join(rng.choices(WORDS, k=rng.choice((1, 5, 20, 80))))


def wait_for_mark(stream: IO[str], last: list[str]) -> None:
    """Read standard error until the mark of the last line. Raises SystemExit where the chat has ended."""
    for said in stream:
        if said.startswith("system prompt:") and MARK in said:
            return
        last[:] = [*last[-20:], said]
    sys.exit("the chat ended:\n" + "".join(last))


def soak(command: list[str], seconds: float, seed: int) -> list[Sample]:
    """Chat for so long; memory after every exchange."""
    rng, samples, last = random.Random(seed), [], list[str]()  # noqa: S311
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stderr is not None
    began = time.monotonic()
    try:
        while time.monotonic() - began < seconds:
            process.stdin.write(f"{line(rng)}\n/system {MARK} {rng.random()}\n")
            process.stdin.flush()
            wait_for_mark(process.stderr, last)
            samples.append(Sample(time.monotonic() - began, anonymous_bytes(process.pid)))
            if len(samples) % 100 == 1:
                print(f"{len(samples):>6} {samples[-1].nbytes / 2**20:8.1f} MiB", file=sys.stderr, flush=True)
        process.stdin.close()
        for _ in process.stderr:
            pass
        if process.wait(timeout=60) != 0:
            sys.exit(f"the chat ended with {process.returncode}")
    finally:
        process.kill()
        process.wait()
    return samples


def quarters(samples: list[Sample]) -> list[float]:
    """Mean bytes of each quarter of the time."""
    end = samples[-1].seconds
    parts: list[list[int]] = [[], [], [], []]
    for sample in samples:
        parts[min(3, int(4 * sample.seconds / end))].append(sample.nbytes)
    return [statistics.fmean(part or [0]) for part in parts]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    words = ("run", "-i", "-q", "-m", options.model, "-c", "512", "-n", "48", "--seed", "1")
    samples = soak([sys.executable, "-P", "-m", "powerinfer_cli", *words], options.seconds, options.seed)
    means = quarters(samples)
    flat = means[3] <= means[1] * (1 + GROWTH) + MARGIN
    document = {
        "exchanges": len(samples),
        "seconds": samples[-1].seconds,
        "quarter_means": means,
        "largest": max(sample.nbytes for sample in samples),
        "flat": flat,
    }
    if options.json:
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    shown = ", ".join(f"{mean / 2**20:.1f}" for mean in means)
    print(f"{len(samples)} exchanges in {samples[-1].seconds:.0f} s; anonymous MiB by quarter: {shown}")
    sys.exit(0 if flat else "memory is not flat")


if __name__ == "__main__":
    main()
