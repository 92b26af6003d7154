"""Units of a model that are read from disk as a whole: experts, and FFNs."""

from abc import abstractmethod

from powerinfer_kernels import Matrix, Part, Units
from powerinfer_tools.engine.weights_on_disk import WeightsOnDisk
from powerinfer_tools.errors import ModelError
from powerinfer_tools.model.tensors import Weight

#: Threads that read: enough to keep a disk's queue filled with reads of a quarter of a MiB.
READERS = 8


class UnitsOnDisk(WeightsOnDisk):
    """Units of a model in slots of memory."""

    def _lay_out(self) -> Units:
        self.units = Units()
        self._add_units()
        return self.units

    @abstractmethod
    def _add_units(self) -> None:
        """Declare the units."""

    def _absent(self, weight: Weight | None) -> Part | None:
        if weight is None:
            return None
        place = self.model.source.place_of(weight.data)
        if place is None:
            raise ModelError(
                f"{self.model.path}: {weight.name} is not in the file as it is computed with, so it cannot "
                "be read from disk while the model runs; give the model more memory, or convert it to GGUF"
            )
        matrix = Matrix.absent(self._pool, weight.row_type, weight.rows, weight.columns, weight.scale)
        return Part(matrix, weight.row_type, *place)

    @property
    def whole_bytes(self) -> int:
        """Memory that all units would take."""
        return sum(count * size for count, size in self.units.kinds)

    @property
    def readers_bytes(self) -> int:
        """Memory that the readers take."""
        return READERS * self.units.staging_bytes

    def slots(self, nbytes: int) -> tuple[int, ...]:
        """How many units of each kind ``nbytes`` of slots hold: the same share of every kind."""
        share = min(1.0, nbytes / self.whole_bytes)
        return tuple(int(count * share) for count, _ in self.units.kinds)
