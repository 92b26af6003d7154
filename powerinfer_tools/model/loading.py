"""A model as the engine sees it: checked hyper-parameters and typed views of its weights.

Every error in a file is found here or in the reader; after :func:`load_model` the engine trusts the model. No
weight is copied: views point into the mapped file. This module does not know how weights are used in
computing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from powerinfer_formats.fingerprint import model_fingerprint
from powerinfer_formats.model_source import ModelSource
from powerinfer_formats.split import SplitFile, SplitSizes
from powerinfer_formats.split_devices import SplitDevices, all_on_cpu
from powerinfer_tools.errors import ModelError
from powerinfer_tools.model.architectures import RELU_FAMILY, ArchitectureSpec, architecture
from powerinfer_tools.model.ffn_matrices import DenseFFN, ExpertsFFN
from powerinfer_tools.model.hyperparameter_types import Hyperparameters
from powerinfer_tools.model.hyperparameters import read_hyperparameters
from powerinfer_tools.model.layer_loading import load_layer
from powerinfer_tools.model.layer_weights import AttentionWeights, LayerWeights, mixing_weights
from powerinfer_tools.model.original import is_original, read_original
from powerinfer_tools.model.rotary import RopeFactors
from powerinfer_tools.model.sources import open_source
from powerinfer_tools.model.streams import InputTable, Streams, read_input_table, read_streams
from powerinfer_tools.model.tensors import MATRIX_TYPES, Norm, Tensors, Vector, Weight


@dataclass(frozen=True)
class Model:
    """An opened model, from a source GGUF or a split file. ``positions`` is the table of learnt positions;
    ``inputs`` and ``streams`` run along the layers; ``split`` is there for a split file, of neurons or of
    experts."""

    source: ModelSource
    spec: ArchitectureSpec
    hyper: Hyperparameters
    embedding: Weight
    embedding_norm: Norm | None
    head: Weight
    head_bias: Vector | None
    positions: Weight | None
    output_norm: Norm
    rope_factors: RopeFactors
    layers: Sequence[LayerWeights] = field(repr=False)
    inputs: InputTable | None = None
    streams: Streams | None = None
    split: SplitFile | None = None

    @property
    def path(self) -> Path:
        """The file the model was read from."""
        return self.source.path

    @property
    def name(self) -> str:
        """The model's name for people: ``general.name``, else the file's name."""
        return str(self.source.get("general.name", str, self.path.stem)) or self.path.stem

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the weights: of the source model, also for a split file."""
        return self.split.source_fingerprint if self.split else model_fingerprint(self.source)

    @property
    def is_original(self) -> bool:
        """Whether the file is a model of the original PowerInfer."""
        return is_original(self.source)

    @property
    def is_split(self) -> bool:
        """Whether neurons or experts are sorted already: by convert, or by the original PowerInfer."""
        return self.split is not None

    @property
    def devices(self) -> SplitDevices:
        """The devices of a split file's plan for everything except neurons and experts."""
        return all_on_cpu(self.hyper.layers) if self.split is None else self.split.devices

    @property
    def is_source(self) -> bool:
        """Whether profile, train, plan and convert can start from it: all but the split files of convert."""
        return not self.is_split or self.is_original

    @property
    def exact_zeros(self) -> bool:
        """Whether some layer makes exact zeros, so that skipping its neurons changes nothing."""
        return any(map(self.has_zeros, range(self.hyper.layers)))

    def has_zeros(self, layer: int) -> bool:
        """Whether ``layer`` makes exact zeros: by its activation, or as its gate keeps the largest alone."""
        return self.hyper.activation in RELU_FAMILY or self.hyper.facts[layer].deviations is not None

    def require_countable(self, error: type[Exception], stage: str) -> None:
        """Raise ``error`` for a model whose activations ``stage`` does not count, and name them."""
        self._refuse_first({"xIELU activations": bool(self.hyper.xielu)}, error, stage)

    def require_placeable(self, error: type[Exception], stage: str) -> None:
        """Raise ``error``, naming the FFNs or experts, for a model whose FFNs or experts ``stage`` does not
        sort. Token mixers do not matter."""
        hyper, routing = self.hyper, self.hyper.routing
        what = {
            "layers none of which has an FFN": all(layer.feeds is None for layer in self.layers),
            "FFNs of sizes that differ between layers beside experts": routing is not None
            and hyper.uneven_ffns,
            "xIELU activations": bool(hyper.xielu),
            "norms inside blocks": self.spec.inner_norms,
            "biases of gated FFNs or experts": any(self._biased(layer) for layer in self.layers),
            "FFNs or experts whose matrices have a scale": any(map(_is_scaled_ffn, self.layers)),
            "dense FFNs beside experts": self.spec.dense_beside != "none" and routing is not None,
            "a scale of what experts add": self.spec.shared_factor != 1.0 and routing is not None,
            "limited gates": hyper.limited,
        }
        self._refuse_first(what, error, stage)

    def _biased(self, layer: LayerWeights) -> bool:
        """Whether a layer has biases that only FFNs of two matrices have elsewhere."""
        ffn = layer.feeds
        if isinstance(ffn, ExpertsFFN):
            return any(bias is not None for bias in (ffn.router_bias, *ffn.biases))
        biases = (layer.ffn_bias, layer.ffn_factor_bias, layer.ffn_down_bias)
        return self.spec.gated and any(bias is not None for bias in biases)

    @property
    def placement_limit(self) -> str | None:
        """Why nothing of the model is computed on a hot device; None where its FFNs can be."""
        hyper, routing = self.hyper, self.hyper.routing
        if routing is not None and any(facts.ffn == "none" for facts in hyper.facts):
            return "layers without FFN beside experts"
        if hyper.limited:
            return "limited gates"
        if routing is not None and self.spec.expert_norms:
            return "experts that have norms of their own"
        return "experts whose input is weighed" if routing is not None and routing.weigh_input else None

    @property
    def attention_limit(self) -> str | None:
        """Why no attention of the model is computed on a hot device; None where it can be."""
        if self.spec.early_router and self.hyper.routing is not None:
            return "routers that read a layer's input"
        if any(layer.recurs is not None for layer in self.layers):
            return "recurrent layers"
        if any(layer.attends is None for layer in self.layers):
            return "layers without attention"
        if not all(isinstance(layer.attends, AttentionWeights) for layer in self.layers):
            return "latent attention"
        if self.inputs is not None or self.streams is not None:
            return "inputs of single layers"
        if any(layer.output_scale != 1.0 for layer in self.layers):
            return "layers that end with a factor"
        if self.spec.embedding_shares:
            return "layers that add the embedding again"
        if any(facts.cache is not None for facts in self.hyper.facts):
            return "layers without keys of their own"
        if any(facts.head_dim != self.hyper.head_dim for facts in self.hyper.facts):
            return "attention heads whose width differs between layers"
        if any((f.heads, f.kv_heads) != (self.hyper.heads, self.hyper.kv_heads) for f in self.hyper.facts):
            return "attention heads that differ between layers"
        return None

    def _refuse_first(self, what: dict[str, bool], error: type[Exception], stage: str) -> None:
        for name, applies in what.items():
            if applies:
                raise error(f"{self.path}: {stage} does not take models with {name}; run, eval and bench do")

    @cached_property
    def unusual(self) -> str | None:
        """The name of the first feature of the model that not every stage supports; None without any."""
        hyper, routing = self.hyper, self.hyper.routing
        what = {
            "recurrent layers": hyper.recurrent is not None,
            "latent attention": hyper.latent is not None,
            "attention sinks": self.spec.sinks,
            "routers that read a layer's input": self.spec.early_router,
            "gates of attention": self.spec.attention_gate != "none",
            "norms of embeddings": self.embedding_norm is not None,
            "norms with biases by root mean square": self.spec.rms_biases,
            "queries that grow with their position": any(f.position_scale for f in hyper.facts),
            "attention in chunks": hyper.chunked,
            "value heads of another width": hyper.value_dim != hyper.head_dim,
            "scaled values": hyper.value_scale != 1.0,
            "matrices that have a scale": self._scaled,
            "norms inside blocks": self.spec.inner_norms,
            "xIELU activations": bool(hyper.xielu),
            "norms after blocks that have an epsilon of their own": self.spec.post_norm_eps > 0,
            "norms of each head's own": self.spec.qk_norm in ("own heads", "plain", "gains")
            and any(layer.attention.query_norm is not None for layer in self.layers),
            "inputs of single layers": self.inputs is not None,
            "several residual streams": self.streams is not None,
            "layers without keys of their own": any(facts.cache is not None for facts in hyper.facts),
            "layers that end with a factor": any(layer.output_scale != 1.0 for layer in self.layers),
            "layers that add the embedding again": self.spec.embedding_shares,
            "normalised values": self.spec.value_norm,
            "gates that depend on all neurons": any(f.deviations is not None for f in hyper.facts),
            "layers without attention": any(layer.attends is None for layer in self.layers),
            "layers without FFN": any(layer.feeds is None for layer in self.layers),
            "dense FFNs beside experts": self.spec.dense_beside != "none" and routing is not None,
            "a scale of what experts add": self.spec.shared_factor != 1.0 and routing is not None,
            "limited gates": hyper.limited,
            str(hyper.uneven): hyper.uneven is not None,
            "scaled residuals": hyper.residual_scale != 1.0,
            "this kind of router": routing is not None and not routing.plain,
            "dense layers beside experts": routing is not None and self._mixed,
            "biases of gated FFNs": self.spec.gated_biases,
        }
        return next((name for name, applies in what.items() if applies), None)

    def require_plain(self, error: type[Exception], stage: str) -> None:
        """Raise ``error`` for a model with something that ``stage`` does not know, and name it."""
        if (what := self.unusual) is not None:
            raise error(f"{self.path}: {stage} does not take models with {what}; run, eval and bench do")

    @property
    def _scaled(self) -> bool:
        """Whether some matrix has a scale, as matrices of NVFP4 rows do."""
        matrices = [self.head, *(one for layer in self.layers for one in mixing_weights(layer))]
        return any(one.scale != 1.0 for one in matrices) or any(map(_is_scaled_ffn, self.layers))

    @property
    def _mixed(self) -> bool:
        return any(facts.ffn != "experts" for facts in self.hyper.facts)

    def require_one_ffn(self, error: type[Exception], stage: str) -> None:
        """Raise ``error`` for a model with experts, or with a feature that :meth:`require_plain` refuses."""
        self.require_plain(error, stage)
        self._refuse_experts(error, stage)

    def require_predictable(self, error: type[Exception], stage: str) -> None:
        """Raise ``error`` for a model that has not an FFN of one size in every layer, whose neurons can be
        sorted; what mixes tokens does not matter."""
        self._refuse_experts(error, stage)
        what = {
            "layers without FFN": any(layer.feeds is None for layer in self.layers),
            "FFNs of sizes that differ between layers": self.hyper.uneven_ffns,
            "gates that depend on all neurons": any(f.deviations is not None for f in self.hyper.facts),
        }
        self._refuse_first(what, error, stage)
        self.require_placeable(error, stage)

    def _refuse_experts(self, error: type[Exception], stage: str) -> None:
        if self.hyper.routing is not None:
            raise error(
                f"{self.path}: {stage} does not take mixtures of experts, of which a token computes "
                f"{self.hyper.routing.used} of {self.hyper.routing.experts} without it; profile, plan, "
                "convert and run place those"
            )

    def close(self) -> None:
        """Unmap the file. Views that are still held keep their pages."""
        self.source.close()


