"""Damaged split files, profiles, plans and hardware profiles: consistent, or a FormatError; nothing else."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from powerinfer_formats.errors import FormatError
from powerinfer_formats.hardware import HardwareProfile
from powerinfer_formats.plan import Plan
from powerinfer_formats.profile import Profile
from powerinfer_formats.records import dump_json
from powerinfer_formats.split import SplitFile
from profiles import make_expert_profile
from split_files import NEURONS, write_split
from test_hardware import TEXT
from test_plan import PLAN

SETTINGS = settings(
    derandomize=True,
    deadline=None,
    max_examples=250,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
# (position as a share of the length, new bytes, bytes that they replace)
CHANGES = st.lists(
    st.tuples(st.floats(0, 1), st.binary(max_size=4), st.integers(0, 4)), min_size=1, max_size=4
)
Changes = list[tuple[float, bytes, int]]


def damaged(data: bytes, changes: Changes) -> bytes:
    for share, new, replaced in changes:
        position = int(share * len(data))
        data = data[:position] + new + data[position + replaced :]
    return data


@pytest.fixture(scope="module")
def split_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_split(tmp_path_factory.mktemp("split") / "m.gguf").read_bytes()


@pytest.fixture(scope="module")
def profile_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("profile") / "p"
    make_expert_profile().save(path)
    return path.read_bytes()


@SETTINGS
@given(st.lists(st.tuples(st.floats(0, 0.5), st.integers(0, 255)), min_size=1, max_size=4))
def test_split_files(tmp_path: Path, split_bytes: bytes, changes: list[tuple[float, int]]) -> None:
    changed = bytearray(split_bytes)
    for share, value in changes:
        changed[int(share * len(changed))] = value
    path = tmp_path / "m.gguf"
    path.write_bytes(changed)
    try:
        split = SplitFile.open(path)
    except FormatError:
        return
    for layer in split.layers:
        assert sorted(layer.order.tolist()) == list(range(NEURONS))
        assert [len(layer.rows(kind, 0, NEURONS)) for kind in ("gate", "up", "down")] == [NEURONS] * 3
    split.close()


@SETTINGS
@given(CHANGES)
def test_profiles(tmp_path: Path, profile_bytes: bytes, changes: Changes) -> None:
    path = tmp_path / "p"
    path.write_bytes(damaged(profile_bytes, changes))
    try:
        profile = Profile.load(path)
    except FormatError:
        return
    for layer in range(profile.layers):
        assert 0 <= profile.density(layer) <= 1
        assert sorted(profile.order(layer).tolist()) == list(range(profile.neurons(layer)))
        inside = profile.density_inside(layer)
        assert inside is None or 0 <= inside <= 1


@SETTINGS
@given(CHANGES)
def test_plans(changes: Changes) -> None:
    data = damaged(dump_json(PLAN.to_document()).encode(), changes)
    try:
        plan = Plan.parse(data.decode("utf-8", errors="replace"), "p.json")
    except FormatError:
        return
    assert len(plan.layers) == plan.model.layers


@SETTINGS
@given(CHANGES)
def test_hardware_profiles(changes: Changes) -> None:
    data = damaged(TEXT.encode(), changes)
    try:
        profile = HardwareProfile.parse(data.decode("utf-8", errors="replace"), "h.toml")
    except FormatError:
        return
    assert profile.cpu.cores > 0


@pytest.mark.parametrize("where", [0, 1, 7, 8, 9, 100])
@pytest.mark.parametrize("value", range(0, 256, 15))
def test_the_start_of_a_profile(tmp_path: Path, profile_bytes: bytes, where: int, value: int) -> None:
    """The length and the first braces of the header, where a reader could be led beyond the file."""
    changed = bytearray(profile_bytes)
    original, changed[where] = changed[where], value
    path = tmp_path / "p"
    path.write_bytes(changed)
    if value == original:
        Profile.load(path)
        return
    try:
        Profile.load(path)
    except FormatError:
        return
    assert where == 100  # inside the document, where a name may change
