"""``powerinfer train``: predictors of which neurons will be active."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from powerinfer_cli import options as opt
from powerinfer_cli.console import emit_json, progress, result_console, say
from powerinfer_cli.files import (
    PREDICTORS_SUFFIX,
    TRACE_SUFFIX,
    InputMissing,
    beside,
    find_model,
    output_file,
)
from powerinfer_cli.sizes import format_size
from powerinfer_cli.tables import print_facts

if TYPE_CHECKING:
    from powerinfer_tools.training import TrainReport

HELP = """Make small predictors of which neurons will be active, one for each layer.

Reads NAME.trace.zst, which profile --trace makes, and writes NAME.predictors.safetensors. No gradient is
needed: each gate is cut to the rank that matters for the inputs seen (a singular value decomposition weighted
by their covariance), ranks are shared out between layers where they save the most bytes, and thresholds reach
the recall asked for. What came of it is measured on tokens that were used for nothing else.

\b
Examples:
  powerinfer train -m model.relu.gguf
  powerinfer train -m model.relu.gguf --recall 0.98 --budget 0.05
"""


def command(
    *,
    model: opt.Model = None,
    trace: Annotated[
        Path | None,
        typer.Option("--trace", metavar="FILE", help="Trace. Without it: the one beside the model."),
    ] = None,
    output: opt.Output = None,
    method: Annotated[
        Literal["svd"], typer.Option("--method", help="How predictors are made; no other way exists yet.")
    ] = "svd",
    recall: Annotated[
        float,
        typer.Option(
            "--recall", min=0.01, max=0.9999, metavar="SHARE", help="Share of active neurons to be found."
        ),
    ] = 0.95,
    budget: Annotated[
        float,
        typer.Option(
            "--budget",
            min=0.001,
            max=1.0,
            metavar="SHARE",
            help="Most that predictors may add to the model.",
        ),
    ] = 0.1,
    row_type: Annotated[
        Literal["Q8_0", "Q4_0", "F16", "F32"],
        typer.Option("--type", help="Row type of the predictors in the split file."),
    ] = "Q8_0",
    common: opt.Common,
) -> None:
    """Make predictors."""
    source = find_model(model)
    records = trace or beside(source, TRACE_SUFFIX)
    if not records.is_file():
        raise InputMissing(
            f"{records}: no such file; make it with: "
            f"powerinfer profile -m {source} --corpus FILE --trace 4096"
        )
    if trace is None:
        say(f"using {records}")
    path = output_file(output, source, PREDICTORS_SUFFIX)
    from powerinfer_tools.training import TrainOptions, run_train

    report = run_train(
        TrainOptions(source, records, path, method=method, recall=recall, budget=budget, row_type=row_type),
        progress(),
    )
    show(report, as_json=common.json)


def show(report: "TrainReport", *, as_json: bool) -> None:
    """A row for each layer, and the whole."""
    if as_json:
        emit_json(report.as_dict())
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("layer", "rank", "density", "predicted", "recall", "precision"):
        table.add_column(name, justify="right")
    header = report.header
    for index, (rank, quality) in enumerate([(layer.rank, layer.quality) for layer in header.layers]):
        figures = (quality.density, quality.predicted_density, quality.recall, quality.precision)
        table.add_row(str(index), str(rank), *(f"{figure:.1%}" for figure in figures))
    result_console().print(table)
    say(f"wrote {report.output}")
    ratio = report.mean("predicted_density") / max(report.mean("density"), 1e-12)
    print_facts(
        [
            ("recall", f"{report.mean('recall'):.1%}, on {header.test_records:,} tokens not learnt from"),
            ("predicted density", f"{report.mean('predicted_density'):.1%}, {ratio:.2f} x the true one"),
            ("size", f"{format_size(header.nbytes)}, {header.nbytes / report.model_bytes:.1%} of the model"),
        ]
    )
