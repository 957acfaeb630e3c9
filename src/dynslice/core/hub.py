"""Models of the Hugging Face hub: whether they can be had, and at which commit."""

import json
from functools import cache
from pathlib import Path

from dynslice.core.errors import RequestError


@cache
def model_refusal(name: str, revision: str | None = None) -> str | None:
    """Why the hub does not give a model now, in words for an error; None where it does.

    Asked once per process, and before any download: a download without network would try again
    for half a minute. Nothing that the hub's client says is quoted, it may hold credentials.
    """
    from huggingface_hub import HfApi, errors

    api = HfApi()
    try:
        api.auth_check(name)
        api.model_info(name, revision=revision, expand=["sha"])
    except errors.GatedRepoError:
        return (
            "is gated on the hub: accept its licence there and log in with `hf auth login` (or "
            "set HF_TOKEN)"
        )
    except errors.RevisionNotFoundError:
        return f"has no revision {revision!r} on the hub: name a branch, tag or commit of it"
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        return (
            "is no model of the hub that this account can see: check the name, and for a private "
            "one log in with `hf auth login`"
        )
    except Exception:  # of the network, as far down as the socket, or of a hub out of order
        return (
            "could not be had from the hub: connect to the network, or give the directory of a "
            "downloaded model"
        )
    return None


def snapshot(name: str, revision: str | None = None) -> Path | None:
    """The folder of a model in the hub's local cache, if it is there."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except Exception:  # not there, or no name that the hub could have
        return None


def has_weights(folder: Path) -> bool:
    """Whether a snapshot holds all files of its weights: a configuration alone is soon there."""
    indices = list(folder.glob("*.index.json"))
    if not indices:
        return any(folder.glob("model*.safetensors"))
    files = [json.loads(i.read_text(encoding="utf-8"))["weight_map"].values() for i in indices]
    return any(all((folder / name).is_file() for name in set(names)) for names in files)


def model_commit(name: str, revision: str | None = None) -> str | None:
    """The commit that a revision of a model is now, by the hub or else by its local cache."""
    from huggingface_hub import HfApi

    if model_refusal(name, revision) is None:
        return HfApi().model_info(name, revision=revision, expand=["sha"]).sha
    folder = snapshot(name, revision)
    return folder.name if folder else None


# The revision at which the hub keeps its own Parquet files of a data set that is a script, which
# `datasets` no longer runs.
CONVERTED = "refs/convert/parquet"

INSTEAD = "give a local file or directory in its place"  # what one can do without the hub


def dataset_refusal(
    what: str, repository: str, files: str, revision: str | None, instead: str = INSTEAD
) -> str | None:
    """What `fetch` would say now, asked without downloading; None where it would download."""
    try:
        if is_away(repository, revision):
            fetch(what, repository, files, revision, instead)  # from the cache, or refused at once
    except RequestError as error:
        return str(error)
    except Exception:  # no such repository or revision, or no access
        return f"{what}: the hub does not give dataset {repository} at revision {revision!r}"
    return None


def fetch(
    what: str,
    repository: str,
    files: str,
    revision: str | None,
    instead: str = INSTEAD,
) -> list[Path]:
    """The data files of a hub repository that match a pattern, in name order, downloaded once.

    what, instead: for whom, and what else one can do, in the words of an error. Raises
    RequestError in one sentence when the hub cannot be reached, refuses, or has no such revision
    or file. Nothing that the hub's client says is quoted there: it may hold addresses with
    credentials.
    """
    from huggingface_hub import errors, hf_hub_download, snapshot_download

    where = {"repo_type": "dataset", "revision": revision}
    try:
        if "*" in files:
            folder = Path(snapshot_download(repository, allow_patterns=[files], **where))
            found = sorted(folder.glob(files))
        else:  # without listing the repository: C4 has very many files
            away = is_away(repository, revision)
            found = [Path(hf_hub_download(repository, files, local_files_only=away, **where))]
    except errors.RevisionNotFoundError as error:
        raise RequestError(
            f"{what}: dataset {repository} has no revision {revision!r} on the hub; name a branch, "
            "tag or commit of it, or leave the revision out"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise RequestError(_unreachable(what, repository, instead)) from error
    except errors.EntryNotFoundError:
        found = []
    except (errors.RepositoryNotFoundError, errors.HfHubHTTPError) as error:
        if error.response.status_code not in (401, 403, 404):
            raise RequestError(_unreachable(what, repository, instead)) from error
        raise RequestError(
            f"{what}: the hub gives no access to dataset {repository}; accept its terms there and "
            f"run `hf auth login`, or {instead}"
        ) from error
    except Exception as error:  # what the network raises in the middle of a download
        raise RequestError(_unreachable(what, repository, instead)) from error
    if not found:
        raise RequestError(
            f"{what}: dataset {repository} has no files {files} at revision "
            f"{revision or 'main'!r}; name another revision, or {instead}"
        )
    return found


def is_away(repository: str, revision: str | None) -> bool:
    """Whether the hub does not answer; asked because a download would try for half a minute."""
    from huggingface_hub import HfApi, errors

    try:
        HfApi().dataset_info(repository, revision=revision, expand=["sha"])
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        raise
    except Exception:  # of the network, as far down as the socket, or of a hub out of order
        return True
    return False


def _unreachable(what: str, repository: str, instead: str) -> str:
    return (
        f"{what} is dataset {repository} of the Hugging Face hub, which could not be reached; "
        f"connect to the network, or {instead}"
    )
