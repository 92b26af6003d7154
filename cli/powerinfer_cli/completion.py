"""One prompt, one answer."""

import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from powerinfer_cli.console import emit_json, progress, say, shown
from powerinfer_cli.summary import run_figures, say_line, say_summary

if TYPE_CHECKING:
    from powerinfer_cli.options import Summary
    from powerinfer_cli.run_command import Form, Prompt
    from powerinfer_tools.engine import Engine
    from powerinfer_tools.generate.generation import Generation, GenerationOptions
    from powerinfer_tools.progress import Progress
    from powerinfer_tools.text import Tokenizer

#: A prompt of more characters than this shows a progress bar.
LONG_PROMPT = 4096


@dataclass(frozen=True)
class Output:
    """What is printed beside the text, and the file that the trace goes to."""

    summary: "Summary"
    as_json: bool
    trace: Path | None = None


def complete(
    engine: "Engine",
    text: str,
    options: "GenerationOptions",
    given: "Prompt",
    form: "Form",
    output: Output,
) -> None:
    """Stream the continuation of ``text`` (or the model's answer to it) and say what it cost."""
    from powerinfer_tools.text import Tokenizer

    tokenizer = Tokenizer.from_gguf(engine.model.gguf)
    for notice in tokenizer.notices:
        say(notice)
    listener = progress() if len(text) > LONG_PROMPT else None
    if output.trace is not None:
        engine.trace()
    if form.given:
        generation = begin_formed(engine, tokenizer, text, options, given, form, listener)
    else:
        generation = begin(engine, tokenizer, text, options, given, listener)
    interrupted = stream(generation, listener, silent=output.as_json)
    if output.trace is not None:
        write_trace(engine, output.trace)
    if output.as_json:
        emit_json(run_figures(engine, generation))
    elif output.summary == "all":
        say(f"ended: {generation.explanation}")
        say_summary(run_figures(engine, generation))
    elif output.summary == "line":
        say_line(engine, generation)
    if interrupted:
        raise KeyboardInterrupt


def write_trace(engine: "Engine", path: Path) -> None:
    """The timeline of the last token, where one was decoded."""
    timeline = engine.trace()
    if not timeline.events:
        say(f"no token was decoded, so {path} is not written")
        return
    timeline.write(path)
    say(f"wrote {path}")


def begin(
    engine: "Engine",
    tokenizer: "Tokenizer",
    text: str,
    options: "GenerationOptions",
    given: "Prompt",
    listener: "Progress | None",
) -> "Generation":
    """The generation: of the prompt as it is, or as the first message of a chat."""
    from powerinfer_tools.generate.generation import Chat, generate
    from powerinfer_tools.text.chat import chat_template

    if not is_message(engine, given):
        ids = tokenizer.encode(text, parse_special=given.special)
        return generate(engine, tokenizer, ids, options, progress=listener)
    template = chat_template(engine.model.gguf, tokenizer)
    if template.notice is not None:
        say(template.notice)
    chat = Chat(engine, tokenizer, template, system=given.system, options=options)
    return chat.ask(text, progress=listener)


def is_message(engine: "Engine", given: "Prompt") -> bool:
    """Whether the prompt goes into the chat template: as asked, else where the model has one. A prompt with
    control tokens of its own (``--special``) is continued as it is."""
    from powerinfer_tools.text.chat import has_chat_template

    if given.chat is not None:
        return given.chat
    if given.system is not None:
        return True
    return not given.special and has_chat_template(engine.model.gguf)


def begin_formed(
    engine: "Engine",
    tokenizer: "Tokenizer",
    text: str,
    options: "GenerationOptions",
    given: "Prompt",
    form: "Form",
    listener: "Progress | None",
) -> "Generation":
    """The generation of text that keeps to a JSON schema or a grammar."""
    from dataclasses import replace

    from powerinfer_cli.engines import read_text
    from powerinfer_tools.generate.constraints import Grammar
    from powerinfer_tools.generate.generation import Generation

    if form.json_schema is not None:
        grammar = Grammar.of_schema(tokenizer, read_text(form.json_schema))
    else:
        assert form.grammar is not None
        grammar = Grammar.of_text(tokenizer, read_text(form.grammar))
    ids, stops = tokenizer.encode(text, parse_special=given.special), tuple[str, ...]()
    if is_message(engine, given):
        from powerinfer_tools.text.chat import Message, chat_template

        template = chat_template(engine.model.gguf, tokenizer)
        system = [Message("system", given.system)] if given.system is not None else []
        ids, stops = template.ids([*system, Message("user", text)]), template.stops
    options = replace(options, stop=options.stop + stops)
    sampler = grammar.sampler(options.sampling)
    return Generation(engine, tokenizer, ids, options, sampler=sampler, progress=listener)


def stream(generation: "Generation", listener: "Progress | None", *, silent: bool) -> bool:
    """Print the text as it comes. Whether Ctrl-C ended it."""
    if listener is not None:
        listener.start("prompt", None, "tokens")
    try:
        with closing(generation):
            for piece in generation:
                if listener is not None:
                    listener.finish()
                    listener = None
                if not silent:
                    sys.stdout.write(shown(piece.text))
                    sys.stdout.flush()
    except KeyboardInterrupt:
        return True
    finally:
        if not silent:
            sys.stdout.write("\n")
            sys.stdout.flush()
    return False
