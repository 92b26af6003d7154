"""What measures one model in several ways packs it once, and closes what it opened when a step fails."""

import tracemalloc
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from powerinfer_formats.profile import Profile
from powerinfer_kernels import Bundle, Matrix, Pool
from powerinfer_tools.engine import Engine
from powerinfer_tools.errors import ModelError
from powerinfer_tools.model.loading import load_model
from powerinfer_tools.quality.alternating import Alternating
from powerinfer_tools.quality.comparison import compare_modes
from powerinfer_tools.stages.threshold import thresholding
from powerinfer_tools.stages.threshold.thresholding import ThresholdOptions, run_threshold
from powerinfer_tools.stages.train.meter import Meter
from predicted_models import TEXT, low_rank, predicted_split, profiled
from tiny_models import FAMILY_CASES, make_tiny_model


class Opened:
    """Counts matrices by the address of their source and by their shape, bundles, thread pools, and how many
    are closed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.packed: Counter[tuple[int, int]] = Counter()
        self.shapes: Counter[tuple[int, int]] = Counter()
        self.pools = self.closed = self.bundles = 0
        pack, close, start, bundle = Matrix.pack, Pool.close, Pool.__init__, Bundle.pack

        def packing(
            pool: Pool, source: object, row_type: int, rows: int, columns: int, *, scale: float = 1.0
        ) -> Matrix:
            self.packed[source.__array_interface__["data"][0], rows] += 1  # type: ignore[attr-defined]
            self.shapes[rows, columns] += 1
            return pack(pool, source, row_type, rows, columns, scale=scale)

        def bundling(*args: object, **rows: object) -> Bundle:
            self.bundles += 1
            return bundle(*args, **rows)  # type: ignore[arg-type]

        def starting(pool: Pool, *args: object, **options: object) -> None:
            self.pools += 1
            start(pool, *args, **options)  # type: ignore[arg-type]

        def closing(pool: Pool) -> None:
            self.closed += 1
            close(pool)

        monkeypatch.setattr(Matrix, "pack", staticmethod(packing))
        monkeypatch.setattr(Bundle, "pack", staticmethod(bundling))
        monkeypatch.setattr(Pool, "__init__", starting)
        monkeypatch.setattr(Pool, "close", closing)


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> ThresholdOptions:
    folder = tmp_path_factory.mktemp("once")
    tiny = make_tiny_model(folder, FAMILY_CASES["llama"])
    profile = profiled(folder, tiny)
    assert Profile.load(profile)
    return ThresholdOptions(tiny.path, profile, TEXT, folder / "tiny.thresholds.safetensors", 0.05, 64, 4, 1)


def test_threshold_packs_once_and_needs_no_memory_at_its_end(
    options: ThresholdOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, complete = Opened(monkeypatch), thresholding._Choice.complete

    def without_memory(choice: thresholding._Choice) -> object:
        for module in ("weights", "from_disk"):
            monkeypatch.setattr(f"powerinfer_tools.engine.{module}.available_ram_bytes", lambda: 1)
        return complete(choice)

    monkeypatch.setattr(thresholding._Choice, "complete", without_memory)
    report = run_threshold(options)
    assert report.header.cost.perplexity > 0
    assert set(opened.packed.values()) == {1}
    assert opened.pools == opened.closed == 1


def test_ways_that_take_turns_have_the_bits_of_an_engine_alone(options: ThresholdOptions) -> None:
    model = load_model(options.model)
    with Engine(model, threads=1, context=64, batch=7) as engine:
        tokens = [1 + i % 30 for i in range(50)]
        expected = [logits.copy() for logits in engine.score(tokens, 11)]
        other = engine.weights.session()
        ways = [Alternating(engine, session, lambda: None) for session in (engine.session, other)]
        got = list(zip(*(way.score(tokens, 11) for way in ways), strict=True))
    for rows in zip(*got, strict=True):
        assert b"".join(part.tobytes() for part in rows) == b"".join(part.tobytes() for part in expected)
    model.close()


@pytest.mark.parametrize("step", ["_sample", "_prices", "_furthest", "_header"])
def test_threshold_closes_what_it_opened(
    step: str, options: ThresholdOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Opened(monkeypatch)
    monkeypatch.setattr(thresholding._Choice, step, raising)
    with pytest.raises(MemoryError, match="step"):
        run_threshold(options)
    assert opened.pools == opened.closed == 1


def raising(*_: object, **__: object) -> Any:
    raise MemoryError("this step")


MODES = ("dense", "gate-first", "predicted")


def test_compare_packs_each_weight_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention and the head; of neurons, gate and up rows for dense products, which the check of recall
    takes, too, and one bundle in each layer for what all modes do with single neurons."""
    tiny, path, _ = predicted_split(tmp_path)
    model = load_model(path)
    opened = Opened(monkeypatch)
    compare_modes(partial(Engine, model, threads=1), model, MODES, [tiny.tokens(40)])
    whole = [matrix for layer in model.layers for matrix in (layer.attention.query, layer.attention.output)]
    for matrix in (*whole, model.head):
        place = int(matrix.data.__array_interface__["data"][0])
        assert opened.packed[place, matrix.rows] == 1
    assert opened.bundles == tiny.spec.layers
    assert opened.shapes[tiny.spec.neurons, tiny.spec.width] == 2 * tiny.spec.layers
    assert opened.pools == opened.closed == 3
    model.close()


