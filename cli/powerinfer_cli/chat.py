"""A chat in the terminal: questions in, answers streamed out, and the commands of a chat."""

import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from powerinfer_cli.answers import write_answer
from powerinfer_cli.boundary import describe, is_expected
from powerinfer_cli.console import say
from powerinfer_cli.summary import engine_figures, say_chat_line, say_summary

if TYPE_CHECKING:
    from powerinfer import Conversation, Model, Session, TextStream
    from powerinfer_cli.options import Reasoning, Verbosity

HELP = """\
/help          this list
/regen         answer the last question anew
/undo          take back the last question and its answer
/reset         forget the conversation
/system TEXT   set the system prompt; without TEXT: show it
/save FILE     write the conversation, as JSON where FILE ends in .json
/exit          end the chat (so does Ctrl-D)
A pasted text is one message, however many lines it has; a line that ends in \\ goes on in the next.
Ctrl-C stops an answer, and at the prompt the program."""

Reader = Callable[[str], str]


class Loop:
    """The loop between a person and a conversation; ``read`` gives a line, and raises EOFError at the end."""

    def __init__(self, conversation: "Conversation", read: Reader, reasoning: "Reasoning" = "show") -> None:
        self.conversation, self.read, self.reasoning = conversation, read, reasoning

    def run(self, first: str | None) -> None:
        """Until /exit, the end of input, or Ctrl-C at the prompt."""
        if first is not None:
            self.attempt(lambda: self.ask(first))
        with suppress(EOFError):
            while self.turn(self.question()):
                pass

    def question(self) -> str:
        """One question, which may run over several lines."""
        lines = [self.read("> ")]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(self.read(". "))
        return "\n".join(lines)

    def turn(self, line: str) -> bool:
        """Answer a question or carry out a command; False to end the chat."""
        name, _, rest = line.strip().partition(" ")
        if name in ("/exit", "/quit"):
            return False
        if name.startswith("/"):
            self.attempt(lambda: self.commands().get(name, self.unknown)(rest.strip()))
        elif name:
            self.attempt(lambda: self.ask(line))
        return True

    def attempt(self, action: Callable[[], None]) -> None:
        """Do it; what goes wrong is said, and the chat goes on."""
        try:
            action()
        except Exception as error:
            if not is_expected(error):
                raise
            say(describe(error))

    def commands(self) -> dict[str, Callable[[str], None]]:
        """What can be done beside asking."""
        return {
            "/help": self.help,
            "/regen": self.regenerate,
            "/undo": self.undo,
            "/reset": self.reset,
            "/system": self.system,
            "/save": self.save,
        }

    def ask(self, text: str) -> None:
        """Answer a question."""
        stream(self.conversation.stream(text), self.reasoning)

    def help(self, _: str) -> None:
        """List the commands."""
        for line in HELP.split("\n"):
            say(line)

    def regenerate(self, _: str) -> None:
        """Answer the last question anew."""
        answer = self.conversation.regenerate()
        if answer is None:
            say("there is no question yet")
        else:
            stream(answer, self.reasoning)

    def undo(self, _: str) -> None:
        """Take back the last exchange."""
        question = self.conversation.undo()
        say("there is no exchange to take back" if question is None else f"taken back: {question}")

    def reset(self, _: str) -> None:
        """Forget the conversation."""
        self.conversation.reset()
        say("the conversation was discarded")

    def system(self, text: str) -> None:
        """Show the system prompt, or set it."""
        if text:
            self.conversation.system = text
        say(f"system prompt: {self.conversation.system or 'none (the template may have its own)'}")

    def save(self, name: str) -> None:
        """Write the conversation to a file."""
        if not name:
            say("name a file: /save chat.json")
            return
        self.conversation.save(name)
        say(f"wrote {name}")

    def unknown(self, _: str) -> None:
        """Say where help is."""
        say("no such command; /help lists them")


def stream(answer: "TextStream", reasoning: "Reasoning") -> None:
    """Print an answer as it comes; Ctrl-C stops it. Why it stopped is said unless the model ended it."""
    try:
        with answer:
            write_answer(answer, reasoning)
    except KeyboardInterrupt:
        pass  # the result says so
    sys.stdout.write("\n")
    sys.stdout.flush()
    if answer.result.ended != "end":
        say(f"[{answer.result.explanation}]")


def chat(
    model: "Model",
    session: "Session",
    conversation: "Conversation",
    *,
    first: str | None,
    verbosity: "Verbosity",
) -> None:
    """Chat until the end, then say what it cost."""
    for notice in model.text_notices(chat=True):
        say(notice)
    say(f"{model.name}: /help lists commands")
    summary = verbosity.summary
    try:
        Loop(conversation, line_reader(), verbosity.reasoning).run(first)
    finally:
        if session.report().decode_tokens and summary == "all":
            say_summary(engine_figures(model, session))
        elif session.report().decode_tokens and summary == "line":
            say_chat_line(session)


def line_reader() -> Reader:
    """Lines of the terminal, with editing and history; plain lines from a file or a pipe."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        with suppress(ImportError):
            import readline  # importing it is what gives input() editing and history

            # Python turns this off; with it, a pasted text of several lines is one question.
            readline.parse_and_bind("set enable-bracketed-paste on")
        return input
    return piped_line


def piped_line(_: str) -> str:
    """The next line of standard input."""
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\n")
