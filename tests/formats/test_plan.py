import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from powerinfer_formats import errors
from powerinfer_formats.plan import (
    Budgets,
    LayerPlan,
    LayerSeconds,
    Plan,
    PlanExperts,
    PlanHardware,
    PlanMemory,
    PlanModel,
    PlanPrediction,
    PlanProvenance,
    PlanSolver,
    PlanUnit,
)

PLAN = Plan(
    tool_version="0.1.0",
    model=PlanModel("tiny", "ab" * 32, "llama", "silu", layers=2, neurons=96, width=64),
    hardware=PlanHardware("here", "measured", "a CPU", None),
    budgets=Budgets(vram_bytes=1000, ram_bytes=5000, context=128),
    objective="time",
    group=64,
    layers=(
        LayerPlan(0, 64, "dense", "cpu", 0.75, 600, 700, LayerSeconds(1e-4, 2e-4, 3e-4, 0.0, 4e-4)),
        LayerPlan(1, 96, "gate-first", "gpu", 1.0, 300, 800, LayerSeconds(1e-4, 2e-4, 0.0, 0.0, 3e-4)),
    ),
    units=(PlanUnit("embedding", "cpu", 500), PlanUnit("scratch", "gpu", 100)),
    memory=PlanMemory(vram_used=1000, vram_capacity=1000, ram_used=2000, ram_capacity=5000),
    solver=PlanSolver("optimal", 7e-4, 7e-4, 0.0, 1, {"layers": 9e-4}),
    predicted=PlanPrediction(1428.5, "CPU memory bandwidth", {"attention": 2e-4}),
    verdict="fits",
    provenance=PlanProvenance("profile", ("cd" * 32,), 1000),
    predictions={"cpu": PlanPrediction(700.0, "CPU memory bandwidth", {"total": 1e-3})},
    sensitivity={"vram_plus_1_gib": 1500.0},
)


def test_a_plan_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "m.plan.json"
    PLAN.save(path)
    assert Plan.load(path) == PLAN
    first = path.read_bytes()
    Plan.load(path).save(path)
    assert path.read_bytes() == first
    assert first.startswith(
        b'{\n  "format": "powerinfer-plan",\n  "version": 1,\n  "tool_version": "0.1.0",\n'
    )
    assert first.endswith(b"}\n")


EXPERTS = replace(
    PLAN,
    model=replace(PLAN.model, experts=PlanExperts(count=3, used=2, shared_neurons=16)),
    group=32,
    layers=tuple(
        replace(layer, mode="dense", shared_expert=device)
        for layer, device in zip(PLAN.layers, ("gpu", "cpu"), strict=True)
    ),
)


def test_a_plan_with_experts_comes_back_and_has_a_version_of_its_own(tmp_path: Path) -> None:
    EXPERTS.save(tmp_path / "m.plan.json")
    assert Plan.load(tmp_path / "m.plan.json") == EXPERTS
    document = json.loads((tmp_path / "m.plan.json").read_text())
    assert document["version"] == 2
    assert document["model"]["experts"] == {"count": 3, "used": 2, "shared_neurons": 16}
    assert [layer["shared_expert"] for layer in document["layers"]] == ["gpu", "cpu"]
    assert "experts" not in PLAN.to_document()["model"]
    assert "shared_expert" not in PLAN.to_document()["layers"][0]


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("version",), 1, "version is 1, and plans with experts have 2"),
        (("model", "experts", "count"), 0, "experts.count is 0"),
        (("model", "experts", "count"), 4, "group is 32, expected the neurons of one of 4"),
        (("model", "experts", "used"), 0, "experts.used is 0, expected 1 to 3"),
        (("model", "experts", "used"), 4, "experts.used is 4, expected 1 to 3"),
        (("model", "experts", "shared_neurons"), -1, "shared_neurons is -1"),
        (("model", "experts", "shared_neurons"), 0, "shared_expert is there, but no shared expert is"),
        (("model", "experts", "kind"), 0, "kind is not a known field"),
        (("group",), 16, "group is 16, expected the neurons of one of 3"),
        (("layers", 0, "hot_neurons"), 40, "expected a multiple of 32"),
        (("layers", 1, "mode"), "predicted", "mode is 'predicted', experts are dense or gate-first"),
        (("layers", 1, "shared_expert"), None, "shared_expert is missing"),
        (("layers", 1, "shared_expert"), "disk", "expected one of 'gpu', 'cpu'"),
    ],
)
def test_experts_that_make_no_plan(path: tuple[str | int, ...], value: object, says: str) -> None:
    document = copy.deepcopy(EXPERTS.to_document())
    edited(*path, value=value)(document)
    with pytest.raises(errors.BadField, match=says):
        Plan.parse(json.dumps(document), "p.json")


