"""Many users on one model: `powerinfer serve` beside llama.cpp's server, asked the same in turn.

For each number of users, both servers get the same prompts (32 to 512 tokens) and the same lengths of answers
(64 to 256 tokens), streamed and greedy; each user asks again when an answer is complete. Reported are tokens
per second in all (of the answers), the time to the first token (median, 95th percentile), and the slowest
answer of /health meanwhile: how long the event loop made others wait. Then, of powerinfer alone: one user's
speed as a share of what `bench` measures, and what a repeated system prompt costs. The client shares the
machine.

    python benchmarks/serving.py -m MODEL.gguf --llama-server PATH/llama-server --users 1 4 16
    python benchmarks/serving.py -m MODEL.gguf --users --single 5 --repeated 3      # only the second half
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

WORDS = (
    "the", "old", "road", "to", "harbour", "was", "bright", "with", "water", "and", "boats", "there", "no",
    "one", "on", "any", "of", "them", "she", "walked", "along",
)  # fmt: skip
SYSTEM_TOKENS = 1000
SINGLE_TOKENS = 128
OURS, THEIRS = "powerinfer", "llama-server"


@dataclass(frozen=True)
class Question:
    """A prompt as text or as ids of tokens, and how many tokens to answer."""

    prompt: str | list[int]
    tokens: int


@dataclass(frozen=True)
class Reply:
    """Seconds to the first token and to the last one, and how many there were."""

    first: float
    last: float
    tokens: int


@dataclass
class Figures:
    """What one server did at one level; ``health`` is the slowest answer of /health meanwhile, in seconds,
    ``others`` the cores that other programs took: where they took much, the figures say little."""

    server: str
    users: int
    tokens: int = 0
    seconds: float = 0.0
    first: list[float] = field(default_factory=list)
    health: float = 0.0
    others: float = 0.0

    @property
    def rate(self) -> float:
        """Tokens per second in all."""
        return self.tokens / self.seconds

    def percentile(self, share: float) -> float:
        """Time to the first token that ``share`` of the requests stayed below, in seconds."""
        ordered = sorted(self.first)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def words(count: int, seed: int) -> str:
    """A text of about ``count`` tokens."""
    return " ".join(random.Random(seed).choices(WORDS, k=count))  # noqa: S311


def token_ids(count: int, seed: int) -> list[int]:
    """So many tokens."""
    return random.Random(seed).choices(range(1000, 20000), k=count)  # noqa: S311


def questions(count: int, seed: int, part: float = 1.0, *, ids: bool = False) -> list[Question]:
    """Different prompts, so that no cache helps; ``part`` makes them and their answers shorter. As ``ids``,
    where the tokenizer of a synthetic model would cut words into letters."""
    chooser = random.Random(seed)  # noqa: S311
    lengths = [(chooser.randrange(32, 513), chooser.randrange(64, 257)) for _ in range(count)]
    return [
        Question((token_ids if ids else words)(int(prompt * part), 1000 * seed + number), int(answer * part))
        for number, (prompt, answer) in enumerate(lengths)
    ]


def request_bytes(method: str, path: str, body: Any = None) -> bytes:
    """A request on a connection that is kept."""
    data = b"" if body is None else json.dumps(body).encode()
    head = (f"{method} {path} HTTP/1.1", "Host: x", "Content-Type: application/json",
            f"Content-Length: {len(data)}", "", "")  # fmt: skip
    return "\r\n".join(head).encode() + data


async def ask(port: int, question: Question) -> Reply:
    """One streamed request; the connection is read as bytes, which costs the client little."""
    body = {
        "prompt": question.prompt, "max_tokens": question.tokens, "temperature": 0, "stream": True,
        "ignore_eos": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    started = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request_bytes("POST", "/v1/completions", body))
    received, first, last = bytearray(), 0.0, 0.0
    while b"[DONE]" not in received[-64:] and (chunk := await reader.read(1 << 16)):
        received += chunk
        last = time.perf_counter() - started
        if not first and b"data: " in received:
            first = last
    writer.close()
    usage = received.rfind(b'"completion_tokens":')
    if usage < 0:
        raise RuntimeError(bytes(received[:500]).decode(errors="replace"))
    return Reply(first, last, int(received[usage + 20 : usage + 30].split(b",")[0].split(b"}")[0]))


@asynccontextmanager
async def watched(port: int, figures: Figures) -> AsyncIterator[None]:
    """Ask for /health every 25 ms meanwhile, on one connection, and note the slowest answer."""

    async def watch() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while True:
            started = time.perf_counter()
            writer.write(request_bytes("GET", "/health"))
            await reader.readuntil(b"}")
            figures.health = max(figures.health, time.perf_counter() - started)
            await asyncio.sleep(0.025)

    task = asyncio.ensure_future(watch())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


class Cores:
    """Seconds of computing, of the machine and of programs that are measured."""

    def __init__(self, pids: list[int]) -> None:
        self._pids = [os.getpid(), *pids]
        self._started, self._before = time.perf_counter(), self._others()

    def taken_by_others(self) -> float:
        """Cores that all other programs took on average since the start."""
        return (self._others() - self._before) / (time.perf_counter() - self._started)

    def _others(self) -> float:
        with Path("/proc/stat").open() as file:
            spent = [int(text) for text in file.readline().split()[1:9]]
        own = 0
        for pid in self._pids:
            own += sum(
                int(text) for text in Path(f"/proc/{pid}/stat").read_text().rsplit(")")[1].split()[11:13]
            )
        return (sum(spent) - spent[3] - spent[4] - own) / os.sysconf("SC_CLK_TCK")  # without idle and waiting


async def load(
    name: str, port: int, users: int, asked: list[Question], pids: tuple[int, ...] = ()
) -> Figures:
    """``users`` at once ask ``asked`` between them."""
    cores = Cores(list(pids))
    figures, waiting = Figures(name, users), list(reversed(asked))

    async def user() -> None:
        while waiting:
            reply = await ask(port, waiting.pop())
            figures.tokens += reply.tokens
            figures.first.append(reply.first)

    async with watched(port, figures):
        started = time.perf_counter()
        await asyncio.gather(*(user() for _ in range(users)))
        figures.seconds = time.perf_counter() - started
    figures.others = cores.taken_by_others()
    return figures


@contextmanager
def server(command: list[str], port: int) -> Iterator[int]:
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
        yield process.pid
    finally:
        process.terminate()
        process.wait(30)


def commands(arguments: argparse.Namespace) -> dict[str, tuple[list[str], int]]:
    """How each server is started, and its port."""
    slots, context = max([*arguments.users, 1]), 2048
    ours = [sys.executable, "-m", "powerinfer_cli", "serve", "-m", str(arguments.model), "--port", "18431",
            "-c", str(context), "--parallel", str(slots), "-t", str(arguments.threads)]  # fmt: skip
    result = {OURS: (ours, 18431)}
    if arguments.llama_server is not None and arguments.users:
        theirs = [str(arguments.llama_server), "-m", str(arguments.model), "--port", "18432",
                  "-c", str(context * slots), "-np", str(slots), "-t", str(arguments.threads),
                  *arguments.llama_args.split()]  # fmt: skip
        result[THEIRS] = (theirs, 18432)
    return result


async def measure(
    ports: dict[str, int], pids: tuple[int, ...], arguments: argparse.Namespace
) -> list[Figures]:
    """All levels, the servers in turn."""
    results = []
    for name, port in ports.items():
        await load(name, port, 2, questions(2, seed=99, part=0.2, ids=arguments.ids))  # warm
    for users in arguments.users:
        for turn in range(arguments.rounds):
            count = max(arguments.requests, users)
            asked = questions(count, 1000 * users + turn, arguments.part, ids=arguments.ids)
            order = list(ports.items())
            for name, port in order if turn % 2 == 0 else reversed(order):
                results.append(figures := await load(name, port, users, asked, pids))
                print(
                    f"# {users} users, {name}: {figures.rate:.1f} tok/s; others took "
                    f"{figures.others:.2f} cores",
                    flush=True,
                )
    return results


async def repeated_system_prompt(port: int, turn: int) -> float:
    """Time to the first token of a prompt that begins with the same thousand tokens as one before it, as a
    share of that one's."""
    shared = words(SYSTEM_TOKENS, seed=500 + turn)
    first, again = [(await ask(port, Question(f"{shared} {ending}", 1))).first for ending in WORDS[:2]]
    return again / first


