"""eval --compare: the figures of each mode, against the same figures taken from logits in plain numpy."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from powerinfer_formats.modes import MODES
from powerinfer_formats.predictors import Predictors
from powerinfer_tools.engine import Engine
from powerinfer_tools.errors import ModelError
from powerinfer_tools.model.loading import Model, load_model
from powerinfer_tools.quality.comparison import Comparison, Fidelity, compare_modes
from powerinfer_tools.quality.perplexity import perplexity
from predicted_models import predicted_split
from tiny_models import FAMILY_CASES, TinyModel, make_tiny_model

Opened = tuple[TinyModel, Model, Predictors]
PIECES = 3


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    tiny, path, predictors = predicted_split(tmp_path_factory.mktemp("compared"))
    model = load_model(path)
    yield tiny, model, predictors
    model.close()


def pieces_of(tiny: TinyModel) -> list[list[int]]:
    return [tiny.tokens(40, seed) for seed in range(PIECES)]


def compared(model: Model, tiny: TinyModel, modes: tuple[str, ...], **options: object) -> Comparison:
    open_engine = partial(Engine, model, **({"threads": 1} | options))  # type: ignore[arg-type]
    return compare_modes(open_engine, model, modes, pieces_of(tiny))


def row_of(comparison: Comparison, mode: str) -> Fidelity:
    return next(row for row in comparison.rows if row.mode == mode)


def every_logit(model: Model, tokens: list[int], mode: str) -> np.ndarray:
    """Logits [tokens, vocabulary] as a user meets them: one token after the other."""
    engine = Engine(model, threads=1, mode=mode)
    try:
        rows = [engine.prefill(tokens[:1]).copy()] + [engine.decode(token).copy() for token in tokens[1:]]
    finally:
        engine.close()
    return np.stack(rows).astype(np.float64)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    result: np.ndarray = logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
    return result - logits.max(1, keepdims=True)


def test_one_row_for_each_mode_in_order(opened: Opened) -> None:
    tiny, model, _ = opened
    comparison = compared(model, tiny, MODES)
    assert tuple(row.mode for row in comparison.rows) == MODES
    assert comparison.positions == PIECES * (40 - 1 - 20)
    missing = row_of(comparison, "thresholded")
    assert not missing.available
    assert missing.perplexity is None
    assert "thresholded" in str(missing.note)


def test_gate_first_has_the_bits_of_dense_and_predicted_has_not(opened: Opened) -> None:
    tiny, model, _ = opened
    comparison = compared(model, tiny, ("dense", "gate-first", "predicted"))
    dense, exact, predicted = comparison.rows
    assert (exact.identical, exact.kl, exact.max_kl, exact.top1_agreement) == (True, 0.0, 0.0, 1.0)
    assert exact.perplexity == dense.perplexity
    assert exact.perplexity_ratio == 1.0
    assert dense.density == 1.0
    assert exact.density is not None
    assert 0.3 < exact.density < 0.7
    assert not predicted.identical
    assert predicted.kl is not None
    assert predicted.kl > 1e-6
    for row in (dense, exact):
        assert row.recall is None
        assert row.note


def test_figures_are_those_of_plain_numpy(opened: Opened) -> None:
    tiny, model, _ = opened
    row = row_of(compared(model, tiny, ("dense", "predicted")), "predicted")
    kl, same, losses, base_losses = [], [], [], []
    for piece in pieces_of(tiny):
        own, base = (log_softmax(every_logit(model, piece, mode)) for mode in ("predicted", "dense"))
        for position in range(20, 39):
            kl.append(float(np.sum(np.exp(base[position]) * (base[position] - own[position]))))
            same.append(int(np.argmax(base[position])) == int(np.argmax(own[position])))
            losses.append(-own[position, piece[position + 1]])
            base_losses.append(-base[position, piece[position + 1]])
    difference = np.array(losses) - np.array(base_losses)
    count = len(losses)
    assert row.kl == pytest.approx(np.mean(kl), rel=1e-5)
    assert row.kl_error == pytest.approx(np.std(kl, ddof=1) / np.sqrt(count), rel=1e-5)
    assert row.max_kl == pytest.approx(np.max(kl), rel=1e-5)
    assert row.top1_agreement == pytest.approx(np.mean(same))
    assert row.perplexity == pytest.approx(np.exp(np.mean(losses)), rel=1e-5)
    assert row.perplexity_ratio == pytest.approx(np.exp(difference.mean()), rel=1e-5)
    error = np.exp(difference.mean()) * difference.std(ddof=1) / np.sqrt(count)
    assert row.perplexity_ratio_error == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("activation", ["relu", "relu2"])
def test_recall_is_the_share_of_active_neurons_that_were_predicted(tmp_path: Path, activation: str) -> None:
    """With one layer, its input does not depend on what is predicted: the source model's serves."""
    tiny, path, predictors = predicted_split(tmp_path, layers=1, activation=activation)
    source, split = load_model(tiny.path), load_model(path)
    order = split.split.layer(0).order[16:] if split.split else None
    found, active = 0, 0

    def look(_: int, normed: np.ndarray, hidden: np.ndarray) -> None:
        nonlocal found, active
        layer = predictors.layers[0]
        scores = normed.astype(np.float64) @ layer.inward.T @ layer.outward.T
        predicted, truth = (scores > layer.threshold)[:, order], (hidden != 0)[:, order]
        found += int((predicted & truth).sum())
        active += int(truth.sum())

    engine = Engine(source, threads=1)
    for piece in pieces_of(tiny):
        engine.absorb(piece, look)
    engine.close()
    # Hot neurons are computed whatever the predictor says; without a hot device, all are the predictor's.
    whole = row_of(compared(split, tiny, ("predicted",)), "predicted")
    hot = row_of(compared(split, tiny, ("predicted",), device="cpu"), "predicted")
    assert hot.recall == pytest.approx(found / active, abs=2e-3)
    assert whole.recall is not None
    assert 0.5 < whole.recall < 0.99
    source.close()
    split.close()


@pytest.mark.parametrize("threads", [1, 2])
def test_checking_recall_changes_no_bit(opened: Opened, threads: int) -> None:
    tiny, model, _ = opened
    hashes = []
    for check in (False, True):
        engine = Engine(model, threads=threads, mode="predicted", check_recall=check)
        logits = [engine.prefill(tiny.tokens(30)).tobytes()] + [engine.decode(t).tobytes() for t in (5, 6, 7)]
        hashes.append(logits)
        assert (engine.report().recall is None) is not check
        engine.close()
    assert hashes[0] == hashes[1]


def test_perplexity_is_that_of_eval_alone(opened: Opened) -> None:
    tiny, model, _ = opened
    row = row_of(compared(model, tiny, ("predicted",)), "predicted")
    engine = Engine(model, threads=1, mode="predicted")
    alone = perplexity(engine, pieces_of(tiny))
    engine.close()
    assert (row.perplexity, row.perplexity_error) == (alone.perplexity, alone.standard_error)


def test_a_source_model_is_dense_alone(tmp_path: Path) -> None:
    tiny = make_tiny_model(tmp_path, FAMILY_CASES["llama-relu"])
    model = load_model(tiny.path)
    comparison = compared(model, tiny, MODES)
    assert [row.available for row in comparison.rows] == [True, False, False, False]
    with pytest.raises(ModelError, match="powerinfer convert"):
        compared(model, tiny, ("gate-first",))
    model.close()
