"""``powerinfer bench``: tokens per second of prompt processing and generation."""

import csv
import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from powerinfer_cli import bench_compare, bench_ffn
from powerinfer_cli import options as opt
from powerinfer_cli.console import emit, emit_json, plain, progress, say
from powerinfer_cli.files import find_model
from powerinfer_cli.sizes import format_size
from powerinfer_cli.summary import disk_line
from powerinfer_cli.tables import print_table

if TYPE_CHECKING:
    from powerinfer_tools.measure.bench_rows import BenchRow

HELP = """Measure tokens per second: rows ppN (a prompt of N tokens) and tgN (N tokens generated one by one).

Each row is the mean of the repetitions ± their standard deviation, with the share of this machine's measured
memory bandwidth that the run used (of experts, only those that were taken count). The rows can be compared
with those of llama-bench. Several files, or one file in several modes (FILE@MODE), run in turn, and each
speed is printed as a ratio to the first.

\b
Examples:
  powerinfer bench -m model.gguf
  powerinfer bench -m model.gguf -p 0 -n 256 -r 10 --json
  powerinfer bench model.gguf model.powerinfer.gguf
  powerinfer bench model.powerinfer.gguf@dense model.powerinfer.gguf@gate-first
  powerinfer bench --shape mistral-7b --density 0.1 -p 64 -n 32
  powerinfer bench --shape qwen3-30b-a3b --layers 12 -p 64 -n 32
  powerinfer bench --ffn 4096x14336 --type q4_0 --density 0.1,0.3,0.5
"""

#: Row type of synthetic weights.
_TYPE = "q4_0"


def command(
    *,
    files: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FILE[@MODE]...]",
            help="Files to measure in turn; ratios are to the first one.",
            show_default=False,
        ),
    ] = None,
    model: opt.ModelChoice,
    prompt: Annotated[
        int,
        typer.Option(
            "--prompt", "-p", min=0, metavar="N", help="Tokens of the prompt; 0 leaves the row out."
        ),
    ] = 512,
    generate: Annotated[
        int,
        typer.Option(
            "--generate", "-n", min=0, metavar="N", help="Tokens to generate; 0 leaves the row out."
        ),
    ] = 128,
    repetitions: Annotated[
        int, typer.Option("--repetitions", "-r", min=1, metavar="N", help="Runs per row.")
    ] = 5,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print the rows as CSV.")] = False,
    synthetic: opt.Synthetic,
    placement: opt.Placement,
    common: opt.Common,
) -> None:
    """Measure tokens per second."""
    if as_csv and common.json:
        raise typer.BadParameter("choose one of --csv and --json", param_hint="--csv")
    if not prompt and not generate and not synthetic.ffn and not synthetic.clear_cache:
        raise typer.BadParameter("with -p 0 and -n 0 there is nothing to measure", param_hint="-n")
    check_choice(files, model, synthetic, placement.mode)
    if files and len(files) > 1:
        if as_csv:
            raise typer.BadParameter("compares nothing; choose --json", param_hint="--csv")
        bench_compare.run(
            files,
            placement,
            prompt=prompt,
            generate=generate,
            rounds=repetitions,
            threads=common.threads,
            as_json=common.json,
        )
        return
    if files:
        path, mode = bench_compare.parse_contender(files[0])
        model = opt.ModelChoice(path)
        placement = placement if mode is None else replace(placement, mode=mode)
    if synthetic.clear_cache:
        clear_cache(synthetic, as_json=common.json)
        return
    if synthetic.ffn:
        densities = bench_ffn.parse_densities(synthetic.density or "0.1,0.3,0.5,1.0")
        bench_ffn.run(
            synthetic.ffn, synthetic.row_type or _TYPE, densities, common.threads, as_json=common.json
        )
        return
    path = made_up_model(synthetic) if synthetic.shape else find_model(model)
    from powerinfer_cli.engines import measured_bandwidth, opened_engine
    from powerinfer_tools.measure.bench_rows import bench

    context = max(prompt, generate, 1)
    with opened_engine(path, placement, threads=common.threads, context=context) as engine:
        rows = bench(
            engine,
            prompt=prompt,
            generate=generate,
            repetitions=repetitions,
            bandwidth=measured_bandwidth(engine),
            progress=progress(),
        )
        disk = engine.report().disk
    if common.json:
        emit_json([row.as_dict() for row in rows])
    elif as_csv:
        emit(as_csv_text(rows))
    else:
        print_table(
            ("test", "tok/s", "± dev", "bytes/token", "of bandwidth", "threads", "isa", "mode"),
            [table_row(row) for row in rows],
            title=rows[0].model if rows else None,
        )
    if disk is not None:
        say(disk_line(disk))


