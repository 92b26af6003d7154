"""The ways in which the FFN of a layer can be computed: the names that plans, split files and options use."""

from __future__ import annotations

from typing import Literal, get_args

#: Dense and gate-first are exact; predicted leaves out neurons that predictors miss, thresholded neurons with
#: a small factor. See SPEC.md, section 2.
Mode = Literal["dense", "gate-first", "predicted", "thresholded"]
#: All of them, exact ones first.
MODES: tuple[Mode, ...] = get_args(Mode)
#: Those of layers with experts: whole experts, or their neurons with a gate above zero alone.
EXPERT_MODES: tuple[Mode, ...] = ("dense", "gate-first")
