"""The rows of one layer's neurons, from the source's order into that of a split file.

A strip of neurons at a time, on a thread per core: gate and up rows are copied, down rows are transposed and
quantised again, and every record goes to its place in the file. So the source is read once and in its own
order, and memory is a strip for each thread, whatever the model's size.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from powerinfer_formats.gguf_writer import GGUFWriter
from powerinfer_formats.split_layout import BundleLayout, bundle_name, hot_name
from powerinfer_kernels import RowType
from powerinfer_tools.model.down_rows import DownRows, on_threads, relative_error
from powerinfer_tools.model.ffn_matrices import DenseFFN
from powerinfer_tools.model.split_rows import plain_rows

#: Bytes of a strip's records, about.
_STRIP_BYTES = 2 << 20


@dataclass(frozen=True)
class NeuronRecords:
    """Layer ``index``: ``order`` has the source's neuron at each position, the first ``hot`` of them hot."""

    writer: GGUFWriter
    index: int
    ffn: DenseFFN
    layout: BundleLayout
    order: npt.NDArray[np.int32]
    hot: int

    def write(self) -> float:
        """Write all rows; ‖D′ − D‖ / ‖D‖ of the down projection."""
        strips = self._down.strips(_STRIP_BYTES // self.layout.record_bytes)
        return relative_error(on_threads(lambda strip: self._strip(*strip), strips))

    def _strip(self, first: int, end: int) -> tuple[float, float]:
        layout, positions = self.layout, self._position[first:end]
        records = np.zeros((end - first, layout.record_bytes), np.uint8)
        for kind, weight in zip(layout.kinds, self.ffn.matrices[:-1], strict=False):
            layout.rows(records, kind)[:] = plain_rows(weight)[first:end]
        sums = self._down.write(first, end, layout.rows(records, layout.kinds[-1]))
        hot = positions < self.hot
        if hot.any():
            for kind in layout.kinds:
                rows = layout.rows(records, kind)[hot]
                self.writer.write_rows(hot_name(self.index, kind), positions[hot], rows)
        if not hot.all():
            self.writer.write_rows(bundle_name(self.index), positions[~hot] - self.hot, records[~hot])
        return sums

    @cached_property
    def _down(self) -> DownRows:
        return DownRows(self.ffn, RowType(self.layout.types[-1]))

    @cached_property
    def _position(self) -> npt.NDArray[np.int64]:
        position = np.empty(len(self.order), np.int64)
        position[self.order] = np.arange(len(self.order))
        return position
