"""The samplers of a chain by name, in llama.cpp's words and in any order."""

from collections.abc import Sequence

from powerinfer_tools.errors import SamplingError

#: The samplers that are applied by default.
DEFAULT_SAMPLERS = ("penalties", "top_k", "typ_p", "top_p", "min_p", "temperature")
#: Samplers of llama.cpp that do nothing unless their own options, which do not exist here, turn them on.
_OFF = ("dry", "top_n_sigma", "xtc")
_LETTERS = {
    "e": "penalties", "k": "top_k", "y": "typ_p", "p": "top_p", "m": "min_p", "t": "temperature",
    "d": "dry", "s": "top_n_sigma", "x": "xtc",
}  # fmt: skip
_MORE = {"nucleus": "top_p", "temp": "temperature", "typ": "typ_p"}


def _spellings() -> dict[str, str]:
    names = {name: name for name in (*DEFAULT_SAMPLERS, *_OFF)}
    joints = ("-", "")
    return {name.replace("_", joint): name for joint in joints for name in names} | names | _MORE


_SPELLINGS = _spellings()


def sampler_chain(names: Sequence[str]) -> tuple[str, ...]:
    """``names`` in this program's spelling, without samplers that would do nothing. Raises SamplingError for
    an unknown name."""
    chain = []
    for name in names:
        canonical = _SPELLINGS.get(name.strip().lower())
        if canonical is None:
            raise SamplingError(f"samplers names {name!r}; known are {', '.join((*DEFAULT_SAMPLERS, *_OFF))}")
        chain.append(canonical)
    return tuple(name for name in chain if name not in _OFF)


def chain_of_letters(letters: str) -> tuple[str, ...]:
    """The same from a letter for each sampler. Raises SamplingError."""
    unknown = [letter for letter in letters if letter not in _LETTERS]
    if unknown:
        raise SamplingError(f"samplers has the letter {unknown[0]!r}; known are {', '.join(_LETTERS)}")
    return sampler_chain([_LETTERS[letter] for letter in letters])
