"""Renders one chat template in a process of its own: reads a request from standard input, answers on standard
output.

A template is a program that came with a downloaded file. Jinja's sandbox keeps it from Python's internals,
but not from looping forever or from filling the memory, also within a single C call; only the limits of a
process do that. This file is run as a script and imports nothing of the project.

Request (JSON): template, variables, seconds, memory_bytes, output_characters.
Answer (JSON): {"text": …} or {"fault": kind, "detail": …}.
"""

import json
import resource
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class Refusal(Exception):
    """Raised by `raise_exception`, with which templates reject messages."""


class GenerationBlock(Extension):
    """`{% generation %}…{% endgeneration %}` marks an answer for training; here only its body matters."""

    tags = {"generation"}  # noqa: RUF012  how Jinja's extensions declare themselves

    def parse(self, parser: Parser) -> Node:
        """Parse the block into a call that returns its body."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


def raise_exception(message: str) -> NoReturn:
    """A function of templates: reject the messages."""
    raise Refusal(message)


def strftime_now(form: str) -> str:
    """A function of templates: the local date and time by `form`."""
    return datetime.now().strftime(form)


def tojson(value: Any, indent: int | None = None, **options: Any) -> str:
    """The filter that chat templates expect: plain JSON, not escaped for HTML as Jinja's own is."""
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def environment() -> ImmutableSandboxedEnvironment:
    """The sandbox, set up as templates of Hugging Face models expect."""
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", GenerationBlock]
    )
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = strftime_now
    return env


def render(template: str, variables: dict[str, Any], output_characters: int) -> dict[str, str]:
    """The answer to a request: rendering stops where the output becomes too long."""
    pieces: list[str] = []
    room = output_characters
    try:
        for piece in environment().from_string(template).generate(**variables):
            room -= len(piece)
            if room < 0:
                return {"fault": "output", "detail": ""}
            pieces.append(piece)
    except Refusal as error:
        return {"fault": "refusal", "detail": str(error)}
    except jinja2.TemplateSyntaxError as error:
        return {"fault": "syntax", "detail": f"line {error.lineno}: {error.message}"}
    except SecurityError as error:
        return {"fault": "security", "detail": str(error)}
    except MemoryError:
        return {"fault": "memory", "detail": ""}
    except Exception as error:  # noqa: BLE001  a template can raise anything; all of it is the template's fault
        return {"fault": "error", "detail": f"{type(error).__name__}: {error}"}
    return {"text": "".join(pieces)}


def limit(seconds: float, memory_bytes: int) -> None:
    """From here on: a cap on memory, and a deadline that ends the process even within C code."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)


def main() -> None:
    """Answer the one request."""
    request = json.load(sys.stdin.buffer)
    limit(request["seconds"], request["memory_bytes"])
    answer = render(request["template"], request["variables"], request["output_characters"])
    signal.setitimer(signal.ITIMER_REAL, 0)
    sys.stdout.buffer.write(json.dumps(answer).encode())


if __name__ == "__main__":
    main()
