"""profile: run a corpus through a model and count what its FFN neurons contribute."""

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from powerinfer_formats.checkpoint import CorpusPosition, ProfileCheckpoint
from powerinfer_formats.errors import FormatError
from powerinfer_formats.profile import ROUTING, Corpus, Profile
from powerinfer_tools import __version__
from powerinfer_tools.engine import Engine
from powerinfer_tools.errors import CorpusError, ProfileError
from powerinfer_tools.interrupts import deferred_interrupts
from powerinfer_tools.model.loading import Model, load_model
from powerinfer_tools.progress import Progress, Silent
from powerinfer_tools.stages.profile.corpus import CorpusFile, find_files, shard_of
from powerinfer_tools.stages.profile.stopping import SHARE, TOLERANCE, CorpusHalves, Stopping
from powerinfer_tools.stages.profile.tally import Tally
from powerinfer_tools.stages.profile.tracing import TraceRecorder, unfinished_trace
from powerinfer_tools.stages.profile.windows import Window, corpus_windows, spread_out
from powerinfer_tools.text import Tokenizer

#: Seconds between checkpoints: what a kill can cost at most.
CHECKPOINT_SECONDS = 60.0
DEFAULT_WINDOW = 512


@dataclass(frozen=True)
class ProfileOptions:
    """What to profile. ``max_tokens`` None reads until more tokens would not change what a plan places
    (:mod:`.stopping`), or all of a shard and for a trace; windows come from all over the corpus, but for a
    trace. ``restart`` forgets interrupted work.

    ``trace``: sampled tokens whose FFN inputs and active neurons are written to ``trace_output``, too (0:
    none). ``window`` tokens are read at once, each window anew; None takes 512, or less where the context is.
    ``shard`` (I, N): only the I-th of N parts of the corpus; the profiles of all parts merge into that of the
    whole, bit for bit.
    """

    model: Path
    corpus: tuple[Path, ...]
    output: Path
    window: int | None = None
    max_tokens: int | None = None
    target_density: float = 0.2
    threads: int | None = None
    restart: bool = False
    trace: int = 0
    trace_output: Path | None = None
    shard: tuple[int, int] | None = None


def checkpoint_path(output: Path) -> Path:
    """Where interrupted work on ``output`` waits."""
    return output.with_name(output.name.replace(".safetensors", "") + ".unfinished.safetensors")


def run_profile(options: ProfileOptions, progress: Progress | None = None) -> Profile:
    """Make the profile and write it to ``options.output``.

    Interrupted (KeyboardInterrupt, or killed at most :data:`CHECKPOINT_SECONDS` ago), the same call goes on
    where it was. Raises CorpusError, ProfileError, ModelError and FormatError.
    """
    progress = progress or Silent()
    files = find_files(options.corpus)
    if options.shard is not None:
        files = shard_of(files, *options.shard)
    model = load_model(options.model)
    try:
        if not model.is_source:
            raise ProfileError(
                f"{options.model} is a split file; profile the source model that it was made from"
            )
        model.require_countable(ProfileError, "profile")
        if options.trace:
            model.require_predictable(ProfileError, "profile --trace")
        if options.trace and not model.exact_zeros:
            raise ProfileError(
                f"{options.model}: --trace records which neurons are exactly zero, and "
                f"{model.hyper.activation} has no exact zeros; powerinfer relufy makes a model that has, and "
                "powerinfer threshold leaves neurons out without a trace"
            )
        window = _window(options.window, model)
        profile = _Run(options, model, window, files, progress).complete()
        model.source.require_unchanged()
        profile.save(options.output)
        checkpoint_path(options.output).unlink(missing_ok=True)
        if options.trace_output is not None:
            unfinished_trace(options.trace_output).unlink(missing_ok=True)
        return profile
    finally:
        model.close()


def _window(window: int | None, model: Model) -> int:
    longest = model.hyper.trained_context
    if window is None:
        return min(DEFAULT_WINDOW, longest)
    if not 2 <= window <= longest:
        raise ProfileError(f"--window {window} is not from 2 to {longest}, the context of {model.path}")
    return window


