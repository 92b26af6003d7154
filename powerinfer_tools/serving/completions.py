"""POST /v1/completions."""

import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

import anyio.to_thread
from starlette.requests import Request
from starlette.responses import Response

from powerinfer_tools.serving import sse
from powerinfer_tools.serving.answers import completion_logprobs, finish_reason, new_id, timings, usage
from powerinfer_tools.serving.http import answer, client_of, long_answer, read, unless_gone
from powerinfer_tools.serving.jobs import Ended, Event, PromptScores, Token, TokenScore
from powerinfer_tools.serving.schemas import CompletionRequest
from powerinfer_tools.serving.served_model import ServedModel
from powerinfer_tools.serving.service import Service
from powerinfer_tools.serving.streaming import note, stream_response
from powerinfer_tools.serving.streams import merged
from powerinfer_tools.serving.tickets import Ticket
from powerinfer_tools.serving.translation import Completion, completion_jobs

#: With more tokens than this, a thread writes their probabilities.
_MANY_SCORES = 256


@dataclass
class Choice:
    """One answer as it grows."""

    index: int
    text: str
    tokens: list[int] = field(default_factory=list)
    scores: list[TokenScore | None] = field(default_factory=list)
    ended: Ended | None = None


class Answer:
    """The answer to one request, whole or as chunks."""

    def __init__(self, request: CompletionRequest, model: ServedModel, completion: Completion) -> None:
        self.request, self.model, self.completion = request, model, completion
        self.id, self.created = new_id("cmpl"), int(time.time())
        count = request.n or 1
        self.choices = [
            Choice(number * count + each, echo)
            for number, echo in enumerate(completion.echoed)
            for each in range(count)
        ]
        self.prompts = [job.prompt for jobs in completion.jobs for job in jobs]

    def take(self, index: int, event: Event) -> tuple[str, list[TokenScore | None], list[int]]:
        """The text, probabilities and tokens that ``event`` adds to answer ``index``."""
        choice, text = self.choices[index], ""
        scores: list[TokenScore | None] = []
        tokens: list[int] = []
        if isinstance(event, PromptScores):
            scores, tokens = list(event.scores), list(self.prompts[index])
        elif isinstance(event, Token):
            text, scores, tokens = event.text, [event.score], [event.token]
        elif isinstance(event, Ended):
            text, choice.ended = event.rest, event
        choice.text += text
        if self.request.logprobs is not None:
            choice.scores += scores
            choice.tokens += tokens
        return text, scores, tokens

    @property
    def around(self) -> dict[str, Any]:
        """The fields around the choices."""
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model.name,
            "system_fingerprint": self.model.system_fingerprint,
        }

    def figures(self) -> dict[str, Any]:
        """Usage, timings and, if asked for, hashes."""
        ends = [choice.ended for choice in self.choices if choice.ended is not None]
        result: dict[str, Any] = {
            "usage": usage(ends, len(self.completion.jobs)),
            "timings": timings(ends[0]),
        }
        if self.request.logits_hash:
            result["logits_hash"] = [ended.logits_hash for ended in ends]
        return result

    def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        choices = []
        for choice in self.choices:
            assert choice.ended is not None
            scored = self.request.logprobs is not None
            choices.append(
                {
                    "index": choice.index,
                    "text": choice.text,
                    "logprobs": completion_logprobs(choice.scores, choice.tokens, 0, self.model.tokenizer)
                    if scored
                    else None,
                    "finish_reason": finish_reason(choice.ended),
                }
            )
        return self.around | {"choices": choices} | self.figures()

    async def chunks(self, tickets: list[Ticket]) -> AsyncGenerator[bytes, None]:
        """One event per token."""
        events = sse.Chunks(self.around)
        for choice in self.choices:
            if choice.text:
                yield events.data([self._delta(choice.index, choice.text, None, None)])
        async for index, event in merged(tickets):
            if isinstance(event, PromptScores) and len(event.scores) > _MANY_SCORES:
                yield await anyio.to_thread.run_sync(self._event, events, index, event, True)
            else:
                yield self._event(events, index, event)
        figures = self.figures()
        if not (self.request.stream_options and self.request.stream_options.include_usage):
            del figures["usage"]
        if "usage" in figures or "logits_hash" in figures:
            yield events.data([], figures)
        yield sse.DONE

    def _event(self, events: sse.Chunks, index: int, event: Event, slowly: bool = False) -> bytes:
        before, logprobs = len(self.choices[index].text), None
        text, scores, tokens = self.take(index, event)
        if self.request.logprobs is not None and tokens:
            logprobs = completion_logprobs(scores, tokens, before, self.model.tokenizer)
        reason = finish_reason(event) if isinstance(event, Ended) else None
        more = {"timings": timings(event)} if isinstance(event, Ended) else None
        return events.data([self._delta(index, text, logprobs, reason)], more, slowly=slowly)

    @staticmethod
    def _delta(index: int, text: str, logprobs: Any, reason: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


def endpoint(service: Service) -> Any:
    """The endpoint."""

    async def completions(request: Request) -> Response:
        body = await read(request, CompletionRequest, service)
        model, batcher = service.ready()
        completion = await anyio.to_thread.run_sync(completion_jobs, body, model, client_of(request))
        tickets = batcher.submit_all([job for jobs in completion.jobs for job in jobs])
        result = Answer(body, model, completion)
        if body.stream:
            chunks = result.chunks(tickets)
            return await stream_response(request, chunks, tickets, lambda: note(request, result.figures()))

        async def complete() -> None:
            async for index, event in merged(tickets):
                result.take(index, event)

        await unless_gone(request, complete())
        note(request, result.figures())
        if sum(len(choice.scores) for choice in result.choices) > _MANY_SCORES:
            return await long_answer(result.whole)
        return answer(result.whole())

    return completions
