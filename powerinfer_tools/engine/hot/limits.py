"""What the blocks in torch do not compute: it stays on the CPU."""

from powerinfer_tools.model.loading import AttentionWeights, Model


def attention_limit(model: Model) -> str | None:
    """Why no attention of ``model`` is computed in torch; None where it can be."""
    if any(layer.recurs is not None for layer in model.layers):
        return "recurrent layers"
    if any(layer.attends is None for layer in model.layers):
        return "layers without attention"
    if all(isinstance(layer.attends, AttentionWeights) for layer in model.layers):
        return None
    return "latent attention"
