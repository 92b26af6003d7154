"""Folders of ``.pt`` files, one for each layer, as the original PowerInfer writes them.

Files are keyed by the layer number in their name: sorted by name, as the original does, ``model_10.pt`` comes
before ``model_2.pt``. They are hostile: nothing but tensors is unpickled, and sizes and shapes are judged
before any tensor is copied. torch is imported here alone.
"""

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from powerinfer_formats.profile import MAX_TOKENS
from powerinfer_tools.errors import ImportFailed, how_to_install

if TYPE_CHECKING:
    import torch

Floats = npt.NDArray[np.float32]
#: Largest file that is read: four times the predictor of a 70B model's layer.
MAX_FILE_BYTES = 2 << 30
#: Most entries of one file's archive, which has one for each tensor and a handful besides.
MAX_ENTRIES = 64


def layer_files(folder: Path, stem: str, layers: int) -> list[Path]:
    """``folder/STEM_i.pt`` of layers 0 to ``layers`` − 1, in order of their numbers.

    Raises ImportFailed, with the names, for layers that are missing, there twice, or too many.
    """
    if not folder.is_dir():
        raise ImportFailed(f"{folder}: no such folder; it has to hold {stem}_0.pt to {stem}_{layers - 1}.pt")
    files: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        match = re.fullmatch(rf"{stem}_([0-9]{{1,6}})\.pt", path.name)
        if match is None:
            continue
        other = files.setdefault(int(match[1]), path)
        if other is not path:
            raise ImportFailed(f"{folder}: {other.name} and {path.name} are both of layer {int(match[1])}")
    if not files:
        raise ImportFailed(f"{folder} holds no file named {stem}_0.pt, {stem}_1.pt and so on")
    missing = [index for index in range(layers) if index not in files]
    if missing:
        raise ImportFailed(
            f"{folder} lacks {_listed(stem, missing)}; the model has {layers} layers, numbered from 0"
        )
    extra = sorted(index for index in files if index >= layers)
    if extra:
        raise ImportFailed(f"{folder} has {_listed(stem, extra)}, but the model has {layers} layers")
    return [files[index] for index in range(layers)]


def _listed(stem: str, layers: list[int]) -> str:
    shown = ", ".join(f"{stem}_{index}.pt" for index in layers[:8])
    return shown + (f" and {len(layers) - 8} more" if len(layers) > 8 else "")


def load_predictor(path: Path, width: int, neurons: int) -> tuple[Floats, Floats]:
    """``fc1.weight`` (rank, width) and ``fc2.weight`` (neurons, rank) of one layer, as float32."""
    state = _load(path)
    names = ("fc1.weight", "fc2.weight")
    if not isinstance(state, Mapping) or set(state) != set(names):
        content = ", ".join(map(str, list(state)[:4])) if isinstance(state, Mapping) else type(state).__name__
        raise ImportFailed(
            f"{path} holds {content or 'nothing'}, expected a state dict of {' and '.join(names)} alone"
        )
    first, second = (_plain(state[name], f"{path}: {name}", 2) for name in names)
    rank = first.shape[0]
    if not 1 <= rank <= max(width, neurons) or first.shape[1] != width:
        raise ImportFailed(f"{path}: fc1.weight is {_shape(first)}, expected (rank, {width})")
    if tuple(second.shape) != (neurons, rank):
        raise ImportFailed(f"{path}: fc2.weight is {_shape(second)}, expected ({neurons}, {rank})")
    inward, outward = (tensor.float().contiguous().numpy() for tensor in (first, second))
    if not (np.isfinite(inward).all() and np.isfinite(outward).all()):
        raise ImportFailed(f"{path} has weights that are not finite")
    return inward, outward


def load_counts(path: Path, neurons: int) -> npt.NDArray[np.uint64]:
    """How often each neuron of one layer was active: uint64 [neurons]."""
    tensor = _plain(_load(path), f"{path}", 1)
    if tuple(tensor.shape) != (neurons,):
        raise ImportFailed(f"{path} is {_shape(tensor)}, expected one count for each of {neurons} neurons")
    counts = tensor.double().numpy()
    if not np.isfinite(counts).all() or (counts < 0).any() or (counts != np.rint(counts)).any():
        raise ImportFailed(f"{path} has values that are no counts (whole numbers from 0 on)")
    if (counts > MAX_TOKENS).any():
        raise ImportFailed(f"{path} has counts beyond {MAX_TOKENS:,}, which is all that a profile can count")
    return counts.astype(np.uint64)


def _load(path: Path) -> Any:
    try:
        import torch
    except ImportError as error:
        raise ImportFailed(
            f"{path}: reading .pt files needs torch, which is not installed ({error}); "
            f"{how_to_install('torch')}"
        ) from None
    _check_archive(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001  # whatever a forged file makes the unpickler raise
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it names {named[1]}" if named else type(error).__name__
        raise ImportFailed(
            f"{path} is refused: it is damaged, or holds more than tensors, which could run code ({reason})"
        ) from None


def _check_archive(path: Path) -> None:
    """torch.save writes a zip archive of stored entries: nothing can grow when it is read."""
    try:
        size = path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError):
        raise ImportFailed(f"{path} is not a file of torch.save (a zip archive, since torch 1.6)") from None
    if size > MAX_FILE_BYTES or len(entries) > MAX_ENTRIES:
        raise ImportFailed(
            f"{path} has {size} bytes and {len(entries)} entries; one layer has at most {MAX_FILE_BYTES} "
            f"and {MAX_ENTRIES}"
        )
    packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
    if packed or sum(entry.file_size for entry in entries) > size:
        raise ImportFailed(f"{path} is refused: its archive unpacks to more than it is")


def _plain(value: Any, what: str, dimensions: int) -> "torch.Tensor":
    """``value`` if it is an ordinary tensor of real numbers that holds all that its shape claims."""
    import torch

    kinds = (
        torch.float32, torch.float16, torch.bfloat16, torch.float64,
        torch.int64, torch.int32, torch.int16, torch.uint8,
    )  # fmt: skip
    if not isinstance(value, torch.Tensor):
        raise ImportFailed(f"{what} is of type {type(value).__name__}, expected a tensor")
    if value.layout != torch.strided or value.is_meta or value.dtype not in kinds:
        raise ImportFailed(f"{what} is a tensor of {value.dtype}, expected plain numbers")
    if value.dim() != dimensions:
        raise ImportFailed(f"{what} has {value.dim()} dimensions, expected {dimensions}")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise ImportFailed(f"{what} claims {value.numel()} values, more than the file holds")
    return value.detach()


def _shape(tensor: "torch.Tensor") -> str:
    return "(" + ", ".join(map(str, tensor.shape)) + ")"