async def single(port: int, turn: int) -> float:
    """Tokens per second of one user after the first token."""
    reply = await ask(port, Question(WORDS[turn % len(WORDS)], SINGLE_TOKENS))
    return (reply.tokens - 1) / (reply.last - reply.first)


def bench(arguments: argparse.Namespace) -> float:
    """Tokens per second that `powerinfer bench` finds."""
    command = [sys.executable, "-m", "powerinfer_cli", "bench", "-m", str(arguments.model), "-p", "0",
               "-n", str(SINGLE_TOKENS), "-r", "1", "-t", str(arguments.threads), "--json"]  # fmt: skip
    printed = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    return float(json.loads(printed)[0]["tokens_per_second"])


def table(results: list[Figures]) -> Iterator[str]:
    """Lines for people: medians over the rounds."""
    yield (f"{'users':>5} {'server':14} {'tok/s':>8} {'first p50':>10} {'first p95':>10} {'health max':>11}")
    totals: dict[int, float] = {}
    for users in sorted({figures.users for figures in results}):
        rates, firsts = dict[str, float](), dict[str, float]()
        for name in dict.fromkeys(figures.server for figures in results):
            here = [figures for figures in results if (figures.users, figures.server) == (users, name)]
            rates[name] = statistics.median(figures.rate for figures in here)
            p50, firsts[name] = (
                statistics.median(figures.percentile(share) for figures in here) for share in (0.5, 0.95)
            )
            slowest = max(figures.health for figures in here)
            yield (
                f"{users:5} {name:14} {rates[name]:8.1f} {p50 * 1e3:7.0f} ms {firsts[name] * 1e3:7.0f} ms "
                f"{slowest * 1e3:8.1f} ms"
            )
        totals[users] = rates[OURS]
        if THEIRS in rates:
            yield (
                f"      {OURS} / {THEIRS}: tok/s {rates[OURS] / rates[THEIRS]:.2f}, first p95 "
                f"{firsts[OURS] / firsts[THEIRS]:.2f}"
            )
    fewest, most = min(totals), max(totals)
    if most > fewest:
        yield f"{most} users in all / {fewest}: {totals[most] / totals[fewest]:.2f}"


