"""Checked access to the metadata of a family, which remembers what was read.

A key that nobody read either changes nothing, which :data:`CHANGES_NOTHING` says, or it is refused by name: a
model that opens means what its makers meant.
"""

import fnmatch
import math
from typing import Any, NoReturn

import numpy as np

from powerinfer_formats.model_source import ModelSource
from powerinfer_formats.string_array import StringArray
from powerinfer_tools.errors import ModelError

#: A key without default.
MISSING = object()

#: Keys below a family's prefix that change nothing in text generation as it is done here.
CHANGES_NOTHING = (
    "vocab_size",
    "tensor_data_layout",
    "rope.scaling.finetuned",
    "pooling_type",
    "classifier.output_labels",
    "vision.*",
    "clip.*",
    # Parameters of mechanisms that the families here have not: whoever uses one has its tensors or its main
    # key, too, and those are refused. One writer puts them into the files of every family.
    "activation.situ_beta",
    "attention.indexer.kpool_select_tail",
    "expert_group_scale",
    "kda.gate_lower_bound",
    "token_shift_count",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "rope.scaling.original_context_length",
)
#: Keys that change nothing with these values; with others they are refused.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.rope_pattern": (1, True),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.sliding_window": (0,),
    "attention.temperature_scale": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "deepstack_mapping": (-1,),
    "embedding_scale": (0.0, 1.0),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "expert_feed_forward_length": (0,),
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_shared_count": (0,),
    "expert_shared_feed_forward_length": (0,),
    "expert_weights_scale": (0.0, 1.0),
    "final_logit_softcapping": (0.0,),
    "leading_dense_block_count": (0,),
    "logit_scale": (0.0, 1.0),
    "moe_every_n_layers": (0, 1),
    "nextn_predict_layers": (0,),
    "parallel_residual": (False,),
    "use_parallel_residual": (False,),
    "residual_scale": (0.0, 1.0),
    "rope.dimension_sections": (0,),
    "rope.scale_linear": (0.0, 1.0),
    "rope.scaling.alpha": (0.0, 1.0),
    "rope.scaling.attn_factor": (0.0, 1.0),
    "rope.scaling.factor": (0.0, 1.0),
    "rope.scaling.type": ("none",),
    "rope.scaling.yarn_attn_factor": (0.0, 1.0),
    "rope.scaling.yarn_ext_factor": (0.0, -1.0),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "swiglu_clamp_exp": (0.0,),
    "swiglu_clamp_shexp": (0.0,),
}


