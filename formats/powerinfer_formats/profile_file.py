"""Profiles and checkpoints as safetensors files: writing, reading, and every check between the two."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from powerinfer_formats.errors import BadDocument, BadField, BadValue, UnfinishedProfile, UnsupportedVersion
from powerinfer_formats.histogram import BINS, active_counts, lower_edge, threshold_bin
from powerinfer_formats.profile_document import ROUTING, CorpusPosition, ProfileDocument, corpus_key
from powerinfer_formats.profile_sums import SQUARE_GRID, SQUARE_LIMIT, ExpertSums, LayerSums
from powerinfer_formats.records import RecordReader, dump_json, parse_json, to_plain
from powerinfer_formats.safetensors_file import SafetensorsReader, open_safetensors, write_safetensors

if TYPE_CHECKING:
    from powerinfer_formats.profile import Profile

FORMAT = "powerinfer-profile"
VERSION = 1
MAX_LAYERS = 4096
MAX_NEURONS = 1 << 24
_MAX_TOKENS = (1 << 32) - 1
_HASH_DIGITS = frozenset("0123456789abcdef")


def save_profile(profile: Profile, path: Path, position: CorpusPosition | None) -> None:
    """Write a finished profile (``position`` None) or a checkpoint."""
    document = ProfileDocument(
        fingerprint=profile.fingerprint,
        model_name=profile.model_name,
        architecture=profile.architecture,
        activation=profile.activation,
        exact_zeros=profile.exact_zeros,
        tokens=profile.tokens,
        window=profile.window,
        target_density=profile.target_density,
        corpus=profile.corpus,
        tool_version=profile.tool_version,
        neurons=tuple(profile.neurons(layer) for layer in range(profile.layers)),
        checkpoint=position,
        expert_neurons=_expert_neurons(profile),
    )
    plain = to_plain(document)
    if not document.expert_neurons:
        del plain["expert_neurons"]
    text = dump_json({"format": FORMAT, "version": VERSION, **plain}, indent=None)
    _check_document(_parse(text, path), path)
    tensors: dict[str, NDArray[Any]] = {}
    for layer, sums in enumerate(profile.sums):
        counts = profile.counts(layer)
        _check_sums(document, layer, sums, path)
        tensors[f"blk.{layer}.counts"] = counts
        tensors[f"blk.{layer}.gate_squares"] = sums.gate_squares
        tensors[f"blk.{layer}.up_squares"] = sums.up_squares
        if sums.histogram is not None:
            tensors[f"blk.{layer}.histogram"] = sums.histogram
        if sums.inside is not None:
            tensors[f"blk.{layer}.expert_tokens"] = sums.inside.tokens
            tensors[f"blk.{layer}.expert_active"] = sums.inside.active
    tensors["thresholds"] = profile.thresholds
    write_safetensors(path, text, tensors)


def load_profile(path: Path, *, counts_alone: bool = False) -> dict[str, Any]:
    """The fields of a finished ``Profile``; ``counts_alone``: without histograms, which take memory."""
    fields, position = _load(path, counts_alone=counts_alone)
    if position is not None:
        raise UnfinishedProfile(
            path, f"is unfinished ({position.windows} windows); run powerinfer profile again to complete it"
        )
    return fields


def load_checkpoint(path: Path) -> tuple[dict[str, Any], CorpusPosition]:
    """The fields of the ``Profile`` so far, and how far that is."""
    fields, position = _load(path)
    if position is None:
        raise UnfinishedProfile(path, "is a finished profile, not a checkpoint")
    return fields, position


def _load(path: Path, *, counts_alone: bool = False) -> tuple[dict[str, Any], CorpusPosition | None]:
    every, edges = list[LayerSums](), list[float]()
    with open_safetensors(path) as reader:
        document = _parse(reader.document(), path)
        _check_document(document, path)
        for layer in range(len(document.neurons)):
            sums, counts = _take_layer(reader, layer, document)
            _check_sums(document, layer, sums, path)
            edges.append(_check_counts(document, layer, sums, counts, path))
            every.append(replace(sums, counts=counts, histogram=None) if counts_alone else sums)
        thresholds = reader.take("thresholds", "F32", (len(document.neurons),))
        reader.finish()
    for layer, (stored, expected) in enumerate(zip(thresholds.tolist(), edges, strict=True)):
        if stored != expected:
            raise BadValue(path, f"thresholds[{layer}] is {stored}, the histograms give {expected}")
    fields = {
        name: getattr(document, name)
        for name in vars(document)
        if name not in ("neurons", "checkpoint", "expert_neurons")
    }
    return {**fields, "sums": tuple(every)}, document.checkpoint


def _parse(text: str, path: Path) -> ProfileDocument:
    document = parse_json(text, path)
    if type(document) is not dict or document.pop("format", None) != FORMAT:
        raise BadDocument(path, f'is not a profile: "format": "{FORMAT}" is missing')
    version = document.pop("version", None)
    if version != VERSION or type(version) is not int:
        raise UnsupportedVersion(
            path, f"is a profile of version {version!r}, {VERSION} is read; profile again"
        )
    return RecordReader(path).read(ProfileDocument, document)


def _take_layer(
    reader: SafetensorsReader, layer: int, document: ProfileDocument
) -> tuple[LayerSums, NDArray[np.uint64]]:
    neurons = document.neurons[layer]
    counts = reader.take(f"blk.{layer}.counts", "U64", (neurons,))
    histogram = None
    if not document.exact_zeros:
        histogram = reader.take(f"blk.{layer}.histogram", "U32", (neurons, BINS))
    gate = reader.take(f"blk.{layer}.gate_squares", "F64", (neurons,))
    up = reader.take(f"blk.{layer}.up_squares", "F64", (neurons,))
    inside, each = None, document.expert_neurons[layer] if document.expert_neurons else 0
    if each:
        inside = ExpertSums(
            tokens=reader.take(f"blk.{layer}.expert_tokens", "U64", (neurons,)),
            active=reader.take(f"blk.{layer}.expert_active", "U32", (neurons, each)),
        )
    return LayerSums(counts if histogram is None else None, histogram, gate, up, inside), counts


def _expert_neurons(profile: Profile) -> tuple[int, ...]:
    """As in :class:`ProfileDocument`."""
    counts = tuple(profile.expert_neurons(layer) for layer in range(profile.layers))
    return counts if any(counts) else ()


def _check_document(document: ProfileDocument, path: Path) -> None:
    def require(condition: bool, field: str, problem: str) -> None:
        if not condition:
            raise BadField(path, f"{field} {problem}")

    least = 0 if document.checkpoint else 1
    require(_is_digest(document.fingerprint), "fingerprint", "is not 64 hexadecimal digits")
    require(document.window > 0, "window", f"is {document.window}, expected 1 or more")
    require(
        least <= document.tokens <= _MAX_TOKENS,
        "tokens",
        f"is {document.tokens}, expected {least} to 2^32 − 1",
    )
    require(
        0 < document.target_density <= 1, "target_density", f"is {document.target_density}, expected (0, 1]"
    )
    require(1 <= len(document.neurons) <= MAX_LAYERS, "neurons", f"has {len(document.neurons)} layers")
    for layer, neurons in enumerate(document.neurons):
        require(1 <= neurons <= MAX_NEURONS, f"neurons[{layer}]", f"is {neurons}")
    _check_expert_neurons(document, require)
    for index, entry in enumerate(document.corpus):
        require(_is_digest(entry.sha256), f"corpus[{index}].sha256", "is not 64 hexadecimal digits")
        require(entry.tokens >= 0 and entry.bytes >= 0, f"corpus[{index}]", "has a negative size")
    keys = [corpus_key(entry) for entry in document.corpus]
    require(keys == sorted(set(keys)), "corpus", "is not sorted by name, or names a file twice")
    total = sum(entry.tokens for entry in document.corpus)
    require(total == document.tokens, "corpus", f"counts {total} tokens, the profile {document.tokens}")
    if document.checkpoint is not None:
        require(_is_digest(document.checkpoint.work), "checkpoint.work", "is not 64 hexadecimal digits")
        require(document.checkpoint.windows >= 0, "checkpoint.windows", "is negative")


def _check_expert_neurons(document: ProfileDocument, require: Callable[[bool, str, str], None]) -> None:
    counts = document.expert_neurons
    if not counts:
        return
    layers = len(document.neurons)
    require(len(counts) == layers, "expert_neurons", f"has {len(counts)} layers, expected {layers}")
    require(document.activation == ROUTING, "expert_neurons", "is of a profile that does not count experts")
    require(any(counts), "expert_neurons", "has nothing but zeros")
    for layer, neurons in enumerate(counts):
        require(0 <= neurons <= MAX_NEURONS, f"expert_neurons[{layer}]", f"is {neurons}")


def _check_sums(document: ProfileDocument, layer: int, sums: LayerSums, path: Path) -> None:
    def require(condition: bool, name: str, problem: str) -> None:
        if not condition:
            raise BadValue(path, f"tensor 'blk.{layer}.{name}' {problem}")

    neurons, tokens = document.neurons[layer], document.tokens
    exact = document.exact_zeros
    require(
        (sums.histogram is None) == exact and (sums.counts is None) != exact,
        "counts",
        "contradicts exact_zeros",
    )
    if sums.counts is not None:
        require(sums.counts.shape == (neurons,), "counts", f"has the shape {sums.counts.shape}")
        require(int(sums.counts.max()) <= tokens, "counts", f"has more than the {tokens} tokens there are")
    if sums.histogram is not None:
        require(sums.histogram.shape == (neurons, BINS), "histogram", f"has the shape {sums.histogram.shape}")
        totals = sums.histogram.sum(axis=1, dtype=np.uint64)
        require(
            bool((totals == tokens).all()), "histogram", f"has a neuron whose bins do not sum to {tokens}"
        )
    for name, squares in (("gate_squares", sums.gate_squares), ("up_squares", sums.up_squares)):
        require(squares.shape == (neurons,), name, f"has the shape {squares.shape}")
        inside = bool(((squares >= 0) & (squares < SQUARE_LIMIT)).all())
        require(inside, name, "has a value that is negative, not finite or above 2^37")
        on_grid = bool((np.rint(squares / SQUARE_GRID) * SQUARE_GRID == squares).all())
        require(on_grid, name, "has a value that is not a multiple of 2^-16 (see round_squares)")
    if sums.inside is not None:
        _check_inside(sums.inside, sums.counts, (neurons, document.expert_neurons[layer]), require)


def _check_inside(
    inside: ExpertSums,
    counts: NDArray[np.uint64] | None,
    shape: tuple[int, int],
    require: Callable[[bool, str, str], None],
) -> None:
    """``counts`` [experts]: the tokens that took each expert."""
    tokens, active = inside.tokens, inside.active
    require(tokens.shape == shape[:1], "expert_tokens", f"has the shape {tokens.shape}")
    require(active.shape == shape, "expert_active", f"has the shape {active.shape}")
    within = counts is not None and bool((tokens <= counts).all())
    require(within, "expert_tokens", "has more tokens of an expert than took it")
    possible = bool((active <= tokens[:, None]).all())
    require(possible, "expert_active", "has a neuron that was active for more tokens than were counted")


def _check_counts(
    document: ProfileDocument, layer: int, sums: LayerSums, counts: NDArray[np.uint64], path: Path
) -> float:
    """Thresholds and counts are in the file for other readers; they must be what the histograms give. Returns
    the threshold."""
    expected, expected_counts = 0.0, counts
    if sums.histogram is not None:
        first = threshold_bin(sums.histogram, document.target_density)
        expected, expected_counts = lower_edge(first), active_counts(sums.histogram, first)
    if not np.array_equal(counts, expected_counts):
        raise BadValue(path, f"tensor 'blk.{layer}.counts' is not what the histograms give")
    return expected


def _is_digest(text: str) -> bool:
    return len(text) == 64 and _HASH_DIGITS.issuperset(text)
