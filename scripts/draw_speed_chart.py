"""Draw docs/pictures/speed.svg from the tables in docs/LOG.md that compare with llama.cpp.

The figures are read from the log, so that the chart shows what was measured. A test compares the file with
the drawing of this script.

Usage: python scripts/draw_speed_chart.py [FILE]
"""

import re
import sys
from dataclasses import dataclass
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: The entries of the log with the figures: the newest, and an older one for what was not measured again.
STILL = "## 2026-11-30: measured on a still machine, beside llama.cpp and its server"
OLDER = "## 2026-11-24: AVX-512, bundles, and prefetch in two steps"
#: (entry, row of its table, number of the ratio in the row's last cell) → label. Two threads throughout.
BARS = {
    (STILL, "SmolLM2-135M Q4_1, prompt of 128 / decode, against llama.cpp", 0): "SmolLM2-135M, prompt",
    (STILL, "SmolLM2-135M Q4_1, prompt of 128 / decode, against llama.cpp", 1): "SmolLM2-135M, decode",
    (OLDER, "SmolLM2 Q4_1, both AVX2 only, decode", 0): "SmolLM2-135M, decode, both AVX2 only",
    (STILL, "qwen2.5-0.5b shape, Q4_K_M", 1): "Qwen2.5-0.5B shape, decode",
    (STILL, "mistral-7b shape, 8 layers, Q4_0 (prompt of 32)", 1): "Mistral-7B shape, decode",
    (
        OLDER,
        "the same, density 0.1, gate-first, decode, 16 tokens",
        0,
    ): "Mistral-7B shape, ReLU, decode, exact",
    (STILL, "qwen3-30b-a3b shape, 4 layers, Q4_0 (prompt of 64)", 1): "Qwen3-30B-A3B shape, decode",
}
WIDTH, LEFT, ROW, TOP, UNIT = 760, 300, 34, 58, 50.0


@dataclass(frozen=True)
class Ratio:
    """Median and range of speed over llama.cpp's."""

    median: float
    low: float
    high: float


def ratios(log: str, heading: str) -> dict[str, list[Ratio]]:
    """The ratios in the last cell of each row of one entry's tables, by the row's name.

    A row is named by its first cell; in a table of four columns (model, test, one thread, two threads) by the
    first two, and a row without a model belongs to the model above it.
    """
    entry = log.split(f"{heading}\n", 1)[1].split("\n## ", 1)[0]
    rows: dict[str, list[Ratio]] = {}
    model = ""
    for line in entry.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) not in (3, 4):
            continue
        model = cells[0] or model
        name = model if len(cells) == 3 else f"{model}, {cells[1]}"
        figures = re.findall(r"([\d.]+) \(([\d.]+) to ([\d.]+)\)", cells[-1])
        if figures:
            rows.setdefault(name, [Ratio(*(float(value) for value in figure)) for figure in figures])
    return rows


def bar(index: int, label: str, ratio: Ratio) -> str:
    """One bar with its range as a line."""
    y = TOP + index * ROW
    middle = y + ROW / 2 - 3
    at = {name: LEFT + UNIT * value for name, value in vars(ratio).items()}
    return (
        f'<text x="{LEFT - 10}" y="{middle + 4:.0f}" text-anchor="end">{escape(label)}</text>\n'
        f'<rect x="{LEFT}" y="{y}" width="{UNIT * ratio.median:.1f}" height="{ROW - 10}" fill="#3b76af"/>\n'
        f'<path d="M{at["low"]:.1f} {middle - 4}v8m0-4H{at["high"]:.1f}m0-4v8" stroke="#222" fill="none"/>\n'
        f'<text x="{at["high"] + 8:.1f}" y="{middle + 4:.0f}" font-weight="bold">'
        f"{ratio.median:.1f} ×</text>\n"
    )


def chart(log: str) -> str:
    """The picture as SVG. Raises KeyError where the log lacks a row."""
    tables = {heading: ratios(log, heading) for heading in (STILL, OLDER)}
    bars = "".join(
        bar(index, label, tables[heading][row][place])
        for index, ((heading, row, place), label) in enumerate(BARS.items())
    )
    height = TOP + len(BARS) * ROW + 22
    one = LEFT + UNIT
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
        'font-size="14" fill="#222">\n'
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>\n'
        '<text x="14" y="24" font-size="16" font-weight="bold">Speed on two CPU cores, llama.cpp = 1</text>\n'
        f"{bars}"
        f'<path d="M{LEFT} {TOP - 10}V{height - 20}" stroke="#222"/>\n'
        f'<path d="M{one:.1f} {TOP - 10}V{height - 20}" stroke="#b33" stroke-dasharray="4 3"/>\n'
        f'<text x="{one:.1f}" y="{TOP - 14}" text-anchor="middle" fill="#b33">llama.cpp</text>\n'
        f'<text x="14" y="{height - 6}" font-size="12">Medians of interleaved runs, lines: the range. '
        "Shapes have random weights. docs/LOG.md, 2026-11-30; AVX2 and ReLU: 2026-11-24</text>\n"
        "</svg>\n"
    )


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs/pictures/speed.svg"
    target.write_text(chart((ROOT / "docs/LOG.md").read_text(encoding="utf-8")), encoding="utf-8")
