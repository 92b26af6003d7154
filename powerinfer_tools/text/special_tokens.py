"""Which tokens end a generation and which are control tokens, by the rules that llama.cpp applies.

GGUF files name a few special ids, but many control tokens can only be recognised by their text, and
converters have marked some of them as ordinary. The tables here are the texts that llama.cpp knows; following
them exactly matters twice: a missed end token makes a model babble, a wrong type changes how a prompt is
tokenised.
"""

from collections.abc import Mapping, MutableSequence
from enum import IntEnum


class TokenType(IntEnum):
    """`tokenizer.ggml.token_type` of GGUF."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


# Always end-of-generation and always control, wherever they occur in a vocabulary.
_END_TEXTS = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>",
    "<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]",
    "<|end_of_text|>", "<eos>", "<end_of_utterance>", "<turn|>", "<|tool_response>",
    "<｜end▁of▁sentence｜>", "[e~[",
)  # fmt: skip

# Fill-in-the-middle roles: the metadata keys that name the token, and the texts used if no key does. Prefix,
# suffix and middle only become control tokens; padding, repository and file separator also end a text.
_FILL_ROLES: tuple[tuple[bool, tuple[str, ...], tuple[str, ...]], ...] = (
    (False, ("prefix_token_id", "fim_pre_token_id"), (
        "<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>",
        "<|code_prefix|>", "<|prefix|>")),
    (False, ("suffix_token_id", "fim_suf_token_id"), (
        "<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>",
        "<|code_suffix|>", "<|suffix|>")),
    (False, ("middle_token_id", "fim_mid_token_id"), (
        "<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>",
        "<|code_middle|>", "<|middle|>")),
    (True, ("fim_pad_token_id",), ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]")),
    (True, ("fim_rep_token_id",), ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>")),
    (True, ("fim_sep_token_id",), ("<|file_sep|>",)),
)  # fmt: skip

# Markers of a response's channels: shown to the user although the file calls them control tokens.
_ALWAYS_SHOWN = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")


def can_control(text: str, type_: int) -> bool:
    """Whether a chat template may build turns from a token with this text: all control tokens, and tokens
    spelt like most of these that files or the table above call user-defined."""
    if type_ in (TokenType.CONTROL, TokenType.UNKNOWN):
        return True
    return type_ == TokenType.USER_DEFINED and text[:2] in ("<|", "<｜") and text[-2:] in ("|>", "｜>")


def settle_types_and_ends(
    ids: Mapping[str, int], types: MutableSequence[int], named: Mapping[str, int]
) -> frozenset[int]:
    """Correct the types of control-looking tokens in place and return all end-of-generation ids.

    `named` holds the ids that metadata names, by key without the `tokenizer.ggml.` prefix (defaults filled
    in). If several texts could take one fill-in-the-middle role, the lowest id takes it.
    """
    ends: set[int] = set()
    for is_end, keys, texts in _FILL_ROLES:
        token = next((named[key] for key in keys if key in named), None)
        if token is None:
            token = min((ids[text] for text in texts if text in ids), default=None)
            if token is not None:
                types[token] = TokenType.CONTROL
        if token is not None and is_end:
            ends.add(token)
    for text in _END_TEXTS:
        if text in ids:
            ends.add(ids[text])
            types[ids[text]] = TokenType.CONTROL
    for text in _ALWAYS_SHOWN:
        if text in ids:
            types[ids[text]] = TokenType.USER_DEFINED
    ends.update(named[key] for key in ("eos_token_id", "eot_token_id", "eom_token_id") if key in named)
    _drop_false_ends(ids, types, ends)
    return frozenset(ends)


def _drop_false_ends(ids: Mapping[str, int], types: MutableSequence[int], ends: set[int]) -> None:
    """Two texts of the table above are ordinary tokens in families that have better ones."""

    def any_ends(*texts: str) -> bool:
        return any(ids.get(text) in ends for text in texts)

    if any_ends("<|end|>") and any_ends("<|call|>", "<|calls|>") and any_ends("<|return|>", "<|flush|>"):
        ends.discard(ids["<|end|>"])
        types[ids["<|end|>"]] = TokenType.USER_DEFINED
    if any_ends("</s>") and any_ends("<|tool_response>", "<|plamo:eos|>"):
        ends.discard(ids["</s>"])
        types[ids["</s>"]] = TokenType.NORMAL
