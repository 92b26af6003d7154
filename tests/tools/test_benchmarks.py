"""The programs under ``benchmarks/``: sound synthetic models, and comparisons that say what they lack."""

import importlib
import json
import os
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from powerinfer_formats.gguf_reader import GGUFFile
from powerinfer_tools.engine import Engine
from powerinfer_tools.measure.synthetic import models
from powerinfer_tools.measure.synthetic.random_blocks import random_rows
from powerinfer_tools.measure.synthetic.shapes import Shape
from powerinfer_tools.measure.synthetic.sparse import Sparsity, write_sparse
from powerinfer_tools.model.loading import load_model
from powerinfer_tools.text import Tokenizer

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ROW_TYPES = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")


def program(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of ``benchmarks/``, which is no package."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module(name)


@pytest.mark.parametrize("row_type", ROW_TYPES)
def test_random_rows_are_what_they_promise(row_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    columns, rows = 768, 256
    data = random_rows(np.random.default_rng(3), row_type, rows, columns)
    values = dequantize(data, GGMLQuantizationType[row_type]).astype(np.float64)
    assert values.shape == (rows, columns)
    # Scales uniform over 0.5 to 1.5 of the middle have a root mean square of √(13/12); the int8 ones of Q6_K
    # move it by less than 2 %. Q4_0 is off by half a step: −d/2.
    scaled = np.sqrt(13 / 12) if row_type not in ("F32", "F16", "BF16") else 1.0
    assert values.std() * np.sqrt(columns) == pytest.approx(scaled, rel=0.03)
    assert abs(values.mean()) * np.sqrt(columns) < 0.55 / np.sqrt((16**2 - 1) / 12)


@pytest.mark.parametrize(
    ("family", "mixture"),
    [
        ("llama", "Q4_0"),
        ("qwen2", "Q4_K_M"),
        ("gemma3", "Q8_0"),
        ("llama", "F16"),
        ("opt", "Q4_0"),
        ("falcon", "F16"),
        ("nemotron", "F32"),
    ],
)
def test_synthetic_models_run(family: str, mixture: str, tmp_path: Path) -> None:
    path = _write(family, mixture, tmp_path)
    with GGUFFile.open(path) as gguf:
        assert "synthetic" in gguf.get("general.name", str)
    engine = Engine(load_model(path), threads=1, context=16)
    try:
        logits = engine.prefill([1, 2, 300, 4])
        assert logits.shape == (400,)
        assert np.isfinite(logits).all()
        assert logits.std() > 0.1
    finally:
        engine.close()
    # The mixture of quantisers: narrow rows that no super-block fits get a plain type.
    kinds = {tensor.name: tensor.row_type for tensor in models.tensors_of(_shape(family), mixture)}
    if mixture == "Q4_K_M":
        assert kinds["blk.0.attn_q.weight"] == "Q4_K"
        assert kinds["blk.0.ffn_down.weight"] == "Q5_0"
        assert kinds["blk.1.ffn_down.weight"] == "Q8_0"


def test_comparison_without_peer_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _write("llama", "Q4_0", tmp_path)
    compare = program("compare", monkeypatch)
    # The workers are processes: they find the packages where this one does.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    report = tmp_path / "report.json"
    options = ["-m", str(path), "-p", "8", "-n", "4", "-r", "1", "-t", "1", "--json", str(report)]
    assert compare.main([*options, "--peer-python", str(tmp_path / "no-python")]) == 0
    assert "llama.cpp is not measured" in capsys.readouterr().out
    result = json.loads(report.read_text(encoding="utf-8"))
    assert [(row["test"], row["peer"], row["ratio"]) for row in result["rows"]] == [
        ("pp8", None, None),
        ("tg4", None, None),
    ]
    assert all(row["ours"] > 0 for row in result["rows"])
    assert result["kernels"] == []


def test_comparison_of_a_split_file_deep_in_the_context(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, split = _write("llama", "Q4_0", tmp_path), tmp_path / "sparse.powerinfer.gguf"
    write_sparse(split, "tiny", _shape("llama"), "Q4_0", Sparsity(0.25))
    compare = program("compare", monkeypatch)
    monkeypatch.setattr(program("kernels_alone", monkeypatch), "MATRIX_BYTES", 1 << 20)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    report = tmp_path / "new" / "report.json"
    options = ["-m", str(path), "--ours", str(split), "--mode", "predicted", "--depth", "20", "--kernels"]
    options += ["-p", "8", "-n", "4", "-r", "1", "-t", "2", "--json", str(report)]
    assert compare.main([*options, "--peer-python", str(tmp_path / "no-python")]) == 0
    result = json.loads(report.read_text(encoding="utf-8"))
    assert [row["test"] for row in result["rows"]] == ["pp8@d20", "tg4@d20"]
    assert result["file"] == split.name
    assert 0 < result["bytes_per_token"] < split.stat().st_size
    assert {row["name"] for row in result["kernels"]} > {"probe, huge pages", "probe, 4 KiB pages", "Q4_K"}
    assert all(row["bytes_per_second"] > 0 for row in result["kernels"])
    assert "probe, 4 KiB pages" in capsys.readouterr().out


def test_comparison_of_a_damaged_model_fails_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = _write("llama", "Q4_0", tmp_path)
    path.write_bytes(path.read_bytes()[:-64])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    assert program("compare", monkeypatch).main(["-m", str(path), "-t", "1"]) == 1
    error = capfd.readouterr().err
    assert "Traceback" not in error
    assert str(path) in error


def _write(family: str, mixture: str, folder: Path) -> Path:
    path = folder / "synthetic.gguf"
    size = models.write_synthetic(path, "tiny", _shape(family), mixture)
    assert path.stat().st_size == size
    return path


def _shape(family: str) -> Shape:
    return Shape(
        family,
        layers=2,
        width=256,
        heads=4,
        kv_heads=2,
        head_dim=64,
        neurons=96,
        vocabulary=400,
        rope_base=1e4,
        context=64,
        tied=family != "llama",
        biases={"qwen2": "qkv", "opt": "all"}.get(family, "none"),  # type: ignore[arg-type]
        window=8 if family == "gemma3" else 0,
    )


#: Stands in for the original's program: it repeats the prompt, goes on as it was told, and says how fast.
FAKE_MAIN = """#!{python}
import sys
words = sys.argv[1:]
prompt = words[words.index("-p") + 1]
assert words[words.index("--temp") + 1] == "0" and words[words.index("--repeat-penalty") + 1] == "1"
if {failing!r}:
    sys.exit("error loading model: unknown tensor")
sys.stdout.write(prompt + {answer!r})
said = "llama_print_timings: {{}} time = 12.0 ms / {count} runs ( 1.5 ms per token, {{}} tokens per second)"
print(said.format("prompt eval", 9.0), said.format("       eval", {rate}), sep="\\n", file=sys.stderr)
"""


def fake_main(path: Path, **how: object) -> Path:
    path.write_text(
        FAKE_MAIN.format(python=sys.executable, **{"failing": False, "count": 7, "rate": 2.5} | how)
    )
    path.chmod(0o755)
    return path


def test_agreement_with_the_original_is_counted_in_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where its text leaves ours, and how fast it says that it was; what it cannot load is named."""
    original = program("original", monkeypatch)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    (name, quant, path), *others = original.exported(tmp_path, [], ["opt"])
    assert (name, quant, [other[1] for other in others]) == ("random opt", "F16", ["Q4_0"])
    assert load_model(path).is_original
    task = original.Task(tmp_path / "none", "Hi", 8, 1)
    ids, mine = task.ours(path)
    assert len(ids) == 8
    assert mine > 0
    decoder = Tokenizer.from_gguf(load_model(path).source).stream()
    pieces = [decoder.push(token) for token in ids]
    whole = "".join(pieces)
    half = "".join(pieces[:4]) + "something else"
    for answer, same in ((whole, 8), (half, 4)):
        main = fake_main(tmp_path / "main", answer=answer)
        row = original.measure("m", "F16", path, original.Task(main, "Hi", 8, 1), 2)
        assert (row.same, row.tokens, row.original, row.failure) == (same, 8, 2.5, None)
        assert row.low <= row.ratio <= row.high
        assert row.cells()[2] == ("all of 8" if same == 8 else "4 of 8")
    main = fake_main(tmp_path / "main", answer="", failing=True)
    row = original.measure("m", "F16", path, original.Task(main, "Hi", 8, 1), 2)
    assert row.failure == "error loading model: unknown tensor (exit code 1)"
    assert row.cells()[2].startswith("failed: error loading model")
    assert original.main(["--main", str(tmp_path / "gone")]) == 1
    assert "no such program" in capsys.readouterr().err
