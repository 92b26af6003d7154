"""Text that conforms to a grammar or a JSON schema: before each token, llguidance says which tokens may come.

Otherwise sampling is unchanged: tokens that would violate the grammar are ruled out before penalties and
filters see them.
"""

from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from powerinfer_tools.errors import SamplingError
from powerinfer_tools.generate.sampling import Logits, Sampler, SamplingOptions
from powerinfer_tools.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from llguidance._lib import JsonCompileOptions

#: Longest grammar or schema that is compiled, in characters.
MAX_CHARACTERS = 1 << 16
_DETAIL = 300
#: Separators as Python's json writes them. If any white space may come, small models write nothing else.
_SPACING: "JsonCompileOptions" = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}


class Grammar:
    """A compiled grammar for one vocabulary. It can be used by many texts. Raises SamplingError."""

    def __init__(self, tokenizer: Tokenizer, compiled: str) -> None:
        from llguidance import LLMatcher

        if len(compiled) > 4 * MAX_CHARACTERS:
            raise SamplingError(f"the grammar has over {4 * MAX_CHARACTERS} characters")
        self._vocabulary = tokenizer.vocabulary
        self._matcher = LLMatcher(_vocabulary(tokenizer), compiled, log_level=0)
        if self._matcher.is_error():
            raise SamplingError(f"the grammar is not valid: {_one_line(self._matcher.get_error())}")

    @classmethod
    def of_schema(cls, tokenizer: Tokenizer, schema: str | Mapping[str, Any]) -> "Grammar":
        """JSON text that fits a JSON schema."""
        import json

        require_llguidance()
        from llguidance import LLMatcher

        text = schema if isinstance(schema, str) else json.dumps(schema)
        if len(text) > MAX_CHARACTERS:
            raise SamplingError(f"the JSON schema has {len(text)} characters, at most {MAX_CHARACTERS} fit")
        try:
            compiled = LLMatcher.grammar_from_json_schema(text, defaults=_SPACING)
        except ValueError as error:
            raise SamplingError(f"the JSON schema is not valid: {_one_line(str(error))}") from None
        return cls(tokenizer, compiled)

    @classmethod
    def of_text(cls, tokenizer: Tokenizer, text: str) -> "Grammar":
        """Text by a grammar in llama.cpp's GBNF or in Lark's notation."""
        require_llguidance()
        from llguidance import LLMatcher
        from llguidance.gbnf_to_lark import any_to_lark

        if len(text) > MAX_CHARACTERS:
            raise SamplingError(f"the grammar has {len(text)} characters, at most {MAX_CHARACTERS} fit")
        try:
            lark = any_to_lark(text)
        except Exception as error:  # noqa: BLE001  it translates text from outside; any fault is the text's
            raise SamplingError(f"the grammar is not valid: {_one_line(str(error))}") from None
        return cls(tokenizer, LLMatcher.grammar_from_lark(lark))

    def sampler(self, options: SamplingOptions, *, banned: Collection[int] = ()) -> "ConstrainedSampler":
        """A sampler for one text."""
        return ConstrainedSampler(options, self._matcher.deep_copy(), self._vocabulary, banned=banned)


class ConstrainedSampler(Sampler):
    """A sampler that obeys a grammar. Every token that it returns counts as part of the text."""

    def __init__(
        self,
        options: SamplingOptions,
        matcher: "LLMatcher",
        vocabulary: int,
        *,
        banned: Collection[int] = (),
    ) -> None:
        super().__init__(options, banned=banned)
        self._matcher, self._vocabulary = matcher, vocabulary

    @property
    def finished(self) -> bool:
        """Whether the text is complete and nothing may follow."""
        return bool(self._matcher.is_stopped())

    def sample(self, logits: Logits) -> int:
        """The next token. Raises SamplingError as a sampler does, and if no token fits the grammar."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(bits, bitorder="little")[: self._vocabulary].astype(bool)
        if self._matcher.is_error():
            raise SamplingError(_stuck(self._matcher.get_error()))
        masked = logits.copy()
        masked[: len(allowed)][~allowed] = -np.inf
        masked[len(allowed) :] = -np.inf
        token = super().sample(masked)
        if not self._matcher.consume_token(token):
            raise SamplingError(_stuck(self._matcher.get_error()))
        return token


def require_llguidance() -> None:
    """Raise SamplingError if the package is missing."""
    from importlib.util import find_spec

    if find_spec("llguidance") is None:
        raise SamplingError("grammars and JSON schemas need a package: pip install llguidance")


class _Facade:
    """The methods that llguidance needs of a tokeniser."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        ends = sorted(tokenizer.eos_ids)
        self.eos_token_id = ends[0] if ends else tokenizer.vocabulary - 1
        self.bos_token_id = tokenizer.bos_id
        self.tokens = [tokenizer.token_bytes(token) for token in range(tokenizer.vocabulary)]
        self.special_token_ids = sorted(tokenizer.control_ids)
        self._tokenizer = tokenizer

    def __call__(self, text: bytes | str) -> list[int]:
        decoded = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        return self._tokenizer.encode(decoded, add_bos=False)


@lru_cache(maxsize=4)
def _vocabulary(tokenizer: Tokenizer) -> "LLTokenizer":
    from llguidance import LLTokenizer, TokenizerWrapper

    facade = _Facade(tokenizer)
    ends = sorted(tokenizer.eos_ids) or [facade.eos_token_id]
    return LLTokenizer(TokenizerWrapper(facade), n_vocab=tokenizer.vocabulary, eos_token=ends)


def _stuck(error: str) -> str:
    """Why a text cannot go on. llguidance adds the state of its parser, which says nothing to users."""
    reason = _one_line(error.partition("<state>")[0])
    if reason == "NoExtensionBias":
        reason = "it allows no token here, and no end"
    return f"the grammar cannot be followed: {reason}"


def _one_line(text: str) -> str:
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())[:_DETAIL]