def _is_scaled_ffn(layer: LayerWeights) -> bool:
    """Whether matrices of a source model's FFN, or of experts, are times a scale."""
    if isinstance(layer.feeds, ExpertsFFN):
        return layer.feeds.is_scaled
    return isinstance(layer.feeds, DenseFFN) and any(one.scale != 1.0 for one in layer.feeds.matrices)


def load_model(path: str | Path) -> Model:
    """Open and check the model in ``path``: a GGUF file, a split file made by convert, or a model of the
    original PowerInfer.

    Raises FormatError for a file that is not well-formed and ModelError for one that cannot be run.
    """
    gguf = open_source(path)
    try:
        return build_model(gguf)
    except BaseException:
        gguf.close()
        raise


def build_model(gguf: ModelSource) -> Model:
    """The model that an opened source holds. Raises as :func:`load_model` does."""
    spec = _resolved(architecture(gguf.get("general.architecture", str), str(gguf.path)), gguf)
    tensors = Tensors(gguf)
    embedding_shape = tensors.shape("token_embd.weight")
    if len(embedding_shape) != 2:
        raise ModelError(
            f"{gguf.path}: token_embd.weight has shape {embedding_shape}, not (vocabulary, width)"
        )
    learnt = spec.position_offset is not None and (
        not spec.positions_optional or tensors.has("position_embd.weight")
    )
    positions = tensors.shape("position_embd.weight")[0] if learnt else 0
    hyper = read_hyperparameters(gguf, spec, embedding_shape[0], positions)
    embedding = tensors.table_of_rows("token_embd.weight", hyper.vocabulary, hyper.width)
    head = embedding
    if tensors.has("output.weight"):
        head = tensors.matrix("output.weight", hyper.vocabulary, hyper.width)
    split = _split(gguf, spec, hyper)
    model = Model(
        source=gguf,
        spec=spec,
        hyper=hyper,
        embedding=embedding,
        embedding_norm=_embedding_norm(tensors, spec, hyper),
        head=head,
        head_bias=tensors.optional("output.bias", hyper.vocabulary) if spec.head_bias else None,
        positions=tensors.table_of_rows("position_embd.weight", positions, hyper.width) if learnt else None,
        output_norm=tensors.norm(spec, spec.output_norm, hyper.width),
        rope_factors=_rope_factors(tensors, spec, hyper),
        layers=tuple(load_layer(tensors, spec, hyper, split, i) for i in range(hyper.layers)),
        split=split,
        inputs=read_input_table(tensors, hyper.input_size, hyper.layers, hyper.vocabulary, hyper.width)
        if hyper.input_size
        else None,
        streams=None if hyper.streams is None else read_streams(tensors, hyper.streams, hyper.width),
    )
    for pattern in spec.left_out:
        tensors.leave_out_matching(pattern)
    for index in range(hyper.layers, hyper.layers + hyper.further_layers):
        tensors.leave_out_layer(index)
    tensors.refuse_unused()
    return model


