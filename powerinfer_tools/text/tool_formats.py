"""How families of models write calls of tools, and how to read these.

A format has markers around calls; the text between the markers is read in whichever of a few notations it is
written. Text that looks like a call but cannot be read as one stays text.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Call:
    """One call: the function's name, and its arguments as JSON text."""

    name: str
    arguments: str


@dataclass(frozen=True)
class ToolFormat:
    """``opener`` begins calls and ``closer`` ends them ("" : the end of the answer). ``bare``: an answer that
    begins with ``{`` consists of calls, too. ``marker`` occurs in templates of models with this format."""

    name: str
    marker: str
    opener: str
    closer: str = ""
    bare: bool = False


FORMATS = (
    ToolFormat("deepseek", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    ToolFormat("mistral", "[TOOL_CALLS]", "[TOOL_CALLS]"),
    ToolFormat("phi-4", "<|/tool_call|>", "<|tool_call|>", "<|/tool_call|>"),
    ToolFormat("granite", "<|tool_call|>", "<|tool_call|>"),
    ToolFormat("hermes", "<tool_call>", "<tool_call>", "</tool_call>"),
    ToolFormat("llama-3", "<|python_tag|>", "<|python_tag|>", bare=True),
    ToolFormat("llama-3", '"parameters"', "<|python_tag|>", bare=True),
)
HERMES = next(entry for entry in FORMATS if entry.name == "hermes")


def format_of(template: str | None) -> ToolFormat:
    """The format for which a chat template is made; Hermes' if the template knows none."""
    return next((entry for entry in FORMATS if template and entry.marker in template), HERMES)


def parse_calls(text: str) -> list[Call] | None:
    """The calls in ``text``, or None if it does not consist of calls."""
    for reader in _READERS:
        calls = reader(text.strip())
        if calls:
            return calls
    return None


def _json_values(text: str) -> list[Call] | None:
    """One or more objects, or arrays of objects, with commas, semicolons or space between them."""
    decoder, calls = json.JSONDecoder(), list[Call]()
    rest = text
    while rest:
        try:
            value, end = decoder.raw_decode(rest)
        except (ValueError, RecursionError):
            return None
        for entry in value if isinstance(value, list) else [value]:
            call = _call_of(entry)
            if call is None:
                return None
            calls.append(call)
        rest = rest[end:].lstrip(" \t\r\n,;")
    return calls


def _call_of(entry: Any) -> Call | None:
    if not isinstance(entry, dict):
        return None
    if isinstance(entry.get("function"), dict):
        entry = entry["function"]
    name = entry.get("name")
    arguments: Any = next((entry[key] for key in ("arguments", "parameters", "args") if key in entry), {})
    return Call(name, _as_json(arguments)) if isinstance(name, str) and name else None


def _as_json(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _value(text: str) -> Any:
    """A parameter written as text: its value if it is JSON, else the text itself."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


_NAME = r"[\w.-]{1,64}"
_TAGGED = re.compile(rf"<function=({_NAME})>(.*?)(?:</function>|\Z)", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([\w.-]{1,64})>\n?(.*?)\n?</parameter>", re.DOTALL)
_KEYED = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)
_BRACKETED = re.compile(rf"({_NAME})(?:\[ARGS\]|(?=\{{))")
_DEEPSEEK = re.compile(r"<｜tool▁call▁begin｜>(.*?)<｜tool▁sep｜>(.*?)(?:<｜tool▁call▁end｜>|\Z)", re.DOTALL)
_FENCED = re.compile(r"\A(\S+)\n```(?:json)?\n(.*?)\n?```\s*\Z", re.DOTALL)


def _tagged(text: str) -> list[Call] | None:
    """``<function=NAME>`` with ``<parameter=KEY>`` or JSON inside."""
    calls = []
    for name, body in _TAGGED.findall(text):
        pairs = _PARAMETER.findall(body)
        inside = body.strip()
        if not pairs and inside.startswith("{"):
            calls.append(Call(name, inside))
        else:
            calls.append(Call(name, _as_json({key: _value(value) for key, value in pairs})))
    return calls


def _keyed(text: str) -> list[Call] | None:
    """The name on a line of its own, then pairs of ``<arg_key>`` and ``<arg_value>``."""
    name = text.split("<arg_key>", 1)[0].strip()
    pairs = _KEYED.findall(text)
    if not pairs or not re.fullmatch(_NAME, name):
        return None
    return [Call(name, _as_json({key.strip(): _value(value.strip()) for key, value in pairs}))]


def _bracketed(text: str) -> list[Call] | None:
    """``NAME[ARGS]{…}``, one or more, also with the marker repeated between them."""
    decoder, calls = json.JSONDecoder(), list[Call]()
    rest = text
    while rest:
        match = _BRACKETED.match(rest)
        if match is None:
            return None
        try:
            value, end = decoder.raw_decode(rest, match.end())
        except (ValueError, RecursionError):
            return None
        calls.append(Call(match.group(1), _as_json(value)))
        rest = rest[end:].strip().removeprefix("[TOOL_CALLS]").strip()
    return calls


def _deepseek(text: str) -> list[Call] | None:
    calls = []
    for kind, body in _DEEPSEEK.findall(text):
        fenced = _FENCED.match(body.strip())
        calls.append(Call(*fenced.groups()) if fenced else Call(kind.strip(), body.strip()))
    return calls


_READERS: Sequence[Callable[[str], list[Call] | None]] = (
    _deepseek,
    _tagged,
    _keyed,
    _bracketed,
    _json_values,
)
