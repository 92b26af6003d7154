"""Errors of the hub's package in one sentence, with advice on what to do."""

from powerinfer_tools.errors import HubError

_MEANINGS = {
    401: "the token is not valid",
    403: "the token has no right to it",
    429: "too many requests; wait a while",
}


def hub_error(error: Exception, name: str, endpoint: str) -> HubError | None:
    """The meaning of an ``error`` in fetching the model ``name``; None for an error not about the hub."""
    from huggingface_hub import errors

    log_in = "set HF_TOKEN (or: hf auth login)"
    sentences = (
        (errors.OfflineModeIsEnabled, f"{name} is not in the cache, and HF_HUB_OFFLINE forbids the network"),
        (errors.GatedRepoError, f"{name} is gated: accept its terms at {endpoint}/{name}, and {log_in}"),
        (errors.DisabledRepoError, f"{name} has been disabled by the hub"),
        (
            errors.RepositoryNotFoundError,
            f"{endpoint} has no model {name}, or it is private: check the name, or {log_in}",
        ),
        ((errors.RevisionNotFoundError, errors.EntryNotFoundError), f"{name}: {first_line(error)}"),
        (errors.HfHubHTTPError, f"{endpoint} refuses {name}: {_answer(error)}"),
        (
            errors.HTTPError,  # type: ignore[attr-defined]  # what the transport below it raises
            f"{endpoint} cannot be reached ({first_line(error)}); what has been fetched is kept. "
            "Models that are here: powerinfer list",
        ),
        ((errors.HFValidationError, errors.FileMetadataError), f"{name}: {first_line(error)}"),
    )
    for kinds, sentence in sentences:
        if isinstance(error, kinds):
            return HubError(sentence)
    if isinstance(error, OSError) and error.errno is None:  # the transfer ended with a different size
        return HubError(f"{name}: the connection ended early; the same command continues from there")
    return None


def first_line(error: Exception) -> str:
    """The first line of the error's text that says something, else its kind."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if line), type(error).__name__)[:200]


def _answer(error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", 0)
    return f"status {status}, {_MEANINGS.get(status) or first_line(error)}"
