"""More families of Hugging Face directories without experts: rows of :mod:`.families`.

Sources: the configuration and modelling files of the ``transformers`` package. GGUF pairs the rotated values
of a head as the architecture table says; where ``transformers`` pairs halves and GGUF neighbours, the rows of
queries and keys are reordered.
"""

from dataclasses import replace

from powerinfer_tools.model.huggingface.changes import Change, grouped, interleaved
from powerinfer_tools.model.huggingface.config import Config
from powerinfer_tools.model.huggingface.family import (
    EMBEDDING,
    FFN,
    HEAD_NORMS,
    LAYER,
    NORMS,
    Family,
    Real,
    Rule,
    Setting,
    attention,
    both,
    every_layer,
    one_more,
    sizes,
)

_POST_NORMS = (
    Rule("blk.{i}.post_attention_norm.weight", f"{LAYER}.post_attention_layernorm.weight"),
    Rule("blk.{i}.post_ffw_norm.weight", f"{LAYER}.post_feedforward_layernorm.weight"),
)
_OUTPUT_NORM = Rule("output_norm.weight", "model.norm.weight")
_PRE_AND_POST_NORMS = (
    _OUTPUT_NORM,
    Rule("blk.{i}.attn_norm.weight", f"{LAYER}.input_layernorm.weight"),
    Rule("blk.{i}.ffn_norm.weight", f"{LAYER}.pre_feedforward_layernorm.weight"),
    *_POST_NORMS,
)
#: Rows of gate and up are one tensor, those of gate first.
_FUSED_FFN = (
    Rule("blk.{i}.ffn_up.weight", f"{LAYER}.mlp.gate_up_proj.weight"),
    Rule("blk.{i}.ffn_down.weight", f"{LAYER}.mlp.down_proj.weight"),
)
_LAYER_NORMS = (
    *both("output_norm", "model.norm"),
    *both("blk.{i}.attn_norm", f"{LAYER}.input_layernorm"),
    *both("blk.{i}.ffn_norm", f"{LAYER}.post_attention_layernorm"),
)
_SHARED_NORM = (_OUTPUT_NORM, Rule("blk.{i}.attn_norm.weight", f"{LAYER}.input_layernorm.weight"))
_UP_AND_DOWN = tuple(
    rule for kind in ("up", "down") for rule in both(f"blk.{{i}}.ffn_{kind}", f"{LAYER}.mlp.{kind}_proj")
)
_NO_BIAS = (("mlp_bias", False),)
#: Each head has its own keys.
_OWN_KEYS = tuple(row for row in sizes() if row.name != "num_key_value_heads")
_GRANITE = (
    Real("embedding_scale", "embedding_multiplier", 1.0),
    Real("residual_scale", "residual_multiplier", 1.0),
    Real("attention.scale", "attention_multiplier", 1.0),
    Real("logit_scale", "logits_scaling", 1.0),
)


def _every_second(config: Config, index: int) -> bool:
    return index % 2 == 0


def _past_windows(config: Config, index: int) -> bool:
    """Layers from a number on, in models that say that they have windows."""
    first = config.integer("max_window_layers", 80, low=0, high=4096)
    return config.flag("use_sliding_window", False) and index >= first


def _three_of_four(config: Config, index: int) -> bool:
    return (index + 1) % config.integer("sliding_window_pattern", 4, high=4096) != 0


def _renamed(rules: tuple[Rule, ...], **names: str) -> tuple[Rule, ...]:
    """The same with other words in the stored names."""
    for old, new in names.items():
        rules = tuple(replace(rule, stored=rule.stored.replace(f"{old}.", f"{new}.")) for rule in rules)
    return rules


def _changed(rules: tuple[Rule, ...], change: Change) -> tuple[Rule, ...]:
    return tuple(replace(rule, change=change) for rule in rules)


