"""Feeds damaged files to every reader, for as many seconds as asked, and counts them.

    python scripts/fuzz.py --seconds 60 [--seed 1] [--only gguf]

Each input is a small valid file with a few changes: bytes, numbers at the border of their type, pieces taken
out or doubled. A reader may take it or refuse it with an error of its own; anything else ends the run, with
the input kept in build/fuzz and the seed said. Equal seeds make equal inputs, in the same order.
"""

import argparse
import random
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from powerinfer_formats.delta import Delta
from powerinfer_formats.errors import FormatError
from powerinfer_formats.gguf_reader import GGUFFile
from powerinfer_formats.gguf_scan import scan_header
from powerinfer_formats.hardware import HardwareProfile
from powerinfer_formats.plan import Plan
from powerinfer_formats.predictors import Predictors
from powerinfer_formats.profile import Profile
from powerinfer_formats.records import parse_json
from powerinfer_formats.safetensors_header import scan_safetensors
from powerinfer_formats.sentencepiece_model import parse_sentencepiece
from powerinfer_formats.trace import TraceFile
from powerinfer_kernels import KernelError, RowType, dequantize, row_bytes
from powerinfer_tools.engine import Engine
from powerinfer_tools.errors import PowerInferError
from powerinfer_tools.inspect.describe import describe
from powerinfer_tools.model.huggingface.config import Config
from powerinfer_tools.model.huggingface.rope import read_rope
from powerinfer_tools.model.huggingface.tokenizer_json import read_tokenizer_json
from powerinfer_tools.model.loading import load_model
from powerinfer_tools.text import Tokenizer

#: Readers of files that are mostly weights: what comes first is damaged.
REACH = {"model": 6000}
ALLOWED = (FormatError, PowerInferError, KernelError)
KEPT = Path("build/fuzz")
_NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 63, (1 << 64) - 1)
_TEXTS = (b"{", b"}", b"[", b'"', b"null", b"1e999", b"-1", b"9" * 400, b"\xff", b"\0", b"true")
Reader = Callable[[bytes, Path], object]


def mutate(data: bytes, rng: random.Random, reach: int) -> bytes:
    """`data` with one to six changes in its first `reach` bytes."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        at = rng.randrange(min(reach, len(changed)) + 1)
        kind = rng.randrange(7)
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed[at : at + 1] = bytes((rng.randrange(256),))
        elif kind == 2:
            width = rng.choice((1, 2, 4, 8))
            changed[at : at + width] = struct.pack("<Q", rng.choice(_NUMBERS))[:width]
        elif kind == 3:
            del changed[at : at + rng.choice((1, 2, 8, 64))]
        elif kind == 4:
            changed[at:at] = changed[at : at + rng.choice((1, 8, 32))]
        elif kind == 5:
            changed[at : at + rng.randrange(3)] = rng.choice(_TEXTS)
        else:
            del changed[at:]
    return bytes(changed)


def on_disk(read: Callable[[Path], object]) -> Reader:
    """A reader of paths as one of bytes."""

    def call(data: bytes, file: Path) -> object:
        file.write_bytes(data)
        return read(file)

    return call


def _trace(file: Path) -> None:
    with TraceFile(file) as trace:
        for layer in range(min(trace.header.layers, 3)):
            trace.read(layer)


def _tokenizer(data: bytes, file: Path) -> object:
    return read_tokenizer_json(Config(file, parse_json(data.decode("utf-8", "replace"), file)))


def _rope(data: bytes, file: Path) -> object:
    return read_rope(Config(file, parse_json(data.decode("utf-8", "replace"), file)), 10000.0, 1.0, 64)


def _rows(data: bytes, file: Path) -> object:
    """Rows of every type, of any bytes."""
    values = np.frombuffer(data, np.uint8)
    for kind in RowType:
        size = row_bytes(kind, 256)
        rows = len(values) // size
        if rows:
            dequantize(np.ascontiguousarray(values[: rows * size]), kind, rows, 256)
        elif len(values):
            try:
                dequantize(values, kind, 1, 256)
            except KernelError:
                continue
            raise AssertionError(f"{len(values)} bytes passed for a row of {size}")
    return None


def _model(path: Path) -> None:
    """A model from file to logits, and what inspect says of it."""
    describe(path)
    model = load_model(path)
    try:
        with Engine(model, threads=1, context=8) as engine:
            engine.prefill([0, 1])
            engine.decode(2)
    finally:
        model.close()


def _vocabulary(path: Path) -> None:
    """A tokenizer from a file, a text and back."""
    with GGUFFile.open(path) as gguf:
        tokenizer = Tokenizer.from_gguf(gguf)
    tokenizer.decode(tokenizer.encode("hello <tag> \u00e9\n hell", add_bos=False))


READERS: dict[str, Reader] = {
    "model": on_disk(_model),
    "vocabulary": on_disk(_vocabulary),
    "gguf": lambda data, file: scan_header(data, str(file)),
    "safetensors": lambda data, file: scan_safetensors(data, str(file)),
    "sentencepiece": parse_sentencepiece,
    "tokenizer": _tokenizer,
    "rope": _rope,
    "delta": on_disk(Delta.load),
    "trace": on_disk(_trace),
    "profile": on_disk(Profile.load),
    "plan": on_disk(Plan.load),
    "hardware": on_disk(HardwareProfile.load),
    "predictors": on_disk(Predictors.load),
    "kernels": _rows,
}


def fuzz(seconds: float, seed: int, only: str | None, seeds: dict[str, list[bytes]]) -> dict[str, int]:
    """How many inputs each reader got, of which every one has the same time. Raises whatever a reader must
    not raise."""
    counts = {}
    names = [only] if only else list(READERS)
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            end = time.monotonic() + seconds / len(names)
            counts[name] = _fuzz_one(name, seed, end, seeds[name], Path(folder) / "input")
    return counts


def _fuzz_one(name: str, seed: int, end: float, seeds: list[bytes], file: Path) -> int:
    rng, count = random.Random(f"{seed} {name}"), 0  # noqa: S311  nothing here is secret
    while time.monotonic() < end:
        data = mutate(rng.choice(seeds), rng, REACH.get(name, 1 << 30))
        try:
            READERS[name](data, file)
        except ALLOWED:
            pass
        except BaseException:
            KEPT.mkdir(parents=True, exist_ok=True)
            (KEPT / f"{name}-{seed}-{count}").write_bytes(data)
            print(f"{name}: input {count} of seed {seed} is kept in {KEPT}", file=sys.stderr)
            raise
        count += 1
    return count


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=list(READERS))
    options = parser.parse_args()
    for folder in ("formats", "tools"):
        sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / folder))
    from fuzz_seeds import seeds

    with np.errstate(all="ignore"):
        counts = fuzz(options.seconds, options.seed, options.only, seeds())
    for name, count in counts.items():
        print(f"{name:>14} {count:>12,}")
    print(f"{'all':>14} {sum(counts.values()):>12,} inputs, nothing found")


if __name__ == "__main__":
    main()
