"""Uploading a folder to the Hugging Face hub, in one commit."""

from pathlib import Path
from typing import NamedTuple

import huggingface_hub
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, errors

import neuroada_jax
from neuroada_jax.adapters import hub as adapter_hub
from neuroada_jax.errors import UserError
from neuroada_jax.pretrained import hub
from neuroada_jax.sharing.origin import CARD, CURVE, RESULTS

CommitOperation = CommitOperationAdd | CommitOperationCopy | CommitOperationDelete
# Files of another kind, beside which an adapter would make a repository of two models.
_ALLOWED = {*adapter_hub.FILES, CARD, RESULTS, CURVE, ".gitattributes", ".gitignore", "LICENSE"}
_REPLACED = (RESULTS, CURVE)  # those of an earlier adapter would contradict the new one's card


class Uploaded(NamedTuple):
    """A finished upload.

    Attributes:
      url: of the repository.
      commit: id of the commit.
      created: whether the repository is new.
      private: whether it is private.
    """

    url: str
    commit: str
    created: bool
    private: bool


def check_name(repository: str) -> None:
    """Raise UserError unless a repository's name has the form USER/NAME."""
    try:
        huggingface_hub.utils.validate_repo_id(repository)
    except errors.HFValidationError as error:
        raise UserError(f"{repository!r}: {hub.reason(error)}") from error
    if "/" not in repository:
        raise UserError(f"{repository!r}: expected USER/NAME, with the user or organisation whose repository it is")


def upload(folder: Path, repository: str, *, public: bool, message: str) -> Uploaded:
    """Upload every file of a folder, in one commit; create the repository if there is none.

    Args:
      folder: as `folder.write` made it.
      repository: hub id.
      public: create a public repository rather than a private one, or allow an existing one to be public.
      message: of the commit.

    Raises:
      UserError: not logged in, a repository that holds something else or is public without `public`, or any error of the
        hub; then no commit was made.
    """
    if huggingface_hub.is_offline_mode():
        raise UserError("HF_HUB_OFFLINE is set, so that nothing can be uploaded; --dry-run writes the folder alone")
    if huggingface_hub.get_token() is None:
        raise UserError("no token of the hub on this machine: log in with `hf auth login`, or set HF_TOKEN")
    api = huggingface_hub.HfApi(library_name="neuroada-jax", library_version=neuroada_jax.__version__)
    created = False
    try:
        with hub.quiet():
            created = _create(api, repository, public)
            existing = api.model_info(repository)
            present = {each.rfilename for each in existing.siblings or []}
            if not created:
                _check_existing(repository, present, bool(existing.private), public)
            names = [path.name for path in sorted(folder.iterdir())]
            operations: list[CommitOperation] = [
                *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(folder / name)) for name in names),
                *(CommitOperationDelete(path_in_repo=name) for name in _REPLACED if name in present and name not in names),
            ]
            commit = api.create_commit(repository, operations, commit_message=message)
    except UserError:
        raise
    except Exception as error:  # a dozen types: no permission, no connection, errors of the server
        made = "; the repository was created and is empty" if created else ""
        raise UserError(f"{repository}: nothing was uploaded: {hub.reason(error)}{made}") from error
    return Uploaded(f"{api.endpoint}/{repository}", commit.oid, created, bool(existing.private))


def _create(api: huggingface_hub.HfApi, repository: str, public: bool) -> bool:
    """Create the repository and return True, or False where it exists."""
    try:
        api.create_repo(repository, private=not public)
    except errors.HfHubHTTPError as error:
        if error.response.status_code != 409:
            raise
        return False
    return True


def _check_existing(repository: str, present: set[str], private: bool, public: bool) -> None:
    others = sorted(present - _ALLOWED)
    if others and adapter_hub.FILES[0] not in present:
        raise UserError(f"{repository} exists and holds something else ({others[0]}); choose another name")
    if not private and not public:
        raise UserError(f"{repository} exists and is public; give --public if the adapter may be public, or another name")
