"""The architecture table: what a model family is, as data.

One :class:`ArchitectureSpec` row per value of ``general.architecture``, in a module for each kind of family.
The blocks (:mod:`powerinfer_tools.model.blocks`) read the row; nothing else in the project asks for a family
by name.
"""

from powerinfer_tools.errors import ModelError
from powerinfer_tools.model.architectures import experts, layer_norm, llama_like, recurrent, sliding
from powerinfer_tools.model.architectures.refused import REFUSED
from powerinfer_tools.model.architectures.spec import (
    ACTIVATIONS,
    RELU_FAMILY,
    ArchitectureSpec,
    NormKind,
    RecurrentKind,
    RopeStyle,
)

__all__ = [
    "ACTIVATIONS",
    "ARCHITECTURES",
    "REFUSED",
    "RELU_FAMILY",
    "ArchitectureSpec",
    "NormKind",
    "RecurrentKind",
    "RopeStyle",
    "architecture",
]

ARCHITECTURES: dict[str, ArchitectureSpec] = {
    spec.name: spec
    for module in (llama_like, layer_norm, sliding, experts, recurrent)
    for spec in module.ROWS
}


def architecture(name: str, file: str) -> ArchitectureSpec:
    """The row of ``name``. Raises ModelError naming ``file``, and why the family does not run, or which
    do."""
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    if name in REFUSED:
        raise ModelError(f"{file}: models of the architecture {name!r} do not run: {REFUSED[name]}")
    supported = ", ".join(sorted(ARCHITECTURES))
    raise ModelError(f"{file}: architecture {name!r} is not supported (supported: {supported})")
