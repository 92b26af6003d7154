"""Amounts of memory are exact, and anything else is refused."""

import pytest

from powerinfer_cli.sizes import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("1", 1),
        ("512b", 512),
        ("40MiB", 40 * 2**20),
        ("40mib", 40 * 2**20),
        ("4G", 4 * 2**30),
        ("4GiB", 4 * 2**30),
        ("4GB", 4 * 10**9),
        ("1.5G", 3 * 2**29),
        ("1.5 GiB", 3 * 2**29),
        ("0.1GiB", 107374182),  # 107374182.4
        ("67.2GB", 67_200_000_000),
        ("9007199254740993", 2**53 + 1),  # not representable in a float
        ("2TiB", 2**41),
        ("3K", 3072),
        ("3kB", 3000),
    ],
)
def test_sizes_are_exact(text: str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "MiB", "-1", "1e9", "1,5G", "1x", "1.G", ".5G", "inf", "nan", "0x10", "4 G iB", "١G", "9" * 40],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not an amount of memory"):
        parse_size(text)


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (98362432, "93.8 MiB"),
        (3 * 2**39, "1.5 TiB"),
        (2**52, "4096.0 TiB"),
    ],
)
def test_sizes_for_people(count: int, expected: str) -> None:
    assert format_size(count) == expected
