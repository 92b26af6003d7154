"""Renders chat templates, each in a process of its own: requests come on standard input, answers go to
standard output.

A template is a program that came with a downloaded file. Jinja's sandbox keeps it from Python's internals,
but not from looping forever or from filling the memory, also within a single C call; only the limits of a
process do that. This file is run as a script and imports nothing of the project.

Users' text must not become a control token. So before the template sees it, each of its characters that also
occurs in control tokens is replaced by a stand-in, one for one (`UserText`). Whatever the template does with
the text, its origin stays visible in each character of the result.

Request (JSON): template, variables, own (variables that are not a user's), stand_ins (character → stand-in),
letters (those of them that only get one where a text may be the inside of a control token), controls (texts
of control tokens), seconds, memory_bytes, output_characters.
Answer (JSON): {"text": …, with stand-ins} or {"fault": kind, "detail": …}.
"""

import json
import os
import re
import resource
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from functools import wraps
from typing import Any, NoReturn, SupportsIndex

import jinja2
import jinja2.runtime
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from markupsafe import Markup

_TO_STAND_IN: dict[int, str] = {}  # for characters that get one everywhere
_TO_STAND_IN_ALL: dict[int, str] = {}  # and for letters, too
_TO_TRUE: dict[int, str] = {}
_HTML = {"&": "&amp;", ">": "&gt;", "<": "&lt;", "'": "&#39;", '"': "&#34;"}


def true(value: Any) -> Any:
    """`value` as its author wrote it, if it is text (or a tuple of texts)."""
    if isinstance(value, tuple):
        return tuple(map(true, value))
    return str.translate(value, _TO_TRUE) if isinstance(value, str) else value


def marked(value: Any) -> Any:
    """`value`, as UserText if it is plain text that holds stand-ins."""
    if type(value) is str and not value.isascii() and not _TO_TRUE.keys().isdisjoint(map(ord, value)):
        return UserText(value)
    return value


class UserText(str):
    """Text with stand-ins. Templates may look into it: it compares and searches like the text it stands for,
    and parts cut out of it or text joined with it keep their stand-ins."""

    def __str__(self) -> str:
        return self

    def __repr__(self) -> str:
        return UserText(repr(true(self)).translate(_TO_STAND_IN_ALL))

    def __html__(self) -> str:
        return "".join(_HTML.get(true(character), character) for character in str.__iter__(self))

    def __getitem__(self, index: SupportsIndex | slice) -> str:
        return UserText(str.__getitem__(self, index))

    def __iter__(self) -> Iterator[str]:
        return map(UserText, str.__iter__(self))

    def __radd__(self, other: object) -> str:
        return UserText(other + str.__str__(self)) if isinstance(other, str) else NotImplemented

    def strip(self, chars: str | None = None) -> str:
        """As `str.strip`."""
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: str | None = None) -> str:
        """As `str.lstrip`."""
        return self[len(self) - len(true(self).lstrip(true(chars))) :]

    def rstrip(self, chars: str | None = None) -> str:
        """As `str.rstrip`."""
        return self[: len(true(self).rstrip(true(chars)))]

    def removeprefix(self, prefix: str) -> str:
        """As `str.removeprefix`."""
        return self[len(prefix) :] if self.startswith(prefix) else self

    def removesuffix(self, suffix: str) -> str:
        """As `str.removesuffix`."""
        return self[: len(self) - len(suffix)] if suffix and self.endswith(suffix) else self

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        """As `str.split`."""
        return self._cut(true(self).split(true(sep), maxsplit), len(sep or ""))

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        """As `str.rsplit`."""
        return self._cut(true(self).rsplit(true(sep), maxsplit), len(sep or ""))

    def splitlines(self, keepends: bool = False) -> list[str]:
        """As `str.splitlines`."""
        return self._cut(true(self).splitlines(keepends))

    def partition(self, sep: str) -> tuple[str, str, str]:
        """As `str.partition`."""
        first, middle, _ = true(self).partition(true(sep))
        start = len(first) + len(middle)
        return self[: len(first)], self[len(first) : start], self[start:]

    def rpartition(self, sep: str) -> tuple[str, str, str]:
        """As `str.rpartition`."""
        first, middle, _ = true(self).rpartition(true(sep))
        start = len(first) + len(middle)
        return self[: len(first)], self[len(first) : start], self[start:]

    def replace(self, old: str, new: str, count: SupportsIndex = -1) -> str:
        """As `str.replace`."""
        if not old:
            return UserText(str.replace(self, old, new, count))
        return UserText(str.join(new, self.split(old, count)))

    def _cut(self, pieces: list[str], gap: int = 0) -> list[str]:
        """Parts of the true text as parts of this one: in order, with `gap` characters or only white space
        between them."""
        whole, cut, at = true(self), [], 0
        for piece in pieces:
            at = whole.index(piece, at)
            cut.append(self[at : at + len(piece)])
            at += len(piece) + gap
        return cut


