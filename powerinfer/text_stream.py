"""Text as it comes, and the result at its end."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Literal, Self

from powerinfer_tools.generate.generation import Generation, Statistics
from powerinfer_tools.text.answer_parts import Content, Part, PartsParser, Reasoning, said

Ended = Literal["end", "stop", "limit", "context", "interrupted"]


@dataclass(frozen=True)
class Generated:
    """A generated text.

    ``tokens`` are its ids, without an end token. ``ended`` says why it ended: the model's "end", a "stop"
    string, the "limit" of tokens, a full "context", or "interrupted". ``prompt_tokens`` were processed, and
    ``reused_tokens`` were already in the session. ``seed`` repeats the text. ``logits_hash`` is the hash of
    the last logits: it is the same on every machine, for any number of threads. ``explanation`` says in words
    why the text ended, and ``statistics`` what it cost. For answers in a chat, ``reasoning`` is the model's
    reasoning, and ``answer`` the answer after it; otherwise the whole text is the answer.
    """

    text: str
    tokens: tuple[int, ...]
    ended: Ended
    prompt_tokens: int
    reused_tokens: int
    seed: int
    logits_hash: str | None
    explanation: str
    statistics: Statistics = field(compare=False)  # time is not part of what was generated
    reasoning: str = ""
    answer: str = ""


class TextStream(Iterator[str]):
    """Iterate for pieces of text; :meth:`close`, or leaving the ``with`` block, stops early. ``result`` is
    the text so far."""

    def __init__(
        self,
        generation: Generation,
        on_end: Callable[[], None] | None = None,
        parser: Callable[[], PartsParser] | None = None,
    ) -> None:
        self._generation, self._on_end, self._parser = generation, on_end, parser
        self._on_first: Callable[[], None] | None = None

    def on_first(self, action: Callable[[], None]) -> None:
        """Call this function before the first piece is given out."""
        self._on_first = action

    def __next__(self) -> str:
        try:
            text = next(self._generation).text
            if self._on_first is not None:
                on_first, self._on_first = self._on_first, None
                on_first()
            return text
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def parts(self) -> Iterator[Part]:
        """The rest of the answer, piece by piece, taken apart: ``Reasoning`` and ``Content`` and, in the
        notation of some models, a ``Call`` of a function. Not to be mixed with iterating for text."""
        parser = None if self._parser is None else self._parser()
        for piece in self:
            yield from [Content(piece)] if parser is None else parser.push(piece)
        yield from [] if parser is None else parser.finish()

    @property
    def result(self) -> Generated:
        """The text so far with its figures; ``ended`` is "interrupted" until the text has ended."""
        done = self._generation
        reasoning, answer = split(done.text, self._parser)
        return Generated(
            text=done.text,
            tokens=tuple(done.tokens),
            ended=done.outcome.value if done.outcome is not None else "interrupted",
            prompt_tokens=done.statistics.prompt_tokens,
            reused_tokens=done.statistics.reused_tokens,
            seed=done.sampler.seed,
            logits_hash=done.logits_hash,
            explanation=done.explanation,
            statistics=replace(done.statistics),
            reasoning=reasoning,
            answer=answer,
        )

    def finish(self) -> Generated:
        """Generate the rest, and return the result."""
        for _ in self:
            pass
        return self.result

    def close(self) -> None:
        """Stop here. What has been generated stays in ``result``."""
        self._generation.close()
        if self._on_end is not None:
            on_end, self._on_end = self._on_end, None
            on_end()


def split(text: str, parser: Callable[[], PartsParser] | None) -> tuple[str, str]:
    """Reasoning, and answer."""
    if parser is None:
        return "", text
    taking = parser()
    parts = [*taking.push(text), *taking.finish()]
    thought = "".join(part.text for part in parts if isinstance(part, Reasoning))
    return thought.strip(), "".join(said(part) for part in parts if not isinstance(part, Reasoning))
