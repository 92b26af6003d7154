"""The requests of the OpenAI API as pydantic models. Unknown fields are ignored; null means absent."""

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

_TOP = 20  # likeliest tokens that may be asked for
_MANY = 16  # answers to one request
_STOPS = 16
_BIASES = 1024
_SAMPLERS = 32


class Loose(BaseModel):
    """A request or a part of one; unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True, protected_namespaces=())


class TextPart(Loose):
    """A part of a message. Only text parts are supported."""

    type: str
    text: str | None = None


class FunctionCall(Loose):
    """The function's name, and its arguments as JSON text."""

    name: str
    arguments: str | dict[str, Any] | None = None


class ToolCall(Loose):
    """A tool call in a message of the assistant."""

    id: str | None = None
    type: str | None = "function"
    function: FunctionCall


class ChatMessage(Loose):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class Function(Loose):
    """A function that the model may call."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Loose):
    """A tool; only functions are supported."""

    type: Literal["function"] = "function"
    function: Function


class NamedFunction(Loose):
    """The name of a function."""

    name: str


class NamedTool(Loose):
    """The tool that must be called."""

    type: Literal["function"] = "function"
    function: NamedFunction


class JsonSchema(Loose):
    """A named JSON schema."""

    name: str | None = None
    strict: bool | None = None
    json_schema: Annotated[dict[str, Any] | bool | None, Field(alias="schema")] = None


class ResponseFormat(Loose):
    """The required form of the answer. llama.cpp's variant has the schema beside the type."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None


class StreamOptions(Loose):
    """Options of a stream."""

    include_usage: bool | None = None


class Generating(Loose):
    """The fields that chat and completion requests share."""

    model: str | None = None
    max_tokens: Annotated[int | None, Field(ge=-1)] = None
    temperature: Annotated[float | None, Field(ge=0, le=100)] = None
    top_p: Annotated[float | None, Field(ge=0, le=1)] = None
    n: Annotated[int | None, Field(ge=1, le=_MANY)] = None
    stop: str | Annotated[list[str], Field(max_length=_STOPS)] | None = None
    seed: int | None = None
    logit_bias: Annotated[dict[str, float] | None, Field(max_length=_BIASES)] = None
    presence_penalty: Annotated[float | None, Field(ge=-100, le=100)] = None
    frequency_penalty: Annotated[float | None, Field(ge=-100, le=100)] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    # llama.cpp's own
    top_k: Annotated[int | None, Field(ge=-1)] = None
    min_p: Annotated[float | None, Field(ge=0, le=1)] = None
    typical_p: Annotated[float | None, Field(ge=0, le=1)] = None
    repeat_penalty: Annotated[float | None, Field(gt=0)] = None
    repeat_last_n: Annotated[int | None, Field(ge=-1)] = None
    samplers: Annotated[list[str] | str | None, Field(max_length=_SAMPLERS)] = None
    ignore_eos: bool | None = None
    cache_prompt: bool | None = None
    grammar: str | None = None
    json_schema: dict[str, Any] | None = None
    response_format: ResponseFormat | None = None
    # ours
    logits_hash: bool | None = None


class ChatRequest(Generating):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int | None, Field(ge=-1)] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=_TOP)] = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CompletionRequest(Generating):
    """POST /v1/completions."""

    prompt: str | list[int] | list[str] | list[list[int]]
    suffix: str | None = None
    echo: bool | None = None
    logprobs: Annotated[int | None, Field(ge=0, le=_TOP)] = None
    best_of: int | None = None


class TokenizeRequest(Loose):
    """POST /tokenize, with llama.cpp's field names and vLLM's."""

    content: Annotated[str, Field(validation_alias=AliasChoices("content", "prompt"))]
    add_special: Annotated[
        bool, Field(validation_alias=AliasChoices("add_special", "add_special_tokens"))
    ] = False
    parse_special: bool = True
    with_pieces: bool = False


class DetokenizeRequest(Loose):
    """POST /detokenize."""

    tokens: list[int]


class TemplateRequest(Loose):
    """POST /apply-template."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    tools: list[Tool] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
