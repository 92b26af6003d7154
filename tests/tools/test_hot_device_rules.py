"""What the hot side gives to a GPU, on a device that refuses all that a GPU would: see ``strict_device``."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from expert_models import PreparedExperts
from fake_gpus import on
from powerinfer_kernels import RowType, block_shape, repack, row_bytes
from powerinfer_tools.engine import Engine
from powerinfer_tools.engine.hot.dequantize import dequantize
from powerinfer_tools.model.device_memory import CHUNK_ROWS, rows_at_once
from powerinfer_tools.model.loading import load_model
from split_models import GROUP, Prepared
from strict_device import OnDevice, RuleBroken, StrictDevice, launches_of, rules
from test_hot_predictors import Predicted
from tiny_models import TinySpec

#: Families, and the row types that one path or the other takes through the whole engine.
FORMS = [
    ("llama-wide-heads", "f16", False),
    ("llama-3.1-rope", "q8_0", False),
    ("qwen3", "f16", False),
    ("gemma3", "f16", False),
    ("opt-Q4_0", "f16", True),
    ("falcon-relu", "f16", False),
    ("llama-Q5_1", "f16", False),
    ("llama-F16", "f16", True),
    ("bamboo-Q4_1", "f16", True),
    ("llama-fatrelu", "f16", False),
]


def decoded(path: Path, tokens: list[int], **options: object) -> np.ndarray:
    """Logits after a prompt of 7 in pieces of 5, and of each token that follows."""
    engine = Engine(load_model(path), **({"threads": 1, "batch": 5, "context": 16} | options))  # type: ignore[arg-type]
    try:
        rows = [engine.prefill(tokens[:7]).copy()]
        return np.stack([*rows, *(engine.decode(token).copy() for token in tokens[7:])])
    finally:
        engine.close()


def strictly(
    path: Path, tokens: list[int], monkeypatch: pytest.MonkeyPatch, *, fused: bool, **options: object
) -> tuple[StrictDevice, np.ndarray]:
    """The same on such a device."""
    device = StrictDevice()
    on(monkeypatch, device, fused=fused)
    if fused:
        launches_of(device, monkeypatch)
    with rules(device):
        return device, decoded(path, tokens, device="cuda", **options)


@pytest.mark.parametrize(("case", "kv_type", "fused"), FORMS, ids=[f"{a}-{b}-{c}" for a, b, c in FORMS])
def test_every_step_is_what_a_gpu_can_do_without_waiting(
    case: str, kv_type: str, fused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All units there: attention, neurons in layers split, whole and left to the host, head. Graphs do the
    same work each time, and nothing is copied but what has to be."""
    model = Prepared(tmp_path, case)
    hot = [(GROUP, model.neurons, 0)[index % 3] for index in range(model.layers)]
    path, tokens = model.split(hot, attention=range(model.layers), head=True), model.tiny.tokens(9)
    expected = decoded(path, tokens, kv_type=kv_type)
    device, got = strictly(path, tokens, monkeypatch, fused=fused, kv_type=kv_type)
    if not fused:
        assert np.abs(got - expected).max() <= 0.02 * np.abs(expected).max()
    if fused:
        copies = ["out"]  # the logits; all else is written and read by kernels
        assert device.copies[-2:] == copies * 2 or hot[-1] == 0
    else:
        copies = copies_of_a_token(hot, model.neurons, parallel=case.startswith("falcon"))
        assert device.copies[-2 * len(copies) :] == copies * 2
    assert device.launched["graphs"] > 0


#: Of a layer, from one attention to the next.
KERNELS = [
    "attend",
    "attend",
    "matvec",
    "normalize",
    "hidden",
    "sum_rows",
    "sum_rows",
    "normalize",
    "matvecs",
]


#: With heads of whole blocks, which attention rounds by itself.
NINE = [
    TinySpec(head_dim=32, row_type="Q4_1"),
    TinySpec(family="opt", width=128, head_dim=32, kv_heads=4, activation="relu", row_type="Q4_0"),
    TinySpec(family="bamboo", head_dim=32, activation="drelu", vocabulary="spm", row_type="Q8_0"),
]


