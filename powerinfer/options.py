"""Options for generating text, and the turns of a conversation."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal, NotRequired, TypedDict

from powerinfer_tools.errors import SamplingError
from powerinfer_tools.generate.generation import GenerationOptions
from powerinfer_tools.generate.sampling import SamplingOptions
from powerinfer_tools.progress import Progress
from powerinfer_tools.text import Tokenizer

if TYPE_CHECKING:
    from powerinfer_tools.generate.constraints import Grammar


class Message(TypedDict):
    """One turn of a conversation, as the OpenAI API has it."""

    role: Literal["system", "user", "assistant"]
    content: str
    reasoning_content: NotRequired[str]


class GenerateOptions(TypedDict, total=False):
    """Keywords of every function that generates.

    ``max_tokens`` limits the text (-1: until the model ends it), ``stop`` strings end it, and with
    ``ignore_eos`` it goes on after end-of-text tokens. ``temperature`` 0 takes the likeliest token; ``seed``
    None draws a fresh seed. Order and defaults of the filters are llama.cpp's; ``samplers`` names other
    filters, or another order. If a ``json_schema`` (an object, or its text) or a ``grammar`` (GBNF or Lark)
    is given, the text conforms to it. ``logit_bias`` is added to the logits of token ids before everything
    else; -inf rules a token out. ``progress`` is told how much of the prompt has been processed.
    """

    max_tokens: int
    stop: Sequence[str]
    ignore_eos: bool
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    repeat_penalty: float
    repeat_last_n: int
    frequency_penalty: float
    presence_penalty: float
    seed: int | None
    logit_bias: Mapping[int, float]
    samplers: Sequence[str]
    json_schema: str | Mapping[str, Any]
    grammar: str
    progress: Progress | None


_SAMPLING = frozenset(field.name for field in fields(SamplingOptions))


def generation_options(options: GenerateOptions, stops: Sequence[str] = ()) -> GenerationOptions:
    """The engine's form of ``options``, with ``stops`` added to their own stop strings.

    Raises SamplingError for a value out of range, PowerInferError for an empty stop string, TypeError for a
    keyword that does not exist.
    """
    unknown = options.keys() - GenerateOptions.__annotations__.keys()
    if unknown:
        raise TypeError(f"no such option: {', '.join(sorted(unknown))}")
    stop = options.get("stop", ())
    if isinstance(stop, str):
        raise SamplingError(f"stop is {stop!r}, expected a sequence of strings")
    sampling = {name: value for name, value in options.items() if name in _SAMPLING}
    if "logit_bias" in options:
        sampling["logit_bias"] = tuple(options["logit_bias"].items())
    return GenerationOptions(
        sampling=SamplingOptions(**sampling),  # type: ignore[arg-type]
        max_tokens=options.get("max_tokens", -1),
        stop=(*stop, *stops),
        ignore_eos=options.get("ignore_eos", False),
    )


def form_of(options: GenerateOptions, tokenizer: Tokenizer) -> "Grammar | None":
    """The grammar that the text must conform to, if any. Raises SamplingError."""
    if "json_schema" not in options and "grammar" not in options:
        return None
    from powerinfer_tools.generate.constraints import Grammar

    if "json_schema" in options and "grammar" in options:
        raise SamplingError("text keeps to a json_schema or to a grammar, not to both")
    if options.get("ignore_eos"):
        raise SamplingError("a json_schema or grammar says where the text ends: leave out ignore_eos")
    if "json_schema" in options:
        return Grammar.of_schema(tokenizer, options["json_schema"])
    return Grammar.of_text(tokenizer, options["grammar"])
