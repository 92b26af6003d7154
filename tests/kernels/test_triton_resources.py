"""What the Triton kernels take of a GPU, compiled without one, beside what was recorded."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from powerinfer_kernels import RowType
from powerinfer_kernels.triton_layout import PLANAR_TYPES, form_of
from powerinfer_kernels.triton_resources import CAPABILITIES, digest

RECORD = Path(__file__).resolve().parents[1] / "data" / "triton_resources.json"
REMEDY = f"record anew: python -m powerinfer_kernels.triton_resources > {RECORD.name}"
#: Compiled where neither the kernels nor Triton has changed since the record: compilers are deterministic.
SAMPLE = 90
#: Kernels that read weights tile by tile.
READING = ("hidden", "matvec", "partial_sums", "expert_hidden", "expert_sums")


def compiled(folder: Path, capabilities: tuple[int, ...]) -> dict[str, Any]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder)
    command = [sys.executable, "-W", "ignore", "-m", "powerinfer_kernels.triton_resources"]
    shown = subprocess.run(
        [*command, *map(str, capabilities)], env=environment, capture_output=True, text=True, check=False
    )
    assert shown.returncode == 0, shown.stderr
    result: dict[str, Any] = json.loads(shown.stdout)
    return result


def takes_codes(name: tuple[str, str, int]) -> bool:
    kernel, rows, _ = name
    return kernel in ("hidden", "matvec", "expert_hidden") and not RowType[rows].is_float


def by_kernel(rows: list[dict[str, Any]]) -> dict[tuple[str, str, int], dict[str, Any]]:
    return {(row["kernel"], row["rows"], row["capability"]): row for row in rows}


def test_compiled_kernels_take_no_more_of_a_gpu_than_recorded(tmp_path: Path) -> None:
    """Binaries for five generations of GPUs, or for one where nothing changed since the record. Slack: an
    eighth more registers (and 4), since compilers differ; none for local memory, where spills would
    show, and for shared memory."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    capabilities = (SAMPLE,) if record["digest"] == digest() else CAPABILITIES
    recorded = {k: row for k, row in by_kernel(record["kernels"]).items() if k[2] in capabilities}
    measured = by_kernel(compiled(tmp_path, capabilities)["kernels"])
    assert [name for name, row in measured.items() if row["approximate"]] == []
    # GPUs before Ampere have no loads that nothing waits for.
    reading = {name: row for name, row in measured.items() if name[0] in READING and name[2] >= 80}
    assert reading
    assert [name for name, row in reading.items() if row["ahead"] < 2] == []
    assert [name for name, row in measured.items() if takes_codes(name) and row["whole"] < 8] == []
    assert measured.keys() == recorded.keys(), REMEDY
    worse = [
        f"{row} instead of {was}"
        for name, row in measured.items()
        for was in [recorded[name]]
        if row["registers"] > was["registers"] * 9 // 8 + 4
        or row["local"] > was["local"]
        or row["shared"] > was["shared"]
    ]
    assert not worse, worse


def test_products_of_every_quantised_row_type_are_of_whole_numbers() -> None:
    """What a decoded token multiplies with: four codes at a time, for eight words of each block."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    assert record["digest"] == digest(), REMEDY
    rows = {name: row for name, row in by_kernel(record["kernels"]).items() if takes_codes(name)}
    types = {form_of(kind).name for kind in PLANAR_TYPES if not kind.is_float}
    for kernel in ("hidden", "matvec"):
        assert {name[1] for name in rows if name[0] == kernel} == types
    assert {name[0] for name in rows} == {"hidden", "matvec", "expert_hidden"}
    assert [name for name, row in rows.items() if row["whole"] < 8] == []


def test_the_digest_follows_the_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest()
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + b"#" * (path.name == "triton_ffn.py"))
    assert digest() != before
