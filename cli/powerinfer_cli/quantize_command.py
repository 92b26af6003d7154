"""``powerinfer quantize``: a float model as a GGUF file with quantised matrices."""

from collections import Counter
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from powerinfer_cli import options as opt
from powerinfer_cli.console import emit_json, progress, say
from powerinfer_cli.files import find_model, output_file
from powerinfer_cli.sizes import format_size
from powerinfer_cli.tables import print_facts

if TYPE_CHECKING:
    from powerinfer_tools.stages.quantize.quantization import QuantizeReport

HELP = """Write a float model (a Hugging Face directory or a GGUF file) as a GGUF file of fewer bits.

The file, NAME.TYPE.gguf, is a source model: run it, or profile, plan and convert it. Embedding and output
head get at least Q8_0. Vectors, and rows that are not whole blocks, keep their type. The error of the
quantisation is measured and printed.

\b
Examples:
  powerinfer quantize -m Llama-2-7b-hf/
  powerinfer quantize -m Llama-2-7b-hf/ --type Q8_0 -o llama.gguf
"""


def command(
    *,
    model: opt.ModelChoice,
    row_type: Annotated[
        Literal["Q8_0", "Q4_0", "F16", "BF16"],
        typer.Option("--type", help="Type of the matrices."),
    ] = "Q4_0",
    output: opt.Output = None,
    common: opt.Common,
) -> None:
    """Write a float model with fewer bits."""
    source = find_model(model)
    path = output_file(output, source, f".{row_type}.gguf")
    from powerinfer_tools.stages.quantize.quantization import quantize_model

    report = quantize_model(source, path, row_type, progress())
    if common.json:
        emit_json(report.as_dict())
    else:
        show(report)


def show(report: "QuantizeReport") -> None:
    """What was written and what it costs."""
    say(f"wrote {report.output}")
    name, error = report.worst
    facts = [
        ("size", f"{format_size(report.nbytes)} (source {format_size(report.source_bytes)})"),
        ("matrices", report.row_type),
        *((f"relative error, {kind}", f"{value:.2e}") for kind, value in report.errors.items()),
        ("largest", f"{error:.2e}, {name}"),
    ]
    if report.kept:
        kinds = Counter(name.removesuffix(".weight").rpartition(".")[2] for name in report.kept)
        facts.append(("kept as they were", ", ".join(f"{count} × {kind}" for kind, count in kinds.items())))
    print_facts(facts)
