"""A chat in the terminal: questions in, answers streamed out, and the commands of a chat."""

import sys
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from powerinfer_cli.console import say
from powerinfer_cli.summary import engine_figures, say_summary
from powerinfer_tools.errors import ContextFull, PowerInferError

if TYPE_CHECKING:
    from powerinfer_tools.conversation import Conversation
    from powerinfer_tools.engine import Engine
    from powerinfer_tools.generation import Generation, GenerationOptions

HELP = """\
/help              this list
/regen             answer the last question anew
/reset             forget the conversation
/system TEXT       set the system prompt, and forget the conversation; without TEXT: show it
/save FILE         write the conversation as JSON
/exit              end the chat (so does Ctrl-D)
A line that ends in \\ goes on in the next. Ctrl-C stops an answer, and at the prompt the program."""


class Reader(Protocol):
    """Where questions come from."""

    def __call__(self, prompt: str) -> str:
        """The next line. Raises EOFError at the end."""


@dataclass
class Chat:
    """The loop between a person and a conversation."""

    conversation: "Conversation"
    read: Reader

    def run(self, first: str | None) -> None:
        """Until /exit, the end of input, or Ctrl-C at the prompt."""
        if first is not None:
            self.answer(lambda: self.conversation.ask(first))
        with suppress(EOFError):
            while True:
                line = self.question()
                if line.startswith("/"):
                    if not self.obey(line):
                        return
                elif line.strip():
                    self.answer(lambda line=line: self.conversation.ask(line))  # type: ignore[misc]

    def question(self) -> str:
        """One question, which may run over several lines."""
        lines = [self.read("> ")]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(self.read(". "))
        return "\n".join(lines)

    def obey(self, line: str) -> bool:
        """Carry out a command; False to end the chat. What goes wrong is said, and the chat goes on."""
        name, _, rest = line.strip().partition(" ")
        if name in ("/exit", "/quit"):
            return False
        commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: print(HELP, file=sys.stderr),  # noqa: T201  # several lines at once
            "/regen": lambda _: self.answer(self.conversation.regenerate),
            "/reset": self.reset,
            "/system": self.system,
            "/save": self.save,
        }
        try:
            commands.get(name, self.unknown)(rest.strip())
        except (PowerInferError, OSError) as error:
            say(str(error))
        return True

    def answer(self, begin: "Callable[[], Generation]") -> None:
        """Stream an answer; Ctrl-C stops it, and what there is of it stays in the conversation."""
        try:
            with closing(begin()) as generation:
                for piece in generation:
                    sys.stdout.write(piece.text)
                    sys.stdout.flush()
        except KeyboardInterrupt:
            say("")
        except ContextFull as error:
            say(f"{error} (/reset forgets the conversation)")
        sys.stdout.write("\n")
        sys.stdout.flush()

    def reset(self, _: str) -> None:
        """Forget the conversation."""
        self.conversation.reset()
        say("the conversation is forgotten")

    def system(self, text: str) -> None:
        """Show the system prompt, or set it."""
        if not text:
            say(self.conversation.system or "no system prompt")
            return
        self.conversation.reset(system=text)
        say("system prompt set; the conversation is forgotten")

    def save(self, name: str) -> None:
        """Write the messages as JSON."""
        if not name:
            say("name a file: /save chat.json")
            return
        self.conversation.save(Path(name))
        say(f"wrote {name}")

    def unknown(self, _: str) -> None:
        """Say where help is."""
        say("no such command; /help lists them")


def chat(engine: "Engine", options: "GenerationOptions", *, system: str | None, first: str | None) -> None:
    """Chat until the end, then say what it cost."""
    from powerinfer_tools.conversation import Conversation

    conversation = Conversation.begin(engine, options, system=system)
    for notice in conversation.notices:
        say(notice)
    say(f"{engine.model.name}: /help lists commands")
    try:
        Chat(conversation, line_reader()).run(first)
    finally:
        if engine.report().decode_tokens:
            say_summary(engine_figures(engine))


def line_reader() -> Reader:
    """Lines of the terminal, with editing and history; plain lines where standard input is a file or a pipe."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401  # its import is what gives input() editing and history
        return input

    def read(_: str) -> str:
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\n")

    return read
