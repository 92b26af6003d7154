"""``powerinfer run``: generate text, or chat."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from powerinfer_cli import options as opt
from powerinfer_cli.drafts import Drafts, check_drafts
from powerinfer_cli.files import find_model

if TYPE_CHECKING:
    from powerinfer import GenerateOptions
    from powerinfer.drafts import Draft
    from powerinfer.model import Mode

HELP = """Generate text from a prompt, or chat with the model.

The prompt comes from -p, from a file (-f) or from standard input. A model with a chat template answers the
prompt as a message. --raw continues the text as it is, and so does a model without a template. -i starts a
chat: /help lists its commands, and Ctrl-C stops the answer or, at the prompt, the program. Text goes to
standard output, and one line of summary to standard error (-v: all figures, -q: nothing).

\b
Examples:
  powerinfer run -p "Why is the sky blue?"
  powerinfer run --raw -p "The capital of France is" -n 32 --temp 0
  powerinfer run -m model.powerinfer.gguf -i -sys "Answer in one sentence."
  powerinfer run -f source.py --draft ngram --temp 0 -n 400
  git diff | powerinfer run -sys "Summarise this change." -f -
"""

_prompt = opt.in_panel("Prompt")
_length = opt.in_panel("Length")
_sampling = opt.in_panel("Sampling")
_form = opt.in_panel("Form")


@dataclass(frozen=True)
class Prompt:
    """Where the prompt comes from and what becomes of it."""

    prompt: Annotated[str | None, _prompt("--prompt", "-p", metavar="TEXT", help="The prompt.")] = None
    file: Annotated[
        Path | None, _prompt("--file", "-f", metavar="FILE", help="Read the prompt from a file; - is stdin.")
    ] = None
    interactive: Annotated[bool, _prompt("--interactive", "-i", help="Chat.")] = False
    chat: Annotated[
        bool | None,
        _prompt(
            "--chat/--raw",
            help="Answer the prompt through the chat template, or continue it as it is. Without "
            "either: through the template, if the model has one.",
            show_default=False,
        ),
    ] = None
    special: Annotated[
        bool,
        _prompt(
            "--special",
            help="Text such as <|im_start|> in the prompt becomes a control token; implies --raw.",
        ),
    ] = False
    system: Annotated[
        str | None, _prompt("--system", "-sys", metavar="TEXT", help="System prompt, for the chat template.")
    ] = None


@dataclass(frozen=True)
class Length:
    """How much may be generated, and what ends it."""

    predict: Annotated[
        int, _length("--predict", "-n", min=-1, metavar="N", help="Tokens to generate; -1: until the end.")
    ] = -1
    ctx: Annotated[
        int | None,
        _length(
            "--ctx", "-c", min=1, metavar="N", help="Context in tokens. Without it: the model's, up to 4096."
        ),
    ] = None
    stop: Annotated[
        list[str] | None,
        _length("--stop", "-r", metavar="TEXT", help="Stop before this text; may be repeated."),
    ] = None
    ignore_eos: Annotated[bool, _length("--ignore-eos", help="Continue after end-of-text tokens.")] = False


@dataclass(frozen=True)
class Form:
    """What the text must look like."""

    json_schema: Annotated[
        Path | None,
        _form("--json-schema", metavar="FILE", help="Generate JSON that fits this JSON schema."),
    ] = None
    grammar: Annotated[
        Path | None,
        _form("--grammar", metavar="FILE", help="Generate text that follows this grammar, in GBNF or Lark."),
    ] = None

    @property
    def given(self) -> bool:
        """Whether there is anything to keep to."""
        return self.json_schema is not None or self.grammar is not None


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; order and defaults are llama.cpp's."""

    temp: Annotated[
        float,
        _sampling(
            "--temp",
            metavar="T",
            callback=opt.finite,
            help="Temperature; 0 or less: always the likeliest token.",
        ),
    ] = 0.8
    top_k: Annotated[
        int, _sampling("--top-k", metavar="K", help="Keep the K likeliest tokens; 0 or less: all.")
    ] = 40
    top_p: Annotated[
        float,
        _sampling(
            "--top-p",
            min=0.0,
            max=1.0,
            metavar="P",
            help="Keep the likeliest tokens up to a total probability of P; 1: all.",
        ),
    ] = 0.95
    min_p: Annotated[
        float,
        _sampling(
            "--min-p",
            min=0.0,
            max=1.0,
            metavar="P",
            help="Keep tokens at least P times as likely as the likeliest one.",
        ),
    ] = 0.05
    typical: Annotated[
        float, _sampling("--typical", min=0.0, max=1.0, metavar="P", help="Locally typical sampling; 1: off.")
    ] = 1.0
    repeat_penalty: Annotated[
        float, _sampling("--repeat-penalty", min=0.01, metavar="X", help="Penalise repeated tokens; 1: off.")
    ] = 1.0
    repeat_last_n: Annotated[
        int,
        _sampling("--repeat-last-n", min=-1, metavar="N", help="Penalties count the last N tokens; -1: all."),
    ] = 64
    frequency_penalty: Annotated[
        float,
        _sampling(
            "--frequency-penalty", metavar="X", help="Penalise tokens by how often they occurred; 0: off."
        ),
    ] = 0.0
    presence_penalty: Annotated[
        float,
        _sampling("--presence-penalty", metavar="X", help="Penalise tokens that occurred at all; 0: off."),
    ] = 0.0
    samplers: Annotated[
        str | None,
        _sampling(
            "--samplers",
            metavar="NAMES",
            help="Samplers to apply, in this order. Without it: "
            "penalties;top_k;typ_p;top_p;min_p;temperature.",
        ),
    ] = None
    seed: Annotated[
        int | None,
        _sampling(
            "--seed",
            "-s",
            min=-1,
            metavar="N",
            help="Seed; the same seed repeats a run. Without it, or -1: random.",
        ),
    ] = None
    logit_bias: Annotated[
        list[str] | None,
        _sampling(
            "--logit-bias",
            "-l",
            metavar="ID±X",
            help="Add X to the logit of token ID before anything else (15043+1, 15043-inf); may be repeated. "
            "inspect --tokenize shows ids.",
        ),
    ] = None