@pytest.mark.parametrize("case", NINE, ids=lambda spec: spec.family)
def test_a_layer_of_a_decoded_token_is_nine_kernels(
    case: TinySpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries, keys and values by one; rotated, kept and attended to by one; what was attended to rounded
    where it is summed up; sums added to the stream where they are made."""
    model = Prepared(tmp_path, case)
    every = [model.neurons] * model.layers
    path, tokens = model.split(every, attention=range(model.layers), head=True), model.tiny.tokens(9)
    device, _ = strictly(path, tokens, monkeypatch, fused=True)
    at = [i for i, name in enumerate(device.kernels) if name == "attend"][0::2][-model.layers :]
    layers = [device.kernels[first:last] for first, last in pairwise(at)]
    assert layers == [KERNELS] * (model.layers - 1)


def copies_of_a_token(hot: list[int], neurons: int, *, parallel: bool) -> list[str]:
    """Where all attention and the head are there: what goes in and out. The stream brings its positions."""
    copies, there = list[str](), False
    for count in hot:
        if count == 0 and parallel and there:
            # The FFN is the host's, and reads the stream that attention reads.
            copies, there = [*copies, "out"], False
        if not there:
            copies, there = [*copies, "in", "in"], True
        if count == 0:
            copies, there = [*copies, "out"], False
        elif count < neurons:
            copies += ["out", "in"]
    return [*copies, "out"] if there else [*copies, "in", "out"]


def test_neurons_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where attention is the host's, a decoded token costs two copies for each split layer; none where
    kernels reach the host's memory."""
    model = Prepared(tmp_path, "llama-Q8_0")
    path, tokens = model.split([GROUP, 2 * GROUP, 0]), model.tiny.tokens(9)
    expected = decoded(path, tokens)
    for fused in (False, True):
        device, got = strictly(path, tokens, monkeypatch, fused=fused)
        if not fused:
            assert np.abs(got - expected).max() <= 0.02 * np.abs(expected).max()
        assert device.copies == ["in", "out"] * 2 * (2 if fused else 4)


@pytest.mark.parametrize("name", ["rounded", "residual", "signs"])
@pytest.mark.parametrize("attention", [[], [0, 1, 2]], ids=["neurons", "stream"])
def test_predictors(name: str, attention: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which neurons are named decides no size there."""
    model = Predicted(tmp_path, name)
    path, tokens = model.split([GROUP, model.neurons, GROUP], attention, [0, 1, 2]), model.tiny.tokens(9)
    expected = decoded(path, tokens, device="cpu")
    _, got = strictly(path, tokens, monkeypatch, fused=False)
    assert np.abs(got - expected).max() <= 0.02 * np.abs(expected).max()


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("row_type", list(RowType), ids=lambda row_type: row_type.name)
def test_every_row_type_is_unpacked_without_the_host(row_type: RowType, fused: bool) -> None:
    values, _ = block_shape(row_type)
    device, columns = StrictDevice(), values * 2 if values > 1 else 7
    rows = np.random.default_rng(1).integers(0, 256, (3, row_bytes(row_type, columns)), dtype=np.uint8)
    rows = repack(rows, row_type, 3, columns)
    expected = dequantize(torch.from_numpy(rows), row_type, columns)
    with rules(device):
        there = device.allocate(rows.size).view(3, -1)
        there.copy_(torch.from_numpy(rows))
        got: list[torch.Tensor] = []
        steps = device.recorded([("unpack", lambda: got.append(dequantize(there, row_type, columns)))])
        device.submit(steps).wait()
    assert isinstance(got[-1], OnDevice)
    assert torch.equal(got[-1].inner.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("attention", [False, True], ids=["apart", "stream"])
@pytest.mark.parametrize("case", ["mixtral-Q4_0", "qwen2moe-Q8_0"])
def test_experts(case: str, attention: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With attention there, a token costs what the router says, its input, which experts it takes, and a sum
    that comes back."""
    model = PreparedExperts(tmp_path, case)
    shared = [bool(model.routing.shared_neurons)] * model.layers
    layers = range(model.layers if attention else 0)
    path, tokens = model.split([2] * model.layers, shared, layers, head=attention), model.tiny.tokens(9)
    expected, fused = decoded(path, tokens), case == "qwen2moe-Q8_0"
    device, got = strictly(path, tokens, monkeypatch, fused=fused)
    assert device.copies
    assert ("graphs" in device.launched) == (attention or fused)
    assert fused or np.abs(got - expected).max() <= 0.02 * np.abs(expected).max()


#: What is hot of each layer, in groups (9: all), and whether the stream is there; then, of a decoded token:
#: pieces of work that are submitted, of those the ones that are waited for, graphs, and copies. Before
#: layers and head were joined: (5, 5, 4, 2), (9, 9, 8, 6), (11, 11, 10, 8), (6, 6, 4, 4) and (3, 3, 3, 6).
COUNTS = [
    ([9, 9, 9], True, (1, 1, 1, 1)),
    ([1, 9, 1], True, (5, 3, 5, 1)),
    ([1, 1, 1], True, (7, 4, 7, 1)),
    ([9, 9, 0], True, (2, 2, 2, 2)),
    ([1, 1, 1], False, (3, 3, 3, 0)),
]


@pytest.mark.parametrize(("hot", "there", "expected"), COUNTS, ids=[f"{a}-{b}" for a, b, _ in COUNTS])
def test_what_a_token_costs(
    hot: list[int],
    there: bool,
    expected: tuple[int, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With fused kernels: everything between two turns of the host is one graph."""
    model = Prepared(tmp_path, "llama-Q4_1")
    counts = [model.neurons if groups == 9 else groups * GROUP for groups in hot]
    path = model.split(counts, attention=range(model.layers if there else 0), head=there)
    device, tokens = StrictDevice(), model.tiny.tokens(9)
    on(monkeypatch, device, fused=True)
    launches_of(device, monkeypatch)
    with rules(device), Engine(load_model(path), threads=1, batch=5, context=16, device="cuda") as engine:
        engine.prefill(tokens[:7])
        before, eager = token_counts(device), device.launched.get("queue")
        engine.decode(tokens[7])
        assert tuple(np.subtract(token_counts(device), before)) == expected
        assert device.launched.get("queue") == eager, "something was launched by itself"


@pytest.mark.parametrize(("there", "expected"), [(True, 200), (False, 33)])
def test_what_a_batch_launches(
    there: bool, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tokens, all neurons hot: norms and roundings are one kernel each, products lie where they belong.
    Before: 518 with all on the device, 33 with neurons alone."""
    model = Prepared(tmp_path, "llama-Q4_1")
    path = model.split([model.neurons] * 3, attention=range(3 if there else 0), head=there)
    device = StrictDevice()
    on(monkeypatch, device, fused=True)
    launches_of(device, monkeypatch)
    with rules(device), Engine(load_model(path), threads=1, batch=5, context=16, device="cuda") as engine:
        engine.prefill([1, 2, 3])
        before = device.launched["queue"]
        engine.prefill([4, 5])
        assert device.launched["queue"] - before == expected


def test_rows_are_unpacked_in_what_is_counted_for_it() -> None:
    """A 7B shape, all of it on the device, in batches of 512, of 16, and neurons alone."""
    width, neurons = 4096, 11008
    for tokens, parts, expected in ((512, 3, 3456), (16, 3, 4544), (512, 1, 1216)):
        rows = rows_at_once([CHUNK_ROWS * width] * parts, tokens)
        assert rows == expected
        assert rows < neurons
        more = 3 * tokens * (rows - CHUNK_ROWS)
        assert rows * width + more <= 3 * parts * CHUNK_ROWS * width


def token_counts(device: StrictDevice) -> tuple[int, ...]:
    """What was submitted, of that what is waited for, graphs, copies."""
    launched = device.launched
    return launched["submitted"], launched["awaited"], launched.get("graphs", 0), len(device.copies)


def test_the_rules_find_what_breaks_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of these runs on torch's CPU device."""
    device = StrictDevice()
    host, pinned = torch.ones(8), device.staging(8)
    number = [1.0]

    def changing() -> None:
        number[0] += 1
        x.mul_(number[0])

    with rules(device):
        x = device.allocate(32).view(torch.float32)
        x.copy_(host)
        x.add_(1.0)
        broken = [
            lambda: x.sum().item(),
            lambda: bool((x > 0).any()),
            lambda: x[x > 0],
            lambda: x.nonzero(),
            lambda: x.cpu(),
            lambda: x + host,
            lambda: x.copy_(host, non_blocking=True),
            lambda: x.copy_(pinned),
            lambda: pinned.view(2, 4).T.copy_(x.view(2, 4).T, non_blocking=True),
            lambda: x.copy_(pinned.to(torch.float16), non_blocking=True),
            lambda: host.to(x.device),
            lambda: torch.tensor([0, 2, 4, 6], device=x.device),
        ]
        for work in broken:
            with pytest.raises(RuleBroken):
                device.submit([("work", work)])
        fine = device.recorded([("work", lambda: x.mul_(2.0))])
        device.submit(fine).wait()
        again = device.recorded([("work", changing)])
        with pytest.raises(RuleBroken, match="a graph would do"):
            device.submit(again)
