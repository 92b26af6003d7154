"""What a tokeniser's file says, whichever kind of file it is."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from powerinfer_tools.text.special_tokens import TokenType
from powerinfer_tools.text.vocabulary import AddedTokens, SpacePrefix


@dataclass(frozen=True)
class FoundVocabulary:
    """Fields as in ``powerinfer_tools.text.vocabulary.Vocabulary``.

    ``tokens`` maps ids to text and type; ids may be missing.
    """

    model: Literal["gpt2", "llama"]
    tokens: dict[int, tuple[str, TokenType]]
    pre: str = "default"
    merges: Sequence[str] = ()
    scores: dict[int, float] = field(default_factory=dict)
    space_prefix: SpacePrefix = "never"
    normalizer: str = ""
    added: AddedTokens | None = None
    strips_left: frozenset[int] = frozenset()
    strips_right: frozenset[int] = frozenset()
    adds_bos: bool = False
    adds_eos: bool = False
