"""Small shapes, machines and problems for tests of the planner."""

from dataclasses import replace

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from powerinfer_formats.block_types import TensorType
from powerinfer_tools.model.device_memory import budget_for
from powerinfer_tools.model.matrices import MatrixShape
from powerinfer_tools.model.shapes import ExpertsShape, LayerShape, ModelShape
from powerinfer_tools.stages.plan.capabilities import Capabilities
from powerinfer_tools.stages.plan.costs import Gpu, Machine
from powerinfer_tools.stages.plan.planner import Budgets
from powerinfer_tools.stages.plan.problem import Problem, Unit

Vector = npt.NDArray[np.float64]
#: An engine that places neurons alone, and computes all hot ones.
NEURONS_ONLY = Capabilities(frozenset({"ffn"}), sparse_hot=False)
CURVE = ((0.02, 0.7), (0.1, 0.85), (0.5, 0.95), (1.0, 1.0))


def granted(vram: int | None, ram: int | None = None) -> Budgets:
    """Budgets with ``vram`` bytes beside what is kept for the driver."""
    return Budgets(budget_for(vram) if vram is not None and vram > 0 else vram, ram)


def machine(
    *, ram: int = 1 << 34, vram: int | None = 1 << 32, sync: float = 1e-6, launch: float = 1e-7
) -> Machine:
    """A CPU at 20 GB/s with a GPU at 500 GB/s; ``vram`` None: without GPU."""
    gpu = None if vram is None else Gpu("test GPU", vram, 5e11, launch, sync, 1e10, 1e-7)
    return Machine("test machine", ram, 2e10, tuple((d, 2e10 * share) for d, share in CURVE), gpu)


def shape(
    layers: int = 4, neurons: int = 512, width: int = 256, *, activation: str = "silu", gated: bool = True
) -> ModelShape:
    """A small model in Q4_1 with Q8_0 embedding."""
    kind = TensorType.Q4_1
    up = MatrixShape(kind, neurons, width)
    layer = LayerShape(
        attention=(
            MatrixShape(kind, width, width),
            MatrixShape(kind, width // 2, width),
            MatrixShape(kind, width // 2, width),
            MatrixShape(kind, width, width),
        ),
        gate=up if gated else None,
        up=up,
        down=MatrixShape(kind, width, neurons),
        vector_bytes=8 * width,
    )
    table = MatrixShape(TensorType.Q8_0, 1000, width)
    return ModelShape(
        "small", "llama", activation, 4, 2, width // 4, 2048, (layer,) * layers, table, table, 64
    )


def skewed_frequencies(layers: int, neurons: int, seed: int = 0) -> tuple[Vector, ...]:
    """A different power law for each layer."""
    random = np.random.default_rng(seed)
    ranks = (np.arange(neurons) + 0.5) / neurons
    return tuple(
        np.minimum(1.0, random.uniform(0.01, 0.2) * ranks ** -random.uniform(0.2, 0.9)) for _ in range(layers)
    )


@st.composite
def problems(draw: st.DrawFn, *, units: int = 4, levels: int = 5) -> Problem:
    """Tiny problems; level 0 of every unit takes no VRAM and no RAM, so that something always fits."""
    made = []
    for index in range(draw(st.integers(1, units))):
        size = draw(st.integers(1, levels))
        numbers = st.lists(st.integers(0, 40), min_size=size, max_size=size)
        value = np.array(draw(st.lists(st.integers(1, 1000), min_size=size, max_size=size)), dtype=np.float64)
        vram, ram = np.array(draw(numbers)), np.array(draw(numbers))
        vram[0] = ram[0] = 0
        made.append(Unit(f"unit {index}", value, vram, ram))
    return Problem(tuple(made), draw(st.integers(0, 100)), draw(st.integers(0, 100)))


def expert_shape(
    layers: int = 3, experts: int = 8, used: int = 2, neurons: int = 128, width: int = 256, *, shared: int = 0
) -> ModelShape:
    """The small model with experts of ``neurons`` in place of each FFN, and a shared one of ``shared``."""
    kind, dense = TensorType.Q4_1, shape(1, neurons, width)

    def matrices(rows: int) -> tuple[MatrixShape, ...]:
        return (*[MatrixShape(kind, rows, width)] * 2, MatrixShape(kind, width, rows))

    router = [MatrixShape(TensorType.F32, experts, width)]
    if shared:
        router.append(MatrixShape(TensorType.F32, 1, width))
    made = ExpertsShape(experts, used, tuple(router), matrices(shared) if shared else ())
    return replace(dense, architecture="qwen2moe", layers=(replace(dense.layers[0], experts=made),) * layers)


def routing_frequencies(model: ModelShape, seed: int = 0) -> tuple[Vector, ...]:
    """Shares of tokens that take each expert, descending, another skew for each layer; they add up to what a
    token takes."""
    random, found = np.random.default_rng(seed), []
    for layer in model.layers:
        assert layer.experts is not None
        counts = np.zeros(layer.experts.count)
        popular = random.dirichlet(np.full(layer.experts.count, random.uniform(0.3, 3.0))) + 1e-9
        for _ in range(200):
            taken = random.choice(len(counts), layer.experts.used, replace=False, p=popular / popular.sum())
            counts[taken] += 1
        found.append(np.sort(counts / 200)[::-1].copy())
    return tuple(found)
