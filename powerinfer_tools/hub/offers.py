"""The models of a repository, by the names of its files: GGUF files by quantisation, or a directory."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from powerinfer_formats.shard_names import model_name, shard_files
from powerinfer_tools.errors import HubError
from powerinfer_tools.hub.reference import Reference

SAFETENSORS = "safetensors"
INDEX_FILE = "model.safetensors.index.json"
#: Files that a model's directory may have beside its weights.
FOLDER_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
#: If no label is named, the first of these that the repository has is taken.
PREFERRED = (
    "Q4_K_M", "Q4_0", "MXFP4", "Q4_K_S", "UD-Q4_K_XL", "Q4_1", "IQ4_NL", "IQ4_XS", "Q5_K_M", "Q5_K_S", "Q5_0",
    "Q6_K", "Q8_0", "Q3_K_M", "BF16", "F16", SAFETENSORS,
)  # fmt: skip
_LABEL = re.compile(
    r"(?:^|[-_.])((?:UD-)?(?:I?Q\d(?:_\w+)?|TQ\d_\d|BF16|F16|FP16|F32|FP32|MXFP4(?:_MOE)?|NVFP4))$",
    re.IGNORECASE,
)
#: Files that are not language models, though their names end in ``.gguf``.
_OTHERS = re.compile(r"mmproj|imatrix|[-_.]lora\b", re.IGNORECASE)
_SHOWN = 24


@dataclass(frozen=True)
class Offer:
    """One model: ``files`` by their names in the repository, the first file of a set in front. ``missing``:
    files of the set that the repository lacks."""

    label: str
    files: tuple[str, ...]
    missing: tuple[str, ...] = ()

    @property
    def is_folder(self) -> bool:
        """Whether the model is the directory, not a file."""
        return self.label == SAFETENSORS


def offers(names: Iterable[str]) -> list[Offer]:
    """All models among files of these names, GGUF files first."""
    listed = sorted(name for name in names if _is_plain(name))
    every_file, offered, seen = set(listed), [], set[str]()
    for name in listed:
        if not name.endswith(".gguf") or _OTHERS.search(PurePosixPath(name).name) or name in seen:
            continue
        files = [file.as_posix() for file in shard_files(Path(name))]
        seen.update(files)
        missing = tuple(file for file in files if file not in every_file)
        offered.append(Offer(_label(name), tuple(files), missing))
    weights = INDEX_FILE if INDEX_FILE in every_file else "model.safetensors"
    if {"config.json", weights} <= every_file:
        beside = tuple(name for name in FOLDER_FILES if name in every_file)
        offered.append(Offer(SAFETENSORS, (*beside, weights)))
    return offered


def choose(offered: list[Offer], reference: Reference) -> Offer:
    """The model that ``reference`` names, or the preferred one. Raises HubError with a list of all."""
    if not offered:
        raise HubError(f"{reference.repository} has neither GGUF files nor safetensors with a config.json")
    matching = (
        [offer for offer in offered if _matches(offer, reference.quant)] if reference.quant else offered
    )
    if not matching:
        raise HubError(f"{reference.repository} has no {reference.quant}; there are: {_listed(offered)}")
    if len(matching) > 1 and not reference.quant:
        ranked = [offer for label in PREFERRED for offer in matching if offer.label == label]
        matching = ranked[:1] if ranked else matching
    if len(matching) > 1:
        what = f"several files of {reference.quant}" if reference.quant else "several models"
        raise HubError(f"{reference.repository} has {what}: name one of {_listed(matching, full=True)}")
    offer = matching[0]
    if offer.missing:
        raise HubError(
            f"{reference.repository} has no {', '.join(offer.missing[:4])}, a part of {offer.label}"
        )
    return offer


def _is_plain(name: str) -> bool:
    """Whether ``name`` is a plain relative path, so that the file stays inside any folder it is put into."""
    parts = name.split("/")
    return bool(
        name.isprintable() and len(name) <= 255 and all(part and not part.startswith(".") for part in parts)
    )


def _label(name: str) -> str:
    stem = model_name(PurePosixPath(name).name).removesuffix(".gguf")
    match = _LABEL.search(stem)
    return match[1].upper() if match else stem


def _matches(offer: Offer, quant: str) -> bool:
    label = quant.lower()
    names = {offer.label.lower(), *(name.lower() for name in offer.files if not offer.is_folder)}
    names |= {PurePosixPath(name).name for name in names}
    return label in names


def _listed(offered: list[Offer], *, full: bool = False) -> str:
    names = [offer.files[0] if full and not offer.is_folder else offer.label for offer in offered]
    shown = list(dict.fromkeys(names))
    more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    return ", ".join(shown[:_SHOWN]) + more
