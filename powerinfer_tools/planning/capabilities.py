"""What an engine can do with an accelerator: the one place that says which units a plan may move.

Plans of models are made for :data:`THIS_VERSION`, so that what they promise can be run. Plans of shapes,
which no engine will ever be given, are made for :data:`ALL_PLACED` and say so; the speed of this version
stands beside them.
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


THIS_VERSION = Capabilities(frozenset({"ffn"}), sparse_hot=False)
#: The same where layers have experts, which alone are placed.
THIS_VERSION_OF_EXPERTS = Capabilities(frozenset({"ffn"}), sparse_hot=False)
ALL_PLACED = Capabilities(frozenset(UNITS), sparse_hot=True)


def this_version(*, experts: bool) -> Capabilities:
    """What this version does with a model that has experts, or none."""
    return THIS_VERSION_OF_EXPERTS if experts else THIS_VERSION
