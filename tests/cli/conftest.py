"""Fixtures of the command line's tests."""

import pytest

from processes import Command, run_command


@pytest.fixture(scope="session")
def powerinfer() -> Command:
    """Runs the command line in a process of its own."""
    return run_command
