"""A device that refuses what a GPU could not do, or could do only by waiting: its tensors are of a kind of
their own, so that torch itself tells host and device apart, and the numbers are computed all the same.

What CUDA graphs record is run here again each time that it is replayed, and has to be the same work: the same
operations on the same memory with the same numbers.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from powerinfer_kernels import triton_launch
from powerinfer_tools.engine.hot import Span
from powerinfer_tools.engine.hot.cache import HeldVectors
from powerinfer_tools.engine.hot.devices import CpuDevice, Steps, Ticket

Tensor = torch.Tensor
aten = torch.ops.aten
#: What the device's tensors say that they are on.
WHERE = torch.device("meta")
#: Operations whose result has a size, or a Python number, that only the device knows: the host waits.
WAITING = {
    aten._local_scalar_dense, aten.nonzero, aten.nonzero_static, aten.masked_select, aten.equal,
    aten.is_nonzero, aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.bincount,
    aten.repeat_interleave,
}  # fmt: skip


class RuleBroken(AssertionError):
    """What a GPU could not have done, or not without waiting."""


class OnDevice(Tensor):
    """A tensor of the device; ``inner`` has the numbers."""

    inner: Tensor

    @staticmethod
    def __new__(cls: type["OnDevice"], inner: Tensor) -> "OnDevice":
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=WHERE
        )
        made.inner = inner
        return made

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        raise RuleBroken(f"{function} of the device's tensors outside of its queue")


@contextmanager
def rules(device: "StrictDevice") -> Iterator[None]:
    """Check, note and do what is asked of the tensors of ``device``."""
    with _Constants(device), _Operations(device):
        yield


class _Constants(TorchFunctionMode):
    """Numbers of the host made into tensors of the device, of which the operations would say nothing."""

    def __init__(self, device: "StrictDevice") -> None:
        super().__init__()
        self._device = device

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in (torch.tensor, torch.as_tensor, torch.asarray) and self._device.phase != "load":
            raise RuleBroken(
                f"{function.__name__} of the host's numbers: a graph cannot record it, a queue waits"
            )
        return function(*args, **kwargs)


class _Operations(TorchDispatchMode):
    """While it is active: operations of :class:`OnDevice` tensors are checked, noted, and done."""

    def __init__(self, device: "StrictDevice") -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        leaves = tree_flatten((args, kwargs))[0]
        there = [x for x in leaves if isinstance(x, OnDevice)]
        here = [x for x in leaves if isinstance(x, Tensor) and not isinstance(x, OnDevice)]
        made_there = kwargs.get("device") is not None and torch.device(kwargs["device"]) == WHERE
        if not there and not made_there:
            return function(*args, **kwargs)
        self._device.check(function, args, kwargs, there, here)
        if made_there:
            kwargs["device"] = torch.device("cpu")
        found = function(*tree_map(_inner, args), **tree_map(_inner, kwargs))
        self._device.note(function, args, kwargs)
        written = {id(x.inner): x for x in there}
        if function is aten._to_copy.default and not made_there and kwargs.get("device") is not None:
            return found
        return tree_map(lambda x: self._wrapped(x, written), found)

    def _wrapped(self, x: Any, written: dict[int, OnDevice]) -> Any:
        if not isinstance(x, Tensor):
            return x
        return written[id(x)] if id(x) in written else self._device.hold(OnDevice(x))


def _inner(x: Any) -> Any:
    return x.inner if isinstance(x, OnDevice) else x


class StrictDevice(CpuDevice):
    """With ``free`` bytes. ``phase`` says what goes on: "load", "warm-up", "capture", "replay" or "queue".
    ``launched``: work that was handed to the device, by phase, and pieces of it that were submitted, and of
    those the ones to be waited for; ``peak``: most bytes held by what was made on the way; ``copies``: those
    between host and device in queued work, in order; ``kernels``: the other work that was queued, in
    order."""

    torch_device = WHERE

    def __init__(self, free: int = 1 << 30) -> None:
        super().__init__()
        self.free, self.phase = free, "load"
        self.launched: dict[str, int] = {}
        self.copies: list[str] = []
        self.held = self.peak = 0
        self._memory: list[tuple[int, int]] = []
        self._pinned: list[tuple[int, int]] = []
        self._trace: list[object] = []
        self.kernels: list[str] = []
        self._live: dict[int, int] = {}

    def free_bytes(self) -> int | None:
        return self.free

    def allocate(self, nbytes: int) -> Tensor:
        # What is read before it is written is no number, and counts as any.
        memory = torch.full((nbytes,), 0xFF, dtype=torch.uint8)
        self._memory.append((memory.data_ptr(), memory.data_ptr() + nbytes))
        return OnDevice(memory)

    def staging(self, *shape: int) -> Tensor:
        host = torch.full(shape, torch.nan)
        self._pinned.append((host.data_ptr(), host.data_ptr() + host.nbytes))
        return host

    def prepare(self, steps: Steps) -> None:
        self._run(steps, "warm-up")

    def recorded(self, steps: Steps) -> Steps:
        self._run(steps, "warm-up")
        self._run(steps, "capture")
        return [("graph", partial(self._replay, steps, list(self._trace)))]

    def window(self, host: Tensor) -> Tensor | None:
        return OnDevice(host)

    def submit(self, steps: Steps, *, awaited: bool = True) -> Ticket:
        self.launched["submitted"] = self.launched.get("submitted", 0) + 1
        self.launched["awaited"] = self.launched.get("awaited", 0) + awaited
        with self._in("queue"):
            for _, work in steps:
                work()
        return _Done([Span(name, 0.0, 0.0) for name, _ in steps])

    def _replay(self, steps: Steps, recorded: list[object]) -> None:
        self.launched["graphs"] = self.launched.get("graphs", 0) + 1
        self._run(steps, "replay")
        if self._trace != recorded:
            pairs = zip(self._trace, recorded, strict=False)
            first = next((a, b) for a, b in pairs if a != b)
            raise RuleBroken(f"a graph would do {first[1]} again where {first[0]} is wanted")

    def _run(self, steps: Steps, phase: str) -> None:
        with self._in(phase):
            self._trace.clear()
            for _, work in steps:
                work()

    @contextmanager
    def _in(self, phase: str) -> Iterator[None]:
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def check(
        self,
        function: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        there: list[OnDevice],
        here: list[Tensor],
    ) -> None:
        """Raise RuleBroken for what may not be done."""
        if self.phase == "load":
            return
        name = f"{function} while in {self.phase}"
        packet = function.overloadpacket
        if packet in WAITING:
            raise RuleBroken(f"{name} makes the host wait")
        if packet in (aten.index, aten.index_put, aten.index_put_) and any(
            x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]
        ):
            raise RuleBroken(f"{name} with a mask makes the host wait")
        if packet is aten._to_copy and kwargs.get("device") is not None:
            raise RuleBroken(f"{name} from one side to the other makes the host wait")
        if packet is aten.copy_ and here:
            self._check_copy(name, args, kwargs)
        elif here:
            raise RuleBroken(f"{name} mixes tensors of the device and of the host")

    def _check_copy(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        target, source = args[:2]
        host = source if isinstance(target, OnDevice) else target
        if not any(first <= host.data_ptr() < last for first, last in self._pinned):
            raise RuleBroken(f"{name} copies memory of the host that is not pinned, for which it waits")
        if not (args[2] if len(args) > 2 else kwargs.get("non_blocking")):
            raise RuleBroken(f"{name} waits for a copy")
        if target.dtype != source.dtype or not host.is_contiguous():
            raise RuleBroken(
                f"{name} is no plain copy on the host's side, so torch makes one there, not pinned"
            )
        if self.phase in ("queue", "replay"):
            self.copies.append("in" if isinstance(target, OnDevice) else "out")

    def note(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Of one operation: what has to be the same when it is done again."""
        if function.is_view or function.overloadpacket in (
            aten.empty,
            aten.empty_like,
            aten.view,
            aten._reshape_alias,
        ):
            return
        self.launched[self.phase] = self.launched.get(self.phase, 0) + 1
        if self.phase in ("queue", "replay"):
            self.kernels.append(str(function))
        leaves = tree_flatten((args, kwargs))[0]
        self._trace.append((str(function), tuple(self._place(x) for x in leaves)))

    def launch(self, name: str, arguments: list[Any]) -> None:
        """A Triton kernel."""
        self.launched[self.phase] = self.launched.get(self.phase, 0) + 1
        if self.phase in ("queue", "replay"):
            self.kernels += [name] * _KERNELS.get(name, 1)
        self._trace.append((name, tuple(self._place(x) for x in arguments)))

    def _place(self, x: Any) -> object:
        """Where a tensor lies, where that is fixed; its shape, where it is made on the way."""
        if not isinstance(x, Tensor):
            return str(x)
        at = x.data_ptr()
        fixed = any(first <= at < last for first, last in (*self._memory, *self._pinned))
        return (at if fixed else "made", tuple(x.shape), x.stride())

    def hold(self, made: OnDevice) -> OnDevice:
        """Count the memory of ``made`` until the last tensor over it is gone."""
        at, nbytes = made.inner.untyped_storage().data_ptr(), made.inner.untyped_storage().nbytes()
        if self.phase != "load" and not any(first <= at < last for first, last in self._memory):
            if not self._live.get(at):
                self.held += nbytes
                self.peak = max(self.peak, self.held)
            self._live[at] = self._live.get(at, 0) + 1
            weakref.finalize(made, self._let_go, at, nbytes)
        return made

    def _let_go(self, at: int, nbytes: int) -> None:
        self._live[at] -= 1
        if not self._live[at]:
            self.held -= nbytes


