"""Reading what a split file says about itself: every key judged against the sizes that its model has."""

from __future__ import annotations

from typing import Any

from powerinfer_formats import errors
from powerinfer_formats import split_layout as names
from powerinfer_formats.block_types import BLOCK_SHAPES, TensorType
from powerinfer_formats.model_source import ModelSource
from powerinfer_formats.modes import MODES
from powerinfer_formats.split_devices import KEY_PREDICTOR, SplitDevices, read_devices
from powerinfer_formats.split_keys import KeyReader
from powerinfer_formats.split_layout import SplitHeader, SplitPrediction, SplitSizes
from powerinfer_formats.split_thresholds import read_thresholding


def read_sizes(gguf: ModelSource) -> SplitSizes:
    """The sizes that the model in a split file has, by its own metadata. Raises ``FormatError``."""
    architecture = gguf.get("general.architecture", str)

    def size(key: str, default: int | None = None) -> int:
        whole = f"{architecture}.{key}"
        value = gguf.get(whole, int) if default is None else gguf.get(whole, int, default)
        if not 0 <= value < 1 << 31:
            raise errors.BadValue(gguf.path, f"metadata {whole!r} is {value}")
        return value

    layers, claims = size("block_count"), gguf.metadata.get(names.KEY_VERSION) == names.EXPERTS_VERSION
    experts = size("expert_count", None if claims else 0)
    neurons = (size("expert_feed_forward_length", 0) if experts else 0) or size("feed_forward_length")
    shared = bool(experts) and size("expert_shared_feed_forward_length", 0) > 0
    return SplitSizes(layers, neurons, size("embedding_length"), experts, shared)


class HeaderReader(KeyReader):
    """Judges the header of one file."""

    def __init__(self, gguf: ModelSource, sizes: SplitSizes) -> None:
        super().__init__(gguf, sizes.layers)
        self.sizes = sizes

    def header(self) -> SplitHeader:
        """All that the file says. Raises ``FormatError``."""
        gguf, version = self.gguf, self._version()
        units = self._experts() if self.sizes.experts else self._neurons()
        return SplitHeader(
            source_fingerprint=self.digest(names.KEY_SOURCE, gguf.get(names.KEY_SOURCE, str)),
            tool_version=gguf.get(names.KEY_TOOL_VERSION, str),
            corpus_hashes=tuple(
                self.digest(names.KEY_CORPUS_HASHES, text) for text in self.strings(names.KEY_CORPUS_HASHES)
            ),
            corpus_tokens=gguf.get(names.KEY_CORPUS_TOKENS, int),
            devices=self._devices(),
            columns=version == names.COLUMNS_VERSION,
            **units,
        )

    def _version(self) -> int:
        """One that this program reads for such a model."""
        version, experts = self.gguf.get(names.KEY_VERSION, int), self.sizes.experts
        if version == names.EXPERTS_VERSION and not experts:
            self.fail(names.KEY_VERSION, f"is {version}, that of models with experts, which this one has not")
        if version == names.VERSION and experts:
            self.fail(names.KEY_VERSION, f"is {version}, that of models without experts; convert again")
        versions = (names.EXPERTS_VERSION,) if experts else (names.VERSION, names.COLUMNS_VERSION)
        if version not in versions:
            readable = " and ".join(map(str, versions)) + (" for models with experts" if experts else "")
            raise errors.UnsupportedVersion(
                self.gguf.path,
                f"is a split file of version {version}, this program reads {readable}; convert again",
            )
        return version

    def _experts(self) -> dict[str, Any]:
        """What is said of experts alone, as fields of the header."""
        group = self.sizes.neurons
        hot = self._counts(names.KEY_HOT_EXPERTS, self.sizes.experts)
        return {
            "experts": self.sizes.experts,
            "group": group,
            "hot_neurons": tuple(count * group for count in hot),
            "hot_shared": self._hot_shared(),
            "modes": ("dense",) * self.layers,
            "activation": "",
            "types": (),
            "requantization_error": (),
        }

    def _neurons(self) -> dict[str, Any]:
        """What is said of groups of neurons alone, as fields of the header."""
        gguf, group = self.gguf, self.gguf.get(names.KEY_GROUP, int)
        if not 1 <= group <= self.sizes.neurons:
            self.fail(names.KEY_GROUP, f"is {group}, expected 1 to {self.sizes.neurons}")
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
        return tuple(bool(value) for value in self._counts(names.KEY_HOT_SHARED, 1))

    def _counts(self, key: str, most: int) -> tuple[int, ...]:
        counts = self.integers(key)
        for layer, count in enumerate(self.per_layer(key, counts)):
            if count > most:
                self.fail(key, f"has {count} for layer {layer}, expected 0 to {most}")
        return tuple(counts)

    def _modes(self) -> tuple[str, ...]:
        modes = self.strings(names.KEY_MODE)
        for layer, mode in enumerate(self.per_layer(names.KEY_MODE, modes)):
            if mode not in MODES:
                self.fail(names.KEY_MODE, f"has {mode!r} for layer {layer}, known are {', '.join(MODES)}")
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
                known = ", ".join(names.PREDICTOR_TENSORS)
                self.fail(names.KEY_PREDICTORS, f"has {kind!r} for layer {layer}, known are {known}")
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
            if count > self.sizes.neurons or (count % group and count != self.sizes.neurons):
                self.fail(
                    names.KEY_HOT_NEURONS,
                    f"has {count} for layer {layer}, "
                    f"expected a multiple of {group} up to {self.sizes.neurons}, or all",
                )
        return tuple(hot)

    def _types(self) -> tuple[tuple[TensorType, ...], ...]:
        """Three of each layer, or two of each where the FFNs have no gate."""
        numbers = self.integers(names.KEY_FFN_TYPES)
        count = next((some for some in (3, 2) if len(numbers) == some * self.layers), 0)
        if not count:
            self.fail(
                names.KEY_FFN_TYPES,
                f"has {len(numbers)} values, expected 3 (without gate: 2) for each of {self.layers} layers",
            )
        for number in numbers:
            if number not in BLOCK_SHAPES:
                self.fail(names.KEY_FFN_TYPES, f"has the type {number}, which ggml does not define")
        kinds = [TensorType(number) for number in numbers]
        return tuple(tuple(kinds[i : i + count]) for i in range(0, len(kinds), count))

    def _errors(self) -> tuple[float, ...]:
        key = names.KEY_REQUANTIZATION_ERROR
        return tuple(self.per_layer(key, self.floats(key)))
