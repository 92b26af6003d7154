"""An answer does not depend on who else is being served: 16 requests alone, then in random company."""

import asyncio
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from powerinfer_tools.engine import Engine
from powerinfer_tools.errors import ModelError
from powerinfer_tools.generate.generation import GenerationOptions, generate
from powerinfer_tools.generate.sampling import SamplingOptions
from powerinfer_tools.model.loading import load_model
from powerinfer_tools.serving.batcher import Batcher
from powerinfer_tools.serving.jobs import Ended, Failed, Job, Token
from powerinfer_tools.serving.session_slots import SessionSlots
from powerinfer_tools.serving.streams import merged
from powerinfer_tools.serving.tickets import Ticket
from powerinfer_tools.text.tokenizer import Tokenizer
from predicted_models import predicted_split
from split_models import Prepared
from tiny_models import FAMILY_CASES, TinySpec, make_tiny_model

COUNT = 16
TEXT = "The rain had stopped before the morning, and the old road to the harbour was bright with water. " * 4


@dataclass(frozen=True)
class Served:
    """A file, and how it is opened."""

    path: Path
    options: dict[str, Any]


def cases(folder: Path) -> dict[str, Served]:
    relu = Prepared(folder, replace(FAMILY_CASES["llama-relu"], context=512))
    _, predicted, _ = predicted_split(folder / "predicted")
    dense = make_tiny_model(folder / "dense", TinySpec(context=512)).path
    return {
        "dense": Served(dense, {}),
        "dense-q8": Served(make_tiny_model(folder / "q8", TinySpec(context=512, head_dim=32)).path,
                           {"kv_type": "q8_0"}),
        "gate-first": Served(relu.split([0, 0, 0], "gate-first"), {"threads": 3}),
        "split": Served(relu.split([16, 32, 48], "gate-first"), {}),
        "split-torch": Served(relu.split([16, 32, 48], "gate-first"), {"device": "cpu"}),
        "predicted": Served(predicted, {"mode": "predicted", "context": 256}),
    }  # fmt: skip


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Served]:
    folder = tmp_path_factory.mktemp("served")
    for name in ("predicted", "dense", "q8"):
        (folder / name).mkdir()
    return cases(folder)


