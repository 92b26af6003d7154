"""A profile's counts of a layer's units, which are its neurons or its experts.

In a model with experts, a profile may count a layer with one FFN as one expert, which every token takes: then
all of its neurons have the same count.
"""

import numpy as np
import numpy.typing as npt

from powerinfer_formats.profile import Profile


def suits(profile: Profile, layer: int, units: int, *, beside_experts: bool) -> bool:
    """Whether ``profile`` counts the ``units`` of ``layer``; ``beside_experts``: the layer has one FFN, and
    other layers have experts."""
    return profile.neurons(layer) == units or (beside_experts and profile.neurons(layer) == 1)


def order_of(profile: Profile, layer: int, units: int) -> npt.NDArray[np.int32]:
    """The ``units`` of ``layer``, the busiest first; of equals, the first."""
    counted = profile.neurons(layer) == units
    return profile.order(layer) if counted else np.arange(units, dtype=np.int32)


def frequencies_of(profile: Profile, layer: int, units: int) -> npt.NDArray[np.float64]:
    """The share of tokens for which each of the ``units`` was active, descending."""
    if profile.neurons(layer) != units:
        return np.ones(units)
    frequency = np.asarray(profile.frequency(layer), dtype=np.float64)
    return np.ascontiguousarray(frequency[profile.order(layer)])
