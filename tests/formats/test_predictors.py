"""The predictors file: what is written is read, and every fault has its error."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from powerinfer_formats import errors
from powerinfer_formats.predictors import (
    LowRank,
    PredictionCost,
    PredictorInfo,
    Predictors,
    PredictorsHeader,
    Quality,
    ResidualRelu,
    SignBits,
)

WIDTH, NEURONS, RANKS = 8, 11, (3, 1)
COST = PredictionCost(0.001, 20.0, 20.1, 0.01, 100, 64, "ef" * 32)
QUALITY = Quality(0.2, 0.3, 0.95, 0.6)


SIGN = PredictorInfo("sign", 0, 55, QUALITY)


def infos(*ranks: int, **changes: Any) -> tuple[PredictorInfo, ...]:
    """A layer for each rank; 0: one without a predictor. ``changes`` are of the first."""
    made = [PredictorInfo("low-rank" if rank else "none", rank, 100 * rank, QUALITY) for rank in ranks]
    return (replace(made[0], **changes), *made[1:])


def make(**changes: Any) -> Predictors:
    rng = np.random.default_rng(1)
    layers = (
        *(
            LowRank(
                *(
                    rng.normal(size=shape).astype(np.float32)
                    for shape in ((rank, WIDTH), (NEURONS, rank), NEURONS)
                )
            )
            for rank in RANKS
        ),
        SignBits(rng.integers(0, 256, (NEURONS, 1), np.uint8), rng.normal(size=NEURONS).astype(np.float32)),
        None,
    )
    header = PredictorsHeader(
        fingerprint="ab" * 32,
        model_name="tiny",
        method="svd",
        row_type="F32",
        target_recall=0.95,
        width=WIDTH,
        neurons=NEURONS,
        layers=(*infos(*RANKS), SIGN, infos(0)[0]),
        test_records=7,
        cost=COST,
        corpus_hashes=("cd" * 32,),
        tool_version="0",
    )
    return Predictors(replace(header, **changes), layers)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    made = make()
    made.save(tmp_path / "p")
    found = Predictors.load(tmp_path / "p")
    assert found.header == made.header
    assert found.layers[3] is None
    for first, second in zip(made.layers[:3], found.layers[:3], strict=True):
        assert type(first) is type(second)
        for name, array in vars(first).items():
            assert np.array_equal(array, getattr(second, name))
    assert found.header.nbytes == 455
    assert COST.increase == pytest.approx(0.005)


def test_unmeasured_predictors_of_the_original_kind(tmp_path: Path) -> None:
    """Their rank may be above the width, and nothing is known of their quality."""
    ranks = (WIDTH + 1, 2)
    infos = tuple(PredictorInfo("residual-relu", rank, 10, None) for rank in ranks)
    layers = tuple(
        ResidualRelu(
            *(np.full(shape, rank, np.float32) for shape in ((rank, WIDTH), (NEURONS, rank), NEURONS))
        )
        for rank in ranks
    )
    header = replace(make().header, layers=infos, test_records=0, cost=None, target_recall=None)
    Predictors(header, layers).save(tmp_path / "p")
    found = Predictors.load(tmp_path / "p")
    assert found.header == header
    assert [type(layer) for layer in found.layers] == [ResidualRelu, ResidualRelu]
    for changes in (
        {"test_records": 3},
        {"test_records": -1},
        {"layers": (replace(infos[0], quality=Quality(0.1, 0.2, 0.9, 0.5)), infos[1])},
        {"layers": (replace(infos[0], rank=NEURONS + 1), infos[1])},
    ):
        Predictors(replace(header, **changes), layers).save(tmp_path / "p")  # type: ignore[arg-type]
        with pytest.raises(errors.BadField):
            Predictors.load(tmp_path / "p")


@pytest.mark.parametrize(
    ("fault", "changes"),
    [
        (errors.BadField, {"width": 0}),
        (errors.BadField, {"layers": ()}),
        (errors.BadField, {"layers": infos(3, WIDTH + 1, 0)}),
        (errors.BadField, {"layers": infos(3, 1, 0, rank=0)}),
        (errors.BadField, {"layers": infos(3, 1, 0, kind="none")}),
        (errors.BadField, {"layers": infos(3, 1, 0, kind="oracle")}),
        (errors.BadField, {"layers": infos(3, 1, 0, nbytes=-1)}),
        (errors.BadField, {"layers": infos(3, 1, 0, quality=Quality(0.2, 1.3, 0.95, 0.6))}),
        (errors.BadField, {"test_records": 0}),
        (errors.BadField, {"row_type": "Q6_K"}),
        (errors.BadField, {"row_type": "Q8_0"}),
        (errors.BadField, {"cost": replace(COST, perplexity=0.0)}),
        (errors.BadField, {"cost": replace(COST, tokens=0)}),
        (errors.WrongShape, {"neurons": NEURONS + 1}),
        (errors.WrongShape, {"layers": (*infos(3, 2), SIGN, infos(0)[0])}),
        (errors.UnexpectedTensor, {"layers": infos(3)}),
        (errors.UnexpectedTensor, {"layers": infos(3, 0, 0, 0)}),
        (errors.MissingTensor, {"layers": infos(3, 1, 1)}),
        (errors.MissingTensor, {"layers": (*infos(3), SIGN, SIGN, infos(0)[0])}),
        (errors.BadField, {"layers": (replace(SIGN, rank=1), *infos(3, 1, 0))}),
        (errors.WrongShape, {"width": WIDTH + 1, "layers": (*infos(0, 0), SIGN, infos(0)[0])}),
    ],
)
def test_faults(tmp_path: Path, fault: type[Exception], changes: dict[str, Any]) -> None:
    make(**changes).save(tmp_path / "p")
    with pytest.raises(fault):
        Predictors.load(tmp_path / "p")


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    made = make()
    assert made.layers[1] is not None
    made.layers[1].threshold[4] = np.nan
    made.save(tmp_path / "p")
    with pytest.raises(errors.BadValue, match="layer 1"):
        Predictors.load(tmp_path / "p")


def test_another_file_and_another_model(tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    with pytest.raises(errors.BadSafetensors):
        Predictors.load(tmp_path / "p")
    made = make()
    made.require_model("ab" * 32, "x", (4, WIDTH, NEURONS), "p")
    for fingerprint, shape in (("00" * 32, (4, WIDTH, NEURONS)), ("ab" * 32, (2, WIDTH, NEURONS))):
        with pytest.raises(errors.OtherModel, match=r"'tiny'.*'other'"):
            made.require_model(fingerprint, "other", shape, "p")
