"""Errors that a user can cause, one class per kind. The message is one line that says what is wrong, where,
and what to do; the command line prints it without a traceback and exits with 1."""

import sys


def how_to_install(package: str) -> str:
    """The command that installs an optional package into this program's environment, whatever ``PATH`` says.

    powerinfer itself is named nowhere: it is published in no index.
    """
    return f"install it with: {sys.executable} -m pip install '{package}'"


class PowerInferError(Exception):
    """Base of every error of the stages and the engine that the user can do something about."""


class ModelError(PowerInferError):
    """The model file is readable, but cannot be run: unknown architecture, missing or odd
    hyper-parameters."""


class TokenizerError(PowerInferError):
    """The vocabulary in the model file is of a kind that is not supported, or is inconsistent."""


class ChatTemplateError(PowerInferError):
    """The chat template is missing, broken, or exceeds its limits."""


class RendererFailed(ChatTemplateError):
    """The process that renders chat templates did not start, or ended. Neither the template nor the
    conversation is at fault."""


class ContextFull(PowerInferError):
    """The tokens asked for do not fit in the context."""


class SamplingError(PowerInferError):
    """Sampling options out of range, or logits that cannot be sampled."""


class ProfileError(PowerInferError):
    """A profile cannot be made, read, or does not belong to the model."""


class TrainError(PowerInferError):
    """Predictors cannot be made from the available data."""


class ThresholdError(PowerInferError):
    """Thresholds cannot be chosen for this model, text or budget."""


class PlanError(PowerInferError):
    """No plan exists for the budgets, or the plan does not belong to the model."""


class HardwareError(PowerInferError):
    """The hardware profile is missing, or the requested device does not exist."""


class ConvertError(PowerInferError):
    """The model cannot be converted."""


class OtherProfile(ConvertError):
    """The plan was made from another profile."""


class EvaluationError(PowerInferError):
    """The evaluation asked for is impossible: no such task, or one that does not fit the model."""


class AddressError(PowerInferError):
    """The server cannot listen at the given address."""


class CorpusError(PowerInferError):
    """The corpus is missing, empty or unreadable."""


class ImportFailed(PowerInferError):
    """A file of another program cannot be imported."""


class HubError(PowerInferError):
    """A model of the hub cannot be fetched, found in the cache, or removed from it."""
