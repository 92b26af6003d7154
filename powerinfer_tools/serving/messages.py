"""POST /v1/messages: Anthropic's API, as an adapter of chat requests."""

import json
from collections.abc import AsyncGenerator
from typing import Any

import anyio.to_thread
from starlette.requests import Request
from starlette.responses import Response

from powerinfer_tools.generate.generation import Outcome
from powerinfer_tools.serving import sse
from powerinfer_tools.serving.answers import new_id
from powerinfer_tools.serving.blocks import Block, Blocks, Change
from powerinfer_tools.serving.chat_run import ChatRun
from powerinfer_tools.serving.faults import RequestFault
from powerinfer_tools.serving.http import answer, client_of, read, unless_gone
from powerinfer_tools.serving.jobs import Ended
from powerinfer_tools.serving.messages_schemas import MessagesRequest, Piece, Turn
from powerinfer_tools.serving.schemas import ChatRequest
from powerinfer_tools.serving.service import Service
from powerinfer_tools.serving.streaming import note_end, stream_response
from powerinfer_tools.serving.tickets import Ticket

_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def chat_request(body: MessagesRequest) -> ChatRequest:
    """The same request in the form of OpenAI's API."""
    system = [{"role": "system", "content": _text(body.system)}] if body.system else []
    turns = [message for turn in body.messages for message in _messages(turn)]
    choice = body.tool_choice
    values: dict[str, Any] = {
        "messages": [*system, *turns],
        "max_tokens": body.max_tokens,
        "stop": body.stop_sequences,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "tools": [
            {
                "function": {
                    "name": tool.name,
                    "description": tool.description,
                    "parameters": tool.input_schema,
                }
            }
            for tool in body.tools or ()
        ],
    }
    if choice is not None and choice.type == "tool":
        values["tool_choice"] = {"function": {"name": choice.name or ""}}
    elif choice is not None:
        values["tool_choice"] = _CHOICES[choice.type]
    return ChatRequest.model_validate(values)


def _messages(turn: Turn) -> list[dict[str, Any]]:
    """A turn may hold results of tools: these become messages of their own in front of its text."""
    if isinstance(turn.content, str):
        return [{"role": turn.role, "content": turn.content}]
    results = [
        {"role": "tool", "tool_call_id": piece.tool_use_id, "content": _text(piece.content)}
        for piece in turn.content
        if piece.type == "tool_result"
    ]
    calls = [
        {"id": piece.id, "function": {"name": piece.name or "", "arguments": piece.input or {}}}
        for piece in turn.content
        if piece.type == "tool_use"
    ]
    thought = "".join(piece.thinking or "" for piece in turn.content if piece.type == "thinking")
    text = _text([piece for piece in turn.content if piece.type not in _APART])
    if results and not text:
        return results
    message: dict[str, Any] = {"role": turn.role, "content": text, "tool_calls": calls or None}
    return [*results, message | ({"reasoning_content": thought} if thought else {})]


_APART = ("tool_result", "tool_use", "thinking", "redacted_thinking")


