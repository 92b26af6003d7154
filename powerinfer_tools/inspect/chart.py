"""A curve as text: dots of braille patterns, two by four per character."""

from powerinfer_tools.inspect.curve import Curve

_BLANK = 0x2800
# Bit of each dot in a braille character: [row of 4][column of 2] (Unicode, block "Braille Patterns").
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))


def terminal_chart(curve: Curve, width: int = 60, height: int = 16) -> str:
    """The curve in ``height`` lines of ``width`` characters, with axes in percent."""
    cells = [[_BLANK] * width for _ in range(height)]
    columns, rows = 2 * width, 4 * height
    previous = 0
    for column in range(columns):
        level = round(curve.activity(column / (columns - 1)) * (rows - 1))
        # Where the curve is steep, dots between two columns keep the line connected.
        for dot in range(min(previous + 1, level) if column else level, level + 1):
            row = rows - 1 - dot
            cells[row // 4][column // 2] |= _DOTS[row % 4][column % 2]
        previous = level
    lines = [f"share of activity ({curve.name})"]
    for index, line in enumerate(cells):
        label = {0: "100%", height // 2: "50%", height - 1: "0%"}.get(index, "")
        lines.append(f"{label:>5} ┤" + "".join(map(chr, line)).rstrip(chr(_BLANK)))
    lines.append("      └" + "─" * width)
    middle = width // 2
    lines.append("       0%" + "50%".center(2 * (middle - 2)) + "100%".rjust(width - 2 - 2 * (middle - 2)))
    lines.append("share of neurons, busiest first".rjust(7 + width))
    return "\n".join(lines)
