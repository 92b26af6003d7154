"""Chat messages → token ids, by the template in the model's file.

The template is a program from an untrusted file: it is rendered in Jinja's immutable sandbox, in a process
with limits on time, memory and output (see `template_child.py`).

Messages, tools and documents are untrusted, too: `<|im_end|>` in a message is text and never becomes the
control token; only what the template itself writes does.
"""

import json
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from powerinfer_tools.errors import ChatTemplateError, RendererFailed
from powerinfer_tools.text.stand_ins import StandIns
from powerinfer_tools.text.template_worker import WORKER, WorkerLost
from powerinfer_tools.text.tokenizer import Tokenizer
from powerinfer_tools.text.vocabulary import MetadataSource

Role = Literal["system", "user", "assistant"]

MAX_TEMPLATE_CHARACTERS = 1 << 18
MAX_SECONDS = 2.0
_MEMORY_BYTES = 512 << 20
_OUTPUT_CHARACTERS = 1 << 20  # beyond four times the size of the messages
_START_SECONDS = 10.0  # for the process to start on a busy machine
_DETAIL = 300


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


Turn = Message | Mapping[str, Any]
"""A message, or one as an object of the OpenAI API has it: content may be a list of parts, and there may be
name, tool_calls, tool_call_id, reasoning_content."""


@dataclass(frozen=True)
class TemplateInputs:
    """The parts of a prompt besides the messages: tools as JSON schemas, documents, settings that templates
    read (such as enable_thinking), and whether the assistant's answer begins at the end of the prompt."""

    tools: Sequence[Mapping[str, Any]] | None = None
    documents: Sequence[Mapping[str, Any]] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    add_generation_prompt: bool = True


_NOTHING_MORE = TemplateInputs()


class Template(Protocol):
    """How a conversation becomes a prompt."""

    @property
    def notice(self) -> str | None:
        """A notice for the user about this template, if there is any."""
        ...

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings that end an answer, besides the model's own end tokens."""
        ...

    def render(self, messages: Sequence[Turn], inputs: TemplateInputs = _NOTHING_MORE) -> str:
        """The prompt as text, up to the beginning of the assistant's answer."""
        ...

    def ids(self, messages: Sequence[Turn], inputs: TemplateInputs = _NOTHING_MORE) -> list[int]:
        """The prompt as token ids, with at most one beginning-of-text token. Control tokens that are written
        in messages, tools or documents are text."""
        ...


