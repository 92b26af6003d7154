"""The limits of the blocks in torch: work that they do not support stays on the CPU."""

from powerinfer_tools.model.loading import Model


def attention_limit(model: Model) -> str | None:
    """Why no attention of ``model`` is computed in torch; None where it can be."""
    return model.attention_limit
