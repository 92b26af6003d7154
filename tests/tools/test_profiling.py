"""profile: what is counted is what the model did, shards merge exactly, interrupted work goes on."""

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from powerinfer_formats.histogram import contribution_bins
from powerinfer_formats.profile import Profile
from powerinfer_kernels import reference
from powerinfer_tools.errors import CorpusError, ProfileError
from powerinfer_tools.model.loading import load_model
from powerinfer_tools.model.reference import attention_block, ffn_matrices, matrix, normalize
from powerinfer_tools.progress import Silent
from powerinfer_tools.stages.profile import ProfileOptions, run_profile
from powerinfer_tools.stages.profile.on_ray import run_profile_on_ray
from powerinfer_tools.stages.profile.profiling import checkpoint_path
from powerinfer_tools.text import Tokenizer
from tiny_models import FAMILY_CASES, make_tiny_model

TEXTS = {
    "a.txt": "the cat sat on the mat and the dog sat on the log. " * 20,
    "b.txt": "a quick brown fox jumps over the lazy dog; pack my box with five dozen jugs. " * 12,
}


@pytest.fixture(scope="module", params=["llama", "llama-relu", "gemma3"])
def model_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("profiled"), FAMILY_CASES[request.param]).path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name, text in TEXTS.items():
        (folder / name).write_text(text)
    return folder


def options(model: Path, corpus: Path, output: Path, **changes: object) -> ProfileOptions:
    return replace(ProfileOptions(model, (corpus,), output, window=32, threads=1), **changes)  # type: ignore[arg-type]


def same(first: Profile, second: Profile) -> bool:
    """Equal in everything that was counted, bit for bit."""
    return first.tokens == second.tokens and all(
        np.array_equal(getattr(a, name), getattr(b, name))
        for a, b in zip(first.sums, second.sums, strict=True)
        for name in ("counts", "histogram", "gate_squares", "up_squares")
        if getattr(a, name) is not None or getattr(b, name) is not None
    )


