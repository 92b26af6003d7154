"""What tests of several folders share."""

import os
from pathlib import Path

import pytest

# Read when kernels are defined, so it stands before anything imports them: no test needs a GPU.
os.environ["TRITON_INTERPRET"] = "1"

ROOT = Path(__file__).resolve().parents[1]
DEMO_MODEL = "models/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def repository_root() -> Path:
    """The folder with pyproject.toml."""
    return ROOT


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The demo model: ``$POWERINFER_MODEL``, else what ``make model`` fetches. Its absence is a failure."""
    path = Path(os.environ.get("POWERINFER_MODEL") or ROOT / DEMO_MODEL)
    if not path.is_file():
        pytest.fail(f"{path} is not there; fetch it with: make model", pytrace=False)
    return path