class _Run:
    """One run of profile: the counters, and how far they are."""

    def __init__(
        self,
        options: ProfileOptions,
        model: Model,
        window: int,
        files: Sequence[CorpusFile],
        progress: Progress,
    ) -> None:
        self.options, self.model, self.files, self.progress = options, model, files, progress
        self.window = window
        self.tokenizer = Tokenizer.from_gguf(model.source)
        self.tally = Tally(model, len(files))
        self.done = 0
        self.trace: TraceRecorder | None = None
        alone = options.max_tokens is None and options.shard is None and not options.trace
        self.stopping = Stopping(self.tally.counters, options.target_density) if alone else None
        self.halves: CorpusHalves | None = None
        self._in_first = list[bool]()

    def complete(self) -> Profile:
        """Count everything that is still to be counted."""
        # Tokenising first costs a few seconds per million tokens, and gives the progress bar its end.
        every = list(corpus_windows(self.files, self.tokenizer, self.window, self.progress))
        # The parts of a trace are those of the corpus, one after the other.
        windows = list(self._limited(every if self.options.trace else spread_out(every)))
        if self.options.trace and self.options.trace_output is not None and windows:
            self.trace = TraceRecorder(self.model, windows, self.options.trace, self.options.trace_output)
        self._resume()
        if self.trace is not None and not self.done:
            self.trace.begin()
        self._compare_halves(len(every), len(windows))
        pending = windows[self.done :]
        if not pending and not self.tally.tokens:
            raise CorpusError("the corpus holds no text; nothing was written")
        total = self.tally.tokens + sum(len(window.tokens) for window in pending)
        self.progress.start("profile", total, "tokens")
        self.progress.advance(self.tally.tokens)
        engine = Engine(
            self.model,
            threads=self.options.threads,
            context=self.window,
            batch=self.window,
            mode="dense",
            observed=self.tally.observed,
        )
        try:
            self._count(engine, pending)
        finally:
            engine.close()
            self.progress.finish()
        self._say_halves()
        if self.trace is not None:
            hashes = tuple(file.sha256 for file in self.files)
            self.trace.finish(self.window, hashes)
        return self._profile()

    def _count(self, engine: Engine, pending: Sequence[Window]) -> None:
        saved = time.monotonic()
        # A window is counted as a whole or not at all: an interrupt waits for its end.
        with deferred_interrupts() as interrupts:
            for window in pending:
                if self.stopping is not None and self.stopping.enough(self.tally.tokens):
                    self._say_stopped(sum(len(window.tokens) for window in pending))
                    break
                watch = self.trace.watcher(self.done) if self.trace else None
                if self.halves is not None:
                    self.halves.begin(first=self._in_first[self.done])
                engine.absorb(window.tokens, watch)
                if self.trace is not None:
                    self.trace.close_window()
                if self.halves is not None:
                    self.halves.end(len(window.tokens))
                self.tally.close_window(window.file, len(window.tokens))
                self.done += 1
                self.progress.advance(len(window.tokens))
                if interrupts.pending or time.monotonic() - saved > CHECKPOINT_SECONDS:
                    self._checkpoint()
                    saved = time.monotonic()
                if interrupts.pending:
                    self.progress.note(
                        f"stopped after {self.tally.tokens} tokens; the same command continues from there"
                    )
                interrupts.check()

    def _compare_halves(self, every: int, counted: int) -> None:
        """Count the first half of the corpus apart, where all of it is counted here and now."""
        if self.done or self.options.shard is not None:
            return
        first = [index < every // 2 for index in range(every)]
        self._in_first = (first if self.options.trace else spread_out(first))[:counted]
        self.halves = CorpusHalves(self.tally.counters, self.options.target_density)

    def _say_halves(self) -> None:
        difference = None if self.halves is None else self.halves.difference
        if difference is not None:
            self.progress.note(
                f"the first and the second half of the corpus disagree: of what one would place, the other's "
                f"choice covers {1 - difference:.1%}"
            )

    def _say_stopped(self, windows: int) -> None:
        assert self.stopping is not None
        assert self.stopping.difference is not None
        self.progress.note(
            f"stopped after {self.tally.tokens:,} of {windows:,} tokens: of what one half of them would "
            f"place, the other half's choice covers {1 - self.stopping.difference:.1%} "
            f"(asked for: {1 - TOLERANCE:.0%}; {SHARE:.0%} of each layer placed); --tokens N reads N"
        )

    def _limited(self, windows: Iterable[Window]) -> Iterator[Window]:
        left = self.options.max_tokens
        for window in windows:
            if left is None:
                yield window
                continue
            if left <= 0:
                return
            piece = window.tokens[:left]
            left -= len(piece)
            yield Window(window.file, piece)

    def _work(self) -> str:
        """A hash of corpus and options: only the same work is taken up again."""
        facts = [
            self.model.fingerprint,
            [[file.name, file.sha256] for file in self.files],
            self.window,
            "spread out",
            self.options.max_tokens,
            self.options.target_density,
            self.options.trace,
            __version__,
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def _resume(self) -> None:
        path = checkpoint_path(self.options.output)
        if self.options.restart or not path.exists():
            return
        try:
            checkpoint = ProfileCheckpoint.load(path)
        except FormatError as error:
            self.progress.note(f"interrupted work is not usable; starting again ({error})")
            return
        if checkpoint.position.work != self._work():
            self.progress.note(
                f"{path.name} belongs to other work (model, corpus or options differ); starting again"
            )
            return
        if self.trace is not None and not self.trace.resume(checkpoint.position.windows):
            self.progress.note("the records of the interrupted trace are missing; starting again")
            return
        self.tally.restore(checkpoint.profile, [file.name for file in self.files])
        self.done = checkpoint.position.windows
        self.progress.note(f"continuing after {self.tally.tokens} tokens")

    def _checkpoint(self) -> None:
        if self.done:
            if self.trace is not None:
                self.trace.sync()
            position = CorpusPosition(self._work(), self.done)
            ProfileCheckpoint(self._profile(), position).save(checkpoint_path(self.options.output))

    def _profile(self) -> Profile:
        return Profile(
            fingerprint=self.model.fingerprint,
            model_name=self.model.name,
            architecture=self.model.spec.name,
            activation=ROUTING if self.model.hyper.routing else self.model.hyper.activation,
            exact_zeros=self.model.exact_zeros or self.model.hyper.routing is not None,
            tokens=self.tally.tokens,
            window=self.window,
            target_density=self.options.target_density,
            corpus=tuple(
                Corpus(file.name, file.sha256, tokens, file.nbytes)
                for file, tokens in zip(self.files, self.tally.file_tokens, strict=True)
                if tokens
            ),
            tool_version=__version__,
            sums=self.tally.sums(),
        )
