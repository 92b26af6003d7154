"""Predictors on the hot device: they name the neurons of both sides, and no other is read."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fake_gpus import FailingGpu, FakeGpu, LatestGpu, on
from powerinfer_formats.predictors import Kind
from powerinfer_formats.profile import Profile
from powerinfer_kernels import Activations, Pool, ProgramBuilder, triton_launch
from powerinfer_tools.engine import Engine
from powerinfer_tools.engine.buffers import Buffers
from powerinfer_tools.engine.hot.devices import CpuDevice
from powerinfer_tools.engine.hot.elementwise import round_activations
from powerinfer_tools.engine.hot.hot_ffn import HotFFN, Inputs, Scratch, UnpackedRows
from powerinfer_tools.engine.hot.loading import Arena, Form
from powerinfer_tools.engine.hot.predictor_units import PredictorParts
from powerinfer_tools.engine.predictor_programs import lay_out
from powerinfer_tools.model.loading import load_model
from powerinfer_tools.model.reference import (
    attention_block,
    ffn_block,
    forward,
    matrix,
    normalize,
    predicted_neurons,
    predictor_scores,
)
from powerinfer_tools.stages.convert.conversion import ConvertOptions, convert
from predicted_models import hand_made, profiled
from small_plans import plan_for
from tiny_models import CASES, make_tiny_model

GROUP = 16
KINDS: dict[str, tuple[str, Kind, str]] = {
    "low-rank": ("llama-relu", "low-rank", "F32"),
    "rounded": ("bamboo-Q4_1", "low-rank", "Q8_0"),
    "residual": ("llama-relu", "residual-relu", "F32"),
    "parallel": ("falcon-relu", "residual-relu", "F32"),
    "signs": ("llama-relu", "sign", "F32"),
    "opt": ("opt", "low-rank", "F32"),
}


class Predicted:
    """A tiny model with hand-made predictors, and split files of it on demand."""

    def __init__(self, folder: Path, name: str) -> None:
        case, self.kind, row_type = KINDS[name]
        self.folder, self.tiny = folder, make_tiny_model(folder, CASES[case])
        self.profile = profiled(folder, self.tiny)
        self.predictors = folder / "tiny.predictors.safetensors"
        rank = 32 if row_type == "Q8_0" else 16
        hand_made(self.tiny, self.profile, self.kind, row_type, rank).save(self.predictors)
        self.layers, self.neurons = self.tiny.spec.layers, self.tiny.spec.neurons

    def split(self, hot: list[int], attention: list[int], there: list[int]) -> Path:
        """With these hot counts, and the attention and the predictors of these layers on the hot device."""
        name = "-".join(map(str, [*hot, "a", *attention, "p", *there]))
        plan, output = self.folder / f"{name}.plan.json", self.folder / f"{name}.powerinfer.gguf"
        plan_for(
            Profile.load(self.profile), hot, mode="predicted", group=GROUP, width=self.tiny.spec.width,
            attention=attention, predictors=there,
        ).save(plan)  # fmt: skip
        convert(ConvertOptions(self.tiny.path, self.profile, plan, output, predictors=self.predictors))
        return output


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Predicted:
    return Predicted(tmp_path_factory.mktemp("predicted"), request.param)


@pytest.fixture(scope="module")
def simple(tmp_path_factory: pytest.TempPathFactory) -> Predicted:
    return Predicted(tmp_path_factory.mktemp("simple"), "low-rank")


def logits(path: Path, tokens: list[int], **options: object) -> np.ndarray:
    """After a prompt of 6 in pieces of 4 and after each token that follows."""
    engine = Engine(load_model(path), **({"threads": 1, "batch": 4} | options))  # type: ignore[arg-type]
    try:
        rows = [engine.prefill(tokens[:6]).copy()]
        return np.stack(rows + [engine.decode(token).copy() for token in tokens[6:]])
    finally:
        engine.close()


def scores_of_kernels(split: object, x: np.ndarray, acts: Activations | None) -> np.ndarray:
    """What the CPU's predictor says of every neuron for the rows ``x``, read as input and as stream alike."""
    tokens, width = x.shape
    out = np.zeros((tokens, len(split.threshold)), np.float32)  # type: ignore[attr-defined]
    builder = ProgramBuilder(tokens)
    if acts is not None:
        builder.quantize(x, acts)
    none = dict.fromkeys(Buffers.__dataclass_fields__)
    buffers = Buffers(**(none | {"normed": x, "x": x, "normed_acts": acts, "residual_acts": acts}))  # type: ignore[arg-type]
    with Pool(1) as pool:
        predictor = lay_out(split, pool, 0, width, tokens)  # type: ignore[arg-type]
        predictor.prepare(builder, buffers)
        predictor.write(builder, out)
        builder.build().run(pool, 0, builder.mark(), tokens, 0)
    return out


