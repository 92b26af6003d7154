"""Reading a split file's description of itself: every key is checked against the sizes of its model."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np

from powerinfer_formats import errors
from powerinfer_formats import split_layout as names
from powerinfer_formats.block_types import BLOCK_SHAPES, TensorType
from powerinfer_formats.model_source import ModelSource
from powerinfer_formats.modes import EXPERT_MODES, MODES
from powerinfer_formats.split_devices import KEY_PREDICTOR, SplitDevices, read_devices
from powerinfer_formats.split_keys import KeyReader
from powerinfer_formats.split_layout import SplitHeader, SplitPrediction, SplitSizes
from powerinfer_formats.split_thresholds import KEY_FACTORS, read_thresholding


def read_sizes(gguf: ModelSource) -> SplitSizes:
    """The sizes that the model in a split file has, by its own metadata. Raises ``FormatError``."""
    architecture = gguf.get("general.architecture", str)

    def size(key: str, default: int | None = None) -> int:
        whole = f"{architecture}.{key}"
        if isinstance(gguf.metadata.get(whole), np.ndarray):  # of each layer
            return max(map(int, gguf.get(whole, np.ndarray)), default=0)
        value = gguf.get(whole, int) if default is None else gguf.get(whole, int, default)
        if not 0 <= value < 1 << 31:
            raise errors.BadValue(gguf.path, f"metadata {whole!r} is {value}")
        return value

    version = gguf.metadata.get(names.KEY_VERSION)
    claims = version in (names.EXPERTS_VERSION, names.MIXED_VERSION)
    layers, experts = size("block_count"), size("expert_count", None if claims else 0)
    layers -= size("nextn_predict_layers", 0)  # which predict further tokens
    if not experts:
        each = _each(gguf, f"{architecture}.feed_forward_length", layers)
        neurons = max(each) if each else size("feed_forward_length")
        return SplitSizes(layers, neurons, size("embedding_length"), each=each)
    each = _each(gguf, f"{architecture}.feed_forward_length", layers)
    others = {layer for layer in range(layers) if f"blk.{layer}.ffn_gate_inp.weight" not in gguf.tensors}
    without = {layer for layer in others if each and not each[layer]}
    dense = others - without if version == names.MIXED_VERSION else set[int]()
    shared = size("expert_shared_feed_forward_length", 0) > 0
    return SplitSizes(
        layers,
        size("expert_feed_forward_length", 0) or size("feed_forward_length"),
        size("embedding_length"),
        experts,
        shared or any(name.endswith(".ffn_up_shexp.weight") for name in gguf.tensors),
        frozenset(dense),
        size("feed_forward_length") if dense else 0,
        frozenset(without),
    )


def _each(gguf: ModelSource, key: str, layers: int) -> tuple[int, ...]:
    """The neurons of the FFN of each layer where the file says them one by one; those that predict further
    tokens come last."""
    listed = gguf.metadata.get(key)
    if not isinstance(listed, np.ndarray):
        return ()
    each = tuple(map(int, listed[:layers])) if listed.dtype.kind in "iu" else ()
    if len(each) < layers or min(each) < 0 or not 0 < max(each) < 1 << 31:
        raise errors.BadValue(gguf.path, f"metadata {key!r} does not say the neurons of each layer")
    return each


class HeaderReader(KeyReader):
    """Judges the header of one file."""

    def __init__(self, gguf: ModelSource, sizes: SplitSizes) -> None:
        super().__init__(gguf, sizes.layers)
        self.sizes = sizes
        self._sorted = frozenset[int]()  # the layers whose neurons are sorted

    def header(self) -> SplitHeader:
        """The whole header. Raises ``FormatError``."""
        gguf, version = self.gguf, self._version()
        if not self.sizes.experts:
            self._sorted = frozenset(filter(self.sizes.neurons_of, range(self.layers)))
        elif names.KEY_GROUP in gguf.metadata:
            self._sorted = self.sizes.dense
        units = self._neurons() if self._sorted else self._no_neurons()
        units |= self._experts(units) if self.sizes.experts else {}
        return SplitHeader(
            source_fingerprint=self.digest(names.KEY_SOURCE, gguf.get(names.KEY_SOURCE, str)),
            tool_version=gguf.get(names.KEY_TOOL_VERSION, str),
            corpus_hashes=tuple(
                self.digest(names.KEY_CORPUS_HASHES, text) for text in self.strings(names.KEY_CORPUS_HASHES)
            ),
            corpus_tokens=gguf.get(names.KEY_CORPUS_TOKENS, int),
            devices=self._devices(),
            columns=version in (names.COLUMNS_VERSION, names.MIXED_VERSION),
            **units,
        )

    def _version(self) -> int:
        """One that this program reads for such a model."""
        version, experts = self.gguf.get(names.KEY_VERSION, int), self.sizes.experts
        if version in (names.EXPERTS_VERSION, names.MIXED_VERSION) and not experts:
            self.fail(names.KEY_VERSION, f"is {version}, that of models with experts, which this one has not")
        if version == names.VERSION and experts:
            self.fail(names.KEY_VERSION, f"is {version}, that of models without experts; convert again")
        versions: tuple[int, ...] = (names.VERSION, names.COLUMNS_VERSION)
        if experts:
            versions = (names.MIXED_VERSION if self.sizes.dense else names.EXPERTS_VERSION,)
        if version not in versions:
            readable = " and ".join(map(str, versions)) + (" for models with experts" if experts else "")
            raise errors.UnsupportedVersion(
                self.gguf.path,
                f"is a split file of version {version}, this program reads {readable}; convert again",
            )
        return version

    def _experts(self, others: dict[str, Any]) -> dict[str, Any]:
        """What is said of experts alone, as fields of the header, and of ``others`` what changes."""
        sizes, neurons = self.sizes, others["hot_neurons"]
        for key, part in ((names.KEY_PREDICTORS, "prediction"), (KEY_FACTORS, "thresholding")):
            if others.get(part) is not None:
                self.fail(key, "is there, but models with experts have neither predictors nor thresholds")
        hot = self._counts(names.KEY_HOT_EXPERTS, self._units)
        each = [
            sizes.neurons if sizes.routed(layer) else sizes.neurons_of(layer) for layer in range(self.layers)
        ]
        return {
            "experts": sizes.experts,
            "group": sizes.neurons,
            "hot_neurons": tuple(
                count * size + more for count, size, more in zip(hot, each, neurons, strict=True)
            ),
            "hot_shared": self._hot_shared(),
            "expert_gate": bool(self.gguf.get(names.KEY_EXPERT_GATE, bool, default=True)),
            "dense": tuple(sorted(sizes.dense)),
            "dense_neurons": sizes.dense_neurons,
            "dense_group": others["group"],
        }

    def _units(self, layer: int) -> int:
        """How many experts a layer has; an FFN that is not sorted is one."""
        if self.sizes.routed(layer):
            return self.sizes.experts
        return 0 if layer in self._sorted else min(1, self.sizes.neurons_of(layer))

    def _no_neurons(self) -> dict[str, Any]:
        """The same fields as of neurons, where none are sorted."""
        return {
            "group": 0,
            "hot_neurons": (0,) * self.layers,
            "modes": self._modes() if names.KEY_MODE in self.gguf.metadata else ("dense",) * self.layers,
            "activation": "",
            "types": (),
            "requantization_error": (),
        }

    def _neurons(self) -> dict[str, Any]:
        """What is said of groups of neurons alone, as fields of the header."""
        gguf, group = self.gguf, self.gguf.get(names.KEY_GROUP, int)
        if not 1 <= group <= self.sizes.most_neurons:
            self.fail(names.KEY_GROUP, f"is {group}, expected 1 to {self.sizes.most_neurons}")
        return {
            "group": group,
            "hot_neurons": self._hot_neurons(group),
            "modes": self._modes(),
            "activation": gguf.get(names.KEY_ACTIVATION, str),
            "types": self._types(),
            "requantization_error": self._errors(),
            "prediction": self._prediction(),
            "thresholding": read_thresholding(gguf, self.layers),
        }

    def _devices(self) -> SplitDevices:
        devices = read_devices(self.gguf, self.layers)
        if self.sizes.experts and "gpu" in devices.predictor:
            self.fail(KEY_PREDICTOR, "has a 'gpu', but models with experts have no predictors")
        return devices

    def _hot_shared(self) -> tuple[bool, ...]:
        if not self.sizes.shared:
            if names.KEY_HOT_SHARED in self.gguf.metadata:
                self.fail(names.KEY_HOT_SHARED, "is there, but the model has no shared expert")
            return ()
        return tuple(bool(value) for value in self._counts(names.KEY_HOT_SHARED, self.sizes.routed))

    def _counts(self, key: str, most: Callable[[int], int]) -> tuple[int, ...]:
        """One count for each layer, of which it has ``most``."""
        counts = self.integers(key)
        for layer, count in enumerate(self.per_layer(key, counts)):
            if count > most(layer):
                self.fail(key, f"has {count} for layer {layer}, expected 0 to {int(most(layer))}")
        return tuple(counts)

    def _modes(self) -> tuple[str, ...]:
        modes = self.strings(names.KEY_MODE)
        for layer, mode in enumerate(self.per_layer(names.KEY_MODE, modes)):
            modes_here: tuple[str, ...] = MODES if layer in self._sorted else ("dense",)
            if self.sizes.experts and self.sizes.routed(layer):
                modes_here = EXPERT_MODES
            if mode not in modes_here:
                self.fail(
                    names.KEY_MODE, f"has {mode!r} for layer {layer}, known are {', '.join(modes_here)}"
                )
        return tuple(modes)

    def _prediction(self) -> SplitPrediction | None:
        """What the file says of its predictors; without the first key, nothing may be said."""
        keys = (names.KEY_PREDICTOR_RECALL, names.KEY_PREDICTOR_DENSITY)
        if names.KEY_PREDICTORS not in self.gguf.metadata:
            for key in (*keys, names.KEY_PREDICTION_COST):
                if key in self.gguf.metadata:
                    self.fail(key, "is there, but no predictor is")
            return None
        kinds = self.per_layer(names.KEY_PREDICTORS, self.strings(names.KEY_PREDICTORS))
        for layer, kind in enumerate(kinds):
            if kind not in names.PREDICTOR_TENSORS:
                supported = ", ".join(names.PREDICTOR_TENSORS)
                self.fail(names.KEY_PREDICTORS, f"has {kind!r} for layer {layer}, known are {supported}")
        recall, density = (self.floats(key) for key in keys)
        for key, values in zip(keys, (recall, density), strict=True):
            if values and max(self.per_layer(key, values)) > 1:
                self.fail(key, "has a share above 1")
        if len(recall) != len(density):
            self.fail(keys[0], "and the predicted density are not of the same layers")
        cost = None
        if names.KEY_PREDICTION_COST in self.gguf.metadata:
            cost = self.floats(names.KEY_PREDICTION_COST)
            if len(cost) != 4:
                self.fail(names.KEY_PREDICTION_COST, f"has {len(cost)} values, expected 4")
        return SplitPrediction(tuple(kinds), recall, density, cost)  # type: ignore[arg-type]

    def _hot_neurons(self, group: int) -> tuple[int, ...]:
        hot = self.integers(names.KEY_HOT_NEURONS)
        for layer, count in enumerate(self.per_layer(names.KEY_HOT_NEURONS, hot)):
            neurons = self.sizes.neurons_of(layer) if layer in self._sorted else 0
            if count > neurons or (count % group and count != neurons):
                self.fail(
                    names.KEY_HOT_NEURONS,
                    f"has {count} for layer {layer}, expected a multiple of {group} up to {neurons}, or all",
                )
        return tuple(hot)

    def _types(self) -> tuple[tuple[TensorType, ...], ...]:
        """Three of each sorted layer, or two where the FFNs have no gate; none of others."""
        numbers, layers = self.integers(names.KEY_FFN_TYPES), len(self._sorted)
        count = next((some for some in (3, 2) if len(numbers) == some * layers), 0)
        if not count:
            self.fail(
                names.KEY_FFN_TYPES,
                f"has {len(numbers)} values, expected 3 (without gate: 2) for each of {layers} layers",
            )
        for number in numbers:
            if number not in BLOCK_SHAPES:
                self.fail(names.KEY_FFN_TYPES, f"has the type {number}, which ggml does not define")
        kinds = iter([TensorType(number) for number in numbers])
        counts = (count if layer in self._sorted else 0 for layer in range(self.layers))
        return tuple(tuple(islice(kinds, some)) for some in counts)

    def _errors(self) -> tuple[float, ...]:
        key = names.KEY_REQUANTIZATION_ERROR
        return tuple(self.per_layer(key, self.floats(key)))
