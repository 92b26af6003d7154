"""Reading the keys of a split file, of either kind, each with the errors that it can have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn, TypeVar

import numpy as np
from numpy.typing import NDArray

from powerinfer_formats import errors
from powerinfer_formats.block_types import TensorType
from powerinfer_formats.gguf_reader import StringArray
from powerinfer_formats.model_source import ModelSource

T = TypeVar("T")
_HASH_DIGITS = frozenset("0123456789abcdef")


class KeyReader:
    """Typed access to the keys of one file, for a model of so many layers."""

    def __init__(self, gguf: ModelSource, layers: int) -> None:
        self.gguf = gguf
        self.layers = layers

    def strings(self, key: str) -> list[str]:
        """A list of texts."""
        return list(self.gguf.get(key, StringArray))

    def integers(self, key: str) -> list[int]:
        """A list of u32."""
        values = self.gguf.get(key, np.ndarray)
        if values.dtype != np.uint32:
            raise errors.WrongKeyType(
                self.gguf.path, f"metadata {key!r} has {values.dtype} values, expected UINT32"
            )
        return [int(value) for value in values]

    def floats(self, key: str) -> tuple[float, ...]:
        """A list of f32, finite and not negative."""
        values = self.gguf.get(key, np.ndarray)
        if values.dtype != np.float32:
            raise errors.WrongKeyType(
                self.gguf.path, f"metadata {key!r} has {values.dtype} values, expected FLOAT32"
            )
        if not np.isfinite(values).all() or (values < 0).any():
            self.fail(key, "has a value that is not finite or is negative")
        return tuple(values.tolist())

    def per_layer(self, key: str, values: Sequence[T]) -> Sequence[T]:
        """The same values, of which there must be one for each layer."""
        if len(values) != self.layers:
            self.fail(key, f"has {len(values)} values, expected one for each of {self.layers} layers")
        return values

    def digest(self, key: str, text: str) -> str:
        """The same text, which must be a SHA-256."""
        if len(text) != 64 or not _HASH_DIGITS.issuperset(text):
            self.fail(key, f"is {text!r}, expected 64 hexadecimal digits")
        return text

    def absent(self, name: str, why: str) -> None:
        """Refuse a tensor that must not be there."""
        if name in self.gguf.tensors:
            raise errors.UnexpectedTensor(
                self.gguf.path, f"has a tensor {name!r}, which must not be there: {why}"
            )

    def permutation(self, name: str, count: int, what: str) -> NDArray[np.int32]:
        """An order of ``count`` things, ``what`` in words."""
        order = self.gguf.tensor(name, shape=(count,), types={TensorType.I32}).view("<i4")
        counted = np.zeros(count, np.bool_)
        counted[order[(order >= 0) & (order < count)]] = True
        if not counted.all():
            missing = int(np.flatnonzero(~counted)[0])
            raise errors.NotAPermutation(
                self.gguf.path,
                f"tensor {name!r} is not a permutation of {count} {what}: {missing} is missing",
            )
        return order

    def fail(self, key: str, problem: str) -> NoReturn:
        """Refuse the value of a key."""
        raise errors.BadValue(self.gguf.path, f"metadata {key!r} {problem}")
