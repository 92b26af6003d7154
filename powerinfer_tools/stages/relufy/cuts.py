"""Thresholds of each neuron's own, chosen by what a neuron contributes where its gate is small.

FATReLU has one cut for a whole model, and what a gate of a given size contributes differs from neuron to
neuron: it is the gate times up, along the neuron's column of down. Rows of gate multiplied by *s* and rows of
up divided by *s* leave gate·up as it is and turn the cut *c* into the threshold *c*/*s*, so thresholds of
their own need neither another activation nor a place in the file.
"""

import torch

from powerinfer_tools.stages.relufy.network import Tensor
from powerinfer_tools.stages.relufy.student import StudentFFN

#: Tokens that thresholds are chosen on, evenly spread.
_TOKENS = 4096
#: A neuron counts as contributing between a tenth of the median neuron and ten times as much.
_SPREAD = 10.0
#: The lowest threshold, in gates of the median neuron: no density goes above that of ReLU.
_LOWEST = 1e-3


@torch.no_grad()
def neuron_scales(ffn: StudentFFN, x: Tensor, density: float) -> Tensor:
    """Scales (neurons) that leave ``density`` of the neurons active on inputs ``x`` (tokens, width).

    Neuron *j* is active where gate_j · w_j is above one common τ; w_j = rms(up_j)·‖down column j‖ is what a
    gate of one contributes, relative to the median neuron.
    """
    x = x[:: max(1, len(x) // _TOKENS)]
    gate, up = ffn.gate(x).float(), ffn.up(x).float()
    weight = up.square().mean(dim=0).sqrt() * ffn.down.values.norm(dim=0)
    weight = (weight / (weight.median() + 1e-30)).clamp(1 / _SPREAD, _SPREAD)
    scores = (gate * weight).flatten()
    active = max(1, round(density * len(scores)))
    threshold = scores.kthvalue(len(scores) - active + 1).values.clamp(min=_LOWEST)
    scales: Tensor = weight * ffn.cut / threshold
    return scales
