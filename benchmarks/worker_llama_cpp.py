"""Serves timings of llama.cpp on one model, one JSON line per request on standard input.

    python benchmarks/worker_llama_cpp.py MODEL --threads 2 --context 640

Needs nothing but ``llama-cpp-python``, so that any interpreter that has it can run this file. The work is
llama-bench's: ``pp`` decodes the tokens as one batch, ``tg`` one after the other, after ``depth`` tokens
that are in the cache already, and logits are computed for the last token only.
"""

import argparse
import ctypes
import importlib.metadata
import json
import sys
import time
from typing import Any

import llama_cpp  # type: ignore[import-not-found, unused-ignore]  # an optional peer


class Peer:
    """A loaded model with a context of llama.cpp. Raises SystemExit with one line where it cannot be made."""

    def __init__(self, path: str, threads: int, context: int, gpu_layers: int) -> None:
        self._silence = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._silence, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        started = time.perf_counter()
        model_options = llama_cpp.llama_model_default_params()
        model_options.n_gpu_layers = gpu_layers
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), model_options)
        if not self._model:
            raise SystemExit(f"{path}: llama.cpp cannot load this model")
        self.load_seconds = time.perf_counter() - started
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = options.n_batch = context
        options.n_ubatch = min(512, context)
        options.n_threads = options.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, options)
        if not self._context:
            raise SystemExit(f"{path}: llama.cpp makes no context of {context} tokens")
        vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        # A fixed spread of ids: which tokens they are changes nothing in the work.
        self._tokens = [(index * 7919 + 1) % vocabulary for index in range(context)]
        self._filled = 0

    def prompt(self, count: int, depth: int) -> float:
        """Seconds for ``count`` prompt tokens after ``depth`` others."""
        self._rewind(depth)
        started = time.perf_counter()
        self._decode(depth, count)
        return time.perf_counter() - started

    def generate(self, count: int, depth: int) -> float:
        """Seconds for ``count`` tokens one by one, after ``depth`` others."""
        self._rewind(depth)
        started = time.perf_counter()
        for position in range(depth, depth + count):
            self._decode(position, 1)
        return time.perf_counter() - started

    def _rewind(self, depth: int) -> None:
        """Leave ``depth`` tokens in the cache; they are computed only where it holds fewer."""
        memory = llama_cpp.llama_get_memory(self._context)
        llama_cpp.llama_memory_seq_rm(memory, 0, depth, -1)
        self._filled = min(self._filled, depth)
        if self._filled < depth:
            self._decode(self._filled, depth - self._filled)

    def _decode(self, first: int, count: int) -> None:
        array = (llama_cpp.llama_token * count)(*self._tokens[first : first + count])
        code = llama_cpp.llama_decode(self._context, llama_cpp.llama_batch_get_one(array, count))
        if code:
            raise SystemExit(f"llama_decode of {count} tokens after {first} answered {code}")
        llama_cpp.llama_synchronize(self._context)
        self._filled = first + count


def main() -> int:
    """Announce the peer, then answer requests until standard input ends."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--gpu-layers", type=int, default=0)
    options = parser.parse_args()
    peer = Peer(options.model, options.threads, options.context, options.gpu_layers)
    _say(
        {
            "name": "llama.cpp",
            "version": f"llama-cpp-python {importlib.metadata.version('llama-cpp-python')}",
            "build": llama_cpp.llama_print_system_info().decode().strip(" |"),
            "load_seconds": peer.load_seconds,
        }
    )
    for line in sys.stdin:
        request = json.loads(line)
        run = peer.prompt if request["test"] == "pp" else peer.generate
        _say({"seconds": run(int(request["tokens"]), int(request["depth"]))})
    return 0


def _say(value: dict[str, Any]) -> None:
    print(json.dumps(value), flush=True)


if __name__ == "__main__":
    sys.exit(main())
