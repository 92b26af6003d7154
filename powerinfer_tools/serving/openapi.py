"""GET /openapi.json: the endpoints and their requests, for programs."""

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import Response

from powerinfer_tools import __version__
from powerinfer_tools.serving import schemas
from powerinfer_tools.serving.http import answer
from powerinfer_tools.serving.messages_schemas import MessagesRequest
from powerinfer_tools.serving.responses_schemas import ResponsesRequest

_POSTS: dict[str, tuple[type[BaseModel], str, bool]] = {
    "/v1/chat/completions": (schemas.ChatRequest, "An answer to a conversation.", True),
    "/v1/completions": (schemas.CompletionRequest, "The continuation of a text.", True),
    "/v1/responses": (ResponsesRequest, "An answer, in OpenAI's newer form.", True),
    "/v1/messages": (MessagesRequest, "An answer, in Anthropic's form.", True),
    "/v1/messages/count_tokens": (MessagesRequest, "The number of tokens of a prompt.", False),
    "/tokenize": (schemas.TokenizeRequest, "The token ids of a text.", False),
    "/detokenize": (schemas.DetokenizeRequest, "The text of token ids.", False),
    "/apply-template": (schemas.TemplateRequest, "A conversation as the prompt that it becomes.", False),
}
_GETS = {
    "/health": "Whether the server accepts requests.",
    "/v1/models": "The model.",
    "/props": "The model and its settings.",
    "/slots": "The places for concurrent requests, and the request in each.",
    "/machine": "Speed, queue, memory and layers, for the page.",
    "/tokenizer_info": "The tokeniser's special tokens and the chat template.",
}
_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {name: {"type": "string"} for name in ("message", "type", "code")},
            "required": ["message", "type", "code"],
        }
    },
    "required": ["error"],
}
_STATUSES = {
    "400": "The request is not valid.",
    "401": "A key is needed.",
    "408": "The body arrived too slowly.",
    "413": "The body is too long.",
    "429": "This client has too many requests waiting.",
    "500": "The server failed.",
    "503": "Too many requests are waiting, or the model is loading.",
}


def document() -> dict[str, Any]:
    """The OpenAPI document."""
    kinds = {kind for kind, _, _ in _POSTS.values()}
    _, definitions = models_json_schema(
        [(kind, "validation") for kind in sorted(kinds, key=lambda kind: kind.__name__)],
        ref_template="#/components/schemas/{model}",
    )
    posts = {path: {"post": _post(kind, text, stream)} for path, (kind, text, stream) in _POSTS.items()}
    gets = {path: {"get": {"summary": text, "responses": _responses(stream=False)}}
            for path, text in _GETS.items()}  # fmt: skip
    return {
        "openapi": "3.1.0",
        "info": {"title": "powerinfer serve", "version": __version__},
        "paths": posts | gets,
        "components": {
            "schemas": definitions.get("$defs", {}) | {"Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _post(kind: type[BaseModel], text: str, stream: bool) -> dict[str, Any]:
    reference = {"$ref": f"#/components/schemas/{kind.__name__}"}
    return {
        "summary": text,
        "requestBody": {"required": True, "content": {"application/json": {"schema": reference}}},
        "responses": _responses(stream=stream),
    }


def _responses(*, stream: bool) -> dict[str, Any]:
    kinds: dict[str, Any] = {"application/json": {}}
    if stream:
        kinds["text/event-stream"] = {}  # OpenAPI 3.1 has no field for the schema of an event
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    faults = {status: {"description": text, "content": error} for status, text in _STATUSES.items()}
    return {"200": {"description": "The answer.", "content": kinds}} | faults


def endpoint() -> Any:
    """The endpoint."""
    value = document()

    async def openapi(request: Request) -> Response:
        del request
        return answer(value)

    return openapi
