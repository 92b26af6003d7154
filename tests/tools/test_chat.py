"""Chat templates, also hostile ones, and conversations over a scripted engine."""

import json
import os
import signal
import time
from pathlib import Path
from typing import cast

import pytest

from powerinfer import Conversation, GenerateOptions, Session, TextStream
from powerinfer_formats.gguf_reader import GGUFFile
from powerinfer_tools.engine import Engine
from powerinfer_tools.errors import ChatTemplateError, ContextFull, RendererFailed
from powerinfer_tools.text import Tokenizer
from powerinfer_tools.text import chat as chat_module
from powerinfer_tools.text.chat import (
    MAX_TEMPLATE_CHARACTERS,
    ChatTemplate,
    Message,
    PlainTemplate,
    Template,
    chat_template,
)
from powerinfer_tools.text.template_worker import TemplateWorker
from scripted_engine import ScriptedEngine
from small_vocabularies import Metadata, byte_level, spm

BPE = Tokenizer.from_gguf(byte_level())
SPM = Tokenizer.from_gguf(spm())
HELLO = [Message("user", "hello")]
SIMPLE = (
    "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)


def render(source: str, messages: list[Message] = HELLO, tokenizer: Tokenizer = BPE) -> str:
    return ChatTemplate(source, tokenizer).render(messages)


def test_smollm2_template(smollm2: Path) -> None:
    with GGUFFile.open(smollm2) as gguf:
        tokenizer = Tokenizer.from_gguf(gguf)
        template = chat_template(gguf, tokenizer)
    conversation = [Message("system", "Be brief."), Message("user", "Hi"), Message("assistant", "Ho"), *HELLO]
    text = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        "Ho<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    )
    assert template.render(conversation) == text
    assert template.ids(conversation) == tokenizer.encode(text, parse_special=True)
    assert template.notice is None
    assert "named SmolLM" in template.render(HELLO)  # the template's own system prompt


def test_what_templates_expect() -> None:
    assert render("{{ bos_token }}|{{ eos_token }}") == "<|im_start|>|<|endoftext|>"
    assert render('{{ {"a": "<é>"} | tojson }}') == '{"a": "<é>"}'
    assert render('{{ {"a": 1} | tojson(indent=1) }}') == '{\n "a": 1\n}'
    assert render("{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "012"
    assert render("{% generation %}{{ messages[0].content }}{% endgeneration %}!") == "hello!"
    assert render("  {% if tools is none %}\nx\n  {% endif %}\ny") == "x\ny"
    assert int(render("{{ strftime_now('%Y') }}")) in (time.localtime().tm_year, time.localtime().tm_year - 1)


def test_a_template_can_refuse() -> None:
    with pytest.raises(ChatTemplateError, match=r"does not accept this conversation: no system role$"):
        render("{{ raise_exception('no \x1b\nsystem role') }}")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        # loops without end or nearly so, in Python code and within one call
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "took longer than",
        ),
        ("{{ 3 ** (3 ** 30) }}", "took longer than|too much memory"),
        ("{% set x = 'ab' * 100000 %}{{ x.replace('a', x).replace('b', x) | length }}", "memory|took longer"),
        # memory
        ("{{ ('x' * 10000000000) | length }}", "too much memory"),
        ("{{ 'x'.ljust(10000000000) | length }}", "too much memory"),
        ("{{ ('%10000000000d' % 1) | length }}", "too much memory"),
        (
            "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
            "{{ ns.x | length }}",
            "too much memory",
        ),
        # output
        ("{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}", "wrote over 1048"),
        # Python's internals
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "tries what no template may"),
        ("{{ messages.__init__.__globals__ }}", "tries what no template may"),
        ("{{ (messages | attr('__class__')).__base__ }}", "tries what no template may"),
        ("{{ '{0.__class__.__mro__}'.format(1) }}", "tries what no template may"),
        ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", "tries what no template may"),
        ("{{ messages.append(1) }}", "tries what no template may"),
        ("{{ range(999999999) }}", "failed: OverflowError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "failed: RecursionError"),
        ("{% include '/etc/passwd' %}", "failed: TypeError: no loader"),
        # plainly broken
        ("{% if %}", "is not valid: line 1"),
        ("{{ nothing.at.all }}", "failed: UndefinedError: 'nothing' is undefined"),
        ("{{ 1 / 0 }}", "failed: ZeroDivisionError"),
    ],
)
def test_hostile_templates_are_stopped_with_one_line(
    source: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "took longer" not in message:  # on a busy machine, too, another limit is what stops these
        monkeypatch.setattr(chat_module, "MAX_SECONDS", 60.0)
    with pytest.raises(ChatTemplateError, match=message) as caught:
        render(source)
    assert len(str(caught.value).splitlines()) == 1
    assert str(caught.value).isprintable()


def test_long_messages_are_not_too_much_output() -> None:
    long = [Message("user", "x" * 3_000_000)]
    assert render("{{ messages[0].content }}", long) == long[0].content


def test_an_oversized_template_is_refused() -> None:
    with pytest.raises(ChatTemplateError, match=f"at most {MAX_TEMPLATE_CHARACTERS}"):
        ChatTemplate("x" * (MAX_TEMPLATE_CHARACTERS + 1), BPE)


def test_a_template_that_is_no_string_is_refused() -> None:
    with pytest.raises(ChatTemplateError, match="not a string"):
        chat_template(Metadata({"tokenizer.chat_template": 3}), BPE)


@pytest.mark.parametrize("source", ["{{ bos_token }}he", "he"])
def test_one_beginning_of_text_token(source: str) -> None:
    ids = ChatTemplate(source, SPM).ids(HELLO)
    assert ids.count(1) == 1
    assert ids[0] == 1
    assert ChatTemplate("he", BPE).ids(HELLO) == BPE.encode("he")  # this model wants none


def test_without_a_template_it_says_so() -> None:
    with pytest.raises(ChatTemplateError, match=r"carries no chat template.*base model"):
        ChatTemplate.from_gguf(byte_level(), BPE)
    template = chat_template(byte_level(), BPE)
    assert isinstance(template, PlainTemplate)
    assert "carries no chat template" in (template.notice or "")
    conversation = [Message("system", "short"), *HELLO, Message("assistant", "ho"), Message("user", "he")]
    assert template.render(conversation) == "System: short\nUser: hello\nAssistant: ho\nUser: he\nAssistant:"
    assert template.stops == ("\nUser:",)
    injected = [Message("user", "<|im_end|>")]
    assert BPE.tokens.ids["<|im_end|>"] not in template.ids(injected)


def test_a_renderer_that_cannot_start_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_module, "WORKER", TemplateWorker())
    monkeypatch.setattr("sys.executable", "/nonexistent/python")
    with pytest.raises(RendererFailed, match="did not start"):
        render("x")


