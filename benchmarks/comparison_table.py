"""The result of a comparison as a table a person can read."""

from collections.abc import Sequence
from typing import Any

HEADINGS = ("test", "threads", "powerinfer", "llama.cpp", "ratio", "(range)", "of read bandwidth")


def print_table(result: dict[str, Any]) -> None:
    """Print ``result`` as ``compare.compare`` makes it; speeds in tokens per second."""
    if result["kernels"]:
        _print_kernels(result["kernels"])
    touched = result["bytes_per_token"] / 2**20
    size = result["file_bytes"] / 2**20
    print(f"{result['model']} ({result['file']}, {size:,.0f} MiB; {touched:,.1f} MiB read per token)")
    for about in result["programs"].values():
        print(f"  {about['version']} [{about['build']}], loaded in {about['load_seconds']:.2f} s")
    if result["note"]:
        print(f"  {result['note']}")
    print()
    print_lines([HEADINGS, *(_cells(row) for row in result["rows"])])
    print("\ntokens per second, medians; the ratio is the median over neighbouring runs")


def _print_kernels(rows: list[dict[str, Any]]) -> None:
    """The memory and one product per row type, in GB/s."""
    lines = [("reads", "threads", "GB/s", "of the probe")]
    for row in rows:
        rate = f"{row['bytes_per_second'] / 1e9:.1f}"
        lines.append((row["name"], str(row["threads"]), rate, f"{row['share']:.0%}"))
    print_lines(lines)
    print("\nmedians; shares are medians over neighbouring runs\n")


def print_lines(lines: Sequence[tuple[str, ...]]) -> None:
    """Print rows of cells in columns as wide as they have to be."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    peer, ratio, share = row["peer"], row["ratio"], row["bandwidth_share"]
    return (
        row["test"],
        str(row["threads"]),
        f"{row['ours']:.1f}",
        "-" if peer is None else f"{peer:.1f}",
        "-" if ratio is None else f"{ratio:.2f}",
        "-" if ratio is None else f"{row['low']:.2f} to {row['high']:.2f}",
        "-" if share is None else f"{share:.0%} of {row['bandwidth'] / 1e9:.1f} GB/s",
    )
