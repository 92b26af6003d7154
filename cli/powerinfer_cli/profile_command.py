"""``powerinfer profile``: count what each neuron contributes while the model reads a corpus."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from powerinfer_cli import options as opt
from powerinfer_cli.boundary import guarded
from powerinfer_cli.console import emit, emit_json, progress, say
from powerinfer_cli.corpus_option import CorpusGroup
from powerinfer_cli.files import PROFILE_SUFFIX, TRACE_SUFFIX, find_model, output_file
from powerinfer_cli.grouped import flattened
from powerinfer_cli.help import HelpfulCommand
from powerinfer_cli.sizes import format_size

if TYPE_CHECKING:
    from powerinfer_formats.profile import Profile

HELP = """Run a corpus through a model and count which neurons are active.

Writes NAME.profile.safetensors: counts and histograms of every neuron, with the corpus' hashes. In a mixture
of experts it counts how often tokens take each expert and, if the activation makes true zeros, how often each
neuron of a taken expert is active. It reads windows from all over the corpus, and stops when both halves of
the tokens would place nearly the same neurons; --tokens N reads N tokens instead. The same command resumes
interrupted work. Profiles of parts of a corpus can be merged into the profile of the whole.

--import takes over counts of the original PowerInfer instead: a folder of activation_0.pt and so on, which
does not say how many tokens were counted. Needs torch.

\b
Examples:
  powerinfer profile -m model.gguf --corpus book.txt
  powerinfer profile -m model.gguf --corpus texts/ more.jsonl --tokens 200000
  powerinfer profile -m model.relu.gguf --corpus texts/ --trace 4096
  powerinfer profile -m relu-llama.gguf --import activation/ --tokens 1000000
  powerinfer profile -m model.gguf --corpus texts/ --shard 3/8
  powerinfer profile -m model.gguf --corpus texts/ --ray auto
  powerinfer profile merge model.shard-*.profile.safetensors -o model.profile.safetensors
"""

MERGE_HELP = """Merge profiles of the same model into one, as if it had read all the corpora.

\b
Example:
  powerinfer profile merge a.safetensors b.safetensors -o model.profile.safetensors
"""


def profile(
    *,
    ctx: typer.Context,
    model: opt.ModelChoice,
    corpus: Annotated[
        list[Path] | None,
        typer.Option("--corpus", metavar="FILE...", help="Text files, JSONL files or folders of them."),
    ] = None,
    output: opt.Output = None,
    window: Annotated[
        int | None,
        typer.Option(
            "--ctx", "-c", min=2, metavar="N", help="Tokens in one window of the text (default: 512)."
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            "--tokens",
            min=1,
            metavar="N",
            help="Read N tokens of the corpus; with --import: the number of tokens that were counted."
            " Without it: read until more tokens would change nothing.",
        ),
    ] = None,
    density: Annotated[
        float,
        typer.Option(
            "--density",
            min=0.001,
            max=0.999,
            metavar="SHARE",
            help="For activations without exact zeros: share of contributions that count as active.",
        ),
    ] = 0.2,
    trace: Annotated[
        int,
        typer.Option(
            "--trace",
            min=0,
            max=1 << 24,
            metavar="N",
            help="Also write NAME.trace.zst: FFN inputs and active neurons of N sampled tokens.",
        ),
    ] = 0,
    shard: Annotated[
        str | None,
        typer.Option(
            "--shard",
            metavar="I/N",
            help="Profile only part I of N parts of the corpus (whole files); profile merge joins the parts.",
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray",
            metavar="ADDRESS",
            help="Distribute the corpus, in whole files, over the machines of the Ray cluster at "
            "ADDRESS (auto: the cluster of this machine; local: only this machine).",
        ),
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Discard interrupted work and start again.")
    ] = False,
    folder: Annotated[
        Path | None,
        opt.in_panel("Import")(
            "--import", metavar="DIR", help="Take over activation_0.pt, activation_1.pt … from this folder."
        ),
    ] = None,
    common: opt.Common,
) -> None:
    """Count the activity of every neuron over the corpus."""
    if ctx.invoked_subcommand is not None:
        return
    if folder is not None:
        opt.refuse_beside(ctx, "--import", "corpus", "window", "density", "trace", "shard", "ray", "restart")
        take_over(folder, find_model(model), output, tokens, as_json=common.json)
        return
    if not corpus:
        raise typer.BadParameter("name at least one text file, JSONL file or folder", param_hint="--corpus")
    source, part = find_model(model), None if shard is None else parse_shard(shard)
    if part is not None:
        opt.refuse_beside(ctx, "--shard", "tokens", "trace", "ray")
    if ray is not None:
        opt.refuse_beside(ctx, "--ray", "tokens", "trace")
    path = output_file(output, source, shard_suffix(part))
    traced = trace_beside(path) if trace else None
    from powerinfer_tools.stages.profile import ProfileOptions, run_profile

    options = ProfileOptions(
        model=source,
        corpus=tuple(corpus),
        output=path,
        window=window,
        max_tokens=tokens,
        target_density=density,
        threads=common.threads,
        restart=restart,
        trace=trace,
        trace_output=traced,
        shard=part,
    )
    if ray is None:
        result = run_profile(options, progress())
    else:
        from powerinfer_tools.stages.profile.on_ray import run_profile_on_ray

        result = run_profile_on_ray(options, ray, progress())
    show(result, path, traced, as_json=common.json)


def parse_shard(text: str) -> tuple[int, int]:
    """ "2/8" as (2, 8); anything else is a usage error."""
    first, slash, second = text.partition("/")
    if not slash or not all(part.isascii() and part.isdigit() and len(part) < 7 for part in (first, second)):
        raise typer.BadParameter(f"{text!r} is not of the form I/N", param_hint="--shard")
    shard, count = int(first), int(second)
    if not 1 <= shard <= count:
        raise typer.BadParameter(f"shard {shard} is not from 1 to {count}", param_hint="--shard")
    return shard, count


def shard_suffix(shard: tuple[int, int] | None) -> str:
    """What the profile's name ends in: each shard has a file of its own."""
    return PROFILE_SUFFIX if shard is None else f".shard-{shard[0]}-of-{shard[1]}{PROFILE_SUFFIX}"


