"""Thresholds, in their file and in a split file: what is written is read, every fault has its error."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from powerinfer_formats import errors
from powerinfer_formats.gguf_writer import ValueType
from powerinfer_formats.split import SplitFile
from powerinfer_formats.split_thresholds import KEY_COST, KEY_FACTORS, SplitThresholding, threshold_name
from powerinfer_formats.thresholds import ThresholdCost, Thresholds, ThresholdsHeader
from split_files import HEADER, NEURONS, Parts, write_split

COST = ThresholdCost(20.0, 20.2, 0.004, 0.011, 512)
#: Of a split file: perplexity without and with, error of their ratio, divergence, increase allowed.
FIGURES = (20.0, 20.5, 0.004, 0.011, 0.02)


def make(**changes: Any) -> Thresholds:
    header = ThresholdsHeader(
        fingerprint="ab" * 32,
        model_name="tiny",
        activation="silu",
        neurons=11,
        max_increase=0.01,
        factors=("gate", "none", "up"),
        densities=(0.7, 1.0, 0.5),
        uniform_density=0.85,
        cost=COST,
        text_sha256="cd" * 32,
        tool_version="0",
    )
    rng = np.random.default_rng(1)
    first, third = (rng.normal(size=11).astype(np.float32) for _ in range(2))
    return Thresholds(replace(header, **changes), (first, None, third))


def test_what_was_written_is_read(tmp_path: Path) -> None:
    made = make()
    made.save(tmp_path / "t")
    found = Thresholds.load(tmp_path / "t")
    assert found.header == made.header
    assert found.layers[1] is None
    for index in (0, 2):
        np.testing.assert_array_equal(found.layers[index], made.layers[index])


@pytest.mark.parametrize(
    ("fault", "changes"),
    [
        (errors.BadField, {"neurons": 0}),
        (errors.BadField, {"factors": (), "densities": ()}),
        (errors.BadField, {"factors": ("gate", "none", "down")}),
        (errors.BadField, {"densities": (0.7, 1.0)}),
        (errors.BadField, {"densities": (0.7, 1.0, 1.5)}),
        (errors.BadField, {"uniform_density": -0.1}),
        (errors.BadField, {"max_increase": 0.0}),
        (errors.BadField, {"cost": replace(COST, perplexity=0.5)}),
        (errors.BadField, {"cost": replace(COST, kl=-1.0)}),
        (errors.BadField, {"cost": replace(COST, tokens=0)}),
        (errors.WrongShape, {"neurons": 12}),
        (errors.MissingTensor, {"factors": ("gate", "gate", "up")}),
        (errors.UnexpectedTensor, {"factors": ("none", "none", "up")}),
    ],
)
def test_faults(tmp_path: Path, fault: type[Exception], changes: dict[str, Any]) -> None:
    make(**changes).save(tmp_path / "t")
    with pytest.raises(fault):
        Thresholds.load(tmp_path / "t")


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    made = make()
    assert made.layers[2] is not None
    made.layers[2][4] = np.inf
    made.save(tmp_path / "t")
    with pytest.raises(errors.BadValue, match="thresholds"):
        Thresholds.load(tmp_path / "t")


def test_another_model(tmp_path: Path) -> None:
    made = make()
    made.require_model("ab" * 32, "x", 3, 11, "t")
    for fingerprint, layers in (("00" * 32, 3), ("ab" * 32, 2)):
        with pytest.raises(errors.OtherModel, match=r"'tiny'.*'other'"):
            made.require_model(fingerprint, "other", layers, 11, tmp_path)


def with_thresholds(parts: Parts) -> None:
    """The second of three layers has thresholds, selected by up."""
    parts.header = replace(HEADER, thresholding=SplitThresholding(("none", "up", "none"), FIGURES))
    parts.factor_thresholds[1] = [float(i) for i in range(NEURONS)]


def test_a_split_file_with_thresholds(tmp_path: Path) -> None:
    split = SplitFile.open(write_split(tmp_path / "s.gguf", with_thresholds))
    first, second, third = split.layers
    assert (first.threshold, third.threshold) == (None, None)
    assert second.threshold is not None
    assert second.threshold.factor == "up"
    assert second.threshold.values.tolist() == list(range(NEURONS))
    assert split.header.thresholding is not None
    assert split.header.thresholding.increase == pytest.approx(0.025)
    assert split.header.thresholding.cost == pytest.approx(FIGURES)
    split.close()


def _mode(parts: Parts) -> None:
    with_thresholds(parts)
    parts.header = replace(parts.header, modes=("thresholded", "thresholded", "dense"))


def _factors(*factors: str) -> Any:
    def change(parts: Parts) -> None:
        with_thresholds(parts)
        parts.header = replace(parts.header, thresholding=SplitThresholding(factors, FIGURES))

    return change


def _cost(*figures: float) -> Any:
    def change(parts: Parts) -> None:
        with_thresholds(parts)
        parts.header = replace(
            parts.header,
            thresholding=SplitThresholding(("none", "up", "none"), figures),  # type: ignore[arg-type]
        )

    return change


def _values(*values: float) -> Any:
    def change(parts: Parts) -> None:
        with_thresholds(parts)
        parts.factor_thresholds[1] = list(values)

    return change


def _cost_alone(parts: Parts) -> None:
    parts.extra_entries.append((KEY_COST, FIGURES, ValueType.FLOAT32))


def _integers(parts: Parts) -> None:
    with_thresholds(parts)
    parts.without.add(KEY_COST)
    parts.extra_entries.append((KEY_COST, (1, 2, 3, 4, 5), ValueType.UINT32))


def _missing(parts: Parts) -> None:
    with_thresholds(parts)
    parts.factor_thresholds.clear()


SPLIT_FAULTS: dict[str, tuple[Any, type[Exception], str]] = {
    "a thresholded layer without": (_mode, errors.BadValue, "is thresholded for layer 0"),
    "an unknown factor": (_factors("none", "down", "none"), errors.BadValue, KEY_FACTORS),
    "factors of two layers": (_factors("none", "up"), errors.BadValue, KEY_FACTORS),
    "no factor but a tensor": (_factors("none", "none", "none"), errors.UnexpectedTensor, threshold_name(1)),
    "a factor but no tensor": (_missing, errors.MissingTensor, threshold_name(1)),
    "four figures": (_cost(*FIGURES[:4]), errors.BadValue, KEY_COST),
    "a perplexity below one": (_cost(0.5, *FIGURES[1:]), errors.BadValue, KEY_COST),
    "a negative figure": (_cost(*FIGURES[:4], -1.0), errors.BadValue, KEY_COST),
    "figures that are integers": (_integers, errors.WrongKeyType, KEY_COST),
    "figures without factors": (_cost_alone, errors.BadValue, KEY_COST),
    "a value that is not finite": (_values(*[1.0] * 11, float("nan")), errors.BadValue, threshold_name(1)),
    "too few values": (_values(1.0, 2.0), errors.WrongShape, threshold_name(1)),
}


@pytest.mark.parametrize("name", sorted(SPLIT_FAULTS))
def test_split_faults(tmp_path: Path, name: str) -> None:
    change, fault, message = SPLIT_FAULTS[name]
    path = write_split(tmp_path / "s.gguf", change)
    with pytest.raises(fault, match=message.replace(".", r"\.")):
        SplitFile.open(path)
