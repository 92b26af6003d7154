"""tokenizer.model of SentencePiece (BPE), with the tokens that a directory adds to it."""

from pathlib import Path

from powerinfer_formats.sentencepiece_model import ModelType, SentencePieceModel, read_sentencepiece
from powerinfer_tools.errors import TokenizerError
from powerinfer_tools.model.huggingface.config import Config
from powerinfer_tools.model.huggingface.special import added_tokens
from powerinfer_tools.model.huggingface.vocabulary_contents import FoundVocabulary
from powerinfer_tools.text.special_tokens import TokenType


def read_tokenizer_model(file: Path, config: Config) -> FoundVocabulary:
    """The vocabulary of ``file``; ``config`` is tokenizer_config.json.

    Raises FormatError, or TokenizerError for models whose ids would not be SentencePiece's own.
    """
    model = read_sentencepiece(file)
    _check(model, file)
    tokens = {index: (piece.text, TokenType(piece.kind)) for index, piece in enumerate(model.pieces)}
    scores = {index: piece.score for index, piece in enumerate(model.pieces)}
    for added in added_tokens(file.parent, config):
        kind = TokenType.CONTROL if added.special else TokenType.USER_DEFINED
        tokens[added.id] = (added.text, kind)
        scores.setdefault(added.id, -1000.0)
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
