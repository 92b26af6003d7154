"""Tiny ReLU models with predictors made by hand, as split files."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from powerinfer_formats.predictors import LowRank, PredictorInfo, Predictors, PredictorsHeader, Quality
from powerinfer_formats.profile import Profile
from powerinfer_tools.conversion import ConvertOptions, convert
from powerinfer_tools.profiling import ProfileOptions, run_profile
from small_plans import plan_for
from tiny_models import FAMILY_CASES, TinyModel, make_tiny_model

TEXT = "the cat sat on the mat and the dog sat on the log; a quick brown fox jumps over the lazy dog. " * 60


def profiled(folder: Path, tiny: TinyModel) -> Path:
    """The profile of ``tiny`` over :data:`TEXT`."""
    text, output = folder / "text.txt", folder / "tiny.profile.safetensors"
    text.write_text(TEXT)
    run_profile(ProfileOptions(tiny.path, (text,), output, window=64, threads=1))
    return output


def predicted_split(
    folder: Path, *, layers: int = 3, activation: str = "relu", rank: int = 16, seed: int = 1
) -> tuple[TinyModel, Path, Predictors]:
    """A model, its split file with 16 hot neurons in every layer, and its predictors: gates cut to ``rank``,
    with a threshold a little below zero."""
    spec = replace(FAMILY_CASES["llama-relu"], layers=layers, seed=seed, activation=activation)
    tiny = make_tiny_model(folder, spec)
    profile = profiled(folder, tiny)
    made = []
    for index in range(layers):
        left, values, right = np.linalg.svd(tiny.values[f"blk.{index}.ffn_gate.weight"])
        outward = (left[:, :rank] * values[:rank]).astype(np.float32)
        threshold = np.full(spec.neurons, -0.05, np.float32)
        made.append(LowRank(right[:rank].astype(np.float32), outward, threshold))
    loaded = Profile.load(profile)
    header = PredictorsHeader(
        fingerprint=loaded.fingerprint,
        model_name=loaded.model_name,
        method="svd",
        row_type="F32",
        target_recall=0.9,
        width=spec.width,
        neurons=spec.neurons,
        layers=(PredictorInfo("low-rank", rank, 1, Quality(0.5, 0.5, 0.9, 0.9)),) * layers,
        test_records=1,
        cost=None,
        corpus_hashes=(),
        tool_version="test",
    )
    predictors, plan = folder / "tiny.predictors.safetensors", folder / "tiny.plan.json"
    Predictors(header, tuple(made)).save(predictors)
    plan_for(loaded, [16] * layers, mode="gate-first", group=16, width=spec.width).save(plan)
    output = folder / "tiny.powerinfer.gguf"
    convert(ConvertOptions(tiny.path, profile, plan, output, predictors=predictors))
    return tiny, output, Predictors(header, tuple(made))
