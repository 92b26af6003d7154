"""threshold: candidates leave out what they say, the path is greedy, budgets hold, and split files do what
thresholds mean."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from powerinfer_formats.errors import FileChanged, OtherModel
from powerinfer_formats.profile import Profile
from powerinfer_formats.thresholds import Thresholds
from powerinfer_kernels import Bundle, reference
from powerinfer_tools.engine import Engine
from powerinfer_tools.engine.factor_thresholds import no_thresholds
from powerinfer_tools.errors import ModelError, ThresholdError
from powerinfer_tools.model.loading import load_model
from powerinfer_tools.quality.comparison import compare_modes
from powerinfer_tools.stages.convert.conversion import ConvertOptions, convert
from powerinfer_tools.stages.threshold import ThresholdOptions, ThresholdReport, run_threshold
from powerinfer_tools.stages.threshold.candidates import (
    DENSITIES,
    Sample,
    best_candidate,
    candidate,
    greedy_path,
)
from powerinfer_tools.stages.threshold.judge import Judge
from predicted_models import TEXT, profiled
from rewriting import Rewriting
from small_plans import plan_for
from tiny_models import FAMILY_CASES, TinyModel, make_tiny_model

LAYERS, HOT = 3, 16


@dataclass(frozen=True)
class Made:
    """A tiny model with SiLU, its thresholds and its split file."""

    tiny: TinyModel
    profile: Path
    report: ThresholdReport
    split: Path

    def options(self, **changes: object) -> ThresholdOptions:
        folder = self.tiny.path.parent
        options = ThresholdOptions(
            self.tiny.path, self.profile, TEXT, folder / "tiny.thresholds.safetensors", 0.05, 64, 4, 1
        )
        return replace(options, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=["llama", "llama-Q4_0", "gemma3"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("thresholds")
    tiny = make_tiny_model(folder, case(request.param))
    profile = profiled(folder, tiny)
    made = Made(tiny, profile, None, folder / "tiny.powerinfer.gguf")  # type: ignore[arg-type]
    report = run_threshold(made.options())
    converted(tiny, profile, made.split, thresholds=Path(report.output))
    return replace(made, report=report)


def case(name: str) -> object:
    from tiny_models import CASES

    return replace(CASES[name], neurons=192, layers=LAYERS)


def converted(tiny: TinyModel, profile: Path, output: Path, thresholds: Path | None) -> None:
    plan = output.with_suffix(".plan.json")
    plan_for(Profile.load(profile), [HOT] * LAYERS, group=16, width=tiny.spec.width).save(plan)
    convert(ConvertOptions(tiny.path, profile, plan, output, quant="F32", thresholds=thresholds))


def sample(rng: np.random.Generator, tokens: int = 40, neurons: int = 50) -> Sample:
    gate = (rng.standard_normal((tokens, neurons)) ** 3 * rng.uniform(0.1, 3, neurons)).astype(np.float32)
    up = (rng.standard_normal((tokens, neurons)) * rng.uniform(0.1, 3, neurons)).astype(np.float32)
    rms = {"gate": np.sqrt(np.square(up).mean(0)), "up": np.sqrt(np.square(gate).mean(0))}
    return Sample(gate, up, {name: values.astype(np.float64) for name, values in rms.items()})


@pytest.mark.parametrize("factor", ["gate", "up"])
def test_thresholds_leave_out_what_the_candidate_says(factor: str) -> None:
    one = sample(np.random.default_rng(1))
    made = candidate(factor, one)  # type: ignore[arg-type]
    energy = np.square(one.gate.astype(np.float64) * one.up)
    for step, density in enumerate(DENSITIES):
        left_out = np.abs(one.known(factor)) <= made.thresholds(step, one)  # type: ignore[arg-type]
        assert 1 - left_out.mean() == pytest.approx(density, abs=2e-3)
        assert made.lost[step] == pytest.approx(energy[left_out].sum() / energy.sum(), abs=2e-3)
    assert made.lost[0] == 0
    assert list(made.lost) == sorted(made.lost)


def test_the_better_factor_is_taken() -> None:
    """The one that varies more says more: with an up of ±1 everything is known from the gate."""
    rng = np.random.default_rng(2)
    one = sample(rng)
    signs = np.sign(rng.standard_normal(one.up.shape)).astype(np.float32)
    ones = np.ones(one.up.shape[1])
    varied = np.sqrt(np.square(one.gate).mean(0)).astype(np.float64)
    by_gate = best_candidate(Sample(one.gate, signs, {"gate": ones, "up": varied}))
    by_up = best_candidate(Sample(signs, one.gate, {"gate": varied, "up": ones}))
    assert set(by_gate.factors[1:]) == {"gate"}
    assert set(by_up.factors[1:]) == {"up"}


def test_the_factor_is_chosen_anew_at_each_density() -> None:
    """Half of the neurons have a gate of great variance and an up of little; the others, whose contributions
    are small, the other way round. So the gate ranks what is large, and up what is small."""
    rng = np.random.default_rng(6)
    wild = (rng.standard_normal((400, 100)) ** 3).astype(np.float32)
    tame = (rng.choice([-1, 1], (400, 100)) * rng.uniform(0.99, 1, (400, 100))).astype(np.float32)
    large, small = np.arange(100) < 50, np.float32(0.1)
    gate, up = np.where(large, wild, tame), np.where(large, tame, wild * small)
    rms = {"gate": np.sqrt(np.square(up).mean(0)), "up": np.sqrt(np.square(gate).mean(0))}
    one = Sample(gate, up, {name: values.astype(np.float64) for name, values in rms.items()})
    each = [candidate(factor, one) for factor in ("gate", "up")]  # type: ignore[arg-type]
    best = best_candidate(one)
    assert best.lost == tuple(map(min, *(made.lost for made in each)))
    assert set(best.factors[1:]) == {"gate", "up"}
    for step, factor in enumerate(best.factors):
        assert best.theta[step] == each[factor == "up"].theta[step]
        left_out = np.abs(one.known(factor)) <= best.thresholds(step, one)
        assert 1 - left_out.mean() == pytest.approx(DENSITIES[step], abs=2e-3)


def test_a_neuron_that_never_contributes_has_a_finite_threshold() -> None:
    one = sample(np.random.default_rng(3))
    one.other_rms["gate"][:5] = 0
    values = candidate("gate", one).thresholds(6, one)
    assert np.isfinite(values).all()
    assert (values[:5] >= np.abs(one.gate[:, :5]).max()).all()


def test_every_step_of_the_path_is_the_cheapest_per_neuron() -> None:
    rng = np.random.default_rng(4)
    lost = [np.concatenate([[0], np.sort(rng.uniform(0, 1, len(DENSITIES) - 1))]).tolist() for _ in range(5)]
    prices = rng.uniform(0.1, 2, 5).tolist()
    path = greedy_path(lost, prices)
    place, rates = [0] * 5, []
    for layer, step in path:
        assert step > place[layer]
        every = {
            (other, further): prices[other]
            * (lost[other][further] - lost[other][place[other]])
            / (DENSITIES[place[other]] - DENSITIES[further])
            for other in range(5)
            for further in range(place[other] + 1, len(DENSITIES))
        }
        assert every[layer, step] == min(every.values())
        rates.append(every[layer, step])
        place[layer] = step
    assert set(place) == {len(DENSITIES) - 1}
    assert rates == pytest.approx(sorted(rates)), "cheaper steps come first: the path is convex"


def test_the_budget_holds_where_thresholds_were_chosen(made: Made) -> None:
    """Choosing again with the thresholds of the file gives an increase within the budget, and one step more
    in any layer would have been taken if there were room for all; a larger budget leaves out no less."""
    header = made.report.header
    assert 0.2 < made.report.density < 1
    assert set(header.factors) <= {"none", "gate", "up"}
    assert header.cost.tokens == 4 * (64 - 1 - 32)
    small = run_threshold(made.options(max_increase=0.005, output=made.tiny.path.with_suffix(".small")))
    assert small.density > made.report.density
    model = load_model(made.tiny.path)
    live = no_thresholds(LAYERS, made.tiny.spec.neurons)
    engine = Engine(model, threads=1, context=64, thresholds=live)
    tokens = [made.tiny.tokens(64, seed) for seed in range(2)]
    judge = Judge(engine, tokens, 40)
    assert judge.increase() == 0
    kept = Thresholds.load(made.report.output)
    for layer, factor in enumerate(header.factors):
        if factor != "none":
            getattr(live[layer], factor)[:] = kept.layers[layer]
    assert judge.increase() > 0
    engine.close()
    model.close()


def test_a_source_that_is_rewritten_meanwhile_is_noticed(made: Made, tmp_path: Path) -> None:
    with pytest.raises(FileChanged, match="was changed while it was read"):
        run_threshold(made.options(output=tmp_path / "none"), Rewriting(made.tiny.path))
    assert list(tmp_path.iterdir()) == []


def test_same_input_same_bytes(made: Made, tmp_path: Path) -> None:
    again = run_threshold(made.options(output=tmp_path / "again", threads=2))
    assert (tmp_path / "again").read_bytes() == Path(made.report.output).read_bytes()
    assert again.header == made.report.header


def source_logits(made: Made, tokens: list[int], *, thresholds: bool) -> np.ndarray:
    """Logits of the source model, with the thresholds or dense."""
    model = load_model(made.tiny.path)
    live, kept = no_thresholds(LAYERS, made.tiny.spec.neurons), Thresholds.load(made.report.output)
    for layer, factor in enumerate(kept.header.factors):
        if thresholds and factor != "none":
            getattr(live[layer], factor)[:] = kept.layers[layer]
    engine = Engine(model, threads=1, context=64, thresholds=live)
    rows = np.concatenate([logits.copy() for logits in engine.score(tokens)])
    engine.close()
    model.close()
    return rows


def split_logits(path: Path, tokens: list[int], mode: str, **options: object) -> tuple[np.ndarray, float]:
    model = load_model(path)
    engine = Engine(model, mode=mode, context=64, **({"threads": 1} | options))  # type: ignore[arg-type]
    rows = [engine.prefill(tokens[:1]).copy()] + [engine.decode(token).copy() for token in tokens[1:]]
    density = engine.report().density
    engine.close()
    model.close()
    return np.stack(rows), density


def test_the_split_file_computes_what_the_source_does_with_the_thresholds(made: Made) -> None:
    """Neurons are sorted anew, decoded one by one, and their rows skipped; all that differs from the source
    with zeros put in is what differs without any thresholds: sums in another order, and in quantised models
    that the source's down projection reads rounded products, while its rows (here F32) do not."""
    tokens = made.tiny.tokens(48)
    want, plain = (source_logits(made, tokens, thresholds=which) for which in (True, False))
    got, density = split_logits(made.split, tokens, "thresholded")
    dense, whole = split_logits(made.split, tokens, "dense")
    scale = np.abs(dense).max()
    assert whole == 1
    assert 0 < density < 0.9
    differs = np.abs(got - dense).max()
    assert differs > 1e-3 * scale
    # A factor near its threshold may fall on either side where its last bits differ: hence medians.
    own, other = (np.median(np.abs(a - b).max(axis=1)) for a, b in ((got, want), (dense, plain)))
    assert own < 2 * other + 1e-3 * scale
    assert own < 0.2 * differs
    for changes in ({"threads": 2}, {"batch": 7}, {"isa": "scalar"}):
        assert np.array_equal(split_logits(made.split, tokens, "thresholded", **changes)[0], got)


