"""Where hardware profiles are kept, and which one a plan is for."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

from powerinfer_formats.hardware import HardwareProfile
from powerinfer_tools.errors import HardwareError
from powerinfer_tools.measure.hardware.presets import PC_LOW, PRESETS

PATH_VARIABLE = "POWERINFER_HARDWARE"
#: What to plan for, or whose accelerator to assume, where this machine gives no answer.
STAND_IN = PC_LOW


@dataclass(frozen=True)
class FoundHardware:
    """A profile, and what the user should know about the choice of it (empty: nothing)."""

    profile: HardwareProfile
    note: str = ""


def default_profile_path() -> Path:
    """$POWERINFER_HARDWARE, else hardware.toml in powerinfer's folder of $XDG_CONFIG_HOME (~/.config)."""
    named = os.environ.get(PATH_VARIABLE)
    if named:
        return Path(named)
    home = os.environ.get("XDG_CONFIG_HOME")
    return (Path(home) if home else Path.home() / ".config") / "powerinfer" / "hardware.toml"


def find_hardware(named: str | None, *, wants_gpu: bool = False) -> FoundHardware:
    """The hardware profile ``named`` (a file, or a preset's name); None: the stored one of this machine.

    Where nothing is stored, the stand-in's profile; where a stored profile has no GPU but the plan
    ``wants_gpu`` (VRAM was granted), that profile with the stand-in's GPU. The note says either. Raises
    HardwareError for a name that is neither, FormatError for a file that is no hardware profile.
    """
    if named is not None:
        return FoundHardware(_named(named))
    stored = default_profile_path()
    if os.environ.get(PATH_VARIABLE) and not stored.is_file():
        raise HardwareError(
            f"{PATH_VARIABLE} names {stored}, which is not a file; make it with powerinfer doctor --measure"
        )
    if not stored.is_file():
        return FoundHardware(
            STAND_IN,
            f"No hardware profile of this machine is stored, so this is for {STAND_IN.machine.name}; "
            "powerinfer doctor --measure makes one.",
        )
    profile = HardwareProfile.load(stored)
    if profile.gpu is None and wants_gpu:
        return _with_assumed_gpu(profile)
    return FoundHardware(profile)


def _named(named: str) -> HardwareProfile:
    if named.lower() in PRESETS:
        return PRESETS[named.lower()]
    path = Path(named)
    if not path.exists():
        raise HardwareError(
            f"{named}: no such hardware profile file, and no preset of that name; presets: "
            f"{', '.join(sorted(PRESETS))}"
        )
    return HardwareProfile.load(path)


def _with_assumed_gpu(profile: HardwareProfile) -> FoundHardware:
    assert STAND_IN.gpu is not None
    machine = replace(profile.machine, name=f"{profile.machine.name} with {STAND_IN.machine.name}'s GPU")
    return FoundHardware(
        replace(profile, machine=machine, gpu=STAND_IN.gpu, link=STAND_IN.link),
        f"This machine has no GPU; since VRAM was granted, {STAND_IN.machine.name}'s {STAND_IN.gpu.name} is "
        "assumed (name another machine with --hardware).",
    )
