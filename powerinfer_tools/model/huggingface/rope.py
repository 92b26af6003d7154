"""Rotary position settings of a config.json, in the old spelling and the new."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from powerinfer_tools.errors import ModelError
from powerinfer_tools.model.huggingface.config import Config

SUPPORTED = "default, linear, dynamic, llama3, yarn, longrope, proportional"
#: Divides the angles of pairs that are not turned.
_NEVER = 1e30


@dataclass(frozen=True)
class Yarn:
    """YaRN (arXiv 2309.00071), and what cosines and sines are times beside its own growth; with a
    ``log_multiplier``, scores of latent attention are times the square of 1 + that · ln(factor)."""

    factor: float
    original: int
    fast: float
    slow: float
    magnitude: float
    log_multiplier: float = 0.0

    @property
    def whole_magnitude(self) -> float:
        """What cosines and sines are times."""
        return self.magnitude * (0.1 * math.log(self.factor) + 1.0)


@dataclass(frozen=True)
class LongRope:
    """LongRoPE (arXiv 2402.13753): divisors, float32 [dim / 2], for contexts beyond ``original`` positions
    and up to them; cosines and sines are times ``magnitude``."""

    long: npt.NDArray[np.float32]
    short: npt.NDArray[np.float32]
    original: int
    magnitude: float


@dataclass(frozen=True)
class Rope:
    """``dim``: rotated values of a head. ``linear`` divides positions; ``factors``, float32 [dim / 2], divide
    single frequencies; cosines and sines are times ``magnitude``. Queries are times 1 + ``growth`` ·
    ln(1 + ⌊position / original context⌋)."""

    base: float
    dim: int
    linear: float = 1.0
    factors: npt.NDArray[np.float32] | None = None
    yarn: Yarn | None = None
    long: LongRope | None = None
    magnitude: float = 1.0
    growth: float = 0.0

    @property
    def scaled(self) -> bool:
        """Whether anything but the base differs from the plain rotary encoding."""
        return (
            self.linear != 1.0
            or self.magnitude != 1.0
            or any(x is not None for x in (self.factors, self.yarn, self.long))
        )

    @property
    def tables(self) -> dict[str, npt.NDArray[np.float32]]:
        """Divisors of frequencies, by the names of GGUF's tensors."""
        made = {} if self.factors is None else {"rope_freqs.weight": self.factors}
        if self.long is not None:
            made |= {f"rope_factors_{kind}.weight": getattr(self.long, kind) for kind in ("long", "short")}
        return made


def read_rope(config: Config, default_base: float, share: float, head_dim: int) -> tuple[Rope, Rope | None]:
    """The encoding of a model's layers, and that of its sliding layers where the file tells them apart.

    ``share``: the part of a head that is rotated, where the file does not say.

    The old spelling is ``rope_theta`` and ``rope_scaling`` (with ``rope_local_base_freq`` for sliding
    layers), the new one ``rope_parameters``, for each kind of layer where there are two. Where a file mixes
    them, ``rope_scaling`` goes before ``rope_parameters``, and what these lack is taken from beside them, as
    transformers does. Raises ModelError for a kind of scaling that is not supported.
    """
    new = config.section("rope_scaling")
    new = new if new.values else config.section("rope_parameters")
    dim = _rotated(config, new, share, head_dim)
    base = config.real("rope_theta", default_base, low=1.0, high=1e12)
    if new.has("full_attention") or new.has("sliding_attention"):
        local = config.real("rope_local_base_freq", 10000.0, low=1.0, high=1e12)
        sliding = _rope(config, new.section("sliding_attention"), local, dim)
        return _rope(config, new.section("full_attention"), base, dim), sliding
    wide = _rope(config, new, base, dim)
    if not config.has("rope_local_base_freq"):
        return wide, None
    return wide, Rope(config.real("rope_local_base_freq", low=1.0, high=1e12), dim)


def _rotated(config: Config, new: Config, share: float, head_dim: int) -> int:
    share = config.real("partial_rotary_factor", share, low=0.0, high=1.0)
    dim = int(head_dim * new.real("partial_rotary_factor", share, low=0.0, high=1.0))
    if dim < 2 or dim % 2:
        raise config.fail(
            "partial_rotary_factor", f"rotates {dim} of {head_dim} values, expected an even number"
        )
    return dim


