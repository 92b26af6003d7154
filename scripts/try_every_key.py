"""Changes single keys and tensors of random models, and compares what comes of it with another program.

``try_every_key.py MODELS PROGRAM [NAME …]`` takes every MODELS/NAME.gguf that opens. One by one it leaves out
each key below the family's prefix, gives it other values, adds keys and tensors that the file has not, and
leaves out tensors. What then still opens is computed by the float64 reference, and by PROGRAM, called as
``PROGRAM FILE COUNT SEED LOGITS``: it prints the ids of COUNT pseudo-random tokens and writes their logits,
float32 (tokens, vocabulary). Keys that change nothing here are changed together, so that PROGRAM is asked
once, and one by one where that is not what it computes of the model itself. Prints a line for each variant
that opens here and of which PROGRAM computes something else; ``--alone`` also those that PROGRAM refuses;
``--keys`` leaves out tensors. Exit status 1 where something differs.
"""

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.floating[Any]]

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / part) for part in (".", "formats", "kernels")]

from gguf import constants  # noqa: E402

from powerinfer_formats.errors import FormatError  # noqa: E402
from powerinfer_formats.gguf_layout import ValueType  # noqa: E402
from powerinfer_formats.gguf_reader import GGUFFile, TensorInfo  # noqa: E402
from powerinfer_formats.gguf_scan import Entry  # noqa: E402
from powerinfer_formats.gguf_writer import GGUFWriter  # noqa: E402
from powerinfer_formats.model_source import ModelSource  # noqa: E402
from powerinfer_tools.errors import ModelError  # noqa: E402
from powerinfer_tools.model.loading import Model, build_model, load_model  # noqa: E402
from powerinfer_tools.model.reference import forward  # noqa: E402

#: Of tokens: more than the windows of random models.
TOKENS, SEED = 40, 1
#: Largest difference, over the deviation of the logits, of what counts as the same.
SAME = 2e-3
_TYPES = {bool: ValueType.BOOL, int: ValueType.UINT32, float: ValueType.FLOAT32, str: ValueType.STRING}
#: Sizes of the model: other values are another model, or none.
_SIZES = ("block_count", "embedding_length", "vocab_size", "context_length")


#: Of parts that no text needs.
_OF_PICTURES = ("v.", "a.", "mm.")


@dataclass
class Variant:
    """A file with one thing changed."""

    text: str
    without: tuple[str, ...] = ()
    keys: dict[str, Any] = field(default_factory=dict)
    dropped: str = ""
    tensors: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict)


class Changed(GGUFFile):
    """An opened file as if it were changed: what only a judgement is wanted of need not be written."""

    def __init__(self, gguf: GGUFFile, variant: Variant) -> None:
        kept = {key: entry for key, entry in gguf.entries.items() if key not in variant.without}
        entries = kept | {key: _entry(key, value) for key, value in variant.keys.items()}
        tensors = {name: info for name, info in gguf.tensors.items() if name != variant.dropped}
        added = {
            name: TensorInfo(name, 0, values.shape, 0, values.nbytes)
            for name, values in variant.tensors.items()
        }
        ModelSource.__init__(self, gguf.path, entries, tensors | added)
        self._gguf, self._added, self.magic = gguf, variant.tensors, gguf.magic

    def _bytes_of(self, info: TensorInfo) -> npt.NDArray[np.uint8]:
        if info.name in self._added:
            return self._added[info.name].view(np.uint8).reshape(-1)
        return self._gguf.raw(info.offset, info.nbytes)


def _entry(key: str, value: Any) -> Entry:
    if isinstance(value, np.ndarray):
        return Entry(key, ValueType.ARRAY, ValueType.INT32, value, 0, 0)
    return Entry(key, _TYPES[type(value)], None, value, 0, 0)


def key_variants(gguf: GGUFFile, names: dict[str, list[Any]]) -> Iterator[Variant]:
    """All that differ from ``gguf`` in one key; ``names`` are keys without prefix, with values to try."""
    prefix = str(gguf.metadata["general.architecture"])
    own = {key.removeprefix(f"{prefix}."): key for key in gguf.metadata if key.startswith(f"{prefix}.")}
    for short, key in own.items():
        yield Variant(f"without {short}", (key,))
        for value in _others(gguf.metadata[key]) if short not in _SIZES else ():
            yield Variant(f"{short} = {_shown(value)}", (key,), {key: value})
    for short, values in names.items():
        for value in values if short not in own else ():
            yield Variant(f"{short} = {_shown(value)}", (), {f"{prefix}.{short}": value})


