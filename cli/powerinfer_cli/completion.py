"""One prompt, one answer."""

import sys
from collections.abc import Sequence
from contextlib import closing
from typing import TYPE_CHECKING

from powerinfer_cli.console import emit_json, progress, say
from powerinfer_cli.summary import run_figures, say_summary

if TYPE_CHECKING:
    from powerinfer_cli.run_command import Prompt
    from powerinfer_tools.engine import Engine
    from powerinfer_tools.generation import Generation, GenerationOptions
    from powerinfer_tools.progress import Progress
    from powerinfer_tools.text import Tokenizer

#: A prompt that is longer than this shows a progress bar.
LONG_PROMPT = 1024


def complete(
    engine: "Engine", text: str, options: "GenerationOptions", given: "Prompt", *, as_json: bool
) -> None:
    """Stream the continuation of ``text`` (or the model's answer to it) and say what it cost."""
    from powerinfer_tools.generation import Generation
    from powerinfer_tools.text import Tokenizer

    tokenizer = Tokenizer.from_gguf(engine.model.gguf)
    for notice in tokenizer.notices:
        say(notice)
    ids = prompt_ids(engine, tokenizer, text, given)
    listener = progress() if len(ids) > LONG_PROMPT else None
    generation = Generation(engine, tokenizer, ids, options, progress=listener)
    interrupted = stream(generation, listener, len(ids), silent=as_json)
    figures = run_figures(engine, generation)
    if as_json:
        emit_json(figures)
    else:
        say(f"ended: {generation.explanation}")
        say_summary(figures)
    if interrupted:
        raise KeyboardInterrupt


def prompt_ids(engine: "Engine", tokenizer: "Tokenizer", text: str, given: "Prompt") -> Sequence[int]:
    """Token ids of the prompt as it is, or as the first message of a chat."""
    if not given.chat and given.system is None:
        return tokenizer.encode(text, parse_special=given.special)
    from powerinfer_cli.chat import opening

    return opening(engine, tokenizer, text, given.system)


def stream(generation: "Generation", listener: "Progress | None", prompt: int, *, silent: bool) -> bool:
    """Print the text as it comes. Whether Ctrl-C ended it."""
    if listener is not None:
        listener.start("prompt", prompt, "tokens")
    try:
        with closing(generation):
            for piece in generation:
                if listener is not None:
                    listener.finish()
                    listener = None
                if not silent:
                    sys.stdout.write(piece.text)
                    sys.stdout.flush()
    except KeyboardInterrupt:
        return True
    finally:
        if not silent:
            sys.stdout.write("\n")
            sys.stdout.flush()
    return False
