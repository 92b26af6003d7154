"""The chat loop, over a scripted engine: questions, commands, Ctrl-C, the end of input."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import cast

import pytest

from powerinfer import Session
from powerinfer_cli.chat import Loop
from powerinfer_tools.engine import Engine
from powerinfer_tools.text import Tokenizer
from powerinfer_tools.text.chat import PlainTemplate
from scripted_engine import ScriptedEngine
from small_vocabularies import spm

TOKENIZER = Tokenizer.from_gguf(spm(add_space_prefix=False))
END = TOKENIZER.tokens.ids["</s>"]


class Conversation:
    """A chat whose model answers each question with the next of ``answers``."""

    def __init__(self, answers: list[str], system: str | None = None, context: int = 1000) -> None:
        self.answers = [[*TOKENIZER.encode(answer, add_bos=False), END] for answer in answers]
        self.pending: list[int] = []
        self.engine = ScriptedEngine(self.next_token, TOKENIZER.vocabulary, context)
        session = Session(cast(Engine, self.engine), TOKENIZER, PlainTemplate(TOKENIZER))
        self.chat = session.conversation(system, temperature=0)

    def next_token(self, _: list[int]) -> int:
        if not self.pending:
            self.pending = self.answers.pop(0)
        return self.pending.pop(0)

    @property
    def said(self) -> list[tuple[str, str]]:
        return [(message["role"], message["content"]) for message in self.chat.messages]


def typed(lines: Iterable[str]) -> Callable[[str], str]:
    """A person who types these lines, then Ctrl-D."""
    waiting = iter(lines)

    def read(_: str) -> str:
        for line in waiting:
            return line
        raise EOFError

    return read


def run(conversation: Conversation, *lines: str, first: str | None = None) -> None:
    Loop(conversation.chat, typed(lines)).run(first)


def test_questions_are_answered_in_turn(capsys: pytest.CaptureFixture[str]) -> None:
    conversation = Conversation(["hello", "held"])
    run(conversation, "how", "", "whole")
    assert capsys.readouterr() == ("hello\nheld\n", "")
    assert conversation.said == [
        ("user", "how"),
        ("assistant", "hello"),
        ("user", "whole"),
        ("assistant", "held"),
    ]


def test_a_first_question_comes_before_what_is_typed() -> None:
    conversation = Conversation(["hello", "held"])
    run(conversation, "two", first="one")
    assert [text for role, text in conversation.said if role == "user"] == ["one", "two"]


def test_a_question_over_several_lines() -> None:
    conversation = Conversation(["hello"])
    run(conversation, "one \\", "two\\", "three")
    assert conversation.said[0] == ("user", "one \ntwo\nthree")


def test_exit_ends_before_the_next_line() -> None:
    conversation = Conversation(["hello"])
    run(conversation, "one", "/exit", "two")
    assert len(conversation.said) == 2


def test_regen_replaces_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    conversation = Conversation(["hello", "held"])
    run(conversation, "/regen", "one", "/regen")
    assert conversation.said == [("user", "one"), ("assistant", "held")]
    assert capsys.readouterr() == ("hello\nheld\n", "there is no question yet\n")


def test_undo_and_reset(capsys: pytest.CaptureFixture[str]) -> None:
    conversation = Conversation(["hello", "held"], system="lower")
    run(conversation, "one", "/undo", "/undo", "two", "/reset")
    assert conversation.said == [("system", "lower")]
    assert capsys.readouterr().err.splitlines() == [
        "taken back: one",
        "there is no exchange to take back",
        "the conversation was discarded",
    ]


def test_system_is_shown_and_set(capsys: pytest.CaptureFixture[str]) -> None:
    conversation = Conversation([])
    run(conversation, "/system", "/system be whole")
    assert conversation.chat.system == "be whole"
    assert capsys.readouterr().err.splitlines()[1] == "system prompt: be whole"


def test_save_writes_the_conversation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "chat.json"
    run(Conversation(["hello"]), "one", f"/save {path}", "/save", f"/save {tmp_path}/gone/chat.json")
    assert json.loads(path.read_text()) == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "hello"},
    ]
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == [f"wrote {path}", "name a file: /save chat.json"]
    assert len(lines) == 3  # the folder that isn't there: said, and the chat went on


def test_help_and_unknown_commands(capsys: pytest.CaptureFixture[str]) -> None:
    run(Conversation([]), "/help", "/halp")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("/help")
    assert lines[-1] == "no such command; /help lists them"


def test_ctrl_c_stops_the_answer_and_the_chat_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    conversation = Conversation(["hello hello hello", "held"])
    prompt = len(TOKENIZER.encode("User: one\nAssistant:"))
    conversation.engine.interrupt_at = prompt + 2
    run(conversation, "one")
    assert conversation.said[0] == ("user", "one")
    stopped = conversation.said[1][1]
    assert stopped
    assert "hello hello hello".startswith(stopped)
    assert stopped != "hello hello hello"
    assert capsys.readouterr().err.splitlines() == ["[interrupted]"]
    conversation.engine.interrupt_at = None
    conversation.pending.clear()
    run(conversation, "two")
    assert conversation.said[3] == ("assistant", "held")


def test_ctrl_c_at_the_prompt_ends_the_program() -> None:
    def read(_: str) -> str:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Loop(Conversation([]).chat, read).run(None)


def test_a_full_context_is_said_and_the_chat_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    conversation = Conversation(["hello"], context=40)
    run(conversation, "h" * 100, "o")
    said = capsys.readouterr()
    assert "the context 40" in said.err
    assert said.out == "hello\n"


THOUGHT = "<think>is it so</think>\n\nyes"


def test_what_is_thought_stands_beside_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    """In the history too: templates place it, or leave it out."""
    conversation = Conversation([THOUGHT])
    run(conversation, "so?")
    assert capsys.readouterr().out == THOUGHT + "\n"
    assert conversation.chat.messages[-1] == {
        "role": "assistant",
        "content": "yes",
        "reasoning_content": "is it so",
    }


def test_thoughts_are_hidden(capsys: pytest.CaptureFixture[str]) -> None:
    Loop(Conversation([THOUGHT]).chat, typed(["so?"]), "hide").run(None)
    assert capsys.readouterr().out == "yes\n"


def test_a_terminal_shows_thoughts_dimmed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    run(Conversation([THOUGHT]), "so?")
    assert capsys.readouterr().out == "\x1b[2mis it so\x1b[0m\n\nyes\n"


def test_a_thought_without_an_end_leaves_the_terminal_plain(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    run(Conversation(["<think>is it"]), "so?")
    assert capsys.readouterr().out == "\x1b[2mis it\x1b[0m\n"