Trace = Annotated[
    Path | None,
    typer.Option(
        "--trace",
        metavar="FILE",
        help="Write a timeline of the last token, as JSON for Perfetto or chrome://tracing.",
    ),
]


def command(
    *,
    model: opt.ModelChoice,
    trace: Trace = None,
    prompt: Prompt,
    length: Length,
    form: Form,
    sampling: Sampling,
    drafts: Drafts,
    placement: opt.Placement,
    check_recall: Annotated[
        bool,
        opt.in_panel("Placement")(
            "--check-recall",
            help="Also compute which neurons are active, and print the recall of the predictors. "
            "Slow; the text stays the same.",
        ),
    ] = False,
    learn: Annotated[
        Path | None,
        opt.in_panel("Placement")(
            "--learn",
            metavar="FILE",
            help="Count which experts are taken, or which neurons of a split file in mode gate-first. At the "
            "end, add the counts to the profile in this file.",
        ),
    ] = None,
    verbosity: opt.Verbosity,
    common: opt.Common,
) -> None:
    """Generate text, or chat."""
    if verbosity.verbose and verbosity.quiet:
        raise typer.BadParameter("choose one of -v and -q", param_hint="--quiet")
    if trace is not None and prompt.interactive:
        problem = "a chat has no last token; choose one of -i and --trace"
        raise typer.BadParameter(problem, param_hint="--trace")
    check_form(form, prompt, length)
    check_drafts(drafts, traced=trace is not None)
    text = prompt_text(prompt, as_json=common.json)
    path = find_model(model)
    if trace is not None:
        from powerinfer_formats.atomic import require_writable

        require_writable(trace)
    import powerinfer
    from powerinfer_cli.engines import listener, said

    options = generate_options(length, sampling, form)
    with (
        powerinfer.load(
            path,
            threads=common.threads,
            context=length.ctx,
            mode=cast("Mode | None", placement.engine_mode),
            device=placement.device,
            vram=placement.vram,
            kv_type=placement.kv_type,
            ram=placement.ram,
            placement=placement.placing,
            learn=learn,
            check_recall=check_recall,
            draft=cast("Draft | None", drafts.draft),
            draft_model=drafts.draft_model,
            progress=None if verbosity.quiet else listener(placement.device),
        ) as loaded,
        said(lambda: loaded.notices),
        loaded.session() as session,
    ):
        if prompt.interactive:
            from powerinfer_cli.chat import chat

            conversation = session.conversation(prompt.system, **options)
            chat(loaded, session, conversation, first=text, verbosity=verbosity)
        else:
            from powerinfer_cli.completion import Output, complete

            assert text is not None
            output = Output(verbosity.summary, common.json, verbosity.reasoning, trace)
            complete(loaded, session, text, options, prompt, output)