def tensor_variants(gguf: GGUFFile) -> Iterator[Variant]:
    """All that differ from ``gguf`` in one tensor."""
    layers = [int(found[1]) for name in gguf.tensors if (found := re.match(r"blk\.(\d+)\.", name))]
    picked = {min(layers, default=0), max(layers, default=0)}
    known = {template.format(bid=layer) for template in constants.TENSOR_NAMES.values() for layer in picked}
    known = {name for name in known if not name.startswith(_OF_PICTURES)}
    random = np.random.default_rng(1)
    for name in sorted(gguf.tensors):
        found = re.match(r"blk\.(\d+)\.", name)
        if found and int(found[1]) not in picked:
            continue
        yield Variant(f"without tensor {name}", dropped=name)
        shape, base = gguf.tensors[name].shape, name.removesuffix(".weight")
        for end, sizes in (
            ("scale", {(1,), shape[:1]}),
            ("input_scale", {(1,)}),
            ("bias", {shape[-2:-1], shape[:-1]}),
        ):
            for size in sizes:
                other = f"{base}.{end}"
                if size and other not in gguf.tensors:
                    values = random.standard_normal(size, dtype=np.float32)
                    yield Variant(f"tensor {other} {size}", tensors={other: values})
    width = gguf.tensors["token_embd.weight"].shape[1]
    head_dim = int(gguf.metadata.get(f"{gguf.metadata['general.architecture']}.attention.key_length", 64))  # type: ignore[call-overload]
    for base, end, size in itertools.product(sorted(known), ("weight", "bias"), (width, head_dim)):
        if (other := f"{base}.{end}") not in gguf.tensors:
            yield Variant(
                f"tensor {other} ({size},)", tensors={other: random.standard_normal(size, dtype=np.float32)}
            )


