"""config.json: what is not supported or makes no model is refused by name, and damage by a FormatError."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from powerinfer_formats import errors
from powerinfer_formats.errors import FormatError
from powerinfer_tools.errors import ModelError, PowerInferError
from powerinfer_tools.model.huggingface.config import Config
from powerinfer_tools.model.huggingface.rope import read_rope
from powerinfer_tools.model.loading import load_model
from tiny_folders import FOLDER_CASES, make_folder


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that loads."""
    path = tmp_path_factory.mktemp("good") / "model"
    make_folder(path, FOLDER_CASES["llama"])
    load_model(path).close()
    return path


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Path:
    """One of links to it, to be changed."""
    for file in good.iterdir():
        (tmp_path / file.name).symlink_to(file)
    return tmp_path


def replace(path: Path, text: str) -> None:
    """Another file in the place of a link."""
    path.unlink()
    path.write_text(text)


def configure(folder: Path, **changes: Any) -> None:
    """Change config.json; a value of ... is taken out."""
    config = json.loads((folder / "config.json").read_text()) | changes
    kept = {name: value for name, value in config.items() if value is not ...}
    replace(folder / "config.json", json.dumps(kept))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": ...}, "model_type is missing"),
        ({"model_type": 3}, "model_type is 3, expected a string"),
        ({"model_type": "rwkv"}, "model type 'rwkv' is not supported"),
        (
            {"architectures": ["LlamaForSequenceClassification"]},
            "is not supported for the model type 'llama'",
        ),
        ({"architectures": "LlamaForCausalLM"}, "expected a list"),
        ({"num_hidden_layers": ...}, "num_hidden_layers is missing"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, expected 1 to 4096"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True, expected a whole number"),
        ({"num_hidden_layers": 4}, r"no tensor 'model\.layers\.3\.input_layernorm\.weight'"),
        ({"num_hidden_layers": 2}, r"a tensor 'model\.layers\.2\..*does not have"),
        ({"hidden_size": "48"}, "hidden_size is '48', expected a whole number"),
        ({"hidden_size": -1}, "hidden_size is -1"),
        ({"hidden_size": 49, "head_dim": None}, "hidden_size is 49, no multiple of 4"),
        ({"num_attention_heads": 7, "head_dim": None}, "no multiple of 7"),
        ({"num_attention_heads": 8, "head_dim": None}, "has the shape|no whole number of heads"),
        ({"num_key_value_heads": 3}, "multiple of 3 key heads"),
        ({"head_dim": 7}, "head_dim is 7, expected an even number"),
        (
            {"intermediate_size": 96},
            "'model.layers.0.mlp.gate_proj.weight' in model.safetensors has the shape",
        ),
        ({"rms_norm_eps": 2}, "rms_norm_eps is 2, expected 0 to 1"),
        ({"rms_norm_eps": "x"}, "expected a number"),
        ({"hidden_act": "tanh"}, "activation 'tanh' is not supported"),
        ({"hidden_act": "fatrelu"}, "hidden_act_param is missing"),
        ({"hidden_act": "fatrelu", "hidden_act_param": -1}, "hidden_act_param is -1, expected 0"),
        ({"mlp_bias": True}, "mlp_bias other than False is not supported"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes', expected true or false"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised by 'gptq'.*not supported"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised by 'fp8'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.factor is missing"),
        ({"rope_parameters": {"rope_type": "linear"}}, r"rope_parameters\.factor is missing"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, "factor is 0, expected"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8}}, "low_freq_factor is missing"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_theta is 0"),
        ({"rope_parameters": 7}, "rope_parameters is not an object"),
        ({"rope_parameters": {"rope_theta": 10**4000}}, "rope_theta is a huge number"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps is a huge number"),
        ({"layer_types": [["full_attention"]] * 3}, "layers of type"),
        ({"rope_parameters": ..., "rope_scaling": {"type": "ntk", "factor": 2}}, "scaling 'ntk'"),
        (
            {"rope_parameters": ..., "partial_rotary_factor": 0.5},
            "partly rotated heads .partial_rotary_factor.",
        ),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries for 3 layers"),
        ({"layer_types": ["linear_attention"] * 3}, "layers of type 'linear_attention'"),
        ({"layer_types": ["sliding_attention"] * 3, "sliding_window": 0}, "sliding_window is 0"),
    ],
)
def test_a_config_that_is_refused(copy: Path, changes: dict[str, Any], message: str) -> None:
    configure(copy, **changes)
    with pytest.raises((FormatError, PowerInferError), match=message):
        load_model(copy)


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("config.json", "", errors.BadDocument),
        ("config.json", '{"a": NaN}', errors.BadDocument),
        ("config.json", '{"a": 1, "a": 2}', errors.BadDocument),
        ("config.json", '{"a": ' + "[" * 100_000, errors.BadDocument),
        ("config.json", "null", errors.BadField),
        ("tokenizer.json", "[]", errors.BadField),
        ("tokenizer_config.json", "7", errors.BadField),
        ("tokenizer_config.json", '{"bos_token": 5}', errors.BadField),
        ("tokenizer_config.json", '{"bos_token": {"content": 5}}', errors.BadField),
        ("tokenizer_config.json", '{"add_bos_token": 1}', errors.BadField),
        ("tokenizer_config.json", '{"chat_template": 1}', errors.BadField),
        ("generation_config.json", '{"eos_token_id": "2"}', errors.BadField),
    ],
)
def test_a_document_that_is_refused(copy: Path, name: str, text: str, error: type[Exception]) -> None:
    if (copy / name).exists():
        (copy / name).unlink()
    (copy / name).write_text(text)
    with pytest.raises(error):
        load_model(copy)


