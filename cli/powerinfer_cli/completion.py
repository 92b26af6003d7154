"""One prompt, one answer."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from powerinfer_cli.answers import write_answer
from powerinfer_cli.console import emit_json, progress, say
from powerinfer_cli.summary import run_figures, say_line, say_summary

if TYPE_CHECKING:
    from powerinfer import GenerateOptions, Message, Model, Session, TextStream
    from powerinfer_cli.options import Reasoning, Summary
    from powerinfer_cli.run_command import Prompt
    from powerinfer_tools.engine.timeline import Timeline
    from powerinfer_tools.progress import Progress

#: A prompt of more characters than this shows a progress bar.
LONG_PROMPT = 4096


@dataclass(frozen=True)
class Output:
    """What is printed beside the text, and the file that the trace goes to."""

    summary: "Summary"
    as_json: bool
    reasoning: "Reasoning" = "show"
    trace: Path | None = None


def complete(
    model: "Model",
    session: "Session",
    text: str,
    options: "GenerateOptions",
    prompt: "Prompt",
    output: Output,
) -> None:
    """Stream the continuation of ``text`` (or the model's answer to it) and say what it cost."""
    listener = progress() if len(text) > LONG_PROMPT else None
    if listener is not None:
        options["progress"] = listener
    timeline = session.trace() if output.trace is not None else None
    answer = begin(model, session, text, options, prompt)
    interrupted = show(answer, listener, output)
    if timeline is not None and output.trace is not None:
        write_trace(timeline, output.trace)
    if output.as_json:
        emit_json(run_figures(model, session, answer.result))
    elif output.summary == "all":
        say(f"ended: {answer.result.explanation}")
        say_summary(run_figures(model, session, answer.result))
    elif output.summary == "line":
        say_line(session, answer.result)
    if interrupted:
        raise KeyboardInterrupt


def write_trace(timeline: "Timeline", path: Path) -> None:
    """The timeline of the last token, where one was decoded."""
    if not timeline.events:
        say(f"no token was decoded, so {path} is not written")
        return
    timeline.write(path)
    say(f"wrote {path}")


def begin(
    model: "Model", session: "Session", text: str, options: "GenerateOptions", prompt: "Prompt"
) -> "TextStream":
    """The text to come: the continuation of the prompt, or the answer to it as a message."""
    chat = is_message(model, prompt)
    for notice in model.text_notices(chat=chat):
        say(notice)
    if not chat:
        return session.stream(model.tokenize(text, special=prompt.special), **options)
    if not text.strip() and prompt.system is None:
        from powerinfer_tools.errors import PowerInferError

        raise PowerInferError(
            "the message is empty: give one with -p, chat with -i, or begin a text with --raw"
        )
    messages: list[Message] = [{"role": "user", "content": text}]
    if prompt.system is not None:
        messages.insert(0, {"role": "system", "content": prompt.system})
    return session.stream_chat(messages, **options)


def is_message(model: "Model", prompt: "Prompt") -> bool:
    """Whether the prompt goes into the chat template: as asked, else where the model has one. A prompt with
    control tokens of its own (``--special``) is continued as it is."""
    if prompt.chat is not None:
        return prompt.chat
    if prompt.system is not None:
        return True
    return not prompt.special and model.has_chat_template


def show(answer: "TextStream", listener: "Progress | None", output: Output) -> bool:
    """Print the text as it comes, but where a JSON value follows. Whether Ctrl-C ended it."""
    if listener is not None:
        listener.start("prompt", None, "tokens")
        answer.on_first(listener.finish)
    try:
        with answer:
            if output.as_json:
                answer.finish()
            else:
                write_answer(answer, output.reasoning)
    except KeyboardInterrupt:
        return True
    finally:
        if not output.as_json:
            sys.stdout.write("\n")
            sys.stdout.flush()
    return False