def _as_written(name: str) -> Callable[..., Any]:
    """A method that asks something about the text."""
    method = getattr(str, name)
    return lambda self, *arguments: method(true(self), *map(true, arguments))


def _as_marked(name: str) -> Callable[..., Any]:
    """A method that makes a longer text from it."""
    method = getattr(str, name)

    def call(self: str, *arguments: Any) -> Any:
        result = method(self, *arguments)
        return result if result is NotImplemented else UserText(result)

    return call


def _as_cased(name: str) -> Callable[..., Any]:
    """A method that changes letters. If their number changes, every character that can gets a stand-in."""
    method = getattr(str, name)

    def call(self: str) -> str:
        result = method(true(self))
        if len(result) != len(self):
            return UserText(result.translate(_TO_STAND_IN_ALL))
        pairs = zip(result, str.__iter__(self), strict=True)
        return UserText(
            "".join(new.translate(_TO_STAND_IN_ALL) if ord(old) in _TO_TRUE else new for new, old in pairs)
        )

    return call


for _kind, _names in (
    (_as_written, "__contains__ __eq__ __ne__ __lt__ __le__ __gt__ __ge__ __hash__ count endswith find index "
     "isalnum isalpha isascii isdecimal isdigit isidentifier islower isnumeric isprintable isspace istitle "
     "isupper rfind rindex startswith"),
    (_as_marked, "__add__ __mul__ __rmul__ __mod__ __format__ center expandtabs join ljust rjust zfill"),
    (_as_cased, "capitalize casefold lower swapcase title upper"),
):  # fmt: skip
    for _name in _names.split():
        setattr(UserText, _name, _kind(_name))


def from_user(value: Any, controls: str, role: bool = False) -> Any:
    """A user's `value`, with stand-ins in all of its texts.

    A text that is the inner part of a control token, such as "im_end", gets a stand-in for every character: a
    template may put brackets around it. Roles are the only texts that templates treat so for good reasons.
    """
    if isinstance(value, dict):
        return {
            from_user(key, controls): from_user(item, controls, key == "role") for key, item in value.items()
        }
    if isinstance(value, list):
        return [from_user(item, controls) for item in value]
    if not isinstance(value, str):
        return value
    inner = not role and len(value) > 1 and value.strip() in controls
    return UserText(value.translate(_TO_STAND_IN_ALL if inner else _TO_STAND_IN))


class Refusal(Exception):
    """Raised by `raise_exception`, the function by which templates reject messages."""


class GenerationBlock(Extension):
    """`{% generation %}…{% endgeneration %}` marks an answer for training; here only its body matters."""

    tags = {"generation"}  # noqa: RUF012  Jinja's extensions declare themselves in this way

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


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter that chat templates expect, as transformers defines it: without escapes for HTML."""
    text = json.dumps(
        value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys
    )  # fmt: skip
    return re.sub(r"[^\0-\x7f]", _escaped, text) if ensure_ascii else text


def safe(value: Any) -> Markup:
    """The filter that marks text as not to be escaped."""
    return Markup(str.__str__(value) if isinstance(value, UserText) else value)  # noqa: S704  it is not HTML


def replace(value: Any, old: str, new: str, count: int | None = None) -> str:
    """The filter of this name, which takes values of any kind."""
    text: str = marked(str(value))
    return text.replace(str(old), str(new), -1 if count is None else count)


def _escaped(match: re.Match[str]) -> str:
    """A character outside ASCII as JSON escapes it; a stand-in for an ASCII character stays as it is."""
    character = true(match[0])
    return match[0] if character.isascii() else json.dumps(character)[1:-1]


class TemplateNamespace(Namespace):
    """A namespace without names that begin with an underscore."""

    def __init__(*args: Any, **names: Any) -> None:
        self, *arguments = args
        values = dict(*arguments, **names)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot have a name such as {name!r}")


def make_dict(*args: Any, **items: Any) -> dict[Any, Any]:
    """`dict`, without the attributes of a class."""
    return dict(*args, **items)


def joined(parts: Iterable[Any]) -> str:
    """Parts of a text joined into one; a user's characters stay marked."""
    text: str = marked("".join(map(str, parts)))
    return text


