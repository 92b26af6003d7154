"""SentencePiece models as bytes; the package that owns the format is not needed to know what they mean."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from powerinfer_formats import errors
from powerinfer_formats.sentencepiece_model import (
    ModelType,
    Piece,
    parse_sentencepiece,
    read_sentencepiece,
)
from sentencepiece_bytes import field, sentencepiece_bytes, varint

PIECES = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("▁the", -1.5, 1), ("<0x0A>", 0.0, 6)]


def test_a_model_as_bytes() -> None:
    data = (
        b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02"  # a piece: text, score, kind
        b"\x12\x02\x18\x02"  # how it was trained: model type
        b"\x1a\x04\x18\x01\x20\x00"  # how texts are normalised: dummy prefix, extra spaces
    )
    model = parse_sentencepiece(data, "x")
    assert model.pieces == (Piece("<unk>", 0.0, 2),)
    assert model.model_type is ModelType.BPE
    assert (model.add_dummy_prefix, model.remove_extra_whitespaces, model.charsmap) == (True, False, False)


def test_pieces_in_order_and_settings() -> None:
    model = parse_sentencepiece(sentencepiece_bytes(PIECES, charsmap=b"xy", add_dummy_prefix=False), "x")
    assert [(piece.text, piece.score, piece.kind) for piece in model.pieces] == PIECES
    assert model.charsmap
    assert not model.add_dummy_prefix


def test_defaults_are_those_of_the_format() -> None:
    model = parse_sentencepiece(field(1, field(1, b"a")), "x")
    assert model.pieces == (Piece("a", 0.0, 1),)
    assert (model.model_type, model.add_dummy_prefix, model.remove_extra_whitespaces) == (1, True, True)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (b"", errors.BadProtobuf, "no pieces"),
        (field(2, b""), errors.BadProtobuf, "no pieces"),
        (b"\x0a", errors.TruncatedFile, "inside a number"),
        (b"\x0a\x05ab", errors.TruncatedFile, "needs 5 bytes, 2 are left"),
        (b"\x0d\x00", errors.TruncatedFile, "needs 4 bytes"),
        (b"\x0a" + b"\xff" * 11, errors.BadProtobuf, "over 10 bytes"),
        (b"\x00\x00", errors.BadProtobuf, "number 0"),
        (b"\x0b", errors.BadProtobuf, "wire type 3"),
        (field(1, 7), errors.BadProtobuf, "a number where bytes"),
        (field(1, field(1, 7)), errors.BadProtobuf, "piece 0 is a number"),
        (field(1, field(1, b"")), errors.BadValue, "has 0 bytes"),
        (field(1, field(1, b"\xff")), errors.InvalidUTF8, "piece 0"),
        (field(1, field(1, b"a") + field(2, float("nan"))), errors.BadValue, "not finite"),
        (field(1, field(1, b"a") + field(3, 9)), errors.BadValue, "of kind 9"),
        (field(1, field(1, b"a")) + field(2, field(3, 8)), errors.BadValue, "model type 8"),
    ],
)
def test_a_malformed_model_is_refused(data: bytes, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        parse_sentencepiece(data, "x")


@settings(derandomize=True, deadline=None, max_examples=300)
@given(position=st.integers(0, 60), value=st.integers(0, 255), cut=st.integers(0, 90))
def test_damage_is_read_or_refused(position: int, value: int, cut: int) -> None:
    damaged = bytearray(sentencepiece_bytes(PIECES))
    damaged[position] = value
    try:
        parse_sentencepiece(bytes(damaged[: len(damaged) - cut]), "x")
    except errors.FormatError:
        return


def test_varints() -> None:
    assert varint(300) == b"\xac\x02"


def test_a_directory_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(errors.FormatError):
        read_sentencepiece(tmp_path)