def test_a_plan_without_a_model_file(tmp_path: Path) -> None:
    plan = replace(PLAN, model=replace(PLAN.model, fingerprint=None))
    plan.save(tmp_path / "p.json")
    assert Plan.load(tmp_path / "p.json").model.fingerprint is None
    with pytest.raises(errors.OtherModel, match="shape of 'tiny' alone, not for 'real'"):
        plan.require_model("ab" * 32, "real", "p.json")


def test_a_plan_of_another_model_is_refused_with_both_names() -> None:
    PLAN.require_model("ab" * 32, "tiny", "p.json")
    with pytest.raises(errors.OtherModel, match=r"p\.json: was made for the model 'tiny', not for 'other'"):
        PLAN.require_model("cd" * 32, "other", "p.json")


def edited(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    """Set the field at ``path``; a value of ``DROP`` removes it."""

    def edit(document: dict[str, Any]) -> None:
        target: Any = document
        for key in path[:-1]:
            target = target[key]
        if value is DROP:
            del target[path[-1]]
        else:
            target[path[-1]] = value

    return edit


DROP = object()
L0 = ("layers", 0)

FAULTS: list[tuple[Callable[[dict[str, Any]], None], type[errors.FormatError], str]] = [
    (edited("format", value=DROP), errors.BadDocument, "not a plan"),
    (edited("format", value="powerinfer-profile"), errors.BadDocument, "not a plan"),
    (edited("version", value=5), errors.UnsupportedVersion, r"version 5, .* 3 \(from disk\) and 4 \(with"),
    (edited("version", value=4), errors.BadField, "version is 4, .* with layers without experts besides 4"),
    (edited("version", value=3), errors.BadField, "version is 3, and plans with experts have 2, from disk 3"),
    (edited("version", value=2), errors.BadField, "version is 2, and plans with experts have 2"),
    (edited("version", value=True), errors.UnsupportedVersion, "version True"),
    (edited("version", value=DROP), errors.UnsupportedVersion, "version None"),
    (edited("tool_version", value=DROP), errors.BadField, "tool_version is missing"),
    (edited("tool_version", value=1), errors.BadField, "tool_version is 1, expected a string"),
    (edited("surprise", value=1), errors.BadField, "surprise is not a known field"),
    (edited("model", value=None), errors.BadField, "model is null, expected an object"),
    (edited("model", value=[]), errors.BadField, "model is a list, expected an object"),
    (edited("model", "nick name", value=1), errors.BadField, r"model\.'nick name' is not a known"),
    (
        edited("model", "layers", value=2.0),
        errors.BadField,
        r"model\.layers is 2\.0, expected a whole number",
    ),
    (edited("model", "layers", value=True), errors.BadField, r"model\.layers is True, expected a whole"),
    (edited("model", "layers", value="2"), errors.BadField, r"model\.layers is '2', expected a whole"),
    (edited("model", "layers", value=3), errors.BadField, r"layers has 2 items, expected 3"),
    (edited("model", "neurons", value=0), errors.BadField, r"model\.neurons is not positive"),
    (edited("model", "fingerprint", value="ab"), errors.BadField, r"model\.fingerprint is not 64"),
    (edited("model", "fingerprint", value=DROP), errors.BadField, r"model\.fingerprint is missing"),
    (edited("hardware", "source", value="guessed"), errors.BadField, "expected one of 'measured', 'preset'"),
    (edited("budgets", "context", value=-1), errors.BadField, r"budgets\.context is -1"),
    (edited("objective", value="speed"), errors.BadField, "objective is 'speed'"),
    (edited("group", value=0), errors.BadField, "group is 0, expected 1 to 96"),
    (edited("layers", value={}), errors.BadField, "layers is an object, expected a list"),
    (edited(*L0, value=7), errors.BadField, r"layers\[0\] is 7, expected an object"),
    (edited(*L0, "index", value=1), errors.BadField, r"layers\[0\]\.index is 1, expected 0"),
    (edited(*L0, "mode", value="turbo"), errors.BadField, r"layers\[0\]\.mode is 'turbo'"),
    (edited(*L0, "attention", value="tpu"), errors.BadField, r"layers\[0\]\.attention"),
    (edited(*L0, "hot_neurons", value=65), errors.BadField, "multiple of 64 up to 96, or all"),
    (edited(*L0, "hot_neurons", value=128), errors.BadField, "is 128"),
    (edited(*L0, "hot_neurons", value=-64), errors.BadField, "is -64"),
    (edited(*L0, "hot_activation_share", value=1.5), errors.BadField, "is 1.5, expected 0 to 1"),
    (edited(*L0, "vram_bytes", value=-600), errors.BadField, "memory.vram_used"),
    (edited(*L0, "seconds", "total", value=-1e-3), errors.BadField, r"layers\[0\]\.seconds\.total"),
    (edited(*L0, "seconds", "total", value="1"), errors.BadField, "expected a number"),
    (edited(*L0, "seconds", "sync", value=DROP), errors.BadField, r"seconds\.sync is missing"),
    (edited("units", 0, "bytes", value=501), errors.BadField, "ram_used is 2000, layers and units make 2001"),
    (
        edited("units", 1, "device", value="cpu"),
        errors.BadField,
        "vram_used is 1000, layers and units make 900",
    ),
    (edited("memory", "vram_capacity", value=999), errors.BadField, "more than the capacity"),
    (edited("memory", "ram_used", value=6000), errors.BadField, "more than the capacity"),
    (edited("solver", "gap", value=None), errors.BadField, r"solver\.gap is null"),
    (edited("solver", "nodes", value=-1), errors.BadField, r"solver\.nodes"),
    (edited("solver", "greedy", value=[]), errors.BadField, r"solver\.greedy is a list"),
    (edited("solver", "greedy", "layers", value="x"), errors.BadField, r"solver\.greedy\.layers is 'x'"),
    (edited("predicted", "tokens_per_second", value=0), errors.BadField, "tokens_per_second is not positive"),
    (
        edited("predicted", "tokens_per_second", value=10**400),
        errors.BadField,
        "larger than the largest number",
    ),
    (
        edited("predictions", "cpu", "tokens_per_second", value=0.0),
        errors.BadField,
        r"predictions\.cpu\.tokens_per_second is not positive",
    ),
    (edited("sensitivity", "vram_plus_1_gib", value=-1.0), errors.BadField, "vram_plus_1_gib is not pos"),
    (edited("provenance", "corpus_hashes", value=[1]), errors.BadField, r"corpus_hashes\[0\] is 1"),
]


@pytest.mark.parametrize(("edit", "error", "words"), FAULTS, ids=[words for _, _, words in FAULTS])
def test_each_fault_names_its_field(
    tmp_path: Path, edit: Callable[[dict[str, Any]], None], error: type[errors.FormatError], words: str
) -> None:
    document = copy.deepcopy(PLAN.to_document())
    edit(document)
    path = tmp_path / "p.json"
    path.write_text(json.dumps(document))
    with pytest.raises(errors.FormatError, match=words) as caught:
        Plan.load(path)
    assert type(caught.value) is error
    assert str(caught.value).startswith(str(path))


def test_a_plan_that_could_not_be_read_is_not_written(tmp_path: Path) -> None:
    wrong = replace(PLAN, memory=replace(PLAN.memory, vram_used=1))
    with pytest.raises(errors.BadField, match="vram_used"):
        wrong.save(tmp_path / "p.json")
    assert not list(tmp_path.iterdir())


TEXTS: list[tuple[bytes, type[errors.FormatError], str]] = [
    (b"", errors.BadDocument, "not valid JSON"),
    (b"[]", errors.BadDocument, "not a plan"),
    (b"{", errors.BadDocument, "not valid JSON"),
    (b'{"a": 1, "b": {"c": 1, "c": 2}}', errors.BadDocument, "'c' occurs twice"),
    (b'{"a": NaN}', errors.BadDocument, "NaN is not JSON"),
    (b'{"a": -Infinity}', errors.BadDocument, "-Infinity is not JSON"),
    (b'{"a": 1} {}', errors.BadDocument, "not valid JSON"),
    (b"[" * 200_000, errors.BadDocument, "nested too deeply"),
    (b'{"a": ' + b"9" * 5000 + b"}", errors.BadDocument, "not valid JSON"),
    (b'{"a": "\xff"}', errors.InvalidUTF8, "not UTF-8 at byte 7"),
]


@pytest.mark.parametrize(("text", "error", "words"), TEXTS, ids=[words for _, _, words in TEXTS])
def test_text_that_is_no_json(
    tmp_path: Path, text: bytes, error: type[errors.FormatError], words: str
) -> None:
    path = tmp_path / "p.json"
    path.write_bytes(text)
    with pytest.raises(errors.FormatError, match=words) as caught:
        Plan.load(path)
    assert type(caught.value) is error


def test_a_plan_cut_anywhere_is_refused(tmp_path: Path) -> None:
    text = json.dumps(PLAN.to_document())
    for length in range(len(text)):
        with pytest.raises(errors.BadDocument):
            Plan.parse(text[:length], "cut.json")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(errors.CannotRead, match="No such file"):
        Plan.load(tmp_path / "none.json")
    with pytest.raises(errors.NotARegularFile):
        Plan.load(tmp_path)
