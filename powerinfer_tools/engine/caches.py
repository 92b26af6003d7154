"""What sessions keep outside the hot device: the slots of a model's program, and states that fill them."""

from collections.abc import Sequence
from dataclasses import dataclass

from powerinfer_kernels import KernelError, KVSlot, ProgramBuilder, Slot, Span, State
from powerinfer_tools.errors import ModelError
from powerinfer_tools.model.footprint import footprint_of
from powerinfer_tools.model.loading import Model


@dataclass(frozen=True)
class Places:
    """Whom the tokens of a pass belong to, and where they stand: successive tokens of each session."""

    spans: tuple[Span, ...]

    @classmethod
    def of_one(cls, state: State, position: int, count: int) -> "Places":
        """``count`` tokens of one session from ``position`` on."""
        return cls((Span(state, position, count),))

    @property
    def position(self) -> int:
        """Where the first token stands: all that a device needs that serves one session alone."""
        return self.spans[0].position


def require_kv_type(model: Model, kind: str) -> None:
    """Raise ModelError where the heads of ``model`` cannot be kept as ``kind``."""
    sizes = [size for facts in model.hyper.facts for size in (facts.head_dim, facts.value_dim)]
    odd = [size for size in sizes if size % 32]
    if kind == "q8_0" and odd:
        raise ModelError(
            f"{model.path}: a q8_0 KV cache needs heads of a multiple of 32 values, these have {odd[0]}; "
            "take f16"
        )


def kv_slots(
    builder: ProgramBuilder, model: Model, context: int, here: Sequence[bool]
) -> list[KVSlot | None]:
    """A slot of up to ``context`` positions for each layer whose attention is ``here``. Raises ModelError."""
    hyper = model.hyper
    try:
        return [
            builder.kv_slot(context, facts.kv_heads, facts.head_dim, facts.value_dim) if has_slot else None
            for has_slot, facts in zip(here, hyper.facts, strict=True)
        ]
    except KernelError as error:
        raise ModelError(f"{model.path}: {error}") from None


def allocate_state(model: Model, slots: Sequence[Slot], context: int, kind: str) -> State:
    """The state of a session of ``context`` positions whose caches are of type ``kind``. Raises
    ModelError."""
    require_kv_type(model, kind)
    try:
        return State.allocate(slots, context, kind)
    except MemoryError:
        size = footprint_of(model).session_bytes(context, kind)
        raise ModelError(
            f"no memory for a KV cache of {size} bytes; ask for a shorter context (-c)"
        ) from None
    except KernelError as error:
        raise ModelError(f"{model.path}: {error}") from None
