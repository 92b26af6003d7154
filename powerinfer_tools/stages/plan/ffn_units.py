"""The units that a layer's FFN is placed in, and their bytes: its neurons, or its experts.

Either way a layer is so many equal units, hottest first, of which the first are hot; a dense FFN is one
expert that every token takes, whose neurons are placed one by one.
"""

from dataclasses import dataclass

from powerinfer_tools.model.shapes import LayerShape, NeuronBytes
from powerinfer_tools.stages.plan.memory import SideBytes, expert_bytes, shared_bytes

_NONE = SideBytes(0, 0)


@dataclass(frozen=True)
class FFNUnits:
    """``count`` units of ``neurons`` neurons, ``each`` of so many bytes on either side, of which a token that
    leaves none out reads ``taken``; ``shared``: the bytes, and ``shared_neurons``, of the expert that every
    token takes besides; ``products``: how many FFNs a token computes."""

    count: int
    neurons: int
    each: SideBytes
    taken: int
    shared: SideBytes = _NONE
    shared_neurons: int = 0
    products: int = 1

    @property
    def whole(self) -> SideBytes:
        """Bytes of all of them."""
        return self._of(self.count, self.count, 1, 1)

    @property
    def token(self) -> SideBytes:
        """Bytes that a token reads where everything is computed on one side."""
        return self._of(self.taken, self.taken, 1, 1)

    def placed(self, hot_neurons: int, shared_hot: int) -> SideBytes:
        """Bytes on both sides with so many hot neurons, and with ``shared_hot`` (1 or 0) shared experts."""
        hot = hot_neurons // self.neurons
        return self._of(hot, self.count - hot, shared_hot, 1 - shared_hot)

    def _of(self, hot: int, cold: int, shared_hot: int, shared_cold: int) -> SideBytes:
        return SideBytes(
            hot * self.each.vram + shared_hot * self.shared.vram,
            cold * self.each.ram + shared_cold * self.shared.ram,
        )


def ffn_units(layer: LayerShape, size: NeuronBytes) -> FFNUnits:
    """The units of ``layer``, one of whose neurons takes ``size``."""
    experts = layer.experts
    if experts is None:
        return FFNUnits(layer.neurons, 1, SideBytes(size.total, size.total), layer.neurons)
    return FFNUnits(
        count=experts.count,
        neurons=layer.up.rows,
        each=expert_bytes(layer),
        taken=experts.used,
        shared=shared_bytes(layer),
        shared_neurons=experts.shared_neurons,
        products=experts.used + bool(experts.shared),
    )
