"""Families with recurrent layers, latent attention and routers of their own on their way from a profile to a
split file: what mixes the tokens of a layer does not matter to its neurons and experts."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine_logits import logits
from hybrid_families import FAMILIES, write_random_family
from hybrid_profiles import TOKENS, made
from plan_cases import granted
from powerinfer_formats.split import SplitFile
from powerinfer_tools.engine import Engine
from powerinfer_tools.errors import ConvertError, ModelError, ProfileError
from powerinfer_tools.measure.hardware.presets import PC_LOW
from powerinfer_tools.model.loading import load_model
from powerinfer_tools.model.reference import ffn_matrices
from powerinfer_tools.model.shapes import shape_of_model
from powerinfer_tools.stages.convert.conversion import ConvertOptions, convert
from powerinfer_tools.stages.plan.planner import PlanOptions
from powerinfer_tools.stages.plan.request import make_plan

#: Of neurons, and of experts.
NEURONS = ("jamba", "lfm2", "falcon-h1", "qwen35", "minicpm3", "plm", "arwkv7", "plamo2", "talkie")
EXPERTS = ("qwen35moe", "qwen3next", "nemotron_h_moe")
#: Some layers have no FFN, or one of another size, or one whose gate depends on all neurons.
UNEVEN = ("nemotron_h", "deci", "openelm", "gemma4", "gemma3n")


@pytest.mark.parametrize("case", ["plm", "nemotron_h"])
def test_zeros_of_every_layer_are_counted(case: str, tmp_path: Path) -> None:
    """With squared ReLU, a neuron is active where its product is positive; a layer without FFN has one unit,
    which never is."""
    path, _, profile = made(tmp_path, case)
    model, inputs = load_model(path), list[np.ndarray]()
    engine = Engine(model, threads=1, context=len(TOKENS), batch=len(TOKENS))
    engine.absorb(TOKENS, lambda layer, normed, hidden: inputs.append(hidden.copy()))
    engine.close()
    fed = [index for index, layer in enumerate(model.layers) if layer.feeds is not None]
    for index in range(model.hyper.layers):
        if index not in fed:
            assert profile.counts(index).tolist() == [0]
            continue
        hidden = inputs[fed.index(index)]
        assert hidden.shape[1] == len(ffn_matrices(model.layers[index])[0])
        np.testing.assert_array_equal(profile.counts(index), (hidden > 0).sum(axis=0))
        assert 0.2 < profile.density(index) < 0.8


@pytest.mark.parametrize("case", ["dots1", "lfm2moe", "nemotron_h_moe", "gpt-oss", "cohere2moe"])
def test_a_dense_layer_beside_experts_is_one_that_every_token_takes(case: str, tmp_path: Path) -> None:
    path, _, profile = made(tmp_path, case)
    facts = load_model(path).hyper.facts
    expected = {"dense": [len(TOKENS)], "none": [0]}
    for index, kind in enumerate(facts.ffn for facts in facts):
        if kind == "experts":
            assert int(profile.counts(index).sum()) == 2 * len(TOKENS)
        else:
            assert profile.counts(index).tolist() == expected[kind]


@pytest.mark.parametrize("case", [*NEURONS, *UNEVEN, "rwkv7", *EXPERTS])
def test_a_split_file_has_the_bits_of_its_source(case: str, tmp_path: Path) -> None:
    """Planned, converted, and run on the CPU alone and with a hot side."""
    path, saved, profile = made(tmp_path, case)
    shape = shape_of_model(load_model(path))
    options = PlanOptions(objective="frequency", context=len(TOKENS), group=4, batch=16)
    budget = granted(80_000 if case == "gemma4" else 40_000)
    plan = make_plan(shape, profile, PC_LOW, budget, options)
    assert all(layer.attention == "cpu" for layer in plan.layers)
    plan.save(tmp_path / "plan.json")
    output = tmp_path / "planned.powerinfer.gguf"
    convert(ConvertOptions(path, saved, tmp_path / "plan.json", output))
    got = logits(output, TOKENS, mode="dense")
    if case in EXPERTS:
        np.testing.assert_array_equal(got, logits(path, TOKENS))
    else:  # another order of neurons, of which the sums are made
        bound = 500 * np.finfo(np.float32).eps
        assert np.abs(got - logits(path, TOKENS)).max() <= bound * np.abs(got).max()
    hot = SplitFile.open(output).header.hot_neurons if case not in EXPERTS else ()
    again = logits(output, TOKENS, mode="dense", device="cpu")
    assert np.abs(again - got).max() <= 2000 * np.finfo(np.float32).eps * np.abs(got).max()
    assert case in EXPERTS or any(hot)


@pytest.mark.parametrize("case", ["nemotron_h", "nemotron_h_moe", "deci"])
def test_the_time_of_a_prompt_counts_layers_without_ffn(case: str, tmp_path: Path) -> None:
    """A plan for a request is what the command makes; more tokens of prompt take longer."""
    path, _, profile = made(tmp_path, case)
    shape, seconds = shape_of_model(load_model(path)), []
    for prompt in (16, 32):
        options = PlanOptions(context=64, group=4, batch=16, prompt=prompt)
        request = make_plan(shape, profile, PC_LOW, granted(0), options).request
        assert request is not None
        seconds.append(request.prompt_seconds)
    assert 0 < seconds[0] < seconds[1]


@pytest.mark.parametrize("case", ["plm", "rwkv7", "nemotron_h", "gemma3n"])
def test_what_is_zero_is_skipped_with_the_same_bits(case: str, tmp_path: Path) -> None:
    """Squared ReLU behind what mixes tokens otherwise, also beside layers without FFN, and a gate that keeps
    its largest: rows of inactive neurons are not read."""
    path, saved, profile = made(tmp_path, case)
    shape = shape_of_model(load_model(path))
    options = PlanOptions(context=len(TOKENS), group=4, batch=16)
    plan = make_plan(shape, profile, PC_LOW, granted(0), options)
    layers = [
        replace(layer, mode="gate-first" if shape.has_zeros(index) else "dense")
        for index, layer in enumerate(plan.layers)
    ]
    assert sum(layer.mode == "gate-first" for layer in layers) == {"nemotron_h": 1}.get(case, 2)
    replace(plan, layers=tuple(layers)).save(tmp_path / "plan.json")
    output = tmp_path / "cold.powerinfer.gguf"
    convert(ConvertOptions(path, saved, tmp_path / "plan.json", output))
    expected = logits(output, TOKENS, mode="dense")
    for threads in (1, 3):
        got = logits(output, TOKENS, mode="gate-first", threads=threads)
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(
    ("case", "what"),
    [
        ("mamba2", "layers none of which has an FFN"),
        ("granitehybrid", "biases of gated FFNs or experts"),
        ("gpt-oss", "biases of gated FFNs or experts"),
    ],
)
def test_convert_says_what_it_does_not_sort(case: str, what: str, tmp_path: Path) -> None:
    path = write_random_family(tmp_path / "model.gguf", FAMILIES[case])
    options = ConvertOptions(path, tmp_path / "no.safetensors", tmp_path / "no.json", tmp_path / "out.gguf")
    with pytest.raises(ConvertError, match=f"convert does not take models with {what}; run, eval and bench"):
        convert(options)


def test_gates_that_depend_on_all_neurons_have_no_part_elsewhere(tmp_path: Path) -> None:
    """A plan that has some on the accelerator is none of ours, and the engine says so."""
    path, saved, profile = made(tmp_path, "gemma3n")
    shape = shape_of_model(load_model(path))
    plan = make_plan(shape, profile, PC_LOW, granted(0), PlanOptions(context=len(TOKENS), group=4, batch=16))
    layers = [replace(layer, hot_neurons=4) for layer in plan.layers]
    replace(plan, layers=tuple(layers)).save(tmp_path / "plan.json")
    output = tmp_path / "hot.powerinfer.gguf"
    convert(ConvertOptions(path, saved, tmp_path / "plan.json", output))
    with pytest.raises(ModelError, match="layer 0 has neurons on the hot side, which does not compute gates"):
        Engine(load_model(output), device="cpu")
    Engine(load_model(output)).close()


def test_profile_says_what_it_does_not_count(tmp_path: Path) -> None:
    path = write_random_family(tmp_path / "model.gguf", FAMILIES["jamba"])
    model = load_model(path)
    changed = replace(model, hyper=replace(model.hyper, xielu=((0.0, 0.0, 0.0, 0.0),)))
    with pytest.raises(ProfileError, match="profile does not take models with xIELU activations"):
        changed.require_countable(ProfileError, "profile")
