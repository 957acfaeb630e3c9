"""The Hugging Face hub: what it gives, at which commit, and why not, in words for an error.

Nothing that the hub's client says is quoted: it may hold addresses with credentials.
"""

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import huggingface_hub as client  # its parts are imported when they are used
from huggingface_hub import constants, errors
from huggingface_hub.utils import _http as http

from dynslice.core import files
from dynslice.core.errors import DiskError, RequestError, disk_trouble

PAUSES = (1, 3)  # seconds before another try where the hub fails or breaks off
UNANSWERED = 3  # requests in a row without an answer, after which no more are made

INSTEAD = "give the directory of a downloaded model"

# Of a model, what is read besides its weights. Code is not run, but belongs to the checksums.
_SMALL = (".json", ".jinja", ".model", ".tiktoken", ".txt", ".py", "README.md")

# What errors mean: of which types or status they or their causes are (httpx's by name, since it
# goes by two), what the hub does then, and what to do about it. The first that applies counts.
_CAUSES = {
    "offline": (
        {"OfflineModeIsEnabled"},
        "is not asked while HF_HUB_OFFLINE is set",
        "unset it and connect to the network",
    ),
    "revision": (
        {"RevisionNotFoundError"},
        "has no revision {revision!r} of it",
        "name a branch, tag or commit of it",
    ),
    "files": (
        {"RemoteEntryNotFoundError", "files"},
        "has no files {wanted} of it at revision {revision!r}",
        "name another revision",
    ),
    "gated": (
        {"GatedRepoError", 403},
        "gives it only to accounts that may read it",
        "accept its terms on its page, and log in with `hf auth login` (or set HF_TOKEN)",
    ),
    "token": (
        {"401 with a token"},
        "does not accept the access token",
        "log in anew with `hf auth login`, or unset HF_TOKEN",
    ),
    "name": (
        {"HFValidationError", 401, 404},
        "has nothing of this name that this account can see",
        "check the name, and for a private one log in with `hf auth login`",
    ),
    "busy": (
        {429},
        "limits how often it is asked (status 429)",
        "wait some minutes, or log in with `hf auth login` for a higher limit",
    ),
    "server": ({"HfHubHTTPError"}, "fails now (status {status})", "try again later"),
    "mirror": (
        {"SSLError", "ProxyError", "UnsupportedProtocol", "FileMetadataError", "JSONDecodeError"},
        "is not what answers here",
        "check HF_ENDPOINT, HTTPS_PROXY and SSL_CERT_FILE",
    ),
    "away": ({"ConnectError", "ConnectTimeout"}, "could not be reached", "connect to the network"),
    "slow": (
        {"TimeoutException", "slow"},
        "does not answer within {limit:g} s",
        "try again later, or with a larger HF_HUB_DOWNLOAD_TIMEOUT",
    ),
    "cut": (
        {"NetworkError", "RemoteProtocolError", "cut"},
        "broke off, or sent a damaged file",
        "give the same command again",
    ),
}


class _Trouble(Exception):
    """Of our own: a cause by its name, or a file that the cache lacks while the hub is away."""


@cache
def model(name: str, revision: str | None = None, weights: bool = True) -> tuple[Path, list[str]]:
    """The folder of the hub's cache with all that is read of a model, and what the hub lists of it.

    The folder is called by the commit, which is asked for once in a process. Where the hub does not
    answer, it lists nothing, and the commit is that of the cache. weights: with the weights, which
    a forecast does without. Raises RequestError or DiskError when something is not available.
    """
    asked = {"revision": revision or "main", "wanted": "to read", "instead": INSTEAD}
    with _explained(name, f"model {name!r}", "model", **asked):
        names, away = _listed(name, revision, "model")
        small = [file for file in names if "/" not in file and file.endswith(_SMALL)]
        is_usual = away or not small or "config.json" in small
        folder = _get(name, "config.json" if is_usual else small[0], away, revision=revision).parent
        _complete(name, folder, small, away)
        if weights:
            here = names or [path.name for path in folder.iterdir()]
            _complete(name, folder, _weights_of(folder, here, not away), away)
    return folder, names