def _rope(config: Config, section: Config, base: float, dim: int) -> Rope:
    base = section.real("rope_theta", base, low=1.0, high=1e12)
    kind = section.text("rope_type", section.text("type", "default"))
    if kind in ("default", "dynamic"):
        # Dynamic scaling begins beyond max_position_embeddings, where contexts end here.
        return Rope(base, dim)
    if kind == "linear":
        return Rope(base, dim, linear=section.real("factor", low=1e-6, high=1e6))
    if kind == "llama3":
        return Rope(base, dim, factors=_llama3_factors(config, section, base, dim))
    if kind == "proportional":
        kept = int(section.real("partial_rotary_factor", 1.0, low=0.0, high=1.0) * dim // 2)
        factor = section.real("factor", 1.0, low=1e-6, high=1e6)
        pairs = np.where(np.arange(dim // 2) < kept, factor, _NEVER)
        return Rope(base, dim, factors=pairs.astype(np.float32))
    if kind == "yarn":
        yarn, growth = _yarn(config, section), section.real("llama_4_scaling_beta", 0.0, low=0.0, high=1e3)
        if section.flag("truncate", True):
            return Rope(base, dim, yarn=yarn, growth=growth)
        factors = _untruncated(yarn, base, dim)
        return Rope(base, dim, factors=factors, magnitude=yarn.whole_magnitude, growth=growth)
    if kind == "longrope":
        return Rope(base, dim, long=_long_rope(config, section, dim))
    raise ModelError(
        f"{section.file}: rotary scaling {kind!r} ({section.path}rope_type) is not supported "
        f"(supported: {SUPPORTED})"
    )


def _yarn(config: Config, section: Config) -> Yarn:
    """Where the file names an attention factor, or two scales whose growths are divided, that is what cosines
    and sines are times, in place of 0.1 ln(factor) + 1."""
    factor = section.real("factor", low=1.0, high=1e6)
    growth = own = 0.1 * math.log(factor) + 1.0
    if section.has("attention_factor"):
        own = section.real("attention_factor", low=1e-6, high=1e6)
    elif section.has("mscale") and section.has("mscale_all_dim"):
        upper, lower = (section.real(name, low=0.0, high=1e3) for name in ("mscale", "mscale_all_dim"))
        own = (0.1 * upper * math.log(factor) + 1.0) / (0.1 * lower * math.log(factor) + 1.0)
    return Yarn(
        factor,
        _original_context(config, section),
        section.real("beta_fast", 32.0, low=1e-3, high=1e6),
        section.real("beta_slow", 1.0, low=1e-3, high=1e6),
        own / growth,
        0.1 * section.real("mscale_all_dim", 0.0, low=0.0, high=1e3),
    )


def _untruncated(yarn: Yarn, base: float, dim: int) -> npt.NDArray[np.float32]:
    """What YaRN divides each frequency by where the ends of its ramp are no whole pairs (gpt-oss).

    With d the pairs, the pair that turns r times in the original context is d · ln(context / (2π r)) /
    ln(base); frequencies are interpolated beyond that of ``slow``, kept before that of ``fast``.
    """
    ends = [
        dim * math.log(yarn.original / (turns * 2 * math.pi)) / (2 * math.log(base))
        for turns in (yarn.fast, yarn.slow)
    ]
    low, high = max(ends[0], 0.0), min(ends[1], dim - 1.0)
    ramp = (np.arange(dim // 2) - low) / max(high - low, 1e-3)
    interpolated = np.clip(ramp, 0.0, 1.0)
    return np.asarray(1.0 / (interpolated / yarn.factor + 1.0 - interpolated), dtype=np.float32)


def _long_rope(config: Config, section: Config, dim: int) -> LongRope:
    original = _original_context(config, section)
    grown = config.integer("max_position_embeddings", original, high=1 << 31) / original
    factor = section.real("factor", grown, low=0.0, high=1e6)
    usual = math.sqrt(1.0 + math.log(factor) / math.log(original)) if factor > 1.0 else 1.0
    long, short = (_divisors(section, f"{kind}_factor", dim) for kind in ("long", "short"))
    return LongRope(long, short, original, section.real("attention_factor", usual, low=1e-6, high=1e6))


def _divisors(section: Config, name: str, dim: int) -> npt.NDArray[np.float32]:
    values = section.items(name)
    numbers = all(type(value) in (int, float) and 1e-6 <= value <= 1e6 for value in values)
    if len(values) != dim // 2 or not numbers:
        raise section.fail(name, f"is no list of {dim // 2} numbers above 0")
    return np.array(values, np.float32)


def _original_context(config: Config, section: Config) -> int:
    """The context before scaling: as config.json says at its top, else in the section, else the whole one."""
    name = "original_max_position_embeddings"
    for place, key in ((config, name), (section, name), (config, "max_position_embeddings")):
        if place.has(key):
            return place.integer(key, high=1 << 31)
    raise section.fail(name, "is missing")


def _llama3_factors(config: Config, section: Config, base: float, dim: int) -> npt.NDArray[np.float32]:
    """What each frequency is divided by: 1 for short waves, ``factor`` for long ones, smooth in between.

    Source: the reference code of Llama 3.1 (``apply_scaling``). With w the wavelength, c the original context
    and s = (c/w − low)/(high − low), a frequency f becomes (1 − s)·f/factor + s·f for c/high ≤ w ≤ c/low.
    """
    factor = section.real("factor", low=1e-6, high=1e6)
    low = section.real("low_freq_factor", low=1e-6, high=1e6)
    high = section.real("high_freq_factor", low=1e-6, high=1e6)
    context = _original_context(config, section)
    if high <= low:
        raise section.fail("high_freq_factor", f"is {high:g}, expected more than low_freq_factor {low:g}")
    frequencies = base ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
    turns = context * frequencies / (2 * math.pi)  # c / w
    share = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return np.asarray(1.0 / ((1.0 - share) / factor + share), dtype=np.float32)