def _resolved(spec: ArchitectureSpec, gguf: ModelSource) -> ArchitectureSpec:
    """The architecture row, completed with the settings that it leaves to the file."""
    if spec.norm_by_key and gguf.get(f"{spec.name}.attention.layer_norm_rms_epsilon", float, 0.0):
        return replace(spec, norm="rms")
    return spec


def _embedding_norm(tensors: Tensors, spec: ArchitectureSpec, hyper: Hyperparameters) -> Norm | None:
    if spec.embedding_norm == "plain":
        return Norm(spec.norm, np.ones(hyper.width, np.float32))
    if spec.embedding_norm == "weights":
        return tensors.norm(spec, "token_embd_norm", hyper.width)
    return None


def _rope_factors(tensors: Tensors, spec: ArchitectureSpec, hyper: Hyperparameters) -> RopeFactors:
    if not spec.rope_factors or not hyper.rope_dim:
        tensors.leave_out("rope_freqs.weight")
        return RopeFactors()
    names = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
    every, long, short = (tensors.optional(name, hyper.rope_dim // 2) for name in names)
    if (long is None) != (short is None):
        raise ModelError(f"{tensors.gguf.path}: has one of {names[1]} and {names[2]}, expected both or none")
    widths = {facts.rope.dim for facts in hyper.facts if facts.rope is not None and facts.rope.factored}
    if spec.half_rope:  # their layers take the first ones
        widths -= {width for width in widths if width < hyper.rope_dim}
    if widths - {hyper.rope_dim} and any(factors is not None for factors in (every, long, short)):
        raise ModelError(
            f"{tensors.gguf.path}: divisors of {hyper.rope_dim} rotary dimensions do not fit layers that "
            f"have {min(widths - {hyper.rope_dim})}"
        )
    return RopeFactors(every, long, short)


def _split_view(gguf: ModelSource, spec: ArchitectureSpec, hyper: Hyperparameters) -> SplitFile | None:
    routing = hyper.routing
    each = tuple(facts.neurons if facts.ffn == "dense" else 0 for facts in hyper.facts)
    sizes = SplitSizes(hyper.layers, hyper.neurons, hyper.width, each=each if len(set(each)) > 1 else ())
    if routing is not None:
        dense = {index: facts.neurons for index, facts in enumerate(hyper.facts) if facts.ffn == "dense"}
        sizes = replace(
            sizes,
            experts=routing.experts,
            shared=routing.shared_neurons > 0,
            dense=frozenset(dense),
            dense_neurons=max(dense.values(), default=0),
            without=frozenset(index for index, facts in enumerate(hyper.facts) if facts.ffn == "none"),
            each=(),
        )
    if is_original(gguf):
        return read_original(gguf, sizes, activation=hyper.activation, gated=spec.gated)
    return SplitFile.read(gguf, sizes)


def _split(gguf: ModelSource, spec: ArchitectureSpec, hyper: Hyperparameters) -> SplitFile | None:
    split = _split_view(gguf, spec, hyper)
    if split and (split.gated if split.layers else split.header.expert_gate) != spec.gated:
        raise ModelError(
            f"{gguf.path}: has {'' if split.gated else 'no '}gate rows, "
            f"the architecture {spec.name} has {'some' if spec.gated else 'none'}"
        )
    for index, types in enumerate(split.header.types if split else ()):
        for row_type in types:
            if int(row_type) not in MATRIX_TYPES:
                raise ModelError(
                    f"{gguf.path}: FFN rows of layer {index} are of type {row_type.name}, not computable"
                )
    for layer in split.layers if split else ():
        if layer.columns is not None and int(layer.columns.row_type) not in MATRIX_TYPES:
            raise ModelError(
                f"{gguf.path}: the down projection of layer {layer.index} is of type "
                f"{layer.columns.row_type.name}, not computable"
            )
        for row_type in layer.predictor.types if layer.predictor else ():
            if int(row_type) not in MATRIX_TYPES:
                raise ModelError(
                    f"{gguf.path}: the predictor of layer {layer.index} is of type {row_type.name}, "
                    "not computable"
                )
    return split