def test_both_sides_name_the_same_neurons(model: Predicted) -> None:
    """But for scores that lie within the error of float32 sums of their threshold; those of signs are whole
    numbers times a step, which a rounded root may move, and with it a code that lies between two."""
    source = load_model(model.split([GROUP] * model.layers, [], []))
    assert source.split is not None
    layer, hyper = source.split.layer(0), source.hyper
    assert layer.predictor is not None
    x = np.random.default_rng(3).standard_normal((37, hyper.width)).astype(np.float32)
    expected = scores_of_kernels(
        layer.predictor, x, Activations(37, hyper.width) if hyper.width % 32 == 0 else None
    )
    arena = Arena()
    arena.fill(torch.empty(1 << 22, dtype=torch.uint8))
    parts = PredictorParts(
        [layer], hyper, 37, Form(arena, fused=False, unpack=False), CpuDevice(), torch.empty(1 << 17)
    )
    predictor, tensor = parts.predictor(layer, GROUP), torch.from_numpy(x)
    rounded = tensor
    if hyper.width % 32 == 0:
        rounded = torch.empty_like(tensor)
        round_activations(tensor, rounded)
    named = torch.zeros(37, layer.neurons, dtype=torch.uint8)
    predictor.name(Inputs(tensor, rounded), tensor, named)
    above = expected > layer.predictor.threshold
    reference = np.abs(predictor_scores(source.layers[0], x.astype(np.float64), x.astype(np.float64)))
    error = (1.0 if model.kind == "sign" else 1e-5) * (1 + reference.max())
    near = np.abs(expected - layer.predictor.threshold) <= error * (0.01 if model.kind == "sign" else 1)
    assert np.array_equal(named.numpy().astype(bool)[~near], above[~near])
    assert near.mean() < 0.05
    assert 0.1 < above.mean() < 0.9
    assert int(predictor.left_out) == 37 * GROUP - int(named[:, :GROUP].sum())


def test_the_engine_computes_what_is_named(model: Predicted) -> None:
    """Against float64, whose own scores name the neurons: hot and cold, with the stream on either side."""
    tokens, layers = model.tiny.tokens(14), model.layers
    every = list(range(layers))
    hot = [(2 * GROUP, model.neurons, GROUP)[index % 3] for index in every]
    quantised = model.tiny.spec.row_type != "F32"
    for attention in ([], every, [1]):
        path = model.split(hot, attention, every)
        expected = forward(load_model(path), tokens, half_cache=True, predicted=True)[5:]
        got = logits(path, tokens, device="cpu")
        relative = np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2))
        assert relative <= (0.02 * np.sqrt(7 * layers + 1) if quantised else 2.0**-10)


def test_any_placement_of_predictors_and_neurons(simple: Predicted) -> None:
    """A layer without hot neurons is predicted by the CPU, wherever the plan has its predictor."""
    tokens, every = simple.tiny.tokens(10), list(range(simple.layers))
    steps = simple.neurons // GROUP
    expected = forward(
        load_model(simple.split([GROUP] * 3, [], [])), tokens, half_cache=True, predicted=True
    )[5:]

    @settings(max_examples=8, derandomize=True, deadline=None)
    @given(st.lists(st.integers(0, steps), min_size=3, max_size=3), st.sets(st.sampled_from(every)))
    def check(groups: list[int], attention: set[int]) -> None:
        path = simple.split([GROUP * count for count in groups], sorted(attention), every)
        got = logits(path, tokens, device="cpu")
        assert np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2)) <= 2.0**-10
        assert (got.argmax(axis=1) == expected.argmax(axis=1)).all()

    check()