class Keys:
    """The metadata below one architecture's prefix. All methods raise ModelError for values out of range, and
    FormatError for keys that are missing or of another type."""

    def __init__(self, gguf: ModelSource, prefix: str) -> None:
        self.gguf, self.prefix, self.file = gguf, prefix, str(gguf.path)
        #: Layers that the file counts, those for further tokens among them; 0 before that is read.
        self.blocks = 0
        self._read: set[str] = set()

    def integer(self, key: str, default: Any = MISSING, *, low: int = 1, high: int = 1 << 24) -> int:
        """An integer from ``low`` to ``high``; an array of equal ones, one for each layer, is that one."""
        value = self._one(key, self.raw(key), default, int)
        if not low <= value <= high:
            raise ModelError(f"{self.name(key)} is {value}; it must be from {low} to {high}")
        return int(value)

    def real(self, key: str, default: Any = MISSING, *, low: float = 0.0, high: float = 1e12) -> float:
        """A finite number from ``low`` to ``high``."""
        value = float(self._one(key, self.raw(key), default, float))
        if not (math.isfinite(value) and low <= value <= high):
            raise ModelError(f"{self.name(key)} is {value}; it must be from {low:g} to {high:g}")
        return value

    def factor(self, key: str) -> float:
        """A factor, 1 where it is missing or 0, which is how writers say that there is none."""
        return self.real(key, 0.0, low=-1e6, high=1e6) or 1.0

    def flag(self, key: str, *, default: bool) -> bool:
        """A truth value."""
        self._read.add(key)
        return bool(self.gguf.get(f"{self.prefix}.{key}", bool, default))

    def text(self, key: str, default: str) -> str:
        """A string."""
        self._read.add(key)
        return str(self.gguf.get(f"{self.prefix}.{key}", str, default))

    def integers(self, key: str, layers: int, default: Any = MISSING, *, low: int, high: int) -> list[int]:
        """An integer for each of ``layers`` layers, which may be given once for all."""
        value = self.raw(key)
        if not isinstance(value, np.ndarray):
            return [self.integer(key, default, low=low, high=high)] * layers
        if value.dtype.kind not in "iub" or len(value) not in (layers, self.blocks or layers):
            raise ModelError(
                f"{self.name(key)} has {len(value)} values, not an integer for each of {layers} layers"
            )
        value = value[:layers]
        for one in value.tolist():
            if not low <= one <= high:
                raise ModelError(f"{self.name(key)} holds {one}; it must be from {low} to {high}")
        return [int(one) for one in value]

    def reals(self, key: str, layers: int) -> list[float]:
        """A finite number for each of ``layers`` layers, which may be given once for all."""
        value = self.raw(key)
        if not isinstance(value, np.ndarray):
            return [self.real(key, low=-1e6, high=1e6)] * layers
        if value.dtype.kind != "f" or len(value) not in (layers, self.blocks or layers):
            raise ModelError(
                f"{self.name(key)} has {len(value)} values, not a number for each of {layers} layers"
            )
        if not np.isfinite(value).all():
            raise ModelError(f"{self.name(key)} holds values that are not finite")
        return [float(one) for one in value[:layers]]

    def raw(self, key: str) -> object:
        """The value as it is, None where it is missing."""
        self._read.add(key)
        return self.gguf.metadata.get(f"{self.prefix}.{key}")

    def refuse(self, why: str) -> NoReturn:
        """Raise ModelError."""
        raise ModelError(f"{self.file}: {why}")

    def ignore(self, *keys: str) -> None:
        """Count ``keys`` as read: they say nothing here."""
        self._read.update(keys)

    def name(self, key: str) -> str:
        """How errors begin that are about ``key``."""
        return f"{self.file}: {self.prefix}.{key}"

    def refuse_unread(self) -> None:
        """Raise ModelError for a key that nobody read and that may change what the model computes."""
        for full, value in self.gguf.metadata.items():
            key = full.removeprefix(f"{self.prefix}.")
            if key == full or key in self._read or _changes_nothing(key, value):
                continue
            raise ModelError(
                f"{self.file}: {full} is {_shown(value)}, which is not supported in models of the "
                f"architecture {self.prefix}"
            )

    def _one(self, key: str, value: object, default: Any, type_: type) -> Any:
        """``value`` of ``type_``; of an array, its elements must be the same."""
        if isinstance(value, np.ndarray) and len(value) and value.dtype.kind in "iuf":
            if (value != value[0]).any():
                raise ModelError(
                    f"{self.name(key)} differs between layers ({_shown(value)}), which is not supported in "
                    f"models of the architecture {self.prefix}"
                )
            return value[0].item()
        name = f"{self.prefix}.{key}"
        return self.gguf.get(name, type_) if default is MISSING else self.gguf.get(name, type_, default)


def _changes_nothing(key: str, value: object) -> bool:
    if any(fnmatch.fnmatchcase(key, pattern) for pattern in CHANGES_NOTHING):
        return True
    neutral = NEUTRAL.get(key)
    values = value.tolist() if isinstance(value, np.ndarray) else [value]
    return neutral is not None and all(one in neutral for one in values)


def _shown(value: object) -> str:
    if isinstance(value, StringArray):
        return "an array of strings"
    text = str(value.tolist()) if isinstance(value, np.ndarray) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