def _text(content: str | list[Piece] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    wrong = next((piece.type for piece in content if piece.type != "text"), None)
    if wrong is not None:
        raise RequestFault(
            f"messages: a block of the kind {wrong[:40]!r}; this model reads text alone",
            code="unsupported_content",
        )
    return "".join(piece.text or "" for piece in content)


class Message:
    """The answer to one request."""

    def __init__(self, run: ChatRun) -> None:
        self.run, self.blocks = run, Blocks()
        self.id = new_id("msg").replace("-", "_")
        self.ended: Ended | None = None

    def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        return self._head() | {"content": [_content(block) for block in self.blocks.all], **self._end()}

    async def events(self, tickets: list[Ticket]) -> AsyncGenerator[bytes, None]:
        """The answer as events."""
        yield sse.named("message_start", {"type": "message_start", "message": self._head()})
        async for step in self.run.steps(tickets):
            self.ended = step.ended or self.ended
            for change in self.blocks.take(step.parts):
                yield _event(change)
        for change in self.blocks.close():
            yield _event(change)
        end = self._end()
        usage = end.pop("usage")
        yield sse.named("message_delta", {"type": "message_delta", "delta": end, "usage": usage})
        yield sse.named("message_stop", {"type": "message_stop"})

    def _head(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.run.model.name,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {"input_tokens": len(self.run.jobs[0].prompt), "output_tokens": 0},
        }

    def _end(self) -> dict[str, Any]:
        ended = self.ended
        assert ended is not None
        reasons = {Outcome.STOP_STRING: "stop_sequence", Outcome.LIMIT: "max_tokens"}
        reason = reasons.get(ended.outcome, "end_turn")
        if ended.outcome is Outcome.CONTEXT_FULL:
            reason = "max_tokens"
        return {
            "stop_reason": "tool_use" if self.blocks.called and reason == "end_turn" else reason,
            "stop_sequence": ended.stop_string,
            "usage": {
                "input_tokens": ended.prompt_tokens - ended.reused_tokens,
                "cache_read_input_tokens": ended.reused_tokens,
                "output_tokens": ended.tokens,
            },
        }


def _content(block: Block) -> dict[str, Any]:
    if block.kind == "call":
        return _opening(block) | {"input": _loaded(block.text)}
    if block.kind == "reasoning":
        return {"type": "thinking", "thinking": block.text, "signature": ""}
    return {"type": "text", "text": block.text}


def _loaded(arguments: str) -> Any:
    try:
        return json.loads(arguments or "{}")
    except (ValueError, RecursionError):  # the model's own text
        return {"arguments": arguments}


def _opening(block: Block) -> dict[str, Any]:
    if block.kind == "call":
        return {
            "type": "tool_use",
            "id": block.id.replace("block-", "toolu_"),
            "name": block.name,
            "input": {},
        }
    return _content(Block(block.index, block.kind, block.id))


def _event(change: Change) -> bytes:
    index = change.block.index
    if change.what == "open":
        value = {"type": "content_block_start", "index": index, "content_block": _opening(change.block)}
    elif change.what == "close":
        value = {"type": "content_block_stop", "index": index}
    else:
        kinds = {
            "text": ("text_delta", "text"),
            "reasoning": ("thinking_delta", "thinking"),
            "call": ("input_json_delta", "partial_json"),
        }
        kind, field = kinds[change.block.kind]
        value = {"type": "content_block_delta", "index": index, "delta": {"type": kind, field: change.text}}
    return sse.named(str(value["type"]), value)


def endpoint(service: Service) -> Any:
    """The endpoint."""

    async def messages(request: Request) -> Response:
        body = await read(request, MessagesRequest, service)
        model, batcher = service.ready()

        def prepare() -> ChatRun:
            return ChatRun(chat_request(body), model, client_of(request))

        run = await anyio.to_thread.run_sync(prepare)
        tickets = batcher.submit_all(run.jobs)
        result = Message(run)
        if body.stream:
            events = result.events(tickets)
            return await stream_response(
                request, events, tickets, lambda: note_end(request, result.ended), done=False
            )

        async def complete() -> None:
            async for step in run.steps(tickets):
                result.blocks.take(step.parts)
                result.ended = step.ended or result.ended

        await unless_gone(request, complete())
        note_end(request, result.ended)
        return answer(result.whole())

    return messages


def counting(service: Service) -> Any:
    """POST /v1/messages/count_tokens."""

    async def count(request: Request) -> Response:
        body = await read(request, MessagesRequest, service)
        model, _ = service.ready()
        run = await anyio.to_thread.run_sync(lambda: ChatRun(chat_request(body), model, ""))
        return answer({"input_tokens": len(run.jobs[0].prompt)})

    return count
