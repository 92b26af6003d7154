"""Looking into files, and the activation curve, worked out by hand on a profile of a few neurons."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from powerinfer_formats.delta import Change, Delta, DeltaHeader, Scaled
from powerinfer_formats.errors import FormatError
from powerinfer_formats.predictors import LowRank, PredictorInfo, Predictors, PredictorsHeader, Quality
from powerinfer_formats.profile import Corpus, ExpertSums, LayerSums, Profile
from powerinfer_formats.records import to_plain
from powerinfer_formats.trace import TraceHeader, encode_frame, write_trace
from powerinfer_tools.errors import PowerInferError
from powerinfer_tools.inspect import (
    activation_curves,
    describe,
    draw_curves,
    summarize_profile,
    terminal_chart,
)
from powerinfer_tools.inspect.curve import Curve
from powerinfer_tools.inspect.families import supported_families
from powerinfer_tools.model.architectures import ARCHITECTURES


def profile_of(*layers: list[int], tokens: int = 10) -> Profile:
    """A profile of a ReLU model whose neurons were active so many times."""
    sums = tuple(
        LayerSums(np.array(counts, np.uint64), None, np.zeros(len(counts)), np.zeros(len(counts)))
        for counts in layers
    )
    return Profile(
        fingerprint="0" * 64,
        model_name="small",
        architecture="llama",
        activation="relu",
        exact_zeros=True,
        tokens=tokens,
        window=8,
        target_density=0.2,
        corpus=(Corpus("a.txt", "1" * 64, tokens, 40),),
        tool_version="0.1.0",
        sums=sums,
    )


def test_curve_is_the_running_share_of_the_busiest_first() -> None:
    curve = Curve.of("layer", np.array([1, 6, 0, 3], np.uint64))
    assert curve.cumulative.tolist() == [0.0, 0.6, 0.9, 1.0, 1.0]
    assert curve.activity(0.25) == 0.6
    assert curve.activity(0.375) == pytest.approx(0.75, abs=1e-15)  # half-way between two neurons
    assert curve.neurons_for(0.6) == 0.25
    assert curve.neurons_for(0.61) == 0.5
    assert curve.neurons_for(1.0) == 0.75


def test_the_model_curve_pools_neurons_of_all_layers() -> None:
    curves = activation_curves(profile_of([8, 0], [1, 1]))
    assert curves.model.cumulative.tolist() == [0.0, 0.8, 0.9, 1.0, 1.0]
    assert curves.layers[0].cumulative.tolist() == [0.0, 1.0, 1.0]


def test_nothing_active_is_a_flat_curve_and_no_fault() -> None:
    curve = Curve.of("layer", np.zeros(3, np.uint64))
    assert curve.points((0.0, 0.5, 1.0)) == [0.0, 0.0, 0.0]
    assert curve.neurons_for(0.8) == 1.0


def test_output_is_sampled_at_every_percent() -> None:
    curve = activation_curves(profile_of([4, 3, 2, 1])).as_dict()
    assert len(curve["neurons"]) == len(curve["model"]) == len(curve["layers"][0]) == 101
    assert curve["model"][0] == 0.0
    assert curve["model"][25] == pytest.approx(0.4, abs=1e-15)
    assert curve["model"][100] == pytest.approx(1.0, abs=1e-15)


def test_summary_has_densities_from_counts() -> None:
    summary = summarize_profile(profile_of([10, 0, 5, 5], [0, 0, 0, 10]))
    assert [layer["density"] for layer in summary["layers"]] == [0.5, 0.25]
    assert summary["density"] == 0.375
    assert summary["tokens"] == 10
    assert summary["corpus"] == [{"name": "a.txt", "sha256": "1" * 64, "tokens": 10, "bytes": 40}]


def test_chart_of_a_straight_line_runs_from_corner_to_corner() -> None:
    lines = terminal_chart(Curve.of("even", np.ones(100, np.uint64)), width=20, height=10).split("\n")
    assert lines[0] == "share of activity (even)"
    assert lines[1].startswith(" 100% ┤")
    assert lines[1][-1] != " "
    assert len(lines[1]) == len(" 100% ┤") + 20  # reaches the last column at the top
    assert len(lines[10].split("┤")[1]) <= 3  # and only the first columns are at the bottom
    assert "50%" in lines[12]


@pytest.mark.parametrize(("ending", "start"), [(".svg", b"<?xml"), (".png", b"\x89PNG\r\n\x1a\n")])
def test_picture(tmp_path: Path, ending: str, start: bytes) -> None:
    path = tmp_path / f"curve{ending}"
    draw_curves(activation_curves(profile_of([5, 1, 0], [2, 2, 2])), path, "small")
    content = path.read_bytes()
    assert content.startswith(start)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [path.name]
    if ending == ".svg":
        assert b"small" in content or b"<use" in content


def test_picture_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PowerInferError, match=r"written as \.png or \.svg"):
        draw_curves(activation_curves(profile_of([1])), tmp_path / "curve.gif", "small")
    assert list(tmp_path.iterdir()) == []


def test_profile_is_recognised_by_its_content(tmp_path: Path) -> None:
    path = tmp_path / "without-ending"
    profile_of([3, 2, 1]).save(path)
    description = describe(path)
    assert description.kind == "profile"
    assert description.facts == summarize_profile(profile_of([3, 2, 1]))


def test_model_is_described_from_its_metadata(smollm2: Path) -> None:
    description = describe(smollm2)
    facts = description.facts
    assert description.kind == "model"
    assert (facts["architecture"], facts["tensor_count"], facts["parameters"]) == ("llama", 272, 134515008)
    assert facts["file_type"] == "MOSTLY_Q4_1"
    assert sum(facts["types"].values()) == sum(tensor.nbytes for tensor in description.tensors)
    verdict = facts["verdict"]
    # Each token reads the head, which is the embedding; 30 layers of 3 heads of 64, keys and values.
    assert verdict["products"] == 134515008 - (2 * 30 + 1) * 576
    assert verdict["cache_bytes"] == 4096 * 30 * 2 * 3 * 64 * 2
    assert 0 < sum(verdict["packed"].values()) < verdict["memory_bytes"]
    assert facts["metadata"]["tokenizer.ggml.tokens"] == "[49152 items]"
    tensor = next(tensor for tensor in description.tensors if tensor.name == "blk.0.ffn_gate.weight")
    assert (tensor.row_type, tensor.shape, tensor.nbytes) == ("Q4_1", (1536, 576), 1536 * 576 // 32 * 20)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x00" * 100, b"PK\x03\x04"])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(PowerInferError, match="is no GGUF file, profile, trace, predictors"):
        describe(path)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"GGUF", FormatError),
        (b"FUGG" + bytes(60), FormatError),
        (b"{}", FormatError),
        (b"format = 3", FormatError),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, content: bytes, error: type[Exception]) -> None:
    path = tmp_path / "damaged"
    path.write_bytes(content)
    with pytest.raises(error, match="damaged"):
        describe(path)


def test_a_trace_and_predictors_are_recognised(tmp_path: Path) -> None:
    trace, predictors = tmp_path / "a", tmp_path / "b"
    header = TraceHeader("ab" * 32, "tiny", "relu", 4, 9, 1, 32, ("cd" * 32,), "0", (2,))
    frame = encode_frame(np.ones((2, 4), np.float16), np.ones((2, 9), np.bool_))
    write_trace(trace, header, [frame])
    described = describe(trace)
    assert described.kind == "trace"
    assert described.facts["records"] == 2
    layer = LowRank(np.ones((2, 4), np.float32), np.ones((9, 2), np.float32), np.ones(9, np.float32))
    info = PredictorInfo("low-rank", 2, 140, Quality(0.1, 0.2, 0.9, 0.45))
    made = PredictorsHeader("ab" * 32, "tiny", "svd", "F32", 0.9, 4, 9, (info,), 5, None, (), "0")
    Predictors(made, (layer,)).save(predictors)
    described = describe(predictors)
    assert described.kind == "predictors"
    assert described.facts["layers"] == [to_plain(info)]


def test_a_delta_is_recognised(tmp_path: Path) -> None:
    def scaled(rows: int, columns: int) -> Scaled:
        return Scaled(np.ones((rows, columns), np.int8), np.zeros(columns, np.int8))

    header = DeltaHeader(
        "ab" * 32, "tiny", "relu", 0.0, "Q8_0", "Q8_0", 1, 4, 9, 0, "cd" * 32, 5, ("a",), (), "0"
    )
    whole = {"gate": Change(scaled(9, 4)), "up": Change(scaled(9, 4)), "down": Change(scaled(4, 9))}
    Delta(header, (whole,)).save(tmp_path / "a")
    described = describe(tmp_path / "a")
    assert described.kind == "delta"
    assert described.facts["result_sha256"] == "cd" * 32


def test_families_are_those_of_the_table() -> None:
    rows = {row.name: row for row in supported_families()}
    assert set(rows) == set(ARCHITECTURES)
    assert rows["arcee"].true_zeros
    assert not rows["llama"].true_zeros
    assert rows["deepseek2"].mixer == "latent attention"
    assert rows["mamba"].mixer == "selective scan"


def expert_profile() -> Profile:
    """Two layers of two experts of two neurons, the first without zeros counted."""
    whole = profile_of([8, 2], [6, 4])
    inside = ExpertSums(np.array([6, 4], np.uint64), np.array([[6, 0], [1, 1]], np.uint32))
    return replace(whole, activation="routing", sums=(whole.sums[0], replace(whole.sums[1], inside=inside)))


def test_zeros_inside_experts_are_told_by_layer() -> None:
    profile = expert_profile()
    curves, summary = activation_curves(profile), summarize_profile(profile)
    assert [layer.layer for layer in curves.inside] == [1]
    assert summary["active_in_experts"] == 8 / 20
    assert summary["inside_experts"] == [
        {"layer": 1, "active": 0.4, "least": 0.25, "most": 0.5, "neurons_for_80_percent": 0.5}
    ]
    assert curves.as_dict()["inside_experts"][0][50] == pytest.approx(7 / 8)
    assert "inside_experts" not in activation_curves(profile_of([1])).as_dict()
    assert "active_in_experts" not in summarize_profile(profile_of([1]))


def test_zeros_inside_experts_are_drawn_below(tmp_path: Path) -> None:
    draw_curves(activation_curves(expert_profile()), tmp_path / "with.svg", "small")
    draw_curves(activation_curves(profile_of([8, 2], [6, 4])), tmp_path / "without.svg", "small")
    with_inside, without = ((tmp_path / f"{name}.svg").read_text() for name in ("with", "without"))
    assert (with_inside.count('id="axes_'), without.count('id="axes_')) == (2, 1)
    bars = with_inside.count("#0969da") - without.count("#0969da")
    assert bars >= 1
