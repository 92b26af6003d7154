"""Where a split file's plan puts everything but neurons: attention with its KV cache, predictors, head."""

from __future__ import annotations

from dataclasses import dataclass

from powerinfer_formats import errors
from powerinfer_formats.gguf_layout import ValueType
from powerinfer_formats.gguf_reader import StringArray
from powerinfer_formats.gguf_writer import GGUFWriter
from powerinfer_formats.model_source import ModelSource

KEY_ATTENTION = "powerinfer.attention_device"
KEY_PREDICTOR = "powerinfer.predictor_device"
KEY_HEAD = "powerinfer.head_device"
DEVICES = ("cpu", "gpu")


@dataclass(frozen=True)
class SplitDevices:
    """ "gpu" (the hot device) or "cpu" for the attention block of each layer, which takes the KV cache along,
    for the predictor of each layer, and for the output norm with the head."""

    attention: tuple[str, ...]
    predictor: tuple[str, ...]
    head: str

    @property
    def all_cpu(self) -> bool:
        """Whether no part is on the hot device."""
        return {*self.attention, *self.predictor, self.head} == {"cpu"}

    def write(self, writer: GGUFWriter) -> None:
        """Add the keys; a file with all parts on the CPU has none."""
        if self.all_cpu:
            return
        writer.add(KEY_ATTENTION, self.attention, ValueType.STRING)
        writer.add(KEY_PREDICTOR, self.predictor, ValueType.STRING)
        writer.add(KEY_HEAD, self.head)


def all_on_cpu(layers: int) -> SplitDevices:
    """The meaning of a file without the keys."""
    return SplitDevices(("cpu",) * layers, ("cpu",) * layers, "cpu")


def read_devices(gguf: ModelSource, layers: int) -> SplitDevices:
    """The devices in the header. Raises ``FormatError``."""
    keys = (KEY_ATTENTION, KEY_PREDICTOR, KEY_HEAD)
    if not any(key in gguf.metadata for key in keys):
        return all_on_cpu(layers)
    attention, predictor = (tuple(gguf.get(key, StringArray)) for key in keys[:2])
    head = gguf.get(KEY_HEAD, str)
    for key, devices, count in zip(keys, (attention, predictor, (head,)), (layers, layers, 1), strict=True):
        if len(devices) != count or not set(devices) <= set(DEVICES):
            raise errors.BadValue(
                gguf.path,
                f"metadata {key!r} must have one of {', '.join(DEVICES)} for each of {layers} layers"
                if key != KEY_HEAD
                else f"metadata {key!r} is {head!r}, expected {' or '.join(DEVICES)}",
            )
    return SplitDevices(attention, predictor, head)
