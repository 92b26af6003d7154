"""profile --trace: the records are the model's own, as many as asked for, also after an interrupt."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from powerinfer_formats.trace import TraceFile
from powerinfer_kernels import reference
from powerinfer_tools.engine import Engine
from powerinfer_tools.errors import ProfileError
from powerinfer_tools.model.loading import Model, load_model
from powerinfer_tools.model.reference import attention_block, ffn_matrices, matrix, normalize
from powerinfer_tools.progress import Silent
from powerinfer_tools.stages.profile import ProfileOptions, run_profile
from powerinfer_tools.stages.profile.corpus import find_files
from powerinfer_tools.stages.profile.tracing import RECORDS_PER_WINDOW, sample, unfinished_trace
from powerinfer_tools.stages.profile.windows import corpus_windows
from powerinfer_tools.text import Tokenizer
from tiny_models import FAMILY_CASES, make_tiny_model

RECORDS = 150


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("traced"), FAMILY_CASES["llama-relu"]).path


@pytest.fixture
def asked(model_path: Path, tmp_path: Path) -> ProfileOptions:
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and the dog sat on the log; a quick brown fox. " * 20)
    output = tmp_path / "m.profile.safetensors"
    return ProfileOptions(
        model_path,
        (text,),
        output,
        window=32,
        threads=1,
        trace=RECORDS,
        trace_output=tmp_path / "m.trace.zst",
    )


def windows_of(model: Model, asked: ProfileOptions) -> list[list[int]]:
    files = find_files(asked.corpus)
    return [w.tokens for w in corpus_windows(files, Tokenizer.from_gguf(model.source), 32, Silent())]


def reference_records(model: Model, tokens: list[int]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Normalised FFN input and act(gate)·up of every layer, in float64."""
    found = []
    x = matrix(model.embedding)[tokens] * model.hyper.embedding_scale
    for index, layer in enumerate(model.layers):
        x = x + attention_block(model, layer.attention, index, x, half_cache=True)
        normed = normalize(x, layer.ffn_norm, model.hyper.norm_eps)
        gate, up, down = ffn_matrices(layer)
        hidden = reference.activate(normed @ gate.T, normed @ up.T, model.hyper.activation)
        found.append((normed, hidden))
        x = x + hidden @ down
    return found


def test_records_are_those_of_the_reference(asked: ProfileOptions) -> None:
    """Inputs to half precision (2^-11), of a cache that is rounded, too; a neuron may differ only where its
    gate is within the same error of zero."""
    profile = run_profile(asked)
    model = load_model(asked.model)
    windows = windows_of(model, asked)
    rows = sample([len(tokens) for tokens in windows], RECORDS)
    assert asked.trace_output is not None
    with TraceFile(asked.trace_output) as trace:
        assert trace.header.records == RECORDS
        assert trace.header.fingerprint == profile.fingerprint == model.fingerprint
        assert trace.header.chunks == tuple(len(rows[w]) for w in sorted(rows))
        expected = [(w, reference_records(model, windows[w])) for w in sorted(rows)]
        for layer in range(model.hyper.layers):
            inputs, active = trace.read(layer)
            normed = np.concatenate([r[layer][0][rows[w]] for w, r in expected])
            hidden = np.concatenate([r[layer][1][rows[w]] for w, r in expected])
            assert np.abs(inputs - normed).max() <= 4 * 2.0**-11 * np.abs(normed).max()
            wrong = active != (hidden != 0)
            assert wrong.mean() < 1e-3
            assert not wrong.any() or np.abs(hidden[wrong]).max() < 1e-2 * np.abs(hidden).max()
    assert not unfinished_trace(asked.trace_output).exists()


def test_looking_on_changes_nothing(asked: ProfileOptions) -> None:
    with_trace = run_profile(asked)
    without = run_profile(replace(asked, trace=0, trace_output=None))
    for first, second in zip(with_trace.sums, without.sums, strict=True):
        assert np.array_equal(first.counts, second.counts)  # type: ignore[arg-type]
        assert np.array_equal(first.gate_squares, second.gate_squares)


def test_watching_leaves_the_bits_of_the_residual_stream(model_path: Path) -> None:
    tokens = list(range(3, 27))
    engine = Engine(load_model(model_path), threads=2, context=32, batch=32)
    engine.absorb(tokens)
    plain = engine.stack.x[: len(tokens)].copy()
    seen: list[int] = []
    engine.absorb(tokens, lambda layer, normed, hidden: seen.append(layer))
    assert np.array_equal(engine.stack.x[: len(tokens)], plain)
    assert seen == list(range(engine.model.hyper.layers))
    engine.close()


@pytest.mark.parametrize("calls", [2, 5, 9])
def test_an_interrupted_trace_is_the_same(asked: ProfileOptions, tmp_path: Path, calls: int) -> None:
    whole = replace(asked, output=tmp_path / "w.profile.safetensors", trace_output=tmp_path / "w.trace.zst")
    run_profile(whole)

    class InterruptSoon(Silent):
        count = 0

        def advance(self, n: int) -> None:
            self.count += 1
            if self.count == calls:
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run_profile(asked, InterruptSoon())
    assert asked.trace_output is not None
    assert not asked.trace_output.exists()
    # What a kill later than the checkpoint would have left: a frame too many, and half a one.
    with unfinished_trace(asked.trace_output).open("ab") as stream:
        stream.write(b"\x03\x00\x00\x00abc\xff\x00\x00\x00half")
    run_profile(asked)
    assert whole.trace_output is not None
    assert asked.trace_output.read_bytes() == whole.trace_output.read_bytes()


def test_lost_records_are_noticed(asked: ProfileOptions) -> None:
    class Listen(Silent):
        def __init__(self) -> None:
            self.notes: list[str] = []
            self.count = 0

        def advance(self, n: int) -> None:
            self.count += 1
            if self.count == 8:
                os.kill(os.getpid(), signal.SIGINT)

        def note(self, text: str) -> None:
            self.notes.append(text)

    with pytest.raises(KeyboardInterrupt):
        run_profile(asked, Listen())
    assert asked.trace_output is not None
    unfinished_trace(asked.trace_output).unlink(missing_ok=True)
    listener = Listen()
    listener.count = 100
    run_profile(asked, listener)
    assert any("starting again" in note for note in listener.notes)
    with TraceFile(asked.trace_output) as trace:
        assert trace.header.records == RECORDS


@pytest.mark.parametrize("records", [1, 63, 64, 65, 500, 5000])
def test_samples_are_as_many_as_there_are(records: int) -> None:
    lengths = [512] * 7 + [3, 100]
    rows = sample(lengths, records)
    assert sum(map(len, rows.values())) == min(records, sum(lengths))
    for window, some in rows.items():
        assert len(set(some.tolist())) == len(some)
        assert some.min() >= 0
        assert some.max() < lengths[window]
    assert len(rows) >= min(len(lengths), -(-records // max(RECORDS_PER_WINDOW, -(-records // len(lengths)))))
    assert {w: r.tolist() for w, r in sample(lengths, records).items()} == {
        w: r.tolist() for w, r in rows.items()
    }


def test_a_model_without_zeros_has_no_trace(asked: ProfileOptions, tmp_path: Path) -> None:
    folder = tmp_path / "silu"
    folder.mkdir()
    other = make_tiny_model(folder, FAMILY_CASES["llama"]).path
    with pytest.raises(ProfileError, match="relufy"):
        run_profile(replace(asked, model=other))