def main() -> None:
    """Measure and print."""
    arguments = _arguments()
    os.environ["OMP_NUM_THREADS"] = "1"
    with ExitStack() as stack:
        ports, pids = dict[str, int](), tuple[int, ...]()
        for name, (command, port) in commands(arguments).items():
            pids += (stack.enter_context(server(command, port)),)
            ports[name] = port
        results = asyncio.run(measure(ports, pids, arguments)) if arguments.users else []
        if results:
            print("\n".join(table(results)), flush=True)
        shares = []
        for turn in range(arguments.single):
            cores = Cores(list(pids))
            served = asyncio.run(single(ports[OURS], turn))
            others, alone = cores.taken_by_others(), bench(arguments)
            shares.append(served / alone)
            print(
                f"# one user {served:.1f} tok/s, bench {alone:.1f}: {served / alone:.3f}; others took "
                f"{others:.2f} cores",
                flush=True,
            )
        if shares:
            print(f"one user / bench, median: {statistics.median(shares):.3f}")
        again = [asyncio.run(repeated_system_prompt(ports[OURS], turn)) for turn in range(arguments.repeated)]
        if again:
            print(
                f"a repeated system prompt of {SYSTEM_TOKENS} words: {statistics.median(again):.3f} of the "
                "first time"
            )
    if arguments.json is not None:
        values: list[dict[str, Any]] = [asdict(figures) for figures in results]
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(values), encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-m", "--model", type=Path, required=True)
    parser.add_argument("--llama-server", type=Path)
    parser.add_argument("--llama-args", default="", help="more arguments for it")
    parser.add_argument("--users", type=int, nargs="*", default=[1, 4, 16])
    parser.add_argument("--requests", type=int, default=16, help="requests of a level, at least one a user")
    parser.add_argument("--ids", action="store_true", help="prompts as token ids, for synthetic models")
    parser.add_argument("--part", type=float, default=1.0, help="of the lengths, where time is short")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--single", type=int, default=0, help="rounds of one user against bench")
    parser.add_argument("--repeated", type=int, default=0, help="rounds of a repeated system prompt")
    parser.add_argument("--threads", "-t", type=int, default=2)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
