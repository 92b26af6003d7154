"""The pieces of answers that all endpoints share: usage, timings, probabilities."""

import secrets
from collections.abc import Sequence
from typing import Any

from powerinfer_tools.generate.generation import Outcome
from powerinfer_tools.serving.jobs import Ended, TokenScore
from powerinfer_tools.text.tokenizer import Tokenizer

_FINISH = {
    Outcome.END: "stop",
    Outcome.STOP_STRING: "stop",
    Outcome.LIMIT: "length",
    Outcome.CONTEXT_FULL: "length",
    Outcome.INTERRUPTED: "stop",
}


def new_id(prefix: str) -> str:
    """An id that no other answer has."""
    return f"{prefix}-{secrets.token_hex(12)}"


def finish_reason(ended: Ended) -> str:
    """Why the text ended, in OpenAI's words."""
    return _FINISH[ended.outcome]


def usage(ends: Sequence[Ended], prompts: int = 1) -> dict[str, Any]:
    """Tokens of a request with one ``Ended`` for each answer; a prompt counts once for all its answers."""
    first = ends[:: max(1, len(ends) // max(1, prompts))]
    prompt = sum(ended.prompt_tokens for ended in first)
    written = sum(ended.tokens for ended in ends)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "prompt_tokens_details": {"cached_tokens": sum(ended.reused_tokens for ended in first)},
    }


def timings(ended: Ended) -> dict[str, Any]:
    """The speeds of one answer, in llama.cpp's form."""
    read = ended.prompt_tokens - ended.reused_tokens
    read_ms, write_ms = 1e3 * ended.prompt_seconds, 1e3 * ended.decode_seconds
    return {
        "cache_n": ended.reused_tokens,
        "prompt_n": read,
        "prompt_ms": read_ms,
        "prompt_per_token_ms": read_ms / max(1, read),
        "prompt_per_second": 1e3 * read / read_ms if read_ms else 0.0,
        "predicted_n": ended.tokens,
        "predicted_ms": write_ms,
        "predicted_per_token_ms": write_ms / max(1, ended.tokens),
        "predicted_per_second": 1e3 * ended.tokens / write_ms if write_ms else 0.0,
        "wait_ms": 1e3 * ended.wait_seconds,
    }


def chat_logprob(scored: TokenScore, tokenizer: Tokenizer) -> dict[str, Any]:
    """One token's probability in the form of chat completions."""
    top = [_entry(token, logprob, tokenizer) for token, logprob in scored.top]
    return _entry(scored.token, scored.logprob, tokenizer) | {"top_logprobs": top}


def _entry(token: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    data = tokenizer.token_bytes(token)
    return {
        "token": data.decode(errors="replace"),
        "logprob": finite(logprob),
        "bytes": list(data),
        "id": token,
    }


def finite(value: float) -> float:
    """JSON has no infinity: a token that is ruled out gets this value instead."""
    return max(value, -9999.0)


def completion_logprobs(
    scores: Sequence[TokenScore | None], tokens: Sequence[int], offset: int, tokenizer: Tokenizer
) -> dict[str, Any]:
    """Probabilities in the form of the older completions: parallel lists. The text of the first token begins
    at ``offset``."""
    texts = [tokenizer.token_text(token) for token in tokens]
    offsets = [offset]
    for text in texts[:-1]:
        offsets.append(offsets[-1] + len(text))
    return {
        "tokens": texts,
        "token_logprobs": [None if entry is None else finite(entry.logprob) for entry in scores],
        "top_logprobs": [None if entry is None else _top(entry, tokenizer) for entry in scores],
        "text_offset": offsets[: len(texts)],
    }


def _top(entry: TokenScore, tokenizer: Tokenizer) -> dict[str, float]:
    """The probabilities by text; of tokens with equal text, the likelier one stays."""
    result: dict[str, float] = {}
    for token, logprob in entry.top:
        result.setdefault(tokenizer.token_text(token), finite(logprob))
    return result
