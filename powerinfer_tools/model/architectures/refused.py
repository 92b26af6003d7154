"""Families that are known and do not run, each with the reason: the operation that is missing here."""

_DIFFUSION = "it generates by diffusion, by denoising whole blocks of text with attention that is not causal"
_ENCODER = "it is an encoder, which generates no text"
_SEQUENCES = "it has an encoder and a decoder with attention across them"
_SPEECH = "it generates sound, not text"
_DRAFTS = "it drafts tokens for another model and is none by itself"
_INDEXER = "sparse attention by an indexer is not computed"
_CONNECTIONS = "residual streams that are mixed by hyper-connections are not computed"
_RWKV = "RWKV-6's time mixing is not computed"

#: Value of ``general.architecture`` → why models of it are refused.
REFUSED = {
    "dream": _DIFFUSION,
    "llada": _DIFFUSION,
    "llada-moe": _DIFFUSION,
    "rnd1": _DIFFUSION,
    "diffusion-gemma": _DIFFUSION,
    "bert": _ENCODER,
    "modern-bert": _ENCODER,
    "neo-bert": _ENCODER,
    "nomic-bert": _ENCODER,
    "nomic-bert-moe": _ENCODER,
    "jina-bert-v2": _ENCODER,
    "jina-bert-v3": _ENCODER,
    "eurobert": _ENCODER,
    "gemma-embedding": _ENCODER,
    "llama-embed": _ENCODER,
    "t5encoder": _ENCODER,
    "clip": _ENCODER,
    "t5": _SEQUENCES,
    "pockettts": _SPEECH,
    "qwen3tts": _SPEECH,
    "wavtokenizer-dec": _SPEECH,
    "eagle3": _DRAFTS,
    "dflash": _DRAFTS,
    "gemma4-assistant": _DRAFTS,
    "dots3note": _INDEXER,
    "deepseek4": _CONNECTIONS,
    "glm5-next": _CONNECTIONS,
    "hy_v4": _CONNECTIONS,
    "qwen4exp": _CONNECTIONS,
    "kimi-k3": "attention over the residual streams of blocks is not computed",
    "rwkv6": _RWKV,
    "rwkv6qwen2": _RWKV,
    "minimax-01": "lightning attention is not computed",
    "grovemoe": "adjugate experts, which groups of experts share, are not computed",
    "hrm_text": "stacks of layers that run again and again are not computed",
    "granite-switch": "adapters that tokens switch on are not computed",
}
