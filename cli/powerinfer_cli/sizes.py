"""Amounts as people write them: memory (``40MiB``, ``4G``, ``1.5GB``) and shares (``1%``, ``0.01``)."""

import re
from fractions import Fraction

_UNITS = {"": 1, "b": 1} | {
    spelling: base**power
    for power, letter in enumerate("kmgt", start=1)
    for spelling, base in ((letter, 1024), (f"{letter}ib", 1024), (f"{letter}b", 1000))
}
_AMOUNT = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", re.ASCII)
_SHARE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(%?)\s*", re.ASCII)
_LONGEST = 32


def parse_size(text: str) -> int:
    """Bytes in ``text``: K/KiB, M/MiB, G/GiB, T/TiB count in 1024s, kB, MB, GB, TB in 1000s.

    Decimal fractions are exact, and what is left below one byte is dropped. Raises ValueError.
    """
    match = _AMOUNT.fullmatch(text) if len(text) <= _LONGEST else None
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise ValueError(
            f"{text[:_LONGEST]!r} is not an amount of memory; write for example 40MiB, 1.5GiB or 8GB"
        )
    return int(Fraction(match[1]) * unit)


def format_size(count: int) -> str:
    """``count`` bytes with a unit that keeps the number readable: ``98.4 MiB``."""
    if count < 1024:
        return f"{count} B"
    value = float(count)
    power = 0
    while value >= 1024 and power < 4:
        value /= 1024
        power += 1
    return f"{value:.1f} {'KMGT'[power - 1]}iB"


def parse_share(text: str) -> float:
    """The share in ``text``: ``1%`` and ``0.01`` are the same. Raises ValueError."""
    match = _SHARE.fullmatch(text) if len(text) <= _LONGEST else None
    if match is None:
        raise ValueError(f"{text[:_LONGEST]!r} is not a share; write for example 1% or 0.01")
    return float(Fraction(match[1]) / (100 if match[2] else 1))