def _weights(copy: Path, **changes: Any) -> None:
    weights = load_file(copy / "model.safetensors") | changes
    (copy / "model.safetensors").unlink()
    save_file(
        {name: value for name, value in weights.items() if value is not None}, copy / "model.safetensors"
    )


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lm_head.weight", None, "no tensor 'lm_head.weight'"),
        ("model.norm.weight", None, "no tensor 'model.norm.weight'"),
        ("model.norm.weight", np.full(48, np.nan, np.float32), "not finite"),
        ("model.norm.weight", np.ones(48, np.float64), "is of type F64, which cannot be used"),
        ("model.norm.weight", np.ones((48, 1), np.float32), "has the shape 48 × 1"),
        ("model.layers.0.mlp.up_proj.weight", np.ones((88, 48), np.int8), "is of type I8"),
        ("model.layers.0.self_attn.k_proj.weight", np.ones((24, 47), np.float32), "has the shape 24 × 47"),
        (
            "model.layers.0.self_attn.q_proj.weight",
            np.ones((47, 48), np.float32),
            "no whole number of heads|shape",
        ),
        ("lm_head.bias", np.ones(8, np.float32), "lm_head.bias'.*does not have"),
        ("other.lm_head.weight", np.ones((8, 48), np.float32), "other.lm_head.weight'.*does not have"),
        ("model.layers.0.mlp.up_proj.bias", np.ones(88, np.float32), "up_proj.bias'.*does not have"),
        ("model.embed_tokens.weight", np.ones((5, 48), np.float32), "embedding 5 rows"),
    ],
)
def test_weights_that_are_refused(copy: Path, name: str, value: Any, message: str) -> None:
    _weights(copy, **{name: value})
    with pytest.raises((FormatError, PowerInferError), match=message):
        load_model(copy)


