"""Where hardware profiles are kept, and which one a plan is for."""

import os
from dataclasses import dataclass
from pathlib import Path

from powerinfer_formats.hardware import HardwareProfile
from powerinfer_kernels import Pool
from powerinfer_tools import detect
from powerinfer_tools.errors import HardwareError
from powerinfer_tools.measure.hardware.presets import PRESETS

PATH_VARIABLE = "POWERINFER_HARDWARE"
#: Seconds that are spent on measuring a machine without a stored profile.
QUICK_SECONDS = 1.0


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

    Where nothing is stored, this machine is measured for a second, which the note says. Raises HardwareError
    for a name that is neither, and where VRAM was granted (``wants_gpu``) to a machine that has no
    accelerator; FormatError for a file that is no hardware profile.
    """
    if named is not None:
        return FoundHardware(_with_gpu(_named(named), wants_gpu=wants_gpu))
    stored = default_profile_path()
    if os.environ.get(PATH_VARIABLE) and not stored.is_file():
        raise HardwareError(
            f"{PATH_VARIABLE} names {stored}, which is not a file; make it with powerinfer doctor --measure"
        )
    if not stored.is_file():
        return FoundHardware(
            _with_gpu(_measured_quickly(), wants_gpu=wants_gpu),
            "This machine was measured for a second; powerinfer doctor --measure takes longer and stores its "
            "result" + (", with its accelerator." if detect.nvidia_driver() else "."),
        )
    return FoundHardware(_with_gpu(HardwareProfile.load(stored), wants_gpu=wants_gpu))


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


def _measured_quickly() -> HardwareProfile:
    from powerinfer_tools.measure.hardware.measure import measure

    with Pool() as pool:
        return measure(pool, QUICK_SECONDS, shapes=()).profile


def _with_gpu(profile: HardwareProfile, *, wants_gpu: bool) -> HardwareProfile:
    if profile.gpu is None and wants_gpu:
        raise HardwareError(
            f"{profile.machine.name} has no accelerator that VRAM could be granted on; leave --vram out to "
            f"plan for the CPU, or name another machine with --hardware ({', '.join(sorted(PRESETS))}, or a "
            "file)"
        )
    return profile
