r"""RWKV's vocabulary: at each position of a text, the longest token that matches there, in bytes.

Token texts are written as Python writes bytes: \n, \xe2, \\ and so on.
"""

import re

from powerinfer_tools.errors import TokenizerError
from powerinfer_tools.text.special_tokens import TokenType
from powerinfer_tools.text.vocabulary import Vocabulary

_ESCAPE = re.compile(rb"\\(x[0-9a-fA-F]{2}|.)", re.DOTALL)
_WRITTEN = {b"t": b"\t", b"n": b"\n", b"r": b"\r"}


class LongestMatchEncoder:
    """Text without special tokens → ids. Control tokens are not among the tokens that are matched: text never
    becomes one. Raises TokenizerError for a byte that the vocabulary cannot express."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        pairs = zip(vocabulary.texts, vocabulary.types, strict=True)
        self._ids = {
            token_bytes(text): token for token, (text, type_) in enumerate(pairs) if type_ == TokenType.NORMAL
        }
        #: Lengths of the tokens that begin with these two bytes, or consist of this one byte, longest first.
        self._lengths: dict[bytes, list[int]] = {}
        for token in self._ids:
            self._lengths.setdefault(token[:2], []).append(len(token))
        for lengths in self._lengths.values():
            lengths[:] = sorted(set(lengths), reverse=True)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`."""
        data, at, ids = text.encode(), 0, list[int]()
        while at < len(data):
            lengths = (*self._lengths.get(data[at : at + 2], ()), 1)
            length = next((count for count in lengths if data[at : at + count] in self._ids), 0)
            if not length:
                raise TokenizerError(f"the vocabulary has no token for the byte 0x{data[at]:02x}")
            ids.append(self._ids[data[at : at + length]])
            at += length
        return ids


def token_bytes(text: str) -> bytes:
    """The bytes that a token's text denotes."""
    return _ESCAPE.sub(_written, text.encode())


def _written(escape: re.Match[bytes]) -> bytes:
    code = escape[1]
    return bytes((int(code[1:], 16),)) if len(code) == 3 else _WRITTEN.get(code, code)
