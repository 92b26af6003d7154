"""train: predictors for every layer, from the trace that profile took."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from powerinfer_formats.predictors import (
    LayerPredictor,
    PredictionCost,
    PredictorInfo,
    Predictors,
    PredictorsHeader,
)
from powerinfer_formats.trace import TraceFile
from powerinfer_kernels import RowType, block_shape
from powerinfer_tools import __version__
from powerinfer_tools.errors import HardwareError, TrainError, how_to_install
from powerinfer_tools.model.loading import Model, load_model
from powerinfer_tools.progress import Progress, Silent
from powerinfer_tools.quality.perplexity import windows
from powerinfer_tools.stages.train.allocation import Setting, allocate, settings
from powerinfer_tools.stages.train.choice import Candidate, choose
from powerinfer_tools.stages.train.frontier import Frontier, frontier_of
from powerinfer_tools.stages.train.layer_data import LayerData
from powerinfer_tools.stages.train.low_rank import cut, factorize
from powerinfer_tools.stages.train.meter import Meter
from powerinfer_tools.stages.train.naming import Fit, Floats, fit, judge, level_for
from powerinfer_tools.stages.train.options import METHODS, ROW_TYPES, TrainOptions, TrainReport
from powerinfer_tools.stages.train.sizes import candidates, sign_bits, sign_candidates
from powerinfer_tools.stages.train.unfinished import FinishedLayer, forget
from powerinfer_tools.text import Tokenizer

#: The recall that sizes are chosen for where none is asked for: what a strict budget of quality needs.
_SIZING_RECALL = 0.98


def run_train(options: TrainOptions, progress: Progress | None = None) -> TrainReport:
    """Make the predictors and write them.

    Records are parted by chunk: seven tenths to learn from, two to choose ranks and thresholds, one to
    measure. Raises TrainError, CorpusError, ModelError and FormatError (also for the trace of another
    model).
    """
    model = load_model(options.model)
    try:
        _check(options, model)
        with TraceFile(options.trace) as trace:
            trace.require_model(model.fingerprint, model.name, _shape(model))
            return _Run(options, model, trace, progress or Silent()).complete()
    finally:
        model.close()


def require_trainable(path: Path) -> None:
    """Raise TrainError for a model that predictors cannot be made for, whatever else there is."""
    model = load_model(path)
    try:
        _check_model(model)
    finally:
        model.close()


def _check_model(model: Model) -> None:
    if not model.is_source:
        raise TrainError(f"{model.path} is a split file; train on the source model that it was made from")
    model.require_predictable(TrainError, "train")
    if not model.exact_zeros:
        raise TrainError(
            f"{model.path}: {model.hyper.activation} has no exact zeros, so there are no active neurons to "
            "predict; powerinfer threshold chooses neurons to leave out within a budget of perplexity, and "
            "powerinfer relufy makes a model with exact zeros"
        )


def _check(options: TrainOptions, model: Model) -> None:
    _check_model(model)
    if options.method not in METHODS or options.row_type not in ROW_TYPES:
        raise TrainError(
            f"method {options.method!r} and type {options.row_type!r}: known are {', '.join(METHODS)} and "
            f"{', '.join(ROW_TYPES)}"
        )
    if not 0 < (options.recall or 0.5) < 1 or not 0 < options.budget <= 1 or options.max_increase < 0:
        raise TrainError(
            f"recall {options.recall} and budget {options.budget} must lie between 0 and 1, and the increase "
            f"of perplexity, {options.max_increase}, must not be negative"
        )
    if options.recall is None and options.text is None:
        raise TrainError(
            "predicting within a budget of perplexity needs a text to measure it on, or a recall"
        )
    if options.windows < 3:
        raise TrainError(f"{options.windows} windows of text are too few to choose with and to measure on")
    if options.method == "tuned":
        _require_torch(options.device)
    block = block_shape(RowType[options.row_type])[0]
    if options.method != "sign" and model.hyper.width % block:
        raise TrainError(
            f"{options.model}: rows of {model.hyper.width} values are no whole blocks of {options.row_type}; "
            "take --type F16"
        )


def _require_torch(device: str) -> None:
    try:
        import torch
    except ImportError as error:
        raise HardwareError(
            f"method tuned needs torch, which is not installed ({error}); {how_to_install('torch')}, "
            "or take --method svd"
        ) from None
    if device == "cuda" and not torch.cuda.is_available():
        raise HardwareError("--device cuda: torch finds no CUDA device here; take --device cpu")


def _shape(model: Model) -> tuple[int, int, int]:
    return model.hyper.layers, model.hyper.width, model.hyper.neurons


class _Run:
    """One run of train."""

    def __init__(self, options: TrainOptions, model: Model, trace: TraceFile, progress: Progress) -> None:
        self.options, self.model, self.trace, self.progress = options, model, trace, progress
        self.row_type = RowType[options.row_type]
        self.windows = self._text_windows()
        if options.restart:
            forget(options.output)

    def complete(self) -> TrainReport:
        """Choose sizes, make the predictors, choose what is predicted, and measure."""
        chosen = self._sizes()
        self.progress.start("making predictors", len(chosen), "layers")
        fits = []
        for index, candidate in enumerate(chosen):
            fits.append(self._made(index, candidate.what))
            self.progress.advance(1)
        self.progress.finish()
        meter = self._meter(fits)
        try:
            thresholds = self._thresholds(fits, chosen, meter)
            cost = self._cost(thresholds, meter)
        finally:
            if meter is not None:
                meter.close()
        report = self._write(fits, chosen, thresholds, cost)
        forget(self.options.output)
        return report

    def _sizes(self) -> list[Candidate]:
        layers, recall = self.model.hyper.layers, self.options.recall or _SIZING_RECALL
        self.progress.start("trying ranks", layers, "layers")
        sizes = []
        for index in range(layers):
            data = self._layer(index)
            sizes.append(
                sign_candidates(data)
                if self.options.method == "sign"
                else candidates(data, self.row_type, recall)
            )
            self.progress.advance(1)
        self.progress.finish()
        return choose(sizes, int(self.options.budget * self.model.source.nbytes))

    def _made(self, index: int, rank: int) -> Fit:
        data = self._layer(index)
        learn = data.learn.inputs
        if self.options.method == "sign":
            return fit(sign_bits(data.gate), learn, data.gates(learn))
        made = cut(factorize(data.gate, learn), rank, self.row_type)
        start = fit(made, learn, data.gates(learn))
        return self._tuned(start, data) if self.options.method == "tuned" else start

    def _tuned(self, start: Fit, data: LayerData) -> Fit:
        """``start`` after tuning; finished layers of interrupted work are taken as they are."""
        recall = self.options.recall or _SIZING_RECALL
        finished = FinishedLayer(start, data, recall, self.options)
        made = finished.load()
        if made is None:
            from powerinfer_tools.stages.train.tuning import Tuning, tune

            tuning = Tuning(device=self.options.device, seed=self.options.seed)
            made = tune(start, data, recall, self.row_type, tuning)
            finished.keep(made)
        return made

    def _thresholds(
        self, fits: Sequence[Fit], chosen: Sequence[Candidate], meter: Meter | None
    ) -> list[Floats | None]:
        """Of every layer; None: gate-first."""
        options, levels = [], []
        for index, made in enumerate(fits):
            data = self._layer(index)
            if self.options.recall is not None:
                check = data.check
                level = level_for(made.normal(check.inputs), check.active, self.options.recall)
                levels.append(made.threshold(level))
            else:
                options.append(settings(data, made, int(chosen[index].price)))
        if self.options.recall is not None:
            return list(levels)
        assert meter is not None
        third = range(len(self.windows) // 3)
        best: list[Setting] = allocate(meter, third, options, self.options.max_increase, self.progress)
        return [setting.thresholds for setting in best]

    def _cost(self, thresholds: Sequence[Floats | None], meter: Meter | None) -> PredictionCost | None:
        if meter is None or self.options.text is None:
            return None
        measured = meter.measure(thresholds, range(len(self.windows) // 3, len(self.windows)))
        return PredictionCost(
            max_increase=None if self.options.recall is not None else self.options.max_increase,
            **vars(measured),
            window=len(self.windows[0]),
            text_sha256=hashlib.sha256(self.options.text.read_bytes()).hexdigest(),
        )

    def _write(
        self,
        fits: Sequence[Fit],
        chosen: Sequence[Candidate],
        thresholds: Sequence[Floats | None],
        cost: PredictionCost | None,
    ) -> TrainReport:
        layers: list[LayerPredictor] = []
        infos = []
        for index, (made, candidate, values) in enumerate(zip(fits, chosen, thresholds, strict=True)):
            layer = None if values is None else replace(made.made, threshold=values)
            test = self._layer(index).test
            judged = judge(layer, test.inputs, test.active)
            if layer is None:
                infos.append(PredictorInfo("none", 0, 0, judged))
            else:
                infos.append(PredictorInfo(layer.kind, candidate.what, int(candidate.price), judged))
            layers.append(layer)
        header = self._header(tuple(infos), len(test.active), cost)
        self.model.source.require_unchanged()
        Predictors(header, tuple(layers)).save(self.options.output)
        reached = Frontier(tuple(frontier_of(made, self._layer(i)) for i, made in enumerate(fits)))
        return TrainReport(str(self.options.output), header, self.model.source.nbytes, reached)

    def _layer(self, index: int) -> LayerData:
        return LayerData(self.model, self.trace, index)

    def _text_windows(self) -> list[list[int]]:
        if self.options.text is None:
            return []
        tokenizer = Tokenizer.from_gguf(self.model.source)
        text = self.options.text.read_text(encoding="utf-8", errors="replace")
        bos = tokenizer.bos_id if tokenizer.adds_bos else None
        length = self.trace.header.window
        windows_of_text = windows(tokenizer.encode(text), length, self.options.windows, bos)
        if len(windows_of_text) < 3:
            raise TrainError(f"{self.options.text} has fewer than 3 windows of {length} tokens")
        return windows_of_text

    def _meter(self, fits: Sequence[Fit]) -> Meter | None:
        if not self.windows:
            return None
        made = [one.made for one in fits]
        return Meter(self.model, made, self.options.row_type, self.windows, self.options.threads)

    def _header(
        self, layers: tuple[PredictorInfo, ...], test_records: int, cost: PredictionCost | None
    ) -> PredictorsHeader:
        trace = self.trace.header
        return PredictorsHeader(
            fingerprint=self.model.fingerprint,
            model_name=self.model.name,
            method=self.options.method,
            row_type=self.options.row_type,
            target_recall=self.options.recall,
            width=trace.width,
            neurons=trace.neurons,
            layers=layers,
            test_records=test_records,
            cost=cost,
            corpus_hashes=trace.corpus_hashes,
            tool_version=__version__,
        )