def check_choice(
    files: list[str] | None, model: opt.ModelChoice, synthetic: opt.Synthetic, mode: opt.Mode
) -> None:
    """One thing to measure, and no option that would be ignored."""
    options = {
        "FILE": files or None,
        "--model": model.given or None,
        "--shape": synthetic.shape,
        "--ffn": synthetic.ffn,
    }
    chosen = [name for name, value in options.items() if value is not None]
    if len(chosen) > 1:
        raise typer.BadParameter(f"choose one of {' and '.join(chosen)}", param_hint=chosen[-1])
    for name, value in {"--density": synthetic.density, "--type": synthetic.row_type}.items():
        if value is not None and not (synthetic.shape or synthetic.ffn):
            raise typer.BadParameter("is for --shape and --ffn", param_hint=name)
    of_shape = {
        "--keep": synthetic.keep,
        "--layers": synthetic.layers,
        "--skew": synthetic.skew,
        "--locality": synthetic.locality,
    }
    for name, given_value in of_shape.items():
        if given_value is not None and not synthetic.shape:
            raise typer.BadParameter("is for --shape", param_hint=name)
    if synthetic.skew is not None and synthetic.density is None and synthetic.locality is None:
        problem = "needs --density, the mean share that fires, or --locality, of experts"
        raise typer.BadParameter(problem, param_hint="--skew")
    if synthetic.shape and synthetic.density is None and mode in ("gate-first", "predicted"):
        raise typer.BadParameter(
            f"{mode} skips neurons: say with --density how many fire, such as 0.1", param_hint="--mode"
        )


def clear_cache(synthetic: opt.Synthetic, *, as_json: bool) -> None:
    """Remove the cached synthetic models and say how much that frees."""
    from powerinfer_tools.measure.synthetic.cache import clear, default_cache

    cache = synthetic.cache_dir or default_cache()
    freed = clear(cache)
    if as_json:
        emit_json({"path": cache, "freed_bytes": freed})
    else:
        emit(f"removed {format_size(freed)} of synthetic models under {cache}")


def made_up_model(synthetic: opt.Synthetic) -> Path:
    """The file of the synthetic model that was asked for; written first where it is not there."""
    from powerinfer_tools.measure.synthetic.cache import Request, cached, default_cache
    from powerinfer_tools.measure.synthetic.sparse import Sparsity
    from powerinfer_tools.measure.synthetic.topics import Topics

    sparsity = None
    if synthetic.density is not None:
        densities = bench_ffn.parse_densities(synthetic.density)
        if len(densities) > 1:
            raise typer.BadParameter("one share, with --shape", param_hint="--density")
        sparsity = Sparsity(densities[0], synthetic.skew or 0.0)
    topics = None
    if synthetic.locality is not None:
        topics = Topics(synthetic.locality, 0.5 if synthetic.skew is None else synthetic.skew)
    assert synthetic.shape is not None
    row_type = (synthetic.row_type or _TYPE).upper()
    request = Request(synthetic.shape, row_type, synthetic.layers, sparsity, topics)
    if synthetic.keep is not None:
        say(f"writing {request.name}, random weights, to {synthetic.keep}")
        request.write(synthetic.keep)
        return synthetic.keep
    path, written = cached(request, synthetic.cache_dir or default_cache())
    say(f"{'wrote' if written else 'using'} {path}: synthetic, random weights")
    return path


def table_row(row: "BenchRow") -> tuple[str, ...]:
    """A row's cells for the table."""
    return (
        row.test,
        f"{row.tokens_per_second:.2f}",
        f"{row.stddev:.2f}",
        format_size(round(row.bytes_per_token)),
        f"{row.bandwidth_share:.0%}",
        str(row.threads),
        row.isa,
        row.mode,
    )


def as_csv_text(rows: "Sequence[BenchRow]") -> str:
    """The rows as CSV with a heading line, without the last line's end."""
    text = io.StringIO()
    fields = [plain(row.as_dict()) for row in rows]
    names = list(fields[0]) if fields else ["test", "tokens_per_second", "stddev", "bandwidth_share"]
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(fields)
    return text.getvalue().rstrip("\n")