def test_hot_neurons_are_computed_whole(made: Made) -> None:
    pytest.importorskip("torch", reason="the hot side runs through torch")
    tokens = made.tiny.tokens(20)
    got, density = split_logits(made.split, tokens, "thresholded", device="cpu")
    cold, alone = split_logits(made.split, tokens, "thresholded")
    assert density > alone
    assert np.abs(got - cold).max() < 0.5 * np.abs(cold).max()


def test_compare_has_its_row(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    model, bundles, pack = load_model(made.split), list[Bundle](), Bundle.pack

    def packing(*args: object, **rows: object) -> Bundle:
        bundles.append(pack(*args, **rows))  # type: ignore[arg-type]
        return bundles[-1]

    monkeypatch.setattr(Bundle, "pack", staticmethod(packing))
    open_engine = partial(Engine, model, threads=1, context=64)
    rows = compare_modes(open_engine, model, ("dense", "thresholded"), [made.tiny.tokens(60)]).rows
    model.close()
    assert len(bundles) == LAYERS
    assert rows[1].available
    assert rows[1].kl is not None
    assert rows[1].kl > 0
    assert rows[1].recall is None
    assert rows[1].density is not None
    assert rows[1].density < 1


def test_the_reference_says_the_same() -> None:
    rng = np.random.default_rng(5)
    gate, up, down = (rng.standard_normal((n, 6)) for n in (10, 10, 10))
    x, threshold = rng.standard_normal((3, 6)), np.abs(rng.standard_normal(10))
    act, product = reference.act(x @ gate.T, "silu"), reference.activate(x @ gate.T, x @ up.T, "silu")
    for factor, known, rest in (("gate", act, up), ("up", x @ up.T, gate)):
        want = np.where(np.abs(known) > threshold, product, 0) @ down
        got = reference.thresholded_ffn(known, factor, threshold, x, rest, down, "silu")
        np.testing.assert_allclose(got, want)


def test_refusals(made: Made, tmp_path: Path) -> None:
    with pytest.raises(ThresholdError, match="expected a share above 0"):
        run_threshold(made.options(max_increase=0.0))
    with pytest.raises(ThresholdError, match="needed: half to choose on"):
        run_threshold(made.options(windows=1000))
    with pytest.raises(ThresholdError, match="is a split file"):
        run_threshold(made.options(model=made.split))
    relu = make_tiny_model(tmp_path, FAMILY_CASES["llama-relu"])
    with pytest.raises(ThresholdError, match="gate-first"):
        run_threshold(made.options(model=relu.path))
    with pytest.raises(ThresholdError, match="was made for"):
        run_threshold(made.options(profile=profiled(tmp_path, relu)))
    with pytest.raises(OtherModel, match="powerinfer threshold"):
        converted(relu, tmp_path / "tiny.profile.safetensors", tmp_path / "x", Path(made.report.output))
    model = load_model(made.tiny.path)
    with pytest.raises(ModelError, match="powerinfer threshold"):
        Engine(model, threads=1, mode="thresholded")
    model.close()
    model = load_model(relu.path)
    with pytest.raises(ModelError, match="use --mode gate-first"):
        Engine(model, threads=1, mode="thresholded")
    model.close()
