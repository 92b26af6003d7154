"""Continuous batching: requests join and leave a running batch at every token.

One thread owns the slots. Each pass takes one token of every text that is being written and a slice of the
prompts that are being read, so that a long prompt delays nobody for long. The answer to a request does not
depend on the other requests: the engine guarantees equal bits, and each request has a sampler of its own.
"""

import asyncio
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq

import numpy as np

from powerinfer_tools.errors import PowerInferError
from powerinfer_tools.serving.asking import Result, question
from powerinfer_tools.serving.disk_cache import DiskCache
from powerinfer_tools.serving.fair_queue import FairQueue, QueueLimits
from powerinfer_tools.serving.faults import too_long, unavailable
from powerinfer_tools.serving.figures import Figures
from powerinfer_tools.serving.jobs import Ended, Event, Failed, Job, Logits, Token
from powerinfer_tools.serving.outbox import Outbox
from powerinfer_tools.serving.places import Place, Places
from powerinfer_tools.serving.sequence import Sequence
from powerinfer_tools.serving.slots import Slots, Wanted, Work
from powerinfer_tools.serving.tickets import Ticket
from powerinfer_tools.text.tokenizer import Tokenizer

#: Tokens of a pass that also generates tokens: as many as the kernels multiply by weights unpacked once.
#: However many texts there are, prompts get some of them.
TOGETHER = 64
LEAST_SLICE = 16
#: Prompt tokens of a pass that generates none.
SLICE_ALONE = 256
#: The disk is asked if it holds at least this many tokens more than memory.
_WORTH_LOADING = 64


