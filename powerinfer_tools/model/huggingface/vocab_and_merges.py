"""vocab.json and merges.txt: the byte-level BPE of GPT-2, as OPT's directories hold it.

The two files and the settings beside them make the tokenizer.json that ``transformers`` would write.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from powerinfer_formats.errors import MissingFile
from powerinfer_formats.records import read_text
from powerinfer_tools.errors import TokenizerError
from powerinfer_tools.model.huggingface.config import Config
from powerinfer_tools.model.huggingface.special import ROLES, Settings, added_tokens
from powerinfer_tools.model.huggingface.tokenizer_json import read_tokenizer_json
from powerinfer_tools.model.huggingface.vocabulary_contents import FoundVocabulary

VOCABULARY_FILE, MERGES_FILE = "vocab.json", "merges.txt"
#: Classes of ``transformers`` that split texts as GPT-2 does. Others keep files of these names, too.
_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast")
#: The class where none is named, by the model's type.
_CLASS_OF = {"opt": _CLASSES[0], "gpt2": _CLASSES[0]}


def has_vocab_and_merges(folder: Path) -> bool:
    """Whether ``folder`` has one of the two files."""
    return (folder / VOCABULARY_FILE).is_file() or (folder / MERGES_FILE).is_file()


def read_vocab_and_merges(folder: Path, settings: Settings) -> FoundVocabulary:
    """The vocabulary of the two files. Raises FormatError, or TokenizerError for the files of another kind of
    tokeniser."""
    for name in (VOCABULARY_FILE, MERGES_FILE):
        if not (folder / name).is_file():
            raise MissingFile(folder / name, "is missing: vocab.json and merges.txt are read together")
    _check_class(folder, settings)
    vocabulary = Config.read(folder / VOCABULARY_FILE).values
    words = {"type": "ByteLevel", "add_prefix_space": settings.tokenizer.flag("add_prefix_space", False)}
    document = {
        "model": {"type": "BPE", "vocab": vocabulary, "merges": list(_merges(folder / MERGES_FILE))},
        "pre_tokenizer": words,
        "added_tokens": list(_added(folder, settings, vocabulary)),
    }
    return read_tokenizer_json(Config(folder / VOCABULARY_FILE, document))


def _check_class(folder: Path, settings: Settings) -> None:
    default = _CLASS_OF.get(settings.model.text("model_type", ""), "")
    named = settings.tokenizer.text("tokenizer_class", "") or default
    if named not in _CLASSES:
        kind = f"of a {named[:60]}" if named else "of a tokeniser whose class no file names"
        raise TokenizerError(
            f"{folder}: {VOCABULARY_FILE} and {MERGES_FILE} {kind} are not supported (supported: "
            f"{_CLASSES[0]}); with transformers, save_pretrained writes a tokenizer.json"
        )


def _merges(file: Path) -> Iterator[str]:
    """The lines without the one that says the version."""
    for line in read_text(file).split("\n"):
        merge = line.removesuffix("\r")
        if merge and not merge.startswith("#version"):
            yield merge


def _added(folder: Path, settings: Settings, vocabulary: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Tokens that are matched in a text before it is split: those that are added, and those with a role."""
    added = added_tokens(folder, settings.tokenizer)
    ids = {token.text: token.id for token in added}
    for token in added:
        yield {
            "content": token.text,
            "id": token.id,
            "special": token.special,
            "lstrip": token.strips_left,
            "rstrip": token.strips_right,
        }
    for text in sorted(filter(None, (settings.token(name) for name in ROLES.values()))):
        if text not in ids and text in vocabulary:
            ids[text] = vocabulary[text]
            yield {"content": text, "id": vocabulary[text], "special": True}
