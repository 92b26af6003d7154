"""A conversation that keeps its own history."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Unpack

from powerinfer.options import GenerateOptions, Message, generation_options
from powerinfer.session import Session
from powerinfer.text_stream import Generated, TextStream, split
from powerinfer_tools.errors import PowerInferError
from powerinfer_tools.generate.generation import Generation, Outcome, new_sampler
from powerinfer_tools.text.answer_parts import PartsParser


class Conversation:
    """Questions and answers, made by :meth:`Session.conversation`. An exchange enters the history when its
    answer has ended, also when it was stopped half-way; an answer without any text leaves no trace."""

    def __init__(self, session: Session, system: str | None, options: GenerateOptions) -> None:
        self._session, self._system = session, system
        self._exchanges: list[tuple[Message, Message]] = []
        self.set_options(**options)

    def set_options(self, **options: Unpack[GenerateOptions]) -> None:
        """Use these options from now on; draws begin anew from their seed. Raises as :meth:`Session.stream`
        does."""
        checked = generation_options(options)
        self._options = options
        self._sampler = None if self._is_formed else new_sampler(self._session._tokenizer, checked)

    @property
    def system(self) -> str | None:
        """The system prompt; None leaves it to the template."""
        return self._system

    @system.setter
    def system(self, text: str | None) -> None:
        self._system = text

    @property
    def messages(self) -> list[Message]:
        """System prompt and all exchanges so far."""
        first: list[Message] = []
        if self._system is not None:
            first.append({"role": "system", "content": self._system})
        return first + [message for exchange in self._exchanges for message in exchange]

    def stream(self, text: str) -> TextStream:
        """The answer to ``text``, piece by piece. Raises as :meth:`Session.stream_chat` does, and then leaves
        the conversation unchanged."""
        question: Message = {"role": "user", "content": text}
        return self._session._stream_turn(
            [*self.messages, question],
            self._options,
            sampler=self._sampler,
            on_end=lambda generation, parser: self._ended(question, generation, parser),
        )

    def ask(self, text: str) -> Generated:
        """:meth:`stream`, to its end."""
        return self.stream(text).finish()

    def undo(self) -> str | None:
        """Remove the last exchange; returns its question, or None if there is no exchange."""
        return self._exchanges.pop()[0]["content"] if self._exchanges else None

    def regenerate(self) -> TextStream | None:
        """A new answer to the last question in place of the old one, or None if there is no question."""
        if not self._exchanges:
            return None
        last = self._exchanges.pop()
        try:
            return self.stream(last[0]["content"])
        except PowerInferError:
            self._exchanges.append(last)
            raise

    def reset(self) -> None:
        """Forget all exchanges; the system prompt stays."""
        self._exchanges.clear()

    def save(self, path: str | Path) -> None:
        """Write the conversation to ``path``: as JSON (a list of role and content) if the name ends in that
        way, else as text."""
        from powerinfer_formats.atomic import write_atomic

        with write_atomic(path) as stream:
            stream.write(transcript(self.messages, as_json=Path(path).suffix == ".json").encode())

    @property
    def _is_formed(self) -> bool:
        """Whether answers conform to a grammar, which begins anew with each of them."""
        return "json_schema" in self._options or "grammar" in self._options

    def _ended(self, question: Message, generation: Generation, parser: Callable[[], PartsParser]) -> None:
        """Add the exchange. Reasoning has its own field: templates place it, or omit it, as models expect."""
        if not generation.text and generation.outcome is not Outcome.END:
            return
        reasoning, answer = split(generation.text, parser)
        reply: Message = {"role": "assistant", "content": answer}
        if reasoning:
            reply["reasoning_content"] = reasoning
        self._exchanges.append((question, reply))


def transcript(messages: Sequence[Message], *, as_json: bool) -> str:
    """A conversation as a JSON list, or as text to read."""
    if as_json:
        import json

        return json.dumps(messages, ensure_ascii=False, indent=2) + "\n"
    return "\n".join(f"{message['role']}:\n{message['content']}\n" for message in messages)
