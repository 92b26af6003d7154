"""What each Triton kernel takes of a GPU: compiled ahead of time, which needs no GPU.

``python -m powerinfer_kernels.triton_resources [CAPABILITY …]`` prints the table as JSON, with a digest of
what it depends on.
"""

import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import triton_attention as attention
from . import triton_elementwise as elementwise
from . import triton_experts as experts
from . import triton_ffn as kernels
from .row_types import RowType
from .triton_launch import (
    ADD_BLOCK,
    ADD_SPLITS,
    DOT_BLOCK,
    KEYS_BLOCK,
    LEAST_SPLIT,
    MOST_SPLITS,
    ROUND_VALUES,
    SUM_BLOCK,
    UNPACK_BLOCK,
    exactly,
    options,
)
from .triton_layout import PLANAR_TYPES, SPLIT_ROWS, form_of

#: Turing, Ampere (data centre, consumer), Ada, Hopper.
CAPABILITIES = (75, 80, 86, 89, 90)
#: The other kernels and row types are compiled for this one alone: they are the same code around such tiles.
_ONE_CAPABILITY = 86
_EVERYWHERE = (RowType.Q8_0, RowType.Q4_0, RowType.Q4_K, RowType.Q6_K)
#: Types that are compiled as they are; the others are computed in the form of one of them.
_TYPES_OF_ROWS = [kind for kind in PLANAR_TYPES if form_of(kind) == kind]
_WIDTH = 4096
_TYPES = dict.fromkeys(("rows", "splits", "first", "count", "context", "total"), "i32")
_TYPES |= dict.fromkeys(("cut", "scale", "softcap", "eps", "factor"), "fp32")
_TYPES |= {"position": "*i64", "places": "*i32", "codes": "*i32"}
_TYPES |= dict.fromkeys(("key_scales", "value_scales"), "*fp16")
#: Values of a head, and queries that share one of keys.
_HEAD, _GROUP = 128, 4
_BYTES = ("base", "gate", "up", "active")
#: Instructions of PTX.
_AHEAD = re.compile(r"\bcp\.async\.c[ag]\b")
_WHOLE = re.compile(r"\bdp4a\.s32\.s32\b")
_APPROXIMATE = re.compile(r"\b(?:div\.(?:full|approx)|(?:rsqrt|sqrt|rcp)\.approx)\b")


