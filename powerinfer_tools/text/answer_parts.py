"""An answer taken apart while it comes: reasoning, content, and calls of tools."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from powerinfer_tools.text.thoughts import THINK, ThoughtFormat, thought_formats, writes_channels
from powerinfer_tools.text.tool_formats import Call, ToolFormat, parse_calls


@dataclass(frozen=True)
class Reasoning:
    """Text that the model thought before it answered."""

    text: str


@dataclass(frozen=True)
class Content:
    """Text of the answer."""

    text: str


Part = Reasoning | Content | Call


def said(part: Part) -> str:
    """A part as text: a call as its function's name and arguments."""
    return f"{part.name}({part.arguments})" if isinstance(part, Call) else part.text


class PartsParser(Protocol):
    """``push`` text and get parts; ``finish`` at the end. ``called``: whether there was a call."""

    called: bool

    def push(self, text: str) -> list[Part]:
        """What is certain after ``text``."""

    def finish(self) -> list[Part]:
        """The rest."""


def parts_parser(
    template: str | None,
    tail: str,
    tools: ToolFormat | None = None,
    *,
    formed: bool = False,
    forced: bool = False,
) -> PartsParser:
    """The parser of answers to prompts of ``template`` that end with ``tail``. ``formed``: the answer
    conforms to a grammar, and has no reasoning; ``forced``: it is a call."""
    if writes_channels(template) and not formed:
        return ChannelParser()
    formats = thought_formats(template)
    opened = next((one for one in formats if tail.rstrip().endswith(one.opener.rstrip())), None)
    return AnswerParser(tools, formats, opened=None if formed else opened, forced=forced)


class Cutter:
    """Finds markers in text that arrives in pieces; holds back text that could be the beginning of one."""

    def __init__(self) -> None:
        self._held = ""

    def push(self, text: str, marker: str) -> tuple[str, bool]:
        """The text that now certainly lies before ``marker``, and whether the marker was found. The text
        after the marker is kept for the next call."""
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
        """Put ``text`` back, in front of the kept text."""
        self._held = text + self._held

    def rest(self) -> str:
        """The kept text, now that nothing more comes."""
        rest, self._held = self._held, ""
        return rest


class AnswerParser:
    """``push`` text and get parts; ``finish`` at the end.

    ``formats``: the formats of reasoning with which an answer may begin. ``opened``: the format whose opening
    marker ended the prompt. ``tools``: None if there are no tools. ``forced``: with tools, the whole answer
    is a call, without markers.
    """

    def __init__(
        self,
        tools: ToolFormat | None,
        formats: Sequence[ThoughtFormat] = (THINK,),
        *,
        opened: ThoughtFormat | None = None,
        forced: bool = False,
    ) -> None:
        self._tools, self._forced, self._formats = tools, forced and tools is not None, formats
        self._cutter = Cutter()
        self._thought = opened or THINK
        self._state = "think" if opened is not None else "call" if self._forced else "start"
        self._collected = ""
        self._trim = opened is not None  # space around reasoning belongs to the markers
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
        """One step of the automaton; returns the text that has not been examined yet."""
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
        """The first characters distinguish reasoning and bare calls from an answer."""
        self._collected += text
        seen = self._collected.lstrip()
        if not seen or any(one.opener.startswith(seen) for one in self._formats):
            return
        opened = next((one for one in self._formats if seen.startswith(one.opener)), None)
        if opened is not None:
            self._thought, self._trim = opened, True
            self._enter("think", seen.removeprefix(opened.opener))
        elif self._tools is not None and self._tools.bare and seen.startswith("{"):
            self._enter("call", seen)
        else:
            self._enter("content", self._collected)

    def _enter(self, state: str, text: str) -> None:
        self._state, self._collected = state, ""
        self._cutter.put_back(text)

    def _think(self, text: str, parts: list[Part]) -> None:
        before, ended = self._cutter.push(text, self._thought.closer)
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


_RECIPIENT = re.compile(r"to=([\w.-]{1,80})")
#: The markers that end the text of a channel.
_ENDS = re.compile(r"<\|(?:end|return|call|start|channel)\|>")
_MARKERS = ("<|end|>", "<|return|>", "<|call|>", "<|start|>", "<|channel|>", "<|message|>")


class ChannelParser:
    """The parser of answers in channels: "<|channel|>", a header, "<|message|>" and the channel's text, one
    after the other (OpenAI's harmony response format). Text addressed to "functions.NAME" is a call, the
    channel "analysis" is reasoning, everything else is the answer. Text without any header is the answer."""

    def __init__(self) -> None:
        self._held, self._header, self._inside, self._began = "", "", False, False
        self.called = False

    def push(self, text: str) -> list[Part]:
        """What is certain after ``text``."""
        self._held += text
        parts: list[Part] = []
        while self._advance(parts):
            pass
        return parts

    def finish(self) -> list[Part]:
        """The rest."""
        rest, self._held = self._held, ""
        parts: list[Part] = []
        if self._inside or not self._began:
            self._add(rest, parts, last=True)
        return parts

    def _advance(self, parts: list[Part]) -> bool:
        """One step; returns whether there may be another."""
        if self._inside:
            return self._take_text(parts)
        place = self._held.find("<|message|>")
        if place >= 0:
            self._header, self._held = self._held[:place], self._held[place + len("<|message|>") :]
            self._inside = self._began = True
            return True
        if not self._began and not self._held.lstrip().startswith("<|"[: len(self._held.lstrip())]):
            self._inside = self._began = True  # no header at all
            return True
        return False

    def _take_text(self, parts: list[Part]) -> bool:
        match = _ENDS.search(self._held)
        if match is not None:
            text, self._held = self._held[: match.start()], self._held[match.start() :]
            self._add(text, parts, last=True)
            self._header, self._inside = "", False
            self._held = self._held.removeprefix("<|end|>").removeprefix("<|return|>")
            return True
        if self._recipient is not None:  # whole, or not at all
            return False
        keep = max((_overlap(self._held, marker) for marker in _MARKERS), default=0)
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        self._add(text, parts, last=False)
        return False

    @property
    def _recipient(self) -> str | None:
        match = _RECIPIENT.search(self._header)
        return match[1] if match and match[1].startswith("functions.") else None

    def _add(self, text: str, parts: list[Part], *, last: bool) -> None:
        if self._recipient is not None:
            if last:
                self.called = True
                parts.append(Call(self._recipient.removeprefix("functions."), text.strip()))
        elif text:
            thought = re.search(r"<\|channel\|>\s*analysis\b", self._header) is not None
            parts.append(Reasoning(text) if thought else Content(text))


def _overlap(text: str, marker: str) -> int:
    """How many characters at the end of ``text`` begin ``marker``."""
    longest = min(len(marker) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(marker[:n])), 0)
