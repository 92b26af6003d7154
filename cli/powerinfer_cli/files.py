"""Which file a command takes when none is named: beside the model, by the stages' naming."""

import os
from collections.abc import Mapping
from pathlib import Path

import typer

from powerinfer_cli.console import progress, say
from powerinfer_cli.options import ModelChoice
from powerinfer_formats.shard_names import model_name, shard_files
from powerinfer_tools.errors import ModelError, PowerInferError

DEMO_MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_VARIABLE = "POWERINFER_MODEL"
PROFILE_SUFFIX = ".profile.safetensors"
TRACE_SUFFIX = ".trace.zst"
PREDICTORS_SUFFIX = ".predictors.safetensors"
THRESHOLDS_SUFFIX = ".thresholds.safetensors"
PLAN_SUFFIX = ".plan.json"
SPLIT_SUFFIX = ".powerinfer.gguf"


class InputMissing(PowerInferError):
    """A stage's input is not there; the message says which command makes it."""


def demo_model_places(environment: Mapping[str, str]) -> list[Path]:
    """Where the demo model is looked for: ``models/`` here, then the user's data folder."""
    data = environment.get("XDG_DATA_HOME") or str(Path(environment.get("HOME", "~")) / ".local/share")
    return [Path("models") / DEMO_MODEL, Path(data) / "powerinfer" / DEMO_MODEL]


def find_model(choice: Path | ModelChoice | None) -> Path:
    """The model to use: the one named, here or in the hub, else ``$POWERINFER_MODEL``, else the demo model.

    Raises ModelError, and HubError for a model of the hub, which is fetched where it is not in the cache.
    """
    if isinstance(choice, ModelChoice) and choice.hf is not None:
        if choice.model is not None:
            raise typer.BadParameter("choose one of -m and -hf", param_hint="-hf")
        return _hub_model(choice.hf)
    named = choice.model if isinstance(choice, ModelChoice) else choice
    if named is not None:
        return _existing_model(named, "")
    variable = os.environ.get(MODEL_VARIABLE)
    if variable:
        return _existing_model(Path(variable), f" (named by ${MODEL_VARIABLE})")
    places = demo_model_places(os.environ)
    for place in places:
        if place.is_file():
            return place
    raise ModelError(
        f"no model: name one with -m FILE or ${MODEL_VARIABLE}; "
        f"the demo model is not in {' or '.join(str(place.parent) for place in places)} either"
    )


def _hub_model(text: str) -> Path:
    from powerinfer_tools.hub.cached import find_cached
    from powerinfer_tools.hub.reference import Reference

    reference = Reference.parse(text)
    path = find_cached(reference)
    if path is None:
        from powerinfer_tools.hub.pulling import pull

        path = pull(reference, progress()).path
    say(f"using {path}")
    return path


def _existing_model(path: Path, origin: str) -> Path:
    if not path.exists():
        raise ModelError(f"{path}{origin}: no such file")
    return path.resolve() if path.name in ("", "..") else path  # a directory needs a name to write beside


def beside(model: Path, suffix: str) -> Path:
    """The stage's file of ``model``: NAME + suffix, where NAME is the model's file name without ``.gguf``.

    A split file's stages are those of its source: ``NAME.powerinfer.gguf`` has NAME, too; so has any shard
    (``NAME-00001-of-00003.gguf``). The files of a directory stand beside it, not in it: NAME is the
    directory's.
    """
    name = model_name(model.name)
    for ending in (SPLIT_SUFFIX, ".gguf"):
        if name.lower().endswith(ending) and len(name) > len(ending):
            name = name[: -len(ending)]
            break
    return model.with_name(name + suffix)


def stage_input(named: Path | None, model: Path, suffix: str, *, made_by: str) -> Path:
    """A previous stage's file: the one named, else the one beside the model, which is then said.

    Raises InputMissing with the command that makes it.
    """
    path = named or beside(model, suffix)
    if not path.is_file():
        raise InputMissing(f"{path}: no such file; make it with: powerinfer {made_by} -m {model}")
    if named is None:
        say(f"using {path}")
    return path


def optional_input(named: Path | None, model: Path, suffix: str, *, made_by: str) -> Path | None:
    """As :func:`stage_input`, but None where no file is named and there is none beside the model."""
    if named is None and not beside(model, suffix).is_file():
        return None
    return stage_input(named, model, suffix, made_by=made_by)


def output_file(named: Path | None, model: Path, suffix: str) -> Path:
    """Where a stage writes: as named, else beside the model. Raises InputMissing without the folder."""
    path = named or beside(model, suffix)
    if not path.parent.is_dir():
        raise InputMissing(f"{path.parent}: no such folder to write {path.name} to")
    if path.exists() and any(file.exists() and path.samefile(file) for file in shard_files(model)):
        raise PowerInferError(f"{path} is the model itself; choose another file to write (-o)")
    return path
