"""Our CPU engine beside the original PowerInfer's program, on the files that ``convert`` writes for it.

    python benchmarks/original.py --main POWERINFER/build/bin/main [-m MODEL.relu.gguf] [--json FILE]

The original (SJTU-IPADS/PowerInfer, or Tiiny-AI/PowerInfer) is built for the CPU in a folder of its own:

    cmake -S POWERINFER -B POWERINFER/build -DCMAKE_BUILD_TYPE=Release -DLLAMA_BUILD_SERVER=OFF
    cmake --build POWERINFER/build --target main

Random models of its four families, and those named by ``-m``, are written with F16 and with Q4_0 FFNs, all
neurons to be computed. Both programs continue the same prompt greedily, in turn, and the table says how far
the texts agree and how fast ours decodes beside the other (median of the ratios of neighbouring runs, and
their range). Random models are too small for their speed to mean anything but overhead.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from comparison_table import print_lines

from powerinfer_formats.errors import FormatError
from powerinfer_tools.errors import PowerInferError
from powerinfer_tools.measure.synthetic.models import write_synthetic
from powerinfer_tools.measure.synthetic.shapes import Shape
from powerinfer_tools.model.loading import load_model
from powerinfer_tools.stages.original.export import ExportOptions, export
from powerinfer_tools.text import Tokenizer

#: One model of each family that the original knows, in sizes that it takes.
SHAPES = {
    "llama": Shape("llama", 3, 128, 4, 2, 32, 1056, 512, 1e4, 512, activation="relu"),
    "bamboo": Shape("bamboo", 3, 128, 4, 2, 32, 1056, 512, 1e4, 512),
    "falcon": Shape("falcon", 3, 128, 4, 1, 32, 1056, 512, 1e4, 512, activation="relu"),
    "opt": Shape("opt", 3, 128, 4, 4, 32, 1056, 512, 1e4, 2048, tied=True, biases="all"),
}
QUANTS = ("F16", "Q4_0")
PROMPT = "The river was wide and slow"
_RATE = re.compile(r"^llama_print_timings: +eval time = .*?([0-9.]+) tokens per second", re.MULTILINE)
_LONGEST = 600.0
HEADINGS = ("model", "FFN", "same tokens", "ours tok/s", "original's", "ratio", "(range)")


class OriginalFailed(Exception):
    """The original ended without a text; the message is the last that it said."""


@dataclass(frozen=True)
class Row:
    """One model. ``same`` of ``tokens`` generated agree before the first difference; speeds are tokens per
    second, medians; ``low`` and ``high`` the extremes of the ratio. ``failure``: what the original said."""

    model: str
    quant: str
    tokens: int = 0
    same: int = 0
    ours: float = 0.0
    original: float = 0.0
    ratio: float = 0.0
    low: float = 0.0
    high: float = 0.0
    failure: str | None = None

    def cells(self) -> tuple[str, ...]:
        """The row of the table."""
        if self.failure is not None:
            return (self.model, self.quant, f"failed: {self.failure}", "-", "-", "-", "-")
        agreement = "all" if self.same == self.tokens else f"{self.same}"
        return (
            self.model,
            self.quant,
            f"{agreement} of {self.tokens}",
            f"{self.ours:.1f}",
            f"{self.original:.1f}",
            f"{self.ratio:.2f}",
            f"{self.low:.2f} to {self.high:.2f}",
        )


@dataclass(frozen=True)
class Task:
    """What both programs are asked."""

    main: Path
    prompt: str
    tokens: int
    threads: int

    def words(self, path: Path) -> list[str]:
        """The options that both know."""
        return [
            *("-m", str(path), "-n", str(self.tokens), "-c", "256", "-t", str(self.threads)),
            *("--temp", "0", "--repeat-penalty", "1"),
        ]

    def original(self, path: Path) -> tuple[str, float]:
        """Its text after the prompt, and its tokens per second. Raises OriginalFailed."""
        # It does not put the space before a SentencePiece text that these vocabularies are made for.
        prompt = f" {self.prompt}" if _is_sentencepiece(path) else self.prompt
        ended = subprocess.run(
            [str(self.main), *self.words(path), "-p", prompt, "--log-disable"],
            capture_output=True,
            cwd=path.parent,
            timeout=_LONGEST,
            check=False,
        )
        out, said = (stream.decode(errors="replace") for stream in (ended.stdout, ended.stderr))
        rate = _RATE.search(said)
        if ended.returncode or rate is None:
            last = [line for line in said.splitlines() if line.strip()][-1:]
            raise OriginalFailed(f"{last[0] if last else 'no word'} (exit code {ended.returncode})")
        return after_prompt(out, self.prompt), float(rate.group(1))

    def ours(self, path: Path) -> tuple[list[int], float]:
        """The tokens of our text, and ours per second. Raises CalledProcessError."""
        words = ["run", *self.words(path), "-p", self.prompt, "--json"]
        command = [sys.executable, "-m", "powerinfer_cli", *words]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=_LONGEST, check=True)
        figures = json.loads(ended.stdout)
        return list(figures["ids"]), float(figures["decode_tokens_per_second"])


def _is_sentencepiece(path: Path) -> bool:
    model = load_model(path)
    try:
        return bool(model.source.get("tokenizer.ggml.model", str) == "llama")
    finally:
        model.close()


def after_prompt(text: str, prompt: str) -> str:
    """What follows the prompt, which the original repeats, with its spaces as the vocabulary has them. Raises
    OriginalFailed where it does not."""
    first = text.replace("▁", " ").find(prompt)
    if first < 0:
        raise OriginalFailed(f"its text does not begin with the prompt: {text[:60]!r}")
    return text[first + len(prompt) :]


def same_tokens(path: Path, ids: list[int], text: str) -> int:
    """How many of our tokens ``ids`` the original's ``text`` begins with."""
    model = load_model(path)
    try:
        decoder = Tokenizer.from_gguf(model.source).stream()
        ours = ""
        for count, token in enumerate(ids):
            ours += decoder.push(token)
            if not text.startswith(ours):
                return count
        return len(ids)
    finally:
        model.close()


