"""The delta file: what is written is read, values are exact, and every fault has its error."""

import io
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from powerinfer_formats import errors, frames
from powerinfer_formats.delta import (
    KINDS,
    PASSED_TYPES,
    Change,
    Delta,
    DeltaHeader,
    DeltaQuality,
    Passing,
    Scaled,
)

LAYERS, WIDTH, NEURONS = 2, 7, 11


def scaled(rng: np.random.Generator, rows: int, columns: int) -> Scaled:
    codes = rng.integers(-127, 128, (rows, columns)).astype(np.int8)
    return Scaled(codes, rng.integers(-9, -4, columns).astype(np.int8))


def make(rank: int = 3, **changes: Any) -> Delta:
    rng = np.random.default_rng(1)
    header = DeltaHeader(
        fingerprint="ab" * 32,
        model_name="tiny",
        activation="relu",
        cut=0.0,
        row_type="Q8_0",
        down_type="Q8_0",
        layers=LAYERS,
        width=WIDTH,
        neurons=NEURONS,
        rank=rank,
        result_sha256="cd" * 32,
        learned_tokens=9,
        texts=("a.txt",),
        quality=(DeltaQuality("held-out windows", 100, 20.0, 24.0, 0.25),),
        tool_version="0",
    )

    def change(kind: str) -> Change:
        if kind == "down":
            return Change(scaled(rng, WIDTH, NEURONS))
        if not rank:
            return Change(scaled(rng, NEURONS, WIDTH))
        return Change(scaled(rng, NEURONS, rank), scaled(rng, WIDTH, rank))

    layers = tuple({kind: change(kind) for kind in KINDS} for _ in range(LAYERS))
    header = replace(header, **changes)
    fat = range(LAYERS if header.activation == "fatrelu" else 0)
    scales = tuple(np.exp(rng.normal(size=NEURONS)).astype(np.float32) for _ in fat)
    passed = range(LAYERS if header.row_type in PASSED_TYPES else 0)
    return Delta(header, layers, scales, tuple(passing(rng) for _ in passed))


def passing(rng: np.random.Generator) -> Passing:
    shares = scaled(rng, WIDTH, WIDTH)
    return Passing(
        Scaled(np.triu(shares.codes, 1), shares.exponents), rng.integers(-9, 9, WIDTH).astype(np.int8)
    )


@pytest.mark.parametrize(("rank", "activation"), [(0, "relu"), (3, "relu"), (3, "fatrelu")])
def test_what_was_written_is_read(tmp_path: Path, rank: int, activation: str) -> None:
    made = make(rank, activation=activation)
    made.save(tmp_path / "d")
    found = Delta.load(tmp_path / "d")
    assert found.header == made.header
    for first, second in zip(made.changes, found.changes, strict=True):
        for kind in KINDS:
            assert np.array_equal(first[kind].values(), second[kind].values())
    assert len(found.scales) == (LAYERS if activation == "fatrelu" else 0)
    for one, other in zip(made.scales, found.scales, strict=True):
        assert np.array_equal(one, other)
    assert len(found.passings) == 0
    made.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "d").read_bytes()


def test_what_rounding_passes_on_is_read(tmp_path: Path) -> None:
    made = make(activation="fatrelu", row_type="Q4_1")
    made.save(tmp_path / "d")
    found = Delta.load(tmp_path / "d")
    assert len(found.passings) == LAYERS
    for one, other in zip(made.passings, found.passings, strict=True):
        assert np.array_equal(one.shares.values(), other.shares.values())
        assert np.array_equal(one.sizes, other.sizes)


def test_faults_of_what_rounding_passes_on(tmp_path: Path) -> None:
    made = make(row_type="Q5_0")
    Delta(made.header, made.changes).save(tmp_path / "d")
    with pytest.raises(errors.MissingTensor, match="input_passing"):
        Delta.load(tmp_path / "d")
    Delta(replace(made.header, row_type="Q8_0"), made.changes, (), made.passings).save(tmp_path / "d")
    with pytest.raises(errors.UnexpectedTensor, match="input_"):
        Delta.load(tmp_path / "d")
    made.passings[1].sizes[3] = 64
    made.save(tmp_path / "d")
    with pytest.raises(errors.BadValue, match="layer 1: a size of inputs is beyond"):
        Delta.load(tmp_path / "d")
    made.passings[0].shares.codes[4, 4] = 1
    made.save(tmp_path / "d")
    with pytest.raises(errors.BadValue, match="layer 0: errors are passed on to columns before"):
        Delta.load(tmp_path / "d")


def test_products_are_exact_in_any_order() -> None:
    """A term has 14 bits and exponents are 27 apart at most, so no sum needs more bits than a double has."""
    rng = np.random.default_rng(2)
    outward, inward = scaled(rng, 5, 9), scaled(rng, 4, 9)
    outward.exponents[:] = np.arange(9) * 3 - 20
    inward.exponents[:] = 5
    change = Change(outward, inward)

    def product(row: np.ndarray, column: np.ndarray) -> Fraction:
        return sum(
            (Fraction(float(a)) * Fraction(float(b)) for a, b in zip(row, column, strict=True)), Fraction()
        )

    exact = [[product(row, column) for column in inward.values()] for row in outward.values()]
    assert change.values().tolist() == [[float(value) for value in row] for row in exact]
    assert all(Fraction(float(value)) == value for row in exact for value in row)


