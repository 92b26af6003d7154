"""Random families with a profile of a few tokens."""

from pathlib import Path

from hybrid_families import FAMILIES, write_random_family
from powerinfer_formats.profile import ROUTING, Corpus, Profile
from powerinfer_tools.engine import Engine
from powerinfer_tools.model.loading import Model, load_model
from powerinfer_tools.stages.profile.tally import Tally

TOKENS = [3, 41, 7, 7, 12, 0, 49, 25, 30, 2, 18, 5, 44, 9, 33, 21, 6, 1, 28]


def profile_of(model: Model) -> Profile:
    """A profile of one window."""
    tally = Tally(model, 1)
    engine = Engine(model, threads=1, context=len(TOKENS), batch=len(TOKENS), observed=tally.observed)
    engine.absorb(TOKENS)
    engine.close()
    tally.close_window(0, len(TOKENS))
    routed = model.hyper.routing is not None
    return Profile(
        fingerprint=model.fingerprint,
        model_name=model.name,
        architecture=model.spec.name,
        activation=ROUTING if routed else model.hyper.activation,
        exact_zeros=routed or model.exact_zeros,
        tokens=len(TOKENS),
        window=len(TOKENS),
        target_density=0.2,
        corpus=(Corpus("text.txt", "0" * 64, len(TOKENS), 100),),
        tool_version="test",
        sums=tally.sums(),
    )


def made(folder: Path, case: str, activation: str | None = None) -> tuple[Path, Path, Profile]:
    """A model, and its profile, whose file is read back."""
    path, saved = folder / "model.gguf", folder / "profile.safetensors"
    model = load_model(write_random_family(path, FAMILIES[case], activation=activation))
    profile_of(model).save(saved)
    return path, saved, Profile.load(saved)
