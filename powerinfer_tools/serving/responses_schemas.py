"""The supported part of the requests of OpenAI's Responses API."""

from typing import Annotated, Any, Literal

from pydantic import Field

from powerinfer_tools.serving.schemas import Loose, TextPart


class Item(Loose):
    """An item of the input: a message, a call, or the output of a call."""

    type: str | None = None
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | list[TextPart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[TextPart] | None = None


class ResponsesTool(Loose):
    """A function that the model may call. Tools of other kinds are refused."""

    type: str = "function"
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None


class ResponsesChoice(Loose):
    """The function that must be called."""

    type: str = "function"
    name: str | None = None


class TextForm(Loose):
    """The required form of the text."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None


class TextOptions(Loose):
    """Options of the text output."""

    format: TextForm | None = None


class ResponsesRequest(Loose):
    """POST /v1/responses."""

    model: str | None = None
    input: str | Annotated[list[Item], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Annotated[int | None, Field(ge=1)] = None
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float | None, Field(ge=0, le=1)] = None
    stream: bool | None = None
    tools: list[ResponsesTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponsesChoice | None = None
    text: TextOptions | None = None
    previous_response_id: str | None = None
    metadata: dict[str, Any] | None = None
