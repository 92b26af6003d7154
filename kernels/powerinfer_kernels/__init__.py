"""C kernels of the engine: packed weights, programs of operations, and the threads that run them.

Everything here checks its arguments and raises KernelError; nothing here knows files or architectures.
"""

from ._kernels import KernelError, guard_mapped_files
from .buffers import KV_KINDS, Activations, KVCache, RowMatrix, aligned
from .experts_builder import ROUTER_KINDS, Choice, ExpertBuffers, ExpertWeights
from .matrix import Bundle, Layout, Matrix, Plain, dequantize, quantize, repack
from .pool import Pool, available_isas, read_bandwidth
from .program import Program
from .program_builder import HISTOGRAM_BINS, ProgramBuilder
from .records import LayerOfRecords, Records, RecordsOf
from .row_types import WRITTEN_TYPES, RowType, block_shape, packed_row_bytes, row_bytes
from .signs import Signs, pack_signs, sign_code_words
from .state import KVSlot, RecurrentSlot, Slot, Span, State
from .topology import physical_cores
from .units import UNITS_AHEAD, Part, UnitCounters, Units, UnitsFault, UnitsFile
from .vector_builder import ACTIVATION_KINDS, CLAMPED_KINDS

__all__ = [
    "ACTIVATION_KINDS",
    "CLAMPED_KINDS",
    "HISTOGRAM_BINS",
    "KV_KINDS",
    "ROUTER_KINDS",
    "UNITS_AHEAD",
    "WRITTEN_TYPES",
    "Activations",
    "Bundle",
    "Choice",
    "ExpertBuffers",
    "ExpertWeights",
    "KVCache",
    "KVSlot",
    "KernelError",
    "LayerOfRecords",
    "Layout",
    "Matrix",
    "Part",
    "Plain",
    "Pool",
    "Program",
    "ProgramBuilder",
    "Records",
    "RecordsOf",
    "RecurrentSlot",
    "RowMatrix",
    "RowType",
    "Signs",
    "Slot",
    "Span",
    "State",
    "UnitCounters",
    "Units",
    "UnitsFault",
    "UnitsFile",
    "aligned",
    "available_isas",
    "block_shape",
    "dequantize",
    "guard_mapped_files",
    "pack_signs",
    "packed_row_bytes",
    "physical_cores",
    "quantize",
    "read_bandwidth",
    "repack",
    "row_bytes",
    "sign_code_words",
]
