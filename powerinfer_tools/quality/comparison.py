"""The modes of one file side by side: how much each differs from dense mode, on the same text."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from powerinfer_tools.engine import Engine
from powerinfer_tools.engine.modes import layer_modes
from powerinfer_tools.errors import ModelError
from powerinfer_tools.model.loading import Model
from powerinfer_tools.progress import Progress
from powerinfer_tools.quality.perplexity import divergence, perplexity

BASELINE = "dense"
#: Modes by how many rows of a neuron its bundle has, most first: a bundle also serves all later modes.
_BUNDLED = ("predicted", "thresholded", "gate-first")
_NO_RECALL = {
    "dense": "every neuron is computed",
    "gate-first": "the gate itself says which neurons are active",
    "thresholded": "no predictor: what is compared is exact",
}


@dataclass(frozen=True)
class Fidelity:
    """One mode over the scored tokens of a text. Figures are None if the file does not allow the mode;
    ``note`` then says why (or why there is no recall).

    ``kl`` is the mean of KL(dense ‖ mode) in nats per token, ``top1_agreement`` the share of tokens for which
    both have the same first choice, ``density`` the mean share of neurons computed, ``recall`` the share of
    active neurons that predictors found, and ``identical`` whether all logits have the same bits as dense.
    ``perplexity_ratio`` is relative to dense; its error is the error of the mean of paired differences.
    """

    mode: str
    available: bool
    note: str | None = None
    perplexity: float | None = None
    perplexity_error: float | None = None
    perplexity_ratio: float | None = None
    perplexity_ratio_error: float | None = None
    kl: float | None = None
    kl_error: float | None = None
    max_kl: float | None = None
    top1_agreement: float | None = None
    top1_error: float | None = None
    density: float | None = None
    recall: float | None = None
    identical: bool | None = None


@dataclass(frozen=True)
class Comparison:
    """A row for each mode asked for. The baseline is dense mode of the same file."""

    rows: tuple[Fidelity, ...]
    positions: int

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"baseline": BASELINE, "tokens": self.positions, "rows": [vars(row) for row in self.rows]}


def refusal(model: Model, mode: str) -> str | None:
    """Why ``model`` does not run in ``mode``, and what to do about it; None if it does run."""
    try:
        layer_modes(model, mode)
    except ModelError as error:
        return str(error)
    return None


def compare_modes(
    open_engine: Callable[..., Engine],
    model: Model,
    modes: Sequence[str],
    pieces: Sequence[list[int]],
    progress: Progress | None = None,
) -> Comparison:
    """Run ``pieces`` of text in every one of ``modes``, with dense mode for comparison.

    ``open_engine(mode=…, check_recall=…, beside=…)`` makes an engine on ``model``, which shares its weights
    with the engines ``beside`` it: weights are packed once in each form, and one bundle of neurons serves all
    modes. Raises ModelError if all modes asked for other than dense are unavailable.
    """
    reasons = {mode: refusal(model, mode) for mode in modes}
    others = [mode for mode in modes if mode != BASELINE]
    if others and all(reasons[mode] for mode in others) and len(others) == len(modes):
        raise ModelError("; ".join(str(reasons[mode]) for mode in others))
    allowed = [mode for mode in modes if not reasons[mode]]
    with ExitStack() as stack:

        def opened(mode: str, beside: Engine | None, held: ExitStack = stack) -> Engine:
            weights = None if beside is None else beside.weights
            return held.enter_context(
                open_engine(mode=mode, check_recall=mode == "predicted", beside=weights)
            )

        # The engine opened first has the most kinds of rows in its bundles: they serve all others.
        richest = next((mode for mode in _BUNDLED if mode in allowed), None)
        most = None if richest is None else opened(richest, None)
        base = opened(BASELINE, most)
        rows = []
        for mode in modes:
            if reasons[mode]:
                rows.append(Fidelity(mode, available=False, note=reasons[mode]))
            elif mode == BASELINE:
                rows.append(_baseline(base, pieces, progress))
            else:
                with ExitStack() as own:
                    engine = most if most and mode == richest else opened(mode, base, own)
                    rows.append(_against(engine, base, mode, pieces, progress))
    return Comparison(tuple(rows), sum(len(piece) - 1 - len(piece) // 2 for piece in pieces))


def _baseline(base: Engine, pieces: Sequence[list[int]], progress: Progress | None) -> Fidelity:
    """The row of dense mode: by definition it does not differ from itself."""
    result = perplexity(base, pieces, progress)
    return Fidelity(
        mode=BASELINE,
        available=True,
        note=_NO_RECALL[BASELINE],
        perplexity=result.perplexity,
        perplexity_error=result.standard_error,
        perplexity_ratio=1.0,
        perplexity_ratio_error=0.0,
        kl=0.0,
        kl_error=0.0,
        max_kl=0.0,
        top1_agreement=1.0,
        top1_error=0.0,
        density=base.report().density,
        identical=True,
    )


def _against(
    engine: Engine, base: Engine, mode: str, pieces: Sequence[list[int]], progress: Progress | None
) -> Fidelity:
    """The row of a mode other than dense."""
    result = divergence(engine, base, pieces, progress)
    report = engine.report()
    return Fidelity(
        mode=mode,
        available=True,
        perplexity=result.perplexity,
        perplexity_error=result.perplexity_error,
        perplexity_ratio=result.ratio,
        perplexity_ratio_error=result.ratio_error,
        kl=result.mean_kl,
        kl_error=result.kl_error,
        max_kl=result.max_kl,
        top1_agreement=result.same_top,
        top1_error=result.same_top_error,
        density=report.density,
        recall=report.recall,
        note=_NO_RECALL.get(mode),
        identical=result.identical,
    )
