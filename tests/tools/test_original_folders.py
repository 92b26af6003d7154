"""Folders of ``.pt`` files of the original PowerInfer: keyed by layer number, and never trusted."""

import io
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from powerinfer_formats.predictors import Predictors
from powerinfer_formats.profile import MAX_TOKENS, Profile
from powerinfer_tools.errors import ImportFailed
from powerinfer_tools.model.original import above
from powerinfer_tools.stages.original.importing import (
    ImportCounts,
    ImportPredictors,
    import_counts,
    import_predictors,
)
from tiny_models import FAMILY_CASES, TinyModel, make_tiny_model

LAYERS, WIDTH, NEURONS = 12, 32, 40


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    spec = replace(
        FAMILY_CASES["llama-relu"], layers=LAYERS, width=WIDTH, heads=2, kv_heads=1, neurons=NEURONS
    )
    return make_tiny_model(tmp_path_factory.mktemp("twelve"), spec)


def write_predictors(folder: Path, dtype: torch.dtype = torch.float32) -> list[dict[str, torch.Tensor]]:
    """Twelve files; the number of a layer is in its first weight, its rank differs from the others'."""
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(1)
    states = []
    for index in range(LAYERS):
        rank = 4 + index
        state = {
            "fc1.weight": torch.randn(rank, WIDTH, generator=generator).to(dtype),
            "fc2.weight": torch.randn(NEURONS, rank, generator=generator).to(dtype),
        }
        state["fc1.weight"][0, 0] = index
        torch.save(state, folder / f"model_{index}.pt")
        states.append(state)
    return states


def write_counts(folder: Path, dtype: torch.dtype = torch.int64) -> list[torch.Tensor]:
    folder.mkdir(exist_ok=True)
    counts = [(torch.arange(NEURONS) * 7 + 100 * index).to(dtype) for index in range(LAYERS)]
    for index, layer in enumerate(counts):
        torch.save(layer, folder / f"activation_{index}.pt")
    return counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_predictors_of_twelve_layers_in_order(tiny: TinyModel, tmp_path: Path, dtype: torch.dtype) -> None:
    states = write_predictors(tmp_path / "p", dtype)
    header = import_predictors(ImportPredictors(tmp_path / "p", tiny.path, tmp_path / "out", "F32"))
    assert header.test_records == 0
    assert {(layer.kind, layer.quality) for layer in header.layers} == {("residual-relu", None)}
    found = Predictors.load(tmp_path / "out")
    assert [int(layer.inward[0, 0]) for layer in found.layers] == list(range(LAYERS))
    for layer, state in zip(found.layers, states, strict=True):
        assert np.array_equal(layer.inward, state["fc1.weight"].float().numpy())
        assert np.array_equal(layer.outward, state["fc2.weight"].float().numpy())
        assert (layer.threshold == -np.finfo(np.float32).smallest_subnormal).all()


@pytest.mark.parametrize(("config", "asked", "expected"), [
    (None, None, 0.0), ('{"sparse_threshold": 0.25}', None, 0.25), ('{"sparse_threshold": 0.25}', 0.5, 0.5),
    ('{"other": 1}', None, 0.0),
])  # fmt: skip
def test_threshold(
    tiny: TinyModel, tmp_path: Path, config: str | None, asked: float | None, expected: float
) -> None:
    write_predictors(tmp_path / "p")
    if config is not None:
        (tmp_path / "p" / "config.json").write_text(config)
    import_predictors(ImportPredictors(tmp_path / "p", tiny.path, tmp_path / "out", threshold=asked))
    threshold = Predictors.load(tmp_path / "out").layers[3].threshold
    assert (threshold == np.float32(above(expected))).all()
    # Scores at the threshold count, the next smaller ones do not.
    at = np.float32(expected)
    assert at > threshold[0]
    assert not np.nextafter(at, np.float32(-1)) > threshold[0]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32, torch.float64])
def test_counts_of_twelve_layers_in_order(tiny: TinyModel, tmp_path: Path, dtype: torch.dtype) -> None:
    counts = write_counts(tmp_path / "a", dtype)
    import_counts(ImportCounts(tmp_path / "a", tiny.path, tmp_path / "out", 5000))
    profile = Profile.load(tmp_path / "out")
    assert profile.tokens == 5000
    assert profile.fingerprint
    for index, layer in enumerate(counts):
        assert np.array_equal(profile.counts(index), layer.numpy().astype(np.uint64))
    assert profile.order(11).tolist() == list(range(NEURONS))[::-1]


