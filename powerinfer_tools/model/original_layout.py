"""What the original PowerInfer's models are: GGUF 3 with the magic ``PWRI``.

Beside the tensors of the family, each layer has ``ffn_up`` and (where there is a gate) ``ffn_gate`` as usual,
``ffn_down_t`` (the down projection, a row for each neuron) and a predictor: ``fc1`` (rank, width) and ``fc2``
(neurons, rank). Neuron *i* is computed where (fc2 · relu(fc1 · h))ᵢ ≥ ``powerinfer.sparse_threshold`` (0
without the key); h is the residual stream that the norm of the FFN reads. Its GPU splits
(``MODEL.generated.gpuidx``) are files of their own, and of no use here: plan decides anew.

Read from its source (``llama.cpp``: tensor tables and graph builders; ``ggml.c``: sparse products).
"""

from powerinfer_formats.gguf_layout import ORIGINAL_MAGIC
from powerinfer_formats.split_layout import KINDS
from powerinfer_kernels import RowType

MAGIC = ORIGINAL_MAGIC
KEY_THRESHOLD = "powerinfer.sparse_threshold"
#: The activation that it computes with in each family that it knows, whatever the model was made with.
ACTIVATIONS = {"llama": "relu", "bamboo": "drelu", "opt": "relu", "falcon": "relu"}
#: Row types that its sparse sum of down rows can read.
DOWN_TYPES = (RowType.F16, RowType.Q4_0)
#: Row types that it can multiply with.
MATRIX_TYPES = frozenset(set(RowType) - {RowType.BF16})
#: Families whose head must be a tensor of its own, also where it is the embedding.
OWN_HEAD = ("llama", "bamboo", "falcon")
#: Rows of a table of learnt positions, whatever the file says.
POSITIONS = 2050
#: Layers of up to so many neurons take another path there, which does not read the predictor as meant.
MOST_NEURONS_UNREAD = 1000


def ffn_name(layer: int, kind: str) -> str:
    """The rows ``kind`` (gate, up or down, a row for each neuron) of one layer."""
    return f"blk.{layer}.ffn_{kind}_t.weight" if kind == KINDS[-1] else f"blk.{layer}.ffn_{kind}.weight"


def predictor_names(layer: int) -> tuple[str, str]:
    """The two matrices of a layer's predictor."""
    return f"blk.{layer}.fc1.weight", f"blk.{layer}.fc2.weight"
