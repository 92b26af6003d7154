"""Settings of a config.json that nobody read: they change nothing, which is said here, or they are refused by
name, as keys of GGUF files are.

A setting may say again what the tensors say (sizes, biases, which layers have experts): a file whose tensors
are others is refused for those. Some are about training, about generation, or about parts that no text needs.
"""

import fnmatch
from typing import Any

from powerinfer_tools.errors import ModelError
from powerinfer_tools.model.huggingface.config import Config
from powerinfer_tools.model.huggingface.family import Family

#: Names and patterns of what changes nothing in text generation as it is done here.
CHANGES_NOTHING = (
    # What wrote the file, and for whom.
    "_*",
    "*version*",
    "architectures",
    "auto_map",
    "dtype",
    "torch_dtype",
    "finetuning_task",
    "id2label",
    "is_llama_config",
    "label2id",
    "model_type",
    "num_labels",
    "problem_type",
    "task_specific_params",
    "tokenizer_class",
    "transformers*",
    "unsloth*",
    # Training.
    "*dropout*",
    "*_pdrop",
    "altup_coef_clip",
    "*aux_loss*",
    "*initializer*",
    "*z_loss*",
    "ep_size",
    "gradient_checkpointing*",
    "init_*",
    "layerdrop",
    "output_router_logits",
    "pretraining_tp",
    "rescale_prenorm_residual",
    "router_jitter_noise",
    "seq_aux",
    "embedding_fraction",
    "pad_vocab_size_multiple",
    "time_step_floor",
    "time_step_init_scheme",
    "time_step_max",
    "time_step_min",
    "time_step_scale",
    # How a program computes the same.
    "*attn_implementation*",
    "*chunk_size*",
    "*flash_attn*",
    "*flash_attention*",
    "mamba_ssm_cache_dtype",
    "moe_shared_expert_overlap",
    "num_logits_to_keep",
    "residual_in_fp32",
    "return_dict*",
    "slow_but_exact",
    "attention_softmax_in_fp32",
    "bias_dropout_fusion",
    "cache_implementation",
    "for_llm_compressor",
    "masked_softmax_fusion",
    "fused_add_norm",
    "reorder_and_upcast_attn",
    "skip_bias_add*",
    "use_fused*",
    "torchscript",
    "use_cache*",
    "use_associative_scan",
    "use_mamba_kernels",
    "use_mambapy",
    # Defaults of generation, and special tokens, which the tokeniser's files say.
    "*token_id*",
    "*_token_index",
    "bad_words_ids",
    "begin_suppress_tokens",
    "diversity_penalty",
    "do_sample",
    "early_stopping",
    "length_penalty",
    "max_length",
    "max_new_tokens",
    "min_length",
    "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "exponential_decay_length_penalty",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "prefix",
    "remove_invalid_values",
    "repetition_penalty",
    "suppress_tokens",
    "temperature",
    "tf_legacy_loss",
    "top_k",
    "top_p",
    "typical_p",
    "pruned_heads",
    "use_bfloat16",
    # Layers that predict further tokens, pictures and sound.
    "*mtp*",
    "*nextn*",
    "anyres*",
    "audio_*",
    "class_num",
    "summary_*",
    "im_*_id",
    "mask_init_id",
    "max_image_size",
    "num_media_embeds",
    "pool_type",
    "skip_cls_token",
    "text_*_id",
    "vit_*",
    "image_*",
    "mm_*",
    "spatial_merge_size",
    "video_*",
    "vision_*",
    "multimodal_projector_bias",
    "projector_hidden_act",
    # What the tensors say: sizes, biases and norms that are there, and layers with experts.
    "vocab_size",
    "attention_bias",
    "attention_in_bias",
    "attention_out_bias",
    "attn_bias",
    "bias",
    "no_bias",
    "learned_pos_emb",
    "projectors_bias",
    "enable_bias",
    "mlp_bias",
    "qkv_bias",
    "use_bias",
    "use_qkv_bias",
    "use_qk_norm",
    "qk_layernorm",
    "mamba_conv_bias",
    "use_conv_bias",
    "use_expert_bias",
    "moe_router_enable_expert_bias",
    "use_moe",
    "use_routing_bias",
    "attention_head_dim",
    "attention_k_eq_v",
    "attn_type_list",
    "block_*",
    "conv_dim*",
    "conv_use_xavier_init",
    "expand",
    "head_dim",
    "intermediate_size",
    "laurel_rank",
    "num_heads",
    "mamba_d_head",
    "mamba_expand",
    "qk_head_dim",
    "time_step_rank",
    "first_k_dense_replace",
    "full_attn_idxs",
    "global_attn_every_n_layers",
    "interleave_moe_layer_step",
    "mlp_layer_types",
    "moe_layers",
    "moe_layer_end_index",
    "moe_layer_freq",
    "moe_layer_interval",
    "moe_layer_start_index",
    "max_position_embeddings",
    "max_window_layers",  # windows themselves are refused
    "multi_query",
    "num_attention_heads",
    "num_dense_layers",
    "num_key_value_heads",
    "num_kv_heads",
    "num_ln_in_parallel_attn",
    "rms_norm_eps",  # of norms that the family has not
    "original_max_position_embeddings",
    "rope_parameters.max_position_embeddings",
    "rope_scaling.max_position_embeddings",
    # Of rotary scaling of other types, which writers leave behind.
    "rope_*.beta_fast",
    "rope_*.beta_slow",
    "rope_*.factor",
    "rope_*.original_max_position_embeddings",
    # What FP8 and MXFP4 weights were made with: each has its scales beside it.
    "quantization_config*",
    "compression_config*",
)
#: Settings that change nothing with these values; with others they are refused.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_classification_head": (False,),
    "add_cross_attention": (False,),
    "attn_config.attn_impl": ("torch", "flash", "triton", "eager"),
    "block_use_swiglu": (True,),
    "chunk_size_feed_forward": (0,),
    "clip_qkv": (0.0,),
    "group_limited_greedy": (False,),
    "is_decoder": (True, False),
    "is_encoder_decoder": (False,),
    "mamba_hidden_act": ("silu",),
    "mlp_type": ("default",),
    "moe_norm_min": (1e-12,),
    "norm_type": ("layer_norm", "low_precision_layernorm", "rms", "rms_norm"),
    "normalization_function": ("rmsnorm",),
    "offset_alibi": (100,),
    "position_embedding_xdrope": (False,),
    "qk_norm_type": ("per_layer",),
    "scale_attn_weights": (True,),
    "shared_intermediate_size": (0,),
    "n_shared_experts": (0, 1),
    "partial_rotary_factor": (1.0,),
    "rope_interleaved": (False,),
    "sliding_window": (0,),
    "tie_encoder_decoder": (False,),
    "tie_word_embeddings": (True, False),  # read in the text model's own section
    "time_step_limit": ([0.0, float("inf")], [0.0, {"__float__": "Infinity"}]),
    "use_bidirectional_attention": (False, "vision"),
    "use_cla": (False,),
    "use_mla": (False,),
    "use_mrope": (False,),
    "use_pos_enc": (True,),
    "use_rotary_pos_emb": (True,),
    "use_rel_pos_bias": (False,),
    "use_sliding_window": (False,),
}
#: Of windows, in families that have them: which layers these are says ``layer_types``, where it is there.
_OF_WINDOWS = (
    "sliding_window",
    "sliding_window_pattern",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
)