@pytest.mark.parametrize(
    ("fault", "changes"),
    [
        (errors.BadField, {"layers": 0}),
        (errors.BadField, {"width": 0}),
        (errors.BadField, {"neurons": 1 << 25}),
        (errors.BadField, {"rank": WIDTH + 1}),
        (errors.BadField, {"rank": -1}),
        (errors.BadField, {"activation": "silu"}),
        (errors.BadField, {"cut": 0.5}),
        (errors.BadField, {"activation": "fatrelu", "cut": -0.5}),
        (errors.BadField, {"row_type": "Q6_K"}),
        (errors.BadField, {"down_type": "Q4_1"}),
        (errors.BadField, {"fingerprint": "AB" * 32}),
        (errors.BadField, {"result_sha256": "ab"}),
        (errors.WrongShape, {"neurons": NEURONS + 1}),
        (errors.WrongShape, {"rank": 2}),
        (errors.UnexpectedTensor, {"layers": 1}),
        (errors.MissingTensor, {"layers": 3}),
    ],
)
def test_faults_of_the_header(tmp_path: Path, fault: type[Exception], changes: dict[str, Any]) -> None:
    made = make()
    Delta(replace(made.header, **changes), made.changes).save(tmp_path / "d")
    with pytest.raises(fault):
        Delta.load(tmp_path / "d")


def test_exponents_that_would_round(tmp_path: Path) -> None:
    made = make()
    made.changes[1]["up"].outward.exponents[:] = (-30, -1, -1)
    made.save(tmp_path / "d")
    with pytest.raises(errors.BadValue, match="layer 1, up: exponents more than 27 apart"):
        Delta.load(tmp_path / "d")
    made = make()
    made.changes[0]["down"].outward.exponents[4] = -64
    made.save(tmp_path / "d")
    with pytest.raises(errors.BadValue, match="layer 0, down: an exponent is beyond"):
        Delta.load(tmp_path / "d")


@pytest.mark.parametrize("value", [0.0, -1.0, 2.0**-21, 2.0**21, np.inf, np.nan])
def test_scales_that_no_neuron_can_have(tmp_path: Path, value: float) -> None:
    made = make(activation="fatrelu")
    made.scales[1][4] = value
    made.save(tmp_path / "d")
    with pytest.raises(errors.BadValue, match="layer 1: a neuron's scale is not within"):
        Delta.load(tmp_path / "d")


def test_scales_belong_to_fatrelu_alone(tmp_path: Path) -> None:
    made, fat = make(), make(activation="fatrelu")
    Delta(fat.header, fat.changes).save(tmp_path / "d")
    with pytest.raises(errors.MissingTensor, match="neuron_scale"):
        Delta.load(tmp_path / "d")
    Delta(made.header, made.changes, fat.scales).save(tmp_path / "d")
    with pytest.raises(errors.UnexpectedTensor, match="neuron_scale"):
        Delta.load(tmp_path / "d")


def test_faults_of_the_frame(tmp_path: Path) -> None:
    path = tmp_path / "d"
    make().save(path)
    whole = path.read_bytes()
    unpacked = zstandard.ZstdDecompressor().decompress(whole)
    unsized = io.BytesIO()
    with zstandard.ZstdCompressor().stream_writer(unsized, closefd=False) as stream:
        stream.write(unpacked)
    cases = [
        (errors.BadMagic, unpacked),
        (errors.BadFrame, whole + b"x"),
        (errors.BadFrame, unsized.getvalue()),
        (errors.BadFrame, zstandard.compress(unpacked[:-1])),
        (errors.BadFrame, zstandard.compress(b"hello")),
        (errors.BadMagic, b""),
        *((errors.BadFrame, whole[:cut]) for cut in (4, 5, len(whole) // 2, len(whole) - 1)),
    ]
    for fault, data in cases:
        path.write_bytes(data)
        with pytest.raises(fault, match="d: "):
            Delta.load(path)
    with pytest.raises(errors.NotARegularFile):
        Delta.load(tmp_path)
    with pytest.raises(errors.CannotRead):
        Delta.load(tmp_path / "none")


def test_another_model(tmp_path: Path) -> None:
    made = make()
    made.require_model("ab" * 32, "x", "d")
    with pytest.raises(errors.OtherModel, match=r"'tiny'.*'other'"):
        made.require_model("00" * 32, "other", "d")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\0" * (65 << 20), "over 1000 times as many"),
        (b"\0" * (1 << 20), "a header of 0 bytes"),
        ((1 << 40).to_bytes(8, "little") + b"{}", "a header of 1099511627776 bytes"),
        ((2).to_bytes(8, "little") + b"{}" + b"\0" * 900_000, "names 0 bytes, its frame has 900000"),
    ],
)
def test_a_bomb_is_refused_before_it_is_unpacked(
    tmp_path: Path, content: bytes, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a few kilobytes unpack to is judged by the head of it, without a copy of it on the disk."""
    path = tmp_path / "bomb.delta.zst"
    path.write_bytes(zstandard.ZstdCompressor(level=1).compress(content))
    taken: list[int] = []
    take = frames.FrameReader.take
    monkeypatch.setattr(frames.FrameReader, "take", lambda self, n: (taken.append(n), take(self, n))[1])
    with pytest.raises(errors.BadFrame, match=message):
        Delta.load(path)
    assert sum(taken) <= 16
