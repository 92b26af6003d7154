"""What a file says and nothing here reads: refused by name, unless it changes nothing."""

from pathlib import Path

import numpy as np
import pytest
from gguf.constants import TENSOR_NAMES

from engine_logits import logits
from hybrid_families import FAMILIES, write_random_family
from powerinfer_formats.errors import FormatError, WrongShape
from powerinfer_formats.gguf_layout import ValueType
from powerinfer_formats.gguf_reader import GGUFFile
from powerinfer_formats.gguf_writer import GGUFWriter
from powerinfer_tools.errors import ModelError
from powerinfer_tools.model.architectures import ARCHITECTURES
from powerinfer_tools.model.loading import load_model
from powerinfer_tools.model.reference import forward
from random_families import write_random
from tiny_models import CASES, TinyModel, make_tiny_model

TYPES = {float: ValueType.FLOAT32, int: ValueType.UINT32}
ALL = np.array([True, True, False])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """Three layers."""
    return make_tiny_model(tmp_path_factory.mktemp("llama"), CASES["llama"])


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """Seven layers, the sixth of which sees everything."""
    return make_tiny_model(tmp_path_factory.mktemp("gemma"), CASES["gemma3"])


def changed(
    source: Path,
    output: Path,
    keys: dict[str, object] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
) -> Path:
    """``source`` with other or further keys and tensors."""
    keys, tensors = keys or {}, tensors or {}
    gguf = GGUFFile.open(source)
    with GGUFWriter(output) as writer:
        writer.copy_metadata(gguf, without=tuple(keys))
        for key, value in keys.items():
            if value is not None:
                writer.add(key, value, TYPES.get(type(value)))  # type: ignore[arg-type]
        for name, info in gguf.tensors.items():
            writer.declare(name, info.row_type, info.shape)
        for name, values in tensors.items():
            writer.declare(name, 0, values.shape)
        for name in gguf.tensors:
            writer.write(name, gguf.tensor(name))
        for name, values in tensors.items():
            writer.write(name, values.astype("<f4"))
    return output


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("blk.0.attn_q.scale", (1,)),
        ("blk.1.ffn_down.scale", (1,)),
        ("blk.2.attn_sinks.weight", (4,)),
        ("blk.3.attn_norm.weight", (64,)),
        ("output.bias", (10,)),
        ("per_layer_model_proj.weight", (8, 64)),
    ],
)
def test_a_tensor_that_nothing_reads_is_refused(
    llama: TinyModel, tmp_path: Path, name: str, shape: tuple[int, ...]
) -> None:
    path = changed(llama.path, tmp_path / "more.gguf", tensors={name: np.ones(shape, np.float32)})
    with pytest.raises(ModelError, match=f"unexpected tensor {name}".replace(".", r"\.")):
        load_model(path)


def test_every_tensor_name_of_the_format_is_used_or_refused(llama: TinyModel, tmp_path: Path) -> None:
    """Each that the gguf package knows, where the file does not have it yet, alone and as a scale of what it
    has: nothing is skipped but what belongs to images, sounds and further tokens."""
    own = set(GGUFFile.open(llama.path).tensors)
    names = {f"{name.format(bid=1)}.weight" for name in TENSOR_NAMES.values()} | {
        f"{name.removesuffix('.weight')}.{end}" for name in own for end in ("scale", "input_scale", "bias")
    }
    taken, said = [], list[tuple[str, str]]()
    for name in sorted(names - own):
        path = changed(llama.path, tmp_path / "more.gguf", tensors={name: np.ones(4, np.float32)})
        try:
            load_model(path).close()
            taken.append(name)
        except (ModelError, WrongShape) as error:
            said.append((name, str(error)))
    assert all(name in message for name, message in said)
    ends = (".nextn.", ".vis_")
    assert [n for n in taken if not n.startswith(("v.", "a.", "mm.")) and not any(e in n for e in ends)] == []


