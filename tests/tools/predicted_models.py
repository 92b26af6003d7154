"""Tiny ReLU models with predictors made by hand, as split files."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from powerinfer_formats.predictors import (
    Kind,
    LowRank,
    PredictorInfo,
    Predictors,
    PredictorsHeader,
    Quality,
    ResidualRelu,
    SignBits,
)
from powerinfer_formats.profile import Profile
from powerinfer_tools.stages.convert.conversion import ConvertOptions, convert
from powerinfer_tools.stages.profile import ProfileOptions, run_profile
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


def hand_made(
    tiny: TinyModel, profile: Path, kind: Kind, row_type: str = "F32", rank: int = 16
) -> Predictors:
    """Predictors of a tiny model, made from its gates (or ups, without gate)."""
    spec, loaded = tiny.spec, Profile.load(profile)
    names = [f"blk.{index}.ffn_gate.weight" for index in range(spec.layers)]
    gates = [tiny.values[name if name in tiny.values else name.replace("gate", "up")] for name in names]
    made: list[LowRank | SignBits] = []
    for gate in gates:
        cut = low_rank(gate, rank)
        relu = ResidualRelu(cut.inward, cut.outward, cut.threshold)
        made.append(sign_bits(gate) if kind == "sign" else relu if kind == "residual-relu" else cut)
    info = PredictorInfo(kind, 0 if kind == "sign" else rank, 1, Quality(0.5, 0.5, 0.9, 0.9))
    header = PredictorsHeader(
        fingerprint=loaded.fingerprint,
        model_name=loaded.model_name,
        method="sign" if kind == "sign" else "svd",
        row_type=row_type,
        target_recall=0.9,
        width=spec.width,
        neurons=spec.neurons,
        layers=(info,) * spec.layers,
        test_records=1,
        cost=None,
        corpus_hashes=(),
        tool_version="test",
    )
    return Predictors(header, tuple(made))


def predicted_split(
    folder: Path,
    *,
    kind: Kind = "low-rank",
    layers: int = 3,
    activation: str = "relu",
    rank: int = 16,
    seed: int = 1,
    context: int = 256,
) -> tuple[TinyModel, Path, Predictors]:
    """A model, its split file with 16 hot neurons in every layer, and its predictors, made by hand."""
    spec = replace(
        FAMILY_CASES["llama-relu"], layers=layers, seed=seed, activation=activation, context=context
    )
    tiny = make_tiny_model(folder, spec)
    profile = profiled(folder, tiny)
    made = hand_made(tiny, profile, kind, rank=rank)
    predictors, plan = folder / "tiny.predictors.safetensors", folder / "tiny.plan.json"
    made.save(predictors)
    loaded = Profile.load(profile)
    plan_for(loaded, [16] * layers, mode="gate-first", group=16, width=spec.width).save(plan)
    output = folder / "tiny.powerinfer.gguf"
    convert(ConvertOptions(tiny.path, profile, plan, output, predictors=predictors))
    return tiny, output, made
