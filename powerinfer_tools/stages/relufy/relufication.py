"""relufy: replace the activation, fit the down projections to it, then distil the whole model."""

import hashlib
import json
import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from powerinfer_formats.delta import Delta, DeltaHeader, DeltaQuality
from powerinfer_formats.errors import FormatError
from powerinfer_tools import __version__
from powerinfer_tools.errors import HardwareError, ModelError
from powerinfer_tools.interrupts import Interrupts, deferred_interrupts
from powerinfer_tools.model.architectures import RELU_FAMILY
from powerinfer_tools.model.loading import Model, load_model
from powerinfer_tools.progress import Progress, Silent
from powerinfer_tools.stages.profile.corpus import find_files
from powerinfer_tools.stages.relufy.application import file_sha256, require_shape
from powerinfer_tools.stages.relufy.checkpoint import Checkpoint
from powerinfer_tools.stages.relufy.compression import Rounded, round_student
from powerinfer_tools.stages.relufy.error_passing import PASSING_TYPES, Bytes, round_rows
from powerinfer_tools.stages.relufy.export import FFNTypes, Rows, export, ffn_types, source_matrix
from powerinfer_tools.stages.relufy.fitting import fit_down_projections
from powerinfer_tools.stages.relufy.network import Network, Tensor
from powerinfer_tools.stages.relufy.options import TARGETS, Reading, RelufyOptions, RelufyReport
from powerinfer_tools.stages.relufy.student import (
    Floats,
    PressureControl,
    Student,
    TrainedMatrix,
    divergence,
)
from powerinfer_tools.stages.relufy.text import Tokens, text_windows, training_order

#: Seconds between checkpoints: what a kill can cost at most.
CHECKPOINT_SECONDS = 300.0
#: Share of the steps over which the density is brought down; the rest recovers quality at that density.
RAMP_SHARE = 0.5
#: Share of the steps in which the learning rate rises; it then falls to a tenth along a cosine.
WARM_UP_SHARE = 0.05
#: Windows that rounding learns from what matrices read, and down projections are fitted to once more.
ROUNDING_WINDOWS = 48
#: Free weights learn at this share of the rate of low-rank factors, each step of which moves a weight more.
FREE_RATE_SHARE = 0.2


def checkpoint_path(output: Path) -> Path:
    """Where interrupted work on ``output`` waits."""
    return output.with_name(output.name + ".unfinished.safetensors")


def run(options: RelufyOptions, progress: Progress | None = None) -> RelufyReport:
    """What :func:`powerinfer_tools.stages.relufy.run_relufy` does, with torch at hand."""
    model = load_model(options.model)
    try:
        start = None if options.start is None else Delta.load(options.start)
        if start is not None:
            options = _going_on(options, start, model)
        _check(options, model)
        if options.threads:
            torch.set_num_threads(options.threads)
        report = _Run(model, options, start, progress or Silent()).complete()
        checkpoint_path(options.output).unlink(missing_ok=True)
        return report
    finally:
        model.close()


def _going_on(options: RelufyOptions, start: Delta, model: Model) -> RelufyOptions:
    """The options of work that begins with what ``start`` changed: its activation, cut and rank, and no
    fit."""
    assert options.start is not None
    require_shape(model, start, options.start)
    header = start.header
    cut = header.cut if header.activation == "fatrelu" else None
    return replace(options, activation=header.activation, cut=cut, rank=header.rank, fit_windows=0)


def _check(options: RelufyOptions, model: Model) -> None:
    model.require_one_ffn(ModelError, "relufy")
    if model.hyper.activation in RELU_FAMILY:
        raise ModelError(f"{model.path} has exact zeros already ({model.hyper.activation})")
    if not model.spec.gated:
        raise ModelError(
            f"{model.path}: relufy turns gated FFNs into ReLU ones; those of {model.spec.name} have no gate"
        )
    ffn_types(options.quant, model)
    if options.activation not in TARGETS:
        raise ModelError(f"activation {options.activation!r} is not one of {', '.join(TARGETS)}")
    if options.cut is not None and (options.cut < 0 or options.activation != "fatrelu"):
        raise ModelError(
            f"a cut of {options.cut} does not go with {options.activation}: fatrelu alone has one"
        )
    if options.fitted_density is not None and not options.fit_windows:
        raise ModelError("thresholds of each neuron are chosen during the fit: give --fit-windows or --cut")
    if options.window > model.hyper.trained_context:
        raise ModelError(
            f"--ctx {options.window} is more than the context of {model.path}, {model.hyper.trained_context}"
        )
    if options.device == "cuda" and not torch.cuda.is_available():
        raise HardwareError("--device cuda: torch finds no CUDA device; use --device cpu")