@pytest.mark.parametrize("name", ["v.blk.0.attn_q.weight", "mm.0.weight", "blk.3.nextn.eh_proj.weight"])
def test_a_tensor_that_may_be_left_out_changes_nothing(llama: TinyModel, tmp_path: Path, name: str) -> None:
    path = changed(llama.path, tmp_path / "more.gguf", tensors={name: np.ones((4, 64), np.float32)})
    tokens = llama.tokens(12)
    assert np.array_equal(logits(path, tokens), logits(llama.path, tokens))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.max_alibi_bias", 8.0),
        ("attention.clamp_kqv", 30.0),
        ("residual_scale", 0.5),
        ("logit_scale", 0.0625),
        ("embedding_scale", 12.0),
        ("attention.causal", False),
        ("attention.sliding_window", 128),
        ("rope.scaling.alpha", 2.0),
        ("swiglu_clamp_exp", np.array([0.0, 7.0, 0.0], np.float32)),
        ("expert_shared_count", 1),
        ("a.key.of.tomorrow", 0),
        ("a.key.of.tomorrow", "x" * 500),
    ],
)
def test_a_key_that_nothing_reads_is_refused(
    llama: TinyModel, tmp_path: Path, key: str, value: object
) -> None:
    path = changed(llama.path, tmp_path / "more.gguf", {f"llama.{key}": value})
    with pytest.raises(ModelError, match=f"llama.{key} is .{{1,60}}, which is not supported"):
        load_model(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.max_alibi_bias", 0.0),
        ("attention.causal", True),
        ("rope.scaling.factor", 0.0),
        ("rope.scaling.type", "none"),
        ("swiglu_clamp_exp", np.zeros(3, np.float32)),
        ("feed_forward_length", np.array([96] * 3, np.uint32)),
        ("attention.head_count_kv", np.array([2] * 3, np.uint32)),
    ],
)
def test_a_key_that_says_none_changes_nothing(
    llama: TinyModel, tmp_path: Path, key: str, value: object
) -> None:
    path = changed(llama.path, tmp_path / "more.gguf", {f"llama.{key}": value})
    tokens = llama.tokens(12)
    assert np.array_equal(logits(path, tokens), logits(llama.path, tokens))


@pytest.mark.parametrize("key", ["feed_forward_length", "attention.head_count", "attention.head_count_kv"])
def test_sizes_that_the_tensors_have_not_are_refused(llama: TinyModel, tmp_path: Path, key: str) -> None:
    """Layers may differ, but a file must mean what it says."""
    sizes = np.array([4, 4, 2], np.uint32)
    path = changed(llama.path, tmp_path / "more.gguf", {f"llama.{key}": sizes})
    with pytest.raises(WrongShape, match=r"tensor 'blk\.\d\.(ffn_gate|attn_[qk])\.weight' has the shape"):
        load_model(path)


def test_a_rotary_factor_without_a_type_is_linear(llama: TinyModel, tmp_path: Path) -> None:
    tokens = llama.tokens(20)
    typed = {"llama.rope.scaling.factor": 4.0, "llama.rope.scaling.type": "linear"}
    expected = logits(changed(llama.path, tmp_path / "typed.gguf", typed), tokens)
    for name, keys in (
        ("bare", {"llama.rope.scaling.factor": 4.0}),
        ("old", {"llama.rope.scale_linear": 4.0}),
    ):
        assert np.array_equal(logits(changed(llama.path, tmp_path / f"{name}.gguf", keys), tokens), expected)
    assert not np.array_equal(expected, logits(llama.path, tokens))


@pytest.mark.parametrize(
    ("pattern", "local"),
    [
        (None, (1, 1, 1, 1, 1, 0, 1)),
        (3, (1, 1, 0, 1, 1, 0, 1)),
        (np.array([1, 0, 0, 1, 1, 0, 1], np.uint32), (1, 0, 0, 1, 1, 0, 1)),
        (np.array([0, 1, 1, 0, 0, 1, 0], np.bool_), (0, 1, 1, 0, 0, 1, 0)),
    ],
)
def test_which_layers_have_the_window(
    gemma: TinyModel, tmp_path: Path, pattern: object, local: tuple[int, ...]
) -> None:
    """As the family does, by a period, or by a value for each layer."""
    key = "gemma3.attention.sliding_window_pattern"
    hyper = load_model(changed(gemma.path, tmp_path / "more.gguf", {key: pattern})).hyper
    assert [facts.window for facts in hyper.facts] == [8 * flag for flag in local]
    assert [facts.rope.base if facts.rope else 0 for facts in hyper.facts] == [
        1e4 if flag else 1e6 for flag in local
    ]


def test_which_layers_have_rotary_positions(llama: TinyModel, tmp_path: Path) -> None:
    keys = {"llama.attention.rope_pattern": ALL}
    hyper = load_model(changed(llama.path, tmp_path / "more.gguf", keys)).hyper
    assert [facts.rope is not None for facts in hyper.facts] == ALL.tolist()


#: Keys that may be missing without a trace: sizes, which the shapes of tensors say, too, and what has the
#: value in these files that the family has without it.
_MAY_BE_MISSING = {
    "attention.key_length",
    "attention.max_alibi_bias",
    "attention.value_length",
    "attention.value_length_swa",
    "expert_feed_forward_length",
    "expert_shared_count",
    "feed_forward_length",
    "interleave_moe_layer_step",
    "leading_dense_block_count",
    "rope.dimension_count",
}
#: The same of single families: there are no such heads or norms, or the model is not deep or long enough.
_MAY_BE_MISSING_IN = {
    "exaone4": {"attention.sliding_window"},
    "gemma4": {"attention.shared_kv_layers", "embedding_length_per_layer_input"},
    "deepseek32": {"attention.indexer.head_count", "attention.indexer.key_length"},
    "rwkv7": {"attention.head_count", "attention.layer_norm_rms_epsilon"},
    "arwkv7": {"attention.head_count"},
}
_LATENT = {name for name, spec in ARCHITECTURES.items() if spec.latent}
_ROWS = sorted({*ARCHITECTURES, *FAMILIES})


