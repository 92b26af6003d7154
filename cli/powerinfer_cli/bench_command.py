"""``powerinfer bench``: tokens per second of prompt processing and generation."""

import csv
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from powerinfer_cli import options as opt
from powerinfer_cli.console import emit, emit_json, plain, progress
from powerinfer_cli.files import find_model
from powerinfer_cli.sizes import format_size
from powerinfer_cli.tables import print_table

if TYPE_CHECKING:
    from powerinfer_tools.benchmarking import BenchRow

HELP = """Measure tokens per second: rows ppN (a prompt of N tokens) and tgN (N tokens generated one by one).

Each row is the mean of the repetitions ± their standard deviation, with the share of this machine's measured
memory bandwidth that it used. The rows compare with llama-bench's.

\b
Examples:
  powerinfer bench -m model.gguf
  powerinfer bench -m model.gguf -p 0 -n 256 -r 10 --json
"""


def command(
    *,
    model: opt.Model = None,
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
    placement: opt.Placement,
    common: opt.Common,
) -> None:
    """Benchmark a model."""
    if as_csv and common.json:
        raise typer.BadParameter("choose one of --csv and --json", param_hint="--csv")
    path = find_model(model)
    from powerinfer_cli.engines import measured_bandwidth, opened_engine
    from powerinfer_tools.benchmarking import bench

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
