"""A model packed once: the weights that all its sessions share, and passes over tokens of several
sessions."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from powerinfer_kernels import Pool, Span, read_bandwidth
from powerinfer_tools.detect import available_ram_bytes
from powerinfer_tools.engine.caches import Places
from powerinfer_tools.engine.closing import Closing
from powerinfer_tools.engine.damage import require_finite
from powerinfer_tools.engine.factor_thresholds import FactorThresholds
from powerinfer_tools.engine.from_disk import RamOptions, open_from_disk
from powerinfer_tools.engine.head import Head
from powerinfer_tools.engine.layers import LayerStack
from powerinfer_tools.engine.memory import MARGIN, require_session_memory
from powerinfer_tools.engine.observation import LayerCounters
from powerinfer_tools.engine.packed import PackedWeights
from powerinfer_tools.engine.session import Session
from powerinfer_tools.engine.stack_options import StackOptions
from powerinfer_tools.errors import ModelError
from powerinfer_tools.model.counting import HEAD_ROWS
from powerinfer_tools.model.loading import Model
from powerinfer_tools.progress import Progress

Floats = npt.NDArray[np.float32]
#: Context when none is asked for: what a chat needs, without reserving a long-context model's whole cache.
DEFAULT_CONTEXT = 4096
DEFAULT_BATCH = 512

#: Bytes that are read to measure the bandwidth: well beyond any cache.
BANDWIDTH_BYTES = 256 << 20


class Part(NamedTuple):
    """One session's part of a step: ``tokens`` to process after the tokens it holds, and logits after the
    last ``rows`` of them."""

    session: Session
    tokens: Sequence[int]
    rows: int = 1


class Weights(Closing):
    """One packed model, for any number of sessions. Not thread-safe; results do not depend on ``threads``,
    ``batch`` or ``isa``, nor on the other tokens of a pass.

    ``context`` is the longest that a session may have (None: the model's, up to :data:`DEFAULT_CONTEXT`), and
    ``kv_type`` the default type of the sessions' caches; "q8_0" halves them, at a small cost in
    precision. ``batch`` is the most tokens of one pass. ``mode`` None takes the file's mode (a source
    model is dense). ``device`` "none" computes everything in the C kernels; "cpu" and "cuda" give the hot
    part of a split file to torch on that device, and ``vram`` limits it to that many bytes by moving the
    split point. ``observed`` counters, one of each layer, are added to by every forward pass of a source
    model, or of layers in mode gate-first. ``check_recall`` also computes which neurons are really active,
    and the report compares them with the predictions; results keep the same bits. ``thresholds`` of each
    layer of a source model
    leave neurons out, by their values at the time of each pass. ``ram``: the memory that the process may
    take. Experts, FFNs and neurons that do not fit are read from disk, see
    :mod:`powerinfer_tools.engine.weights_on_disk`. ``beside``: other weights of the same model, in another
    mode; weights with the same layout in both are packed once. ``progress`` is told about GPU kernels that
    have to be compiled.
    """

    def __init__(
        self,
        model: Model,
        *,
        threads: int | None = None,
        context: int | None = None,
        batch: int = DEFAULT_BATCH,
        isa: str | None = None,
        mode: str | None = None,
        device: str = "none",
        vram: int | None = None,
        kv_type: str = "f16",
        observed: Sequence[LayerCounters | None] | None = None,
        check_recall: bool = False,
        thresholds: Sequence[FactorThresholds] | None = None,
        ram: RamOptions | None = None,
        beside: "Weights | None" = None,
        progress: Progress | None = None,
    ) -> None:
        started = time.perf_counter()
        self.packed: PackedWeights = PackedWeights() if beside is None else beside.packed
        self.model, self.kv_type = model, kv_type
        self.context = _check_context(model, context)
        self.batch = max(1, min(batch, self.context))
        self._sessions: list[Session] = []
        self.pool = Pool(threads, isa)
        try:
            disk = open_from_disk(
                model,
                self.pool,
                ram or RamOptions(),
                context=self.context,
                kv_type=kv_type,
                batch=self.batch,
                device=device,
                mode=mode,
                shared=self.packed.nbytes,
            )
            options = StackOptions(
                self.batch, self.context, mode, device, vram, kv_type, observed, check_recall, thresholds
            )
            options = replace(options, packed=self.packed, progress=progress)
            self._notices = () if disk is None else disk.notices
            if disk is not None:
                self.batch = disk.budget.batch
                options = replace(options, batch=self.batch, residency=disk.residency, budget=disk.budget)
            #: The layers, for stages that look inside.
            self.stack = LayerStack(model, self.pool, options)
            try:
                matrix = self.stack.head_matrix
                self.head = None if matrix is None else Head(model, self.pool, matrix)
            except BaseException:
                self.stack.close()
                raise
        except BaseException:
            self.pool.close()
            raise
        self.load_seconds = time.perf_counter() - started

    @property
    def vocabulary(self) -> int:
        """Number of logits."""
        return self.model.hyper.vocabulary

    @property
    def notices(self) -> Sequence[str]:
        """What could not be done as asked, and what is done instead: each once, in words for the user."""
        disk = self.stack.residency
        return (*self._notices, *([] if disk is None else [disk.expectation]), *self.stack.notices)

    def read_bandwidth(self) -> float:
        """Measure the machine's read bandwidth with these threads, in bytes per second. Returns 0 if memory
        is too short for the measurement, or is given to experts that are read from disk: a measurement must
        not crash the run that it measures."""
        if self.stack.residency is not None:
            return 0.0
        available = available_ram_bytes()
        if available and available < BANDWIDTH_BYTES + MARGIN:
            return 0.0
        return read_bandwidth(self.pool, BANDWIDTH_BYTES)

    def session(self, context: int | None = None, kv_type: str | None = None) -> Session:
        """A new session of up to ``context`` tokens (None: the longest), whose caches are of ``kv_type``.

        Raises ModelError where memory does not suffice, and for a second session where the hot device
        computes attention, which it does for one at a time, or where experts are read from disk.
        """
        context, kv_type = self.context if context is None else context, kv_type or self.kv_type
        if not 1 <= context <= self.context:
            raise ModelError(
                f"{self.model.path}: a session of {context} tokens is not from 1 to {self.context}, for "
                "which the weights were loaded"
            )
        if self.stack.serves_one and (self._sessions or kv_type != self.kv_type):
            if self.stack.residency is not None:
                what = self.stack.residency.what
                raise ModelError(
                    f"{self.model.path}: {what} that are read from disk have the memory that a second "
                    f"session, or a cache of a type other than {self.kv_type}, would take"
                )
            raise ModelError(
                f"{self.model.path}: the {self.stack.device} device computes attention, and holds one cache "
                f"of type {self.kv_type}: no second session can be open, nor one of another type"
            )
        untaken = [held.nbytes - held.touched_bytes for held in self._sessions]
        if untaken:
            require_session_memory(self.model, context, kv_type, sum(untaken), available_ram_bytes())
        session = Session(self, self.stack.new_state(context, kv_type), context, kv_type)
        self._sessions.append(session)
        return session

    def step(self, parts: Iterable[Part | tuple[Session, Sequence[int]]]) -> Floats:
        """Process tokens of several sessions, each part after the tokens that its session holds, in as few
        passes as ``batch`` allows. Returns logits (rows, vocabulary) after the last token of each part, or
        after its last ``rows`` tokens, in the order of the parts.

        Every session gets the bits that it would get alone. The logits are valid until the next call. Raises
        ContextFull, ModelError for ids outside the vocabulary, and ValueError for a session that occurs
        twice, is closed or belongs to other weights, and for parts without tokens or with more rows than
        tokens. In each case nothing is changed.
        """
        work = [Part(*part) for part in parts]
        self._check(work)
        rows = sum(part.rows for part in work)
        if self.stack.has_hot_side:
            return self._one_by_one(work, rows)
        if rows <= HEAD_ROWS and sum(len(part.tokens) for part in work) <= self.batch:
            logit_rows = self._wanted(work)
            self.forward([(part.session, part.tokens) for part in work])
            return self.logits(logit_rows)
        return self._passes(work, rows)

    def write(self, sessions: Sequence[Session], tokens: Sequence[int]) -> Floats:
        """The logits of :meth:`step` for one more token of each of ``sessions``, with less overhead: for
        texts that are written a token at a time. The sessions, up to HEAD_ROWS, must be open and different,
        and there must be no hot device. Call :meth:`check` on each row when the row is used, so that it is
        read from memory once, not twice. Raises ContextFull and ModelError with nothing changed."""
        for session in sessions:
            session.require_room(1)
        spans = tuple(Span(session.state, session.position, 1) for session in sessions)
        self.stack.forward(tokens, Places(spans))
        for session in sessions:
            session.position += 1
        assert self.head is not None
        return self.head.logits(self.stack.x[: len(sessions)])

    def check(self, logits: Floats) -> None:
        """Raise ModelError unless all ``logits`` are finite."""
        require_finite(logits, self.model)

    def forward(self, parts: Sequence[tuple[Session, Sequence[int]]], *, guesses: bool = False) -> None:
        """Run one pass over up to ``batch`` tokens; the sessions then hold them. Only the ids are checked:
        the method is for code that drives single sessions. Several tokens are a prompt, and the recurrent
        state at its end is kept, except with ``guesses``."""
        spans = tuple(Span(session.state, session.position, len(tokens)) for session, tokens in parts)
        tokens = parts[0][1] if len(parts) == 1 else [token for _, some in parts for token in some]
        self.stack.forward(tokens, Places(spans))
        for session, some in parts:
            session.position += len(some)
            if len(some) > 1 and not guesses:
                session.keep()

    def logits(self, rows: slice | list[int]) -> Floats:
        """Logits (rows, vocabulary) of up to HEAD_ROWS tokens of the last pass; for a head on a hot device,
        ``rows`` is a slice. Valid until the next call."""
        if self.head is None:
            assert isinstance(rows, slice)
            logits = self.stack.hot_logits(rows.start, rows.stop)
        else:
            logits = self.head.logits(self.stack.x[rows])
        self.check(logits)
        return logits

    def forget(self, session: Session) -> None:
        """Forget a session that is closed."""
        self._sessions.remove(session)

    def close(self) -> None:
        """Close all sessions, release the hot device and stop the threads. Nothing can be used afterwards."""
        for session in tuple(self._sessions):
            session.close()
        self.stack.close()
        self.pool.close()

    def _check(self, work: Sequence[Part]) -> None:
        if not work or len({id(part.session) for part in work}) != len(work):
            raise ValueError("a step needs at least one session, and each session only once")
        for session, tokens, rows in work:
            if not session.is_open_on(self):
                raise ValueError("the session is closed, or belongs to other weights")
            if not 1 <= rows <= len(tokens):
                raise ValueError(f"{rows} rows of logits after {len(tokens)} tokens")
            session.require_room(len(tokens))
            self.stack.check_tokens(tokens)

    def _wanted(self, work: Sequence[Part]) -> list[int]:
        """The indices, within a single pass, of the rows whose logits are wanted."""
        logit_rows, end = list[int](), 0
        for part in work:
            end += len(part.tokens)
            logit_rows += range(end - part.rows, end)
        return logit_rows

    def _one_by_one(self, work: Sequence[Part], rows: int) -> Floats:
        """Process each session by itself, as torch's sums may depend on the size of a batch."""
        out, at = np.empty((rows, self.vocabulary), np.float32), 0
        for session, tokens, count in work:
            for row in session.process(tokens, count):
                out[at] = row
                at += 1
        return out

    def _passes(self, work: Sequence[Part], rows: int) -> Floats:
        """Process the work pass by pass, in order, each pass with as many tokens as fit."""
        out, at = np.empty((rows, self.vocabulary), np.float32), 0
        for parts, logit_rows in _cut(work, self.batch):
            self.forward(parts)
            for first in range(0, len(logit_rows), HEAD_ROWS):
                some = logit_rows[first : first + HEAD_ROWS]
                out[at : at + len(some)] = self.logits(some)
                at += len(some)
        return out


def _cut(work: Sequence[Part], batch: int) -> Iterable[tuple[list[tuple[Session, Sequence[int]]], list[int]]]:
    """Passes of up to ``batch`` tokens: each session's tokens in the pass, and the rows whose logits are
    wanted."""
    parts, logit_rows, used = list[tuple[Session, Sequence[int]]](), list[int](), 0
    for session, tokens, rows in work:
        done = 0
        while done < len(tokens):
            count = min(batch - used, len(tokens) - done)
            parts.append((session, tokens[done : done + count]))
            first = max(0, len(tokens) - rows - done)
            logit_rows += range(used + first, used + count)
            done, used = done + count, used + count
            if used == batch:
                yield parts, logit_rows
                parts, logit_rows, used = [], [], 0
    if parts:
        yield parts, logit_rows


def _check_context(model: Model, context: int | None) -> int:
    trained = model.hyper.trained_context
    if context is None:
        return min(trained, DEFAULT_CONTEXT)
    if not 1 <= context <= trained:
        why = "what the model was trained for"
        if model.spec.indexed:
            why = "where its attention reads everything; choosing what it reads is not computed"
        raise ModelError(f"{model.path}: context {context} is not from 1 to {trained}, {why}")
    return context