@pytest.mark.parametrize("first", MODES)
def test_modes_beside_each_other_have_their_bits(first: str, tmp_path: Path) -> None:
    tiny, path, _ = predicted_split(tmp_path)
    model = load_model(path)
    tokens = tiny.tokens(30)

    def logits(engine: Engine) -> list[bytes]:
        prompt = [rows.tobytes() for rows in engine.score(tokens, 0)]
        return [*prompt, engine.decode(tokens[0]).tobytes(), engine.decode(tokens[1]).tobytes()]

    with Engine(model, threads=1, mode=first) as held:
        for mode in MODES:
            with Engine(model, threads=1, mode=mode) as alone:
                expected, about = logits(alone), alone.report()
            with Engine(model, threads=1, mode=mode, beside=held.weights) as engine:
                assert logits(engine) == expected
                report = engine.report()
            assert report.density == about.density
            assert report.bytes_per_token == pytest.approx(about.bytes_per_token, rel=0.02)
    model.close()


def test_train_measures_on_the_packed_rows_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No other memory has rows of neurons once the engine stands."""
    tiny = make_tiny_model(tmp_path, replace(FAMILY_CASES["llama-relu"], neurons=4096))
    layers = range(tiny.spec.layers)
    made = [low_rank(tiny.values[f"blk.{index}.ffn_gate.weight"], 16) for index in layers]
    model, opened = load_model(tiny.path), Opened(monkeypatch)
    matrices = [matrix for layer in model.layers for matrix in layer.source_ffn.matrices]
    tracemalloc.start()
    try:
        meter = Meter(model, made, "F32", [tiny.tokens(12, seed) for seed in range(3)], 1)
        held, _ = tracemalloc.get_traced_memory()
        assert meter.measure([None] * len(made), [0]).increase == 0
        meter.close()
    finally:
        tracemalloc.stop()
    assert opened.bundles == len(made)
    assert held < 0.3 * sum(matrix.nbytes for matrix in matrices)
    model.close()


def test_compare_closes_what_it_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny, path, _ = predicted_split(tmp_path)
    model = load_model(path)
    opened = Opened(monkeypatch)
    monkeypatch.setattr("powerinfer_tools.quality.comparison.divergence", raising)
    with pytest.raises(MemoryError, match="step"):
        compare_modes(partial(Engine, model, threads=1), model, ("dense", "predicted"), [tiny.tokens(40)])
    assert opened.pools == opened.closed == 2
    model.close()


def test_compare_closes_the_first_engine_when_the_second_cannot_be_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny, path, _ = predicted_split(tmp_path)
    model = load_model(path)
    opened = Opened(monkeypatch)

    def open_engine(*, mode: str, **options: Any) -> Engine:
        return raising() if mode == "dense" else Engine(model, threads=1, mode=mode, **options)

    with pytest.raises(MemoryError, match="step"):
        compare_modes(open_engine, model, MODES, [tiny.tokens(40)])
    assert opened.pools == opened.closed == 1
    model.close()


def test_weights_that_cannot_be_laid_out_leave_nothing_open(
    options: ThresholdOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Opened(monkeypatch)
    monkeypatch.setattr("powerinfer_tools.engine.weights.Head", raising)
    with pytest.raises(MemoryError), Engine(load_model(options.model), threads=1):
        pass
    assert opened.pools == opened.closed == 1
    monkeypatch.undo()
    opened = Opened(monkeypatch)
    monkeypatch.setattr("powerinfer_tools.engine.from_disk.available_ram_bytes", lambda: 1)
    with pytest.raises(ModelError, match="do not fit"):
        Engine(load_model(options.model), threads=1)
    assert opened.pools == opened.closed == 1
