"""What sparsity, split files and drafts earn on this machine, as ratios of interleaved runs.

    python benchmarks/whole_table.py                         every piece that needs nothing but the demo model
    python benchmarks/whole_table.py ffn token --isa avx2,avx512
    python benchmarks/whole_table.py peer --llama-bench PATH

A piece takes under 100 s for each instruction set, once its models are written. Both sides of a ratio run in
turn; printed are the median of the neighbours' ratios, the extremes, and what the project wants to reach.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
from comparison_table import print_lines

from powerinfer_kernels import Pool, RowType, available_isas
from powerinfer_tools.engine import Engine
from powerinfer_tools.engine.drafting import TextLookup
from powerinfer_tools.measure.bench_comparison import compare
from powerinfer_tools.measure.ffn_speedup import bench_ffn
from powerinfer_tools.measure.synthetic.cache import Request, cached, default_cache
from powerinfer_tools.measure.synthetic.sparse import Sparsity
from powerinfer_tools.model import reference
from powerinfer_tools.model.counting import HEAD_ROWS
from powerinfer_tools.model.loading import Model, load_model
from powerinfer_tools.quality.perplexity import divergence, windows
from powerinfer_tools.text.tokenizer import Tokenizer

DEMO = Path("models/SmolLM2-135M-Instruct.Q4_1.gguf")
RELU_SPLIT = DEMO.with_name(f"{DEMO.stem}.relu.powerinfer.gguf")
CORPUS = Path("powerinfer_tools/data/corpus/us-declaration-of-independence.txt")
EXACTNESS_TEXTS = (CORPUS, CORPUS.with_name("newton-opticks-queries.txt"))
_EXACTNESS_WINDOWS = 8
_ROUNDS = 3
#: Instruction sets that a table is made for.
_TABLE_ISAS = ("avx512", "avx2", "neon")


@dataclass(frozen=True)
class Line:
    """One ratio: ``wanted`` as text, since some are ranges; ``ratios`` of neighbouring runs."""

    what: str
    wanted: str
    ratio: float
    low: float
    high: float


@dataclass(frozen=True)
class Settings:
    """What the pieces share."""

    threads: int
    llama_bench: str | None
    rounds: int


@dataclass(frozen=True)
class _Exact:
    """The float64 reference as what gives logits of a window; ``rounded``: with activations and cache rounded
    as the engine rounds them."""

    model: Model
    rounded: bool = False

    @property
    def vocabulary(self) -> int:
        return self.model.hyper.vocabulary

    def score(self, tokens: Sequence[int], first: int = 0) -> Iterator[npt.NDArray[np.float32]]:
        logits = reference.forward(self.model, list(tokens), half_cache=self.rounded, rounded=self.rounded)
        for row in range(first, len(logits), HEAD_ROWS):  # as many at a time as the engine gives
            yield logits[row : row + HEAD_ROWS].astype(np.float32)


def exactness(settings: Settings) -> Iterator[Line]:
    """Perplexity of the demo model by the float64 reference over that by the engine: with activations rounded
    alike, so that float32 and the order of sums are what differs, and without rounding."""
    model = load_model(DEMO)
    text = "\n\n".join(path.read_text(encoding="utf-8") for path in EXACTNESS_TEXTS)
    tokens = Tokenizer.from_gguf(model.source).encode(text)[: 256 * _EXACTNESS_WINDOWS]
    pieces = windows(tokens, 256, None, None)
    with Engine(model, threads=settings.threads, context=256) as engine:
        for name, rounded, wanted in (("rounded alike", True, "0.9995"), ("nothing rounded", False, "")):
            judged = divergence(engine, _Exact(model, rounded), pieces)
            error = judged.ratio_error / judged.ratio**2
            what = (
                f"float64, {name}: perplexity {judged.base_perplexity:.3f}, engine {judged.perplexity:.3f}, "
                f"{judged.positions:,} tokens, ± {error:.2%}, KL {judged.mean_kl:.1e}"
            )
            yield Line(what, wanted, 1 / judged.ratio, 1 / judged.ratio - error, 1 / judged.ratio + error)
    model.close()


def _line(what: str, wanted: str, ratios: Sequence[float]) -> Line:
    return Line(what, wanted, median(ratios), min(ratios), max(ratios))


def ffn(settings: Settings) -> Iterator[Line]:
    """One FFN of 4096 × 14336 in Q4_0 by density, against the best dense FFN."""
    wanted = {
        ("predicted", 0.1): "7.5",
        ("predicted", 0.3): "2.7",
        ("predicted", 0.5): "1.7",
        ("gate-first", 0.1): "2.3",
        ("gate-first", 0.3): "1.7",
    }
    with Pool(settings.threads) as pool:
        for row in bench_ffn(pool, 4096, 14336, RowType.Q4_0, (0.1, 0.3, 0.5), seconds=20.0):
            target = wanted.get((row.mode, row.density), "")
            name = f"FFN {row.mode} {row.density:g} ({row.gbps:.1f} GB/s)"
            yield Line(name, target, row.speedup, row.low, row.high)


def token(settings: Settings) -> Iterator[Line]:
    """Whole tokens of 8 layers of mistral-7b, a tenth of whose neurons fire, against its dense form."""
    dense, sparse = _synthetic("mistral-7b", "Q4_0", 8), _synthetic("mistral-7b", "Q4_0", 8, 0.1)
    contenders = [(dense, None), (sparse, "gate-first"), (sparse, "predicted")]
    yield from _compared(settings, contenders, {"gate-first": "1.7", "predicted": "2.2"}, 0, 24)


def split(settings: Settings) -> Iterator[Line]:
    """Split files of models without ReLU in dense mode, against their sources."""
    sources = [DEMO, _synthetic("gemma-3-1b", "Q4_K_M", 8), _synthetic("qwen2.5-0.5b", "Q4_K_M", 12)]
    with tempfile.TemporaryDirectory(prefix="powerinfer-bench-") as folder:
        for source in sources:
            file = _converted(source, Path(folder))
            yield from _compared(settings, [(source, None), (file, "dense")], {"dense": "0.98"}, 32, 48)


def relu(settings: Settings) -> Iterator[Line]:
    """The relufied demo model in every mode against the original."""
    if not RELU_SPLIT.is_file():
        print(f"relu: not measured: {RELU_SPLIT} is not there (make relu-demo)", file=sys.stderr)
        return
    modes = ("dense", "gate-first", "predicted")
    wanted = {"gate-first": "1.25", "predicted": "1.3"}
    yield from _compared(settings, [(DEMO, None), *((RELU_SPLIT, mode) for mode in modes)], wanted, 64, 96)


def experts(settings: Settings) -> Iterator[Line]:
    """A mixture of 128 experts, 4 of its layers, against llama.cpp."""
    model = _synthetic("qwen3-30b-a3b", "Q4_0", 4)
    yield from _against_peer(settings, model, {"tg": "1.5", "pp": "2"}, 64, 32)


def zeros(settings: Settings) -> Iterator[Line]:
    """Experts of which two neurons in five fire, gate-first against whole: the experts alone, and whole
    tokens."""
    for shape, layers in (("smallthinker-4b-a0.6b", 8), ("turbosparse-mixtral-47b", 1)):
        path = _synthetic(shape, "Q4_0", layers, 0.4)
        engines = [
            Engine(load_model(str(path)), threads=settings.threads, context=256, mode=mode)
            for mode in ("dense", "gate-first")
        ]
        ratios: dict[str, list[float]] = {"experts": [], "prompt of 64, experts": [], "whole token": []}
        try:
            for _ in range(settings.rounds + 1):
                prompts, parts, tokens = zip(*(_expert_seconds(engine) for engine in engines), strict=True)
                for name, (whole, picked) in zip(ratios, (parts, prompts, tokens), strict=True):
                    ratios[name].append(whole / picked)
        finally:
            for engine in engines:
                engine.close()
        for name, values in ratios.items():
            yield _line(f"{path.stem} gate-first/dense {name}", "1.25" * (name == "experts"), values[1:])


def _expert_seconds(engine: Engine) -> tuple[float, float, float]:
    """Seconds in experts of a prompt of 64 tokens, and of 24 decoded ones, and those of the latter in all."""
    tokens = [(index * 7919 + 1) % engine.vocabulary for index in range(88)]
    engine.rewind(0)
    before = engine.report()
    engine.prefill(tokens[:64])
    between = engine.report()
    for one in tokens[64:]:
        engine.decode(one)
    after = engine.report()
    prompt, decoded = (b.timings["ffn"] - a.timings["ffn"] for a, b in ((before, between), (between, after)))
    return prompt, decoded, after.decode_seconds - between.decode_seconds


def peer(settings: Settings) -> Iterator[Line]:
    """Dense models against llama.cpp."""
    yield from _against_peer(settings, DEMO, {"tg": "3", "pp": "4"}, 128, 64)
    qwen = _synthetic("qwen2.5-0.5b", "Q4_K_M", None)
    yield from _against_peer(settings, qwen, {"tg": "2.2", "pp": "3"}, 128, 32)


def peer_large(settings: Settings) -> Iterator[Line]:
    """8 layers of a large dense model against llama.cpp."""
    mistral = _synthetic("mistral-7b", "Q4_0", 8)
    yield from _against_peer(settings, mistral, {"tg": "1.6", "pp": "2.2"}, 32, 16)


def long(settings: Settings) -> Iterator[Line]:
    """A long prompt, and decoding behind a long context, against llama.cpp; one run of each."""
    once = Settings(settings.threads, settings.llama_bench, 1)
    yield from _against_peer(once, DEMO, {"pp": "2"}, 4096, 0)


def worst(settings: Settings) -> Iterator[Line]:
    """Looked-up drafts where guesses are wrong, in turn with plain decoding in one process."""
    model = load_model(DEMO)
    prose = Tokenizer.from_gguf(model.source).encode(EXACTNESS_TEXTS[1].read_text(encoding="utf-8")[:60000])
    random = np.random.default_rng(1)
    rounds, length = 20, 32 + 64
    texts = {
        "random tokens": random.integers(1000, 40000, (rounds, length)).tolist(),
        "pairs repeat, and go on otherwise": random.integers(1000, 1006, (rounds, length)).tolist(),
        "prose of others": [prose[index * 300 : index * 300 + length] for index in range(rounds)],
    }
    plain, drafting = (Engine(model, threads=settings.threads, context=length) for _ in range(2))
    drafting.draft_with(TextLookup())
    for name, rows in texts.items():
        yield _line(f"draft ngram, {name}", "0.97", [_in_turn(plain, drafting, tokens) for tokens in rows])
    plain.close()
    drafting.close()
    model.close()


def _in_turn(first: Engine, second: Engine, tokens: list[int]) -> float:
    """How much longer ``first`` takes for all but 32 of ``tokens``, four at a time in turn with the other."""
    seconds = {first: 0.0, second: 0.0}
    for engine in seconds:
        engine.rewind(0)
        engine.prefill(tokens[:32])
    for number, start in enumerate(range(32, len(tokens), 4)):
        for engine in (first, second) if number % 2 else (second, first):
            started = time.perf_counter()
            for token in tokens[start : start + 4]:
                engine.decode(token)
            seconds[engine] += time.perf_counter() - started
    return seconds[first] / seconds[second]


def drafts(settings: Settings) -> Iterator[Line]:
    """Looked-up drafts: a text that repeats its prompt, and one that repeats nothing."""
    passage = (
        "The frost was on the window when Anna woke. She put on her boots, fed the three hens, and "
        "walked down to the mill where her brother was already loading sacks of rye onto the cart."
    )
    again = f"Repeat this text word for word, nothing else:\n\n{passage}"
    animals = "Write a list of twenty different animals, each with one short remark."
    greedy, noise = ("--temp", "0", "-n", "64"), ("--temp", "3", "--seed", "1", "-n", "192")
    texts = (
        ("repeats its prompt", again, greedy, "1.6"),
        ("a list, which repeats itself", animals, greedy, "0.97"),
        ("repeats nothing: sampled at temperature 3", animals, noise, "0.97"),
    )
    for name, prompt, options, wanted in texts:
        ratios = []
        for _ in range(settings.rounds):
            plain = _decode_speed(settings, prompt, *options)
            ratios.append(_decode_speed(settings, prompt, *options, "--draft", "ngram") / plain)
        yield _line(f"draft ngram, {name}", wanted, ratios)


PIECES: dict[str, Callable[[Settings], Iterator[Line]]] = {
    "ffn": ffn,
    "token": token,
    "split": split,
    "relu": relu,
    "zeros": zeros,
    "drafts": drafts,
    "worst": worst,
    "peer": peer,
    "peer-large": peer_large,
    "experts": experts,
    "long": long,
    "exactness": exactness,
}


def _synthetic(shape: str, row_type: str, layers: int | None, density: float | None = None) -> Path:
    sparsity = None if density is None else Sparsity(density, 0.0)
    return cached(Request(shape, row_type, layers, sparsity), default_cache())[0]


def _converted(source: Path, folder: Path) -> Path:
    """A split file of ``source``, planned for a machine without accelerator."""
    model = folder / source.name
    model.symlink_to(source.resolve())
    plan, out = folder / f"{source.stem}.plan.json", folder / f"{source.stem}.powerinfer.gguf"
    _cli("profile", "-m", str(model), "--corpus", str(CORPUS), "--tokens", "512")
    _cli("plan", "-m", str(model), "--hardware", str(_hardware()), "-o", str(plan))
    _cli("convert", "-m", str(model), "--plan", str(plan), "-o", str(out), "--anyway")
    return out


def _hardware() -> Path:
    path = default_cache() / "bench-hardware.toml"
    if not path.is_file():
        _cli("doctor", "--measure", "-o", str(path))
    return path


def _cli(*arguments: str) -> str:
    command = [sys.executable, "-m", "powerinfer_cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"powerinfer {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def _decode_speed(settings: Settings, prompt: str, *options: str) -> float:
    command = ["run", "-m", str(DEMO), "-p", prompt, "--json"]
    answer = json.loads(_cli(*command, "-t", str(settings.threads), *options))
    return float(answer["decode_tokens_per_second"])


def _compared(
    settings: Settings,
    contenders: Sequence[tuple[Path, str | None]],
    wanted: dict[str, str],
    prompt: int,
    generate: int,
) -> Iterator[Line]:
    """Every contender against the first, by mode."""
    engines: list[tuple[str, Engine]] = []
    try:
        for path, mode in contenders:
            context = max(prompt, generate)
            engine = Engine(load_model(str(path)), threads=settings.threads, context=context, mode=mode)
            engines.append((mode or "source", engine))
        rows = compare(engines, prompt=prompt, generate=generate, rounds=settings.rounds)
    finally:
        for _, engine in engines:
            engine.close()
    for row in rows:
        if row.name != "source":
            name = f"{contenders[0][0].stem} {row.name}/dense {row.test}"
            target = wanted.get(row.name, "") if row.test.startswith("tg") else ""
            yield Line(name, target, row.ratio, row.least_ratio, row.largest_ratio)


def _against_peer(
    settings: Settings, model: Path, wanted: dict[str, str], prompt: int, generate: int
) -> Iterator[Line]:
    if settings.llama_bench is None:
        print(f"{model.name}: no llama-bench to compare with (--llama-bench PATH)", file=sys.stderr)
        return
    context = max(prompt, generate)
    engine = Engine(load_model(str(model)), threads=settings.threads, context=context)
    tokens = [(index * 7919 + 1) % engine.vocabulary for index in range(context)]
    ratios: dict[str, list[float]] = {}
    for number in range(settings.rounds + 1):
        ours = _our_speeds(engine, tokens, prompt, generate)
        theirs = _peer_speeds(settings, model, prompt, generate)
        for test in theirs if number or settings.rounds == 1 else ():
            ratios.setdefault(test, []).append(ours[test] / theirs[test])
    engine.close()
    for test, values in ratios.items():
        yield _line(f"{model.stem} {test}", wanted.get(test[:2], ""), values)


def _our_speeds(engine: Engine, tokens: list[int], prompt: int, generate: int) -> dict[str, float]:
    speeds = {}
    if prompt:
        engine.rewind(0)
        started = time.perf_counter()
        engine.prefill(tokens[:prompt])
        speeds[f"pp{prompt}"] = prompt / (time.perf_counter() - started)
    if generate:
        engine.rewind(0)
        started = time.perf_counter()
        for one in tokens[:generate]:
            engine.decode(one)
        speeds[f"tg{generate}"] = generate / (time.perf_counter() - started)
    return speeds


def _peer_speeds(settings: Settings, model: Path, prompt: int, generate: int) -> dict[str, float]:
    assert settings.llama_bench is not None
    sizes = ["-p", str(prompt), "-n", str(generate), "-r", "1", "-t", str(settings.threads)]
    command = [settings.llama_bench, "-m", str(model), *sizes, "-o", "json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{settings.llama_bench}: {done.stderr.strip()[-500:]}")
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return {
        f"pp{row['n_prompt']}" if row["n_prompt"] else f"tg{row['n_gen']}": float(row["avg_ts"])
        for row in rows
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("pieces", nargs="*", metavar="PIECE", help=f"of {', '.join(PIECES)}; default: all")
    parser.add_argument("--isa", help="instruction sets in turn, or all; default: the best")
    parser.add_argument("--llama-bench", default=shutil.which("llama-bench"), help="a llama-bench built here")
    parser.add_argument("-t", "--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("-r", "--rounds", type=int, default=_ROUNDS)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    for piece in options.pieces:
        if piece not in PIECES:
            parser.error(f"{piece!r} is none of {', '.join(PIECES)}")
    options.pieces = options.pieces or list(PIECES)
    return options


def main() -> int:
    """The command line; returns the exit code."""
    options = _options()
    if options.isa:  # an engine keeps the instruction set that it was imported with
        given = sys.argv[1:]
        rest = [word for i, word in enumerate(given) if "--isa" not in (word, given[i - 1] if i else "")]
        every = [isa for isa in available_isas() if isa in _TABLE_ISAS]
        for isa in every if options.isa == "all" else options.isa.split(","):
            environment = {**os.environ, "POWERINFER_ISA": isa}
            if code := subprocess.run(
                [sys.executable, __file__, *rest], env=environment, check=False
            ).returncode:
                return code
        return 0
    settings = Settings(options.threads, options.llama_bench, options.rounds)
    with Pool(1) as pool:
        print(f"{pool.isa}, {settings.threads} threads, medians of interleaved runs", flush=True)
    lines: list[Line] = []
    for piece in options.pieces:
        for line in PIECES[piece](settings):
            lines.append(line)
            print_lines([(line.what, f"{line.ratio:.2f}", f"{line.low:.2f} to {line.high:.2f}", line.wanted)])
            sys.stdout.flush()
    if options.json:
        if isa := os.environ.get("POWERINFER_ISA"):
            options.json = options.json.with_stem(f"{options.json.stem}-{isa}")
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(
            json.dumps([asdict(line) for line in lines], indent=1) + "\n", encoding="utf-8"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
