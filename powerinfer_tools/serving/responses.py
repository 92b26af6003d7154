"""POST /v1/responses: OpenAI's newer API, as an adapter of chat requests. Nothing is stored."""

import time
from collections.abc import AsyncGenerator
from typing import Any

import anyio.to_thread
from starlette.requests import Request
from starlette.responses import Response

from powerinfer_tools.serving import sse
from powerinfer_tools.serving.answers import finish_reason, new_id
from powerinfer_tools.serving.blocks import Block, Blocks, Change
from powerinfer_tools.serving.chat_run import ChatRun
from powerinfer_tools.serving.faults import RequestFault
from powerinfer_tools.serving.http import answer, client_of, read, unless_gone
from powerinfer_tools.serving.jobs import Ended
from powerinfer_tools.serving.responses_schemas import Item, ResponsesChoice, ResponsesRequest
from powerinfer_tools.serving.schemas import ChatRequest
from powerinfer_tools.serving.service import Service
from powerinfer_tools.serving.streaming import note_end, stream_response
from powerinfer_tools.serving.tickets import Ticket


def chat_request(body: ResponsesRequest) -> ChatRequest:
    """The same request in the form of chat completions."""
    if body.previous_response_id is not None:
        raise RequestFault(
            "previous_response_id: responses are not stored; send the whole conversation", code="unsupported"
        )
    other = next((tool.type for tool in body.tools or () if tool.type != "function"), None)
    if other is not None:
        raise RequestFault(f"tools: {other[:40]!r} does not exist here, functions do", code="unsupported")
    items = [Item(role="user", content=body.input)] if isinstance(body.input, str) else body.input
    first = [{"role": "system", "content": body.instructions}] if body.instructions else []
    form = body.text.format if body.text is not None else None
    values: dict[str, Any] = {
        "messages": [*first, *(message for item in items for message in _message(item))],
        "max_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "tools": [
            {"function": tool.model_dump(include={"name", "description", "parameters"})}
            for tool in body.tools or ()
        ],
        "tool_choice": {"function": {"name": body.tool_choice.name or ""}}
        if isinstance(body.tool_choice, ResponsesChoice)
        else body.tool_choice,
    }
    if form is not None:
        values["response_format"] = {"type": form.type, "schema": form.schema_}
    return ChatRequest.model_validate(values)


def _message(item: Item) -> list[dict[str, Any]]:
    if item.type == "function_call":
        call = {
            "id": item.call_id,
            "function": {"name": item.name or "", "arguments": item.arguments or "{}"},
        }
        return [{"role": "assistant", "content": None, "tool_calls": [call]}]
    if item.type == "function_call_output":
        return [{"role": "tool", "tool_call_id": item.call_id, "content": _plain(item.output)}]
    if item.type == "reasoning":
        return []
    if item.role is None:
        raise RequestFault(f"input: an item of the kind {str(item.type)[:40]!r}", code="unsupported_content")
    return [{"role": item.role, "content": _plain(item.content)}]


def _plain(content: Any) -> Any:
    return content if content is None or isinstance(content, str) else [part.model_dump() for part in content]


