"""Hardware profiles: the description of a machine, its measured speeds, and the place where they are kept."""

from powerinfer_tools.measure.hardware.diagnosis import Diagnosis, describe_machine, diagnose
from powerinfer_tools.measure.hardware.presets import PRESETS
from powerinfer_tools.measure.hardware.store import default_profile_path, find_hardware

__all__ = ["PRESETS", "Diagnosis", "default_profile_path", "describe_machine", "diagnose", "find_hardware"]
