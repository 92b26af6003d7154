"""The state of one generation that is computed a step at a time, together with others."""

import time
from collections.abc import Sequence as Seq

import numpy as np

from powerinfer_tools.generate.constraints import ConstrainedSampler
from powerinfer_tools.generate.generation import Outcome, logits_hash, new_sampler
from powerinfer_tools.generate.sampling import Sampler
from powerinfer_tools.serving.jobs import Ended, Event, Job, Logits, PromptScores, Token, TokenScore
from powerinfer_tools.text.stop_strings import StopStrings
from powerinfer_tools.text.tokenizer import Tokenizer


class Sequence:
    """Prompt tokens still to be processed, then one token after another. From the same logits it makes the
    same choices as :class:`~powerinfer_tools.generate.generation.Generation`.

    ``pending`` are the tokens that the engine must process next: the rest of the prompt, then the token
    chosen last. ``outcome`` is None while the generation runs.
    """

    def __init__(self, job: Job, tokenizer: Tokenizer, context: int) -> None:
        self.job = job
        self.outcome: Outcome | None = None
        self.pending: list[int] = list(job.prompt)
        self.tokens: list[int] = []
        self.reused = 0
        self._context = context
        self._tokenizer = tokenizer
        self._sampler = _sampler(job, tokenizer)
        self._sampler.accept(job.prompt)
        self._stream = tokenizer.stream(show_special=job.options.show_special)
        self._stops = StopStrings(job.options.stop)
        self._scores: list[TokenScore | None] = [None]
        self._chosen: list[tuple[int, TokenScore | None]] = []
        self._submitted = time.perf_counter()
        self._began = self._first = self._submitted

    @property
    def in_prompt(self) -> bool:
        """Whether no token has been chosen yet."""
        return not self.tokens and self.outcome is None

    def begin(self, reused: int) -> None:
        """The request got a place, whose cache holds the first ``reused`` tokens of the prompt."""
        self.reused = reused
        del self.pending[:reused]
        self._began = time.perf_counter()

    def processed(self, count: int) -> None:
        """The engine took the first ``count`` pending tokens."""
        del self.pending[:count]

    def score_prompt(self, rows: Logits, targets: Seq[int]) -> None:
        """Logits (k, vocabulary) before the prompt tokens ``targets``."""
        top = self.job.top_logprobs or 0
        self._scores += [score(row, token, top) for row, token in zip(rows, targets, strict=True)]

    def choose(self, logits: Logits) -> list[Event]:
        """Choose the next token from the logits after all tokens so far. Returns the events that have to be
        sent at once; other tokens wait for :meth:`told`."""
        if not self.tokens:
            self._first = time.perf_counter()
        events: list[Event] = []
        if self.job.score_prompt and not self.tokens:
            events.append(PromptScores(tuple(self._scores)))
        if self.job.options.max_tokens == 0:
            self.outcome = Outcome.LIMIT
        else:
            token = self._sampler.sample(self._adjusted(logits))
            if token in self._tokenizer.eos_ids:
                self.outcome = Outcome.END
            else:
                self._take(token, logits)
                if self.job.options.stop:  # whose text may end it
                    events += self.told()
                self.outcome = self._ended()
        if self.outcome is not None:
            events += [*self.told(), self.end(logits_hash(logits))]
        return events

    def told(self) -> list[Token]:
        """The tokens that were chosen since the last call, with their texts."""
        chosen, self._chosen = self._chosen, []
        return [Token(token, self._stops.push(self._stream.push(token)), scored) for token, scored in chosen]

    def interrupt(self) -> Ended:
        """Stop here."""
        self.outcome = Outcome.INTERRUPTED
        return self.end(None)

    def end(self, hashed: str | None) -> Ended:
        """The events at the end of the text."""
        assert self.outcome is not None
        finished = self._stops.found is not None
        rest = "" if finished else self._stops.push(self._stream.finish()) + self._stops.finish()
        now = time.perf_counter()
        return Ended(
            outcome=self.outcome,
            rest=rest,
            stop_string=self._stops.found,
            logits_hash=hashed,
            seed=self._sampler.seed,
            prompt_tokens=len(self.job.prompt),
            reused_tokens=self.reused,
            tokens=len(self.tokens),
            wait_seconds=self._began - self._submitted,
            prompt_seconds=self._first - self._began,
            decode_seconds=now - self._first,
        )

    def _take(self, token: int, logits: Logits) -> None:
        self.tokens.append(token)
        self._sampler.accept((token,))
        top = self.job.top_logprobs
        self._chosen.append((token, None if top is None else score(logits, token, top)))
        self.pending = [token]

    def _ended(self) -> Outcome | None:
        if self._stops.found is not None:
            return Outcome.STOP_STRING
        if isinstance(self._sampler, ConstrainedSampler) and self._sampler.finished:
            return Outcome.END
        if 0 <= self.job.options.max_tokens <= len(self.tokens):
            return Outcome.LIMIT
        if len(self.job.prompt) + len(self.tokens) > self._context:
            return Outcome.CONTEXT_FULL
        return None

    def _adjusted(self, logits: Logits) -> Logits:
        if not self.job.bias:
            return logits
        logits = logits.copy()
        for token, bias in self.job.bias.items():
            logits[token] += np.float32(bias)
        return logits


def _sampler(job: Job, tokenizer: Tokenizer) -> Sampler:
    if job.grammar is None:
        return new_sampler(tokenizer, job.options)
    banned = tokenizer.eos_ids if job.options.ignore_eos else ()
    return job.grammar.sampler(job.options.sampling, banned=banned)


def score(logits: Logits, token: int, top: int) -> TokenScore:
    """ln softmax(logits) in float64, of ``token`` and of the ``top`` likeliest tokens (lowest id first among
    equals)."""
    values = logits.astype(np.float64)
    values -= values.max()
    values -= np.log(np.exp(values).sum())
    best: tuple[tuple[int, float], ...] = ()
    if top:
        candidates = np.flatnonzero(values >= np.partition(values, len(values) - top)[len(values) - top])
        order = candidates[np.argsort(-values[candidates], kind="stable")][:top]
        best = tuple((int(index), float(values[index])) for index in order)
    return TokenScore(token, float(values[token]), best)
