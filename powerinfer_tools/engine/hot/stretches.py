"""The device's work for a single token, in as few pieces as the host's turns allow.

The host has a turn where it computes cold neurons, or chooses experts, of a layer. The work after a turn is
the same for every token: the merge of that layer, all following layers without a cold part, and the next
layer's attention up to the data that the host reads in its turn, or the head. Each such stretch is one CUDA
graph.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from powerinfer_tools.engine.hot.devices import Device, Steps, Ticket
from powerinfer_tools.engine.hot.layer_steps import HotLayer, LayerParts, LayerSteps
from powerinfer_tools.engine.hot.work import Work


@dataclass(frozen=True)
class Queued:
    """Work that was queued: the layer of each of its steps, and whether the host is about to wait for it."""

    ticket: Ticket
    layers: Sequence[int | None]
    awaited: bool


@dataclass(frozen=True)
class Item:
    """A step of a layer; or ``attend``, to which the host gives the token's position."""

    layer: int | None
    name: str
    work: Work | None
    attend: Callable[[int], None] | None = None


class Stretch:
    """``items``, recorded where each is the same for every position; ``awaited``: the host's turn follows."""

    def __init__(self, device: Device, items: Sequence[Item], *, awaited: bool) -> None:
        self._device, self._awaited = device, awaited
        self._pieces: list[tuple[Sequence[int | None], Steps | Item]] = []
        alike: list[Item] = []
        for item in items:
            if item.attend is None:
                alike.append(item)
                continue
            self._record(alike)
            self._pieces.append(((item.layer,), item))
            alike = []
        self._record(alike)
        self._layers = [layer for layers, _ in self._pieces for layer in layers]

    def submit(self, position: int) -> Queued:
        """Queue it for the token at ``position``."""
        steps: list[tuple[str, Work]] = []
        for _, piece in self._pieces:
            if isinstance(piece, Item):
                assert piece.attend is not None
                steps.append((piece.name, partial(piece.attend, position)))
            else:
                steps += piece
        return Queued(self._device.submit(steps, awaited=self._awaited), self._layers, self._awaited)

    def _record(self, items: Sequence[Item]) -> None:
        if not items:
            return
        steps = self._device.recorded([(item.name, item.work) for item in items if item.work is not None])
        layers = [item.layer for item in items]
        self._pieces.append((layers if len(steps) == len(items) else layers[:1], steps))


class TokenPlan:
    """The stretches of a token: ``opening`` of layers that the stream comes to, ``experts`` of layers once
    the host has chosen them, and ``closing`` of layers by which sides computed something (hot, cold); all
    with what follows. ``head``: what ends the pass, where the head is here."""

    def __init__(
        self,
        device: Device,
        layers: Sequence[HotLayer | None],
        steps: LayerSteps,
        head: Steps | None,
        *,
        parallel: bool,
    ) -> None:
        self._device, self._layers, self._steps = device, layers, steps
        self._head, self._parallel = head, parallel
        self._parts = [None if layer is None else steps.parts(layer, 1) for layer in layers]
        self.opening: dict[int, list[Stretch]] = {}
        self.experts: dict[int, list[Stretch]] = {}
        self.closing: dict[tuple[int, bool, bool], list[Stretch]] = {}
        for index, (layer, parts) in enumerate(zip(layers, self._parts, strict=True)):
            if layer is None or parts is None:
                continue
            if not self._stays(index):
                self.opening[index] = self._begin(index, _items(None, steps.enter(1)))
            if layer.ffn is not None and not layer.whole:
                self._after_turn(index, layer, parts)

    def _stays(self, index: int) -> bool:
        """Whether the stream is on the device when layer ``index`` begins. The caller takes it back if it
        computes the next layer, or an FFN that reads the same stream as attention."""
        before, layer = self._layers[index - 1] if index else None, self._layers[index]
        if before is None or before.ffn is None or layer is None:
            return False
        return not (self._parallel and layer.ffn is None)

    def _begin(self, index: int, before: list[Item]) -> list[Stretch]:
        """``before`` and layer ``index``, up to the host's turn, and the device's work during that turn."""
        layer, parts = self._layers[index], self._parts[index]
        assert layer is not None
        assert parts is not None
        attention, parallel = _attention(index, parts), self._parallel and bool(parts.input)
        first = _items(index, parts.input) if parallel else [*attention, *_items(index, parts.input)]
        rest = [*(attention if parallel else ()), *_items(index, parts.hot)]
        if layer.ffn is None:
            return self._stretches([*before, *first, *_items(None, self._steps.leave(1))])
        if layer.whole:
            return self._next(index, [*before, *first, *rest, *_items(index, parts.merge_hot)])
        return self._stretches([*before, *first], rest)

    def _next(self, index: int, before: list[Item]) -> list[Stretch]:
        """``before``, which ends layer ``index``, and the work after it."""
        if index + 1 < len(self._layers) and self._stays(index + 1):
            return self._begin(index + 1, before)
        if index + 1 < len(self._layers) or self._head is None:
            return self._stretches([*before, *_items(None, self._steps.leave(1))])
        return self._stretches([*before, *_items(None, self._head)])

    def _after_turn(self, index: int, layer: HotLayer, parts: LayerParts) -> None:
        chosen = _items(index, self._steps.experts_of_one(layer))
        if chosen and not layer.cold:
            # The host has no experts, so a token takes some of these, and the host sends nothing else.
            self.experts[index] = self._next(index, [*chosen, *_items(index, parts.merge_hot)])
            return
        if chosen:
            self.experts[index] = self._stretches([], chosen)
        for hot, cold in ((True, True), (True, False), (False, True)):
            merge = _items(index, parts.merge(hot=hot, cold=cold))
            if merge:
                self.closing[index, hot, cold] = self._next(index, merge)

    def _stretches(self, awaited: list[Item], rest: Sequence[Item] = ()) -> list[Stretch]:
        """The work that the host waits for, and the work that continues meanwhile."""
        made = [Stretch(self._device, awaited, awaited=True)] if awaited else []
        return [*made, Stretch(self._device, rest, awaited=False)] if rest else made


def _attention(index: int, parts: LayerParts) -> list[Item]:
    attend = [] if parts.attend is None else [Item(index, "attention", None, parts.attend)]
    return [*_items(index, parts.before), *attend, *_items(index, parts.after)]


def _items(layer: int | None, steps: Steps) -> list[Item]:
    return [Item(layer, name, work) for name, work in steps]
