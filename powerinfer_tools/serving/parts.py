"""An answer taken apart while it comes: reasoning, content, and calls of tools."""

from dataclasses import dataclass

from powerinfer_tools.serving.tool_formats import Call, ToolFormat, parse_calls


@dataclass(frozen=True)
class Reasoning:
    """Text that the model thought before it answered."""

    text: str


@dataclass(frozen=True)
class Content:
    """Text of the answer."""

    text: str


Part = Reasoning | Content | Call
#: What begins and ends reasoning in the families that write it.
_THINK, _THOUGHT = "<think>", "</think>"


class Cutter:
    """Finds markers in text that arrives in pieces; keeps back what could become the beginning of one."""

    def __init__(self) -> None:
        self._held = ""

    def push(self, text: str, marker: str) -> tuple[str, bool]:
        """Text before ``marker`` that is certain by now, and whether the marker was there. What follows the
        marker is kept for the next call."""
        self._held += text
        place = self._held.find(marker)
        if place >= 0:
            before, self._held = self._held[:place], self._held[place + len(marker) :]
            return before, True
        longest = min(len(marker) - 1, len(self._held))
        keep = next((n for n in range(longest, 0, -1) if self._held.endswith(marker[:n])), 0)
        before, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return before, False

    def put_back(self, text: str) -> None:
        """Look at ``text`` before what is kept."""
        self._held = text + self._held

    def rest(self) -> str:
        """What is kept, now that nothing more comes."""
        rest, self._held = self._held, ""
        return rest


class AnswerParser:
    """``push`` text, get parts; ``finish`` at the end.

    ``thinking``: the prompt ended with the opening of reasoning. ``tools``: None where there are none.
    ``forced``: the whole answer is a call, without markers.
    """

    def __init__(self, tools: ToolFormat | None, *, thinking: bool = False, forced: bool = False) -> None:
        self._tools, self._forced = tools, forced
        self._cutter = Cutter()
        self._state = "think" if thinking else "call" if forced else "start"
        self._collected = ""
        self._trim = thinking  # space around reasoning belongs to the markers
        self.called = False

    def push(self, text: str) -> list[Part]:
        """What is certain after ``text``."""
        parts: list[Part] = []
        while True:
            before = self._state
            text = self._advance(text, parts)
            if self._state == before and not text:
                return parts

    def finish(self) -> list[Part]:
        """The rest."""
        rest = self._cutter.rest()
        if self._state == "think":
            return [Reasoning(rest)] if rest else []
        if self._state == "call":
            return self._calls(self._collected + rest)
        text = self._collected + rest
        return [Content(text)] if text else []

    def _advance(self, text: str, parts: list[Part]) -> str:
        """One step of the automaton; returns text that has not been looked at."""
        if self._state == "start":
            self._begin(text)
        elif self._state == "think":
            self._think(text, parts)
        elif self._state == "content":
            self._content(text, parts)
        else:
            self._call(text, parts)
        return ""

    def _begin(self, text: str) -> None:
        """The first characters tell reasoning and bare calls from an answer."""
        self._collected += text
        seen = self._collected.lstrip()
        if not seen or _THINK.startswith(seen):
            return
        if seen.startswith(_THINK):
            self._enter("think", seen.removeprefix(_THINK))
            self._trim = True
        elif self._tools is not None and self._tools.bare and seen.startswith("{"):
            self._enter("call", seen)
        else:
            self._enter("content", self._collected)

    def _enter(self, state: str, text: str) -> None:
        self._state, self._collected = state, ""
        self._cutter.put_back(text)

    def _think(self, text: str, parts: list[Part]) -> None:
        before, ended = self._cutter.push(text, _THOUGHT)
        if self._trim:
            before = before.lstrip("\n")
            self._trim = not before
        if before:
            parts.append(Reasoning(before))
        if ended:
            self._state, self._trim = "content", True

    def _content(self, text: str, parts: list[Part]) -> None:
        marker = self._tools.opener if self._tools is not None else None
        if marker is None:
            before, opened = self._cutter.rest() + text, False
        else:
            before, opened = self._cutter.push(text, marker)
        if self._trim:
            before = before.lstrip("\n")
            self._trim = not before
        if before and not (opened and not before.strip()):
            parts.append(Content(before))
        if opened:
            self._state = "call"

    def _call(self, text: str, parts: list[Part]) -> None:
        closer = self._tools.closer if self._tools is not None else ""
        if not closer or self._forced:
            self._collected += self._cutter.rest() + text
            return
        before, closed = self._cutter.push(text, closer)
        self._collected += before
        if closed:
            parts += self._calls(self._collected)
            self._state, self._collected, self._trim = "content", "", True

    def _calls(self, text: str) -> list[Part]:
        calls = parse_calls(text)
        if calls is None:
            opener = "" if self._tools is None or self._forced else self._tools.opener
            return [Content(opener + text)] if text else []
        self.called = True
        return list(calls)