class Answer:
    """The answer to one request."""

    def __init__(self, body: ResponsesRequest, run: ChatRun) -> None:
        self.body, self.run, self.blocks = body, run, Blocks()
        self.id, self.created = new_id("resp").replace("-", "_"), int(time.time())
        self.ended: Ended | None = None
        self._number = -1

    def whole(self) -> dict[str, Any]:
        """The answer in one piece, complete or as far as it has been generated."""
        ended = self.ended
        length = ended is not None and finish_reason(ended) == "length"
        status = "in_progress" if ended is None else "incomplete" if length else "completed"
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if length else None,
            "instructions": self.body.instructions,
            "max_output_tokens": self.body.max_output_tokens,
            "metadata": self.body.metadata or {},
            "model": self.run.model.name,
            "output": [] if ended is None else [_item(block, "completed") for block in self.blocks.all],
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "store": False,
            "temperature": self.run.jobs[0].options.sampling.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": "auto",
            "tools": [tool.model_dump() for tool in self.body.tools or ()],
            "top_p": self.run.jobs[0].options.sampling.top_p,
            "usage": None if ended is None else _usage(ended),
        }

    async def events(self, tickets: list[Ticket]) -> AsyncGenerator[bytes, None]:
        """The answer as events."""
        for name in ("created", "in_progress"):
            yield self._event(f"response.{name}", response=self.whole())
        async for step in self.run.steps(tickets):
            self.ended = step.ended or self.ended
            for change in self.blocks.take(step.parts):
                for event in self._changes(change):
                    yield event
        for change in self.blocks.close():
            for event in self._changes(change):
                yield event
        response = self.whole()
        yield self._event(f"response.{response['status']}", response=response)

    def _event(self, kind: str, **fields: Any) -> bytes:
        self._number += 1
        return sse.named(kind, {"type": kind, "sequence_number": self._number, **fields})

    def _changes(self, change: Change) -> list[bytes]:
        block = change.block
        place = {"item_id": _id(block), "output_index": block.index}
        part = place | {"content_index": 0}
        if change.what == "open":
            empty = Block(block.index, block.kind, block.id, block.name)
            item = _item(empty, "in_progress")
            added = self._event("response.output_item.added", output_index=block.index, item=item)
            if block.kind != "text":
                return [added]
            return [added, self._event("response.content_part.added", **part, part=_text_part(""))]
        if change.what == "delta":
            return [self._event(f"{_EVENTS[block.kind]}.delta", **(place if block.kind == "call" else part),
                                delta=change.text)]  # fmt: skip
        done = self._event(
            "response.output_item.done", output_index=block.index, item=_item(block, "completed")
        )
        if block.kind == "call":
            return [
                self._event(f"{_EVENTS['call']}.done", **place, name=block.name, arguments=block.text),
                done,
            ]
        finished = self._event(f"{_EVENTS[block.kind]}.done", **part, text=block.text)
        if block.kind == "reasoning":
            return [finished, done]
        return [
            finished,
            self._event("response.content_part.done", **part, part=_text_part(block.text)),
            done,
        ]


_EVENTS = {
    "text": "response.output_text",
    "reasoning": "response.reasoning_text",
    "call": "response.function_call_arguments",
}
_IDS = {"text": "msg_", "reasoning": "rs_", "call": "fc_"}


def _id(block: Block) -> str:
    return block.id.replace("block-", _IDS[block.kind])


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _item(block: Block, status: str) -> dict[str, Any]:
    if block.kind == "call":
        return {
            "type": "function_call",
            "id": _id(block),
            "call_id": block.id.replace("block-", "call_"),
            "name": block.name,
            "arguments": block.text,
            "status": status,
        }
    if block.kind == "reasoning":
        content = [{"type": "reasoning_text", "text": block.text}] if block.text else []
        return {"type": "reasoning", "id": _id(block), "summary": [], "content": content, "status": status}
    return {
        "type": "message",
        "id": _id(block),
        "role": "assistant",
        "status": status,
        "content": [_text_part(block.text)] if block.text else [],
    }


def _usage(ended: Ended) -> dict[str, Any]:
    return {
        "input_tokens": ended.prompt_tokens,
        "input_tokens_details": {"cached_tokens": ended.reused_tokens},
        "output_tokens": ended.tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": ended.prompt_tokens + ended.tokens,
    }


def endpoint(service: Service) -> Any:
    """The endpoint."""

    async def responses(request: Request) -> Response:
        body = await read(request, ResponsesRequest, service)
        model, batcher = service.ready()

        def prepare() -> ChatRun:
            return ChatRun(chat_request(body), model, client_of(request))

        run = await anyio.to_thread.run_sync(prepare)
        tickets = batcher.submit_all(run.jobs)
        result = Answer(body, run)
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

    return responses
