"""Many users on one model: `powerinfer serve` beside llama.cpp's server, asked the same in turn.

For each number of users, both servers get the same prompts (32 to 512 tokens) and the same lengths of answers
(64 to 256 tokens), streamed and greedy; each user asks again when an answer is complete. Reported are tokens
per second in all, and the time to the first token (median, 95th percentile). The client shares the machine.

    python benchmarks/serving.py -m MODEL.gguf --llama-server PATH/llama-server --users 1 4 16
"""

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

WORDS = (
    "the", "old", "road", "to", "harbour", "was", "bright", "with", "water", "and", "boats", "there", "no",
    "one", "on", "any", "of", "them", "she", "walked", "along",
)  # fmt: skip
SYSTEM_TOKENS = 1000


@dataclass(frozen=True)
class Question:
    """A prompt as text, and how many tokens to answer."""

    prompt: str
    tokens: int


@dataclass
class Figures:
    """What one server did at one level."""

    server: str
    users: int
    tokens: int = 0
    seconds: float = 0.0
    first: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Tokens per second in all."""
        return self.tokens / self.seconds

    def percentile(self, share: float) -> float:
        """Time to the first token that ``share`` of the requests stayed below, in seconds."""
        ordered = sorted(self.first)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def questions(count: int, seed: int) -> list[Question]:
    """Different prompts, so that no cache helps."""
    chooser = random.Random(seed)  # noqa: S311
    return [
        Question(" ".join(chooser.choices(WORDS, k=chooser.randrange(32, 513))), chooser.randrange(64, 257))
        for _ in range(count)
    ]


async def ask(port: int, question: Question, figures: Figures) -> None:
    """One streamed request; the connection is read as bytes, which costs the client little."""
    body = {
        "prompt": question.prompt, "max_tokens": question.tokens, "temperature": 0, "stream": True,
        "ignore_eos": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    data = json.dumps(body).encode()
    started = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = ("POST /v1/completions HTTP/1.1", "Host: x", "Content-Type: application/json",
            f"Content-Length: {len(data)}", "Connection: close", "", "")  # fmt: skip
    writer.write("\r\n".join(head).encode() + data)
    received = bytearray()
    while chunk := await reader.read(1 << 16):
        if b"data: " in chunk and b"data: " not in received:
            figures.first.append(time.perf_counter() - started)
        received += chunk
    writer.close()
    usage = received.rfind(b'"completion_tokens":')
    if usage < 0:
        raise RuntimeError(bytes(received[:500]).decode(errors="replace"))
    figures.tokens += int(received[usage + 20 : usage + 30].split(b",")[0].split(b"}")[0])


async def load(name: str, port: int, users: int, asked: list[Question]) -> Figures:
    """``users`` at once ask ``asked`` between them."""
    figures, waiting = Figures(name, users), list(reversed(asked))

    async def user() -> None:
        while waiting:
            await ask(port, waiting.pop(), figures)

    started = time.perf_counter()
    await asyncio.gather(*(user() for _ in range(users)))
    figures.seconds = time.perf_counter() - started
    return figures


@contextmanager
def server(command: list[str], port: int) -> Iterator[None]:
    """The process, once it is ready."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            if process.poll() is not None:
                raise RuntimeError(f"{command[0]} ended with {process.returncode}")
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
                    break
            except OSError:
                time.sleep(0.1)
        yield
    finally:
        process.terminate()
        process.wait(30)


def commands(arguments: argparse.Namespace) -> dict[str, tuple[list[str], int]]:
    """How each server is started, and its port."""
    slots, context = max(arguments.users), 1024
    ours = [sys.executable, "-m", "powerinfer_cli", "serve", "-m", str(arguments.model), "--port", "18431",
            "-c", str(context), "--parallel", str(slots), "-t", str(arguments.threads)]  # fmt: skip
    result = {"powerinfer": (ours, 18431)}
    if arguments.llama_server is not None:
        theirs = [str(arguments.llama_server), "-m", str(arguments.model), "--port", "18432",
                  "-c", str(context * slots), "-np", str(slots), "-t", str(arguments.threads),
                  *arguments.llama_args.split()]  # fmt: skip
        result["llama-server"] = (theirs, 18432)
    return result


async def measure(ports: dict[str, int], arguments: argparse.Namespace) -> list[Figures]:
    """All levels, the servers in turn."""
    results = []
    for name, port in ports.items():
        await load(name, port, 2, questions(2, seed=99))  # warm
    for users in arguments.users:
        for turn in range(arguments.rounds):
            asked = questions(max(arguments.requests, users), seed=1000 * users + turn)
            order = list(ports.items())
            for name, port in order if turn % 2 == 0 else reversed(order):
                results.append(await load(name, port, users, asked))
    return results


async def repeated_system_prompt(port: int) -> tuple[float, float]:
    """Time to the first token of a long prompt, and of one that begins with the same thousand tokens."""
    chooser, times = random.Random(5), Figures("", 1)  # noqa: S311
    shared = " ".join(chooser.choices(WORDS, k=SYSTEM_TOKENS - 100))
    for ending in ("one", "two"):
        await ask(port, Question(f"{shared} {ending}", 1), times)
    return times.first[0], times.first[1]


def table(results: list[Figures]) -> Iterator[str]:
    """Lines for people: medians over the rounds."""
    yield f"{'users':>5} {'server':14} {'tok/s':>8} {'first p50':>10} {'first p95':>10}"
    levels = sorted({figures.users for figures in results})
    for users in levels:
        rates: dict[str, float] = {}
        for name in dict.fromkeys(figures.server for figures in results):
            here = [figures for figures in results if (figures.users, figures.server) == (users, name)]
            rates[name] = statistics.median(figures.rate for figures in here)
            p50, p95 = (
                statistics.median(figures.percentile(share) for figures in here) for share in (0.5, 0.95)
            )
            yield f"{users:5} {name:14} {rates[name]:8.1f} {p50 * 1e3:7.0f} ms {p95 * 1e3:7.0f} ms"
        if len(rates) == 2:
            first, second = rates.values()
            yield f"      ratio {first / second:.2f}"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-m", "--model", type=Path, required=True)
    parser.add_argument("--llama-server", type=Path)
    parser.add_argument("--llama-args", default="", help="more arguments for it")
    parser.add_argument("--users", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--requests", type=int, default=16, help="requests of a level, at least one a user")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", "-t", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with ExitStack() as stack:
        ports = {}
        for name, (command, port) in commands(arguments).items():
            stack.enter_context(server(command, port))
            ports[name] = port
        results = asyncio.run(measure(ports, arguments))
        first, again = asyncio.run(repeated_system_prompt(ports["powerinfer"]))
    print("\n".join(table(results)))
    print(f"a repeated start of {SYSTEM_TOKENS - 100} words: {first * 1e3:.0f} ms, then {again * 1e3:.0f} ms")
    if arguments.json is not None:
        values: list[dict[str, Any]] = [asdict(figures) for figures in results]
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(values), encoding="utf-8")


if __name__ == "__main__":
    main()
