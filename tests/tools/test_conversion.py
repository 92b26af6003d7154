"""convert: the split file computes what the source does, for every split point, thread count and device."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine_logits import logits
from powerinfer_formats.errors import CannotWrite, FormatError
from powerinfer_formats.gguf_reader import GGUFFile
from powerinfer_formats.plan import PlanProvenance
from powerinfer_formats.profile import Profile
from powerinfer_formats.split import SplitFile
from powerinfer_kernels import available_isas
from powerinfer_tools.engine import Engine
from powerinfer_tools.errors import ConvertError, HardwareError, ModelError, OtherProfile
from powerinfer_tools.model.architectures import RELU_FAMILY
from powerinfer_tools.model.loading import load_model
from powerinfer_tools.model.reference import forward
from powerinfer_tools.stages.convert.conversion import ConvertOptions, convert
from small_plans import plan_for
from split_models import GROUP, Prepared
from tiny_models import FAMILY_CASES, make_tiny_model

TOKENS = 30

#: Every kind of FFN, norm and block, and some row types.
CONVERTED = (
    "llama",
    "llama-relu",
    "bamboo",
    "qwen2",
    "gemma3",
    "opt",
    "falcon",
    "falcon-relu",
    "llama-Q4_1",
    "bamboo-Q4_1",
    "opt-Q4_0",
    "falcon-Q8_0",
    "qwen2-Q4_K_M",
    "gemma3-Q8_0",
)


@pytest.fixture(scope="module", params=CONVERTED)
def prepared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return Prepared(tmp_path_factory.mktemp("converted"), request.param)


def hot_counts(prepared: Prepared) -> list[int]:
    """Different in every layer, with none and all among them."""
    steps = prepared.neurons // GROUP
    return [(0, steps, steps // 2, 1)[i % 4] * GROUP for i in range(prepared.layers)]


def test_same_bits_for_any_split_point_threads_and_isa(prepared: Prepared) -> None:
    tokens = prepared.tiny.tokens(TOKENS)
    expected = logits(prepared.split([GROUP] * prepared.layers), tokens)
    path = prepared.split(hot_counts(prepared))
    for threads in (1, 2, 3):
        assert np.array_equal(logits(path, tokens, threads=threads), expected)
    for isa in available_isas():
        assert np.array_equal(logits(path, tokens, isa=isa), expected)


def test_dense_layers_have_the_bits_of_the_source(prepared: Prepared) -> None:
    """Where no neuron is hot and the down projection had to be quantised again, the file has the source's
    own, too; with exact zeros, gate-first gives the same bits, as it is dense there."""
    path = prepared.split([0] * prepared.layers)
    assert not SplitFile.open(prepared.split(hot_counts(prepared))).header.columns
    source, split = load_model(prepared.tiny.path), SplitFile.open(path)
    assert split.header.columns == (prepared.tiny.spec.row_type != "F32")
    for layer in split.layers:
        assert (layer.columns is not None) == split.header.columns
    if split.header.columns:
        tokens = prepared.tiny.tokens(TOKENS)
        expected = logits(prepared.tiny.path, tokens)
        assert np.array_equal(logits(path, tokens), expected)
        if source.exact_zeros:
            assert np.array_equal(logits(path, tokens, mode="gate-first"), expected)


def test_gate_first_has_the_bits_of_dense(prepared: Prepared) -> None:
    path = prepared.split(hot_counts(prepared))
    tokens = prepared.tiny.tokens(TOKENS)
    if prepared.tiny.spec.activation not in RELU_FAMILY:
        with pytest.raises(ModelError, match="no exact zeros"):
            logits(path, tokens, mode="gate-first")
        return
    gate_first = prepared.split(hot_counts(prepared), mode="gate-first")
    expected = logits(path, tokens)
    assert np.array_equal(logits(gate_first, tokens), expected)
    assert np.array_equal(logits(gate_first, tokens, mode="dense"), expected)


def test_hot_side_agrees_within_rounding(prepared: Prepared) -> None:
    """Both sides use the same rounded activations, so only the order of float32 sums differs."""
    path = prepared.split(hot_counts(prepared))
    tokens = prepared.tiny.tokens(TOKENS)
    expected = logits(path, tokens)
    got = logits(path, tokens, device="cpu")
    quantized = prepared.tiny.spec.row_type != "F32"
    # A sum that differs in its last bits may flip the rounding of an 8-bit activation in a later layer: one
    # part in 254 of a block's largest value, in few of them.
    bound = 0.02 if quantized else 2000 * np.finfo(np.float32).eps
    assert np.abs(got - expected).max() <= bound * np.abs(expected).max()
    assert np.array_equal(got, logits(path, tokens, device="cpu"))


def test_smaller_vram_moves_the_split_point(prepared: Prepared) -> None:
    path = prepared.split([prepared.neurons] * prepared.layers)
    tokens = prepared.tiny.tokens(TOKENS)
    model = load_model(path)
    engine = Engine(model, threads=1, device="cpu")
    full = engine.report().memory.vram
    engine.close()
    limit = full * 2 // 3
    engine = Engine(load_model(path), threads=1, device="cpu", vram=limit)
    used = engine.report().memory.vram
    engine.close()
    assert 0 < used <= limit < full
    expected = logits(path, tokens)
    got = logits(path, tokens, device="cpu", vram=limit)
    assert np.abs(got - expected).max() <= 0.02 * np.abs(expected).max()
    assert np.array_equal(logits(path, tokens, device="cpu", vram=0), expected)


def test_split_agrees_with_the_source(prepared: Prepared) -> None:
    """Against the float64 reference over the split's own weights, and those against the source's."""
    path = prepared.split(hot_counts(prepared))
    source, split = load_model(prepared.tiny.path), load_model(path)
    tokens = prepared.tiny.tokens(TOKENS)
    from_source, from_split = forward(source, tokens), forward(split, tokens)
    if prepared.tiny.spec.row_type == "F32":  # nothing was requantised: permuted sums of the same products
        assert np.allclose(from_split, from_source, rtol=0, atol=1e-9 * np.abs(from_source).max())
    header = split.split
    assert header is not None
    worst = max(header.header.requantization_error)
    assert worst == 0 if prepared.tiny.spec.row_type == "F32" else 0 < worst < 0.01


def test_permutation_keeps_gate_and_up_bits(prepared: Prepared) -> None:
    source, split = load_model(prepared.tiny.path), SplitFile.open(prepared.split(hot_counts(prepared)))
    profile = Profile.load(prepared.profile)
    for index, layer in enumerate(split.layers):
        order = profile.order(index)
        assert np.array_equal(layer.order, order)
        ffn = source.layers[index].ffn
        assert layer.kinds == (("gate", "up", "down") if source.spec.gated else ("up", "down"))
        bias = source.layers[index].ffn_bias
        assert (layer.bias is None) == (bias is None)
        assert bias is None or np.array_equal(layer.bias, bias[order])
        for kind in layer.kinds[:-1]:
            weight = getattr(ffn, kind)
            rows = weight.data.reshape(weight.rows, -1)
            assert np.array_equal(layer.rows(kind, 0, layer.neurons), rows[order])


def test_quant_is_followed(tmp_path: Path) -> None:
    prepared = Prepared(tmp_path, "llama-Q4_1")
    for quant, worst in (("Q4_0", 0.2), ("F16", 1e-3), ("F32", 0.0)):
        split = SplitFile.open(prepared.split([GROUP] * prepared.layers, quant=quant))
        assert split.layers[0].type_of("down").name == quant
        assert max(split.header.requantization_error) <= worst
    with pytest.raises(ConvertError, match="Q8_0, Q4_0"):
        prepared.split([GROUP] * prepared.layers, quant="Q9_9")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return Prepared(tmp_path_factory.mktemp("plain"), "llama")


def test_files_of_another_model_are_refused(plain: Prepared, tmp_path: Path) -> None:
    spec = replace(FAMILY_CASES["llama"], seed=99)
    other = make_tiny_model(tmp_path, spec, name="other")
    plan = tmp_path / "plan.json"
    plain.save_plan(plan, [0] * plain.layers)
    output = tmp_path / "out.powerinfer.gguf"
    with pytest.raises(ConvertError, match=r"'tiny', not for 'other'"):
        convert(ConvertOptions(other.path, plain.profile, plan, output))
    assert not output.exists()


def test_a_plan_of_another_profile_is_refused_with_what_differs(plain: Prepared, tmp_path: Path) -> None:
    """Corpora as a set, tokens and what was counted; a plan that names no corpus takes any profile."""
    profile = Profile.load(plain.profile)
    hashes = tuple(entry.sha256 for entry in profile.corpus)
    plan = plan_for(profile, [GROUP] * plain.layers, group=GROUP, width=plain.tiny.spec.width)
    own = PlanProvenance("a profile", hashes, profile.tokens, counting=profile.counting)
    file, output = tmp_path / "plan.json", tmp_path / "out.powerinfer.gguf"

    def attempt(provenance: PlanProvenance, *, other_profile: bool = False) -> None:
        replace(plan, provenance=provenance).save(file)
        convert(ConvertOptions(plain.tiny.path, plain.profile, file, output, other_profile=other_profile))

    others = [
        (replace(own, corpus_hashes=("ab" * 32,)), f"the plan's corpus is ababababab.*{hashes[0][:12]}"),
        (replace(own, corpus_hashes=(*hashes, *[f"{i:064x}" for i in range(5)])), "3 more, the profile's"),
        (replace(own, corpus_tokens=7), f"7 tokens were counted, here {profile.tokens}"),
        (replace(own, counting="experts, in windows of 8 tokens"), "counts experts, .* this one neurons act"),
    ]
    for provenance, says in others:
        with pytest.raises(OtherProfile, match=says) as caught:
            attempt(provenance)
        assert str(caught.value).startswith(f"{file} was made from another profile than {plain.profile}: ")
        assert not output.exists()
        attempt(provenance, other_profile=True)
        assert np.array_equal(SplitFile.open(output).layers[0].order, profile.order(0))
        output.unlink()
    for provenance in (own, replace(own, counting=""), PlanProvenance("none")):
        attempt(provenance)
        output.unlink()


def test_split_file_cannot_be_split_again(plain: Prepared, tmp_path: Path) -> None:
    path = plain.split([GROUP] * plain.layers)
    with pytest.raises(ConvertError, match="split file already"):
        convert(ConvertOptions(path, plain.profile, plain.profile, tmp_path / "out.gguf"))


def test_damaged_weights_are_named(plain: Prepared, tmp_path: Path) -> None:
    info = GGUFFile.open(plain.tiny.path).info("blk.1.ffn_up.weight")
    damaged = tmp_path / "tiny.gguf"
    data = bytearray(plain.tiny.path.read_bytes())
    start = info.offset + 4 * (3 * plain.tiny.spec.width + 5)
    data[start : start + 4] = np.float32(np.nan).tobytes()
    damaged.write_bytes(bytes(data))
    model = load_model(damaged)
    profile = replace(Profile.load(plain.profile), fingerprint=model.fingerprint)
    profile.save(tmp_path / "p.safetensors")
    plan = plan_for(profile, [0] * plain.layers, group=GROUP, width=plain.tiny.spec.width)
    plan.save(tmp_path / "plan.json")
    files = (tmp_path / name for name in ("p.safetensors", "plan.json", "out.gguf"))
    options = ConvertOptions(damaged, *files)
    with pytest.raises(ConvertError, match=r"blk\.1\.ffn_up\.weight .* row 3, column 5"):
        convert(options)
    assert not options.output.exists()


def test_full_disk_leaves_nothing(plain: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = tmp_path / "plan.json"
    plain.save_plan(plan, [0] * plain.layers)

    def full(path: Path, nbytes: int) -> None:
        raise CannotWrite(path, f"cannot be written: {nbytes} bytes do not fit")

    monkeypatch.setattr("powerinfer_formats.gguf_writer.require_space", full)
    output = tmp_path / "out.powerinfer.gguf"
    with pytest.raises(FormatError, match="do not fit"):
        convert(ConvertOptions(plain.tiny.path, plain.profile, plan, output))
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_source_model_has_no_hot_side(plain: Prepared) -> None:
    with pytest.raises(HardwareError, match="not a split file"):
        Engine(load_model(plain.tiny.path), device="cpu")
