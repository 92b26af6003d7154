"""Which of the pre-tokenisers that GGUF has names for a tokenizer.json describes."""

from typing import Any

from powerinfer_tools.errors import TokenizerError
from powerinfer_tools.model.huggingface.config import Config
from powerinfer_tools.text.vocabulary import SpacePrefix

Step = tuple[Any, ...]

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2_WORDS: Step = ("ByteLevel", True)
_TO_BYTES: Step = ("ByteLevel", False)

#: Steps → name in ``tokenizer.ggml.pre``, without and with ``ignore_merges``; None: no such name.
_NAMES: dict[tuple[Step, ...], tuple[str | None, str | None]] = {
    (_GPT2_WORDS,): ("gpt2", None),
    (("Digits", True), _GPT2_WORDS): ("smollm", None),
    (("Split", rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}", "Isolated"), _TO_BYTES): ("smaug-bpe", "llama-bpe"),
    (("Split", rf"{_WORDS}|\p{{N}}|{_REST}", "Isolated"), _TO_BYTES): ("qwen2", None),
    (
        ("Punctuation", "Contiguous"),
        _GPT2_WORDS,
        ("Digits", False),
        ("Split", "[0-9][0-9][0-9]", "Isolated"),
    ): ("falcon", None),
}


def byte_level_name(document: Config, steps: list[Config], *, ignore_merges: bool) -> tuple[str, SpacePrefix]:
    """The name of a byte-level pre-tokeniser, and how texts get a space in front.

    Raises TokenizerError for steps that no known name stands for.
    """
    described = tuple(_describe(step) for step in steps)
    name = _NAMES.get(described, (None, None))[ignore_merges]
    if name is None:
        shown = " + ".join(" ".join(map(str, step)) for step in described)
        extra = " with ignore_merges" if ignore_merges else ""
        raise TokenizerError(f"{document.file}: the pre-tokeniser {shown[:300]}{extra} is not supported")
    return name, _space_prefix(document, steps)


def _describe(step: Config) -> Step:
    """A step by what it does; what is not known keeps its name alone and so matches nothing."""
    kind = step.text("type")
    if kind == "ByteLevel":
        return kind, step.flag("use_regex", True)
    if kind == "Digits":
        return kind, step.flag("individual_digits", False)
    if kind == "Punctuation":
        return kind, step.text("behavior", "Isolated")
    if kind == "Split" and not step.flag("invert", False):
        return kind, step.section("pattern").get("Regex"), step.text("behavior")
    return (kind,)


def _space_prefix(document: Config, steps: list[Config]) -> SpacePrefix:
    """ByteLevel's own option, in the first step: later it would put a space before every word."""
    asking = [step.get("type") == "ByteLevel" and step.flag("add_prefix_space", True) for step in steps]
    if any(asking[1:]):
        raise TokenizerError(f"{document.file}: a space before each word (add_prefix_space) is not supported")
    return "unless-space" if asking[0] else "never"
