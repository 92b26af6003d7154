"""relufy: the differentiable pass is the engine's model, the losses are what they say, the file is exact."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from powerinfer_formats.delta import Delta, Passing, Scaled
from powerinfer_formats.errors import OtherModel
from powerinfer_kernels import RowType, dequantize
from powerinfer_tools.engine import Engine
from powerinfer_tools.errors import ConvertError, CorpusError, HardwareError, ModelError
from powerinfer_tools.model.loading import load_model
from powerinfer_tools.model.reference import forward
from powerinfer_tools.stages.relufy import (
    Reading,
    RelufyOptions,
    RelufyReport,
    apply_delta,
    draw_history,
    run_relufy,
)
from powerinfer_tools.stages.relufy.cuts import neuron_scales
from powerinfer_tools.stages.relufy.error_passing import PASSING_TYPES, passing_of, round_rows
from powerinfer_tools.stages.relufy.export import ffn_types
from powerinfer_tools.stages.relufy.fitting import RIDGE, fit_down_projections
from powerinfer_tools.stages.relufy.network import Network
from powerinfer_tools.stages.relufy.options import NEURON_CUT
from powerinfer_tools.stages.relufy.relufication import checkpoint_path
from powerinfer_tools.stages.relufy.rounding import round_factors, round_matrix
from powerinfer_tools.stages.relufy.student import PressureControl, Student, TrainedMatrix, divergence
from powerinfer_tools.stages.relufy.text import HOLD_OUT_EVERY, text_windows, training_order
from tiny_models import FAMILY_CASES, TYPE_CASES, TinyModel, TinySpec, make_tiny_model

TEXT = "the cat sat on the mat and the dog sat on the log; a quick brown fox jumps over the lazy dog. " * 40
# Models with experts are refused (test_routed).
CASES = {name: case for name, case in FAMILY_CASES.items() if not case.experts} | {
    "llama-Q4_1": TYPE_CASES["llama-Q4_1"]
}


class Notes:
    """Progress that keeps its notes, and interrupts the work at the ``stop``-th one that holds a word."""

    def __init__(self, word: str = "", stop: int = 0) -> None:
        self.notes: list[str] = []
        self.word, self.stop = word, stop

    def start(self, description: str, total: int | None, unit: str) -> None:
        pass

    def advance(self, n: int) -> None:
        pass

    def note(self, text: str) -> None:
        self.notes.append(text)
        if self.stop and sum(self.word in note for note in self.notes) == self.stop:
            self.stop = 0
            import signal

            signal.raise_signal(signal.SIGINT)

    def finish(self) -> None:
        pass


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_tiny_model(tmp_path_factory.mktemp("relufied"), TinySpec(vocabulary="smollm"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


def options(model: Path, corpus: Path, output: Path, **changes: object) -> RelufyOptions:
    small = RelufyOptions(
        model=model,
        corpus=(corpus,),
        output=output,
        rank=4,
        steps=8,
        fit_windows=4,
        batch=2,
        window=24,
        validate_every=4,
        quant="F32",
        density=0.3,
    )
    return replace(small, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", sorted(CASES))
def test_the_pass_is_that_of_the_reference(case: str, tmp_path: Path) -> None:
    """float32 against float64: a few hundred roundings of the largest logit, as for transformers itself."""
    tiny = make_tiny_model(tmp_path, CASES[case])
    model, tokens = load_model(tiny.path), tiny.tokens(40)
    network = Network(model, "cpu", 64, torch.float32)
    with torch.no_grad():
        hidden = network.hidden(torch.tensor([tokens]), network.dense_ffn)[0]
        logits = functional.linear(hidden, network.head).numpy()
    expected = forward(model, tokens)
    assert np.abs(logits - expected).max() <= 300 * np.finfo(np.float32).eps * np.abs(expected).max()


def test_windows_of_a_batch_do_not_see_each_other(tiny: TinyModel) -> None:
    network = Network(load_model(tiny.path), "cpu", 32, torch.float32)
    both = torch.tensor([tiny.tokens(20), tiny.tokens(21)[1:]])
    with torch.no_grad():
        together = network.hidden(both, network.dense_ffn)
        alone = network.hidden(both[1:], network.dense_ffn)
    assert torch.allclose(together[1], alone[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_the_divergence_and_its_gradient(rows: int) -> None:
    generator = torch.Generator().manual_seed(3)
    student, teacher, head = (torch.randn(n, 12, generator=generator) for n in (23, 23, 57))
    first, second = student.clone().requires_grad_(), student.clone().requires_grad_()
    mean = divergence(first, teacher, head, rows)
    expected = functional.kl_div(
        functional.log_softmax(second @ head.T, -1),
        functional.log_softmax(teacher @ head.T, -1),
        reduction="batchmean",
        log_target=True,
    )
    (3 * mean).backward()
    (3 * expected).backward()
    assert first.grad is not None
    assert second.grad is not None
    assert mean.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(first.grad, second.grad, rtol=1e-4, atol=1e-6)
    assert float(divergence(teacher, teacher, head, rows)) == pytest.approx(0.0, abs=1e-6)


def test_a_low_rank_change_begins_at_nothing_and_merges() -> None:
    generator = torch.Generator().manual_seed(1)
    base, x = torch.randn(9, 7, generator=generator), torch.randn(5, 7, generator=generator)
    matrix = TrainedMatrix(base, 3, generator)
    assert torch.equal(matrix(x), functional.linear(x, base))
    torch.nn.init.normal_(matrix.outward, generator=generator)
    merged = torch.from_numpy(matrix.merged(base.double().numpy()))
    assert torch.allclose(matrix(x), x @ merged.T, atol=1e-5)
    assert not torch.allclose(matrix(x), x @ base.T, atol=1e-2)


def test_pressure_cannot_be_met_by_scaling(tiny: TinyModel) -> None:
    network = Network(load_model(tiny.path), "cpu", 32, torch.float32)
    student, x = Student(network, "relu", 0, 0), torch.randn(6, network.hyper.width)
    student(0, x)
    before = student.pressure.item()
    with torch.no_grad():
        student.ffns[0].gate.values.mul_(0.125)
    student.begin()
    student(0, x)
    assert student.pressure.item() == pytest.approx(before, rel=1e-4)


def test_the_weight_of_the_pressure_follows_the_density() -> None:
    control = PressureControl(target=0.2, ramp=10)
    control.observe(0, 0.6)
    assert [control.wanted(step) for step in (0, 5, 10, 90)] == pytest.approx([0.6, 0.4, 0.2, 0.2])
    first = control.weight
    control.observe(10, 0.5)
    assert control.weight > first
    grown = control.weight
    control.observe(10, 0.1)
    assert control.weight < grown
    for _ in range(100):
        control.observe(10, 1.0)
    assert math.isfinite(control.weight)


def test_held_out_windows_are_not_trained_on(tiny: TinyModel, corpus: Path) -> None:
    train, held = text_windows(load_model(tiny.path), (corpus,), 24, Notes())
    assert len(held) == (len(train) + len(held)) // HOLD_OUT_EVERY
    order = training_order(len(train), 3 * len(train) - 1, seed=5)
    assert sorted(order[: len(train)]) == list(range(len(train)))
    assert len(order) == 3 * len(train) - 1
    assert not np.array_equal(order[: len(train)], order[len(train) : 2 * len(train)])


@pytest.mark.parametrize(
    ("activation", "rank", "cut", "written"),
    [
        ("relu", 0, None, 0.0),
        ("drelu", 4, None, 0.0),
        ("fatrelu", 4, 0.01, 0.01),
        ("fatrelu", 0, None, NEURON_CUT),
        ("fatrelu", 4, None, NEURON_CUT),
    ],
)
def test_the_written_model_is_the_trained_one(
    tiny: TinyModel,
    corpus: Path,
    tmp_path: Path,
    activation: str,
    rank: int,
    cut: float | None,
    written: float,
) -> None:
    """What training measured on the held-out windows, the engine measures on the file, to float32 rounding;
    everything but the FFN has its bits."""
    output = tmp_path / "out.gguf"
    report = run_relufy(options(tiny.path, corpus, output, activation=activation, rank=rank, cut=cut))
    assert report.history[-1].kl < report.history[0].kl
    source, model = load_model(tiny.path), load_model(output)
    assert model.exact_zeros
    assert model.hyper.activation == activation
    assert model.hyper.activation_cut == pytest.approx(written)
    assert model.fingerprint != source.fingerprint
    for name in source.source.tensors:
        same = bytes(source.source.tensor(name)) == bytes(model.source.tensor(name))
        assert same == (".ffn_" not in name or "norm" in name), name
    _, held = text_windows(source, (corpus,), 24, Notes())
    engine = Engine(model, threads=1)
    losses = []
    for window in held[:8]:
        logits = np.concatenate([rows.copy() for rows in engine.score(window.tolist())])[12:-1]
        losses.append(functional.cross_entropy(torch.from_numpy(logits), torch.from_numpy(window[13:])))
    engine.close()
    assert math.exp(float(torch.stack(losses).mean())) == pytest.approx(report.perplexity, rel=2e-3)


def test_the_fit_is_the_least_squares_of_what_is_missing(tiny: TinyModel) -> None:
    """With no more tokens than neurons nothing is left over but what the penalty costs; in every layer no
    other change of a row gives a smaller penalised error (its gradient is zero)."""
    network = Network(load_model(tiny.path), "cpu", 32, torch.float32)
    student = Student(network, "relu", 4, 0)
    tokens = torch.tensor([tiny.tokens(24), tiny.tokens(25)[1:]])
    with torch.no_grad():
        dense = network.hidden(tokens, network.dense_ffn)
        before = (network.hidden(tokens, student) - dense).square().mean().item()
        fit_down_projections(network, student, tokens, 0, lambda layers: None)
        after = (network.hidden(tokens, student) - dense).square().mean().item()
        assert after < before / 2
        x = network.attend(0, network.embed(tokens))
        hidden = student.ffn(0).hidden(network.ffn_input(0, x)).flatten(0, 1).double()
        wanted = network.dense_ffn(0, network.ffn_input(0, x)).flatten(0, 1).double()
        fitted, base = student.ffns[0].down.values.double(), network.ffn_base[0][2].double()
        penalty = RIDGE * (hidden.T @ hidden).diagonal().mean()
        gradient = (hidden @ fitted.T - wanted).T @ hidden + penalty * (fitted - base)
        scale = ((hidden @ base.T - wanted).T @ hidden).abs().max()
    assert gradient.abs().max() < 1e-3 * scale


@pytest.mark.parametrize("density", [None, 0.2])
def test_a_fit_that_was_stopped_goes_on_alike(tiny: TinyModel, density: float | None) -> None:
    network = Network(load_model(tiny.path), "cpu", 32, torch.float32)
    tokens = torch.tensor([tiny.tokens(24)])
    whole, broken = (Student(network, "fatrelu", 4, 0, NEURON_CUT) for _ in range(2))
    fit_down_projections(network, whole, tokens, 0, lambda layers: None, density)

    def stop(layers: int) -> None:
        if layers == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_down_projections(network, broken, tokens, 0, stop, density)
    fit_down_projections(network, broken, tokens, 2, lambda layers: None, density)
    for name, values in whole.ffns.state_dict().items():
        assert torch.equal(values, broken.ffns.state_dict()[name]), name


@pytest.mark.parametrize("rank", [0, 4])
def test_rescaled_neurons_compute_the_same_above_another_threshold(tiny: TinyModel, rank: int) -> None:
    """Scales move thresholds, and nothing else: with a cut of 0 outputs are those from before; a saved state
    makes the rescaled matrices again."""
    network = Network(load_model(tiny.path), "cpu", 32, torch.float32)
    x = torch.randn(50, network.hyper.width, generator=torch.Generator().manual_seed(2))
    scales = torch.exp(torch.randn(network.hyper.neurons, generator=torch.Generator().manual_seed(3)))
    for cut in (0.0, 0.3):
        student, again = (Student(network, "fatrelu", rank, seed, cut) for seed in (0, 1))
        ffn = student.ffn(1)
        with torch.no_grad():
            for parameter in ffn.gate.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)))
            gate, up = ffn.gate(x), ffn.up(x)
            ffn.rescale(scales)
            expected = torch.where(gate > cut / scales, gate * up, torch.zeros(()))
            clear = (gate - cut / scales).abs() > 1e-4
            assert torch.allclose(ffn.hidden(x)[clear], expected[clear], rtol=1e-4, atol=1e-5)
            again.ffns.load_state_dict(student.ffns.state_dict())
            again.ffn(1).restore_scale(network.gated_base[1])
            assert torch.equal(again.ffn(1).hidden(x), ffn.hidden(x))


@pytest.mark.parametrize("density", [0.05, 0.25])
def test_thresholds_leave_the_density_asked_for_and_drop_what_contributes_least(
    tiny: TinyModel, density: float
) -> None:
    """The error of the output is below that of one cut for all neurons at the same density."""
    network = Network(load_model(tiny.path), "cpu", 32, torch.float32)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(400, network.hyper.width, generator=generator)
    own, same = Student(network, "fatrelu", 0, 0, NEURON_CUT).ffn(0), Student(network, "relu", 0, 0).ffn(0)
    with torch.no_grad():
        uneven = torch.exp(torch.randn(network.hyper.neurons, generator=generator))
        for ffn in (own, same):
            ffn.up.values.mul_(uneven[:, None])
        dense = same.down(same.hidden(x))
        gate = same.gate(x)
        same.activation, same.cut = "fatrelu", gate.flatten().quantile(1 - density).item()
        own.rescale(neuron_scales(own, x, density))
        active = (own.hidden(x) != 0).float().mean().item()
        errors = [(ffn.down(ffn.hidden(x)) - dense).square().mean().item() for ffn in (own, same)]
    assert active == pytest.approx(density, rel=0.02)
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize(
    ("rank", "cut", "quant"),
    [(0, 0.01, "Q8_0"), (4, 0.01, "Q4_1"), (0, None, "Q5_0"), (4, None, "Q8_0"), (4, None, "F16")],
)
def test_a_delta_makes_the_same_file(
    tiny: TinyModel, corpus: Path, tmp_path: Path, rank: int, cut: float | None, quant: str
) -> None:
    """And what it was rounded to is what was judged."""
    output, delta, again = tmp_path / "out.gguf", tmp_path / "d.zst", tmp_path / "again.gguf"
    asked = options(tiny.path, corpus, output, rank=rank, save_delta=delta, steps=2, validate_every=2)
    report = run_relufy(replace(asked, quant=quant, activation="fatrelu", cut=cut))
    assert report.delta == str(delta)
    found = apply_delta(tiny.path, delta, again)
    assert found.own_thresholds == (cut is None)
    assert again.read_bytes() == output.read_bytes()
    assert found.header.quality[0].perplexity == report.perplexity == report.history[-1].perplexity
    assert report.perplexity == pytest.approx(report.history[-2].perplexity, rel=0.2)
    with pytest.raises(OtherModel, match="was made for"):
        apply_delta(again, delta, tmp_path / "no.gguf")
    made = Delta.load(delta)
    assert (made.header.row_type, made.header.down_type) == (quant, "F16" if quant == "F16" else "Q8_0")
    replace(made, header=replace(made.header, result_sha256="0" * 64)).save(delta)
    with pytest.raises(ConvertError, match="made other bits"):
        apply_delta(tiny.path, delta, tmp_path / "no.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.gguf", "d.zst", "out.gguf"]


def test_rounding_errs_as_much_as_was_allowed() -> None:
    """A whole change: the error's share of the output is the noise asked for, up to the factor of two that
    rounding steps to powers of two can make (a step within √2, squared)."""
    rng = np.random.default_rng(4)
    change = rng.normal(size=(70, 90)).astype(np.float32) * 0.01
    sizes = np.exp(rng.normal(size=90)).astype(np.float32)
    rounded = round_matrix(change, sizes, noise=0.05)
    error = ((rounded.values() - change) ** 2 * sizes**2).sum()
    assert 0.02 < error / (change**2 * sizes**2).sum() < 0.11
    outward, inward = (rng.normal(size=shape).astype(np.float32) for shape in ((70, 5), (5, 90)))
    inward[2] *= 1e-6
    outward[:, 3] = 0
    product = round_factors(outward, inward)
    difference = product.values() - outward @ inward
    # Two factors, each with steps of up to √2/8 of the values' root mean square.
    assert (difference**2).mean() < 2 * 1.2 * (2 / 64 / 12) * ((outward @ inward) ** 2).mean()


def correlated(rng: np.random.Generator, count: int, columns: int) -> np.ndarray:
    """Inputs (count, columns) of which few directions make most."""
    mixed = rng.normal(size=(count, columns // 4)) @ rng.normal(size=(columns // 4, columns))
    return mixed + 0.5 * rng.normal(size=(count, columns))


@pytest.mark.parametrize("row_type", PASSING_TYPES, ids=lambda row_type: row_type.name)
def test_rounding_that_knows_its_inputs(row_type: RowType) -> None:
    """Of inputs that it has not seen, outputs are nearer than with each value's nearest code; rows are
    rounded alike in whatever company, so sums have no order; constant rows and zeros are as they were."""
    rng = np.random.default_rng(6)
    values = rng.normal(size=(40, 96)).astype(np.float32)
    inputs = correlated(rng, 900, 96)
    seen, other = inputs[:600], inputs[600:]
    passing = passing_of(seen.T @ seen / len(seen))
    alone = Passing(Scaled(np.zeros_like(passing.shares.codes), passing.shares.exponents), passing.sizes)
    errors = []
    for how in (passing, alone):
        rows = round_rows(values, row_type, how)
        lost = dequantize(rows, row_type, *values.shape) - values
        errors.append((other @ lost.T).std())
    assert errors[0] < 0.75 * errors[1]
    steps = 31 if row_type.name.startswith("Q5") else 15
    nearest = np.abs(lost.reshape(40, 3, 32))
    reach = np.ptp(values.reshape(40, 3, 32), axis=-1, keepdims=True)
    if row_type.name.endswith("1"):  # symmetric types have a block's largest value on one side alone
        assert (nearest.mean(axis=-1) < reach[..., 0] / steps / 2).all()
    one = round_rows(values[7:8], row_type, passing)
    np.testing.assert_array_equal(one, round_rows(values, row_type, passing)[7:8])
    flat = np.zeros((2, 64), np.float32)
    flat[1] = 0.5 if row_type.name.endswith("1") else 0.0
    none = Passing(Scaled(np.zeros((64, 64), np.int8), np.zeros(64, np.int8)), np.zeros(64, np.int8))
    np.testing.assert_array_equal(dequantize(round_rows(flat, row_type, none), row_type, 2, 64), flat)


def test_work_goes_on_from_a_delta(tiny: TinyModel, corpus: Path, tmp_path: Path) -> None:
    """With no steps it is rounded anew, to other types; what was learned stays."""
    delta, again = tmp_path / "d.zst", tmp_path / "again.zst"
    asked = options(tiny.path, corpus, tmp_path / "a.gguf", activation="fatrelu", quant="Q8_0")
    first = run_relufy(replace(asked, save_delta=delta))
    asked = replace(asked, output=tmp_path / "b.gguf", activation="relu", rank=9, steps=0, quant="Q4_1")
    second = run_relufy(replace(asked, start=delta, save_delta=again))
    header = Delta.load(again).header
    assert (header.activation, header.rank, header.row_type) == ("fatrelu", 4, "Q4_1")
    assert header.learned_tokens == first.tokens
    assert second.history[0].perplexity == pytest.approx(first.perplexity, rel=0.02)
    assert second.perplexity == pytest.approx(first.perplexity, rel=0.2)
    model = load_model(tmp_path / "b.gguf")
    gate, down = model.layers[1].ffn.gate, model.layers[1].ffn.down  # type: ignore[union-attr]
    assert (gate.row_type, down.row_type) == (RowType.Q4_1, RowType.Q8_0)
    with pytest.raises(OtherModel, match="was made for"):
        run_relufy(replace(asked, model=tmp_path / "b.gguf", start=delta))


@pytest.mark.parametrize(("source", "expected"), [("Q4_1", "Q4_1"), ("Q4_K", "Q4_1"), ("F16", "Q8_0")])
def test_the_ffn_has_the_bits_of_the_source(source: str, expected: str, tmp_path: Path) -> None:
    model = load_model(make_tiny_model(tmp_path, TYPE_CASES[f"llama-{source}"]).path)
    types = ffn_types(None, model)
    assert (types.gate.name, types.down) == (expected, RowType.Q8_0)


def test_the_ffn_is_written_as_asked(tiny: TinyModel, corpus: Path, tmp_path: Path) -> None:
    exact, rounded = tmp_path / "f32.gguf", tmp_path / "q8.gguf"
    run_relufy(options(tiny.path, corpus, exact, steps=1))
    run_relufy(options(tiny.path, corpus, rounded, steps=1, quant="Q8_0"))
    model = load_model(rounded)
    gate = model.layers[1].ffn.gate  # type: ignore[union-attr]
    assert gate.row_type == RowType.Q8_0
    values = dequantize(gate.data, gate.row_type, gate.rows, gate.columns)
    wanted = np.frombuffer(load_model(exact).source.tensor(gate.name), np.float32).reshape(values.shape)
    # A Q8_0 block rounds to half of its step, its largest value over 127, held in half precision.
    assert np.abs(values - wanted).max() <= np.abs(wanted).max() * (0.5 / 127 + 2.0**-11)


@pytest.mark.parametrize(("word", "stop"), [("after", 1), ("after", 2)])
def test_interrupted_work_goes_on_to_the_same_model(
    tiny: TinyModel, corpus: Path, tmp_path: Path, word: str, stop: int
) -> None:
    whole, broken = tmp_path / "whole.gguf", tmp_path / "broken.gguf"
    run_relufy(options(tiny.path, corpus, whole, threads=1))
    with pytest.raises(KeyboardInterrupt):
        run_relufy(options(tiny.path, corpus, broken, threads=1), Notes(word, stop))
    assert not broken.exists()
    assert checkpoint_path(broken).exists()
    notes = Notes()
    run_relufy(options(tiny.path, corpus, broken, threads=1), notes)
    assert any("continuing after 3 layers" in note for note in notes.notes)
    assert not checkpoint_path(broken).exists()
    assert broken.read_bytes() == whole.read_bytes()


def test_a_checkpoint_of_other_or_damaged_work_is_not_used(
    tiny: TinyModel, corpus: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.gguf"
    with pytest.raises(KeyboardInterrupt):
        run_relufy(options(tiny.path, corpus, output), Notes("after", 1))
    notes = Notes()
    run_relufy(options(tiny.path, corpus, output, steps=4), notes)
    assert any("belongs to other work" in note for note in notes.notes)
    checkpoint_path(output).write_bytes(b"\x08" + bytes(30))
    notes = Notes()
    run_relufy(options(tiny.path, corpus, output, steps=4), notes)
    assert any("starting again" in note for note in notes.notes)


def test_patience_ends_work_that_gains_nothing(tiny: TinyModel, corpus: Path, tmp_path: Path) -> None:
    asked = options(tiny.path, corpus, tmp_path / "out.gguf", steps=40, learning_rate=1e-12, fit_windows=0)
    report: RelufyReport = run_relufy(replace(asked, patience=2, validate_every=2, density=1.0))
    assert report.tokens < 40 * 2 * 24


@pytest.mark.parametrize(("ending", "start"), [(".svg", b"<?xml"), (".png", b"\x89PNG")])
def test_the_course_is_drawn(tmp_path: Path, ending: str, start: bytes) -> None:
    pytest.importorskip("matplotlib", reason="charts need matplotlib: pip install matplotlib")
    course = (Reading(0, 40.0, 0.2, 0.7), Reading(768, 30.0, 0.18, 0.5))
    report = RelufyReport("out.gguf", None, "fatrelu", 20.0, 30.0, 0.18, 0.5, 768, 1.0, course)
    chart = tmp_path / f"course{ending}"
    draw_history(report, chart, "a model")
    assert chart.read_bytes().startswith(start)


def test_refusals(tiny: TinyModel, corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.gguf"
    short = tmp_path / "short.txt"
    short.write_text("the cat sat")
    with pytest.raises(CorpusError, match="fewer than 20 windows"):
        run_relufy(options(tiny.path, short, output))
    with pytest.raises(ConvertError, match="can be written as"):
        run_relufy(options(tiny.path, corpus, output, quant="Q6_K"))
    with pytest.raises(ModelError, match="is more than the context"):
        run_relufy(options(tiny.path, corpus, output, window=512))
    if not torch.cuda.is_available():
        with pytest.raises(HardwareError, match="no CUDA device"):
            run_relufy(options(tiny.path, corpus, output, device="cuda"))
    with pytest.raises(ModelError, match="fatrelu alone has one"):
        run_relufy(options(tiny.path, corpus, output, cut=0.1))
    with pytest.raises(ModelError, match="chosen during the fit"):
        run_relufy(options(tiny.path, corpus, output, activation="fatrelu", fit_windows=0))
    run_relufy(options(tiny.path, corpus, output, steps=1, fit_windows=0))
    with pytest.raises(ModelError, match="has exact zeros already"):
        run_relufy(options(output, corpus, tmp_path / "again.gguf"))