_NEOX_LAYER = "gpt_neox.layers.{i}"
_NEOX = (
    Rule("token_embd.weight", "gpt_neox.embed_in.weight"),
    *both("output_norm", "gpt_neox.final_layer_norm"),
    *both("blk.{i}.attn_norm", f"{_NEOX_LAYER}.input_layernorm"),
    *both("blk.{i}.ffn_norm", f"{_NEOX_LAYER}.post_attention_layernorm"),
    *_changed(both("blk.{i}.attn_qkv", f"{_NEOX_LAYER}.attention.query_key_value"), grouped),
    *both("blk.{i}.attn_output", f"{_NEOX_LAYER}.attention.dense"),
    *both("blk.{i}.ffn_up", f"{_NEOX_LAYER}.mlp.dense_h_to_4h"),
    *both("blk.{i}.ffn_down", f"{_NEOX_LAYER}.mlp.dense_4h_to_h"),
)
_BLOOM_LAYER = "transformer.h.{i}"
_BLOOM = (
    Rule("token_embd.weight", "transformer.word_embeddings.weight"),
    *both("token_embd_norm", "transformer.word_embeddings_layernorm"),
    *both("output_norm", "transformer.ln_f"),
    *both("blk.{i}.attn_norm", f"{_BLOOM_LAYER}.input_layernorm"),
    *both("blk.{i}.ffn_norm", f"{_BLOOM_LAYER}.post_attention_layernorm"),
    *_changed(both("blk.{i}.attn_qkv", f"{_BLOOM_LAYER}.self_attention.query_key_value"), grouped),
    *both("blk.{i}.attn_output", f"{_BLOOM_LAYER}.self_attention.dense"),
    *both("blk.{i}.ffn_up", f"{_BLOOM_LAYER}.mlp.dense_h_to_4h"),
    *both("blk.{i}.ffn_down", f"{_BLOOM_LAYER}.mlp.dense_4h_to_h"),
)
_PHI = (
    EMBEDDING,
    Rule("output.bias", "lm_head.bias"),
    *both("output_norm", "model.final_layernorm"),
    *both("blk.{i}.attn_norm", f"{LAYER}.input_layernorm"),
    *_renamed(attention(), o_proj="dense"),
    *both("blk.{i}.ffn_up", f"{LAYER}.mlp.fc1"),
    *both("blk.{i}.ffn_down", f"{LAYER}.mlp.fc2"),
)


def _four_times(config: Config) -> int:
    """Neurons of BLOOM, which its files do not say."""
    return 4 * config.integer("hidden_size", high=1 << 20)


def _bloom_size(name: str, *others: str) -> Setting:
    """A size that has had several names."""

    def read(config: Config) -> int:
        key = next((one for one in (name, *others) if config.has(one)), name)
        return config.integer(key, high=1 << 20)

    keys = {"hidden_size": "embedding_length", "n_layer": "block_count", "n_head": "attention.head_count"}
    return Setting(keys[name], name, derive=read)


def _bloom_context(config: Config) -> int:
    """Positions are distances, and end nowhere; all models were trained with 2,048."""
    return config.integer("seq_length", 2048, high=1 << 31)