class ChatTemplate:
    """The model's own template. `render` raises ChatTemplateError, always in one line."""

    notice: str | None = None
    stops: tuple[str, ...] = ()

    def __init__(self, source: str, tokenizer: Tokenizer) -> None:
        if len(source) > MAX_TEMPLATE_CHARACTERS:
            raise ChatTemplateError(
                f"the model's chat template has {len(source)} characters, "
                f"at most {MAX_TEMPLATE_CHARACTERS} are allowed"
            )
        self.source = source
        self._tokenizer = tokenizer

    @classmethod
    def from_gguf(cls, gguf: MetadataSource, tokenizer: Tokenizer) -> "ChatTemplate":
        """The template in `tokenizer.chat_template`. Raises ChatTemplateError if there is none."""
        source = gguf.metadata.get("tokenizer.chat_template")
        if source is None:
            raise ChatTemplateError(
                "the model's file carries no chat template (tokenizer.chat_template): it is probably a base "
                "model, made to continue text (run -p) rather than to chat"
            )
        if not isinstance(source, str):
            raise ChatTemplateError("tokenizer.chat_template is not a string")
        return cls(source, tokenizer)

    def render(self, messages: Sequence[Turn], inputs: TemplateInputs = _NOTHING_MORE) -> str:
        """The prompt as text. Raises ChatTemplateError."""
        text, stand_ins = self._render(messages, inputs)
        return stand_ins.undo(text)

    def ids(self, messages: Sequence[Turn], inputs: TemplateInputs = _NOTHING_MORE) -> list[int]:
        """The prompt as token ids. Only the template's own text becomes control tokens. Raises
        ChatTemplateError."""
        text, stand_ins = self._render(messages, inputs)
        ids = self._tokenizer.encode(text, add_bos=False, parse_special=True, stand_ins=stand_ins)
        return _with_one_bos(self._tokenizer, ids)

    def _render(self, messages: Sequence[Turn], inputs: TemplateInputs) -> tuple[str, StandIns]:
        """The prompt with stand-ins in the user's text."""
        tokens = self._tokenizer.tokens
        own = {
            "add_generation_prompt": inputs.add_generation_prompt,
            "bos_token": "" if tokens.bos_id is None else tokens.texts[tokens.bos_id],
            "eos_token": "" if tokens.eos_id is None else tokens.texts[tokens.eos_id],
        }
        variables = {
            **{name: value for name, value in inputs.settings.items() if name not in own},
            "messages": [_fields(message) for message in messages],
            "tools": inputs.tools,
            "documents": inputs.documents,
        }
        try:
            written = json.dumps(variables, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ChatTemplateError(f"the conversation cannot be written as JSON: {error}") from None
        stand_ins = StandIns.avoiding(f"{written}{self.source}", self._tokenizer.control_texts)
        request = {"template": self.source, "variables": variables, "own": own, **stand_ins.request()}
        return _render_apart(request, _OUTPUT_CHARACTERS + 4 * len(written)), stand_ins


class PlainTemplate:
    """For models without a template: turns as "User: …" and "Assistant: …", with a notice about that.

    Nothing is assumed about control tokens; a base model may still follow the pattern.
    """

    notice: str | None = (
        "this model carries no chat template: messages are passed as plain 'User:' and 'Assistant:' lines, "
        "which a base model may or may not follow"
    )
    stops: tuple[str, ...] = ("\nUser:",)

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def render(self, messages: Sequence[Turn], inputs: TemplateInputs = _NOTHING_MORE) -> str:
        """The prompt as text. Raises ChatTemplateError for tools and documents: only a template places
        them."""
        if inputs.tools or inputs.documents:
            raise ChatTemplateError("this model carries no chat template, which tools and documents need")
        fields = [_fields(message) for message in messages]
        turns = [f"{str(turn['role']).capitalize()}: {_text(turn['content'])}\n" for turn in fields]
        return "".join([*turns, "Assistant:"] if inputs.add_generation_prompt else turns)

    def ids(self, messages: Sequence[Turn], inputs: TemplateInputs = _NOTHING_MORE) -> list[int]:
        """The prompt as token ids; control tokens written in messages are text."""
        text = self.render(messages, inputs)
        return _with_one_bos(self._tokenizer, self._tokenizer.encode(text, add_bos=False))


def has_chat_template(gguf: MetadataSource) -> bool:
    """Whether the model has a chat template of its own."""
    return gguf.metadata.get("tokenizer.chat_template") is not None


def chat_template(gguf: MetadataSource, tokenizer: Tokenizer) -> Template:
    """The model's own template; if it has none, the plain one, whose `notice` says so."""
    if not has_chat_template(gguf):
        return PlainTemplate(tokenizer)
    return ChatTemplate.from_gguf(gguf, tokenizer)


def _fields(message: Turn) -> dict[str, Any]:
    """The message as templates see it, with its reasoning under each of the names that they read."""
    if isinstance(message, Message):
        return {"role": message.role, "content": message.content}
    if not isinstance(message.get("role"), str):
        raise ChatTemplateError("a message of the conversation has no role")
    names = ("reasoning_content", "thinking", "reasoning")
    reasoning = next((message[name] for name in names if message.get(name) is not None), None)
    more = {} if reasoning is None else {"thinking": reasoning}
    last = {} if reasoning is None else {"reasoning_content": reasoning}
    return {"content": None, **more, **message, **last}


def _text(content: Any) -> str:
    """The text of a message's content, which may be a list of parts."""
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return "" if content is None else str(content)


def _with_one_bos(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """Exactly one beginning-of-text token, whether the template writes it itself or leaves it to us."""
    bos = tokenizer.bos_id
    if bos is not None and tokenizer.adds_bos and ids[:1] != [bos]:
        return [bos, *ids]
    return ids


def _render_apart(request: Mapping[str, Any], output_characters: int) -> str:
    limits = {
        "seconds": MAX_SECONDS,
        "memory_bytes": _MEMORY_BYTES + 16 * output_characters,
        "output_characters": output_characters,
    }
    data = json.dumps({**request, **limits}).encode()
    try:
        answer = json.loads(WORKER.render(data, MAX_SECONDS + _START_SECONDS))
    except WorkerLost as lost:
        if lost.slow:
            raise ChatTemplateError(_too_slow()) from None
        raise RendererFailed("the process that renders chat templates ended") from None
    except OSError as error:
        raise RendererFailed(f"the process that renders chat templates did not start: {error}") from None
    if answer.get("ended") == -signal.SIGALRM:
        raise ChatTemplateError(_too_slow())
    if "ended" in answer:
        raise ChatTemplateError(
            f"the process that renders the model's chat template ended with {answer['ended']}"
        )
    if "text" not in answer:
        raise ChatTemplateError(_describe(answer["fault"], answer["detail"], output_characters))
    return str(answer["text"])


def _too_slow() -> str:
    return f"the model's chat template took longer than {MAX_SECONDS:g} s and was stopped"


def _describe(fault: str, detail: str, output_characters: int) -> str:
    return {
        "output": f"the model's chat template wrote over {output_characters} characters and was stopped",
        "refusal": f"the model's chat template does not accept this conversation: {_one_line(detail)}",
        "syntax": f"the model's chat template is not valid: {_one_line(detail)}",
        "security": f"the model's chat template tries what no template may: {_one_line(detail)}",
        "memory": "the model's chat template needs too much memory and was stopped",
    }.get(fault, f"the model's chat template failed: {_one_line(detail)}")


def _one_line(text: str) -> str:
    """Text from an untrusted file for a terminal: one line, no control characters, not too long."""
    line = "".join(char if char.isprintable() else " " for char in text)
    return " ".join(line.split())[:_DETAIL]
