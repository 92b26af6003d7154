"""train: factors are optimal, thresholds keep their promise, and the split file predicts what was made."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from powerinfer_formats.errors import FileChanged, OtherModel
from powerinfer_formats.predictors import LowRank, Predictors
from powerinfer_formats.profile import Profile
from powerinfer_formats.trace import TraceFile
from powerinfer_kernels import RowType
from powerinfer_tools.engine import Engine
from powerinfer_tools.errors import PowerInferError, TrainError
from powerinfer_tools.model.loading import load_model
from powerinfer_tools.quality.perplexity import perplexity, windows
from powerinfer_tools.stages.convert.conversion import ConvertOptions, convert
from powerinfer_tools.stages.profile import ProfileOptions, run_profile
from powerinfer_tools.stages.train import TrainOptions, draw_frontier, run_train
from powerinfer_tools.stages.train.allocation import Sensitivity, Setting
from powerinfer_tools.stages.train.choice import Candidate, choose
from powerinfer_tools.stages.train.frontier import RECALLS
from powerinfer_tools.stages.train.layer_data import LayerData, parted
from powerinfer_tools.stages.train.low_rank import cut, factorize
from powerinfer_tools.stages.train.naming import Fit, fit, judge, level_for
from powerinfer_tools.stages.train.tuning import Tuning, tune
from powerinfer_tools.text import Tokenizer
from rewriting import Rewriting
from small_plans import plan_for
from tiny_models import FAMILY_CASES, make_tiny_model

TEXT = "the cat sat on the mat and the dog sat on the log; a quick brown fox jumps over the lazy dog. " * 60


class Traced:
    """A tiny ReLU model with its profile and its trace."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.tiny = make_tiny_model(folder, replace(FAMILY_CASES["llama-relu"], seed=seed))
        text = folder / "text.txt"
        text.write_text(TEXT)
        self.profile, self.trace = folder / "tiny.profile.safetensors", folder / "tiny.trace.zst"
        run_profile(
            ProfileOptions(
                self.tiny.path,
                (text,),
                self.profile,
                window=64,
                threads=1,
                trace=1200,
                trace_output=self.trace,
            )
        )

    def options(self, **changes: object) -> TrainOptions:
        made = TrainOptions(self.tiny.path, self.trace, self.folder / "tiny.predictors.safetensors")
        return replace(made, row_type="F32", budget=1.0, **({"recall": 0.95, "method": "svd"} | changes))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Traced:
    return Traced(tmp_path_factory.mktemp("traced"), 1)


def predictor(
    gate: np.ndarray,
    learn: np.ndarray,
    rank: int,
    row_type: RowType,
    check: np.ndarray,
    active: np.ndarray,
    recall: float,
) -> LowRank:
    made = fit(cut(factorize(gate, learn), rank, row_type), learn, learn @ gate.T)
    return made.at(level_for(made.normal(check), active, recall))


def skewed_inputs(rng: np.random.Generator, count: int, width: int) -> np.ndarray:
    return (rng.normal(size=(count, width)) * np.geomspace(5, 0.05, width) + 0.3).astype(np.float32)


def test_factors_beat_the_plain_decomposition_where_inputs_are_skewed() -> None:
    rng = np.random.default_rng(4)
    gate, inputs = rng.normal(size=(40, 24)).astype(np.float32), skewed_inputs(rng, 500, 24)
    factors = factorize(gate, inputs)
    left, values, right = np.linalg.svd(gate)
    exact = inputs @ gate.T
    errors = []
    for rank in (1, 5, 12, 24):
        ours = inputs @ factors.inward[:rank].T @ factors.outward[:, :rank].T
        plain = inputs @ right[:rank].T @ (left[:, :rank] * values[:rank]).T
        errors.append(np.square(ours - exact).mean())
        if rank < 24:
            assert errors[-1] < 0.8 * np.square(plain - exact).mean()
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-6 * np.square(exact).mean()


