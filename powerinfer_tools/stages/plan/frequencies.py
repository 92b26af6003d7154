"""Activation frequencies of a model, from its profile, from published figures, or unknown."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from powerinfer_formats.profile import ROUTING
from powerinfer_tools.errors import PlanError
from powerinfer_tools.model.counted_units import frequencies_of, suits
from powerinfer_tools.model.predictor_shapes import Predictors
from powerinfer_tools.model.published import assumed_predictors
from powerinfer_tools.model.shapes import ModelShape
from powerinfer_tools.stages.plan.sparsity import published_frequencies
from powerinfer_tools.stages.plan.thresholded_shapes import Thresholds

if TYPE_CHECKING:
    from powerinfer_formats.profile import Profile

#: Source of frequencies that nothing is known about.
UNKNOWN = "unknown: no profile"
#: What is assumed of experts then. How even routing is depends on model and text; no published figure for
#: these models was found that says it layer by layer.
EVEN = "assumed: every expert equally often, as routers are trained to (a profile says how often)"
Vector = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Frequencies:
    """``layers``: the share of tokens for which each neuron was active, or that took each expert, [neurons]
    or [experts] descending, or None when nothing is known; ``predictors`` and ``thresholds`` of the layers
    that may be computed with them, none where it is empty. ``source`` says where the shares come from.
    ``inside``: for each layer the mean share of each expert's neurons that is active when it is taken, in the
    order of ``layers``; None for a layer of which that is not known, empty if it is of none."""

    layers: tuple[Vector, ...] | None
    source: str
    predictors: Predictors = ()
    thresholds: Thresholds = ()
    inside: tuple[Vector | None, ...] = ()


def model_frequencies(shape: ModelShape, profile: "Profile | None") -> Frequencies:
    """Frequencies of ``shape`` from its profile; without one, from published figures where there are any,
    with predictors of the published size.

    Raises PlanError for a profile of another model.
    """
    if profile is not None:
        _check_profile(shape, profile)
        layers = tuple(
            frequencies_of(profile, index, layer.counted) if layer.neurons else np.zeros(0)
            for index, layer in enumerate(shape.layers)
        )
        source, inside = f"profile of {profile.tokens:,} tokens", _inside(shape, profile)
        if inside:
            mean = np.mean([one.mean() for one in inside if one is not None])
            source += f"; of a taken expert's neurons, {mean:.1%} are active"
        return Frequencies(layers, source, inside=inside)
    if shape.sparsity is not None:
        curve = published_frequencies(shape.layers[0].neurons, shape.sparsity)
        return Frequencies((curve,) * len(shape.layers), shape.sparsity.source, assumed_predictors(shape))
    return Frequencies(None, EVEN if shape.routed else UNKNOWN)


def _inside(shape: ModelShape, profile: "Profile") -> tuple[Vector | None, ...]:
    shares = []
    for index, layer in enumerate(shape.layers):
        counted = layer.routed and profile.expert_neurons(index) == layer.up.rows
        density = profile.expert_density(index) if counted else None
        shares.append(None if density is None else density[profile.order(index)])
    return tuple(shares) if any(one is not None for one in shares) else ()


def _check_profile(shape: ModelShape, profile: "Profile") -> None:
    if shape.fingerprint is not None and profile.fingerprint != shape.fingerprint:
        raise PlanError(
            f"the profile was made for {profile.model_name} ({profile.fingerprint[:12]}…), not for "
            f"{shape.name} ({shape.fingerprint[:12]}…); make one with powerinfer profile"
        )
    if shape.routed != (profile.activation == ROUTING):
        counted, needed = ("neurons", "experts") if shape.routed else ("experts", "neurons")
        raise PlanError(
            f"the profile of {profile.model_name} counts {counted}, {shape.name} has {needed}; make one with "
            "powerinfer profile"
        )
    suitable = profile.layers == len(shape.layers) and all(
        suits(profile, index, layer.counted, beside_experts=shape.routed and layer.experts is None)
        for index, layer in enumerate(shape.layers)
    )
    if not suitable:
        counts = [profile.neurons(index) for index in range(profile.layers)]
        first = (*shape.expert_layers, *shape.layers)[0]
        units = "experts" if shape.routed else "neurons"
        raise PlanError(
            f"the profile of {profile.model_name} has {len(counts)} layers of up to {max(counts)} "
            f"{units}; {shape.name} has {len(shape.layers)} of {first.counted}"
        )
    if profile.tokens < 1:
        raise PlanError(f"the profile of {profile.model_name} counts no tokens")