def _complete(name: str, folder: Path, wanted: list[str], away: Exception | None) -> None:
    for file in wanted:
        if not (folder / file).is_file():
            if away:
                raise _Trouble(file) from away
            _get(name, file, None, revision=folder.name)


def _weights_of(folder: Path, names: list[str], is_known: bool) -> list[str]:
    """The files of weights that transformers would load: whole, or by the index."""
    index = folder / "model.safetensors.index.json"
    if "model.safetensors" in names or not (is_known or index.is_file()):
        return ["model.safetensors"]
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        parts = {*json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
        return sorted(parts & {*names} if is_known else parts)
    return []  # it has none, or an index that is refused where it is read


def dataset_refusal(what: str, *asked: str | None) -> str | None:
    """What `fetch` would say now, asked without downloading; None where it would download."""
    try:
        fetch(what, *asked, download=False)
    except (RequestError, DiskError) as error:
        return str(error)
    return None


def fetch(
    what: str,
    repository: str,
    wanted: str,
    revision: str | None,
    instead: str = "give a local file or directory in its place",
    download: bool = True,
) -> list[Path]:
    """The data files of a hub repository that match a pattern, in name order, downloaded once.

    what, instead: for whom, and what else one can do, in the words of an error. download: False
    only looks into the cache where the hub does not answer. Raises RequestError when the hub cannot
    be reached, refuses, or has no such revision or file; DiskError when its cache has no room.
    """
    asked = {"revision": revision or "main", "wanted": wanted, "instead": instead}
    with _explained(repository, what, "dataset", **asked):
        _, away = _listed(repository, revision, "dataset")
        if not (away or download):
            return []
        where = {"repo_type": "dataset", "revision": revision}
        if "*" not in wanted:  # without listing the repository: C4 has very many files
            return [_get(repository, wanted, away, **where)]
        where |= {"allow_patterns": [wanted], "local_files_only": away is not None}
        folder = _download(away, lambda: Path(client.snapshot_download(repository, **where)))
        found = [_checked(path) for path in sorted(folder.glob(wanted))]
        if not found:
            raise away or _Trouble("files")
    return found


def commit_of(repository: str, revision: str | None = None) -> str | None:
    """The commit of a dataset's revision that was read last, by the hub's cache; None if none."""
    ref = Path(constants.HF_HUB_CACHE, f"datasets--{repository.replace('/', '--')}", "refs")
    if (ref := ref / (revision or "main")).is_file():
        return ref.read_text(encoding="utf-8").strip()
    return revision if revision and re.fullmatch("[0-9a-f]{40}", revision) else None


def _listed(name: str, revision: str | None, kind: str) -> tuple[list[str], Exception | None]:
    """The files of a model; and why the hub does not answer, where the cache may do instead."""
    asked: dict[str, Any] = {"repo_type": kind, "revision": revision}
    if kind == "dataset":
        asked["expand"] = ["sha"]  # only whether it answers, since a download would try for long
    try:
        info = _insist(lambda: client.HfApi().repo_info(name, **asked))
    except Exception as error:
        if _cause(error)[0] == "revision":
            raise
        return [], error
    return [sibling.rfilename for sibling in getattr(info, "siblings", None) or ()], None


def _get(name: str, file: str, away: Exception | None, **where: Any) -> Path:
    """A file in the hub's cache, downloaded unless it is there or the hub is away."""

    def ask() -> Path:
        path = client.hf_hub_download(name, file, local_files_only=away is not None, **where)
        return _checked(Path(path))

    return _download(away, ask)


def _download(away: Exception | None, ask: Callable[[], Path]) -> Path:
    """What is downloaded or cached; where the hub is away and nothing is cached, that is raised."""
    try:
        return _insist(ask)
    except errors.LocalEntryNotFoundError:
        if away is None:
            raise
    raise away


def _checked(path: Path) -> Path:
    """A file of the cache, which calls large ones by their hash; removed where that is wrong."""
    blob = path.parent / path.readlink() if path.is_symlink() else path
    if re.fullmatch("[0-9a-f]{64}", blob.name) and files.sha256(blob) != blob.name:
        path.unlink()
        blob.unlink(missing_ok=True)
        raise _Trouble("cut")
    return path


def _limit() -> float:
    """Seconds for which an answer is waited for."""
    return max(constants.HF_HUB_ETAG_TIMEOUT, constants.HF_HUB_DOWNLOAD_TIMEOUT)


def _insist(ask: Callable[[], Any]) -> Any:
    """What the hub answers; asked again after a pause where it fails or breaks off."""
    for pause in PAUSES:
        try:
            return ask()
        except Exception as error:
            if _cause(error)[0] not in ("busy", "server", "cut"):
                raise
        time.sleep(pause)
    return ask()


@contextmanager
def _patiently() -> Iterator[None]:
    """Ask the hub for a minute or so at most, without its client's own words on the screen.

    By itself the client waits for some answers for ever, repeats some requests for many minutes,
    and waits for a busy hub as long as that says.
    """
    verbosity, of_thread = client.logging.get_verbosity(), threading.local()
    usual = getattr(http, "_GLOBAL_CLIENT_FACTORY", http.default_client_factory)

    def before(request) -> None:
        of_thread.unanswered = getattr(of_thread, "unanswered", 0) + 1
        if of_thread.unanswered > UNANSWERED:
            raise _Trouble("slow")
        times = request.extensions.get("timeout", {})
        kinds = ("connect", "read", "write", "pool")
        request.extensions["timeout"] = {k: min(times.get(k) or _limit(), _limit()) for k in kinds}

    def after(response) -> None:
        of_thread.unanswered = 0
        if response.status_code == 429 or response.status_code >= 500:
            raise errors.HfHubHTTPError("it fails now", response=response)

    def hooked() -> Any:
        session = usual()
        hooks = {"request": before, "response": after}.items()
        session.event_hooks = {kind: [*session.event_hooks[kind], hook] for kind, hook in hooks}
        return session

    client.set_client_factory(hooked)  # the client makes another session after some errors
    client.logging.set_verbosity_error()
    try:
        yield
    finally:
        client.logging.set_verbosity(verbosity)
        client.set_client_factory(usual)


@contextmanager
def _explained(name: str, what: str, kind: str, instead: str, **asked: Any) -> Iterator[None]:
    """Turn whatever the hub's client raises into one sentence: what, why, and what to do."""
    try:
        with _patiently():
            yield
    except Exception as error:
        if isinstance(error, TypeError | AttributeError | NameError | AssertionError):
            raise  # a bug
        cause, known = _cause(error)
        if cause == "disk":
            raise DiskError(f"{what}: {known['disk']} (HF_HOME moves the hub's cache)") from error
        clause, remedy = (part.format(**asked, **known) for part in _CAUSES[cause][1:])
        if kind == "dataset":
            said = f"{what} is dataset {name} of the Hugging Face hub, which {clause}; {remedy}"
        elif isinstance(error, _Trouble) and error.__cause__:
            lacks = f"is in the hub's cache only in part ({error} is missing)"
            said = f"{what} {lacks}, and the hub {clause}: {remedy}"
        else:
            which = "" if cause == "away" else f", which {clause}"
            said = f"{what} is not available from the hub{which}: {remedy}"
        raise RequestError(f"{said}, or {instead}") from error


def _cause(error: BaseException | None) -> tuple[str, dict[str, Any]]:
    """Which of `_CAUSES` an error of the hub's client is, or "disk", and what is known of it."""
    chain: list[BaseException] = []
    marks: set[Any] = set()
    known: dict[str, Any] = {"limit": _limit(), "status": None}
    while error is not None and error not in chain:
        chain.append(error)
        if told := disk_trouble(error, Path(constants.HF_HUB_CACHE)):
            return "disk", {**known, "disk": told}
        marks |= {kind.__name__ for kind in type(error).__mro__}
        marks |= {*error.args} if isinstance(error, _Trouble) else set()
        if (response := getattr(error, "response", None)) is not None:
            known["status"] = status = response.status_code
            headers = getattr(response.request, "headers", {})
            marks |= {status, f"{status} with a token" if "authorization" in headers else status}
        error = error.__cause__ or error.__context__
    return next((c for c, (its, *_) in _CAUSES.items() if marks & its), "away"), known
