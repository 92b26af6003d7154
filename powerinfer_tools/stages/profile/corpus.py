"""The text a profile is taken over: text files, directories of them, and JSON Lines."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from powerinfer_tools.errors import CorpusError
from powerinfer_tools.progress import Progress

#: What a directory is searched for, recursively.
SUFFIXES = (".txt", ".md", ".rst", ".jsonl")
#: Keys of a JSON Lines record that may hold its text, in order of preference.
TEXT_KEYS = ("text", "content", "body")


@dataclass(frozen=True)
class CorpusFile:
    """One file of the corpus: ``name`` as given by the user (or below the directory given), and its bytes'
    hash."""

    name: str
    path: Path
    sha256: str
    nbytes: int


def find_files(sources: Sequence[str | Path]) -> list[CorpusFile]:
    """Every file of ``sources`` (files and directories), sorted by name; hashes are of the whole files.

    Raises CorpusError for a source that is not there, a directory without text, a file given twice or no
    sources.
    """
    if not sources:
        raise CorpusError("no corpus: name text files, JSON Lines files or directories with --corpus")
    files = [_describe(name, path) for source in sources for name, path in _expand(Path(source))]
    files.sort(key=lambda file: file.name)
    for first, second in pairwise(files):
        if first.path == second.path:
            raise CorpusError(f"corpus file {first.name} is given twice")
    return files


def shard_of(files: Sequence[CorpusFile], shard: int, count: int) -> list[CorpusFile]:
    """The files of shard ``shard`` (from 1) of ``count``, in order: whole files, shared out by size, the same
    on every machine that sees the same corpus. Raises CorpusError where there are fewer files than
    shards."""
    if len(files) < count:
        raise CorpusError(
            f"{count} shards need at least as many files, and the corpus has {len(files)}: cut files into "
            "parts (JSON Lines with split -l)"
        )
    sizes, owner = [0] * count, dict[str, int]()
    for file in sorted(files, key=lambda file: (-file.nbytes, file.name)):
        lightest = min(range(count), key=lambda index: (sizes[index], index))
        sizes[lightest] += max(1, file.nbytes)
        owner[file.name] = lightest
    return [file for file in files if owner[file.name] == shard - 1]


def documents(file: CorpusFile, progress: Progress) -> Iterator[str]:
    """The documents of one file: its whole text, or one for each line of a ``.jsonl`` file.

    Bytes that are not UTF-8 become U+FFFD and are reported once per file; a JSON line that holds no text is
    an error with its number.
    """
    data = _read(file.path)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        text = data.decode("utf-8", errors="replace")
        replaced = text.count("\ufffd")
        progress.note(
            f"{file.name}: not UTF-8 at byte {error.start}; {replaced} characters replaced by U+FFFD"
        )
    if file.path.suffix != ".jsonl":
        yield text
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _record_text(file, number, line)


def _expand(source: Path) -> Iterable[tuple[str, Path]]:
    if source.is_dir():
        files = sorted(path for path in source.rglob("*") if path.suffix in SUFFIXES and path.is_file())
        if not files:
            raise CorpusError(f"corpus directory {source} holds no {', '.join(SUFFIXES)} files")
        return [(path.relative_to(source).as_posix(), path) for path in files]
    if not source.exists():
        raise CorpusError(f"corpus file {source} does not exist")
    if not source.is_file():
        raise CorpusError(f"corpus {source} is neither a file nor a directory")
    return [(source.name, source)]


def _describe(name: str, path: Path) -> CorpusFile:
    data = _read(path)
    return CorpusFile(name, path, hashlib.sha256(data).hexdigest(), len(data))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CorpusError(f"corpus file {path} cannot be read: {error.strerror or error}") from None


def _record_text(file: CorpusFile, number: int, line: str) -> str:
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise CorpusError(f"{file.name} line {number} is not JSON: {error}") from None
    if isinstance(record, str):
        return record
    if isinstance(record, dict):
        for key in TEXT_KEYS:
            if isinstance(record.get(key), str):
                return str(record[key])
    raise CorpusError(f"{file.name} line {number} has no text under {', '.join(TEXT_KEYS)}")