def _precision(device: str) -> torch.dtype:
    """bfloat16 where it is fast. On a CPU without matrix units it is not: 164 against 280 GFLOP/s in float32
    where it was measured (2 cores, AVX-512)."""
    return torch.float32 if device == "cpu" else torch.bfloat16


def _learning_rate(step: int, steps: int, highest: float) -> float:
    warm = max(1, int(steps * WARM_UP_SHARE))
    if step < warm:
        return highest * (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    return highest * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))


class _Run:
    """One run of relufy."""

    def __init__(self, model: Model, options: RelufyOptions, start: Delta | None, progress: Progress) -> None:
        self.model, self.options, self.progress = model, options, progress
        self.train, held = text_windows(model, options.corpus, options.window, progress)
        self.held = held[:: max(1, len(held) // options.validation_windows)][: options.validation_windows]
        self.network = Network(model, options.device, options.window, _precision(options.device))
        activation, cut = options.target
        self.student = Student(self.network, activation, options.rank, options.seed, cut)
        self.start = start
        if start is not None:
            self.student.start_from(start)
        self.optimizer = self._adam()
        self.control = PressureControl(options.density, int(options.steps * RAMP_SHARE))
        self.layers_done, self.step, self.seconds = 0, 0, 0.0
        self.dense_perplexity = 0.0
        self.history: list[Reading] = []

    def complete(self) -> RelufyReport:
        """Do what is still to be done and write the model."""
        self._resume()
        self.started = time.monotonic()
        with deferred_interrupts() as interrupts:
            if not self.dense_perplexity:
                self.dense_perplexity = self._judge(None).perplexity
                self.progress.note(f"dense: perplexity {self.dense_perplexity:.2f} on the held-out windows")
            if self.options.fit_windows and self.layers_done < self.model.hyper.layers:
                self._fit_layers(interrupts)
            self._distil(interrupts)
        self._write()
        last = self.history[-1]
        return RelufyReport(
            output=str(self.options.output),
            delta=None if self.options.save_delta is None else str(self.options.save_delta),
            activation=self.options.activation,
            dense_perplexity=self.dense_perplexity,
            perplexity=last.perplexity,
            density=last.density,
            kl=last.kl,
            tokens=last.tokens,
            seconds=self.seconds + time.monotonic() - self.started,
            history=tuple(self.history),
        )

    # --- the result --------------------------------------------------------------------------------------

    def _write(self) -> None:
        """The model, and the delta that makes it, if one is asked for. Where rounding errs by more than the
        nearest values of 8 bits do, the rounded model is judged once more."""
        options = self.options
        types = ffn_types(options.quant, self.model)
        if options.save_delta is None and types.gate not in PASSING_TYPES:
            export(self.model, self._nearest(types), options.target, types, options.output)
            return
        rounded = self._round(types)
        self._record()
        export(
            self.model, lambda index, kind: rounded.rows[index][kind], options.target, types, options.output
        )
        if options.save_delta is not None:
            header = self._delta_header(types, file_sha256(options.output))
            Delta(header, rounded.changes, self._scales(), rounded.passings).save(options.save_delta)

    def _nearest(self, types: FFNTypes) -> Rows:
        def rows(index: int, kind: str) -> Bytes:
            values = self.student.matrix(index, kind, source_matrix(self.model, index, kind))
            return round_rows(values, types.of(kind), None)

        return rows

    def _round(self, types: FFNTypes) -> Rounded:
        order = training_order(len(self.train), min(ROUNDING_WINDOWS, len(self.train)), self.options.seed)
        self.progress.start("rounding layers", self.model.hyper.layers, "layers")
        tokens = self._tokens(self.train[order])
        rounded = round_student(self.network, self.student, tokens, types, lambda: self.progress.advance(1))
        self.progress.finish()
        return rounded

    def _scales(self) -> tuple[Floats, ...]:
        """Scales of the neurons of every layer, where the activation can have them."""
        if self.options.activation != "fatrelu":
            return ()
        return tuple(self.student.scales(index) for index in range(self.model.hyper.layers))

    def _delta_header(self, types: FFNTypes, sha256: str) -> DeltaHeader:
        last, hyper = self.history[-1], self.model.hyper
        before = None if self.start is None else self.start.header
        texts = [file.name for file in find_files(self.options.corpus)]
        quality = DeltaQuality(
            text="held-out windows of the corpus",
            tokens=len(self.held) * (self.options.window // 2),
            dense_perplexity=self.dense_perplexity,
            perplexity=last.perplexity,
            density=last.density,
        )
        return DeltaHeader(
            fingerprint=self.model.fingerprint,
            model_name=self.model.name,
            activation=self.options.activation,  # type: ignore[arg-type]
            cut=self.options.target[1],
            row_type=types.gate.name,  # type: ignore[arg-type]
            down_type=types.down.name,  # type: ignore[arg-type]
            layers=hyper.layers,
            width=hyper.width,
            neurons=hyper.neurons,
            rank=self.options.rank,
            result_sha256=sha256,
            learned_tokens=last.tokens + (0 if before is None else before.learned_tokens),
            texts=tuple(dict.fromkeys((*(() if before is None else before.texts), *texts))),
            quality=(quality,),
            tool_version=__version__,
        )

    # --- the start -----------------------------------------------------------------------------------

    def _fit_layers(self, interrupts: Interrupts) -> None:
        """Closed-form down projections, on the first windows of the order of training."""
        count = min(self.options.fit_windows, len(self.train))
        order = training_order(len(self.train), count, self.options.seed)
        self.progress.start("fitting layers", self.model.hyper.layers, "layers")

        def finished(layers: int) -> None:
            self.layers_done = max(self.layers_done, layers)
            self.progress.advance(1)
            self._pause(interrupts)

        tokens = self._tokens(self.train[order])
        fit_down_projections(
            self.network, self.student, tokens, self.layers_done, finished, self.options.fitted_density
        )
        self.progress.finish()

    # --- the whole model -----------------------------------------------------------------------------

    def _distil(self, interrupts: Interrupts) -> None:
        options = self.options
        order = training_order(len(self.train), options.steps * options.batch, options.seed + 1)
        tokens = options.batch * options.window
        self.progress.start("distilling", options.steps * tokens, "tokens")
        self.progress.advance(self.step * tokens)
        saved = time.monotonic()
        if not self.history:
            self._record()
        while self.step < options.steps:
            self._distil_step(self.train[order[self.step * options.batch : (self.step + 1) * options.batch]])
            self.step += 1
            self.progress.advance(tokens)
            if self.step % options.validate_every == 0 or self.step == options.steps:
                self._record()
                if self._stalled():
                    self.progress.note("stopped early: no better model after the last checks")
                    break
            if time.monotonic() - saved > CHECKPOINT_SECONDS:
                self._checkpoint()
                saved = time.monotonic()
            self._pause(interrupts)
        self.progress.finish()

    def _distil_step(self, windows: Tokens) -> None:
        options = self.options
        tokens = self._tokens(windows)
        _set_rate(self.optimizer, _learning_rate(self.step, options.steps, options.learning_rate))
        with torch.no_grad():
            teacher = self.network.hidden(tokens, self.network.dense_ffn).flatten(0, 1)
        self.student.begin()
        hidden = self.network.hidden(tokens, self.student).flatten(0, 1)
        loss = divergence(hidden, teacher, self.network.head) + self.control.weight * self.student.pressure
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.student.ffns.parameters(), 1.0)
        self.optimizer.step()
        self.control.observe(self.step, self.student.density)

    def _record(self) -> None:
        reading = self._judge(self.student)
        self.history.append(reading)
        self.progress.note(
            f"after {reading.tokens:,} tokens: perplexity {reading.perplexity:.2f} "
            f"({reading.perplexity / self.dense_perplexity:.3f} of dense), "
            f"{1 - reading.density:.1%} zeros, KL {reading.kl:.3f}"
        )

    def _stalled(self) -> bool:
        patience = self.options.patience
        past = [r for r in self.history if r.density <= self.options.density * 1.05]
        if not patience or len(past) <= patience:
            return False
        return min(r.perplexity for r in past[-patience:]) >= min(r.perplexity for r in past[:-patience])

    @torch.no_grad()
    def _judge(self, student: Student | None) -> Reading:
        """Perplexity (of the second half of each window), KL and density on the held-out windows."""
        losses, kls, densities = [], [], []
        for window in self.held:
            tokens = self._tokens(window[None])
            half = tokens.shape[1] // 2
            base = self.network.hidden(tokens, self.network.dense_ffn)[0, half:-1]
            hidden = base
            if student is not None:
                student.begin()
                hidden = self.network.hidden(tokens, student)[0, half:-1]
                densities.append(student.density)
            logits = functional.linear(hidden, self.network.head).float()
            losses.append(functional.cross_entropy(logits, tokens[0, half + 1 :]))
            kls.append(divergence(hidden, base, self.network.head))
        return Reading(
            tokens=self.step * self.options.batch * self.options.window,
            perplexity=math.exp(float(torch.stack(losses).mean())),
            density=float(np.mean(densities)) if densities else 1.0,
            kl=float(torch.stack(kls).mean()),
        )

    # --- stopping and going on -----------------------------------------------------------------------

    def _pause(self, interrupts: Interrupts) -> None:
        if interrupts.pending:
            self._checkpoint()
            self.progress.note("stopped; the same command continues from here")
        interrupts.check()

    def _work(self) -> str:
        options = replace(self.options, threads=None, restart=False, corpus=(), save_delta=None)
        windows = hashlib.sha256(self.train.tobytes()).hexdigest()
        text = json.dumps([vars(options) | {"output": "", "model": "", "corpus": ""}, windows], default=str)
        return hashlib.sha256((text + self.model.fingerprint + __version__).encode()).hexdigest()

    def _checkpoint(self) -> None:
        Checkpoint(
            work=self._work(),
            layers_done=self.layers_done,
            step=self.step,
            pressure=self.control.weight,
            first_density=self.control.start,
            dense_perplexity=self.dense_perplexity,
            seconds=self.seconds + time.monotonic() - self.started,
            history=tuple(self.history),
            tensors=self._tensors(),
        ).save(checkpoint_path(self.options.output))

    def _resume(self) -> None:
        path = checkpoint_path(self.options.output)
        if self.options.restart or not path.exists():
            return
        try:
            checkpoint = Checkpoint.load(path)
        except FormatError as error:
            self.progress.note(f"interrupted work is not usable; starting again ({error})")
            return
        if checkpoint.work != self._work():
            self.progress.note(
                f"{path.name} belongs to other work (model, corpus or options differ); starting again"
            )
            return
        self.layers_done, self.step, self.seconds = (
            checkpoint.layers_done,
            checkpoint.step,
            checkpoint.seconds,
        )
        self.control.weight, self.control.start = checkpoint.pressure, checkpoint.first_density
        self.dense_perplexity, self.history = checkpoint.dense_perplexity, list(checkpoint.history)
        self._restore(checkpoint.tensors)
        self.progress.note(f"continuing after {self.layers_done} layers and {self.step} steps")

    def _tensors(self) -> dict[str, Tensor]:
        tensors = dict(self.student.ffns.state_dict())
        for index, parameter in enumerate(self.student.ffns.parameters()):
            for kind in ("exp_avg", "exp_avg_sq"):
                if parameter in self.optimizer.state:
                    tensors[f"optimizer.{kind}.{index}"] = self.optimizer.state[parameter][kind]
        return tensors

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        moments = {name: tensors.pop(name) for name in list(tensors) if name.startswith("optimizer.")}
        self.student.ffns.load_state_dict(tensors)
        for index, base in enumerate(self.network.gated_base):
            self.student.ffn(index).restore_scale(base)
        for index, parameter in enumerate(self.student.ffns.parameters()):
            if f"optimizer.exp_avg.{index}" not in moments:
                continue
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(self.step)),
                "exp_avg": moments[f"optimizer.exp_avg.{index}"].to(parameter.device),
                "exp_avg_sq": moments[f"optimizer.exp_avg_sq.{index}"].to(parameter.device),
            }

    def _adam(self) -> torch.optim.AdamW:
        """``rate_share`` of a group is its part of the learning rate."""
        free: list[torch.nn.Parameter] = []
        low_rank: list[torch.nn.Parameter] = []
        for module in self.student.ffns.modules():
            if isinstance(module, TrainedMatrix):
                (low_rank if module.rank else free).extend(module.parameters())
        groups = [{"params": low_rank, "rate_share": 1.0}, {"params": free, "rate_share": FREE_RATE_SHARE}]
        return torch.optim.AdamW(
            [group for group in groups if group["params"]], betas=(0.9, 0.95), weight_decay=0.0
        )

    def _tokens(self, windows: Tokens) -> Tensor:
        return torch.from_numpy(windows).to(self.options.device)


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate_share"]
