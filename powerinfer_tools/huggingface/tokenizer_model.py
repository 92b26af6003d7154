"""tokenizer.model of SentencePiece (BPE), with the tokens that a directory adds to it."""

from pathlib import Path
from typing import Any

from powerinfer_formats.sentencepiece_model import ModelType, SentencePieceModel, read_sentencepiece
from powerinfer_tools.errors import TokenizerError
from powerinfer_tools.huggingface.config import Config
from powerinfer_tools.huggingface.found import FoundVocabulary
from powerinfer_tools.huggingface.special import optional
from powerinfer_tools.text.special_tokens import TokenType

_MAX_TOKENS = 1 << 22


def read_tokenizer_model(file: Path, config: Config) -> FoundVocabulary:
    """The vocabulary of ``file``; ``config`` is tokenizer_config.json.

    Raises FormatError, or TokenizerError for models whose ids would not be SentencePiece's own.
    """
    model = read_sentencepiece(file)
    _check(model, file)
    tokens = {index: (piece.text, TokenType(piece.kind)) for index, piece in enumerate(model.pieces)}
    scores = {index: piece.score for index, piece in enumerate(model.pieces)}
    for token, text, special in _added(file, config):
        tokens[token] = (text, TokenType.CONTROL if special else TokenType.USER_DEFINED)
        scores.setdefault(token, -1000.0)
    return FoundVocabulary(
        "llama",
        tokens=tokens,
        scores=scores,
        space_prefix="always" if model.add_dummy_prefix else "never",
        adds_bos=True,
    )


def _check(model: SentencePieceModel, file: Path) -> None:
    if model.model_type is not ModelType.BPE:
        raise TokenizerError(
            f"{file}: a SentencePiece model of type {model.model_type.name} is not supported (supported: BPE)"
        )
    for name, rewrites in (
        ("a table of characters to rewrite", model.charsmap),
        ("remove_extra_whitespaces", model.remove_extra_whitespaces),
        ("escape_whitespaces false", not model.escape_whitespaces),
    ):
        if rewrites:
            raise TokenizerError(f"{file}: a SentencePiece model with {name} is not supported")


def _added(file: Path, config: Config) -> list[tuple[int, str, bool]]:
    """Id, text and whether it is a control token: of added_tokens.json and of tokenizer_config.json."""
    found: dict[int, tuple[str, bool]] = {}
    document = optional(file.with_name("added_tokens.json"))
    for text in document.values:
        found[document.integer(text, low=0, high=_MAX_TOKENS)] = (text, True)
    decoder = config.section("added_tokens_decoder")
    for key in decoder.values:
        token = decoder.section(key)
        found[_number(decoder, key)] = (token.text("content"), token.flag("special", False))
    return [(token, text, special) for token, (text, special) in found.items()]


def _number(config: Config, key: Any) -> int:
    if not (key.isascii() and key.isdigit() and len(key) <= 7) or int(key) > _MAX_TOKENS:
        raise config.fail(key[:40], f"is no token id up to {_MAX_TOKENS}")
    return int(key)
