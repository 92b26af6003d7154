"""Predictors of families with true zeros that mix tokens otherwise than by attention."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine_logits import logits
from hybrid_families import FAMILIES, write_random_family
from plan_cases import granted
from powerinfer_formats.profile import Profile
from powerinfer_formats.trace import TraceFile
from powerinfer_tools.engine import Engine
from powerinfer_tools.errors import ProfileError, TrainError
from powerinfer_tools.measure.hardware.presets import PC_LOW
from powerinfer_tools.model.loading import load_model
from powerinfer_tools.model.reference import ffn_matrices
from powerinfer_tools.model.shapes import shape_of_model
from powerinfer_tools.stages.convert.conversion import ConvertOptions, convert
from powerinfer_tools.stages.plan.planner import PlanOptions
from powerinfer_tools.stages.plan.request import make_plan
from powerinfer_tools.stages.profile.profiling import ProfileOptions, run_profile
from powerinfer_tools.stages.train.training import TrainOptions, require_trainable, run_train

WINDOW, RECORDS = 32, 320
TOKENS = [3, 41, 7, 7, 12, 0, 49, 25, 30, 2, 18, 5, 44, 9, 33, 21, 6, 1, 28]


def profiled(folder: Path, case: str) -> tuple[Path, Profile]:
    """A model, and its profile, with a trace beside it."""
    model = write_random_family(folder / "model.gguf", FAMILIES[case], text=True)
    letters = np.random.default_rng(2).choice(list("abcdefghijklmnopqrstuvwxyz \n"), 600)
    (folder / "text.txt").write_text("".join(letters))
    run_profile(
        ProfileOptions(
            model,
            (folder / "text.txt",),
            folder / "profile.safetensors",
            window=WINDOW,
            max_tokens=16 * WINDOW,
            threads=1,
            trace=RECORDS,
            trace_output=folder / "trace.zst",
        )
    )
    return model, Profile.load(folder / "profile.safetensors")


@pytest.mark.parametrize("case", ["plm", "rwkv7"])
def test_predictors_of_what_mixes_tokens_otherwise(case: str, tmp_path: Path) -> None:
    """The trace has what the FFN reads, also where that is mixed with the token before; predictors are made
    of it, and find in a run what they found of its records."""
    path, profile = profiled(tmp_path, case)
    model = load_model(path)
    with TraceFile(tmp_path / "trace.zst") as trace:
        for layer in range(model.hyper.layers):
            inputs, active = trace.read(layer, range(len(trace.header.chunks)))
            gates = inputs.astype(np.float64) @ np.asarray(ffn_matrices(model.layers[layer])[0]).T
            clear = np.abs(gates) > 1e-2  # of inputs that are rounded to half precision
            assert clear.mean() > 0.9
            np.testing.assert_array_equal((gates > 0)[clear], active[clear])
    made = tmp_path / "predictors.safetensors"
    report = run_train(
        TrainOptions(path, tmp_path / "trace.zst", made, recall=0.9, budget=1.0, row_type="F32", threads=1)
    )
    assert all(layer.kind == "low-rank" for layer in report.header.layers)
    options = PlanOptions(context=WINDOW, group=4, batch=16)
    plan = make_plan(shape_of_model(model), profile, PC_LOW, granted(0), options)
    layers = tuple(replace(layer, mode="predicted", predictor="cpu") for layer in plan.layers)
    replace(plan, layers=layers).save(tmp_path / "plan.json")
    output = tmp_path / "split.powerinfer.gguf"
    convert(
        ConvertOptions(
            path, tmp_path / "profile.safetensors", tmp_path / "plan.json", output, predictors=made
        )
    )
    assert not np.array_equal(logits(output, TOKENS, mode="predicted"), logits(output, TOKENS, mode="dense"))
    engine = Engine(load_model(output), threads=1, context=64, mode="predicted", check_recall=True)
    engine.prefill(TOKENS)
    recall = engine.report().recall
    engine.close()
    assert recall is not None
    assert recall == pytest.approx(report.mean("recall"), abs=0.1)


@pytest.mark.parametrize(
    ("case", "what"),
    [
        ("nemotron_h", "models with layers without FFN"),
        ("gemma3n", "models with gates that depend on all neurons"),
        ("nemotron_h_moe", "mixtures of experts"),
    ],
)
def test_what_predictors_are_not_made_for(case: str, what: str, tmp_path: Path) -> None:
    path = write_random_family(tmp_path / "model.gguf", FAMILIES[case], text=True)
    with pytest.raises(TrainError, match=f"train does not take {what}"):
        require_trainable(path)
    options = ProfileOptions(path, (path,), tmp_path / "profile.safetensors", trace=64)
    with pytest.raises(ProfileError, match=f"profile --trace does not take {what}"):
        run_profile(options)