class _Done:
    """A ticket of work that is done."""

    def __init__(self, spans: list[Span]) -> None:
        self._spans = spans

    def wait(self) -> list[Span]:
        return self._spans


#: What is more than one kernel.
_KERNELS = {"attend": 2, "sum_rows": 2}
#: Which arguments of each kernel are its outputs.
OUTPUTS = {
    "matvec": (2,), "hidden": (5,), "sum_rows": (3,), "unpack": (3,), "attend": (7, 8, 9),
    "matvecs": (2,), "join": (0,), "normalize": (4, 5, 6),
    "round_values": (1, 2), "rotate": (0, 1), "store": (), "expert_hidden": (6,), "expert_sums": (4,),
}  # fmt: skip


def launches_of(device: StrictDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the Triton kernels take the device's tensors, and no others. They are not run, which would take
    minutes in Triton's interpreter: all their results are one."""

    def wrapped(name: str) -> Callable[..., None]:
        def run(*args: Any, **kwargs: Any) -> None:
            found = tree_flatten((args, kwargs))[0]
            found += [x.data for x in found if isinstance(x, triton_launch.PlanarRows)]
            found += [y for x in found if isinstance(x, HeldVectors) for y in (x.data, x.scales)]
            found += [y for x in found if isinstance(x, triton_launch.Turn) for y in (x.cos, x.sin)]
            for x in found:
                if isinstance(x, Tensor) and not (isinstance(x, OnDevice) and x.is_contiguous()):
                    raise RuleBroken(f"{name} takes what is not the device's, or has gaps")
            device.launch(name, found)
            for x in tree_flatten([args[index] for index in OUTPUTS[name]])[0]:
                if x is not None:
                    _inner(x).fill_(1.0)

        return run

    for name in OUTPUTS:
        monkeypatch.setattr(triton_launch, name, wrapped(name))
