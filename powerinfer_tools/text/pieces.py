"""Token ids back to text: the bytes of each token, and a decoder that never emits half a character."""

import codecs
from collections.abc import Iterable

from powerinfer_tools.errors import TokenizerError
from powerinfer_tools.text.byte_pair import byte_characters
from powerinfer_tools.text.longest_match import token_bytes
from powerinfer_tools.text.score_merging import SPACE
from powerinfer_tools.text.special_tokens import TokenType
from powerinfer_tools.text.vocabulary import Vocabulary

_HIDDEN = (TokenType.CONTROL, TokenType.UNKNOWN)
_AS_WRITTEN = (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED)


class Pieces:
    """The bytes of each token of a vocabulary."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._byte_of = byte_characters()

    def of(self, token: int, *, show_special: bool) -> bytes:
        """Bytes of one token; none for a control token unless `show_special`. Raises TokenizerError."""
        if not 0 <= token < len(self._vocabulary):
            raise TokenizerError(f"token id {token} is beyond the vocabulary of {len(self._vocabulary)}")
        type_ = self._vocabulary.types[token]
        text = self._vocabulary.texts[token]
        if type_ in _HIDDEN and not show_special:
            return b""
        if type_ in _AS_WRITTEN:
            return text.encode()
        if type_ == TokenType.BYTE:
            return _byte_value(text)
        if type_ != TokenType.NORMAL:
            return b""
        if self._vocabulary.kind == "rwkv":
            return token_bytes(text)
        if self._vocabulary.kind == "spm":
            return text.replace(SPACE, " ").encode()
        return b"".join(self._bytes_of(char) for char in text)

    def _bytes_of(self, char: str) -> bytes:
        value = self._byte_of.get(char)
        return bytes((value,)) if value is not None else char.encode()


def _byte_value(text: str) -> bytes:
    try:
        return bytes((int(text[3:5], 16),))
    except ValueError:
        raise TokenizerError(f"byte token {text!r} is not of the form <0x00> to <0xFF>") from None


class StreamDecoder:
    """Turns ids into text one by one: `push` returns the text that is complete so far, `finish` the rest.

    A character whose bytes are spread over several tokens comes out with the last of these tokens; bytes that
    are not valid UTF-8 come out as U+FFFD.
    """

    def __init__(
        self, pieces: Pieces, *, show_special: bool = False, drop_leading_space: bool = False
    ) -> None:
        self._pieces = pieces
        self._show_special = show_special
        self._drop_leading_space = drop_leading_space
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that this token completes; "" for a hidden token or the first part of a character."""
        data = self._pieces.of(token, show_special=self._show_special)
        if self._drop_leading_space and data:
            data = data.removeprefix(b" ")
            self._drop_leading_space = False
        return self._decoder.decode(data)

    def push_all(self, tokens: Iterable[int]) -> str:
        """`push` for each token, joined."""
        return "".join(map(self.push, tokens))

    def finish(self) -> str:
        """The rest (an unfinished character as U+FFFD); afterwards the decoder can be used again."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest
