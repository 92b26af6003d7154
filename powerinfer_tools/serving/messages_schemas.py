"""The supported part of the requests of Anthropic's Messages API."""

from typing import Annotated, Any, Literal

from pydantic import Field

from powerinfer_tools.serving.schemas import Loose


class Piece(Loose):
    """A block of a message's content. Only the fields of its own kind are present."""

    type: str
    text: str | None = None
    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: "str | list[Piece] | None" = None


class Turn(Loose):
    """One message."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Piece]


class MessagesTool(Loose):
    """A function that the model may call."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    description: str | None = None
    input_schema: dict[str, Any] | None = None


class MessagesChoice(Loose):
    """Whether the model may, must or must not call a tool."""

    type: Literal["auto", "any", "tool", "none"] = "auto"
    name: str | None = None


class MessagesRequest(Loose):
    """POST /v1/messages."""

    model: str | None = None
    messages: Annotated[list[Turn], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] = 4096
    system: str | list[Piece] | None = None
    stop_sequences: list[str] | None = None
    temperature: Annotated[float | None, Field(ge=0, le=1)] = None
    top_p: Annotated[float | None, Field(ge=0, le=1)] = None
    top_k: Annotated[int | None, Field(ge=0)] = None
    stream: bool | None = None
    tools: list[MessagesTool] | None = None
    tool_choice: MessagesChoice | None = None
