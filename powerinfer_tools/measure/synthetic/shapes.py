"""Shapes of published models, for files with random weights."""

from dataclasses import dataclass
from typing import Literal

from powerinfer_tools.measure.synthetic.recurrent import Latent, Recurrence, layer_parts
from powerinfer_tools.model.architectures import ARCHITECTURES, ArchitectureSpec


@dataclass(frozen=True)
class Shape:
    """Sizes of one model; what its layers are made of says the row of its architecture. ``biases``: those of
    q, k and v, or of all projections. ``window`` > 0: sliding attention as Gemma 3 has it. ``activation``:
    one that is not the architecture's own, in the dense form. ``experts`` > 0: so many of ``neurons`` each,
    of which a token takes ``used``, and one of ``shared`` neurons (0: none) besides. ``recurrence``: what
    mixes tokens instead of attention; ``latent``: attention is of this kind."""

    architecture: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    neurons: int
    vocabulary: int
    rope_base: float
    context: int = 4096
    tied: bool = False
    biases: Literal["none", "qkv", "all"] = "none"
    window: int = 0
    activation: str | None = None
    experts: int = 0
    used: int = 0
    shared: int = 0
    recurrence: Recurrence | None = None
    latent: Latent | None = None

    @property
    def fed(self) -> tuple[int, ...]:
        """The layers that have an FFN, or experts."""
        if self.recurrence is None:
            return tuple(range(self.layers))
        parts = (layer_parts(self.recurrence, layer) for layer in range(self.layers))
        return tuple(layer for layer, names in enumerate(parts) if {"ffn", "experts"} & {*names})

    @property
    def spec(self) -> ArchitectureSpec:
        """The row of its architecture."""
        return ARCHITECTURES[self.architecture]


#: Published configurations of these models.
SHAPES: dict[str, Shape] = {
    "smollm2-135m": Shape("llama", 30, 576, 9, 3, 64, 1536, 49152, 1e5, tied=True),
    "smollm2-360m": Shape("llama", 32, 960, 15, 5, 64, 2560, 49152, 1e5, tied=True),
    "tinyllama-1.1b": Shape("llama", 22, 2048, 32, 4, 64, 5632, 32000, 1e4),
    "llama-3.2-1b": Shape("llama", 16, 2048, 32, 8, 64, 8192, 128256, 5e5, tied=True),
    "llama-2-7b": Shape("llama", 32, 4096, 32, 32, 128, 11008, 32000, 1e4),
    "mistral-7b": Shape("llama", 32, 4096, 32, 8, 128, 14336, 32000, 1e6),
    "qwen2.5-0.5b": Shape("qwen2", 24, 896, 14, 2, 64, 4864, 151936, 1e6, tied=True, biases="qkv"),
    "qwen2.5-1.5b": Shape("qwen2", 28, 1536, 12, 2, 128, 8960, 151936, 1e6, tied=True, biases="qkv"),
    "opt-125m": Shape("opt", 12, 768, 12, 12, 64, 3072, 50272, 1e4, 2048, tied=True, biases="all"),
    "opt-1.3b": Shape("opt", 24, 2048, 32, 32, 64, 8192, 50272, 1e4, 2048, tied=True, biases="all"),
    "opt-6.7b": Shape("opt", 32, 4096, 32, 32, 128, 16384, 50272, 1e4, 2048, tied=True, biases="all"),
    "falcon-7b": Shape("falcon", 32, 4544, 71, 1, 64, 18176, 65024, 1e4, 2048, tied=True),
    "gemma-3-1b": Shape("gemma3", 26, 1152, 4, 1, 256, 6912, 262144, 1e6, tied=True, window=512),
    # With true zeros: squared ReLU without gate and with one, ReGLU, ReLU and dReLU inside experts.
    "nemotron-3-8b": Shape("nemotron", 32, 6144, 48, 48, 128, 24576, 256000, 1e4),
    "jais-2-8b": Shape("jais2", 32, 3328, 26, 26, 128, 26624, 150272, 5e5, 8192, biases="all"),
    "afm-4.5b": Shape("arcee", 36, 2560, 20, 4, 128, 18432, 128004, 1e4),
    "bitnet-2b-4t": Shape("bitnet", 30, 2560, 20, 5, 128, 6912, 128256, 5e5, tied=True, activation="relu2"),
    "nemotron-h-8b": Shape(
        "nemotron_h",
        52,
        4096,
        32,
        8,
        128,
        21504,
        131072,
        1e4,
        8192,
        recurrence=Recurrence(
            "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-", 8192, 128, 128, groups=8
        ),
    ),
    "nemotron-3-nano-30b-a3b": Shape(
        "nemotron_h_moe",
        52,
        2688,
        32,
        2,
        128,
        1856,
        131072,
        1e4,
        8192,
        experts=128,
        used=6,
        shared=3712,
        recurrence=Recurrence(
            "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME", 4096, 128, 64, groups=8
        ),
    ),
    "plm-1.8b": Shape(
        "plm", 32, 2048, 16, 16, 192, 8192, 151936, 1e5, tied=True, latent=Latent(512, 128, 64, 128)
    ),
    "rwkv7-world-2.9b": Shape(
        "rwkv7",
        32,
        2560,
        40,
        40,
        64,
        10240,
        65536,
        1e4,
        recurrence=Recurrence(state=64, ranks=(96, 96, 64, 320)),
    ),
    "bamboo-7b": Shape("bamboo", 32, 4096, 32, 8, 128, 14336, 32000, 1e4),
    "turbosparse-mixtral-47b": Shape(
        "llama", 32, 4096, 32, 8, 128, 14336, 32000, 1e6, activation="drelu", experts=8, used=2
    ),
    "smallthinker-4b-a0.6b": Shape(
        "smallthinker", 32, 1536, 12, 2, 128, 768, 151936, 1.5e6, experts=32, used=4
    ),
    "sparselm-2b": Shape("llama", 38, 2048, 32, 32, 64, 5632, 49152, 1e5, 2048, tied=True, activation="relu"),
    "mixtral-8x7b": Shape("llama", 32, 4096, 32, 8, 128, 14336, 32000, 1e6, experts=8, used=2),
    "qwen1.5-moe-a2.7b": Shape(
        "qwen2moe", 24, 2048, 16, 16, 128, 1408, 151936, 1e6, biases="qkv", experts=60, used=4, shared=5632
    ),
    "qwen3-30b-a3b": Shape("qwen3moe", 48, 2048, 32, 4, 128, 768, 151936, 1e6, experts=128, used=8),
}
