"""Tiny ReLU models with predictors made by hand, as split files."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from powerinfer_formats.predictors import (
    LowRank,
    PredictorInfo,
    Predictors,
    PredictorsHeader,
    Quality,
    SignBits,
)
from powerinfer_formats.profile import Profile
from powerinfer_tools.conversion import ConvertOptions, convert
from powerinfer_tools.profiling import ProfileOptions, run_profile
from small_plans import plan_for
from tiny_models import FAMILY_CASES, TinyModel, make_tiny_model

Floats = npt.NDArray[np.float32]
TEXT = "the cat sat on the mat and the dog sat on the log; a quick brown fox jumps over the lazy dog. " * 60


def profiled(folder: Path, tiny: TinyModel) -> Path:
    """The profile of ``tiny`` over :data:`TEXT`."""
    text, output = folder / "text.txt", folder / "tiny.profile.safetensors"
    text.write_text(TEXT)
    run_profile(ProfileOptions(tiny.path, (text,), output, window=64, threads=1))
    return output


def low_rank(gate: Floats, rank: int) -> LowRank:
    """``gate`` cut to ``rank``, with a threshold a little below zero."""
    left, values, right = np.linalg.svd(gate)
    outward = (left[:, :rank] * values[:rank]).astype(np.float32)
    return LowRank(right[:rank].astype(np.float32), outward, np.full(len(gate), -0.05, np.float32))


def sign_bits(gate: Floats) -> SignBits:
    """The signs of ``gate``, with thresholds of either sign that miss neurons."""
    threshold = np.random.default_rng(3).normal(0.4, 1.0, len(gate)).astype(np.float32)
    return SignBits(np.packbits(gate < 0, axis=1, bitorder="little"), threshold)


def predicted_split(
    folder: Path,
    *,
    kind: Literal["low-rank", "sign"] = "low-rank",
    layers: int = 3,
    activation: str = "relu",
    rank: int = 16,
    seed: int = 1,
) -> tuple[TinyModel, Path, Predictors]:
    """A model, its split file with 16 hot neurons in every layer, and its predictors, made from its gates."""
    spec = replace(FAMILY_CASES["llama-relu"], layers=layers, seed=seed, activation=activation)
    tiny = make_tiny_model(folder, spec)
    profile = profiled(folder, tiny)
    gates = [tiny.values[f"blk.{index}.ffn_gate.weight"] for index in range(layers)]
    signs = kind == "sign"
    made = [sign_bits(gate) if signs else low_rank(gate, rank) for gate in gates]
    loaded = Profile.load(profile)
    header = PredictorsHeader(
        fingerprint=loaded.fingerprint,
        model_name=loaded.model_name,
        method="sign" if signs else "svd",
        row_type="F32",
        target_recall=0.9,
        width=spec.width,
        neurons=spec.neurons,
        layers=(PredictorInfo(kind, 0 if signs else rank, 1, Quality(0.5, 0.5, 0.9, 0.9)),) * layers,
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