DENSE = (
    Family("granite", ("GraniteForCausalLM",), "granite", sizes(),
           (EMBEDDING, *NORMS, *attention(interleaved), *FFN), reals=_GRANITE, fixed=_NO_BIAS),
    Family("olmo", ("OlmoForCausalLM",), "olmo", sizes(), (EMBEDDING, *attention(interleaved), *FFN),
           reals=(Real("attention.clamp_kqv", "clip_qkv", 0.0),), norm_name="", norm_eps=1e-5),
    Family("olmo2", ("Olmo2ForCausalLM",), "olmo2", sizes(),
           (EMBEDDING, _OUTPUT_NORM, *_POST_NORMS, *HEAD_NORMS, *attention(), *FFN), norm_eps=1e-5),
    Family("olmo3", ("Olmo3ForCausalLM",), "olmo2", sizes(),
           (EMBEDDING, _OUTPUT_NORM, *_POST_NORMS, *HEAD_NORMS, *attention(), *FFN), norm_eps=1e-5,
           window=4096, sliding=_three_of_four),
    Family("exaone4", ("Exaone4ForCausalLM",), "exaone4", sizes(num_key_value_heads=32),
           (EMBEDDING, _OUTPUT_NORM, *_POST_NORMS, *HEAD_NORMS, *attention(), *FFN), norm_eps=1e-5,
           window=4096, sliding=_three_of_four),
    Family("gemma", ("GemmaForCausalLM",), "gemma", sizes(head_dim=256),
           (EMBEDDING, *one_more(NORMS), *attention(), *FFN), activation_name="hidden_activation",
           activation="gelu_pytorch_tanh", activations=(("gelu", "gelu_tanh"),), tied=True),
    Family("gemma2", ("Gemma2ForCausalLM",), "gemma2", sizes(head_dim=256, num_key_value_heads=4),
           (EMBEDDING, *one_more(_PRE_AND_POST_NORMS), *attention(), *FFN), tied=True,
           activation_name="hidden_activation", activation="gelu_pytorch_tanh", window=4096,
           sliding=_every_second),
    Family("phi3", ("Phi3ForCausalLM",), "phi3", sizes(),
           (EMBEDDING, *NORMS, Rule("blk.{i}.attn_qkv.weight", f"{LAYER}.self_attn.qkv_proj.weight"),
            Rule("blk.{i}.attn_output.weight", f"{LAYER}.self_attn.o_proj.weight"), *_FUSED_FFN),
           norm_eps=1e-5, sliding=every_layer),
    Family("starcoder2", ("Starcoder2ForCausalLM",), "starcoder2", sizes(num_key_value_heads=2),
           (EMBEDDING, *_LAYER_NORMS, *attention(), *both("blk.{i}.ffn_up", f"{LAYER}.mlp.c_fc"),
            *both("blk.{i}.ffn_down", f"{LAYER}.mlp.c_proj")), norm_name="norm_epsilon", norm_eps=1e-5,
           activation="gelu_pytorch_tanh", tied=True, sliding=every_layer),
    Family("stablelm", ("StableLmForCausalLM",), "stablelm", sizes(num_key_value_heads=32),
           (EMBEDDING, *_LAYER_NORMS, *attention(), *FFN), norm_name="layer_norm_eps", norm_eps=1e-5,
           rotary_share=0.25, fixed=(("qk_layernorm", False), ("use_parallel_residual", False))),
    Family("cohere", ("CohereForCausalLM",), "command-r", sizes(), (EMBEDDING, *_SHARED_NORM, *attention(),
    *FFN), norm_name="layer_norm_eps", norm_eps=1e-5, tied=True, fixed=(("use_qk_norm", False),),
    reals=(Real("logit_scale", "logit_scale", 0.0625),)), Family("cohere2", ("Cohere2ForCausalLM",),
    "cohere2", sizes(), (EMBEDDING, *_SHARED_NORM, *attention(), *FFN), norm_name="layer_norm_eps",
    norm_eps=1e-5, tied=True, window=4096, sliding=_three_of_four, reals=(Real("logit_scale", "logit_scale",
    0.0625),)), Family("gpt_neox", ("GPTNeoXForCausalLM",), "gptneox", _OWN_KEYS, _NEOX,
    norm_name="layer_norm_eps", norm_eps=1e-5, activation="gelu", rotary_share=0.25, rotary_name="rotary_pct",
    flags=(("use_parallel_residual", "use_parallel_residual", True),), head_names=("embed_out.weight",)),
    Family("phi", ("PhiForCausalLM",), "phi2", sizes(), _PHI, norm_name="layer_norm_eps", norm_eps=1e-5,
    activation="gelu_new", rotary_share=0.5, fixed=(("qk_layernorm", False),)), Family("bloom",
    ("BloomForCausalLM",), "bloom", (_bloom_size("hidden_size", "n_embed"), _bloom_size("n_layer",
    "num_hidden_layers"), _bloom_size("n_head", "num_attention_heads"), Setting("feed_forward_length",
    "hidden_size", derive=_four_times), Setting("context_length", "seq_length", derive=_bloom_context)),
    _BLOOM, norm_name="layer_norm_epsilon", norm_eps=1e-5, activation_name="", activation="gelu_pytorch_tanh",
    tied=True, fixed=(("apply_residual_connection_post_layernorm", False),)), Family("glm",
    ("GlmForCausalLM",), "chatglm", sizes(num_key_value_heads=2, head_dim=128), (EMBEDDING, *NORMS,
    *attention(), *_FUSED_FFN), rotary_share=0.5, natively_paired=True), Family("glm4", ("Glm4ForCausalLM",),
    "glm4", sizes(num_key_value_heads=2, head_dim=128), (EMBEDDING, *NORMS, *attention(), *_FUSED_FFN,
    Rule("blk.{i}.post_attention_norm.weight", f"{LAYER}.post_self_attn_layernorm.weight"),
    Rule("blk.{i}.post_ffw_norm.weight", f"{LAYER}.post_mlp_layernorm.weight")), rotary_share=0.5,
    natively_paired=True, norm_eps=1e-5), Family("seed_oss", ("SeedOssForCausalLM",), "seed_oss",
    sizes(num_key_value_heads=8, head_dim=128), (EMBEDDING, _OUTPUT_NORM, Rule("blk.{i}.attn_norm.weight",
    f"{LAYER}.input_layernorm.weight"), Rule("blk.{i}.post_attention_norm.weight",
    f"{LAYER}.post_attention_layernorm.weight"), *attention(), *FFN), fixed=_NO_BIAS), Family("ernie4_5",
    ("Ernie4_5ForCausalLM",), "ernie4_5", sizes(num_key_value_heads=2), (EMBEDDING, *NORMS, *attention(),
    *FFN), tied=True, norm_eps=1e-5, natively_paired=True, fixed=(("use_bias", False),)),
    Family("hunyuan_v1_dense", ("HunYuanDenseV1ForCausalLM",), "hunyuan-dense", sizes(), (EMBEDDING, *NORMS,
    *attention(), *FFN, Rule("blk.{i}.attn_q_norm.weight", f"{LAYER}.self_attn.query_layernorm.weight"),
    Rule("blk.{i}.attn_k_norm.weight", f"{LAYER}.self_attn.key_layernorm.weight")), norm_eps=1e-5),
    Family("jais2", ("Jais2ForCausalLM",), "jais2", sizes(num_key_value_heads=32), (EMBEDDING, *_LAYER_NORMS,
    *attention(), *_UP_AND_DOWN), norm_name="layer_norm_eps", norm_eps=1e-5, activation="relu2"),
    Family("ministral", ("MinistralForCausalLM",), "llama", sizes(num_key_value_heads=8), (EMBEDDING, *NORMS,
    *attention(interleaved), *FFN), window=4096, sliding=every_layer),
    # Queries grow with their position.
    Family("ministral3", ("Ministral3ForCausalLM",), "mistral3", sizes(num_key_value_heads=8, head_dim=128),
           (EMBEDDING, *NORMS, *attention(interleaved), *FFN), norm_eps=1e-5, rope_base=1e6,
           fixed=(("sliding_window", None),),
           ignored=("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_")),
    Family("apertus", ("ApertusForCausalLM",), "apertus", sizes(),
           (EMBEDDING, _OUTPUT_NORM, Rule("blk.{i}.attn_norm.weight", f"{LAYER}.attention_layernorm.weight"),
            Rule("blk.{i}.ffn_norm.weight", f"{LAYER}.feedforward_layernorm.weight"), *HEAD_NORMS,
            *attention(), *FFN[1:]), activation="xielu", rope_base=12e6, norm_eps=1e-5,
           numbers=tuple((f"xielu.{name}", f"{LAYER}.mlp.act_fn.{name}")
                         for name in ("alpha_p", "alpha_n", "beta", "eps"))),
    # Text models of Qwen's models of text and images; sections of positions are the same for text alone.
    Family("qwen3_vl_text", ("Qwen3VLForConditionalGeneration",), "qwen3vl",
           sizes(num_key_value_heads=8, head_dim=128), (EMBEDDING, *NORMS, *attention(), *HEAD_NORMS, *FFN),
           rope_base=5e6, ignored=("model.visual.", "visual.")),
    *(Family(f"{name}_text", (f"{kind}ForConditionalGeneration",), "qwen2vl", sizes(num_key_value_heads=8),
             (EMBEDDING, *NORMS, *attention(), *FFN), norm_eps=1e-5, rope_base=1e6, window=4096,
             sliding=_past_windows, ignored=("model.visual.", "visual."))
      for name, kind in (("qwen2_vl", "Qwen2VL"), ("qwen2_5_vl", "Qwen2_5_VL"))),
)  # fmt: skip
