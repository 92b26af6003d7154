"""``powerinfer train``: predictors of which neurons will be active."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

import powerinfer_tools
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
    from powerinfer_formats.predictors import PredictionCost, RowTypeName
    from powerinfer_tools.stages.train import TrainReport

#: What perplexity is measured on where no text is named: of the demo's corpus, what its profile leaves out.
HELD_OUT_TEXT = Path(powerinfer_tools.__file__).parent / "data" / "corpus" / "newton-opticks-queries.txt"
_aim = opt.in_panel("Aim")
_making = opt.in_panel("Making")
_importing = opt.in_panel("Import")

HELP = """Make small predictors of which neurons will be active, one for each layer.

Reads NAME.trace.zst, which profile --trace writes, and writes NAME.predictors.safetensors. A predictor is a
low-rank approximation of the layer's gate (a singular value decomposition weighted by the covariance of the
inputs). Layers get ranks where these save the most bytes, within --budget. With --method sign, a predictor is
the signs of the gate's weights, one bit each, without training.

Each layer then gets the threshold that saves the most bytes within the allowed increase of perplexity,
measured with the engine on a text. Layers that would cost too much stay gate-first, which is exact. --recall
sets one recall for all layers instead. The result is measured on text that was not used for any choice,
printed, and stored in the file.

--import takes over the predictors of the original PowerInfer instead: a folder of model_0.pt, model_1.pt and
so on. Needs torch.

\b
Examples:
  powerinfer train -m model.relu.gguf
  powerinfer train -m model.relu.gguf --max-ppl-increase 0.01 --text book.txt
  powerinfer train -m model.relu.gguf --recall 0.98 --budget 0.05 --chart frontier.svg
  powerinfer train -m model.relu.gguf --method tuned
  powerinfer train -m model.relu.gguf --method sign
  powerinfer train -m relu-llama.gguf --import predictors/
