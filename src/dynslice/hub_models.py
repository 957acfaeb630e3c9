"""Models of the Hugging Face hub: whether they can be had, and at which commit."""

import json
from functools import cache
from pathlib import Path


@cache
def refusal(name: str, revision: str | None = None) -> str | None:
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


def commit_of(name: str, revision: str | None = None) -> str | None:
    """The commit that a revision of a model is now, by the hub or else by its local cache."""
    from huggingface_hub import HfApi

    if refusal(name, revision) is None:
        return HfApi().model_info(name, revision=revision, expand=["sha"]).sha
    folder = snapshot(name, revision)
    return folder.name if folder else None
