"""Two vocabularies small enough to work out every token id by hand, as GGUF metadata."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


@dataclass(frozen=True)
class Metadata:
    """What the tokeniser needs of an opened GGUF file."""

    metadata: Mapping[str, Any]


def byte_level(**changes: Any) -> Metadata:
    """A byte-level vocabulary: all ASCII letters and digits, the two bytes of é, some words, four
    specials."""
    letters = [*"abcdefghijklmnopqrstuvwxyz", *"0123456789", "Ġ", "Ċ", "'", "!", "Ã", "©"]
    words = ["he", "ll", "hell", "hello", "Ġh", "Ġhello", "ĠĠ", "Ã©"]
    specials = {
        "<|endoftext|>": CONTROL,
        "<|im_start|>": CONTROL,
        "<|im_end|>": CONTROL,
        "<tag>": USER_DEFINED,
    }
    tokens = [*specials, *letters, *words]
    types = [*specials.values(), *([NORMAL] * (len(letters) + len(words)))]
    merges = ["h e", "l l", "he ll", "hell o", "Ġ hello", "Ġ h", "Ġ Ġ", "Ã ©"]
    return _metadata(
        {
            "model": "gpt2", "pre": "gpt-2", "tokens": tokens, "token_type": np.array(types, np.int32),
            "merges": merges, "bos_token_id": 1, "eos_token_id": 0,
        },
        changes,
    )  # fmt: skip


def spm(**changes: Any) -> Metadata:
    """An SPM vocabulary: <unk> <s> </s>, 256 byte tokens, some letters, and words with scores."""
    letters = dict.fromkeys("▁helowrd", -100.0)
    words = {
        "▁h": -3.0,
        "he": -1.0,
        "ll": -2.0,
        "hell": -4.0,
        "▁hello": -6.0,
        "hello": -5.0,
        "o▁": -7.0,
        "lo": -2.0,
    }
    ordinary = {**letters, **words}
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256)), *ordinary, "<turn>"]
    types = [UNKNOWN, CONTROL, CONTROL, *([BYTE] * 256), *([NORMAL] * len(ordinary)), USER_DEFINED]
    scores = [*([0.0] * 259), *ordinary.values(), 0.0]
    return _metadata(
        {
            "model": "llama", "tokens": tokens, "token_type": np.array(types, np.int32),
            "scores": np.array(scores, np.float32), "bos_token_id": 1, "eos_token_id": 2,
        },
        changes,
    )  # fmt: skip


def _metadata(values: dict[str, Any], changes: Mapping[str, Any]) -> Metadata:
    """`changes` replace entries; None takes one out."""
    values = {**values, **changes}
    return Metadata({f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None})
