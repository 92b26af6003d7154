"""Serves timings of our engine on one model, one JSON line per request on standard input.

    python benchmarks/worker_powerinfer.py MODEL --threads 2 --context 640

The same requests and the same work as ``worker_llama_cpp.py``, and ``{"test": "bandwidth"}`` for a read probe
with the same threads.
"""

import argparse
import json
import sys
import time
from typing import Any

import powerinfer_tools
from powerinfer_formats.errors import FormatError
from powerinfer_kernels import KernelError
from powerinfer_tools.engine import Engine
from powerinfer_tools.errors import PowerInferError
from powerinfer_tools.model.loading import load_model


class Ours:
    """A loaded model with an engine. Raises PowerInferError or KernelError where it cannot be made."""

    def __init__(self, path: str, threads: int, context: int, mode: str | None) -> None:
        started = time.perf_counter()
        self.engine = Engine(load_model(path), threads=threads, context=context, mode=mode)
        self.load_seconds = time.perf_counter() - started
        self._tokens = [(index * 7919 + 1) % self.engine.vocabulary for index in range(context)]

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to one request."""
        if request["test"] == "bandwidth":
            return {"bytes_per_second": self.engine.read_bandwidth()}
        run = self._prompt if request["test"] == "pp" else self._generate
        depth = int(request["depth"])
        self._rewind(depth)
        tokens = self._tokens[depth : depth + int(request["tokens"])]
        started = time.perf_counter()
        run(tokens)
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "bytes_per_token": self.engine.stack.weight_bytes_per_token()}

    def _rewind(self, depth: int) -> None:
        """Leave ``depth`` tokens in the cache; they are computed only where it holds fewer."""
        position = min(self.engine.position, depth)
        self.engine.rewind(position)
        if position < depth:
            self.engine.prefill(self._tokens[position:depth])

    def _prompt(self, tokens: list[int]) -> None:
        self.engine.prefill(tokens)

    def _generate(self, tokens: list[int]) -> None:
        for token in tokens:
            self.engine.decode(token)


def main() -> int:
    """Announce the engine, then answer requests until standard input ends."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--mode")
    options = parser.parse_args()
    try:
        ours = Ours(options.model, options.threads, options.context, options.mode)
    except (PowerInferError, FormatError, KernelError, OSError) as error:
        raise SystemExit(str(error)) from None
    report = ours.engine.report()
    _say(
        {
            "name": "powerinfer",
            "version": f"powerinfer {powerinfer_tools.__version__}",
            "build": report.isa,
            "load_seconds": ours.load_seconds,
            "model": ours.engine.model.name,
            "bytes_per_token": report.bytes_per_token,
        }
    )
    for line in sys.stdin:
        _say(ours.answer(json.loads(line)))
    return 0


def _say(value: dict[str, Any]) -> None:
    print(json.dumps(value), flush=True)


if __name__ == "__main__":
    sys.exit(main())