def test_counts_are_those_of_the_float64_reference(model_path: Path, corpus: Path, tmp_path: Path) -> None:
    """Contributions near a bin's edge may fall on its other side by rounding: four edges to an octave are six
    to a factor of e, so an error of one roundoff of the half-precision cache moves six times as many."""
    profile = run_profile(options(model_path, corpus, tmp_path / "out.profile.safetensors"))
    model = load_model(model_path)
    tokenizer = Tokenizer.from_gguf(model.source)
    bins = [np.zeros((model.hyper.neurons, 128), np.int64) for _ in model.layers]
    nonzero = [np.zeros(model.hyper.neurons, np.int64) for _ in model.layers]
    squares = [np.zeros(model.hyper.neurons) for _ in model.layers]
    prefix = [tokenizer.bos_id] if tokenizer.adds_bos else []
    step = 32 - len(prefix)
    for text in TEXTS.values():
        ids = tokenizer.encode(text, add_bos=False)
        for first in range(0, len(ids), step):
            x = matrix(model.embedding)[prefix + ids[first : first + step]] * model.hyper.embedding_scale
            for index, layer in enumerate(model.layers):
                x = x + attention_block(model, layer.attention, index, x, half_cache=True)
                normed = normalize(x, layer.ffn_norm, model.hyper.norm_eps)
                gate, up, down = ffn_matrices(layer)
                hidden = reference.activate(normed @ gate.T, normed @ up.T, model.hyper.activation)
                squares[index] += ((normed @ up.T) ** 2).sum(axis=0)
                for row in hidden.astype(np.float32):
                    bins[index][np.arange(len(row)), contribution_bins(row)] += 1
                nonzero[index] += (hidden != 0).sum(axis=0)
                out = hidden @ down
                if layer.ffn_post_norm is not None:
                    out = normalize(out, layer.ffn_post_norm, model.hyper.norm_eps)
                x = x + out
    for index, sums in enumerate(profile.sums):
        if profile.exact_zeros:
            assert sums.counts is not None
            moved = np.abs(sums.counts.astype(np.int64) - nonzero[index]).sum()
        else:
            assert sums.histogram is not None
            moved = np.abs(sums.histogram.astype(np.int64) - bins[index]).sum() // 2
        assert moved <= 6 * 2.0**-11 * profile.tokens * model.hyper.neurons
        # Each window's sum is rounded to 2^-16; beyond that, float32 rounding of the factors.
        windows = -(-profile.tokens // 16)
        assert np.allclose(sums.up_squares, squares[index], rtol=1e-3, atol=windows * 2.0**-16)


def test_shards_merge_into_the_whole(model_path: Path, corpus: Path, tmp_path: Path) -> None:
    whole = run_profile(options(model_path, corpus, tmp_path / "whole.profile.safetensors", threads=2))
    parts = [
        run_profile(options(model_path, corpus / name, tmp_path / f"{name}.profile.safetensors"))
        for name in TEXTS
    ]
    merged = Profile.merge(parts[::-1])
    assert same(whole, merged)
    assert merged.corpus == whole.corpus


def test_interrupted_work_goes_on(model_path: Path, corpus: Path, tmp_path: Path) -> None:
    asked = options(model_path, corpus, tmp_path / "out.profile.safetensors")
    expected = run_profile(replace(asked, output=tmp_path / "expected.profile.safetensors"))

    class InterruptSoon(Silent):
        def __init__(self) -> None:
            self.calls = 0

        def advance(self, n: int) -> None:
            self.calls += 1
            if self.calls == 5:
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run_profile(asked, InterruptSoon())
    assert not asked.output.exists()
    assert checkpoint_path(asked.output).exists()

    class Count(Silent):
        def __init__(self) -> None:
            self.notes: list[str] = []

        def note(self, text: str) -> None:
            self.notes.append(text)

    listener = Count()
    assert same(run_profile(asked, listener), expected)
    assert any("continuing after" in note for note in listener.notes)
    assert not checkpoint_path(asked.output).exists()


def test_json_lines_and_bad_utf8(model_path: Path, tmp_path: Path) -> None:
    lines = tmp_path / "lines.jsonl"
    lines.write_text(json.dumps({"text": "the cat"}) + "\n\n" + json.dumps("the dog") + "\n")
    broken = tmp_path / "broken.txt"
    broken.write_bytes(b"the cat \xff sat")
    notes: list[str] = []

    class Listen(Silent):
        def note(self, text: str) -> None:
            notes.append(text)

    output = tmp_path / "out.profile.safetensors"
    profile = run_profile(ProfileOptions(model_path, (lines, broken), output, window=32, threads=1), Listen())
    assert [entry.name for entry in profile.corpus] == ["broken.txt", "lines.jsonl"]
    assert any("broken.txt: not UTF-8 at byte 8" in note for note in notes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no text"),
        (None, "does not exist"),
    ],
)
def test_unusable_corpus(model_path: Path, tmp_path: Path, content: str | None, message: str) -> None:
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_text(content)
    output = tmp_path / "out.profile.safetensors"
    with pytest.raises(CorpusError, match=message):
        run_profile(ProfileOptions(model_path, (text,), output))
    assert not output.exists()


def test_bad_json_line_is_named(model_path: Path, tmp_path: Path) -> None:
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(CorpusError, match="line 2 is not JSON"):
        run_profile(ProfileOptions(model_path, (lines,), tmp_path / "out.profile.safetensors"))


def test_window_beyond_the_model(model_path: Path, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="window"):
        run_profile(options(model_path, corpus, tmp_path / "out.profile.safetensors", window=100_000))


def test_shards_of_a_folder_merge_into_the_profile_of_the_whole(
    model_path: Path, corpus: Path, tmp_path: Path
) -> None:
    for number in range(3):
        (corpus / f"more-{number}.txt").write_text(TEXTS["a.txt"][number * 7 : 60 + 90 * number])
    whole = run_profile(options(model_path, corpus, tmp_path / "whole.safetensors"))
    parts = [
        run_profile(options(model_path, corpus, tmp_path / f"{number}.safetensors", shard=(number, 3)))
        for number in (3, 1, 2)
    ]
    merged = Profile.merge(parts)
    assert same(whole, merged)
    assert merged.corpus == whole.corpus
    merged.save(tmp_path / "merged.safetensors")
    assert (tmp_path / "merged.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_more_shards_than_files_are_refused(model_path: Path, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="3 shards need at least as many files, and the corpus has 2"):
        run_profile(options(model_path, corpus, tmp_path / "x.safetensors", shard=(1, 3)))


def test_ray_is_asked_for_by_name(
    model_path: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ProfileError, match=r"--ray needs Ray, .* pip install '\.\[ray\]'"):
        run_profile_on_ray(options(model_path, corpus, tmp_path / "x.safetensors"), "local")
