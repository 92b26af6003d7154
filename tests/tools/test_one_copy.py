"""What measures one model in several ways packs it once, and closes what it opened when a step fails."""

from collections import Counter
from functools import partial
from pathlib import Path

import pytest

from powerinfer_formats.profile import Profile
from powerinfer_kernels import Matrix, Pool
from powerinfer_tools.engine import Engine
from powerinfer_tools.errors import ModelError
from powerinfer_tools.model.loading import load_model
from powerinfer_tools.quality.alternating import Alternating
from powerinfer_tools.quality.comparison import compare_modes
from powerinfer_tools.stages.threshold import thresholding
from powerinfer_tools.stages.threshold.thresholding import ThresholdOptions, run_threshold
from predicted_models import TEXT, predicted_split, profiled
from tiny_models import FAMILY_CASES, make_tiny_model


class Opened:
    """Counts matrices by the address of their source, thread pools, and how many are closed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.packed: Counter[tuple[int, int]] = Counter()
        self.pools = self.closed = 0
        pack, close, start = Matrix.pack, Pool.close, Pool.__init__

        def packing(pool: Pool, source: object, row_type: int, rows: int, columns: int) -> Matrix:
            self.packed[source.__array_interface__["data"][0], rows] += 1  # type: ignore[attr-defined]
            return pack(pool, source, row_type, rows, columns)

        def starting(pool: Pool, *args: object, **options: object) -> None:
            self.pools += 1
            start(pool, *args, **options)  # type: ignore[arg-type]

        def closing(pool: Pool) -> None:
            self.closed += 1
            close(pool)

        monkeypatch.setattr(Matrix, "pack", staticmethod(packing))
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


def raising(*_: object, **__: object) -> None:
    raise MemoryError("this step")


def test_compare_shares_what_modes_lay_out_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention and the head; rows of neurons lie otherwise in every mode."""
    tiny, path, _ = predicted_split(tmp_path)
    model = load_model(path)
    opened = Opened(monkeypatch)
    compare_modes(
        partial(Engine, model, threads=1), model, ("dense", "gate-first", "predicted"), [tiny.tokens(40)]
    )
    whole = [matrix for layer in model.layers for matrix in (layer.attention.query, layer.attention.output)]
    for matrix in (*whole, model.head):
        place = int(matrix.data.__array_interface__["data"][0])
        assert opened.packed[place, matrix.rows] == 1
    assert opened.pools == opened.closed == 3
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