#: Of experts, in families that have none.
_OF_EXPERTS = (
    "expert_layer_*",
    "moe_*",
    "n_group",
    "n_routed_experts",
    "norm_topk_prob",
    "num_experts_per_tok",
    "num_local_experts",
    "routed_scaling_factor",
    "topk_group",
)


def refuse_unread(config: Config, family: Family, *, text: str = "") -> None:
    """Raise ModelError for a setting that nobody read and that may change what the model computes. ``text``:
    where the section of the text model is, whose settings are left to another call."""
    routed = any(setting.key == "expert_count" for setting in family.settings)
    for path, value in config.unread():
        name = path.removeprefix(config.path)
        if text and path.startswith(text):
            continue
        if (family.sliding is not None or config.has(family.layer_list)) and name in _OF_WINDOWS:
            continue
        if name.startswith("rope_parameters") and config.has("rope_scaling"):
            continue  # which goes before it
        if _changes_nothing(name, value) or (not routed and _is_like(name, _OF_EXPERTS)):
            continue
        shown = repr(value)
        shown = shown if len(shown) <= 60 else f"{shown[:57]}…"
        raise ModelError(
            f"{config.file}: {path} is {shown}, which is not supported in models of the type "
            f"{family.model_type}"
        )


def _changes_nothing(name: str, value: Any) -> bool:
    if name not in NEUTRAL:
        name = name.removeprefix("attn_config.")  # a configuration of its own, with what all have
    if name in NEUTRAL:
        return any(value == one and type(value) is type(one) for one in NEUTRAL[name])
    return _is_like(name, CHANGES_NOTHING)


def _is_like(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
