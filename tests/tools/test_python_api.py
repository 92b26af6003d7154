"""The public Python API: docs/python.md as it is written, and what it refuses."""

import contextlib
import io
import re
from pathlib import Path

import numpy as np
import pytest

import powerinfer
from powerinfer_tools.engine import Weights
from tiny_models import FAMILY_CASES, TinyModel, make_tiny_model

PAGE = Path(__file__).resolve().parents[2] / "docs/python.md"
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


def test_the_page_does_what_it_says(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks run one after the other, as a reader would run them; ``# →`` is what they print."""
    monkeypatch.chdir(smollm2.parent)
    blocks = BLOCK.findall(PAGE.read_text(encoding="utf-8"))
    assert len(blocks) >= 8
    names: dict[str, object] = {}
    for block in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(block, names)
        expected = [line[4:] for line in block.splitlines() if line.startswith("# → ")]
        assert [line.strip() for line in printed.getvalue().splitlines()] == expected, block


def test_every_public_name_is_there_and_on_the_page() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for name in powerinfer.__all__:
        assert getattr(powerinfer, name).__doc__
    errors = [name for name in powerinfer.__all__ if isinstance(getattr(powerinfer, name), type)]
    assert all(name in page for name in errors if issubclass(getattr(powerinfer, name), Exception))
    assert all(f"`{name}`" in page for name in powerinfer.GenerateOptions.__annotations__)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_tiny_model(tmp_path_factory.mktemp("api"), FAMILY_CASES["llama"])


def test_logits_are_those_of_the_engine_and_need_no_tokeniser(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("powerinfer.model.Tokenizer", None)
    with powerinfer.load(tiny.path, threads=1) as model:
        tokens = tiny.tokens(40)
        rows = model.logits(tokens)
        assert rows.shape == (40, model.vocabulary)
        assert np.abs(rows - tiny.logits(tokens)).max() < 0.01 * np.abs(rows).max()
        assert model.logits([]).shape == (0, model.vocabulary)


def test_text_does_not_depend_on_how_it_is_asked_for(tiny: TinyModel) -> None:
    with powerinfer.load(str(tiny.path), threads=1) as model:
        whole = model.generate("the cat", max_tokens=12, seed=3, ignore_eos=True)
        again = model.generate("the cat", max_tokens=12, seed=whole.seed, ignore_eos=True)
        assert whole == again
        assert whole.ended == "limit"
        assert len(whole.tokens) == 12
        ids = model.tokenize("the cat")
        assert model.generate(ids, max_tokens=12, seed=3, ignore_eos=True) == whole
        with model.session() as session:
            session.prefill(ids[:-1])
            rest = session.generate(ids[-1:], max_tokens=12, seed=3, ignore_eos=True)
            assert (rest.text, rest.logits_hash) == (whole.text, whole.logits_hash)
            assert rest.reused_tokens == len(ids) - 1
            assert session.tokens == (*ids, *whole.tokens[:-1])
            assert session.logits([1, 2]).shape == (2, model.vocabulary)
            assert len(session.tokens) == len(ids) + 13
        with model.stream("the cat", max_tokens=12, seed=3, ignore_eos=True) as stream:
            next(stream)
        assert stream.result.ended == "interrupted"
        assert whole.text.startswith(stream.result.text)


def test_what_is_refused(tiny: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(powerinfer.FormatError):
        powerinfer.load(tmp_path / "missing.gguf")
    with pytest.raises(powerinfer.ModelError, match="context"):
        powerinfer.load(tiny.path, context=1 << 40)
    with powerinfer.load(tiny.path, threads=1) as model:
        with pytest.raises(powerinfer.SamplingError, match="top_p"):
            model.generate("x", top_p=2.0)
        with pytest.raises(powerinfer.SamplingError, match="sequence"):
            model.generate("x", stop="abc")
        with pytest.raises(TypeError, match="no such option: temprature"):
            model.generate("x", temprature=1)  # type: ignore[call-arg]
        with pytest.raises(powerinfer.PowerInferError, match="empty"):
            model.generate([])
        with pytest.raises(powerinfer.ModelError, match="outside the vocabulary"):
            model.logits([model.vocabulary])
        with pytest.raises(powerinfer.ContextFull):
            model.logits([1] * (model.context + 1))
        with pytest.raises(ValueError, match="rewind"):
            model.session().rewind(1)


def test_sessions_are_closed_when_a_stream_ends_or_fails(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with powerinfer.load(tiny.path, threads=1) as model:
        model.generate("x", max_tokens=2)
        model.stream("x", max_tokens=2).close()
        with pytest.raises(powerinfer.ContextFull):
            model.generate([1] * (model.context + 1))
        with pytest.raises(powerinfer.SamplingError):
            model.generate("x", top_p=2.0)
        assert model._weights._sessions == []

        def broken(*args: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(model._weights.stack, "run", broken)
        with pytest.raises(KeyboardInterrupt):
            model.generate("x")
        assert model._weights._sessions == []


def test_a_file_that_cannot_be_run_is_closed(tiny: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []

    def broken(*args: object, **options: object) -> Weights:
        raise powerinfer.ModelError("broken")

    monkeypatch.setattr("powerinfer.model.Weights", broken)
    monkeypatch.setattr("powerinfer.model.LoadedModel.close", lambda self: closed.append(self.name))
    with pytest.raises(powerinfer.ModelError, match="broken"):
        powerinfer.load(tiny.path)
    assert len(closed) == 1


def test_drafts_change_no_bit_and_are_reported(tiny: TinyModel, tmp_path: Path) -> None:
    options: powerinfer.GenerateOptions = {"max_tokens": 40, "temperature": 0, "seed": 1, "ignore_eos": True}
    with powerinfer.load(tiny.path, threads=1) as model:
        plain = model.generate("the cat the cat the", **options)
    drafts: list[dict[str, object]] = [{"draft": "ngram"}, {"draft_model": tiny.path}]
    for given in drafts:
        with (
            powerinfer.load(tiny.path, threads=1, **given) as model,  # type: ignore[arg-type]
            model.session() as session,
        ):
            assert session.generate("the cat the cat the", **options) == plain
            report = session.report().drafts
            assert report is not None
            assert report.passes <= 39
            other = session.fork()
            expected = session.decode(plain.tokens[-1])
            assert (other.decode(plain.tokens[-1]) == expected).all()
            rows = session.logits([1, 2, 3])
            session.rewind(len(session.tokens) - 3)
            assert (session.logits([1, 2, 3]) == rows).all()
    with pytest.raises(ValueError, match="not from both"):
        powerinfer.load(tiny.path, draft="ngram", draft_model=tiny.path)


def test_a_schema_and_a_grammar_are_kept_to(tiny: TinyModel) -> None:
    pytest.importorskip("llguidance")
    with powerinfer.load(tiny.path, threads=1) as model:
        text = model.generate("a", grammar='root ::= "cat"', temperature=0, max_tokens=20).text
        assert text == "cat"
        with pytest.raises(powerinfer.SamplingError, match="not to both"):
            model.generate("a", grammar='root ::= "cat"', json_schema={})
        with pytest.raises(powerinfer.SamplingError, match="leave out ignore_eos"):
            model.generate("a", json_schema={}, ignore_eos=True)
        with pytest.raises(powerinfer.SamplingError, match="not valid"):
            model.generate("a", json_schema="{")