def test_tokens_have_to_be_said_and_to_suffice(tiny: TinyModel, tmp_path: Path) -> None:
    write_counts(tmp_path / "a")
    for tokens, said in ((None, r"--tokens N \(the busiest neuron was active for 1,373\)"), (1372, "1,373")):
        with pytest.raises(ImportFailed, match=said):
            import_counts(ImportCounts(tmp_path / "a", tiny.path, tmp_path / "out", tokens))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "most", [(1 << 31) + 5, (1 << 32) - 1, 1 << 32, (1 << 32) + 5, 1 << 53, (1 << 63) - 1]
)
def test_large_counts_are_themselves_or_refused(tiny: TinyModel, tmp_path: Path, most: int) -> None:
    counts = write_counts(tmp_path / "a")
    counts[3][7] = most
    torch.save(counts[3], tmp_path / "a" / "activation_3.pt")
    options = ImportCounts(tmp_path / "a", tiny.path, tmp_path / "out", min(most, MAX_TOKENS))
    if most <= MAX_TOKENS:
        import_counts(options)
        assert Profile.load(tmp_path / "out").counts(3)[7] == most
    else:
        with pytest.raises(ImportFailed, match=r"activation_3\.pt has counts beyond"):
            import_counts(options)
        assert not (tmp_path / "out").exists()


def remove(*names: str) -> Callable[[Path], None]:
    def fault(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return fault


def copy(source: str, name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / source).read_bytes()) and None


def replaced(value: Any, name: str = "model_10.pt") -> Callable[[Path], None]:
    return lambda folder: torch.save(value, folder / name)


class Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, (f"touch {self.target}",)


def malicious(folder: Path) -> None:
    torch.save({"fc1.weight": Malicious(folder / "ran")}, folder / "model_10.pt")


def bare_pickle(folder: Path) -> None:
    (folder / "model_10.pt").write_bytes(pickle.dumps(Malicious(folder / "ran")))


def bomb(folder: Path) -> None:
    stored = zipfile.ZipFile(folder / "model_10.pt")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in stored.infolist():
            packed.writestr(entry.filename, stored.read(entry))
        packed.writestr("archive/data/9", bytes(1 << 20))
    (folder / "model_10.pt").write_bytes(buffer.getvalue())


def truncated(folder: Path) -> None:
    path = folder / "model_10.pt"
    path.write_bytes(path.read_bytes()[:-40])


