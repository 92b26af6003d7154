"""``powerinfer bench --ffn``: one FFN block alone, by density and mode."""

from typing import TYPE_CHECKING

import typer

from powerinfer_cli.console import emit_json, progress
from powerinfer_cli.tables import print_table

if TYPE_CHECKING:
    from powerinfer_tools.measure.ffn_speedup import FFNRow


def parse_size(text: str) -> tuple[int, int]:
    """``WIDTHxNEURONS`` as two positive integers; a usage error otherwise."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise typer.BadParameter(f"{text!r} is not WIDTHxNEURONS, such as 4096x14336", param_hint="--ffn")
    return int(parts[0]), int(parts[1])


def parse_densities(text: str) -> list[float]:
    """Comma-separated shares in (0, 1]; a usage error otherwise."""
    try:
        densities = [float(part) for part in text.split(",")]
    except ValueError:
        densities = []
    if not densities or not all(0 < density <= 1 for density in densities):
        raise typer.BadParameter(
            f"{text!r} is not a list of shares above 0 and up to 1, such as 0.1,0.5", param_hint="--density"
        )
    return densities


def run(size: str, row_type: str, densities: list[float], threads: int | None, *, as_json: bool) -> None:
    """Measure and print."""
    width, neurons = parse_size(size)
    from powerinfer_tools.measure.ffn_speedup import bench_ffn_with, row_type_named

    try:
        kind = row_type_named(row_type)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--type") from None
    rows = bench_ffn_with(threads, width, neurons, kind, densities, progress())
    if as_json:
        emit_json([row.as_dict() for row in rows])
        return
    print_table(
        ("mode", "density", "speed-up", "range", "GB/s", "µs"),
        [_cells(row) for row in rows],
        title=f"FFN {size} {row_type.upper()}, random weights, {rows[0].threads} threads, {rows[0].isa}",
    )


def _cells(row: "FFNRow") -> tuple[str, ...]:
    return (
        row.mode,
        f"{row.density:g}",
        f"{row.speedup:.2f}",
        f"{row.low:.2f} to {row.high:.2f}",
        f"{row.gbps:.1f}",
        f"{row.microseconds:.0f}",
    )