def _others(value: Any) -> list[Any]:
    if isinstance(value, np.ndarray):
        turned = value[::-1].copy()
        return [turned, *_array_others(value)]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [one for one in (0, 1, value + 1, value + 2, 2 * value, value // 2) if one != value]
    if isinstance(value, float):
        return [one for one in (0.0, 1.5 * value, value / 4 + 0.1, -value) if one != value]
    return ["something else"]


def _array_others(value: npt.NDArray[Any]) -> list[Any]:
    first = value.copy()
    first[:1] = first[:1] == 0 if value.dtype.kind in "iub" else first[:1] + 1
    return [first, value[:-1]]


def _shown(value: Any) -> str:
    return str(value.tolist() if isinstance(value, np.ndarray) else value)[:60]


def write(gguf: GGUFFile, variant: Variant, path: Path) -> None:
    """The changed file."""
    kept = [info for name, info in gguf.tensors.items() if name != variant.dropped]
    with GGUFWriter(path) as writer:
        writer.copy_metadata(gguf, without=variant.without)
        for key, value in variant.keys.items():
            writer.add(key, value, None if isinstance(value, np.ndarray) else _TYPES[type(value)])
        for info in kept:
            writer.declare(info.name, info.row_type, info.shape)
        for name, values in variant.tensors.items():
            writer.declare(name, 0, values.shape)
        for info in kept:
            writer.write(info.name, gguf.tensor(info.name))
        for name, values in variant.tensors.items():
            writer.write(name, values)


def known_keys(folder: Path) -> dict[str, list[Any]]:
    """Keys of the format and of all models in ``folder``, each with the values that it has there."""
    found: dict[str, list[Any]] = {}

    def add(short: str, value: Any) -> None:
        values = found.setdefault(short, [])
        if all(_shown(value) != _shown(one) for one in values) and len(values) < 4:
            values.append(value)

    for path in sorted(folder.glob("*.gguf")):
        gguf = GGUFFile.open(path)
        prefix = str(gguf.metadata["general.architecture"])
        for key, value in gguf.metadata.items():
            if key.startswith(f"{prefix}."):
                add(key.removeprefix(f"{prefix}."), value)
        gguf.close()
    for name in _templates(constants.Keys):
        found.setdefault(name.removeprefix("{arch}."), [3, 0.5, True])
    return found


def _templates(holder: type) -> Iterator[str]:
    for name, value in vars(holder).items():
        if isinstance(value, str) and value.startswith("{arch}."):
            yield value
        elif isinstance(value, type) and not name.startswith("__"):
            yield from _templates(value)


def computed(program: str, path: Path, out: Path) -> tuple[list[int], npt.NDArray[np.float32]] | None:
    """Ids and logits of the other program, which writes ``out``; None where it refuses the file."""
    out.unlink(missing_ok=True)
    command = [program, str(path), str(TOKENS), str(SEED), str(out)]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        return None
    if result.returncode or not out.exists():
        return None
    ids = [int(word) for word in result.stdout.split()]
    return ids, np.fromfile(out, np.float32).reshape(len(ids), -1)


@dataclass(frozen=True)
class Case:
    """A model, what is computed of it here and by ``program``, and where changed files are written."""

    gguf: GGUFFile
    program: str
    work: Path
    model: Model
    ids: list[int]
    own: Logits

    def judge(self, variant: Variant, own: Logits) -> tuple[str, str]:
        """What came of a variant of which ``own`` is computed here."""
        file = self.work / "variant.gguf"
        write(self.gguf, variant, file)
        result = computed(self.program, file, self.work / "logits.f32")
        if result is None or result[1].shape != own.shape or not result[1].std() > 0:
            return "alone", variant.text
        error = float(np.abs(own - result[1]).max()) / float(result[1].std())
        return ("same" if error < SAME else "differs"), f"{variant.text}: {error:.4f}"

    def judge_together(self, group: list[Variant]) -> Iterator[tuple[str, str]]:
        """The same of variants that change nothing here, and change one key each: those that change nothing
        there are asked about together."""
        together = Variant("", sum((one.without for one in group), ()), {})
        for one in group:
            together.keys.update(one.keys)
        kind, text = self.judge(together, self.own)
        if len(group) == 1:
            yield kind, f"{group[0].text}{text}"
        elif kind == "same":
            yield from (("same", one.text) for one in group)
        else:
            half = len(group) // 2
            yield from self.judge_together(group[:half])
            yield from self.judge_together(group[half:])


def examine(
    path: Path, program: str, work: Path, names: dict[str, list[Any]], *, tensors: bool
) -> Iterator[tuple[str, str]]:
    """(kind, text) of each variant: refused, same, alone, differs, or unequal where the model itself is."""
    gguf = GGUFFile.open(path)
    plain = computed(program, path, work / "logits.f32")
    if plain is None:
        yield "no logits", "the program refuses the model itself"
        return
    model = build_model(gguf)
    case = Case(gguf, program, work, model, plain[0], forward(model, plain[0]))
    yield case.judge(Variant("as it is"), case.own)
    unread: dict[str, list[Variant]] = {}
    for variant in (*key_variants(gguf, names), *(tensor_variants(gguf) if tensors else ())):
        try:
            changed = build_model(Changed(gguf, variant))
            if (variant.keys or variant.without) and _is_same(changed, model):
                unread.setdefault((*variant.without, *variant.keys)[0], []).append(variant)
                continue
            own = forward(changed, plain[0])
        except (ModelError, FormatError) as error:
            yield "refused", f"{variant.text}: {error}"
            continue
        except Exception as error:  # noqa: BLE001 - that is what is looked for, too
            yield "crashed", f"{variant.text}: {error!r}"
            continue
        yield case.judge(variant, own)
    for group in itertools.zip_longest(*unread.values()):
        yield from case.judge_together([one for one in group if one is not None])


def _is_same(model: Model, other: Model) -> bool:
    """Whether a changed key was read by nobody."""
    return (model.hyper, model.spec) == (other.hyper, other.spec)


def main() -> int:
    """Print what differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("models", type=Path)
    parser.add_argument("program")
    parser.add_argument("names", nargs="*")
    parser.add_argument("--alone", action="store_true", help="also print what the program refuses")
    parser.add_argument("--keys", action="store_true", help="change no tensors")
    options = parser.parse_args()
    keys, counts = known_keys(options.models), Counter[str]()
    for name in options.names or sorted(path.stem for path in options.models.glob("*.gguf")):
        path, own = options.models / f"{name}.gguf", Counter[str]()
        try:
            load_model(path).close()
        except (ModelError, FormatError):
            continue
        with tempfile.TemporaryDirectory() as work:
            for kind, text in examine(path, options.program, Path(work), keys, tensors=not options.keys):
                own[kind] += 1
                if kind in ("differs", "crashed") or (options.alone and kind == "alone"):
                    print(f"{name}: {kind}: {text}", flush=True)
        counts += own
        print(f"{name}: {dict(own)}", flush=True)
    print(dict(counts))
    return int(bool(counts["differs"] or counts["crashed"]))


if __name__ == "__main__":
    sys.exit(main())
