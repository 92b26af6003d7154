"""What the blocks in torch do not compute: it stays on the CPU."""

from powerinfer_tools.model.loading import Model


def attention_limit(model: Model) -> str | None:
    """Why no attention of ``model`` is computed in torch; None where it can be."""
    if model.unusual is not None:
        return model.unusual
    if model.spec.qk_norm == "row":
        return "norms of queries and keys over whole rows"
    hyper = model.hyper
    if hyper.qkv_limit or hyper.alibi or hyper.residual_scale != 1.0:
        return "clamped queries, biases by distance, or scaled blocks"
    if any(layer.attention.norm is None or layer.ffn_norm is None for layer in model.layers):
        return "blocks without a norm before them"
    if model.spec.qk_norm_late:
        return "norms of queries and keys after rotary positions"
    return None


def head_limit(model: Model) -> str | None:
    """Why the head of ``model`` is not computed in torch; None where it can be."""
    if model.head_bias is not None:
        return "a bias of the head"
    return None if model.hyper.logit_scale == 1.0 else "scaled logits"