def test_left_over_frequencies_are_passed_over(copy: Path) -> None:
    _weights(copy, **{"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(6, np.float32)})
    load_model(copy).close()


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(data=st.data())
def test_any_value_anywhere_is_read_or_refused(good: Path, data: st.DataObject) -> None:
    """One value of one document replaced by any other: the model loads, or one of our errors says why not."""
    name = data.draw(st.sampled_from(["config.json", "tokenizer.json", "tokenizer_config.json"]))
    document = json.loads((good / name).read_text())
    place, key = document, data.draw(st.sampled_from(sorted(document)))
    for _ in range(3):
        inner = place[key]
        if isinstance(inner, dict) and inner and data.draw(st.booleans()):
            place, key = inner, data.draw(st.sampled_from(sorted(inner)))
        elif isinstance(inner, list) and inner and data.draw(st.booleans()):
            place, key = inner, data.draw(st.integers(0, len(inner) - 1))
    place[key] = data.draw(JSON)
    folder = good.parent / "fuzzed"
    folder.mkdir(exist_ok=True)
    for file in good.iterdir():
        (folder / file.name).unlink(missing_ok=True)
        (folder / file.name).symlink_to(file)
    replace(folder / name, json.dumps(document))
    with suppress(FormatError, PowerInferError):
        load_model(folder).close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"do_layer_norm_before": False},
            r"do_layer_norm_before other than True is not supported \(norms after attention and FFN",
        ),
        (
            {"word_embed_proj_dim": 32},
            r"word_embed_proj_dim other than hidden_size \(64\) is not supported .*project_in",
        ),
    ],
)
def test_opt_350m_is_refused_by_what_it_has(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    """Not by the shape of a tensor, or the absence of one."""
    config = {
        "model_type": "opt",
        "architectures": ["OPTForCausalLM"],
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 96,
    }
    (tmp_path / "config.json").write_text(json.dumps(config | settings))
    with pytest.raises(PowerInferError, match=message):
        load_model(tmp_path)


_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    "values",
    [
        {"rope_theta": 1e6, "rope_parameters": {"rope_type": "default"}},
        {"rope_theta": 1e6, "rope_parameters": {"rope_type": "linear", "factor": 4.0}},
        {"rope_theta": 1e6, "rope_parameters": {}},
        {"rope_theta": 1e6, "rope_parameters": {"rope_theta": 5e5}},
        {"rope_parameters": {"rope_theta": 5e5}, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_theta": 1e6, "rope_parameters": _LLAMA3},
        {"rope_theta": 1e6, "rope_scaling": _LLAMA3},
        {"rope_parameters": _LLAMA3, "original_max_position_embeddings": 64},
        {"rope_parameters": {**_LLAMA3, "original_max_position_embeddings": 128}},
    ],
)
def test_rotary_settings_mean_what_they_mean_to_transformers(tmp_path: Path, values: dict[str, Any]) -> None:
    """Frequencies of every mixture of the old and the new spelling."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    theirs = LlamaConfig(
        hidden_size=64, num_attention_heads=2, max_position_embeddings=512, **json.loads(json.dumps(values))
    )
    config = Config(tmp_path / "config.json", {"max_position_embeddings": 512, **values})
    rope, local = read_rope(config, 10000.0, 1.0, 32)
    assert local is None
    frequencies = rope.base ** -(np.arange(0, 32, 2) / 32) / rope.linear
    if rope.factors is not None:
        frequencies = frequencies / rope.factors
    np.testing.assert_allclose(LlamaRotaryEmbedding(theirs).inv_freq.numpy(), frequencies, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"residual_multiplier": 0.5}, "residual_multiplier is 0.5, which is not supported in models of the"),
        ({"attn_logit_cap": 30.0}, "attn_logit_cap is 30.0"),
        ({"sliding_window": 64}, "sliding_window is 64"),
        ({"rope_interleaved": True}, "rope_interleaved is True"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "warp": 3}}, r"rope_scaling\.warp is 3"),
        ({"extra": {"deep": [1] * 99}}, "extra is {'deep': "),
    ],
)
def test_a_setting_that_nothing_reads_is_refused(copy: Path, changes: dict[str, object], text: str) -> None:
    configure(copy, **changes)
    with pytest.raises(ModelError, match=text):
        load_model(copy)


def test_settings_that_change_nothing(copy: Path) -> None:
    """As writers of directories leave them: of training, of generation, of programs, and null."""
    configure(
        copy,
        attn_logit_cap=None,
        attention_dropout=0.1,
        initializer_range=0.02,
        pad_token_id=0,
        pretraining_tp=1,
        rope_interleaved=False,
        sliding_window=0,
        temperature=0.7,
        torch_dtype="bfloat16",
        unsloth_fixed=True,
        use_cache=True,
        **{"transformers.js_config": {"dtype": "q4"}},
    )
    load_model(copy).close()