def take_over(folder: Path, source: Path, output: Path | None, tokens: int | None, *, as_json: bool) -> None:
    """Import a folder of counts, and say what came of it."""
    path = output_file(output, source, PROFILE_SUFFIX)
    from powerinfer_tools.stages.original.importing import ImportCounts, import_counts

    result = import_counts(ImportCounts(folder, source, path, tokens), progress())
    show(result, path, None, as_json=as_json)


def merge(
    profiles: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Profiles of the same model.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="File to write.")],
    json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Merge profiles."""
    from powerinfer_formats.profile import Profile

    merged = Profile.merge([Profile.load(path) for path in profiles])
    merged.save(output)
    show(merged, output, None, as_json=json)


def trace_beside(profile: Path) -> Path:
    """The trace that is made with ``profile``: beside it, under the same name."""
    name = profile.name.removesuffix(PROFILE_SUFFIX).removesuffix(".safetensors")
    return profile.with_name(name + TRACE_SUFFIX)


def show(result: "Profile", path: Path, traced: Path | None, *, as_json: bool) -> None:
    """What was counted, and where it is."""
    from powerinfer_formats.profile import ROUTING
    from powerinfer_tools.inspect import summarize_profile

    summary = summarize_profile(result)
    if as_json:
        emit_json({"path": path, "trace": traced, **summary})
        return
    say(f"wrote {path}")
    if traced is not None:
        say(f"wrote {traced} ({format_size(traced.stat().st_size)})")
    units = "experts" if result.activation == ROUTING else "neurons"
    emit(
        f"{result.tokens:,} tokens; {summary['density']:.1%} of the {units} are active for a token; "
        f"the busiest {summary['neurons_for_80_percent']:.1%} make 80% of the activity"
    )
    if "active_in_experts" in summary:
        active = summary["active_in_experts"]
        emit(f"inside an expert that a token takes, {active:.1%} of the neurons are active")


def subcommands() -> typer.Typer:
    """``profile`` with its subcommand ``merge``."""
    app = typer.Typer(cls=CorpusGroup, help=HELP, invoke_without_command=True, rich_markup_mode=None)
    app.callback()(guarded(flattened(profile)))
    app.command("merge", cls=HelpfulCommand, help=MERGE_HELP)(guarded(flattened(merge)))
    return app