"""


@dataclass(frozen=True)
class Aim:
    """What predictors are to reach."""

    max_increase: Annotated[
        float | None,
        _aim(
            "--max-ppl-increase",
            min=0.0,
            metavar="SHARE",
            help="Relative increase of perplexity that predictors may cause. Without it: 0.001.",
        ),
    ] = None
    recall: Annotated[
        float | None,
        _aim(
            "--recall",
            min=0.01,
            max=0.9999,
            metavar="SHARE",
            help="Share of active neurons to find in every layer, whatever the cost in perplexity.",
        ),
    ] = None
    budget: Annotated[
        float,
        _aim(
            "--budget",
            min=0.001,
            max=1.0,
            metavar="SHARE",
            help="Largest size of all predictors, as a share of the model's; with --method sign, "
            "their size is fixed.",
        ),
    ] = 0.1
    text: Annotated[
        Path | None,
        _aim(
            "--text",
            metavar="FILE",
            help="Text to measure perplexity on; must not be the profile's. Without it: a part of "
            "Newton's Opticks.",
        ),
    ] = None
    windows: Annotated[
        int,
        _aim(
            "--windows",
            min=3,
            metavar="N",
            help="Windows of the text to use, as long as the profile's: a third to choose on, the "
            "others to measure on.",
        ),
    ] = 12


@dataclass(frozen=True)
class Making:
    """How predictors are made."""

    method: Annotated[
        Literal["svd", "sign", "tuned"],
        _making(
            "--method",
            help="svd: the decomposition, without training; sign: the signs of the gate's weights, "
            "without training; tuned: the decomposition, then trained further in torch, layer by"
            " layer. If interrupted, the same command continues after the last finished layer.",
        ),
    ] = "svd"
    row_type: Annotated[
        Literal["Q8_0", "Q4_0", "F16", "F32"],
        _making(
            "--type",
            help="Row type of the predictors in the split file (with --import: F16); not for --method sign.",
        ),
    ] = "Q4_0"
    device: Annotated[
        Literal["cpu", "cuda"], _making("--device", help="Device for torch, with --method tuned.")
    ] = "cpu"
    seed: Annotated[int, _making("--seed", min=0, metavar="N", help="Seed for the choice of records.")] = 0
    restart: Annotated[
        bool, _making("--restart", help="Discard layers that an interrupted run has trained.")
    ] = False


@dataclass(frozen=True)
class Import:
    """Predictors that exist already."""

    folder: Annotated[
        Path | None,
        _importing("--import", metavar="DIR", help="Take over model_0.pt, model_1.pt … from this folder."),
    ] = None
    threshold: Annotated[
        float | None,
        _importing(
            "--threshold",
            metavar="X",
            help="Score from which a neuron counts as active (default: from its config.json, else 0).",
        ),
    ] = None


def command(
    *,
    ctx: typer.Context,
    model: opt.ModelChoice,
    trace: Annotated[
        Path | None,
        typer.Option("--trace", metavar="FILE", help="Trace. Without it: the one beside the model."),
    ] = None,
    output: opt.Output = None,
    chart: Annotated[
        Path | None,
        typer.Option(
            "--chart",
            metavar="FILE",
            help="Draw the recall of the predictors against the number of neurons that they name, "
            "into a .png or .svg file.",
        ),
    ] = None,
    aim: Aim,
    making: Making,
    imported: Import,
    common: opt.Common,
) -> None:
    """Make predictors of active neurons (ReLU models)."""
    if aim.recall is not None and aim.max_increase is not None:
        raise typer.BadParameter("choose one of --recall and --max-ppl-increase", param_hint="--recall")
    source = find_model(model)
    if imported.folder is not None:
        aims = ("trace", "max_increase", "recall", "budget", "text", "windows")
        opt.refuse_beside(ctx, "--import", *aims, "chart", "method", "device", "seed", "restart")
        row_type = making.row_type if opt.is_given(ctx, "row_type") else "F16"
        take_over(imported, source, output_file(output, source, PREDICTORS_SUFFIX), row_type, common.json)
        return
    if imported.threshold is not None:
        raise typer.BadParameter("is for --import", param_hint="--threshold")
    from powerinfer_tools.pictures import require_drawable
    from powerinfer_tools.stages.train import TrainOptions, draw_frontier, require_trainable, run_train

    require_trainable(source)
    if chart is not None:
        require_drawable(chart)
    records = trace or beside(source, TRACE_SUFFIX)
    if not records.is_file():
        raise InputMissing(
            f"{records}: no such file; make it with: "
            f"powerinfer profile -m {source} --corpus FILE --trace 4096"
        )
    if trace is None:
        say(f"using {records}")
    if aim.text is None:
        say(f"measuring perplexity on {HELD_OUT_TEXT.name}")
    path = output_file(output, source, PREDICTORS_SUFFIX)
    options = TrainOptions(
        source,
        records,
        path,
        method=making.method,
        recall=aim.recall,
        max_increase=0.001 if aim.max_increase is None else aim.max_increase,
        text=aim.text or HELD_OUT_TEXT,
        windows=aim.windows,
        budget=aim.budget,
        row_type=making.row_type,
        threads=common.threads,
        device=making.device,
        seed=making.seed,
        restart=making.restart,
    )
    report = run_train(options, progress())
    show(report, as_json=common.json)
    if chart is not None:
        draw_frontier(report.frontier, chart, report.header.model_name, aim.recall)
        say(f"wrote {chart}")


def take_over(imported: Import, source: Path, path: Path, row_type: "RowTypeName", as_json: bool) -> None:
    """Import a folder of predictors, and say what came of it."""
    from powerinfer_formats.records import to_plain
    from powerinfer_tools.stages.original.importing import ImportPredictors, import_predictors

    assert imported.folder is not None
    options = ImportPredictors(imported.folder, source, path, row_type, imported.threshold)
    header = import_predictors(options, progress())
    if as_json:
        emit_json({"path": path, **to_plain(header)})
        return
    say(f"wrote {path}")
    ranks = [layer.rank for layer in header.layers]
    print_facts(
        [
            ("predictors", f"of {len(ranks)} layers, {min(ranks)} to {max(ranks)} wide"),
            ("they read", "the residual stream, with a ReLU between their matrices"),
            ("recall", "unknown: nothing was measured"),
        ]
    )


def show(report: "TrainReport", *, as_json: bool) -> None:
    """A row for each layer, and the whole."""
    if as_json:
        emit_json(report.as_dict())
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("layer", "mode", "rank", "density", "predicted", "recall", "precision"):
        table.add_column(name, justify="right")
    header = report.header
    for index, layer in enumerate(header.layers):
        quality = layer.quality
        assert quality is not None, "train measures every layer"
        figures = (quality.density, quality.predicted_density, quality.recall, quality.precision)
        mode = "gate-first" if layer.kind == "none" else "predicted"
        table.add_row(str(index), mode, str(layer.rank or ""), *(f"{figure:.1%}" for figure in figures))
    result_console().print(table)
    say(f"wrote {report.output}")
    predicted = sum(layer.kind != "none" for layer in header.layers)
    ratio = report.mean("predicted_density") / max(report.mean("density"), 1e-12)
    facts = [
        ("predicted", f"{predicted} of {len(header.layers)} layers; the others stay gate-first"),
        ("recall", f"{report.mean('recall'):.1%}, on {header.test_records:,} tokens not learnt from"),
        ("computed", f"{report.mean('predicted_density'):.1%} of the neurons, {ratio:.2f} x the active ones"),
        ("size", f"{format_size(header.nbytes)}, {header.nbytes / report.model_bytes:.1%} of the model"),
    ]
    print_facts(facts + ([] if header.cost is None else cost_facts(header.cost)))


def cost_facts(cost: "PredictionCost") -> list[tuple[str, str]]:
    """What predicting costs in quality, and whether that is within what was allowed."""
    change = f"{cost.increase:+.2%} ({cost.predicted_perplexity:.4f} for {cost.perplexity:.4f})"
    if cost.max_increase is not None:
        within = cost.increase <= cost.max_increase
        change += f", {'within' if within else 'above'} the {cost.max_increase:.2%} allowed"
    return [
        ("perplexity", f"{change}, over {cost.tokens:,} tokens"),
        ("divergence", f"{cost.divergence:.2e} nats a token"),
    ]
