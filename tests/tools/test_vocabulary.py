"""Every implementer of the vocabulary has every operation, by the same names: what a new one takes."""

import inspect

import pytest

from powerinfer_tools.engine.hot.hot_operations import HotOperations
from powerinfer_tools.engine.program_operations import ProgramOperations
from powerinfer_tools.errors import ModelError
from powerinfer_tools.model.counting import CountingOperations
from powerinfer_tools.model.operations import Operations
from powerinfer_tools.model.reference import NumpyOperations
from powerinfer_tools.stages.relufy.torch_operations import TorchOperations

OPERATIONS = [name for name in vars(Operations) if not name.startswith("_")]
IMPLEMENTERS = (ProgramOperations, NumpyOperations, HotOperations, TorchOperations, CountingOperations)


@pytest.mark.parametrize("implementer", IMPLEMENTERS)
def test_all_operations_are_there(implementer: type) -> None:
    assert len(OPERATIONS) > 25
    for name in OPERATIONS:
        wanted = list(inspect.signature(getattr(Operations, name)).parameters)
        assert list(inspect.signature(getattr(implementer, name)).parameters) == wanted


@pytest.mark.parametrize("implementer", IMPLEMENTERS)
def test_what_an_implementer_does_not_have_it_refuses_by_name(implementer: type) -> None:
    """Not with an error that means nothing to a user."""
    for name in OPERATIONS:
        method = getattr(implementer, name)
        if method.__module__ != "powerinfer_tools.model.refused_operations":
            continue
        ops = implementer.__new__(implementer)
        arguments = list(inspect.signature(method).parameters.values())[1:]
        named = {p.name: None for p in arguments if p.kind is p.KEYWORD_ONLY}
        with pytest.raises(ModelError, match=f"{implementer.place} does not compute .*run, eval and bench"):  # type: ignore[attr-defined]
            method(ops, *[None for p in arguments if p.kind is not p.KEYWORD_ONLY], **named)
