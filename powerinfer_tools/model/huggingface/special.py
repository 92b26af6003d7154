"""Special tokens, chat template and end-of-text ids: from tokenizer_config.json and its neighbours."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from powerinfer_formats.gguf_layout import ValueType
from powerinfer_formats.metadata import Metadata
from powerinfer_formats.records import read_text
from powerinfer_tools.model.huggingface.config import Config

#: Roles of special tokens, by what GGUF calls them, and the settings that name them.
ROLES = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
_CONFIG_IDS = {"bos": "bos_token_id", "eos": "eos_token_id"}
_MAX_TOKENS = 1 << 22
_TEMPLATE_FILE = "chat_template.jinja"


@dataclass(frozen=True)
class Settings:
    """The JSON files beside a tokeniser; empty ones where the directory has none."""

    tokenizer: Config
    generation: Config
    model: Config
    special: Config

    @classmethod
    def read(cls, folder: Path, model: Config) -> "Settings":
        """Read the files of the directory. Raises FormatError."""
        return cls(
            optional(folder / "tokenizer_config.json"),
            optional(folder / "generation_config.json"),
            model,
            optional(folder / "special_tokens_map.json"),
        )

    def token(self, name: str) -> str | None:
        """The text of a special token, such as ``bos_token``: as tokenizer_config.json names it, else as
        special_tokens_map.json does; None where neither does."""
        config = self.tokenizer if self.tokenizer.has(name) else self.special
        if not config.has(name):
            return None
        described = type(config.get(name)) is dict
        return config.section(name).text("content") if described else config.text(name)


@dataclass(frozen=True)
class AddedToken:
    """A token that is no part of the vocabulary's own file; ``strips_left`` and ``strips_right``: whether it
    takes the spaces beside it along."""

    id: int
    text: str
    special: bool
    strips_left: bool = False
    strips_right: bool = False


def added_tokens(folder: Path, config: Config) -> list[AddedToken]:
    """The added tokens of added_tokens.json and of ``config``, which is tokenizer_config.json. Raises
    FormatError."""
    tokens: dict[int, AddedToken] = {}
    document = optional(folder / "added_tokens.json")
    for text in document.values:
        number = document.integer(text, low=0, high=_MAX_TOKENS)
        tokens[number] = AddedToken(number, text, special=True)
    decoder = config.section("added_tokens_decoder")
    for key in decoder.values:
        token, number = decoder.section(key), decoder.number(key)
        tokens[number] = AddedToken(
            number,
            token.text("content"),
            token.flag("special", False),
            token.flag("lstrip", False),
            token.flag("rstrip", False),
        )
    return list(tokens.values())


def optional(file: Path) -> Config:
    """A JSON file that need not be there."""
    return Config.read(file) if file.is_file() else Config(file, {})


def add_special_tokens(
    metadata: Metadata, settings: Settings, ids: Mapping[str, int], *, adds_bos: bool, adds_eos: bool
) -> None:
    """Add the ids of special tokens, and whether texts begin and end with them."""
    texts = {role: settings.token(name) for role, name in ROLES.items()}
    named = {role: None if text is None else ids.get(text) for role, text in texts.items()}
    for role, name in _CONFIG_IDS.items():
        if named[role] is None:
            named[role] = next(iter(_numbers(settings.model, name, len(ids))), None)
    for role, token in named.items():
        if token is not None:
            metadata.add(f"tokenizer.ggml.{role}_token_id", token, ValueType.UINT32)
    ends = {
        *_numbers(settings.generation, "eos_token_id", len(ids)),
        *_numbers(settings.model, "eos_token_id", len(ids)),
    }
    if ends:
        metadata.add("powerinfer.tokenizer.end_token_ids", np.array(sorted(ends), np.int32))
    metadata.add("powerinfer.tokenizer.ids_complete", True)
    bos, eos = (
        settings.tokenizer.flag("add_bos_token", adds_bos) and named["bos"] is not None,
        settings.tokenizer.flag("add_eos_token", adds_eos) and named["eos"] is not None,
    )
    metadata.add("tokenizer.ggml.add_bos_token", bos)
    metadata.add("tokenizer.ggml.add_eos_token", eos)


def add_chat_template(metadata: Metadata, settings: Settings, folder: Path) -> None:
    """Add the chat template: of its own file, else of tokenizer_config.json (the default of several)."""
    if (folder / _TEMPLATE_FILE).is_file():
        metadata.add("tokenizer.chat_template", read_text(folder / _TEMPLATE_FILE))
        return
    config = settings.tokenizer
    if type(config.get("chat_template")) is list:
        listed = [Config(config.file, item, "chat_template[].") for item in config.items("chat_template")]
        by_name = {item.text("name"): item.text("template") for item in listed}
        if "default" in by_name:
            metadata.add("tokenizer.chat_template", by_name["default"])
    elif config.has("chat_template"):
        metadata.add("tokenizer.chat_template", config.text("chat_template"))


def _numbers(config: Config, name: str, count: int) -> list[int]:
    """A token id or a list of them; ids that no token has are passed over, as everywhere else."""
    value = config.get(name)
    values = value if type(value) is list else [] if value is None else [value]
    if not all(type(item) is int for item in values):
        raise config.fail(name, "is neither a token id nor a list of them")
    return [item for item in values if 0 <= item < count]
