"""Keys of FFNs: activation, neurons, experts and their routing."""

import math
from typing import Literal

from powerinfer_formats.model_source import ModelSource
from powerinfer_tools.errors import ModelError
from powerinfer_tools.model.architectures import ACTIVATIONS, ArchitectureSpec
from powerinfer_tools.model.hyperparameter_types import Routing
from powerinfer_tools.model.keys import Keys
from powerinfer_tools.model.mixer_keys import read_dense_neurons
from powerinfer_tools.model.original import is_original, original_activation

#: What files say about experts.
_EXPERT_KEYS = (
    "expert_used_count",
    "expert_feed_forward_length",
    "expert_shared_count",
    "expert_shared_feed_forward_length",
    "expert_gating_func",
    "expert_weights_norm",
    "expert_weights_scale",
    "expert_group_count",
    "expert_group_used_count",
)
#: Limits up to here are none.
_LEAST_LIMIT = 1e-6


def read_routing(keys: Keys, spec: ArchitectureSpec, width: int) -> Routing | None:
    """How experts are chosen; None in a family without them. Raises ModelError."""
    experts = keys.integer("expert_count", 0, low=0, high=4096)
    if experts and not any(name.endswith(".ffn_gate_inp.weight") for name in keys.gguf.tensors):
        experts = 0  # no layer has a router, so nothing is said about any
        keys.ignore(*_EXPERT_KEYS)
    if not experts:
        keys.ignore("router_logit_softcapping", "leading_dense_block_count")
        return None
    if not spec.routed:
        raise ModelError(
            f"{keys.file}: mixtures of experts of the architecture {spec.name} are not supported"
        )
    groups = keys.integer("expert_group_count", 1, low=0, high=experts) or 1
    groups_used = keys.integer("expert_group_used_count", groups, low=0, high=groups) or groups
    used = keys.integer("expert_used_count", high=experts)
    if experts % groups or experts // groups * groups_used < used:
        raise ModelError(
            f"{keys.file}: {used} experts cannot be chosen in {groups_used} of {groups} groups of {experts}"
        )
    return Routing(
        experts=experts,
        used=used,
        normalized=keys.flag("expert_weights_norm", default=spec.expert_weights_norm),
        shared_neurons=_shared_neurons(keys, spec, width),
        kind=_router_kind(keys, spec),
        scale=keys.factor("expert_weights_scale"),
        groups=groups,
        groups_used=groups_used,
        weigh_input=spec.weigh_input,
    )


def _shared_neurons(keys: Keys, spec: ArchitectureSpec, width: int) -> int:
    """The neurons of the expert that every token takes. Files give this number, or the number of routed
    experts of the same total size, or the expert is a dense FFN beside the routed experts."""
    if spec.dense_beside == "square":
        return width
    if spec.dense_beside == "optional":
        has_dense = "blk.0.ffn_up.weight" in keys.gguf.tensors
        return keys.integer("feed_forward_length", high=1 << 22) if has_dense else 0
    if not spec.shared_expert:
        return 0
    count = keys.integer("expert_shared_count", spec.default_shared_count, low=0, high=1 << 10)
    neurons = keys.integer("expert_shared_feed_forward_length", 0, low=0, high=1 << 22)
    if neurons or not count:
        return neurons
    return count * keys.integer("expert_feed_forward_length", high=1 << 22)


def _router_kind(keys: Keys, spec: ArchitectureSpec) -> Literal["softmax", "sigmoid"]:
    """llama.cpp's numbers; 0 and a missing one mean softmax, and 3 the softmax over the chosen experts."""
    if spec.router == "softmax" or spec.router == "sigmoid":
        keys.ignore("expert_gating_func")
        return spec.router
    number = keys.integer("expert_gating_func", 0, low=0, high=4)
    if number > 2:
        raise ModelError(f"{keys.name('expert_gating_func')} is {number}, which is not supported")
    return "sigmoid" if number == 2 or (number == 0 and spec.router != "file") else "softmax"


def read_neurons(keys: Keys, spec: ArchitectureSpec, routing: Routing | None, layers: int) -> int:
    """The neurons of an FFN, or of an expert. Mixtral's files store the size of an expert under the key for
    the size of an FFN."""
    if spec.recurrent_layers == "all" and spec.single_blocks:
        keys.ignore("feed_forward_length")
        return 1  # of no FFN at all
    if routing is not None:
        neurons = keys.integer("expert_feed_forward_length", 0, low=0, high=1 << 22)
        if neurons:
            keys.raw("feed_forward_length")  # the size of dense layers, but there are none
            return neurons
    neurons = max(read_dense_neurons(keys, layers)) // spec.neurons_divisor
    return neurons or keys.refuse("feed_forward_length is 0")


def read_activation(gguf: ModelSource, spec: ArchitectureSpec) -> str:
    """The activation function of FFNs, by name. Raises ModelError for one that is not computed."""
    if is_original(gguf):
        return original_activation(spec.name, gguf.path)
    activation = str(gguf.get("powerinfer.activation", str, spec.activation))
    if activation not in ACTIVATIONS or (activation == "xielu" and spec.activation != "xielu"):
        supported = ", ".join(sorted(ACTIVATIONS))
        raise ModelError(f"{gguf.path}: powerinfer.activation {activation!r} is unknown (known: {supported})")
    return activation


def read_xielu(keys: Keys, layers: int) -> tuple[tuple[float, float, float, float], ...]:
    """The constants of each layer: files store the inputs of the softplus that makes them positive."""
    positive, negative, beta, eps = (
        keys.reals(f"xielu.{name}", layers) for name in ("alpha_p", "alpha_n", "beta", "eps")
    )
    rows = zip(positive, negative, beta, eps, strict=True)
    return tuple((_softplus(p), b + _softplus(n), b, e) for p, n, b, e in rows)


def read_limits(keys: Keys, spec: ArchitectureSpec, layers: int) -> list[tuple[float, float]]:
    """What gates of routed experts, and of other FFNs, are limited to, layer by layer; 0 where they are not.
    Raises ModelError."""
    if not spec.clamp:
        return [(0.0, 0.0)] * layers
    parts = []
    for part in ("exp", "shexp"):
        key = f"swiglu_clamp_{part}"
        values = [0.0] * layers if keys.raw(key) is None else keys.reals(key, layers)
        if any(value < 0 for value in values):
            keys.refuse(f"{key} holds a limit below 0")
        parts.append([value if value > _LEAST_LIMIT else 0.0 for value in values])
    return list(zip(*parts, strict=True))


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def read_activation_cut(gguf: ModelSource, activation: str) -> float:
    """The constant of an activation function, such as a cut; 0 without one. Raises ModelError."""
    if activation == "swiglu_oai":
        return 7.0
    if activation != "fatrelu":
        return 0.0
    cut = gguf.get("powerinfer.activation_threshold", float)
    if not (math.isfinite(cut) and 0 <= cut < 1e6):
        raise ModelError(f"{gguf.path}: powerinfer.activation_threshold is {cut}; it must be from 0 to 1e6")
    return float(cut)