def check_form(form: Form, prompt: Prompt, length: Length) -> None:
    """Refuse what has no effect with a form, or contradicts it."""
    if not form.given:
        return
    option = "--grammar" if form.grammar is not None else "--json-schema"
    if form.grammar is not None and form.json_schema is not None:
        raise typer.BadParameter("choose one of --json-schema and --grammar", param_hint=option)
    if prompt.interactive:
        raise typer.BadParameter("has no effect in a chat; leave out -i", param_hint=option)
    if length.ignore_eos:
        raise typer.BadParameter(
            "has no effect with a schema or grammar, which says where the text ends", param_hint=option
        )


def parsed_bias(text: str) -> tuple[int, float]:
    """ID+X or ID-X, as llama.cpp has it."""
    digits = len(text) - len(text.lstrip("0123456789"))
    try:
        if text[digits : digits + 1] not in ("+", "-"):
            raise ValueError
        bias = float(text[digits + 1 :]) * (1 if text[digits] == "+" else -1)
        return int(text[:digits]), bias
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not a token id with a bias, such as 15043+1 or 15043-inf",
            param_hint="--logit-bias",
        ) from None


def samplers_of(text: str | None) -> tuple[str, ...]:
    """The samplers that ``--samplers`` names; an unknown one is a usage error."""
    from powerinfer_tools.errors import SamplingError
    from powerinfer_tools.generate.sampler_names import DEFAULT_SAMPLERS, sampler_chain

    if text is None:
        return DEFAULT_SAMPLERS
    try:
        return sampler_chain([name for name in text.split(";") if name.strip()])
    except SamplingError as error:
        raise typer.BadParameter(str(error), param_hint="--samplers") from None


def generate_options(length: Length, sampling: Sampling, form: Form) -> "GenerateOptions":
    """The options of the Python API."""
    from powerinfer_cli.engines import read_text

    options: GenerateOptions = {
        "max_tokens": length.predict,
        "stop": tuple(length.stop or ()),
        "ignore_eos": length.ignore_eos,
        "temperature": sampling.temp,
        "top_k": sampling.top_k,
        "typical_p": sampling.typical,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "repeat_penalty": sampling.repeat_penalty,
        "repeat_last_n": sampling.repeat_last_n,
        "frequency_penalty": sampling.frequency_penalty,
        "presence_penalty": sampling.presence_penalty,
        "samplers": samplers_of(sampling.samplers),
        "seed": sampling.seed,
        "logit_bias": dict(map(parsed_bias, sampling.logit_bias or ())),
    }
    if form.json_schema is not None:
        options["json_schema"] = read_text(form.json_schema)
    if form.grammar is not None:
        options["grammar"] = read_text(form.grammar)
    return options


def prompt_text(prompt: Prompt, *, as_json: bool) -> str | None:
    """The prompt; None for a chat that begins empty. Contradictions are usage errors."""
    if prompt.prompt is not None and prompt.file is not None:
        raise typer.BadParameter("choose one of -p and -f", param_hint="--file")
    if prompt.chat is False and (prompt.system is not None or prompt.interactive):
        other = "-i" if prompt.interactive else "--system"
        raise typer.BadParameter(f"has no chat template for {other}; choose one of them", param_hint="--raw")
    if prompt.interactive and as_json:
        raise typer.BadParameter("a chat has no JSON form; choose one of -i and --json", param_hint="--json")
    if prompt.prompt is not None:
        return prompt.prompt
    if prompt.file is None and prompt.interactive:
        return None
    if prompt.file is None and sys.stdin.isatty():
        raise typer.BadParameter("give a prompt (-p TEXT or -f FILE), or chat (-i)", param_hint="--prompt")
    from powerinfer_cli.engines import read_text

    return read_text(prompt.file or Path("-"))
