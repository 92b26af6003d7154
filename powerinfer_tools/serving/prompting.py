"""Chat requests → prompts: messages in the form that templates read, and tools for models without them."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from powerinfer_tools.serving.faults import RequestFault, too_long
from powerinfer_tools.serving.schemas import ChatMessage, TextPart, Tool
from powerinfer_tools.serving.served_model import ServedModel
from powerinfer_tools.serving.translation import require_short
from powerinfer_tools.text.chat import TemplateInputs

_TOOLS_TEXT = """\
You may call functions to answer. The functions, as JSON schemas:
<tools>
{tools}
</tools>
To call one, write its name and arguments as JSON between tags, once for each call:
<tool_call>
{{"name": "NAME", "arguments": {{"KEY": "VALUE"}}}}
</tool_call>"""


def prompt_ids(
    messages: Sequence[ChatMessage],
    model: ServedModel,
    tools: Sequence[Tool] | None,
    settings: Mapping[str, Any] | None,
) -> list[int]:
    """The prompt as token ids. Raises ChatTemplateError, or RequestFault if it does not fit."""
    turns, context = conversation(messages, model, tools, settings)
    require_short("".join(str(turn["content"]) for turn in turns), model)
    ids = model.template.ids(turns, context)
    if len(ids) > model.context:
        raise too_long(len(ids), model.context)
    return ids


def prompt_text(
    messages: Sequence[ChatMessage],
    model: ServedModel,
    tools: Sequence[Tool] | None,
    settings: Mapping[str, Any] | None,
) -> str:
    """The prompt as text."""
    return model.template.render(*conversation(messages, model, tools, settings))


def conversation(
    messages: Sequence[ChatMessage],
    model: ServedModel,
    tools: Sequence[Tool] | None,
    settings: Mapping[str, Any] | None,
) -> tuple[list[dict[str, Any]], TemplateInputs]:
    """The variables with which the template is rendered."""
    source = model.template_source or ""
    turns = [_turn(message, source) for message in messages]
    described = [tool.model_dump(exclude_none=True) for tool in tools or ()]
    if "tools" not in source:
        turns, described = _spelled_out(turns, described), []
    context = TemplateInputs(tools=described or None, settings=dict(settings or {}))
    return turns, context


def _turn(message: ChatMessage, source: str) -> dict[str, Any]:
    role = message.role
    if role == "developer" and "developer" not in source:
        role = "system"
    if role == "function":
        role = "tool"
    turn: dict[str, Any] = {"role": role, "content": _text(message.content)}
    if message.tool_calls:
        turn["tool_calls"] = [
            {
                "id": call.id or f"call_{number}",
                "type": "function",
                "function": {"name": call.function.name, "arguments": _object(call.function.arguments)},
            }
            for number, call in enumerate(message.tool_calls)
        ]
    for name in ("name", "tool_call_id", "reasoning_content"):
        value = getattr(message, name)
        if value is not None:
            turn[name] = value
    return turn


def _text(content: str | list[TextPart] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    for part in content:
        if part.type not in ("text", "input_text", "output_text"):
            raise RequestFault(
                f"messages: a part of the kind {part.type[:40]!r}; this model reads text alone",
                code="unsupported_content",
            )
    return "".join(part.text or "" for part in content)


def _object(arguments: str | dict[str, Any] | None) -> Any:
    """The arguments as values: templates write them as JSON themselves."""
    if not isinstance(arguments, str):
        return arguments or {}
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments


def _spelled_out(turns: Sequence[dict[str, Any]], tools: Sequence[Any]) -> list[dict[str, Any]]:
    """For templates without tools: these are put into the system prompt, calls and results into messages."""
    result = [_plain(turn) for turn in turns]
    if tools:
        listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        text = _TOOLS_TEXT.format(tools=listed)
        if result and result[0]["role"] == "system":
            result[0] = result[0] | {"content": f"{result[0]['content']}\n\n{text}"}
        else:
            result.insert(0, {"role": "system", "content": text})
    return result


def _plain(turn: dict[str, Any]) -> dict[str, Any]:
    if turn["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{turn['content']}\n</tool_response>"}
    calls = turn.get("tool_calls")
    if not calls:
        return turn
    written = [
        f"<tool_call>\n{json.dumps(call['function'], ensure_ascii=False)}\n</tool_call>" for call in calls
    ]
    return {"role": turn["role"], "content": "\n".join([*filter(None, [turn["content"]]), *written])}