def _keeping_marks(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        return marked(function(*args, **options))

    return call


class Environment(ImmutableSandboxedEnvironment):
    """The sandbox, set up as templates of Hugging Face models expect; it keeps the marks of users' text."""

    concat = staticmethod(joined)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", GenerationBlock]
        )
        self.filters["tojson"] = tojson
        self.filters["safe"] = safe
        self.filters["replace"] = replace
        for name, function in self.filters.items():
            self.filters[name] = _keeping_marks(function)
        self.globals["raise_exception"] = raise_exception
        self.globals["strftime_now"] = strftime_now
        self.globals["namespace"] = TemplateNamespace
        self.globals["dict"] = make_dict

    def getattr(self, obj: Any, attribute: str) -> Any:
        """An attribute or an item."""
        return super().getattr(marked(obj), attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """An item or an attribute."""
        return super().getitem(marked(obj), argument)


def render(template: str, variables: dict[str, Any], output_characters: int) -> dict[str, str]:
    """The answer to a request: rendering stops when the output becomes too long."""
    pieces: list[str] = []
    room = output_characters
    try:
        for piece in Environment().from_string(template).generate(**variables):
            room -= len(piece)
            if room < 0:
                return {"fault": "output", "detail": ""}
            pieces.append(piece)
    except Refusal as error:
        return {"fault": "refusal", "detail": true(str(error))}
    except jinja2.TemplateSyntaxError as error:
        return {"fault": "syntax", "detail": f"line {error.lineno}: {error.message}"}
    except SecurityError as error:
        return {"fault": "security", "detail": str(error)}
    except MemoryError:
        return {"fault": "memory", "detail": ""}
    except Exception as error:  # noqa: BLE001  a template can raise anything, and is always at fault
        return {"fault": "error", "detail": true(f"{type(error).__name__}: {error}")}
    return {"text": "".join(map(str.__str__, pieces))}


def use_stand_ins(stand_ins: dict[str, str], letters: str) -> None:
    """From here on, these characters of users' texts have stand-ins; `letters` only where they need them."""
    for character, stand_in in stand_ins.items():
        _TO_STAND_IN_ALL[ord(character)] = stand_in
        _TO_TRUE[ord(stand_in)] = character
        if character not in letters:
            _TO_STAND_IN[ord(character)] = stand_in


def limit(seconds: float, memory_bytes: int) -> None:
    """From here on: a cap on memory, and a deadline that ends the process even within C code."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)


def answer_one(request: dict[str, Any]) -> bytes:
    """The answer to `request`, by a process that renders nothing else."""
    limit(request["seconds"], request["memory_bytes"])
    use_stand_ins(request["stand_ins"], request["letters"])
    controls = "\0".join(request["controls"])
    variables = {name: from_user(value, controls) for name, value in request["variables"].items()}
    variables |= request["own"]
    jinja2.runtime.str_join = joined  # type: ignore[assignment]  # the operator ~
    answer = render(request["template"], variables, request["output_characters"])
    signal.setitimer(signal.ITIMER_REAL, 0)
    return json.dumps(answer).encode()


def answer_apart(data: bytes) -> bytes:
    """The same, by a fork of this process. An end without an answer is a fault of its own: {"ended": the
    return code, in subprocess's convention}."""
    reading, writing = os.pipe()
    fork = os.fork()
    if fork == 0:
        status = 1
        try:
            os.close(reading)
            with os.fdopen(writing, "wb") as stream:
                stream.write(answer_one(json.loads(data)))
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        answer = stream.read()
    code = os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1])
    return answer if code == 0 else json.dumps({"ended": code}).encode()


def main() -> None:
    """Answer requests, each preceded by its length (8 bytes, little-endian), until there are no more."""
    while header := sys.stdin.buffer.read(8):
        data = sys.stdin.buffer.read(int.from_bytes(header, "little"))
        answer = answer_apart(data)
        sys.stdout.buffer.write(len(answer).to_bytes(8, "little") + answer)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