class Batcher:
    """Computes requests on ``slots``, at most ``parallel`` at a time. Start it, and close it. Its thread
    calls ``prepare`` first."""

    def __init__(
        self,
        slots: Slots,
        tokenizer: Tokenizer,
        *,
        parallel: int,
        limits: QueueLimits | None = None,
        figures: Figures | None = None,
        disk: DiskCache | None = None,
        prepare: Callable[[], object] = lambda: None,
    ) -> None:
        self.figures = figures or Figures()
        self.context = slots.context
        self.parallel = min(parallel, slots.count)
        self.places = Places(slots)
        self._slots, self._tokenizer, self._disk = slots, tokenizer, disk
        self._waiting: FairQueue[Ticket] = FairQueue(limits or QueueLimits())
        self._active: list[Ticket] = []
        self._outbox, self._prepare = Outbox(), prepare
        self._changed = threading.Condition()
        self._between: list[Callable[[], None]] = []
        self._closing = self._draining = False
        #: Whether there is something to do before the next pass.
        self._changes = False
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, job: Job, after: Ticket | None = None) -> Ticket:
        """Queue ``job``. A job that comes ``after`` another begins once that job's prompt is processed.

        Raises RequestFault if the prompt cannot fit or too many requests are waiting.
        """
        return self.submit_all([job], after)[0]

    def submit_all(self, jobs: Seq[Job], after: Ticket | None = None) -> list[Ticket]:
        """Queue all ``jobs`` or none; where the starts of their prompts are equal, they share these."""
        for job in jobs:
            if len(job.prompt) > self.context:
                raise too_long(len(job.prompt), self.context)
            if not job.prompt:
                raise PowerInferError("the prompt is empty, and this model has no token to begin a text with")
        made: list[Ticket] = []
        for job in jobs:  # outside the lock: a constraint may take a while to compile
            lead = made[0] if made and made[0].sequence.job.prompt == job.prompt else after
            made.append(Ticket(Sequence(job, self._tokenizer, self.context), lead, self.cancel))
        with self._changed:
            if self._closing or self._draining:
                raise unavailable("the server is shutting down", 5)
            self._waiting.require_room(jobs[0].client, len(jobs), self.retry_after())
            for ticket in made:
                self._waiting.push(ticket)
            self._change()
        return made

    def cancel(self, ticket: Ticket) -> None:
        """Drop a request."""
        with self._changed:
            ticket.cancelled = True
            if self._waiting.remove(ticket):
                ticket.finished = True
            self._change()

    @property
    def waiting(self) -> int:
        """Requests without a place."""
        return len(self._waiting)

    @property
    def processing(self) -> int:
        """Requests with a place."""
        return len(self._active)

    @property
    def alive(self) -> bool:
        """Whether the batcher is running."""
        return self._thread.is_alive()

    def retry_after(self) -> int:
        """Seconds after which a place is likely to be free."""
        per_request = self.figures.request_seconds
        return max(1, round(per_request * (1 + len(self._waiting) / self.parallel)))

    async def between_passes(self, work: Callable[[], Result]) -> Result:
        """The result of ``work``, called by the computing thread between two passes. Raises RequestFault once
        the batcher is ending."""
        answer, call = question(work)
        with self._changed:
            if self._closing:
                raise unavailable("the server is shutting down", 5)
            self._between.append(call)
            self._change()
        return await answer

    async def drain(self, seconds: float) -> bool:
        """Accept no more requests and wait for the ones under way. Returns whether all ended in time."""
        with self._changed:
            self._draining = True
        until = time.monotonic() + seconds
        while (self._active or len(self._waiting)) and time.monotonic() < until:
            await asyncio.sleep(0.02)
        return not self._active and not len(self._waiting)

    def close(self) -> None:
        """End the thread; requests under way fail."""
        with self._changed:
            self._closing = True
            self._change()
        if self._thread.is_alive():
            self._thread.join()

    def _change(self) -> None:
        """Note that there is something to do; called with the lock held."""
        self._changes = True
        self._changed.notify()

    def _run(self) -> None:
        self._prepare()
        while True:
            try:
                if not self._admit():
                    break
                self._call_between()
                self._step()
            except Exception as error:  # noqa: BLE001  whatever it is: the requests concerned fail with it, the thread goes on
                self._fail(tuple(self._active) or tuple(self._waiting.clear()), error)
        self._call_between()
        with self._changed:
            left = self._waiting.clear()
        self._fail([*self._active, *left], unavailable("the server is shutting down", 5))

    def _admit(self) -> bool:
        """Give places to waiting requests, once there is work; False at the end."""
        with self._changed:
            while not self._closing:
                self._changes = False
                self._drop_cancelled()
                while len(self._active) < self.parallel and self.places.idle:
                    ticket = self._waiting.pop(lambda waiting: waiting.ready)
                    if ticket is None:
                        break
                    self._begin(ticket)
                if self._between or any(not ticket.loading for ticket in self._active):
                    return True
                self._outbox.flush()
                self._changed.wait()
        return False

    def _call_between(self) -> None:
        with self._changed:
            calls, self._between = self._between, []
        for call in calls:
            call()

    def _begin(self, ticket: Ticket) -> None:
        job = ticket.sequence.job
        reuse = job.reuse and not job.score_prompt
        self._active.append(ticket)
        ticket.place, reused = self.places.take(job.prompt, reuse=reuse)
        if reuse and self._disk is not None and self._disk.stored(job.prompt) >= reused + _WORTH_LOADING:
            ticket.loading = True
            self._disk.restore(ticket.place, job.prompt, lambda held: self._restored(ticket, held))
        else:
            self._filled(ticket, reused)

    def _filled(self, ticket: Ticket, reused: int) -> None:
        ticket.sequence.begin(reused)
        self.figures.began(reused)

    def _restored(self, ticket: Ticket, held: int) -> None:
        """The blocks on disk have been restored; called by the disk's thread."""
        with self._changed:
            assert ticket.place is not None
            if held > ticket.place.length:
                self.figures.restored_tokens += held - ticket.place.length
                ticket.place.become(np.asarray(ticket.sequence.job.prompt[:held], np.int32))
            ticket.loading = False
            self._filled(ticket, ticket.place.length)
            self._change()

    def _saved(self, place: Place) -> None:
        """A place's tokens have been saved to disk; called by the disk's thread."""
        with self._changed:
            place.saving = False
            self._change()

    def _drop_cancelled(self) -> None:
        for ticket in [ticket for ticket in self._active if ticket.cancelled and not ticket.loading]:
            ended = ticket.sequence.interrupt()
            self._leave(ticket, ended)

    def _leave(self, ticket: Ticket, ended: Ended | None) -> None:
        self._active.remove(ticket)
        ticket.finished = True
        if ticket.place is not None:
            self._release(ticket.place)
        if ended is not None:
            self.figures.ended(ended)

    def _release(self, place: Place) -> None:
        if self._disk is not None and self._disk.lacks(place):
            place.saving = True
            self._disk.save(place, lambda: self._saved(place))
        self.places.release(place)

    def _step(self) -> None:
        active = [ticket for ticket in self._active if not ticket.loading]
        writing = [ticket for ticket in active if not ticket.sequence.in_prompt]
        if len(writing) == len(active) and self._slots.fixed_slice is None:
            self._write(writing)
        elif active:
            self._pass(self._plan(active, writing))

    def _pass(self, pieces: list[tuple[Ticket, Work]]) -> None:
        """One pass over prompts, and over the texts that are being generated meanwhile."""
        started = time.perf_counter()
        try:
            rows = self._slots.step([work for _, work in pieces])
        except Exception as error:  # noqa: BLE001  whatever it is: the requests of this pass fail with it, others go on
            self._fail([ticket for ticket, _ in pieces], error)
            return
        self.figures.passed(pieces, time.perf_counter() - started)
        urgent = False
        for (ticket, work), logits in zip(pieces, rows, strict=True):
            urgent |= ticket.sequence.in_prompt  # its client awaits the first token, and the pass took long
            urgent |= self._advance(ticket, work.tokens, work.logits, logits)
        self._hand_over(urgent=urgent)

    def _write(self, tickets: list[Ticket]) -> None:
        """One token after another of each text, until there is something else to do. Little happens between
        two passes, since the engine waits meanwhile; tokens become text when they are handed over."""
        slots = [ticket.place.slot for ticket in tickets if ticket.place is not None]
        urgent = False
        while not urgent:
            tokens = [ticket.sequence.pending for ticket in tickets]
            started = time.perf_counter()
            try:
                logits = self._slots.write(slots, [token for (token,) in tokens])
            except Exception as error:  # noqa: BLE001  as above
                self._fail(tickets, error)
                return
            self.figures.wrote(len(tickets), time.perf_counter() - started)
            for place, ticket in enumerate(tickets):
                urgent |= self._wrote(ticket, tokens[place], logits[place : place + 1])
            self._hand_over(urgent=urgent)
            if self._changes:
                break

    def _wrote(self, ticket: Ticket, tokens: Seq[int], logits: Logits) -> bool:
        """:meth:`_advance`; the logits are read here for the first time, and are then in the CPU cache."""
        try:
            self._slots.check(logits)
        except PowerInferError as error:
            self._fail([ticket], error)
            return True
        return self._advance(ticket, tokens, Wanted.LAST, logits)

    def _hand_over(self, *, urgent: bool) -> None:
        """Hand the pending events over, where somebody waits for them or they are due."""
        if not urgent and not self._outbox.due:
            return
        for ticket in self._active:
            self._tell(ticket, *ticket.sequence.told())
        self._outbox.flush()

    def _tell(self, ticket: Ticket, *events: Event) -> None:
        for event in events:
            self._outbox.add(ticket, event)

    def _plan(self, active: list[Ticket], writing: list[Ticket]) -> list[tuple[Ticket, Work]]:
        """The work of the next pass: a token of each text, and slices of prompts."""
        reading = [ticket for ticket in active if ticket.sequence.in_prompt]
        pieces = [(ticket, _work(ticket, 1)) for ticket in writing]
        if self._slots.fixed_slice is not None:
            return pieces + [(ticket, _work(ticket, self._slots.fixed_slice)) for ticket in reading[:1]]
        room = max(LEAST_SLICE, TOGETHER - len(writing)) if writing else SLICE_ALONE
        counts: dict[Ticket, int] = {}
        if reading:  # the oldest prompt always advances; after it, the shortest goes first
            counts[reading[0]] = min(len(reading[0].sequence.pending), room // 4)
            room -= counts[reading[0]]
        for ticket in sorted(reading, key=lambda ticket: len(ticket.sequence.pending)):
            more = min(len(ticket.sequence.pending) - counts.get(ticket, 0), room)
            counts[ticket] = counts.get(ticket, 0) + more
            room -= more
        return pieces + [
            (ticket, _work(ticket, self._piece(ticket, count))) for ticket, count in counts.items() if count
        ]

    def _piece(self, ticket: Ticket, count: int) -> int:
        """How many of ``count`` tokens may be computed before the state of a recurrence has to be saved."""
        assert ticket.place is not None
        return count if self._disk is None else self._disk.piece(ticket.place, count)

    def _advance(self, ticket: Ticket, tokens: Seq[int], extent: Wanted, logits: Logits) -> bool:
        """Take the results of a pass for one request. Returns whether its client has to be told at once."""
        sequence = ticket.sequence
        assert ticket.place is not None
        ticket.place.add(tokens)
        if self._disk is not None:
            self._disk.checkpoint(ticket.place)
        before = len(sequence.tokens)
        try:
            if extent is Wanted.ALL:
                after = len(sequence.job.prompt) - len(sequence.pending) + 1
                targets = sequence.job.prompt[after : after + len(logits)]
                sequence.score_prompt(logits[: len(targets)], targets)
            sequence.processed(len(tokens))
            if sequence.pending:
                return False
            events = sequence.choose(logits[-1])
        except Exception as error:  # noqa: BLE001  it concerns this request alone
            self._leave(ticket, None)
            self._tell(ticket, *sequence.told(), Failed(error))
            return True
        self.figures.tokens += len(sequence.tokens) - before
        self._tell(ticket, *events)
        if sequence.outcome is not None:
            ended = events[-1]
            assert isinstance(ended, Ended)
            self._leave(ticket, ended)
        return any(not isinstance(event, Token) for event in events)

    def _fail(self, tickets: Seq[Ticket], error: Exception) -> None:
        for ticket in tickets:
            if ticket.place is not None:
                self.places.forget(ticket.place)
            if ticket in self._active:
                self._active.remove(ticket)
            ticket.finished = True
            self._tell(ticket, *ticket.sequence.told(), Failed(error))
        self._outbox.flush()


def _work(ticket: Ticket, count: int) -> Work:
    sequence = ticket.sequence
    assert ticket.place is not None
    tokens = sequence.pending[:count]
    complete = len(tokens) == len(sequence.pending)
    logits = Wanted.LAST if complete else Wanted.NONE
    if sequence.in_prompt and sequence.job.score_prompt:
        logits = Wanted.ALL
    return Work(ticket.place.slot, tokens, logits)
