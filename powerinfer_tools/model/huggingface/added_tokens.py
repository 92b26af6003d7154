"""Added tokens of a tokenizer.json and of the files beside it, put together as ``transformers`` does.

tokenizer_config.json (``added_tokens_decoder``), added_tokens.json and the settings that name special tokens
may have tokens that tokenizer.json lacks, or give one other properties. A new one gets the id that the
``tokenizers`` package gives it: that of a token with its text, else the next free one.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from powerinfer_tools.model.huggingface.config import Config
from powerinfer_tools.model.huggingface.special import Settings, optional

_NAMED = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_LISTS = ("extra_special_tokens", "additional_special_tokens")
_FLAGS = ("lstrip", "rstrip", "single_word", "special")


def with_added_tokens(document: Config, settings: Settings, folder: Path) -> Config:
    """``document``, a tokenizer.json, whose ``added_tokens`` are all of the directory. Raises FormatError."""
    entries = _Entries(document)
    named = list(_named(settings))
    names = {entry["content"] for entry in named}
    for entry in _beside(settings, folder, names):
        entries.add({**entry, "special": entry["special"] or entry["content"] in names})
    for entry in named:
        if entry["content"] not in entries.by_text:
            entries.add(entry)
    return Config(document.file, {**document.values, "added_tokens": list(entries.by_text.values())})


class _Entries:
    """The added tokens of a tokeniser, by their text."""

    def __init__(self, document: Config) -> None:
        self.vocabulary = document.section("model").section("vocab").values
        self.by_text: dict[str, dict[str, Any]] = {}
        for item in document.items("added_tokens"):
            token = Config(document.file, item, "added_tokens[].")
            entry = {**_entry(token), "id": token.integer("id", low=0, high=1 << 22)}
            self.by_text[entry["content"]] = entry

    def add(self, entry: dict[str, Any]) -> None:
        """Add a token, or give the one of this text other properties."""
        text = entry["content"]
        if text in self.by_text:
            self.by_text[text] = {**entry, "id": self.by_text[text]["id"]}
        elif text:
            self.by_text[text] = {**entry, "id": self.vocabulary.get(text, self._next())}

    def _next(self) -> int:
        last = max((int(entry["id"]) for entry in self.by_text.values()), default=0)
        return last + 1 if last >= len(self.vocabulary) else len(self.vocabulary)


def _entry(token: Config, *, special: bool | None = None) -> dict[str, Any]:
    flags = {name: token.flag(name, False) for name in _FLAGS}
    if special is not None:
        flags["special"] = special
    normalized = token.flag("normalized", not flags["special"])
    return {"content": token.text("content"), "normalized": normalized, **flags}


def _beside(settings: Settings, folder: Path, names: set[str]) -> Iterator[dict[str, Any]]:
    decoder = settings.tokenizer.section("added_tokens_decoder")
    if settings.tokenizer.has("added_tokens_decoder"):
        numbers = {decoder.number(key): key for key in decoder.values}
        for _, key in sorted(numbers.items()):
            yield _entry(decoder.section(key))
        return
    document = optional(folder / "added_tokens.json")
    for text in document.values:
        document.integer(text, low=0, high=1 << 22)
        special = text in names
        yield {"content": text, "normalized": not special, **dict.fromkeys(_FLAGS, False), "special": special}


def _named(settings: Settings) -> Iterator[dict[str, Any]]:
    """Special tokens that settings name: tokenizer_config.json's, and where that has no decoder of its own,
    those of special_tokens_map.json."""
    alone = settings.tokenizer.has("added_tokens_decoder")
    values = settings.tokenizer.values if alone else {**settings.tokenizer.values, **settings.special.values}
    config = Config(settings.tokenizer.file, values)
    for name in _NAMED:
        if config.has(name):
            yield _special(config, name)
    for name in _LISTS:
        for item in config.items(name) if type(config.get(name)) is list else ():
            yield _special(Config(config.file, {name: item}), name)


def _special(config: Config, name: str) -> dict[str, Any]:
    described = type(config.get(name)) is dict
    token = config.section(name) if described else Config(config.file, {"content": config.text(name)})
    return _entry(token, special=True)
