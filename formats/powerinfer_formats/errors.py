"""One named error per fault a file can have.

Every message says what is wrong, what was expected, what was found and in which file. Callers catch
``FormatError``; tests (and careful callers) tell the faults apart by class.
"""

from __future__ import annotations

import os
from pathlib import Path


class FormatError(Exception):
    """A file breaks the rules of its format. ``file`` is the file, ``problem`` the sentence about it."""

    def __init__(self, file: str | os.PathLike[str], problem: str) -> None:
        super().__init__(file, problem)
        self.file = Path(file)
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.file}: {self.problem}"


# --- the file as a whole -----------------------------------------------------------------------------


class CannotRead(FormatError):
    """The operating system refused to open or map the file."""


class CannotWrite(FormatError):
    """The operating system refused to create, fill or rename the file (no space, no permission, ...)."""


class BeingWritten(FormatError):
    """Another process is writing the same file at this moment."""


class NotARegularFile(FormatError):
    """A directory, pipe, socket or device where a file is needed."""


class MissingFile(FormatError):
    """A directory without a file that it needs."""


class MissingShard(FormatError):
    """A file of a model in shards, some of whose other files are not beside it."""


class BadShard(FormatError):
    """Files of a model in shards that contradict each other, their names or their own counts."""


class BadMagic(FormatError):
    """The first bytes are not those of this format."""


class BigEndianFile(FormatError):
    """A GGUF file in big-endian byte order."""


class UnsupportedVersion(FormatError):
    """A version of the format that this program does not read."""


class TruncatedFile(FormatError):
    """The file is shorter than its own counts and lengths announce."""


class FileChanged(FormatError):
    """The file was changed in place while it was in use."""


class TrailingBytes(FormatError):
    """The file goes on after its last tensor."""


# --- metadata ----------------------------------------------------------------------------------------


class TooManyEntries(FormatError):
    """More metadata entries than the file can hold or than the cap allows."""


class TooManyTensors(FormatError):
    """More tensors than the file can hold or than the cap allows."""


class EmptyKey(FormatError):
    """A metadata key of zero bytes."""


class KeyTooLong(FormatError):
    """A metadata key above the cap."""


class BadKey(FormatError):
    """A metadata key with control characters."""


class DuplicateKey(FormatError):
    """The same key twice."""


class InvalidUTF8(FormatError):
    """Text that is not UTF-8."""


class StringTooLong(FormatError):
    """A string above the cap."""


class ArrayTooLong(FormatError):
    """An array above the cap."""


class UnknownValueType(FormatError):
    """A metadata value type that GGUF does not define."""


class NestedArray(FormatError):
    """An array of arrays."""


class BadAlignment(FormatError):
    """``general.alignment`` is of the wrong type, not a power of two, too small or too large."""


class MissingKey(FormatError):
    """A required metadata key is missing."""


class WrongKeyType(FormatError):
    """A metadata value of another type than the one needed."""


class BadValue(FormatError):
    """A value of the right type that makes no sense (out of range, contradicting another)."""


# --- tensors -----------------------------------------------------------------------------------------


class EmptyTensorName(FormatError):
    """A tensor without a name."""


class TensorNameTooLong(FormatError):
    """A tensor name above the cap."""


class BadTensorName(FormatError):
    """A tensor name with control characters."""


class DuplicateTensor(FormatError):
    """The same tensor name twice."""


class BadDimensionCount(FormatError):
    """A tensor with no dimension or with more than four."""


class BadDimension(FormatError):
    """A dimension that is zero or negative."""


class TensorTooLarge(FormatError):
    """The number of values or bytes of a tensor does not fit into 63 bits."""


class UnknownTensorType(FormatError):
    """A tensor type that ggml does not define (any more)."""


class PartialBlock(FormatError):
    """Rows that are not a whole number of quantisation blocks."""


class UnalignedTensor(FormatError):
    """A tensor offset that is not a multiple of the alignment."""


class OverlappingTensors(FormatError):
    """A tensor that starts inside the one before it."""


class TensorsOutOfOrder(FormatError):
    """A tensor that starts before the one listed before it."""


class GapBetweenTensors(FormatError):
    """Bytes between two tensors that belong to neither and are not padding."""


class TensorPastEnd(FormatError):
    """A tensor that reaches past the end of the file."""


class MissingTensor(FormatError):
    """A required tensor is missing."""


class UnexpectedTensor(FormatError):
    """A tensor that must not be there."""


class WrongShape(FormatError):
    """A tensor of another shape than the one needed."""


class WrongType(FormatError):
    """A tensor of a type that cannot be used where it is needed."""


# --- files of our own --------------------------------------------------------------------------------


class BadDocument(FormatError):
    """JSON or TOML that does not parse, or is nested or large beyond reason."""


class BadField(FormatError):
    """A field of a document is missing, unknown, of the wrong type or out of range; names its path."""


class BadSafetensors(FormatError):
    """Not a safetensors file, or one whose header contradicts itself."""


class BadProtobuf(FormatError):
    """A SentencePiece model that is not a valid protocol buffer of that kind."""


class BadFrame(FormatError):
    """A zstd frame of a trace, or the table of them, is damaged or of another size than announced."""


class NotASplitFile(FormatError):
    """A GGUF file without the ``powerinfer.*`` keys."""


class NotAPermutation(FormatError):
    """A neuron order that leaves a neuron out or names one twice."""


class UnfinishedProfile(FormatError):
    """A checkpoint where a finished profile is needed, or the other way round."""


class OtherModel(FormatError):
    """A file that was made for another model."""


class CannotMerge(FormatError):
    """Profiles that do not belong together."""


class WriteOrder(FormatError):
    """The writer was handed data that contradicts what was declared; a fault of the calling code."""
