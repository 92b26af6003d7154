"""The model families that can run, from the architecture table."""

from dataclasses import dataclass

from powerinfer_tools.model.architectures import ARCHITECTURES, RELU_FAMILY, ArchitectureSpec


@dataclass(frozen=True)
class FamilyRow:
    """One family. ``name``: the value of ``general.architecture``. ``true_zeros``: its activation makes exact
    zeros (a file may name another activation). ``ffn``: dense, or also experts. ``mixer``: the operation that
    mixes tokens.
    """

    name: str
    activation: str
    true_zeros: bool
    ffn: str
    mixer: str


def supported_families() -> list[FamilyRow]:
    """All families, by name."""
    return [_row(ARCHITECTURES[name]) for name in sorted(ARCHITECTURES)]


def _row(spec: ArchitectureSpec) -> FamilyRow:
    mixer = "latent attention" if spec.latent else "attention"
    if spec.recurrent != "none":
        mixer = spec.recurrent if spec.recurrent_layers == "all" else f"{spec.recurrent} and {mixer}"
    gated = "gated" if spec.gated else "two matrices"
    return FamilyRow(
        name=spec.name,
        activation=spec.activation,
        true_zeros=spec.activation in RELU_FAMILY or spec.top_layers > 0,
        ffn=f"{gated}, or experts" if spec.routed else gated,
        mixer=mixer,
    )
