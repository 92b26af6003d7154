"""What an engine can do with an accelerator: the one place that says which units a plan may move.

Plans of models are made for :data:`THIS_VERSION`, so that the plans can be run. Plans of
shapes, which no engine will ever be given, are made for :data:`ALL_PLACED`; where this version can do less,
they say so, and its speed stands beside them.
"""

from dataclasses import dataclass

from powerinfer_tools.errors import PlanError

#: Units that the planner can move.
UNITS = ("ffn", "attention", "head", "predictors")


@dataclass(frozen=True)
class Capabilities:
    """``placeable``: units that may leave the CPU (attention takes its KV cache along); ``sparse_hot``:
    whether the accelerator skips inactive neurons too."""

    placeable: frozenset[str]
    sparse_hot: bool

    def __post_init__(self) -> None:
        unknown = self.placeable - set(UNITS)
        if unknown:
            raise PlanError(
                f"cannot place {', '.join(sorted(unknown))}; what can be placed: {', '.join(sorted(UNITS))}"
            )


ALL_PLACED = Capabilities(frozenset(UNITS), sparse_hot=True)
#: Of mixtures of experts, too: their experts are what "ffn" is there, and routers go where attention goes.
THIS_VERSION = ALL_PLACED