def damaged(folder: Path) -> None:
    """The pickle inside is cut by other bytes, the archive around it is whole."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(folder / "model_10.pt") as whole, zipfile.ZipFile(buffer, "w") as other:
        for entry in whole.infolist():
            data = whole.read(entry)
            other.writestr(entry.filename, b"\x80\x02}q" if entry.filename.endswith("data.pkl") else data)
    (folder / "model_10.pt").write_bytes(buffer.getvalue())


def weights(first: torch.Tensor, second: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"fc1.weight": first, "fc2.weight": second}


GOOD = torch.zeros(4, WIDTH), torch.zeros(NEURONS, 4)
FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (remove("model_3.pt", "model_11.pt"), r"lacks model_3.pt, model_11.pt; the model has 12"),
    "twice": (copy("model_3.pt", "model_03.pt"), r"model_03.pt and model_3.pt are both of layer 3"),
    "too many": (copy("model_3.pt", "model_12.pt"), r"has model_12.pt, but the model has 12 layers"),
    "none": (remove(*(f"model_{i}.pt" for i in range(12))), r"holds no file named model_0.pt"),
    "malicious": (malicious, r"model_10.pt is refused: .* could run code \(it names (posix|os).system\)"),
    "bare pickle": (bare_pickle, r"model_10.pt is not a file of torch.save"),
    "bomb": (bomb, r"model_10.pt is refused: its archive unpacks to more"),
    "truncated": (truncated, r"model_10.pt is not a file of torch.save"),
    "damaged": (damaged, r"model_10.pt is refused: it is damaged"),
    "a tensor": (replaced(torch.zeros(3)), r"model_10.pt holds Tensor, expected a state dict"),
    "a bias": (replaced(weights(*GOOD) | {"fc1.bias": torch.zeros(4)}), r"fc1.bias, expected a state dict"),
    "a number": (replaced({"fc1.weight": 3, "fc2.weight": GOOD[1]}), r"fc1.weight is of type int"),
    "flat": (replaced(weights(torch.zeros(WIDTH), GOOD[1])), r"fc1.weight has 1 dimensions, expected 2"),
    "width": (replaced(weights(torch.zeros(4, 31), GOOD[1])), r"is \(4, 31\), expected \(rank, 32\)"),
    "rank": (replaced(weights(torch.zeros(5, WIDTH), GOOD[1])), r"\(40, 4\), expected \(40, 5\)"),
    "rank beyond": (replaced(weights(torch.zeros(41, WIDTH), torch.zeros(NEURONS, 41))), r"\(41, 32\)"),
    "empty": (replaced(weights(torch.zeros(0, WIDTH), torch.zeros(NEURONS, 0))), r"\(0, 32\), expected"),
    "complex": (replaced(weights(GOOD[0].to(torch.complex64), GOOD[1])), r"complex64, expected plain"),
    "sparse": (replaced(weights(GOOD[0].to_sparse(), GOOD[1])), r"expected plain numbers|refused"),
    "huge by strides": (
        replaced(weights(torch.zeros(1).as_strided((1 << 40, WIDTH), (0, 0)), GOOD[1])),
        r"fc1.weight claims \d+ values, more than the file holds",
    ),
    "not finite": (replaced(weights(GOOD[0] + float("nan"), GOOD[1])), r"weights that are not finite"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_predictor_folders(tiny: TinyModel, tmp_path: Path, fault: str) -> None:
    write_predictors(tmp_path)
    spoil, said = FAULTS[fault]
    spoil(tmp_path)
    with pytest.raises(ImportFailed, match=said) as caught:
        import_predictors(ImportPredictors(tmp_path, tiny.path, tmp_path / "out"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


COUNT_FAULTS = {
    "length": (torch.zeros(NEURONS + 1), r"is \(41\), expected one count for each of 40"),
    "matrix": (torch.zeros(1, NEURONS), r"has 2 dimensions, expected 1"),
    "shares": (torch.full((NEURONS,), 0.5), r"no counts"),
    "negative": (-torch.ones(NEURONS), r"no counts"),
    "not finite": (torch.full((NEURONS,), float("inf")), r"no counts"),
    "a dictionary": ({"a": torch.zeros(NEURONS)}, r"of type dict, expected a tensor"),
}


@pytest.mark.parametrize("fault", COUNT_FAULTS)
def test_faults_of_activation_folders(tiny: TinyModel, tmp_path: Path, fault: str) -> None:
    write_counts(tmp_path)
    value, said = COUNT_FAULTS[fault]
    torch.save(value, tmp_path / "activation_10.pt")
    with pytest.raises(ImportFailed, match=said):
        import_counts(ImportCounts(tmp_path, tiny.path, tmp_path / "out", 5000))


def test_other_faults(tiny: TinyModel, tmp_path: Path) -> None:
    write_predictors(tmp_path)
    with pytest.raises(ImportFailed, match="no whole blocks of Q8_0; take --type F16"):
        import_predictors(ImportPredictors(tmp_path, tiny.path, tmp_path / "out", "Q8_0"))
    with pytest.raises(ImportFailed, match="no such folder"):
        import_predictors(ImportPredictors(tmp_path / "no", tiny.path, tmp_path / "out"))
    with pytest.raises(ImportFailed, match="not a finite number"):
        import_predictors(ImportPredictors(tmp_path, tiny.path, tmp_path / "out", threshold=1e39))
    (tmp_path / "config.json").write_text('{"sparse_threshold": "high"}')
    with pytest.raises(ImportFailed, match="'high', expected a number"):
        import_predictors(ImportPredictors(tmp_path, tiny.path, tmp_path / "out"))
    smooth = make_tiny_model(tmp_path, replace(tiny.spec, activation="silu"))
    with pytest.raises(ImportFailed, match="exact zeros; silu has none"):
        import_counts(ImportCounts(tmp_path, smooth.path, tmp_path / "out", 1))


def test_sizes_are_judged_before_reading(
    tiny: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_predictors(tmp_path)
    monkeypatch.setattr("powerinfer_tools.stages.original.torch_folder.MAX_FILE_BYTES", 1000)
    with pytest.raises(ImportFailed, match="one layer has at most 1000"):
        import_predictors(ImportPredictors(tmp_path, tiny.path, tmp_path / "out"))