@pytest.mark.parametrize("recall", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("row_type", ["F32", "Q8_0", "Q4_0"])
def test_thresholds_find_what_was_asked_for(recall: float, row_type: str) -> None:
    """The share that was asked for, of the records that thresholds are set on (but for scores that float32
    rounds across the threshold), and about as much of others."""
    rng = np.random.default_rng(5)
    gate = rng.normal(size=(64, 64)).astype(np.float32) - 0.2
    learn, check, test = (skewed_inputs(rng, count, 64) for count in (800, 400, 400))
    active = check @ gate.T > 0
    made = predictor(gate, learn, 32, RowType[row_type], check, active, recall)
    quality = judge(made, check, active)
    assert recall - 1e-3 <= quality.recall <= recall + 1e-3
    assert quality.density == pytest.approx(active.mean())
    other = judge(made, test, test @ gate.T > 0)
    assert other.recall == pytest.approx(recall, abs=0.03)
    assert other.precision == pytest.approx(other.recall * other.density / other.predicted_density)


def test_better_ranks_predict_fewer_neurons() -> None:
    rng = np.random.default_rng(6)
    gate = rng.normal(size=(80, 48)).astype(np.float32)
    learn, check = skewed_inputs(rng, 900, 48), skewed_inputs(rng, 500, 48)
    active = check @ gate.T > 0.5
    densities = [
        judge(
            predictor(gate, learn, rank, RowType.F32, check, active, 0.95),
            check,
            active,
        ).predicted_density
        for rank in (1, 4, 16, 40)
    ]
    assert densities == sorted(densities, reverse=True)


def test_ranks_are_the_best_within_the_budget() -> None:
    """Greedy over hulls against all combinations: never over budget, and as good as the best that spends at
    most what the greedy one did."""
    rng = np.random.default_rng(7)
    for _ in range(40):
        layers = []
        for _ in range(3):
            sizes = np.cumsum(rng.integers(1, 9, 4))
            reads = np.sort(rng.integers(10, 100, 4))[::-1]
            layers.append([Candidate(int(s), float(s + r)) for s, r in zip(sizes, reads, strict=True)])
        smallest = sum(layer[0].price for layer in layers)
        budget = smallest + int(rng.integers(0, 30))
        chosen = choose(layers, budget)
        spent = sum(candidate.price for candidate in chosen)
        assert spent <= budget
        best = min(
            sum(c.touched for c in some)
            for some in itertools.product(*layers)
            if sum(c.price for c in some) <= smallest
        )
        assert sum(candidate.touched for candidate in chosen) <= best
    free = choose(layers, 10**9)
    assert [c.touched for c in free] == [min(c.touched for c in layer) for layer in layers]


def test_parts_are_seven_two_and_one_of_ten() -> None:
    parts = parted(20)
    assert (len(parts.learn), len(parts.check), len(parts.test)) == (14, 4, 2)
    assert sorted([*parts.learn, *parts.check, *parts.test]) == list(range(20))


def test_what_is_reported_is_what_was_made(traced: Traced) -> None:
    report = run_train(traced.options())
    made = Predictors.load(report.output)
    assert made.header == report.header
    with TraceFile(traced.trace) as trace:
        test = parted(len(trace.header.chunks)).test
        for index, layer in enumerate(made.layers):
            inputs, active = trace.read(index, test)
            assert isinstance(layer, LowRank)
            scores = inputs.astype(np.float64) @ layer.inward.T.astype(np.float64) @ layer.outward.T
            predicted = scores > layer.threshold
            quality = made.header.layers[index].quality
            assert quality.recall == pytest.approx((predicted & active).sum() / active.sum(), abs=1e-3)
            assert quality.predicted_density == pytest.approx(predicted.mean(), abs=1e-3)
    assert report.mean("recall") == pytest.approx(0.95, abs=0.03)
    # The frontier has a point at the same recall, and finds more only by naming more.
    for layer, points in zip(report.header.layers, report.frontier.layers, strict=True):
        assert points[RECALLS.index(0.95)] == layer.quality
        assert all(np.diff([point.recall for point in points]) >= 0)
        assert all(np.diff([point.predicted_density for point in points]) >= 0)
    shown = report.as_dict()["frontier"]["model"][RECALLS.index(0.95)]
    assert shown["recall"] == pytest.approx(report.mean("recall"))
    wanted = report.mean("predicted_density") / report.mean("density")
    assert shown["named_over_active"] == pytest.approx(wanted)


@pytest.mark.parametrize(("ending", "start"), [(".svg", b"<?xml"), (".png", b"\x89PNG")])
def test_the_frontier_is_drawn(traced: Traced, tmp_path: Path, ending: str, start: bytes) -> None:
    pytest.importorskip("matplotlib", reason="charts need matplotlib: pip install matplotlib")
    report = run_train(replace(traced.options(), output=tmp_path / "p.safetensors"))
    chart = tmp_path / f"frontier{ending}"
    draw_frontier(report.frontier, chart, "a model", 0.95)
    assert chart.read_bytes().startswith(start)
    with pytest.raises(PowerInferError, match=r"written as \.png or \.svg"):
        draw_frontier(report.frontier, tmp_path / "frontier.gif", "a model")


def test_a_source_that_is_rewritten_meanwhile_is_noticed(traced: Traced, tmp_path: Path) -> None:
    options = replace(traced.options(), output=tmp_path / "none")
    with pytest.raises(FileChanged, match="was changed while it was read"):
        run_train(options, Rewriting(options.model))
    assert list(tmp_path.iterdir()) == []


def test_same_input_same_bytes(traced: Traced, tmp_path: Path) -> None:
    first, second = (replace(traced.options(), output=tmp_path / name) for name in "ab")
    run_train(first)
    run_train(second)
    assert first.output.read_bytes() == second.output.read_bytes()


def test_the_budget_holds(traced: Traced) -> None:
    free = run_train(traced.options())
    small = run_train(replace(traced.options(), budget=0.02))
    smallest = run_train(replace(traced.options(), budget=1e-9))
    assert smallest.header.nbytes <= small.header.nbytes <= free.header.nbytes
    assert small.header.nbytes <= max(0.02 * small.model_bytes, smallest.header.nbytes)


def logits(path: Path, tokens: list[int], mode: str, **options: object) -> tuple[np.ndarray, float]:
    engine = Engine(load_model(path), mode=mode, **({"threads": 1} | options))  # type: ignore[arg-type]
    try:
        rows = [engine.prefill(tokens[:1]).copy()] + [engine.decode(token).copy() for token in tokens[1:]]
        return np.stack(rows), engine.report().density
    finally:
        engine.close()


def converted(traced: Traced, output: Path) -> Path:
    profile = Profile.load(traced.profile)
    plan = output.with_suffix(".plan.json")
    hot = [16] * traced.tiny.spec.layers
    plan_for(profile, hot, mode="gate-first", group=16, width=traced.tiny.spec.width).save(plan)
    predictors = traced.folder / "tiny.predictors.safetensors"
    report = convert(ConvertOptions(traced.tiny.path, traced.profile, plan, output, predictors=predictors))
    assert report.prediction is not None
    assert report.prediction.kinds == tuple(layer.kind for layer in Predictors.load(predictors).header.layers)
    return output


@pytest.mark.parametrize("method", ["svd", "sign"])
def test_the_split_file_predicts(traced: Traced, tmp_path: Path, method: str) -> None:
    """Neurons are sorted anew in the split file, and the predictors with them: the more is to be found, the
    nearer the result is to dense, and at nearly all it is that of dense but for what is rarely active."""
    tokens = traced.tiny.tokens(40)
    distances, densities = [], []
    for recall in (0.5, 0.9, 0.999):
        run_train(traced.options(recall=recall, method=method))
        path = converted(traced, tmp_path / f"{recall}.powerinfer.gguf")
        dense, _ = logits(path, tokens, "dense")
        exact, _ = logits(path, tokens, "gate-first")
        predicted, density = logits(path, tokens, "predicted")
        again, _ = logits(path, tokens, "predicted", threads=2)
        assert np.array_equal(dense, exact)
        assert np.array_equal(predicted, again)
        distances.append(float(np.abs(predicted - dense).mean() / np.abs(dense).mean()))
        densities.append(density)
    assert distances[0] > distances[1] > distances[2]
    assert distances[2] < 0.1 * distances[0]
    assert densities == sorted(densities)


def test_refusals(traced: Traced, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    other = Traced(folder, 2)
    with pytest.raises(OtherModel, match="profile again"):
        run_train(replace(traced.options(), trace=other.trace))
    run_train(other.options())
    profile = Profile.load(traced.profile)
    plan = tmp_path / "m.plan.json"
    plan_for(
        profile, [0] * traced.tiny.spec.layers, mode="dense", group=16, width=traced.tiny.spec.width
    ).save(plan)
    with pytest.raises(OtherModel, match="train again"):
        convert(
            ConvertOptions(
                traced.tiny.path,
                traced.profile,
                plan,
                tmp_path / "m.powerinfer.gguf",
                predictors=folder / "tiny.predictors.safetensors",
            )
        )
    few = replace(
        ProfileOptions(traced.tiny.path, (traced.folder / "text.txt",), tmp_path / "few.profile.safetensors"),
        trace=64,
        trace_output=tmp_path / "few.trace.zst",
        window=64,
    )
    run_profile(few)
    with pytest.raises(TrainError, match="larger --trace"):
        run_train(replace(traced.options(), trace=tmp_path / "few.trace.zst"))
    for changes in (
        {"method": "magic"},
        {"row_type": "Q6_K"},
        {"recall": 1.5},
        {"budget": 0.0},
        {"recall": None},
    ):
        with pytest.raises(TrainError):
            run_train(replace(traced.options(), **changes))  # type: ignore[arg-type]


def test_prices_pass_through_both_measurements_of_a_layer() -> None:
    """A layer that errs on the text though it does not in the records is never free, but for gate-first."""
    some = np.zeros(4, np.float32)
    layer = Sensitivity((0.0, 2.0), (0.01, 0.09))
    wanted = {0.0: 0.01, 0.5: 0.03, 2.0: 0.09, 4.0: 0.17}
    assert {e: layer.price(Setting(some, 1.0, e)) for e in wanted} == pytest.approx(wanted)
    assert layer.price(Setting(None, 1.0, 0.0)) == 0.0
    noisy = Sensitivity((0.5, 0.5), (0.02, 0.01))  # one setting, or noise: never less than the least measured
    assert [noisy.price(Setting(some, 1.0, e)) for e in (0.1, 0.5, 3.0)] == [0.02] * 3


def test_a_budget_of_quality_is_kept(traced: Traced, tmp_path: Path) -> None:
    """Within the budget on the windows that were chosen with; the wider the budget, the fewer bytes; what
    the file says of the cost is what the split file's perplexity says."""
    text = tmp_path / "other.txt"
    text.write_text("a lazy cat jumps over the brown dog on the mat, and the quick fox sat on the log. " * 40)
    kinds = []
    for increase in (0.0, 0.02, 0.5):
        report = run_train(traced.options(recall=None, max_increase=increase, text=text, windows=6))
        cost, layers = report.header.cost, report.header.layers
        assert cost is not None
        assert cost.max_increase == increase
        assert cost.divergence <= 3 * np.log1p(increase)
        kinds.append(sum(layer.kind != "none" for layer in layers))
        assert all(layer.quality.recall == 1.0 for layer in layers if layer.kind == "none")
    assert kinds[0] == 0 < kinds[2]
    assert kinds == sorted(kinds)
    split = converted(traced, tmp_path / "m.powerinfer.gguf")
    tokenizer = Tokenizer.from_gguf(load_model(split).source)
    bos = tokenizer.bos_id if tokenizer.adds_bos else None
    pieces = windows(tokenizer.encode(text.read_text()), 64, 6, bos)[2:]
    exact, predicted = (perplexity_of(split, pieces, mode) for mode in ("gate-first", "predicted"))
    assert cost.perplexity == pytest.approx(exact, rel=1e-5)
    # The split file's neurons are in another order, so that sums round differently; where that takes a score
    # across its threshold, one neuron of one token changes.
    assert cost.predicted_perplexity == pytest.approx(predicted, rel=1e-4)
    assert cost.tokens == 4 * 31


def perplexity_of(path: Path, pieces: list[list[int]], mode: str) -> float:
    engine = Engine(load_model(path), mode=mode, threads=1, context=64)
    try:
        return perplexity(engine, pieces).perplexity
    finally:
        engine.close()


@pytest.mark.parametrize("method", ["svd", "sign", "tuned"])
def test_every_method_reaches_its_recall_in_the_engine(traced: Traced, tmp_path: Path, method: str) -> None:
    """What the predictors file says is what the split file does: recall in the engine, on other tokens."""
    report = run_train(traced.options(method=method))
    kinds = {layer.kind for layer in report.header.layers}
    assert kinds == {"sign" if method == "sign" else "low-rank"}
    assert report.mean("recall") == pytest.approx(0.95, abs=0.03)
    path = converted(traced, tmp_path / "m.powerinfer.gguf")
    engine = Engine(load_model(path), mode="predicted", threads=2, check_recall=True)
    engine.prefill(traced.tiny.tokens(100))
    found = engine.report()
    engine.close()
    assert found.recall is not None
    assert found.recall > 0.7
    assert not (traced.folder / "tiny.predictors.safetensors.unfinished").exists()


def test_tuning_names_fewer_neurons_and_repeats_itself(traced: Traced, tmp_path: Path) -> None:
    model = load_model(traced.tiny.path)
    with TraceFile(traced.trace) as trace:
        data = LayerData(model, trace, 1)
        start = fit(cut(factorize(data.gate, data.learn.inputs), 16, RowType.F32), *learnt(data))
        asked = Tuning(steps=120, batch=128, validate_every=40)
        first, second = (tune(start, data, 0.95, RowType.F32, asked) for _ in range(2))
        named = [
            (
                made.normal(data.test.inputs)
                > level_for(made.normal(data.check.inputs), data.check.active, 0.95)
            ).mean()
            for made in (start, first)
        ]
    assert named[1] < named[0]
    assert isinstance(first.made, LowRank)
    assert isinstance(second.made, LowRank)
    assert np.array_equal(first.made.outward, second.made.outward)
    assert np.array_equal(first.mean, second.mean)


def learnt(data: LayerData) -> tuple[np.ndarray, np.ndarray]:
    return data.learn.inputs, data.gates(data.learn.inputs)


def test_interrupted_tuning_goes_on(traced: Traced, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that were finished are not tuned again; the result is that of work without a break."""
    whole, broken = (traced.options(method="tuned") for _ in range(2))
    whole = replace(whole, output=tmp_path / "whole")
    broken = replace(broken, output=tmp_path / "broken")
    run_train(whole)
    tuned: list[int] = []

    def counted(start: Fit, data: LayerData, *rest: object) -> Fit:
        if data.index == 2 and 2 not in tuned:
            tuned.append(2)
            raise KeyboardInterrupt
        tuned.append(data.index)
        return tune(start, data, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr("powerinfer_tools.stages.train.tuning.tune", counted)
    with pytest.raises(KeyboardInterrupt):
        run_train(broken)
    assert not broken.output.exists()
    run_train(broken)
    assert tuned == [0, 1, 2, *range(2, traced.tiny.spec.layers)]
    assert broken.output.read_bytes() == whole.output.read_bytes()
