"""From requests to jobs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from powerinfer_tools.generate.generation import GenerationOptions
from powerinfer_tools.generate.sampler_names import chain_of_letters, sampler_chain
from powerinfer_tools.generate.sampling import SamplingOptions
from powerinfer_tools.serving.faults import RequestFault, too_long
from powerinfer_tools.serving.formatting import grammar_of
from powerinfer_tools.serving.jobs import Job
from powerinfer_tools.serving.schemas import CompletionRequest, Generating
from powerinfer_tools.serving.served_model import ServedModel
from powerinfer_tools.text.tokenizer import Tokenizer

#: Tokens of a completion when none are asked for, as in OpenAI's API.
_COMPLETION_TOKENS = 16
_SEEDS = 1 << 64


def generation_options(
    request: Generating, max_tokens: int | None, stops: Sequence[str] = (), *, show_special: bool = False
) -> GenerationOptions:
    """How to generate; options that the request does not set are as in `run`. Raises SamplingError."""
    options = {
        "temperature": request.temperature,
        "top_k": request.top_k,
        "typical_p": request.typical_p,
        "top_p": request.top_p,
        "min_p": request.min_p,
        "repeat_penalty": request.repeat_penalty,
        "repeat_last_n": request.repeat_last_n,
        "frequency_penalty": request.frequency_penalty,
        "presence_penalty": request.presence_penalty,
        "samplers": _samplers(request.samplers),
        "seed": request.seed % _SEEDS if request.seed is not None and request.seed >= 0 else None,
    }
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    values: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    return GenerationOptions(
        sampling=SamplingOptions(**values),
        max_tokens=-1 if max_tokens is None else max_tokens,
        stop=tuple(text for text in (*stop, *stops) if text),
        ignore_eos=bool(request.ignore_eos),
        show_special=show_special,
    )


def _samplers(names: list[str] | str | None) -> tuple[str, ...] | None:
    """Samplers by their names or, as in llama.cpp, by letters. Raises SamplingError."""
    if names is None:
        return None
    return chain_of_letters(names) if isinstance(names, str) else sampler_chain(names)


def biases(request: Generating, tokenizer: Tokenizer) -> Mapping[int, float]:
    """``logit_bias`` by token. Raises RequestFault for a key that is not a token of this model."""
    result = {}
    for text, bias in (request.logit_bias or {}).items():
        if not text.isascii() or not text.isdigit() or int(text) >= tokenizer.vocabulary:
            raise RequestFault(
                f"logit_bias: {text!r} is no token id below {tokenizer.vocabulary}", code="invalid_token"
            )
        result[int(text)] = bias
    return result


def copies(job: Job, count: int) -> list[Job]:
    """``count`` jobs for as many answers; if there is a seed, each job has the seed after the last one's."""
    seed = job.options.sampling.seed
    if seed is None:
        return [job] * count
    return [
        replace(
            job,
            options=replace(
                job.options, sampling=replace(job.options.sampling, seed=(seed + index) % _SEEDS)
            ),
        )
        for index in range(count)
    ]


def require_short(text: str, model: ServedModel) -> None:
    """Refuse, before tokenisation, text that is too long to fit whatever its tokens are."""
    longest = max_token_bytes(model.tokenizer)
    if len(text) > model.context * longest:
        raise too_long(-(-len(text) // longest), model.context)


def max_token_bytes(tokenizer: Tokenizer) -> int:
    """An upper bound on the bytes of the longest token."""
    return max(map(len, tokenizer.tokens.texts)) * 4


@dataclass(frozen=True)
class Completion:
    """A request for completions as jobs: ``per_prompt`` jobs for each prompt, in order."""

    jobs: list[list[Job]]
    echoed: list[str]


def completion_jobs(request: CompletionRequest, model: ServedModel, client: str) -> Completion:
    """The jobs of /v1/completions. Raises RequestFault."""
    if request.suffix:
        raise RequestFault("suffix: filling in the middle is not supported", code="unsupported")
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise RequestFault("best_of other than n is not supported", code="unsupported")
    limit = _COMPLETION_TOKENS if request.max_tokens is None else request.max_tokens
    options = generation_options(request, limit)
    grammar = grammar_of(request, model.tokenizer)
    jobs, echoed = [], []
    for prompt in _prompts(request.prompt):
        ids = _ids(prompt, model)
        job = Job(
            prompt=ids,
            options=options,
            client=client,
            bias=biases(request, model.tokenizer),
            top_logprobs=request.logprobs,
            score_prompt=bool(request.echo) and request.logprobs is not None,
            grammar=grammar,
            reuse=request.cache_prompt is not False,
        )
        jobs.append(copies(job, request.n or 1))
        text = prompt if isinstance(prompt, str) else model.tokenizer.decode(ids, show_special=True)
        echoed.append(text if request.echo else "")
    return Completion(jobs, echoed)


def _prompts(prompt: str | list[int] | list[str] | list[list[int]]) -> list[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise RequestFault("prompt: it is empty", code="empty_prompt")
    if all(isinstance(entry, int) for entry in prompt):
        return [[entry for entry in prompt if isinstance(entry, int)]]
    return [entry for entry in prompt if not isinstance(entry, int)]


def _ids(prompt: str | list[int], model: ServedModel) -> list[int]:
    if isinstance(prompt, str):
        require_short(prompt, model)
        ids = model.tokenizer.encode(prompt)
        if not ids and model.tokenizer.bos_id is not None:
            ids = [model.tokenizer.bos_id]
    else:
        ids = prompt
        wrong = next((token for token in ids if not 0 <= token < model.tokenizer.vocabulary), None)
        if wrong is not None:
            raise RequestFault(
                f"prompt: {wrong} is no token id below {model.tokenizer.vocabulary}", code="invalid_token"
            )
    if not ids:
        raise RequestFault("prompt: it is empty", code="empty_prompt")
    if len(ids) > model.context:
        raise too_long(len(ids), model.context)
    return ids
