"""Byte-level byte-pair encoding on the `tokenizers` package, set up to agree with llama.cpp.

The texts of such a vocabulary write each byte as one printable character (the mapping of GPT-2). `tokenizers`
requires that every part and result of a merge is a token; llama.cpp does not. So missing parts and results
get ids past the vocabulary, and these ids are taken apart again after encoding.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from powerinfer_tools.errors import TokenizerError
from powerinfer_tools.text.vocabulary import Vocabulary

_CHUNK = 1 << 16
# Every supported pre-tokeniser cuts between these two characters, before the space.
_SAFE_CUT = re.compile(r"[A-Za-z](?= [A-Za-z])")


def byte_characters() -> dict[str, int]:
    """Printable character → byte value, as GPT-2 chose them: Latin-1 where it prints, else from U+0100."""
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in set(printing)]
    mapping = {chr(value): value for value in printing}
    mapping.update({chr(0x100 + index): value for index, value in enumerate(others)})
    return mapping


class BytePairEncoder:
    """Text without special tokens → ids."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        if vocabulary.pre is None:
            raise TokenizerError("a byte-level vocabulary needs a pre-tokeniser")
        self._count = len(vocabulary)
        merges = _parse_merges(vocabulary.merges)
        self._expansions, extra = _missing_tokens(vocabulary.ids, merges)
        self._backend = _build(vocabulary, merges, extra)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, which must hold no lone surrogates."""
        ids: list[int] = []
        for chunk in _chunks(text):
            ids += self._backend.encode(chunk, add_special_tokens=False).ids
        if self._expansions and max(ids, default=0) >= self._count:
            return [part for token in ids for part in self._expansions.get(token, (token,))]
        return ids


def _parse_merges(merges: Sequence[str]) -> list[tuple[str, str]]:
    simple = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    if "" not in set(chain.from_iterable(simple)) and len(set(merges)) == len(merges):
        return simple
    pairs = []  # slower, with the rules for odd files
    seen = set()
    for index, merge in enumerate(merges):
        # The first part has at least one character, so a space in front belongs to it.
        cut = merge.find(" ", 1)
        if cut < 0 or cut == len(merge) - 1:
            raise TokenizerError(f"tokenizer.ggml.merges[{index}] is {merge!r}, expected two parts")
        pair = (merge[:cut], merge[cut + 1 :])
        if pair not in seen:  # of equal merges, the first one's rank counts
            seen.add(pair)
            pairs.append(pair)
    return pairs


def _missing_tokens(
    ids: Mapping[str, int], merges: Sequence[tuple[str, str]]
) -> tuple[dict[int, tuple[int, ...]], dict[str, int]]:
    """The final ids for each id past the vocabulary, and the ids of texts that are not tokens.

    In the end, a text that is not a token becomes the ids of its ASCII characters that are tokens; its other
    characters vanish. llama.cpp does the same.
    """
    needed = set(byte_characters()).union(chain.from_iterable(merges), map("".join, merges)) - ids.keys()
    extra = {text: len(ids) + index for index, text in enumerate(sorted(needed))}
    expansions = {
        token: tuple(ids[char] for char in text if char.isascii() and char in ids)
        for text, token in extra.items()
    }
    return expansions, extra


def _build(vocabulary: Vocabulary, merges: list[tuple[str, str]], extra: Mapping[str, int]) -> Any:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    pre = vocabulary.pre
    assert pre is not None
    model = models.BPE(vocab={**vocabulary.ids, **extra}, merges=merges, ignore_merges=pre.ignore_merges)
    backend = Tokenizer(model)
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
    to_characters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_characters])
    return backend


def _chunks(text: str) -> list[str]:
    """`text` in pieces of about 64 Ki characters, cut where words end anyway: bounds memory on long texts."""
    chunks = []
    start = 0
    while len(text) - start > _CHUNK:
        cut = _SAFE_CUT.search(text, start + _CHUNK)
        if cut is None:
            break
        chunks.append(text[start : cut.end()])
        start = cut.end()
    chunks.append(text[start:])
    return chunks
