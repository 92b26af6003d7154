"""A corpus as windows of tokens, in an order that depends on the corpus alone."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from powerinfer_tools.progress import Progress
from powerinfer_tools.stages.profile.corpus import CorpusFile, documents
from powerinfer_tools.text import Tokenizer

_T = TypeVar("_T")


@dataclass(frozen=True)
class Window:
    """Tokens of one document, and the index of its file."""

    file: int
    tokens: list[int]


def spread_out(windows: Sequence[_T]) -> list[_T]:
    """The windows in an order of which every beginning is spread evenly over the corpus: their numbers with
    the bits reversed (van der Corput 1935)."""
    bits = max(1, (len(windows) - 1).bit_length())
    numbers = (int(f"{index:0{bits}b}"[::-1], 2) for index in range(1 << bits))
    return [windows[number] for number in numbers if number < len(windows)]


def corpus_windows(
    files: Sequence[CorpusFile], tokenizer: Tokenizer, size: int, progress: Progress
) -> Iterator[Window]:
    """Windows of at most ``size`` tokens; none crosses a document's end, so that shards of a corpus make
    the same
    windows as the whole. Where the model adds a beginning-of-text token, each window starts with it.
    """
    prefix = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
    step = size - len(prefix)
    for index, file in enumerate(files):
        for document in documents(file, progress):
            ids = tokenizer.encode(document, add_bos=False)
            for first in range(0, len(ids), step):
                yield Window(index, prefix + ids[first : first + step])
