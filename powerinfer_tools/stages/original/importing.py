"""Predictor and activation folders of the original PowerInfer as predictors and a profile of ours."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from powerinfer_formats.block_types import row_bytes
from powerinfer_formats.predictors import (
    PredictorInfo,
    Predictors,
    PredictorsHeader,
    ResidualRelu,
    RowTypeName,
)
from powerinfer_formats.profile import MAX_TOKENS, Corpus, LayerSums, Profile
from powerinfer_formats.records import parse_json, read_text
from powerinfer_kernels import RowType, block_shape
from powerinfer_tools import __version__
from powerinfer_tools.errors import ImportFailed
from powerinfer_tools.model.loading import Model, load_model
from powerinfer_tools.model.original import above
from powerinfer_tools.progress import Progress, Silent
from powerinfer_tools.stages.original.torch_folder import Floats, layer_files, load_counts, load_predictor
from powerinfer_tools.stages.train.low_rank import as_stored

#: The ``method`` of predictors that were taken over.
METHOD = "imported"


@dataclass(frozen=True)
class ImportPredictors:
    """What to take over. ``threshold`` None takes what ``config.json`` in the folder says, else 0."""

    folder: Path
    model: Path
    output: Path
    row_type: RowTypeName = "F16"
    threshold: float | None = None


@dataclass(frozen=True)
class ImportCounts:
    """What to take over: counts over ``tokens`` tokens of a corpus that the folder does not name."""

    folder: Path
    model: Path
    output: Path
    tokens: int | None


def import_predictors(options: ImportPredictors, progress: Progress | None = None) -> PredictorsHeader:
    """Write the predictors of ``model_{i}.pt`` as a predictors file; returns its header.

    A neuron is predicted there where fc2·relu(fc1·h) ≥ threshold, with h the residual stream that the norm
    of the FFN reads. Raises ImportFailed, ModelError and FormatError.
    """
    progress = progress or Silent()
    model = load_model(options.model)
    try:
        _require_source(model)
        hyper = model.hyper
        files = layer_files(options.folder, "model", hyper.layers)
        bound = above(_threshold(options))
        layers = []
        progress.start("predictors", len(files), "layers")
        for path in files:
            inward, outward = load_predictor(path, hyper.width, hyper.neurons)
            layers.append(
                ResidualRelu(
                    inward=_rounded(inward, options.row_type, path),
                    outward=_rounded(outward, options.row_type, path),
                    threshold=np.full(hyper.neurons, bound, np.float32),
                )
            )
            progress.advance(1)
        progress.finish()
        header = _header(model, options.row_type, [len(layer.inward) for layer in layers])
        Predictors(header, tuple(layers)).save(options.output)
        return header
    finally:
        model.close()


def import_counts(options: ImportCounts, progress: Progress | None = None) -> Profile:
    """Write the counts of ``activation_{i}.pt`` as a profile, whose sums of squares are 0: unknown.

    Raises ImportFailed, ModelError and FormatError.
    """
    progress = progress or Silent()
    model = load_model(options.model)
    try:
        _require_source(model)
        files = layer_files(options.folder, "activation", model.hyper.layers)
        progress.start("counts", len(files), "layers")
        counts = []
        for path in files:
            counts.append(load_counts(path, model.hyper.neurons))
            progress.advance(1)
        progress.finish()
        tokens = _tokens(options, max(int(layer.max()) for layer in counts))
        profile = Profile(
            fingerprint=model.fingerprint,
            model_name=model.name,
            architecture=model.spec.name,
            activation=model.hyper.activation,
            exact_zeros=True,
            tokens=tokens,
            window=1,
            target_density=1.0,
            corpus=(_corpus(options.folder, files, tokens),),
            tool_version=__version__,
            sums=tuple(
                LayerSums(layer, None, np.zeros(len(layer)), np.zeros(len(layer))) for layer in counts
            ),
        )
        profile.save(options.output)
        return profile
    finally:
        model.close()


def _require_source(model: Model) -> None:
    if not model.is_source:
        raise ImportFailed(f"{model.path} is a split file; import for the source model it was made from")
    model.require_one_ffn(ImportFailed, "importing")
    if not model.exact_zeros:
        raise ImportFailed(
            f"{model.path}: such folders are of models with exact zeros; {model.hyper.activation} has none"
        )


def _threshold(options: ImportPredictors) -> float:
    threshold = options.threshold
    config = options.folder / "config.json"
    if threshold is None and config.is_file():
        document = parse_json(read_text(config), config)
        value = document.get("sparse_threshold") if isinstance(document, dict) else None
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            raise ImportFailed(f"{config}: sparse_threshold is {value!r}, expected a number")
        threshold = value
    if threshold is not None and not abs(threshold) < float(np.finfo(np.float32).max):
        raise ImportFailed(f"threshold {threshold} is not a finite number in single precision")
    return threshold or 0.0


def _rounded(rows: Floats, row_type: RowTypeName, path: Path) -> Floats:
    kind = RowType[row_type]
    if rows.shape[1] % block_shape(kind)[0]:
        raise ImportFailed(
            f"{path}: rows of {rows.shape[1]} values are no whole blocks of {row_type}; take --type F16"
        )
    kept = as_stored(rows, kind)
    if not np.isfinite(kept).all():
        raise ImportFailed(f"{path} has values too large for {row_type}; take --type F32")
    return kept


def _header(model: Model, row_type: RowTypeName, ranks: Sequence[int]) -> PredictorsHeader:
    width, neurons, kind = model.hyper.width, model.hyper.neurons, int(RowType[row_type])
    sizes = [rank * row_bytes(kind, width) + neurons * (row_bytes(kind, rank) + 4) for rank in ranks]
    return PredictorsHeader(
        fingerprint=model.fingerprint,
        model_name=model.name,
        method=METHOD,
        row_type=row_type,
        target_recall=None,
        width=width,
        neurons=neurons,
        layers=tuple(
            PredictorInfo(ResidualRelu.kind, rank, nbytes, None)
            for rank, nbytes in zip(ranks, sizes, strict=True)
        ),
        test_records=0,
        cost=None,
        corpus_hashes=(),
        tool_version=__version__,
    )


def _tokens(options: ImportCounts, busiest: int) -> int:
    if options.tokens is None:
        raise ImportFailed(
            f"{options.folder} does not say how many tokens were counted; say it with --tokens N "
            f"(the busiest neuron was active for {busiest:,})"
        )
    if options.tokens < busiest:
        raise ImportFailed(
            f"{options.folder}: a neuron was active for {busiest:,} tokens, more than the {options.tokens:,} "
            "of --tokens"
        )
    if options.tokens > MAX_TOKENS:
        raise ImportFailed(f"--tokens {options.tokens:,} is more than a profile can count ({MAX_TOKENS:,})")
    return options.tokens


def _corpus(folder: Path, files: Sequence[Path], tokens: int) -> Corpus:
    digest, nbytes = hashlib.sha256(), 0
    for path in files:
        data = path.read_bytes()
        digest.update(data)
        nbytes += len(data)
    return Corpus(f"{folder.name}/activation_*.pt", digest.hexdigest(), tokens, nbytes)
