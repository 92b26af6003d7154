"""Draw docs/pictures/speed.svg from the table in docs/LOG.md that compares with llama.cpp.

The figures are read from the log and stand nowhere else, so that the chart shows what was measured. A test
compares the file with what this would draw.

Usage: python scripts/draw_speed_chart.py [FILE]
"""

import re
import sys
from dataclasses import dataclass
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENTRY = "## 2026-11-24: AVX-512, bundles, and prefetch in two steps"
#: (model and test as the log has them) → label. The column is that of two threads.
BARS = {
    ("SmolLM2 Q4_1", "prompt, 512 tokens"): "SmolLM2-135M, prompt of 512 tokens",
    ("SmolLM2 Q4_1", "decode, 128 tokens"): "SmolLM2-135M, decode",
    ("SmolLM2 Q4_1, both AVX2 only", "decode"): "SmolLM2-135M, decode, both AVX2 only",
    ("qwen2.5-0.5b Q4_K_M, synthetic", "decode, 32 tokens"): "Qwen2.5-0.5B shape, decode",
    ("mistral-7b Q4_0, synthetic, dense", "decode, 16 tokens"): "Mistral-7B shape, decode",
    ("the same, density 0.1, gate-first", "decode, 16 tokens"): "the same, ReLU, a tenth active, exact",
}
WIDTH, LEFT, ROW, TOP, UNIT = 760, 300, 34, 58, 56.0


@dataclass(frozen=True)
class Ratio:
    """Median and range of speed over llama.cpp's."""

    median: float
    low: float
    high: float


def ratios(log: str) -> dict[tuple[str, str], Ratio]:
    """The rows of the entry's first table, two threads. A row without a model belongs to the one above."""
    entry = log.split(ENTRY, 1)[1].split("\n## ", 1)[0]
    rows: dict[tuple[str, str], Ratio] = {}
    model = ""
    for line in entry.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) != 4:
            continue
        model = cells[0] or model
        if match := re.match(r"([\d.]+) \(([\d.]+) to ([\d.]+)\)", cells[3]):
            rows.setdefault((model, cells[1]), Ratio(*(float(value) for value in match.groups())))
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
    rows = ratios(log)
    bars = "".join(bar(index, label, rows[key]) for index, (key, label) in enumerate(BARS.items()))
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
        "Shapes have random weights. docs/LOG.md, 2026-11-24</text>\n"
        "</svg>\n"
    )


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs/pictures/speed.svg"
    target.write_text(chart((ROOT / "docs/LOG.md").read_text(encoding="utf-8")), encoding="utf-8")
