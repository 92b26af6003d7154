"""Whether a model runs from disk, and what its experts then get of the memory that it may take."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from powerinfer_formats.profile import ROUTING, Profile
from powerinfer_formats.shard_names import model_name
from powerinfer_formats.split import SplitLayer
from powerinfer_kernels import Pool
from powerinfer_tools.detect import available_ram_bytes, resident_bytes
from powerinfer_tools.engine.layers_on_disk import LayersOnDisk
from powerinfer_tools.engine.memory import MARGIN, require_memory
from powerinfer_tools.engine.modes import layer_modes
from powerinfer_tools.engine.neurons_on_disk import NeuronsOnDisk
from powerinfer_tools.engine.residency import Residency
from powerinfer_tools.engine.weights_on_disk import Budget, WeightsOnDisk
from powerinfer_tools.errors import ModelError
from powerinfer_tools.model.ffn_matrices import DenseFFN, ExpertsFFN
from powerinfer_tools.model.footprint import footprint_of
from powerinfer_tools.model.loading import Model

#: How experts get their places in memory: by the profile alone, or by what tokens take.
Placing = Literal["static", "adaptive"]
#: What a process takes beside what is counted: sampling, logits, text, what the allocator keeps.
_SLACK = 24 << 20
#: The share of the memory that buffers of a pass may take, before passes get shorter.
_SCRATCH_SHARE = 1 / 12
_MIB = 1 << 20


@dataclass(frozen=True)
class RamOptions:
    """The memory that the process may take (None: what is free), and how experts get their places in it.
    ``profile`` says how often each was taken (None: the one beside the model, where there is one)."""

    ram: int | None = None
    placing: Placing = "adaptive"
    profile: Path | None = None


@dataclass(frozen=True)
class FromDisk:
    """A model whose experts, or FFNs, are read from disk, and what is to be said about that."""

    residency: WeightsOnDisk
    budget: Budget
    notices: tuple[str, ...]


def open_from_disk(
    model: Model,
    pool: Pool,
    options: RamOptions,
    *,
    context: int,
    kv_type: str,
    batch: int,
    device: str,
    mode: str | None = None,
    shared: int = 0,
) -> FromDisk | None:
    """How ``model`` runs from disk; None where all of it fits in the memory that it may take, ``shared``
    bytes of which are in memory already.

    Raises ModelError where it does not fit and cannot be read from disk, or where the memory does not do for
    that either.
    """
    ram, size = options.ram, _Size(model, context, kv_type)
    if ram is None:
        available = available_ram_bytes()
        if (
            not available
            or size.weights + size.cache - shared + MARGIN <= available
            or not _by_itself(model, mode)
            or not _can(model, device)
        ):
            if device != "cuda":  # the layers judge it when they know what the GPU holds
                require_memory(model, context, kv_type, available, shared)
            return None
        ram = resident_bytes() + available - MARGIN
    elif resident_bytes() + size.weights + size.cache + size.scratch(batch) + _SLACK <= ram:
        return None
    elif not _can(model, device):
        raise ModelError(_refusal(model, size, ram, device))
    residency = _on_disk(model, pool, mode)
    try:
        frequencies, notices = _frequencies(model, options)
        disk = _fit(model, residency, frequencies, size, ram, batch)
        budget = replace(disk.budget, static=options.placing == "static")
        return replace(disk, budget=budget, notices=(*disk.notices, *notices))
    except BaseException:
        residency.close()
        raise


def _on_disk(model: Model, pool: Pool, mode: str | None) -> WeightsOnDisk:
    if model.hyper.routing is not None:
        return Residency(model, pool)
    return LayersOnDisk(model, pool) if model.is_source else NeuronsOnDisk(model, pool, mode)


def _frequencies(
    model: Model, options: RamOptions
) -> tuple[Sequence[npt.NDArray[np.float64]] | None, tuple[str, ...]]:
    """How often each unit is taken, by layer, as far as that is known, and what is to be said."""
    if model.hyper.routing is not None:
        table, notices = expert_frequencies(model, options)
        return None if table is None else list(table), notices
    return (None, ()) if model.split is None else neuron_frequencies(model, options)


def neuron_frequencies(
    model: Model, options: RamOptions
) -> tuple[Sequence[npt.NDArray[np.float64]] | None, tuple[str, ...]]:
    """The share of tokens for which each neuron of a split file was active, in its order, by the profile of
    its source; None without one. Raises ModelError for a named profile that is of another model, FormatError
    for one that cannot be read."""
    path, split = options.profile or profile_beside(model.path), model.split
    assert split is not None
    if not path.exists() and options.profile is None:
        return None, ()
    profile = Profile.load(path)
    if profile.fingerprint == split.source_fingerprint:
        return [profile.frequency(layer.index)[layer.order] for layer in split.layers], ()
    if options.profile is not None:
        raise ModelError(f"{model.path}: {path} is the profile of another model ({profile.model_name})")
    return None, ()


def expert_frequencies(
    model: Model, options: RamOptions
) -> tuple[npt.NDArray[np.float64] | None, tuple[str, ...]]:
    """The share of tokens that took each expert (layers, experts), by the profile, and what is to be said.

    Raises ModelError for a named profile that is of another model, and for a static placement without
    one; FormatError for one that cannot be read.
    """
    path = options.profile or profile_beside(model.path)
    problem = "there is none beside it; powerinfer profile makes one, or run --learn"
    if path.exists() or options.profile is not None:
        profile = Profile.load(path)
        if profile.activation == ROUTING and profile.fingerprint == model.fingerprint:
            return _table(model, profile), (f"experts are placed by {path.name} ({profile.tokens:,} tokens)",)
        problem = f"{path} is one of another model ({profile.model_name})"
    if options.profile is not None or options.placing == "static":
        raise ModelError(f"{model.path}: experts are to be placed by a profile, and {problem}")
    return None, ()


def profile_beside(path: Path) -> Path:
    """Where the profile of a model is, or of the model that a split file was made from."""
    name = model_name(path.name).removesuffix(".gguf").removesuffix(".powerinfer")
    return path.with_name(f"{name}.profile.safetensors")


def _table(model: Model, profile: Profile) -> npt.NDArray[np.float64]:
    routing = model.hyper.routing
    assert routing is not None
    table = np.zeros((len(model.layers), routing.experts))
    for index, layer in enumerate(model.layers):
        if isinstance(layer.feeds, ExpertsFFN):
            table[index] = profile.frequency(index)
    return table


class _Size:
    """What a model takes in memory, in bytes."""

    def __init__(self, model: Model, context: int, kv_type: str) -> None:
        self._model, self._counted = model, footprint_of(model)
        body, head = self._counted.body, self._counted.head
        # Rows of the embedding are read in the mapped file, whose pages count as this process's.
        self.weights = self._counted.packed_nbytes + body.table_bytes + body.vector_bytes + head.vector_bytes
        self.cache = self._counted.session_bytes(context, kv_type)
        self._experts = body.expert_bytes

    def always(self, residency: WeightsOnDisk) -> int:
        """Weights that are in memory whatever is read from disk."""
        routed = isinstance(residency, Residency)
        return max(0, self.weights - (self._experts if routed else residency.whole_bytes))

    def scratch(self, batch: int) -> int:
        """Buffers of passes of ``batch`` tokens."""
        hyper = self._model.hyper
        ahead = batch * (5 * hyper.width + 4 * (hyper.routing.experts if hyper.routing else 0))
        return self._counted.scratch_bytes(batch, 0) + ahead


def _can(model: Model, device: str) -> bool:
    """Whether some of the weights can be read from disk, but for what is said when that is tried."""
    kinds = (ExpertsFFN,) if model.hyper.routing is not None else (DenseFFN, SplitLayer)
    return device == "none" and any(isinstance(layer.feeds, kinds) for layer in model.layers)


def _by_itself(model: Model, mode: str | None) -> bool:
    """Whether it is read from disk without being asked for: not where every token takes all of it."""
    if model.hyper.routing is not None:
        return True
    split, modes = model.split, layer_modes(model, mode)
    return split is not None and "dense" not in modes and not any(layer.hot_neurons for layer in split.layers)


def _refusal(model: Model, size: _Size, ram: int, device: str) -> str:
    why = "it has no FFNs that could be read from disk"
    if device != "none":
        why = f"with --device {device} nothing is read from disk"
    return (
        f"{model.path}: {(size.weights + size.cache) // _MIB} MiB of weights and KV cache do not fit in "
        f"--ram {ram // _MIB} MiB, and {why}"
    )


def _fit(
    model: Model,
    residency: WeightsOnDisk,
    use: Sequence[npt.NDArray[np.float64]] | None,
    size: _Size,
    ram: int,
    batch: int,
) -> FromDisk:
    """The longest passes whose experts all have a slot and whose buffers leave memory to them."""
    always = size.always(residency)
    held = resident_bytes() + always + always // 32 + size.cache + _SLACK

    def budget_of(tokens: int) -> Budget:
        nbytes = ram - held - size.scratch(tokens)
        return Budget(nbytes, tokens, use)

    def does(tokens: int) -> bool:
        return residency.suffices(budget_of(tokens).nbytes - residency.readers_bytes, tokens)

    def small(tokens: int) -> bool:
        return size.scratch(tokens) <= ram * _SCRATCH_SHARE

    tokens = _longest(batch, lambda count: does(count) and small(count)) or _longest(batch, does)
    if tokens is None:
        raise ModelError(residency.too_little(budget_of(1)))
    budget = budget_of(tokens)
    nbytes = budget.nbytes - residency.readers_bytes
    residency.prepare(nbytes)
    said = residency.notice(nbytes)
    notice = f"{size.weights // _MIB} MiB of weights do not fit in {ram // _MIB} MiB: {said}"
    return FromDisk(residency, budget, (notice,))


def _longest(batch: int, does: Callable[[int], bool]) -> int | None:
    tokens = batch
    while tokens >= 1:
        if does(tokens):
            return tokens
        tokens //= 2
    return None