@pytest.mark.parametrize("name", _ROWS)
def test_keys_and_tensors_of_every_family_one_by_one(name: str, tmp_path: Path) -> None:
    """A key that is left out is missed, or changes what is computed; a scale of a tensor, and a key that the
    family has not, are refused by name."""
    path = tmp_path / "model.gguf"
    if name in FAMILIES:
        write_random_family(path, FAMILIES[name])
    else:
        write_random(path, ARCHITECTURES[name])
    tokens = list(range(3, 17))
    expected = forward(load_model(path), tokens)
    gguf = GGUFFile.open(path)
    prefix, unmissed = str(gguf.metadata["general.architecture"]), list[str]()
    for key in [key for key in gguf.metadata if key.startswith(f"{prefix}.")]:
        try:
            model = load_model(changed(path, tmp_path / "less.gguf", {key: None}))
            same = np.array_equal(forward(model, tokens), expected)
        except (ModelError, FormatError):
            continue
        if same:
            unmissed.append(key.removeprefix(f"{prefix}."))
    known = _MAY_BE_MISSING | _MAY_BE_MISSING_IN.get(prefix, set())
    assert set(unmissed) - known <= ({"attention.head_count_kv"} if prefix in _LATENT else set())
    own = [one for one in gguf.tensors if one.startswith("blk.1.") or not one.startswith("blk.")]
    scales = {f"{tensor.removesuffix('.weight')}.scale" for tensor in own if not tensor.endswith(".scale")}
    unknown = {"of_tomorrow.weight", "blk.1.attn_of_tomorrow.weight", "blk.1.ffn_of_tomorrow.bias"}
    for tensor in sorted((scales | unknown) - set(gguf.tensors)):
        path_of_more = changed(path, tmp_path / "more.gguf", tensors={tensor: np.ones(1, np.float32)})
        with pytest.raises(ModelError, match=f"unexpected tensor {tensor}".replace(".", r"\.")):
            load_model(path_of_more)
    for key in ("attention.of_tomorrow", "rope.scaling.of_tomorrow", "of_tomorrow"):
        more = changed(path, tmp_path / "more.gguf", {f"{prefix}.{key}": 1.5})
        with pytest.raises(ModelError, match=f"{prefix}.{key} is 1.5, which is not supported"):
            load_model(more)


def test_files_of_grok_before_its_keys(tmp_path: Path) -> None:
    """Those of the first model, which say no scales and no cap."""
    path = write_random(tmp_path / "model.gguf", ARCHITECTURES["grok"])
    keys = ("embedding_scale", "logit_scale", "attn_logit_softcapping")
    older = changed(path, tmp_path / "older.gguf", {f"grok.{key}": None for key in keys})
    hyper = load_model(older).hyper
    assert hyper.embedding_scale == pytest.approx(78.38367176906169)
    assert hyper.logit_scale * hyper.width == pytest.approx(0.5773502691896257 * 6144)
    assert hyper.attention_softcap == 30.0


def test_positions_that_are_not_turned_have_no_magnitude(tmp_path: Path) -> None:
    """Kimi Linear's latent attention has none."""
    path = write_random_family(tmp_path / "model.gguf", FAMILIES["kimi-linear"])
    scaled = changed(path, tmp_path / "more.gguf", {"kimi-linear.rope.scaling.attn_factor": 1.5})
    assert load_model(scaled).hyper.attention_scale == load_model(path).hyper.attention_scale


def test_divisors_of_another_number_of_dimensions_are_refused(tmp_path: Path) -> None:
    """They are those of all layers; some with a window turn fewer dimensions."""
    path = write_random(tmp_path / "model.gguf", ARCHITECTURES["granite_swa"])
    keys = {"granite_swa.rope.dimension_count_swa": 8}
    divisors = {"rope_freqs.weight": np.ones(8, np.float32)}
    load_model(changed(path, tmp_path / "keys.gguf", keys)).close()
    load_model(changed(path, tmp_path / "divisors.gguf", tensors=divisors)).close()
    with pytest.raises(ModelError, match="divisors of 16 rotary dimensions do not fit layers that have 8"):
        load_model(changed(path, tmp_path / "both.gguf", keys, divisors))


@pytest.mark.parametrize(("sections", "style"), [((8, 8, 0, 0), "neox"), ((0, 8, 8, 8), "norm")])
def test_sections_for_pictures(sections: tuple[int, ...], style: str, tmp_path: Path) -> None:
    """GLM 4 has pairs half a head apart where the first two are there."""
    path = write_random(tmp_path / "model.gguf", ARCHITECTURES["glm4"])
    keys = {"glm4.rope.dimension_sections": np.array(sections, np.int32)}
    rope = load_model(changed(path, tmp_path / "more.gguf", keys)).hyper.facts[0].rope
    assert rope is not None
    assert rope.style == style
