"""The Hugging Face hub: which names are ids of its repositories, and its errors in one line."""

import contextlib
import json
import re
from collections.abc import Iterator

import huggingface_hub
import huggingface_hub.utils
from huggingface_hub import constants, errors

_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_LONGEST = 96  # characters of an id
_SNAPSHOT = re.compile(r"models--(?P<id>[^/\\]+)[/\\]snapshots[/\\](?P<commit>[0-9a-f]{40})")


def is_id(name: str) -> bool:
    """Return whether a name has the form of a hub id, USER/NAME or NAME; a file's name with a known suffix has not."""
    known = (".gguf", ".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".gz", ".safetensors")
    return len(name) <= _LONGEST and _ID.fullmatch(name) is not None and not name.lower().endswith(known)


def snapshot_of(path: str) -> tuple[str, str] | None:
    """Return (hub id, commit) of a path in the hub's cache; None for any other path."""
    found = _SNAPSHOT.search(path)
    return (found["id"].replace(constants.REPO_ID_SEPARATOR, "/"), found["commit"]) if found else None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the hub's client from logging its retries: the error that ends them is reported by itself."""
    logging = huggingface_hub.utils.logging
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def reason(error: BaseException) -> str:
    """Return an error of the hub's client in a few words, with what the user can do about it."""
    chain = [error]
    while (cause := chain[-1].__cause__) is not None and cause not in chain:
        chain.append(cause)
    for each in chain:
        known = _known_reason(each)
        if known:
            return known
    lines = dict.fromkeys(_first_line(each) for each in (error, chain[-1]))
    return ": ".join(lines)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _known_reason(error: BaseException) -> str | None:
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, and the hub's cache on this machine does not have it"
    if isinstance(error, errors.GatedRepoError):
        return "it is gated: accept its conditions on its page, and log in with `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the hub has no such revision of it"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the hub has no such repository, or a private one: check the spelling, or log in with `hf auth login`"
    if isinstance(error, errors.HfHubHTTPError):
        return _status_reason(error)
    if isinstance(error, json.JSONDecodeError):
        return f"{constants.ENDPOINT} answered something that is not JSON; is it a hub?"
    if isinstance(error, errors.HFValidationError):
        return "no valid name: expected USER/NAME of letters, digits and single . - _"
    if any(kind.__name__ == "TransportError" for kind in type(error).__mro__):  # of the HTTP library below the client
        return f"{constants.ENDPOINT} cannot be reached ({' '.join(str(error).split()) or type(error).__name__})"
    return None


def _status_reason(error: errors.HfHubHTTPError) -> str:
    status = error.response.status_code
    words = " ".join((error.server_message or error.response.reason_phrase or "").split())[:200]
    advice = {
        401: "the token is missing or not valid: log in with `hf auth login`",
        403: "the token may not do this: log in with another by `hf auth login`",
        429: "too many requests: try again later",
    }.get(status, "try again later" if status >= 500 else "")
    return f"the hub answered {status}{f' ({words})' if words else ''}" + (f"; {advice}" if advice else "")
