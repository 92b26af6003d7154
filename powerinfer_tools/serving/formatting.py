"""The required form of an answer: response formats, grammars, and mandatory tool calls."""

from collections.abc import Sequence
from typing import Any

from powerinfer_tools.generate.constraints import Grammar
from powerinfer_tools.serving.faults import RequestFault
from powerinfer_tools.serving.schemas import ChatRequest, Generating, NamedTool, Tool
from powerinfer_tools.text.tokenizer import Tokenizer
from powerinfer_tools.text.tool_formats import ToolFormat


def grammar_of(request: Generating, tokenizer: Tokenizer) -> Grammar | None:
    """The grammar that a request asks for. Raises SamplingError for one that is not valid."""
    schema = _schema(request)
    if request.grammar and schema is not None:
        raise RequestFault("choose one of grammar and a JSON schema")
    if request.grammar:
        return Grammar.of_text(tokenizer, request.grammar)
    return None if schema is None else Grammar.of_schema(tokenizer, schema)


def _schema(request: Generating) -> dict[str, Any] | None:
    form = request.response_format
    if form is None or form.type == "text":
        return request.json_schema
    if form.type == "json_object":
        return form.schema_ or {"type": "object"}
    inner = form.json_schema.json_schema if form.json_schema is not None else form.schema_
    if not isinstance(inner, dict):
        raise RequestFault("response_format: json_schema has no schema")
    return inner


def offered(request: ChatRequest) -> list[Tool]:
    """The tools that the model may call for this answer."""
    tools = request.tools or []
    choice = request.tool_choice
    if choice == "none":
        return []
    if isinstance(choice, NamedTool):
        named = [tool for tool in tools if tool.function.name == choice.function.name]
        if not named:
            raise RequestFault(f"tool_choice: no tool is called {choice.function.name!r}")
        return named
    if choice == "required" and not tools:
        raise RequestFault("tool_choice: required, and there are no tools")
    return tools


def is_forced(request: ChatRequest) -> bool:
    """Whether the answer must be a call."""
    return request.tool_choice == "required" or isinstance(request.tool_choice, NamedTool)


def call_grammar(tools: Sequence[Tool], form: ToolFormat, tokenizer: Tokenizer) -> Grammar:
    """One call of one of ``tools``, as JSON alone."""
    key = "parameters" if form.bare else "arguments"
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.function.name},
                key: tool.function.parameters or {"type": "object"},
            },
            "required": ["name", key],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    return Grammar.of_schema(tokenizer, calls[0] if len(calls) == 1 else {"anyOf": calls})
