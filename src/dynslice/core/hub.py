"""The Hugging Face hub: what it gives, at which commit, and why not, in words for an error.

Nothing that the hub's client says is quoted: it may hold addresses with credentials.
"""

from functools import cache
from pathlib import Path

import huggingface_hub as client  # its parts are imported when they are used

from dynslice.core.errors import RequestError

_MODEL = {
    "gated": "is gated on the hub: accept its licence there and log in with `hf auth login` (or "
    "set HF_TOKEN)",
    "no revision": "has no revision {revision!r} on the hub: name a branch, tag or commit of it",
    "no access": "is no model of the hub that this account can see: check the name, and for a "
    "private one log in with `hf auth login`",
    "away": "could not be had from the hub: connect to the network, or give the directory of a "
    "downloaded model",
}

_NO_ACCESS = (
    "{what}: the hub gives no access to dataset {repository}; accept its terms there and run `hf "
    "auth login`, or {instead}"
)
_DATASET = {
    "no revision": "{what}: dataset {repository} has no revision {revision!r} on the hub; name a "
    "branch, tag or commit of it, or leave the revision out",
    "gated": _NO_ACCESS,
    "no access": _NO_ACCESS,
    "no files": "{what}: dataset {repository} has no files {files} at revision {revision!r}; name "
    "another revision, or {instead}",
    "away": "{what} is dataset {repository} of the Hugging Face hub, which could not be reached; "
    "connect to the network, or {instead}",
}


@cache
def model_refusal(name: str, revision: str | None = None) -> str | None:
    """Why the hub does not give a model now, in words for an error; None where it does."""
    try:
        client.HfApi().auth_check(name)
        client.HfApi().model_info(name, revision=revision, expand=["sha"])
    except Exception as error:
        return _MODEL[_meaning(error)].format(revision=revision)
    return None


def dataset_refusal(what: str, *asked: str | None) -> str | None:
    """What `fetch` would say now, asked without downloading; None where it would download."""
    try:
        fetch(what, *asked, download=False)
    except RequestError as error:
        return str(error)
    return None


def fetch(
    what: str,
    repository: str,
    files: str,
    revision: str | None,
    instead: str = "give a local file or directory in its place",
    download: bool = True,
) -> list[Path]:
    """The data files of a hub repository that match a pattern, in name order, downloaded once.

    what, instead: for whom, and what else one can do, in the words of an error. download: False
    only looks into the cache where the hub does not answer. Raises RequestError when the hub cannot
    be reached, refuses, or has no such revision or file.
    """
    from huggingface_hub.errors import EntryNotFoundError

    try:
        away = is_away(repository, revision)
        if not (away or download):
            return []
        where = {"repo_type": "dataset", "revision": revision, "local_files_only": away}
        if "*" not in files:  # without listing the repository: C4 has very many files
            return [Path(client.hf_hub_download(repository, files, **where))]
        folder = Path(client.snapshot_download(repository, allow_patterns=[files], **where))
        if found := sorted(folder.glob(files)):
            return found
        raise EntryNotFoundError(files)
    except Exception as error:
        asked = {"repository": repository, "files": files, "revision": revision or "main"}
        sentence = _DATASET[_meaning(error)].format(what=what, instead=instead, **asked)
        raise RequestError(sentence) from error


def is_away(repository: str, revision: str | None) -> bool:
    """Whether the hub does not answer; asked because a download would try for half a minute."""
    try:
        client.HfApi().dataset_info(repository, revision=revision, expand=["sha"])
    except Exception as error:
        if _meaning(error) != "away":
            raise
        return True
    return False


def _meaning(error: Exception) -> str:
    """Which refusal an error of the hub's client is; of the network it has a dozen types."""
    from huggingface_hub import errors

    known = {
        errors.LocalEntryNotFoundError: "away",
        errors.RevisionNotFoundError: "no revision",
        errors.EntryNotFoundError: "no files",
        errors.GatedRepoError: "gated",
        errors.HFValidationError: "no access",
    }
    for kind, meaning in known.items():
        if isinstance(error, kind):
            return meaning
    status = getattr(getattr(error, "response", None), "status_code", None)
    return "no access" if status in (401, 403, 404) else "away"


def commit_of(repository: str, revision: str | None = None, kind: str = "model") -> str | None:
    """The commit of a model's or dataset's revision, by the hub or its cache; None if unknown."""
    asked = {"revision": revision, "repo_type": kind, "expand": ["sha"]}
    try:
        return client.HfApi().repo_info(repository, **asked).sha
    except Exception:  # a dozen types, from no network to no such revision
        folder = snapshot(repository, revision, kind)
        return folder.name if folder else None


def licence_of(model: str, revision: str | None = None) -> str | None:
    """The licence that the card of a model on the hub names; None if unknown."""
    try:
        info = client.HfApi().model_info(model, revision=revision, expand=["cardData"])
        return info.card_data.get("license")
    except Exception:  # a dozen types, and a model without a card
        return None


def snapshot(repository: str, revision: str | None = None, kind: str = "model") -> Path | None:
    """The folder of a repository in the hub's local cache, if it is there."""
    where = {"revision": revision, "repo_type": kind}
    try:
        return Path(client.snapshot_download(repository, local_files_only=True, **where))
    except Exception:  # not there, or no name that the hub could have
        return None
