"""A dense model larger than memory: the FFNs of some layers stay in memory. The FFNs of the other layers pass
through memory, and are read two ahead of need.

Every token takes every FFN, so there is nothing to learn. As many FFNs as fit stay in memory, spread evenly
over the layers, so that the disk reads while they are computed. Decoding is as fast as the disk brings the
other FFNs, or as fast as computing. The results have the same bits as with the model in memory, because the
program waits for the weights that it computes with.
"""

import time

import numpy as np

from powerinfer_kernels import UNITS_AHEAD, KernelError
from powerinfer_tools.engine.blocks import BlockWriter, DenseColumns
from powerinfer_tools.engine.units_on_disk import READERS, UnitsOnDisk
from powerinfer_tools.engine.weights_on_disk import Budget
from powerinfer_tools.errors import ModelError
from powerinfer_tools.model.ffn_matrices import DenseFFN

#: Slots of each kind for FFNs that pass through: one for the FFN in use, the others for reading ahead.
PASSING = 1 + UNITS_AHEAD


class LayersOnDisk(UnitsOnDisk):
    """The FFNs of all dense layers of a model as units on disk."""

    what = "FFNs"

    def _add_units(self) -> None:
        self._columns: dict[int, DenseColumns] = {}
        self._unit: dict[int, int] = {}
        self._fixed: frozenset[int] = frozenset()
        for index, layer in enumerate(self.model.layers):
            ffn = layer.ffn if isinstance(layer.feeds, DenseFFN) else None
            if not isinstance(ffn, DenseFFN):
                continue
            gate, up, down = (self._absent(weight) for weight in (ffn.first, ffn.factor, ffn.down))
            assert gate is not None
            assert down is not None
            self._unit[index] = self.units.add([part for part in (gate, up, down) if part is not None])
            deviations = self.model.hyper.facts[index].deviations
            rest = (layer.ffn_bias, layer.ffn_factor_bias, layer.ffn_inner_norm, deviations)
            self._columns[index] = DenseColumns(
                gate.matrix, None if up is None else up.matrix, down.matrix, *rest
            )

    def _least(self) -> tuple[int, ...]:
        return tuple(min(PASSING, count) for count, _ in self.units.kinds)

    def suffices(self, nbytes: int, tokens: int) -> bool:
        """The number of tokens does not matter."""
        least = self._least()
        return nbytes > 0 and all(have >= want for have, want in zip(self.slots(nbytes), least, strict=True))

    def least_bytes(self, tokens: int) -> int:
        """The bytes of the slots that FFNs pass through."""
        least = zip(self._least(), self.units.kinds, strict=True)
        return sum(count * size for count, (_, size) in least) + self.readers_bytes

    def prepare(self, nbytes: int) -> None:
        """Decide which FFNs stay in memory with slots of ``nbytes``, before the program is written."""
        stays = set[int]()
        for kind, (have, least) in enumerate(zip(self.slots(nbytes), self._least(), strict=True)):
            mine = [unit for unit in range(self.units.count) if self.units.kind_of(unit) == kind]
            fixed = have if have == len(mine) else have - least
            stays |= {
                unit for i, unit in enumerate(mine) if (i + 1) * fixed // len(mine) > i * fixed // len(mine)
            }
        self._fixed = frozenset(stays)

    def notice(self, nbytes: int) -> str:
        """How many FFNs stay in memory, once that is decided."""
        return (
            f"the FFNs of {len(self._fixed)} of {self.units.count} layers stay in memory, the others are "
            "read from disk for every token"
        )

    def columns(self, layer: int) -> DenseColumns:
        """The matrices of the FFN of ``layer``; they hold its weights after a fetch."""
        return self._columns[layer]

    def write_fetch(self, writer: BlockWriter, layer: int) -> None:
        """Append the operation that brings the FFN of ``layer`` into memory, and requests the next FFNs that
        pass through, including those of the token after this one."""
        unit = self._unit[layer]
        after = [(unit + 1 + step) % self.units.count for step in range(self.units.count - 1)]
        ahead = [other for other in after if other not in self._fixed][:UNITS_AHEAD]
        writer.label("disk")
        writer.builder.fetch_all(self.units, unit, ahead)

    def open(self, budget: Budget) -> None:
        """Allocate memory, and read the FFNs that stay. Raises ModelError if the memory is not available or
        too small, or a file cannot be read."""
        nbytes = budget.nbytes - self.readers_bytes
        if not self.suffices(nbytes, budget.batch):
            raise ModelError(self.too_little(budget))
        self.units.open(self._files, self.slots(nbytes), READERS, 0.0)
        self._is_open, started = True, time.perf_counter()
        self.drop_pages()
        sizes = [self.units.kinds[self.units.kind_of(unit)][1] for unit in range(self.units.count)]
        passing = [unit for unit in range(self.units.count) if unit not in self._fixed]
        try:
            self.units.load(np.array(sorted(self._fixed), np.int32), fixed=True)
            self.units.load(np.array(passing[:1], np.int32))
        except KernelError:
            raise ModelError(self.problem() or "FFNs cannot be read") from None
        loaded = sum(sizes[unit] for unit in (*self._fixed, *passing[:1]))
        rate = loaded / max(time.perf_counter() - started, 1e-9)
        read = sum(sizes[unit] for unit in passing)
        if read:
            self.expectation = (
                f"a dense model has no locality: every token reads {read / 1e6:,.0f} MB of FFNs; the disk "
                f"brings {rate / 1e9:.2f} GB/s: at most {rate / read:.3g} tok/s"
            )
