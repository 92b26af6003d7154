"""threshold → convert → run --mode thresholded as commands: the cost that was measured goes with the file."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from powerinfer_cli.sizes import parse_share
from powerinfer_formats.profile import Profile
from predicted_models import profiled
from processes import Command
from small_plans import plan_for
from tiny_models import FAMILY_CASES, make_tiny_model

CHOICE = ("--text", "text.txt", "--ctx", "64", "--max-ppl-increase", "5%", "-t", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("threshold")
    spec = replace(FAMILY_CASES["llama"], neurons=192)
    profile = profiled(folder, make_tiny_model(folder, spec))
    plan = plan_for(Profile.load(profile), [16] * spec.layers, group=16, width=spec.width)
    plan.save(folder / "tiny.plan.json")
    return folder


@pytest.fixture(scope="module")
def chosen(powerinfer: Command, folder: Path) -> dict[str, Any]:
    ended = powerinfer("threshold", "-m", "tiny.gguf", *CHOICE, "--json", cwd=folder)
    assert ended.code == 0, ended.err
    return dict(ended.json)


def test_what_was_chosen_is_told_and_kept(powerinfer: Command, folder: Path, chosen: dict[str, Any]) -> None:
    assert chosen["path"] == "tiny.thresholds.safetensors"
    assert chosen["max_increase"] == 0.05
    assert 0 < chosen["density"] < 1
    assert chosen["cost"]["tokens"] > 0
    inspected = powerinfer("inspect", "tiny.thresholds.safetensors", "--json", cwd=folder)
    assert inspected.json["kind"] == "thresholds"
    assert inspected.json["densities"] == chosen["densities"]


def test_the_cost_goes_into_the_split_file_and_is_printed(
    powerinfer: Command, folder: Path, chosen: dict[str, Any]
) -> None:
    """Thresholds beside the model are taken along; they are used only where they are asked for."""
    converted = powerinfer("convert", "-m", "tiny.gguf", cwd=folder)
    assert converted.code == 0, converted.err
    assert "run --mode thresholded" in converted.out
    words = ("run", "-m", "tiny.powerinfer.gguf", "-p", "the cat", "-n", "4", "--temp", "0", "-t", "1")
    plain = powerinfer(*words, "--json", cwd=folder).json
    assert plain["threshold_cost"] is None
    assert plain["density"] == 1
    ended = powerinfer(*words, "--mode", "thresholded", "--json", cwd=folder)
    assert ended.code == 0, ended.err
    cost = chosen["cost"]
    told = ended.json["threshold_cost"]
    assert told["perplexity_increase"] == pytest.approx(
        cost["perplexity"] / cost["dense_perplexity"] - 1, abs=1e-5
    )
    assert told["allowed"] == pytest.approx(0.05)
    assert ended.json["density"] < 1
    assert "thresholded: perplexity" in powerinfer(*words, "-v", "--mode", "thresholded", cwd=folder).err


@pytest.mark.parametrize(
    ("increase", "code", "expected"),
    [("0", 1, "expected a share above 0"), ("much", 2, "is not a share"), ("200%", 1, "up to 100%")],
)
def test_refusals(powerinfer: Command, folder: Path, increase: str, code: int, expected: str) -> None:
    words = ("threshold", "-m", "tiny.gguf", "--text", "text.txt", "--max-ppl-increase", increase)
    ended = powerinfer(*words, "-o", "refused", cwd=folder)
    assert ended.code == code
    assert expected in ended.err
    assert not (folder / "refused").exists()


@pytest.mark.parametrize(
    ("text", "share"), [("1%", 0.01), ("0.01", 0.01), ("0.1 %", 0.001), ("100%", 1.0), ("0", 0.0)]
)
def test_shares(text: str, share: float) -> None:
    assert parse_share(text) == share


@pytest.mark.parametrize("text", ["", "%", "-1%", "1e-2", "1%%", "one", "٣%", "9" * 40])
def test_no_shares(text: str) -> None:
    with pytest.raises(ValueError, match="is not a share"):
        parse_share(text)
