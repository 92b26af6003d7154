"""One conversation, or one text, of a model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, Unpack

import numpy as np
import numpy.typing as npt

from powerinfer.options import GenerateOptions, form_of, generation_options
from powerinfer.text_stream import Generated, TextStream
from powerinfer_tools.engine import Engine
from powerinfer_tools.engine import EngineReport as Report
from powerinfer_tools.engine.timeline import Timeline
from powerinfer_tools.errors import ContextFull
from powerinfer_tools.generate.generation import Generation
from powerinfer_tools.generate.sampling import Sampler
from powerinfer_tools.text import Tokenizer
from powerinfer_tools.text.answer_parts import PartsParser, parts_parser
from powerinfer_tools.text.chat import Template
from powerinfer_tools.text.thoughts import thought_formats

if TYPE_CHECKING:
    from powerinfer.conversation import Conversation

Floats = npt.NDArray[np.float32]


class Session:
    """Tokens that a model has processed, with their cached state. Made by :meth:`Model.session`; sessions of
    one model share its weights. Not for two threads at once, which also holds for two sessions of a model."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, template: Template) -> None:
        self._engine, self._tokenizer, self._template = engine, tokenizer, template
        self._held: list[int] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def tokens(self) -> tuple[int, ...]:
        """Ids of all tokens in the session."""
        return tuple(self._held)

    @property
    def context(self) -> int:
        """How many tokens fit."""
        return self._engine.context

    @property
    def nbytes(self) -> int:
        """Size of the KV cache when the context is full, in bytes."""
        return self._engine.session.nbytes

    def prefill(self, tokens: Sequence[int]) -> Floats:
        """Process ``tokens`` after the session's tokens; logits float32 (vocabulary,) after the last of them.

        Raises ContextFull if they do not fit, ModelError for an id outside the vocabulary.
        """
        logits = self._engine.prefill(list(tokens)).copy()
        self._held += tokens
        return logits

    def decode(self, token: int) -> Floats:
        """Logits (vocabulary,) after one more token. Raises as :meth:`prefill` does."""
        logits = self._engine.decode(token).copy()
        self._held.append(token)
        return logits

    def logits(self, tokens: Sequence[int]) -> Floats:
        """Process ``tokens`` after the session's tokens; logits (tokens, vocabulary) after each of them.
        Raises as :meth:`prefill` does."""
        rows = [rows.copy() for rows in self._engine.logits(list(tokens))]
        self._held += tokens
        return np.concatenate(rows) if rows else np.empty((0, self._tokenizer.vocabulary), np.float32)

    def rewind(self, position: int) -> int:
        """Forget every token from ``position`` on, or all tokens if the model's family cannot go back.
        Returns how many remain. Raises ValueError if the session has fewer than ``position`` tokens."""
        held = self._engine.rewind(position)
        del self._held[held:]
        return held

    def fork(self) -> "Session":
        """Another session with the same tokens, which goes on with the same bits, without drafts. Raises
        ModelError if memory does not suffice."""
        other = Session(self._engine.fork(), self._tokenizer, self._template)
        other._held = list(self._held)
        return other

    def stream(self, prompt: str | Sequence[int], **options: Unpack[GenerateOptions]) -> TextStream:
        """Continue the session's tokens with ``prompt``, text or ids. In an empty session, text begins with
        the model's first token. Control tokens written in text are text.

        Raises ContextFull, SamplingError, TokenizerError and ModelError.
        """
        first = None if not self._held else False
        ids = self._tokenizer.encode(prompt, add_bos=first) if isinstance(prompt, str) else list(prompt)
        return self._stream(ids, options)

    def generate(self, prompt: str | Sequence[int], **options: Unpack[GenerateOptions]) -> Generated:
        """:meth:`stream`, to its end."""
        return self.stream(prompt, **options).finish()

    def stream_chat(
        self, messages: Sequence[Mapping[str, Any]], **options: Unpack[GenerateOptions]
    ) -> TextStream:
        """The answer to a conversation, by the model's template. Of the session's tokens, the part with which
        the conversation begins is reused, and the rest is forgotten.

        Raises ChatTemplateError, and as :meth:`stream` does.
        """
        return self._stream_turn(messages, options)

    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Unpack[GenerateOptions]) -> Generated:
        """:meth:`stream_chat`, to its end."""
        return self.stream_chat(messages, **options).finish()

    def conversation(self, system: str | None = None, **options: Unpack[GenerateOptions]) -> "Conversation":
        """A conversation in this session that keeps its own history. Raises SamplingError."""
        from powerinfer.conversation import Conversation

        return Conversation(self, system, options)

    def report(self) -> Report:
        """Counters of this session's work and of the model's memory."""
        return self._engine.report()

    def trace(self) -> Timeline:
        """Keep a timeline of each token that is decoded from now on: when each part was at work."""
        return self._engine.trace()

    def close(self) -> None:
        """Give the memory back. The session cannot be used afterwards."""
        self._engine.close()
        self._held.clear()

    def _stream_turn(
        self,
        messages: Sequence[Mapping[str, Any]],
        options: GenerateOptions,
        *,
        sampler: Sampler | None = None,
        on_end: Callable[[Generation, Callable[[], PartsParser]], None] | None = None,
    ) -> TextStream:
        """:meth:`stream_chat`, with the draws of a ``sampler`` that goes on from turn to turn. ``on_end`` is
        called with the finished generation and with a function that makes parsers of its text."""
        ids = self._template.ids(list(messages))
        if len(ids) >= self.context:
            raise ContextFull(
                f"the conversation has {len(ids)} tokens and the context {self.context}: "
                "undo the last exchange, start anew, or ask for a larger context (-c)"
            )
        pairs = zip(self._held, ids[:-1], strict=False)  # the last token is processed again for its logits
        self.rewind(sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs)))
        source = getattr(self._template, "source", None)
        tail = self._tokenizer.decode(ids[-8:], show_special=True)
        formed = "json_schema" in options or "grammar" in options

        def parser() -> PartsParser:
            return parts_parser(source, tail, formed=formed)

        return self._stream(
            ids[len(self._held) :],
            options,
            self._template.stops,
            sampler=sampler,
            on_end=None if on_end is None else lambda generation: on_end(generation, parser),
            parser=parser,
            marked=any(self._is_control(one.opener) for one in thought_formats(source)),
        )

    def _is_control(self, text: str) -> bool:
        """Whether ``text`` is a token that is normally not shown."""
        return self._tokenizer.tokens.ids.get(text) in self._tokenizer.control_ids

    def _stream(
        self,
        ids: Sequence[int],
        options: GenerateOptions,
        stops: Sequence[str] = (),
        *,
        sampler: Sampler | None = None,
        on_end: Callable[[Generation], None] | None = None,
        parser: Callable[[], PartsParser] | None = None,
        marked: bool = False,
    ) -> TextStream:
        """``marked``: the parser of the text needs its control tokens."""

        def ended(generation: Generation) -> None:
            self._held += generation.fed
            if on_end is not None:
                on_end(generation)

        made, form = generation_options(options, stops), form_of(options, self._tokenizer)
        made = replace(made, show_special=marked)
        if form is not None:
            sampler = form.sampler(made.sampling)
        progress = options.get("progress")
        generation = Generation(
            self._engine, self._tokenizer, ids, made, sampler=sampler, progress=progress, on_end=ended
        )
        return TextStream(generation, parser=parser)
