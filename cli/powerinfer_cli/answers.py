"""An answer on standard output while it comes: what the model thinks, and what it says then."""

import sys
from typing import TYPE_CHECKING

from powerinfer_cli.console import shown

if TYPE_CHECKING:
    from collections.abc import Iterator

    from powerinfer import TextStream
    from powerinfer_cli.options import Reasoning

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


def write_answer(answer: "TextStream", reasoning: "Reasoning") -> None:
    """Print what is left of ``answer``. A terminal gets reasoning dimmed and without markers; a file or a
    pipe gets the text as it is, or the answer alone."""
    if reasoning == "show" and not sys.stdout.isatty():
        for piece in answer:
            _write(shown(piece))
        return
    for text in _said(answer) if reasoning == "hide" else _dimmed(answer):
        _write(text)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _said(answer: "TextStream") -> "Iterator[str]":
    from powerinfer_tools.text.answer_parts import Reasoning, said

    for part in answer.parts():
        if not isinstance(part, Reasoning):
            yield shown(said(part))


def _dimmed(answer: "TextStream") -> "Iterator[str]":
    """The escape sequences are those of this program alone: the model's text has none of its own."""
    from powerinfer_tools.text.answer_parts import Reasoning, said

    thinks, last = False, ""
    try:
        for part in answer.parts():
            if isinstance(part, Reasoning) != thinks:
                thinks = not thinks
                yield _DIM if thinks else _PLAIN + "\n" * (2 - min(2, len(last) - len(last.rstrip("\n"))))
            last = said(part)
            yield shown(last)
    finally:
        if thinks:
            _write(_PLAIN)
