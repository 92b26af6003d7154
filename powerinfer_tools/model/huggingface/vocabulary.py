"""A directory's tokeniser → the ``tokenizer.*`` keys of GGUF.

From tokenizer.json, as ``transformers`` does, else from tokenizer.model, else from vocab.json and merges.txt.
A directory without any gets no keys: it can be inspected and measured, but no text can be read.
"""

from pathlib import Path

import numpy as np

from powerinfer_formats.gguf_layout import ValueType
from powerinfer_formats.metadata import Metadata
from powerinfer_tools.errors import TokenizerError
from powerinfer_tools.model.huggingface.added_tokens import with_added_tokens
from powerinfer_tools.model.huggingface.config import Config
from powerinfer_tools.model.huggingface.special import Settings, add_chat_template, add_special_tokens
from powerinfer_tools.model.huggingface.tokenizer_json import read_tokenizer_json
from powerinfer_tools.model.huggingface.tokenizer_model import read_tokenizer_model
from powerinfer_tools.model.huggingface.vocab_and_merges import (
    MERGES_FILE,
    VOCABULARY_FILE,
    has_vocab_and_merges,
    read_vocab_and_merges,
)
from powerinfer_tools.model.huggingface.vocabulary_contents import FoundVocabulary
from powerinfer_tools.text.special_tokens import TokenType

JSON_FILE = "tokenizer.json"
MODEL_FILE = "tokenizer.model"
_FILES = (JSON_FILE, MODEL_FILE, "added_tokens.json", "tokenizer_config.json")
_PAIR = (VOCABULARY_FILE, MERGES_FILE, "special_tokens_map.json")


def tokenizer_files(folder: Path) -> tuple[str, ...]:
    """Names of the files that decide which ids a text gets; not all of them need be there."""
    alone = (folder / JSON_FILE).is_file() or (folder / MODEL_FILE).is_file()
    return _FILES if alone else (*_FILES, *_PAIR)


def add_vocabulary(metadata: Metadata, folder: Path, config: Config, rows: int) -> None:
    """Add all keys; ``rows`` is the number of rows of the embedding.

    Raises FormatError for files that are not well-formed, TokenizerError for what is not supported.
    """
    settings = Settings.read(folder, config)
    vocabulary = _find(folder, settings)
    if vocabulary is None:
        return
    texts, types = _lists(vocabulary, folder, rows)
    metadata.add("tokenizer.ggml.model", vocabulary.model)
    metadata.add("tokenizer.ggml.pre", vocabulary.pre)
    metadata.add("tokenizer.ggml.tokens", texts, ValueType.STRING)
    metadata.add("tokenizer.ggml.token_type", np.array(types, np.int32))
    if vocabulary.scores:
        scores = [vocabulary.scores.get(token, 0.0) for token in range(rows)]
        metadata.add("tokenizer.ggml.scores", np.array(scores, np.float32))
    if vocabulary.merges:
        metadata.add("tokenizer.ggml.merges", vocabulary.merges, ValueType.STRING)
    metadata.add("tokenizer.ggml.add_space_prefix", vocabulary.space_prefix != "never")
    metadata.add("powerinfer.tokenizer.space_prefix", vocabulary.space_prefix)
    if vocabulary.normalizer:
        metadata.add("powerinfer.tokenizer.normalizer", vocabulary.normalizer)
    _add_ids(metadata, vocabulary, rows)
    ids = {text: token for token, text in enumerate(texts)}
    add_special_tokens(metadata, settings, ids, adds_bos=vocabulary.adds_bos, adds_eos=vocabulary.adds_eos)
    add_chat_template(metadata, settings, folder)


def _add_ids(metadata: Metadata, vocabulary: FoundVocabulary, rows: int) -> None:
    """Which tokens are matched in a special way, and texts of those that the embedding has no row for."""
    sets = {"strips_left": vocabulary.strips_left, "strips_right": vocabulary.strips_right}
    added = vocabulary.added
    if added is not None:
        sets |= {"normalized_token_ids": added.normalized, "single_word_token_ids": added.single_word}
        ids = np.array(sorted(token for token in added.ids if token < rows), np.int32)
        metadata.add("powerinfer.tokenizer.added_token_ids", ids)
    for name, tokens in sets.items():
        if kept := sorted(token for token in tokens if token < rows):
            metadata.add(f"powerinfer.tokenizer.{name}", np.array(kept, np.int32))
    absent = [text for token, (text, _) in sorted(vocabulary.tokens.items()) if token >= rows]
    if absent:
        metadata.add("powerinfer.tokenizer.absent_tokens", absent, ValueType.STRING)


def _find(folder: Path, settings: Settings) -> FoundVocabulary | None:
    if (folder / JSON_FILE).is_file():
        document = with_added_tokens(Config.read(folder / JSON_FILE), settings, folder)
        return read_tokenizer_json(document)
    if (folder / MODEL_FILE).is_file():
        return read_tokenizer_model(folder / MODEL_FILE, settings.tokenizer)
    return read_vocab_and_merges(folder, settings) if has_vocab_and_merges(folder) else None


def _lists(vocabulary: FoundVocabulary, folder: Path, rows: int) -> tuple[list[str], list[int]]:
    """Text and type of every row of the embedding: rows without a token get one that is never used.

    Added tokens may lie beyond the rows, as that for images of Gemma 3 does: they are left out.
    """
    ordinary = (TokenType.NORMAL, TokenType.BYTE)
    last = max((token for token, (_, kind) in vocabulary.tokens.items() if kind in ordinary), default=-1)
    if last >= rows:
        raise TokenizerError(
            f"{folder}: the tokeniser has a token {last}, the model's embedding {rows} rows: "
            "they do not belong together"
        )
    unused = TokenType.UNUSED
    listed = [vocabulary.tokens.get(token, (f"[PAD{token}]", unused)) for token in range(rows)]
    return [text for text, _ in listed], [int(kind) for _, kind in listed]