def measure(name: str, quant: str, path: Path, task: Task, repetitions: int) -> Row:
    """One row; both programs in turn, and who goes first alternates."""
    pairs: list[tuple[float, float]] = []
    ids: list[int] = []
    text = ""
    try:
        for repetition in range(repetitions):
            if repetition % 2:
                text, theirs = task.original(path)
                ids, mine = task.ours(path)
            else:
                ids, mine = task.ours(path)
                text, theirs = task.original(path)
            pairs.append((mine, theirs))
    except OriginalFailed as failure:
        return Row(name, quant, failure=str(failure))
    ratios = [mine / theirs for mine, theirs in pairs]
    return Row(
        model=name,
        quant=quant,
        tokens=len(ids),
        same=same_tokens(path, ids, text),
        ours=median(mine for mine, _ in pairs),
        original=median(theirs for _, theirs in pairs),
        ratio=median(ratios),
        low=min(ratios),
        high=max(ratios),
    )


def exported(folder: Path, models: list[Path], families: list[str]) -> list[tuple[str, str, Path]]:
    """Name, type and file of every model for the original. Raises PowerInferError."""
    sources = []
    for family in families:
        path = folder / f"random-{family}.gguf"
        write_synthetic(path, f"random {family}", SHAPES[family], "F16", seed=3)
        sources.append((f"random {family}", path))
    sources += [(path.stem, path) for path in models]
    made = []
    for name, source in sources:
        for quant in QUANTS:
            output = folder / f"{source.stem}.{quant}.original.powerinfer.gguf"
            export(ExportOptions(source, output, quant=quant))
            made.append((name, quant, output))
    return made


def arguments(words: list[str] | None) -> argparse.Namespace:
    """The command line."""
    verbatim = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=verbatim)
    add = parser.add_argument
    add("--main", type=Path, required=True, help="the original's program, build/bin/main")
    add("-m", "--model", type=Path, action="append", default=[], help="a source model with ReLU")
    add("--families", nargs="*", choices=SHAPES, default=list(SHAPES), help="random models")
    add("--prompt", default=PROMPT)
    add("-n", type=int, default=24, help="tokens to generate")
    add("-r", type=int, default=3, help="repetitions")
    add("-t", type=int, default=1, help="threads of each program")
    add("--json", type=Path, help="write the rows to this file, too")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    """Measure and print; 1 where our side failed."""
    options = arguments(words)
    task = Task(options.main.resolve(), options.prompt, options.n, options.t)
    if not task.main.is_file():
        print(f"{task.main}: no such program; --help says how it is built", file=sys.stderr)
        return 1
    rows = []
    try:
        with tempfile.TemporaryDirectory(prefix="powerinfer-original-") as folder:
            for name, quant, path in exported(Path(folder), options.model, options.families):
                rows.append(measure(name, quant, path, task, options.r))
                print(f"  {' '.join(rows[-1].cells())}", file=sys.stderr, flush=True)
    except (PowerInferError, FormatError) as error:
        print(error, file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        print(f"powerinfer failed: {error.stderr.strip()}", file=sys.stderr)
        return 1
    print_lines([HEADINGS, *(row.cells() for row in rows)])
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
