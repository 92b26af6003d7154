"""Reads the vocabulary of a SentencePiece model (tokenizer.model), a protocol buffer, and judges all of it.

Read by ourselves: the ``sentencepiece`` package would bring a C++ parser to an untrusted file for the sake
of three lists. Source of the field numbers: ``sentencepiece_model.proto`` of that package; of the encoding:
the page on it of Protocol Buffers. Fields that are not needed are passed over by their length.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from powerinfer_formats import errors
from powerinfer_formats.mapped_file import map_file, unmap

MAX_FILE_BYTES = 64 << 20
MAX_PIECES = 1 << 22
MAX_PIECE_BYTES = 1 << 16

_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_PIECE_TEXT, _PIECE_SCORE, _PIECE_KIND = 1, 2, 3
_TRAINER_MODEL_TYPE = 3
_RULES, _DUMMY_PREFIX, _EXTRA_SPACES, _ESCAPES = 2, 3, 4, 5
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class ModelType(IntEnum):
    """How pieces are chosen; the format's default is UNIGRAM."""

    UNIGRAM = 1
    BPE = 2
    WORD = 3
    CHAR = 4


@dataclass(frozen=True)
class Piece:
    """One token. ``kind`` has the numbers of ``tokenizer.ggml.token_type``: GGUF took them from here."""

    text: str
    score: float = 0.0
    kind: int = 1


@dataclass(frozen=True)
class SentencePieceModel:
    """``charsmap``: whether texts are rewritten by a table; the others as in the format."""

    pieces: tuple[Piece, ...]
    model_type: ModelType = ModelType.UNIGRAM
    charsmap: bool = False
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True


def read_sentencepiece(path: str | os.PathLike[str]) -> SentencePieceModel:
    """Read ``path``. Raises ``BadProtobuf``, ``BadValue`` or the errors of mapping a file."""
    where = Path(path)
    mapping = map_file(where, "a SentencePiece model")
    try:
        if len(mapping) > MAX_FILE_BYTES:
            raise errors.BadProtobuf(where, f"has {len(mapping)} bytes, at most {MAX_FILE_BYTES} are read")
        return parse_sentencepiece(bytes(mapping), where)
    finally:
        unmap(mapping)


def parse_sentencepiece(data: bytes, file: str | os.PathLike[str]) -> SentencePieceModel:
    """The model that ``data`` encodes."""
    pieces: list[Piece] = []
    settings: dict[str, bool] = {}
    model_type = ModelType.UNIGRAM
    for number, value in _fields(data, file):
        if number not in (_PIECES, _TRAINER, _NORMALIZER):
            continue
        message = _message(value, f"field {number}", file)
        if number == _PIECES:
            if len(pieces) == MAX_PIECES:
                raise errors.BadProtobuf(file, f"has more than {MAX_PIECES} pieces")
            pieces.append(_piece(message, len(pieces), file))
        elif number == _TRAINER:
            model_type = _model_type(message, file)
        else:
            settings |= _normalizer(message, file)
    if not pieces:
        raise errors.BadProtobuf(file, "is not a SentencePiece model: it has no pieces")
    return SentencePieceModel(tuple(pieces), model_type, **settings)


def _piece(data: bytes, index: int, file: str | os.PathLike[str]) -> Piece:
    text, score, kind = "", 0.0, 1
    for number, value in _fields(data, file):
        if number == _PIECE_TEXT:
            text = _text(_message(value, f"piece {index}", file), index, file)
        elif number == _PIECE_SCORE and isinstance(value, float):
            score = value
        elif number == _PIECE_KIND and isinstance(value, int):
            kind = value
    if not math.isfinite(score):
        raise errors.BadValue(file, f"piece {index} has a score that is not finite")
    if not 1 <= kind <= 6:
        raise errors.BadValue(file, f"piece {index} is of kind {kind}, known are 1 to 6")
    return Piece(text, score, kind)


def _text(data: bytes, index: int, file: str | os.PathLike[str]) -> str:
    if not 1 <= len(data) <= MAX_PIECE_BYTES:
        raise errors.BadValue(file, f"piece {index} has {len(data)} bytes, expected 1 to {MAX_PIECE_BYTES}")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise errors.InvalidUTF8(file, f"piece {index} is not UTF-8") from None


def _model_type(data: bytes, file: str | os.PathLike[str]) -> ModelType:
    kind = 1
    for number, value in _fields(data, file):
        if number == _TRAINER_MODEL_TYPE and isinstance(value, int):
            kind = value
    try:
        return ModelType(kind)
    except ValueError:
        raise errors.BadValue(file, f"is of model type {kind}, known are 1 to 4") from None


def _normalizer(data: bytes, file: str | os.PathLike[str]) -> dict[str, bool]:
    names = {
        _DUMMY_PREFIX: "add_dummy_prefix",
        _EXTRA_SPACES: "remove_extra_whitespaces",
        _ESCAPES: "escape_whitespaces",
    }
    flags: dict[str, bool] = {}
    for number, value in _fields(data, file):
        if number == _RULES:
            flags["charsmap"] = bool(value)
        elif number in names and isinstance(value, int):
            flags[names[number]] = bool(value)
    return flags


def _message(value: int | float | bytes, what: str, file: str | os.PathLike[str]) -> bytes:
    if not isinstance(value, bytes):
        raise errors.BadProtobuf(file, f"{what} is a number where bytes are expected")
    return value


def _fields(data: bytes, file: str | os.PathLike[str]) -> Iterator[tuple[int, int | float | bytes]]:
    """Number and value of each field: varints as int, 32 bits as float, the rest as bytes."""
    position = 0
    while position < len(data):
        tag, position = _varint(data, position, file)
        number, wire = tag >> 3, tag & 7
        if number == 0:
            raise errors.BadProtobuf(file, f"has a field of number 0 before byte {position}")
        if wire == _VARINT:
            value, position = _varint(data, position, file)
            yield number, value
            continue
        if wire == _BYTES:
            length, position = _varint(data, position, file)
        elif wire in (_FIXED64, _FIXED32):
            length = 8 if wire == _FIXED64 else 4
        else:
            raise errors.BadProtobuf(file, f"has a field of wire type {wire}, known are 0, 1, 2 and 5")
        piece = data[position : position + length]
        if len(piece) < length:
            raise errors.TruncatedFile(file, f"field {number} needs {length} bytes, {len(piece)} are left")
        position += length
        yield number, struct.unpack("<f", piece)[0] if wire == _FIXED32 else piece


def _varint(data: bytes, position: int, file: str | os.PathLike[str]) -> tuple[int, int]:
    value = 0
    for index in range(10):
        if position + index >= len(data):
            raise errors.TruncatedFile(file, "ends inside a number")
        byte = data[position + index]
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, position + index + 1
    raise errors.BadProtobuf(file, f"has a number of over 10 bytes at byte {position}")
