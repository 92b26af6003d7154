"""What SPEC.md says about numbers and names is what the code does."""

import dataclasses
import re
from pathlib import Path

import pytest

from powerinfer_formats import split_devices, split_layout, split_thresholds
from powerinfer_formats.block_types import BLOCK_SHAPES, type_name
from powerinfer_formats.delta import DeltaHeader, DeltaQuality
from powerinfer_formats.hardware import CpuInfo, FFNCurve, GpuInfo, KernelRate, LinkInfo, MachineInfo, Spread
from powerinfer_formats.modes import MODES
from powerinfer_formats.plan import LayerPlan, Plan, PlanExperts, PlanProvenance
from powerinfer_formats.profile import Profile
from powerinfer_formats.profile_document import ProfileDocument
from powerinfer_formats.thresholds import ThresholdCost, ThresholdsHeader


@pytest.fixture(scope="module")
def spec(repository_root: Path) -> str:
    return (repository_root / "formats" / "SPEC.md").read_text(encoding="utf-8")


def test_the_table_of_tensor_types(spec: str) -> None:
    rows = re.findall(r"\| (\d+) \| (\w+) \| (\d+) \| (\d+) (?=\|)", spec)
    written = {int(number): (name, int(values), int(nbytes)) for number, name, values, nbytes in rows}
    assert written == {
        number: (type_name(number), block.values, block.nbytes) for number, block in BLOCK_SHAPES.items()
    }


def test_every_key_of_a_split_file(spec: str) -> None:
    modules = (split_layout, split_thresholds, split_devices)
    keys = {value for module in modules for name, value in vars(module).items() if name.startswith("KEY_")}
    assert set(re.findall(r"^\| `(powerinfer\.\w+)` ", spec, re.MULTILINE)) == keys


def test_the_modes(spec: str) -> None:
    (row,) = re.findall(r"^\| `powerinfer\.mode` \| [^|]* \| (.*) \|$", spec, re.MULTILINE)
    assert re.findall(r"`([\w-]+)`", row) == list(MODES)


@pytest.mark.parametrize(
    ("activation", "exact_zeros", "says"),
    [
        ("routing", True, "experts"),
        ("relu", True, "neurons that are not exactly zero"),
        ("silu", False, "neurons active at a density of D"),
    ],
)
def test_what_a_profile_counts(spec: str, activation: str, exact_zeros: bool, says: str) -> None:
    made = Profile("", "", "", activation, exact_zeros, 9, 8, 0.2, (), "", ())
    assert made.counting == f"{says.replace('D', '0.2')}, in windows of 8 tokens"
    assert f"`{says}`" in " ".join(spec.split())


@pytest.mark.parametrize(
    "record",
    [
        Plan,
        LayerPlan,
        PlanExperts,
        PlanProvenance,
        ProfileDocument,
        MachineInfo,
        CpuInfo,
        GpuInfo,
        LinkInfo,
        FFNCurve,
        KernelRate,
        Spread,
        DeltaHeader,
        DeltaQuality,
        ThresholdsHeader,
        ThresholdCost,
    ],
    ids=lambda c: c.__name__,
)
def test_every_field(spec: str, record: type) -> None:
    for field in dataclasses.fields(record):
        assert f"`{field.name}`" in spec
