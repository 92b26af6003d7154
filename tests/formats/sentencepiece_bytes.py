"""SentencePiece models as bytes, field by field (numbers of ``sentencepiece_model.proto``)."""

import struct
from collections.abc import Sequence


def varint(value: int) -> bytes:
    """A number in groups of seven bits, the lowest first."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def field(number: int, value: int | float | bytes) -> bytes:
    """One field: a varint, 32 bits of a float, or bytes with their length."""
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3) + varint(value)


def sentencepiece_bytes(
    pieces: Sequence[tuple[str, float, int]],
    *,
    model_type: int = 2,
    charsmap: bytes = b"",
    add_dummy_prefix: bool = True,
    remove_extra_whitespaces: bool = False,
    escape_whitespaces: bool = True,
) -> bytes:
    """A model with fields that readers have to pass over, too."""
    listed = [
        field(1, field(1, text.encode()) + field(2, score) + field(3, kind)) for text, score, kind in pieces
    ]
    trainer = field(2, b"prefix") + field(3, model_type) + field(4, 32000) + field(10, 0.9995)
    normalizer = (
        field(1, b"identity")
        + field(2, charsmap)
        + field(3, int(add_dummy_prefix))
        + field(4, int(remove_extra_whitespaces))
        + field(5, int(escape_whitespaces))
    )
    return b"".join(listed) + field(2, trainer) + field(3, normalizer)