def jobs(tokenizer: Tokenizer, context: int, seed: int) -> list[Job]:
    """Requests of many lengths; some share the start of their prompts; greedy and sampled."""
    chooser, ids = random.Random(seed), tokenizer.encode(TEXT)
    made = []
    for number in range(COUNT):
        start = 0 if number % 3 else chooser.randrange(40)
        prompt = ids[start : start + chooser.randrange(3, min(len(ids), context // 2))]
        sampling = SamplingOptions(temperature=1.2 * (number % 2), seed=number)
        made.append(Job(prompt, GenerationOptions(sampling, max_tokens=chooser.randrange(1, 24))))
    return made


@contextmanager
def engine_of(case: Served) -> Iterator[Engine]:
    model = load_model(case.path)
    engine = Engine(model, **({"threads": 2, "batch": 64} | case.options))
    try:
        yield engine
    finally:
        engine.close()
        model.close()


def alone(engine: Engine, tokenizer: Tokenizer, job: Job) -> tuple[str, str | None]:
    engine.rewind(0)
    generation = generate(engine, tokenizer, job.prompt, job.options)
    text = "".join(piece.text for piece in generation)
    return text, generation.logits_hash


async def outcome(ticket: Ticket, leave_after: int | None) -> tuple[str, str | None] | None:
    """Text and hash; None for a client that left."""
    text, tokens = "", 0
    async for _, event in merged([ticket]):
        assert not isinstance(event, Failed)
        if isinstance(event, Token):
            text += event.text
            tokens += 1
            if leave_after is not None and tokens > leave_after:
                return None
        elif isinstance(event, Ended):
            return text + event.rest, event.logits_hash
    raise AssertionError("a stream ended without its end")


async def together(batcher: Batcher, asked: list[Job], seed: int) -> dict[int, tuple[str, str | None] | None]:
    chooser = random.Random(seed)
    order = chooser.sample(range(len(asked)), len(asked))
    results: dict[int, tuple[str, str | None] | None] = {}

    async def ask(number: int, leave_after: int | None) -> None:
        results[number] = await outcome(batcher.submit(asked[number]), leave_after)

    tasks = []
    for number in order:
        leave_after = chooser.randrange(3) if chooser.random() < 0.2 else None
        tasks.append(asyncio.create_task(ask(number, leave_after)))
        await asyncio.sleep(chooser.choice((0, 0, 0.002, 0.01)))
    await asyncio.gather(*tasks)
    return results


@pytest.mark.parametrize("name", ["dense", "dense-q8", "gate-first", "split", "split-torch", "predicted"])
def test_answers_do_not_depend_on_company(served: dict[str, Served], name: str) -> None:
    with engine_of(served[name]) as engine:
        tokenizer = Tokenizer.from_gguf(engine.model.source)
        asked = jobs(tokenizer, engine.context, seed=1)
        expected = [alone(engine, tokenizer, job) for job in asked]
        engine.rewind(0)
        count = 1 if engine.weights.stack.serves_one else 6
        batcher = Batcher(SessionSlots(engine.weights, engine.session, count), tokenizer, parallel=4)
        batcher.start()
        try:
            stayed = 0
            for seed in range(3):
                results = asyncio.run(together(batcher, asked, seed))
                for number, result in results.items():
                    assert result in (None, expected[number])
                    stayed += result is not None
            assert stayed > 2 * COUNT
            assert count == 1 or batcher.figures.busy_slots > 1.5 * batcher.figures.passes
            assert batcher.figures.cached_tokens > 0
        finally:
            batcher.close()


def test_a_client_that_leaves_frees_its_place_at_once(served: dict[str, Served]) -> None:
    with engine_of(served["dense"]) as engine:
        tokenizer = Tokenizer.from_gguf(engine.model.source)
        long = Job(tokenizer.encode("the"), GenerationOptions(max_tokens=400, ignore_eos=True))
        batcher = Batcher(SessionSlots(engine.weights, engine.session, 1), tokenizer, parallel=1)
        batcher.start()

        async def leave() -> None:
            stream = merged([batcher.submit(long)])
            second = batcher.submit(replace(long, options=GenerationOptions(max_tokens=1)))
            await anext(stream)
            await stream.aclose()
            assert [type(event) async for _, event in merged([second])][-1] is Ended

        try:
            asyncio.run(leave())
            assert batcher.figures.interrupted == 1
            assert batcher.figures.tokens < 100
        finally:
            batcher.close()


def test_a_short_prompt_does_not_wait_for_a_long_one(served: dict[str, Served]) -> None:
    with engine_of(served["dense"]) as engine:
        tokenizer = Tokenizer.from_gguf(engine.model.source)
        ids = (tokenizer.encode(TEXT) * 4)[:480]
        long = Job(ids, GenerationOptions(max_tokens=1))
        short = Job(ids[5:15], GenerationOptions(max_tokens=4))
        batcher = Batcher(SessionSlots(engine.weights, engine.session, 2), tokenizer, parallel=2)
        ended: list[str] = []

        async def wait(name: str, ticket: Ticket) -> None:
            async for _ in merged([ticket]):
                pass
            ended.append(name)

        async def ask() -> None:
            tickets = {"long": batcher.submit(long), "short": batcher.submit(short)}
            batcher.start()
            await asyncio.gather(*(wait(name, ticket) for name, ticket in tickets.items()))

        try:
            asyncio.run(ask())
            assert ended == ["short", "long"]
        finally:
            batcher.close()


def test_results_that_are_no_numbers_end_the_request_that_has_them(
    served: dict[str, Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine_of(served["dense"]) as engine:
        tokenizer = Tokenizer.from_gguf(engine.model.source)
        options = GenerationOptions(SamplingOptions(temperature=0), max_tokens=12, ignore_eos=True)
        asked = [Job(tokenizer.encode(text), options) for text in ("the road", "the rain", "morning")]
        expected = [alone(engine, tokenizer, job) for job in asked]
        engine.rewind(0)
        slots = SessionSlots(engine.weights, engine.session, 3)
        batcher, checked = Batcher(slots, tokenizer, parallel=3), list[int]()

        def check(logits: Any) -> None:
            checked.append(len(logits))
            if len(checked) == 8:
                raise ModelError("no numbers")

        monkeypatch.setattr(slots, "check", check)

        async def one(ticket: Ticket) -> tuple[str, str | None] | str:
            text = ""
            try:
                async for _, event in merged([ticket]):
                    if isinstance(event, Ended):
                        return text + event.rest, event.logits_hash
                    assert isinstance(event, Token)
                    text += event.text
            except ModelError:
                return text
            raise AssertionError("a stream ended without its end")

        async def all_of_them() -> list[tuple[str, str | None] | str]:
            tickets = batcher.submit_all(asked)
            batcher.start()
            return await asyncio.gather(*(one(ticket) for ticket in tickets))

        try:
            results = asyncio.run(all_of_them())
        finally:
            batcher.close()
        (failed,) = [number for number, result in enumerate(results) if isinstance(result, str)]
        assert expected[failed][0].startswith(str(results[failed]))
        assert results[failed] != ""
        assert all(results[number] == expected[number] for number in range(3) if number != failed)


@pytest.mark.parametrize("stop", [(), ("a", "e", "o")])
def test_texts_made_later_are_the_texts_of_their_tokens(
    served: dict[str, Served], monkeypatch: pytest.MonkeyPatch, stop: tuple[str, ...]
) -> None:
    """However many tokens are handed over together: one event a token, and the same text as alone."""
    for hold in (0.0, 3600.0):
        monkeypatch.setattr("powerinfer_tools.serving.outbox.HOLD_SECONDS", hold)
        with engine_of(served["dense"]) as engine:
            tokenizer = Tokenizer.from_gguf(engine.model.source)
            sampling = SamplingOptions(temperature=1.0, seed=5)
            options = GenerationOptions(sampling, max_tokens=30, ignore_eos=True, stop=stop)
            job = Job(tokenizer.encode("the road"), options)
            expected = alone(engine, tokenizer, job)
            engine.rewind(0)
            batcher = Batcher(SessionSlots(engine.weights, engine.session, 1), tokenizer, parallel=1)
            batcher.start()

            async def events(batcher: Batcher = batcher, job: Job = job) -> list[Any]:
                return [event async for _, event in merged([batcher.submit(job)])]

            try:
                *tokens, ended = asyncio.run(events())
            finally:
                batcher.close()
            text = "".join(token.text for token in tokens) + ended.rest
            assert (text, ended.logits_hash) == expected
            assert [type(token) for token in tokens] == [Token] * ended.tokens
