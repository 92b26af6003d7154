"""An answer as a sequence of blocks, the newer APIs' form for text, reasoning and calls."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from powerinfer_tools.serving.answers import new_id
from powerinfer_tools.text.answer_parts import Content, Part, Reasoning

Kind = Literal["text", "reasoning", "call"]


@dataclass
class Block:
    """``text`` is the arguments of a call, as JSON text."""

    index: int
    kind: Kind
    id: str
    name: str = ""
    text: str = ""


@dataclass(frozen=True)
class Change:
    """A block is opened, goes on with ``text``, or is closed."""

    what: Literal["open", "delta", "close"]
    block: Block
    text: str = ""


class Blocks:
    """Collects the parts of one answer."""

    def __init__(self) -> None:
        self.all: list[Block] = []
        self._open: Block | None = None

    @property
    def called(self) -> bool:
        """Whether there is a call."""
        return any(block.kind == "call" for block in self.all)

    def take(self, parts: Iterable[Part]) -> list[Change]:
        """The changes made by ``parts``."""
        return [change for part in parts for change in self._take(part)]

    def close(self) -> list[Change]:
        """Close the open block."""
        block, self._open = self._open, None
        return [] if block is None else [Change("close", block)]

    def _take(self, part: Part) -> list[Change]:
        if isinstance(part, Content | Reasoning):
            kind: Kind = "text" if isinstance(part, Content) else "reasoning"
            changes = [] if self._open is not None and self._open.kind == kind else self._begin(kind)
            return changes + self._extend(part.text)
        return [*self._begin("call", part.name), *self._extend(part.arguments), *self.close()]

    def _begin(self, kind: Kind, name: str = "") -> list[Change]:
        changes = self.close()
        self._open = Block(len(self.all), kind, new_id("block"), name)
        self.all.append(self._open)
        return [*changes, Change("open", self._open)]

    def _extend(self, text: str) -> list[Change]:
        assert self._open is not None
        self._open.text += text
        return [Change("delta", self._open, text)] if text else []