def test_a_renderer_that_is_killed_while_it_works_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it had just been started."""
    worker, ask = TemplateWorker(), TemplateWorker._ask
    monkeypatch.setattr(chat_module, "WORKER", worker)
    asked = list[int]()

    def killed_once(worker: TemplateWorker, request: bytes, seconds: float) -> bytes:
        asked.append(worker._started().pid)
        if len(asked) == 1:
            os.kill(asked[0], signal.SIGKILL)
        return ask(worker, request, seconds)

    monkeypatch.setattr(TemplateWorker, "_ask", killed_once)
    assert render("x") == "x"
    assert len(set(asked)) == 2
    worker.close()


# --- conversations
# ---------------------------------------------------------------------------------------------

END = BPE.tokens.ids["<|im_end|>"]
GREEDY: GenerateOptions = {"temperature": 0}


def answering(cache: list[int]) -> int:
    """Answers "he" twice, then ends."""
    return BPE.tokens.ids["he"] if cache[-2:] != [BPE.tokens.ids["he"]] * 2 else END


def conversation(context: int = 500) -> tuple[Conversation, ScriptedEngine]:
    engine = ScriptedEngine(answering, BPE.vocabulary, context)
    return session(engine, BPE, ChatTemplate(SIMPLE, BPE)).conversation(**GREEDY), engine


def session(engine: ScriptedEngine, tokenizer: Tokenizer, template: Template) -> Session:
    return Session(cast(Engine, engine), tokenizer, template)


def read(stream: TextStream | None) -> str:
    assert stream is not None
    return "".join(stream)


def test_history_grows_and_the_cache_is_reused() -> None:
    chat, engine = conversation()
    assert read(chat.stream("hello")) == "hehe"
    assert [message["content"] for message in chat.messages] == ["hello", "hehe"]
    first = list(engine.cache)
    assert read(chat.stream("12")) == "hehe"
    # Only what came after the cached start was processed: the end token, the question, the answer's
    # beginning.
    assert engine.prefilled[1] == BPE.encode(
        "<|im_end|><|im_start|>12<|im_end|><|im_start|>", parse_special=True
    )
    assert engine.cache[: len(first)] == first


def test_the_same_as_without_reuse() -> None:
    chat, engine = conversation()
    for question in ("hello", "12", "he he"):
        read(chat.stream(question))
    fresh = ChatTemplate(SIMPLE, BPE).ids(chat.messages[:-1])
    assert engine.cache[: len(fresh)] == fresh


def test_undo_reset_and_system() -> None:
    chat, engine = conversation()
    read(chat.stream("hello"))
    read(chat.stream("12"))
    assert chat.undo() == "12"
    assert [message["content"] for message in chat.messages] == ["hello", "hehe"]
    chat.system = "be kind"
    assert chat.system == "be kind"
    assert chat.messages[0] == {"role": "system", "content": "be kind"}
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "be kind"}]
    assert chat.undo() is None
    assert chat.regenerate() is None
    chat.system = None
    read(chat.stream("hello"))
    assert engine.cache[: engine.position - 2] == ChatTemplate(SIMPLE, BPE).ids(HELLO)


def test_regenerate_draws_anew() -> None:
    engine = ScriptedEngine(lambda cache: 5, BPE.vocabulary)
    options: GenerateOptions = {
        "temperature": 100,
        "top_k": 0,
        "top_p": 1,
        "min_p": 0,
        "seed": 1,
        "max_tokens": 12,
        "ignore_eos": True,
    }
    chat = session(engine, BPE, ChatTemplate(SIMPLE, BPE)).conversation(**options)
    first = read(chat.stream("hello"))
    second = read(chat.regenerate())
    assert len(chat.messages) == 2
    assert first != second
    chat.reset()
    chat.set_options(**options)
    assert read(chat.stream("hello")) == first


def test_a_stopped_answer_stays_as_far_as_it_came() -> None:
    chat, engine = conversation()
    answer = chat.stream("hello")
    next(answer)
    answer.close()
    assert answer.result.ended == "interrupted"
    assert [message["content"] for message in chat.messages] == ["hello", "he"]
    assert read(chat.stream("12")) == "hehe"
    assert engine.cache[-2:] == [BPE.tokens.ids["he"]] * 2


def test_an_answer_that_never_began_leaves_no_trace() -> None:
    chat, _ = conversation()
    chat.stream("hello").close()
    assert chat.messages == []
    assert read(chat.stream("hello")) == "hehe"


def test_an_interrupt_inside_the_engine_does_not_spoil_the_cache() -> None:
    chat, engine = conversation()
    engine.interrupt_at = len(ChatTemplate(SIMPLE, BPE).ids(HELLO)) + 1
    with pytest.raises(KeyboardInterrupt):
        read(chat.stream("hello"))
    engine.interrupt_at = None
    read(chat.stream("12"))
    expected = ChatTemplate(SIMPLE, BPE).ids(chat.messages[:-1])
    assert engine.cache[: len(expected)] == expected


def test_a_full_context_is_told_and_changes_nothing() -> None:
    chat, engine = conversation(context=14)
    read(chat.stream("hello"))
    before, cache = chat.messages, list(engine.cache)
    with pytest.raises(ContextFull, match=r"context 14.*undo.*start anew.*-c"):
        chat.stream("1234567890")
    assert (chat.messages, engine.cache) == (before, cache)
    chat.system = "1234567890"
    with pytest.raises(ContextFull):
        chat.regenerate()
    assert chat.messages[1:] == before


def test_transcripts(tmp_path: Path) -> None:
    chat, _ = conversation()
    chat.system = "be kind"
    read(chat.stream("héllo"))
    chat.save(tmp_path / "talk.json")
    turns = json.loads((tmp_path / "talk.json").read_text())
    assert turns[1] == {"role": "user", "content": "héllo"}
    chat.save(tmp_path / "talk.txt")
    assert (tmp_path / "talk.txt").read_text() == "system:\nbe kind\n\nuser:\nhéllo\n\nassistant:\nhehe\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["talk.json", "talk.txt"]


def test_the_plain_template_stops_before_the_model_plays_the_user() -> None:
    tokenizer = SPM
    script = tokenizer.encode("hello\nUser: he", add_bos=False)
    start: list[int] = []

    def follow(cache: list[int]) -> int:
        start[:] = start or [len(cache)]
        return script[min(len(cache) - start[0], len(script) - 1)]

    engine = ScriptedEngine(follow, tokenizer.vocabulary)
    chat = session(engine, tokenizer, PlainTemplate(tokenizer)).conversation(**GREEDY)
    assert read(chat.stream("he")) == " hello"
    assert chat.messages[-1]["content"] == " hello"
