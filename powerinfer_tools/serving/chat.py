"""POST /v1/chat/completions."""

import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

import anyio.to_thread
from starlette.requests import Request
from starlette.responses import Response

from powerinfer_tools.serving import sse
from powerinfer_tools.serving.answers import chat_logprob, finish_reason, new_id, timings, usage
from powerinfer_tools.serving.chat_run import ChatRun, Step
from powerinfer_tools.serving.http import answer, client_of, read, unless_gone
from powerinfer_tools.serving.jobs import Ended
from powerinfer_tools.serving.schemas import ChatRequest
from powerinfer_tools.serving.service import Service
from powerinfer_tools.serving.streaming import note, stream_response
from powerinfer_tools.serving.tickets import Ticket
from powerinfer_tools.text.answer_parts import Content, Reasoning
from powerinfer_tools.text.tool_formats import Call


@dataclass
class Choice:
    """One answer as it grows."""

    content: str = ""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    ended: Ended | None = None

    def finish(self) -> str:
        """Why it ended."""
        assert self.ended is not None
        reason = finish_reason(self.ended)
        return "tool_calls" if self.calls and reason == "stop" else reason

    def message(self) -> dict[str, Any]:
        """The answer in one piece."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content or None, "refusal": None}
        if not self.calls:
            message["content"] = self.content
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.calls:
            message["tool_calls"] = self.calls
        return message


class Answer:
    """The answers to one request, whole or as chunks."""

    def __init__(self, run: ChatRun) -> None:
        self.run = run
        self.id, self.created = new_id("chatcmpl"), int(time.time())
        self.choices = [Choice() for _ in run.jobs]
        self._events = sse.Chunks(self.around(_CHUNK))

    def take(self, step: Step) -> list[dict[str, Any]]:
        """Remember the additions of ``step``; returns the deltas that express them."""
        choice, deltas = self.choices[step.index], list[dict[str, Any]]()
        for part in step.parts:
            if isinstance(part, Content):
                choice.content += part.text
                deltas.append({"content": part.text})
            elif isinstance(part, Reasoning):
                choice.reasoning += part.text
                deltas.append({"reasoning_content": part.text})
            else:
                deltas += self._call(choice, part)
        if step.token is not None and step.token.score is not None:
            choice.logprobs.append(chat_logprob(step.token.score, self.run.model.tokenizer))
        choice.ended = step.ended or choice.ended
        return deltas

    @staticmethod
    def _call(choice: Choice, call: Call) -> list[dict[str, Any]]:
        """Id and name come once, then the arguments."""
        index, function = len(choice.calls), {"name": call.name, "arguments": call.arguments}
        made = {"id": new_id("call").replace("-", "_"), "type": "function", "function": function}
        choice.calls.append(made)
        opening = made | {"index": index, "function": {"name": call.name, "arguments": ""}}
        arguments = {"index": index, "function": {"arguments": call.arguments}}
        return [{"tool_calls": [opening]}, {"tool_calls": [arguments]}]

    def figures(self) -> dict[str, Any]:
        """Usage, timings and, if asked for, hashes."""
        ends = [choice.ended for choice in self.choices if choice.ended is not None]
        result: dict[str, Any] = {"usage": usage(ends), "timings": timings(ends[0])}
        if self.run.request.logits_hash:
            result["logits_hash"] = [ended.logits_hash for ended in ends]
        return result

    def around(self, kind: str) -> dict[str, Any]:
        """The fields around the choices."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.run.model.name,
            "system_fingerprint": self.run.model.system_fingerprint,
        }

    def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        scored = self.run.request.logprobs
        choices = [
            {
                "index": index,
                "message": choice.message(),
                "logprobs": {"content": choice.logprobs, "refusal": None} if scored else None,
                "finish_reason": choice.finish(),
            }
            for index, choice in enumerate(self.choices)
        ]
        return self.around("chat.completion") | {"choices": choices} | self.figures()

    async def chunks(self, tickets: list[Ticket]) -> AsyncGenerator[bytes, None]:
        """One event per token, after one for the role and before one for the end."""
        begun = set[int]()
        options = self.run.request.stream_options
        async for step in self.run.steps(tickets):
            if step.index not in begun:
                begun.add(step.index)
                yield self._chunk(step.index, {"role": "assistant", "content": ""})
            deltas = self.take(step)
            if step.token is not None:
                for chunk in self._token_chunks(step, deltas):
                    yield chunk
            if step.ended is not None:
                *before, last = deltas or [{}]
                for delta in before:
                    yield self._chunk(step.index, delta)
                figures: dict[str, Any] = {"timings": timings(step.ended)}
                if self.run.request.logits_hash:
                    figures["logits_hash"] = [step.ended.logits_hash]
                yield self._chunk(step.index, last, self.choices[step.index].finish(), figures)
        if options is not None and options.include_usage:
            yield self._events.data([], self.figures())
        yield sse.DONE

    def _token_chunks(self, step: Step, deltas: list[dict[str, Any]]) -> list[bytes]:
        scored = step.token is not None and step.token.score is not None
        score = self.choices[step.index].logprobs[-1:] if scored else []
        logprobs = {"content": score, "refusal": None} if score else None
        first, *more = deltas or [{}]
        return [
            self._chunk(step.index, first, None, {}, logprobs),
            *(self._chunk(step.index, delta) for delta in more),
        ]

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        reason: str | None = None,
        figures: dict[str, Any] | None = None,
        logprobs: Any = None,
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return self._events.data([choice], figures)


_CHUNK = "chat.completion.chunk"


def endpoint(service: Service) -> Any:
    """The endpoint."""

    async def chat(request: Request) -> Response:
        body = await read(request, ChatRequest, service)
        model, batcher = service.ready()
        run = await anyio.to_thread.run_sync(ChatRun, body, model, client_of(request))
        tickets = batcher.submit_all(run.jobs)
        result = Answer(run)
        if body.stream:
            chunks = result.chunks(tickets)
            return await stream_response(request, chunks, tickets, lambda: note(request, result.figures()))

        async def complete() -> None:
            async for step in run.steps(tickets):
                result.take(step)

        await unless_gone(request, complete())
        note(request, result.figures())
        return answer(result.whole())

    return chat
