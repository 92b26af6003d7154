"""The blocks on the hot side, of every family: what it writes in torch operations against float64."""

from pathlib import Path

import numpy as np
import pytest
import torch

from hybrid_families import FAMILIES, write_random_family
from powerinfer_tools.engine.hot.hot_blocks import HotBlocks, head
from powerinfer_tools.engine.hot.limits import attention_limit
from powerinfer_tools.engine.hot.loading import Arena, Form
from powerinfer_tools.engine.hot.placed import Named, Placed
from powerinfer_tools.engine.hot.placement import Workload
from powerinfer_tools.errors import ModelError
from powerinfer_tools.model import blocks
from powerinfer_tools.model.architectures import ARCHITECTURES
from powerinfer_tools.model.device_memory import CHUNK_ROWS
from powerinfer_tools.model.layer_weights import AttentionWeights
from powerinfer_tools.model.loading import Model, load_model
from powerinfer_tools.model.reference import NumpyOperations
from powerinfer_tools.model.streams import Along
from random_families import write_random

ROWS = sorted(ARCHITECTURES.keys() - {family.name for family in FAMILIES.values()})
PIECES = (5, 1, 4, 1, 1)
HALF = 2.0**-11


class Written:
    """The blocks of ``model`` in memory of the CPU, which is counted first, as a device's is."""

    def __init__(self, model: Model) -> None:
        arena = Arena()
        self.layers = [
            index
            for index, layer in enumerate(model.layers)
            if plain(layer.attends) and not layer.recurs and model.inputs is None
        ]
        self._lay_out(model, arena)
        arena.fill(torch.full((arena.nbytes,), 0xFF, dtype=torch.uint8))
        self._lay_out(model, arena)

    def _lay_out(self, model: Model, arena: Arena) -> None:
        work, longest = Workload(max(PIECES), sum(PIECES)), max(m.columns for m in matrices(model))
        self.placed = Placed(
            model, Form(arena, fused=False, unpack=False), work, arena.floats(CHUNK_ROWS * longest)
        )
        self.named = Named(arena, work.tokens, fused=False)
        self.x = self.named.floats("x", model.hyper.width)
        self.blocks = {i: HotBlocks(model, i, self.placed, self.named, False) for i in self.layers}
        for one in self.blocks.values():
            one.mix(self.x)
            if model.layers[one.index].feeds is not None:
                one.ffn_input(self.x)
                one.merge(self.x, [self.x])
        head(model, self.placed, self.named, self.x)

    def streams(self, index: int, stream: np.ndarray) -> np.ndarray:
        """The residual stream after attention of layer ``index``, in pieces of several tokens and of one."""
        rows, position = [], 0
        for count in PIECES:
            x = self.x[:count]
            x.copy_(torch.from_numpy(stream[position : position + count].astype(np.float32)))
            self.placed.positions[:count].copy_(torch.arange(position, position + count))
            written = self.blocks[index].mix(x)
            written.before()
            if written.attend is not None:
                written.attend(position)
            written.after()
            rows.append(x.numpy().copy())
            position += count
        return np.concatenate(rows)


def plain(attends: object) -> bool:
    return isinstance(attends, AttentionWeights)


def matrices(model: Model) -> list:
    attending = [layer.attention for layer in model.layers if plain(layer.attends)]
    return [model.head, *(matrix for w in attending for matrix in (w.query, w.output))]


@pytest.fixture(params=[*ROWS, *FAMILIES])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Model:
    path = tmp_path / "random.gguf"
    if request.param in FAMILIES:
        write_random_family(path, FAMILIES[request.param])
    else:
        write_random(path, ARCHITECTURES[request.param])
    return load_model(path)


def test_attention_and_head_of_every_family(model: Model) -> None:
    """With the cache rounded alike: what is left is float32 rounding, which now and then tips a cached value
    over to its neighbour."""
    written, count = Written(model), sum(PIECES)
    stream = np.random.default_rng(2).standard_normal((count, model.hyper.width)).astype(np.float32)
    reference = NumpyOperations([0] * count, model.rope_factors, half_cache=True)
    wide = stream.astype(np.float64)
    for index in written.layers:
        expected = blocks.mix(reference, model.spec, model.hyper, index, model.layers[index], wide, Along())
        got = written.streams(index, stream)
        assert np.abs(expected - wide).max() > 0.1
        assert np.abs(got - expected).max() <= HALF * np.abs(expected).max()
    rows = written.x
    rows.copy_(torch.from_numpy(stream[: len(rows)]))
    head(model, written.placed, written.named, rows)()
    expected = blocks.head(reference, model, model.head, wide[: len(rows)])
    got = written.named.floats("logits", model.hyper.vocabulary).numpy()
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_left_to_the_cpu_is_what_has_no_form_here(name: str, tmp_path: Path) -> None:
    """And an operation that is asked for all the same is refused by name when it is written."""
    model = load_model(write_random_family(tmp_path / "random.gguf", FAMILIES[name]))
    here = [plain(layer.attends) and layer.recurs is None for layer in model.layers]
    reason = attention_limit(model)
    assert reason is not None or all(here)
    whole = ("differ", "routers", "width", "inputs of single layers", "embedding again", "with a factor")
    assert reason is None or not all(here) or any(part in reason for part in whole)
    form, work = Form(Arena(), fused=False, unpack=False), Workload(2, 4)
    placed = Placed(model, form, work, form.memory.floats(8))
    for index, layer in enumerate(model.layers):
        if layer.recurs is None and (layer.attends is None or plain(layer.attends)):
            continue
        written = HotBlocks(model, index, placed, Named(form.memory, 2, fused=False), False)
        with pytest.raises(ModelError, match=r"the hot side does not compute (recurrent|latent)"):
            written.mix(torch.zeros(2, model.hyper.width))