@pytest.mark.parametrize("attention", [[], [0, 1, 2]])
def test_rows_that_are_not_named_are_not_read(
    simple: Predicted, attention: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN in all hot rows of neurons that a token does not name; and the report counts those neurons."""
    path, tokens = simple.split([4 * GROUP] * 3, attention, [0, 1, 2]), simple.tiny.tokens(4)
    compute, left_out = HotFFN.compute, [0]

    def poisoned(
        ffn: HotFFN,
        inputs: Inputs,
        scratch: Scratch,
        out: torch.Tensor,
        named: torch.Tensor,
        joins: object = None,
    ) -> None:
        assert joins is None, "only fused kernels add at once"
        dead = named[0] == 0
        left_out[0] += int(dead.sum())
        kept = [
            UnpackedRows(r.row_type, r.chunk(0, 4 * GROUP, out).clone())
            for r in (ffn.gate, ffn.up, ffn.down)
            if r
        ]
        for rows in kept:
            rows.data[dead] = torch.nan
        compute(replace(ffn, gate=kept[0], up=kept[1], down=kept[2]), inputs, scratch, out, named)

    def run() -> tuple[np.ndarray, float]:
        engine = Engine(load_model(path), threads=1, device="cpu")
        rows = [engine.decode(token).copy() for token in tokens]
        density = engine.report().density
        engine.close()
        return np.stack(rows), density

    expected, density = run()
    monkeypatch.setattr(HotFFN, "compute", poisoned)
    got, again = run()
    assert np.array_equal(got, expected)
    assert again == density
    assert left_out[0] > 0
    assert density == pytest.approx(named_share(path, tokens), abs=0.01)


def named_share(path: Path, tokens: list[int]) -> float:
    """The share of neurons that predictors name, by float64."""
    model = load_model(path)
    x = matrix(model.embedding)[tokens] * model.hyper.embedding_scale
    shares = []
    for index, layer in enumerate(model.layers):
        x = x + attention_block(model, layer.attention, index, x, half_cache=True)
        normed = normalize(x, layer.ffn_norm, model.hyper.norm_eps)
        shares.append(predicted_neurons(layer, x, normed).mean())
        x = x + ffn_block(model, layer, x, predicted=True)
    return float(np.mean(shares))


@pytest.mark.parametrize("attention", [[], [0, 1, 2]])
def test_recall_is_counted_of_hot_and_cold_neurons(simple: Predicted, attention: list[int]) -> None:
    """As where all are cold; and the logits are what they are without counting."""
    hot = [2 * GROUP, simple.neurons, 0]
    path, tokens = simple.split(hot, attention, [0, 1, 2]), simple.tiny.tokens(9)
    found = []
    for device, check in (("none", True), ("cpu", True), ("cpu", False)):
        engine = Engine(load_model(path), threads=1, device=device, batch=4, check_recall=check)
        rows = [engine.prefill(tokens[:6]).copy(), *(engine.decode(token).copy() for token in tokens[6:])]
        stack = engine.stack
        if device == "cpu":
            engine.close()
        found.append((stack.recall(), stack.predicted_density(), stack.recall_by_layer(), np.stack(rows)))
        if device == "none":
            engine.close()
    (recall, named, layers, _), (again, named_again, layers_again, counted), (_, _, none, plain) = found
    assert recall is not None
    assert 0 < recall < 1
    assert again == pytest.approx(recall, abs=0.005)
    assert named_again == pytest.approx(named, abs=0.005)
    assert layers_again == pytest.approx(layers, abs=0.01)
    assert none is None
    assert np.array_equal(counted, plain)


def test_a_lost_device_predicts_again_elsewhere(simple: Predicted, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the names or the sums were waited for; and names are read when they are there, not before."""
    path, tokens = simple.split([GROUP] * 3, [], [0, 1, 2]), simple.tiny.tokens(9)
    expected = logits(path, tokens, device="cpu")
    for last in (10, 11):
        on(monkeypatch, FailingGpu(last, when="wait"))
        assert np.array_equal(logits(path, tokens, device="cuda"), expected)
    for placed in (path, simple.split([GROUP] * 3, [0, 2], [0, 1, 2])):
        expected = logits(placed, tokens, device="cpu")
        on(monkeypatch, LatestGpu())
        assert np.array_equal(logits(placed, tokens, device="cuda"), expected)


def test_modes_without_predictors_load_none(simple: Predicted) -> None:
    path = simple.split([GROUP] * 3, [1], [0, 1, 2])
    for mode in ("dense", "predicted"):
        engine = Engine(load_model(path), threads=1, device="cpu", mode=mode, batch=4)
        hot = engine.stack._hot
        assert [hot.has_predictor(layer) for layer in range(3)] == [mode == "predicted"] * 3  # type: ignore[union-attr]
        engine.close()


def test_fused_kernels_skip_what_is_not_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In Triton's interpreter, the predictor among them; against float64, which names neurons by itself."""
    model = Predicted(tmp_path, "rounded")
    path, tokens = model.split([2 * GROUP, GROUP, 0], [0], [0, 1]), model.tiny.tokens(4)
    expected = forward(load_model(path), tokens, half_cache=True, predicted=True)[1:]
    on(monkeypatch, FakeGpu(1 << 30), fused=True)
    active: list[bool] = []
    hidden = triton_launch.hidden

    def seen(*args: object, **options: object) -> None:
        active.append(options["active"] is not None)
        hidden(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(triton_launch, "hidden", seen)
    engine = Engine(load_model(path), threads=1, device="cuda", batch=2, context=8)
    got = [engine.prefill(tokens[:2]).copy(), *(engine.decode(token).copy() for token in tokens[2:])]
    engine.close()
    assert active
    assert all(active)
    relative = np.sqrt(np.mean((np.stack(got) - expected) ** 2) / np.mean(expected**2))
    assert relative <= 0.02 * np.sqrt(7 * model.layers + 1)
