"""Memory of `powerinfer serve` over many requests: chat, text, streams, schemas, faults, clients that leave.

Prints the resident memory of the server, its threads and open files every so many requests, and at the end
the growth after the first tenth and the mean of each quarter.

    python benchmarks/serving_soak.py -m MODEL.gguf --requests 10000
    python benchmarks/serving_soak.py -m MODEL.gguf --seconds 7200 --pause 0.5    # an evening, at little load
"""

import argparse
import asyncio
import itertools
import json
import os
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from serving import WORDS, request_bytes, server

PORT = 18441
SCHEMA = {"type": "object", "properties": {"n": {"enum": [1, 22]}}, "required": ["n"]}


def request(chooser: random.Random) -> tuple[str, Any]:
    """A path and a body, of one of the kinds that clients send."""
    text = " ".join(chooser.choices(WORDS, k=chooser.randrange(2, 60)))
    limit = {"max_tokens": chooser.randrange(1, 8), "seed": chooser.randrange(1000)}
    chat = {"messages": [{"role": "user", "content": text}]} | limit
    return chooser.choice(
        (
            ("/v1/completions", {"prompt": text} | limit),
            ("/v1/completions", {"prompt": text, "stream": True, "logprobs": 2} | limit),
            ("/v1/chat/completions", chat),
            ("/v1/chat/completions", chat | {"stream": True, "n": 2}),
            ("/v1/completions", {"prompt": text, "json_schema": SCHEMA} | limit | {"max_tokens": 40}),
            ("/v1/messages", chat),
            ("/v1/responses", {"input": text, "max_output_tokens": 16}),
            ("/v1/completions", {"prompt": 7}),
            ("/tokenize", {"content": text}),
            ("/nothing", {}),
        )
    )


async def ask(chooser: random.Random) -> None:
    """One request on a connection of its own; now and then the client leaves before the end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", PORT)
    writer.write(
        request_bytes("POST", *request(chooser)).replace(b"Host: x", b"Host: x\r\nConnection: close")
    )
    if chooser.random() < 0.1:
        await reader.read(chooser.randrange(1, 200))
    else:
        while await reader.read(1 << 16):
            pass
    writer.close()


def resident(pid: int) -> tuple[int, int, int]:
    """Resident bytes, threads, open files."""
    status = Path(f"/proc/{pid}/status").read_text()
    values = {line.split(":")[0]: line.split()[1] for line in status.splitlines() if len(line.split()) > 1}
    return int(values["VmRSS"]) << 10, int(values["Threads"]), len(list(Path(f"/proc/{pid}/fd").iterdir()))


async def soak(pid: int, arguments: argparse.Namespace) -> list[int]:
    """Resident bytes after every so many requests."""
    left, sizes, started = itertools.count(), list[int](), time.monotonic()
    every = max(1, arguments.requests // 50)

    def goes_on(number: int) -> bool:
        if arguments.seconds:
            return bool(time.monotonic() - started < arguments.seconds)
        return bool(number < arguments.requests)

    async def user(seed: int) -> None:
        chooser = random.Random(seed)  # noqa: S311
        while goes_on(number := next(left)):
            await ask(chooser)
            await asyncio.sleep(arguments.pause)
            if (number + 1) % every == 0:
                nbytes, threads, files = resident(pid)
                sizes.append(nbytes)
                print(
                    f"{number + 1:7} requests {time.monotonic() - started:7.0f} s  {nbytes / 2**20:8.1f} MiB "
                    f" {threads} threads  {files} files",
                    flush=True,
                )

    await asyncio.gather(*(user(seed) for seed in range(arguments.users)))
    return sizes


def quarters(sizes: list[int]) -> list[int]:
    """Mean of each quarter."""
    edges = [len(sizes) * part // 4 for part in range(5)]
    return [round(statistics.fmean(sizes[first:last])) for first, last in itertools.pairwise(edges)]


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-m", "--model", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, help="for so long instead; a line every REQUESTS / 50")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds that a user waits after an answer")
    parser.add_argument("--users", type=int, default=8)
    parser.add_argument("--context", "-c", type=int, default=512)
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "powerinfer_cli", "serve", "-m", str(arguments.model), "--port",
               str(PORT), "-c", str(arguments.context), "--parallel", "4", "-t", "1"]  # fmt: skip
    os.environ["OMP_NUM_THREADS"] = "1"
    with server(command, PORT) as pid:
        sizes = asyncio.run(soak(pid, arguments))
    settled = sizes[len(sizes) // 10]
    print(json.dumps({"settled": settled, "end": sizes[-1], "growth": sizes[-1] - settled,
                      "quarters": quarters(sizes)}))  # fmt: skip


if __name__ == "__main__":
    main()