@dataclass(frozen=True)
class Case:
    """One kernel as it is compiled for rows of one type; ``types``: of parameters whose name alone
    does not say it."""

    kernel: str
    rows: str
    function: Any
    constants: dict[str, Any]
    capabilities: tuple[int, ...]
    types: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=options)


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes: registers and local memory (spills) of a thread, shared memory of a
    block, in bytes but for registers. ``ahead``: loads of later tiles in its code, which do not wait for what
    they load; ``whole``: products of four codes with four codes; ``approximate``: divisions and roots that
    are not rounded correctly."""

    kernel: str
    rows: str
    capability: int
    registers: int
    local: int
    shared: int
    ahead: int
    whole: int
    approximate: int


def cases(capabilities: Sequence[int]) -> Iterator[Case]:
    """Every kernel that the engine launches; of those that read rows, the ones that decode most for every row
    type, and the others for some: they are the same code around the same tiles."""
    one = tuple(c for c in capabilities if c == _ONE_CAPABILITY)
    for row_type in _TYPES_OF_ROWS:
        kind, name = int(row_type), row_type.name
        every = tuple(capabilities) if row_type in _EVERYWHERE else one
        shape = {"COLUMNS": _WIDTH, "TYPE": kind}
        ffn: dict[str, Any] = {
            "COLUMNS": _WIDTH,
            "GATE_TYPE": kind,
            "UP_TYPE": kind,
            "ACT": kernels.ACTIVATIONS["relu"],
        }
        ffn |= {"bias": None, "active": None, "BLOCK": DOT_BLOCK}
        codes = {} if row_type.is_float else dict.fromkeys(("x", "x_gate", "x_up"), "*i32")
        yield Case("hidden", name, kernels.hidden_kernel, ffn, every, codes)
        sums = shape | {"ROWS": SPLIT_ROWS, "BLOCK": SUM_BLOCK}
        yield Case("partial_sums", name, kernels.partial_sums_kernel, sums, every)
        matvec = shape | {"bias": None, "JOINS": True, "BLOCK": DOT_BLOCK}
        yield Case("matvec", name, kernels.matvec_kernel, matvec, one, codes)
        if row_type not in (RowType.F16, *_EVERYWHERE):
            continue
        expert = {key: value for key, value in ffn.items() if key not in ("bias", "active")}
        expert["ACT"] = kernels.ACTIVATIONS["silu"]
        yield Case("expert_hidden", name, experts.expert_hidden_kernel, expert, one, codes)
        summed = shape | {"BLOCK": DOT_BLOCK}
        yield Case("expert_sums", name, experts.expert_sums_kernel, summed, one)
        yield Case("unpack", name, kernels.unpack_kernel, shape | {"BLOCK": UNPACK_BLOCK}, one)
    yield from _three_matrices(one)
    added = {"bias": None, "JOINS": True, "COLUMNS": _WIDTH, "SPLITS": ADD_SPLITS, "BLOCK": ADD_BLOCK}
    yield Case("add_splits", "F32", kernels.add_splits_kernel, added, one)
    yield from _attention_cases(tuple(capabilities), one)
    yield from _elementwise_cases(one)


def _three_matrices(one: tuple[int, ...]) -> Iterator[Case]:
    """Queries, keys and values; of one row type, and as mixtures of K-quants have them."""
    for kinds in ((RowType.Q4_0,) * 3, (RowType.Q4_K, RowType.Q4_K, RowType.Q6_K)):
        constants: dict[str, Any] = {"COLUMNS": _WIDTH, "BLOCK": DOT_BLOCK}
        constants |= {f"TYPE_{i}": int(kind) for i, kind in enumerate(kinds)}
        constants |= dict.fromkeys(("bias_0", "bias_1", "bias_2"))
        types = {"x": "*i32"}
        for i in range(3):
            types |= {f"base_{i}": "*u8", f"rows_{i}": "i32"}
        yield Case("matvecs", kinds[-1].name, kernels.matvecs_kernel, constants, one, types)


def _attention_cases(every: tuple[int, ...], one: tuple[int, ...]) -> Iterator[Case]:
    shape = {"DIM": _HEAD, "WIDE": _HEAD, "WINDOW": 0, "SPLIT": LEAST_SPLIT}
    attend = shape | {"GROUP": _GROUP, "CAPPED": False, "BLOCK": KEYS_BLOCK, "HALF": _HEAD // 2, "NEOX": True}
    unscaled = {"key_scales": None, "value_scales": None}
    kernel = attention.attend_kernel
    for name, kind, more in (("F16", "*fp16", unscaled), ("Q8_0", "*i8", {})):
        types = dict.fromkeys(("keys", "values"), kind)
        yield Case("attend", name, kernel, attend | more, every, types, exactly())
    combine = shape | {"SPLITS": MOST_SPLITS}
    yield Case("combine", "F32", attention.combine_kernel, combine, one, {}, exactly(MOST_SPLITS * _HEAD))
    for name, kind, more in (("F16", "*fp16", unscaled), ("Q8_0", "*i8", {})):
        types, keep = dict.fromkeys(("keys", "values"), kind), {"DIM": _HEAD, "WIDE": _HEAD} | more
        yield Case("store", name, elementwise.store_kernel, keep, one, types, exactly())


def _elementwise_cases(one: tuple[int, ...]) -> Iterator[Case]:
    norm = {"bias": None, "WIDTH": _WIDTH, "WIDE": _WIDTH, "LAYER": False}
    yield Case("norm", "F32", elementwise.norm_kernel, norm, one, {}, exactly(_WIDTH))
    rounding = {"VALUES": ROUND_VALUES}
    yield Case("round", "F32", elementwise.round_kernel, rounding, one, {}, exactly(ROUND_VALUES))
    sums = {"bias": None, "VALUES": ROUND_VALUES}
    yield Case("join", "F32", elementwise.join_kernel, sums, one, {"first": "*fp32"}, exactly(ROUND_VALUES))
    half = _HEAD // 2
    turn = {"HEADS": 32, "DIM": _HEAD, "HALF": half, "WIDE": half, "NEOX": True}
    yield Case("rotate", "F32", elementwise.rotate_kernel, turn, one, {}, exactly())


def digest() -> str:
    """SHA-256 of what the binaries follow from: Triton's version, and the sources of kernels and cases."""
    sources = sorted([*Path(__file__).parent.glob("triton_*.py"), Path(__file__).parent / "row_types.py"])
    parts = [triton.__version__.encode(), *(path.read_bytes() for path in sources)]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def measure(capabilities: Sequence[int] = CAPABILITIES) -> list[Resources]:
    """Compile all, and read what the binaries say."""
    work = [(case, c) for case in cases(capabilities) for c in case.capabilities]
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda item: _compile(*item), work))


def _compile(case: Case, capability: int) -> Resources:
    function = case.function
    places = {name: index for index, name in enumerate(function.arg_names)}
    signature = {name: case.types.get(name, _type(name)) for name in places if name not in case.constants}
    aligned = {(places[n],): [["tt.divisibility", 16]] for n, kind in signature.items() if kind[0] == "*"}
    constants = {(places[name],): value for name, value in case.constants.items()}
    source = ASTSource(function, signature, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(case.options))
    used, code = _usage(compiled.asm["cubin"]), compiled.asm["ptx"]
    shared = int(compiled.metadata.shared)
    local = used["STACK"] + used["LOCAL"]
    counts = (len(what.findall(code)) for what in (_AHEAD, _WHOLE, _APPROXIMATE))
    return Resources(case.kernel, case.rows, capability, used["REG"], local, shared, *counts)


def _type(name: str) -> str:
    return "*u8" if name in _BYTES else _TYPES.get(name, "*fp32")


def _usage(cubin: bytes) -> dict[str, int]:
    """Registers, stack and local memory, as the disassembler that comes with Triton reads them."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        shown = subprocess.run(  # noqa: S603 - the tool lies inside the installed package
            [str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", shown)}
    return {key: usage[key] for key in ("REG", "STACK", "LOCAL")}


def main(arguments: Sequence[str]) -> None:
    """Print the table for the capabilities named, or for all."""
    rows = [asdict(row) for row in measure([int(word) for word in arguments] or CAPABILITIES)]
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    sys.stdout.write(f'{{"digest": "{digest()}", "kernels": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main(sys.argv[1:])
