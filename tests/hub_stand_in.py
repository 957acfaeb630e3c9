"""A stand-in for the Hugging Face hub on the loopback address, for tests and the rehearsal.

    with hub_stand_in.serving(root) as hub, hub_stand_in.connected(hub, home):
        ...  # huggingface_hub, transformers and datasets talk to it, with a cache below `home`

Repositories are folders `<root>/models/<org>/<name>` and `<root>/datasets/<org>/<name>`, branches
and tags beside them (see `Hub.folder`). They are read at each request, so a head can move while the
hub runs; a commit that was served once stays available. `Hub.rules` make it fail.
"""

import gzip
import hashlib
import json
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml

LARGE = (".safetensors", ".bin", ".gguf", ".parquet", ".gz")  # what the hub keeps in LFS
BOT = "SFconvertbot"  # opens pull requests with safetensors, which transformers takes up
BOT_TITLE = "Adding `safetensors` variant of this model"
DATE = "2024-01-01T00:00:00.000Z"


@dataclass
class Rule:
    """What happens to the requests for a path; the first rule that applies is taken.

    path: a regular expression, searched in the unquoted path with its query. method: None is any.
    times: how often, None for ever. after: how many requests pass before. token: requests that
    bring it pass.

    stall: seconds to wait first. Then one of: status, with an error code of the hub, its message
    and headers; drop: close the connection without an answer; moved: the repository's new name, to
    redirect to; cdn: redirect to another host name; or the file itself, with content: what is sent
    in place of the right one, under its ETag; cut: how many bytes are sent.
    """

    path: str
    method: str | None = None
    times: int | None = None
    after: int = 0
    token: str | None = None
    stall: float = 0.0
    status: int | None = None
    code: str | None = None
    message: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    drop: bool = False
    moved: str | None = None
    cdn: bool = False
    content: Callable[[bytes], bytes] | None = None
    cut: int | None = None

    def applies(self, method: str, path: str, token: str | None) -> bool:
        """Whether a request is caught; counts those that match."""
        if not re.search(self.path, path) or self.method not in (None, method):
            return False
        if self.times == 0 or (self.token is not None and token == self.token):
            return False
        self.after -= 1
        if self.after < 0 and self.times is not None:
            self.times -= 1
        return self.after < 0


def gated(repository: str, token: str | None = None) -> Rule:
    """The files of a repository are for those whose token was granted access: 401, or 403."""
    said = f"Access to {repository} is restricted."
    path = rf"{re.escape(repository)}/(resolve|auth-check)"
    return Rule(path, status=403, code="GatedRepo", message=said, token=token)


def private(repository: str, token: str | None = None) -> Rule:
    """A repository that only a token sees; to others it does not exist."""
    return Rule(re.escape(repository), status=401, code="RepoNotFound", token=token)


@dataclass(frozen=True)
class Snapshot:
    """The files of a repository at a commit."""

    files: dict[str, bytes]

    @cached_property
    def commit(self) -> str:
        """Forty hexadecimal digits of names and contents."""
        every = hashlib.sha1()
        for path, data in sorted(self.files.items()):
            every.update(f"{path}\0{len(data)}\0".encode() + data)
        return every.hexdigest()

    def entry(self, path: str) -> dict:
        """A file as the hub lists it."""
        data, sha = self.files[path], etag(path, self.files[path])
        listed = {"type": "file", "path": path, "size": len(data), "oid": sha[:40]}
        if path.endswith(LARGE):
            listed["lfs"] = {"oid": sha, "size": len(data), "pointerSize": 134}
        return listed


def etag(path: str, data: bytes) -> str:
    """SHA-256 of large files and git's hash of small ones, as on the hub."""
    if path.endswith(LARGE):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


class Hub:
    """What is served, what was asked, and what goes wrong."""

    def __init__(self, root: Path):
        self.root = root
        self.requests: list[str] = []  # "METHOD path" of each, the path as it was sent
        self.rules: list[Rule] = []
        self.token: str | None = None  # the only valid one; None takes any
        self.stopped = threading.Event()
        self._lock = threading.Lock()
        self._commits: dict[tuple[Path, str], Snapshot] = {}  # by repository and commit
        self._heads: dict[Path, tuple[tuple, Snapshot]] = {}  # by folder, with how it looked
        self._sockets: set[socket.socket] = set()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # clients may leave at any moment
        port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{port}"
        self.cdn = f"http://localhost:{port}/cdn"  # another host name, so no token goes there
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """End it, with the connections that are open."""
        if not self.stopped.is_set():
            self.stopped.set()
            self._server.shutdown()
            self._server.server_close()
            for open_one in list(self._sockets):
                with suppress(OSError):
                    open_one.shutdown(socket.SHUT_RDWR)

    def folder(self, kind: str, repository: str, revision: str = "main") -> Path:
        """Where the files of a revision lie: `<name>` for main, `<name>@<revision>` for others."""
        ending = "" if revision == "main" else "@" + quote(revision, safe="")
        return self.root / kind / (repository + ending)

    def commit(self, kind: str, repository: str, revision: str = "main") -> str:
        """The commit that a revision stands at now."""
        return self.snapshot(kind, repository, revision).commit

    def has(self, kind: str, repository: str) -> bool:
        """Whether there is a repository of that name, at any revision."""
        here = self.folder(kind, repository)
        return here.is_dir() or bool(self._branches(here))

    def snapshot(self, kind: str, repository: str, revision: str) -> Snapshot | None:
        """The files at a branch, tag or commit; None where there is none."""
        with self._lock:
            main = self.folder(kind, repository)
            heads = {place: self._read(place) for place in (main, *self._branches(main))}
            self._commits |= {(main, head.commit): head for head in heads.values() if head}
            asked = heads.get(self.folder(kind, repository, revision))
            return asked or self._commits.get((main, revision))

    def _branches(self, main: Path) -> list[Path]:
        return list(main.parent.glob(f"{main.name}@*"))

    def _read(self, folder: Path) -> Snapshot | None:
        if not folder.is_dir():
            return None
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        look = tuple((path, path.stat().st_mtime_ns, path.stat().st_size) for path in paths)
        if folder not in self._heads or self._heads[folder][0] != look:
            contents = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
            self._heads[folder] = look, Snapshot(contents)
        return self._heads[folder][1]

    def fault(self, method: str, path: str, token: str | None) -> Rule | None:
        """The rule that a request is caught by."""
        with self._lock:
            self.requests.append(f"{method} {path}")
            plain = unquote(path)
            return next((rule for rule in self.rules if rule.applies(method, plain, token)), None)


class _Refused(Exception):
    """An answer that is an error: its status, the hub's code for it, and its message."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def setup(self) -> None:
        super().setup()
        self.hub._sockets.add(self.connection)

    def finish(self) -> None:
        self.hub._sockets.discard(self.connection)
        with suppress(OSError):
            super().finish()

    def log_message(self, *_) -> None:
        """Say nothing; `Hub.requests` has it all."""

    def do_GET(self) -> None:
        """Answer a request, or fail it as the rules say."""
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        sent = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.rule = self.hub.fault(self.command, self.path, sent) or Rule("")
        self.hub.stopped.wait(self.rule.stall)
        if self.rule.drop or self.hub.stopped.is_set():
            self.close_connection = True
            return
        try:
            if self.rule.status is not None:
                status = 401 if self.rule.code == "GatedRepo" and not sent else self.rule.status
                raise _Refused(status, self.rule.code, self.rule.message)
            if self.hub.token is not None and sent not in (None, self.hub.token):
                raise _Refused(401, None, "Invalid credentials in Authorization header")
            if self.rule.moved:
                place = re.sub(self.rule.path, self.rule.moved, self.path, count=1)
                self._send(307, b"", {"Location": place})
            else:
                self._answer()
        except _Refused as refused:
            status, code, message = refused.args
            named = {"X-Error-Code": code, "X-Error-Message": message} | self.rule.headers
            headers = {name: value for name, value in named.items() if value}
            self._send(status, json.dumps({"error": message or code}).encode(), headers)

    do_HEAD = do_POST = do_GET

    def _answer(self) -> None:
        split = urlsplit(self.path)
        parts = [unquote(part) for part in split.path.strip("/").split("/")]
        parts = parts[1:] if parts[0] == "cdn" else parts
        is_api = parts[0] == "api"
        parts = parts[1:] if is_api else parts
        kind = parts.pop(0) if parts[0] in ("models", "datasets") else "models"
        if len(parts) < 2 or not self.hub.has(kind, "/".join(parts[:2])):
            raise _Refused(401, "RepoNotFound", "Repository not found")
        self.at, rest = (kind, "/".join(parts[:2])), parts[2:]
        what = rest[0] if rest else "revision"
        if is_api and what == "auth-check":
            return self._json({})
        if is_api and what == "discussions":
            return self._discussions()
        at = rest[1] if rest[1:] else "main"
        if at == "refs":  # a reference that is not quoted has slashes
            at, rest = "/".join(rest[1:4]), [what, "", *rest[4:]]
        snapshot = self.hub.snapshot(*self.at, at)
        if snapshot is None:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {at}")
        path, query = "/".join(rest[2:]), parse_qs(split.query)
        if is_api and what == "revision":
            return self._info(snapshot, query.get("expand"))
        if is_api and what == "tree":
            return self._tree(snapshot, path, query.get("recursive") == ["true"])
        if is_api and what == "paths-info":
            asked = parse_qs(self.body.decode())["paths"]
            return self._json([snapshot.entry(name) for name in asked if name in snapshot.files])
        if is_api and what == "commits":
            return self._commits(snapshot)
        if what == "resolve" and not is_api:
            return self._file(snapshot, path)
        raise _Refused(404, None, "Not found")

    def _info(self, snapshot: Snapshot, asked: list[str] | None) -> None:
        readme = snapshot.files.get("README.md", b"").decode()
        card = re.match(r"---\n(.*?)\n---\n", readme, re.DOTALL)
        known = {"sha": snapshot.commit, "private": False, "gated": False, "disabled": False}
        known |= {"tags": [], "downloads": 0, "likes": 0, "lastModified": DATE}
        known["cardData"] = yaml.safe_load(card[1]) if card else {}
        files = snapshot.files.items()
        known["siblings"] = [{"rfilename": path, "size": len(data)} for path, data in files]
        chosen = {key: known[key] for key in asked or known if key in known}
        self._json({"_id": "0", "id": self.at[1], **chosen})

    def _tree(self, snapshot: Snapshot, below: str, is_recursive: bool) -> None:
        start = f"{below}/" if below else ""
        inside = [path for path in snapshot.files if path.startswith(start)]
        if not inside:
            raise _Refused(404, "EntryNotFound", f"{below} does not exist")
        folders = {str(parent) for path in inside for parent in Path(path).parents}
        listed = [{"type": "directory", "path": path, "oid": "0" * 40} for path in sorted(folders)]
        listed += [snapshot.entry(path) for path in inside]
        depth = start.count("/") if not is_recursive else None
        listed = [e for e in listed if e["path"] != "." and e["path"].startswith(start)]
        self._json([e for e in listed if depth in (None, e["path"].count("/"))])

    def _commits(self, snapshot: Snapshot) -> None:
        main = self.hub.snapshot(*self.at, "main")
        ids = dict.fromkeys(s.commit for s in (snapshot, main) if s)
        common = {"title": "", "message": "", "date": DATE, "authors": []}
        self._json([{"id": commit, **common} for commit in ids])

    def _discussions(self) -> None:
        kind, name = self.at
        found = {"num": 1, "title": BOT_TITLE, "status": "open", "isPullRequest": True}
        found |= {"author": {"name": BOT}, "createdAt": DATE}
        found |= {"repo": {"name": name, "type": kind.removesuffix("s")}}
        every = [found] if self.hub.snapshot(kind, name, "refs/pr/1") else []
        self._json({"discussions": every, "count": len(every), "start": 0})

    def _file(self, snapshot: Snapshot, path: str) -> None:
        if path not in snapshot.files:
            raise _Refused(404, "EntryNotFound", "Entry not found")
        data = snapshot.files[path]
        headers = {"ETag": f'"{etag(path, data)}"', "X-Repo-Commit": snapshot.commit}
        headers["Accept-Ranges"] = "bytes"
        if path.endswith(LARGE):
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(data))}
        if self.rule.cdn and not self.path.startswith("/cdn/"):
            return self._send(302, b"", headers | {"Location": self.hub.cdn + self.path})
        data = self.rule.content(data) if self.rule.content else data
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
            if first > last:
                raise _Refused(416, None, "Range not satisfiable")
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            return self._send(206, data[first : last + 1], headers)
        return self._send(200, data, headers)

    def _json(self, body: dict | list) -> None:
        self._send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: self.rule.cut])
            self.close_connection |= self.rule.cut is not None


@contextmanager
def serving(root: Path, seconds: float = 600.0) -> Iterator[Hub]:
    """A hub that serves the repositories below `root`; it ends by itself after some seconds."""
    hub = Hub(Path(root))
    limit = threading.Timer(seconds, hub.stop)
    limit.daemon = True
    limit.start()
    try:
        yield hub
    finally:
        limit.cancel()
        hub.stop()


def environment(hub: Hub, home: Path) -> dict[str, str]:
    """The variables, to be set over those of this process, by which a child uses the hub."""
    places = {"HF_HUB_CACHE": "hub", "HF_DATASETS_CACHE": "datasets", "HF_MODULES_CACHE": "modules"}
    places |= {"HF_ASSETS_CACHE": "assets", "HF_TOKEN_PATH": "token"}
    switches = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    switches |= {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0"}
    switches |= {"HF_UPDATE_DOWNLOAD_COUNTS": "0", "HF_TOKEN": "", "HUGGING_FACE_HUB_TOKEN": ""}
    where = {name: str(home / place) for name, place in places.items()}
    loopback = dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1,localhost")
    return {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), **where, **switches, **loopback}


@contextmanager
def connected(hub: Hub, home: Path) -> Iterator[None]:
    """Let the libraries of this process use the hub, which they read from the environment once."""
    import datasets.config
    from huggingface_hub import constants, hf_api
    from huggingface_hub.utils import close_session

    values = environment(hub, home)
    cache = values["HF_HUB_CACHE"]
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    client = {"ENDPOINT": hub.url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HOME": str(home)}
    client |= {"HF_HUB_CACHE": cache, "HUGGINGFACE_HUB_CACHE": cache, "HF_HUB_OFFLINE": False}
    client |= {"HF_TOKEN_PATH": values["HF_TOKEN_PATH"], "HF_HUB_DISABLE_XET": True}
    of_sets = {"HF_ENDPOINT": hub.url, "HF_DATASETS_CACHE": Path(values["HF_DATASETS_CACHE"])}
    of_sets |= {"HUB_DATASETS_URL": hub.url + "/datasets/{repo_id}/resolve/{revision}/{path}"}
    with ExitStack() as patches:
        patches.enter_context(mock.patch.dict(os.environ, values))
        patches.enter_context(mock.patch.multiple(constants, **client))
        patches.enter_context(mock.patch.multiple(datasets.config, **of_sets))
        patches.enter_context(mock.patch.object(hf_api.api, "endpoint", hub.url))
        patches.callback(_forget)
        _forget()
        patches.callback(close_session)
        close_session()
        yield


def _forget() -> None:
    """Empty what dynslice remembers of a hub for the length of a process."""
    from dynslice.core import hub
    from dynslice.inputs import corpora

    for module in (hub, corpora):
        for function in vars(module).values():
            if callable(clear := getattr(function, "cache_clear", None)):
                clear()


# Repositories


def write_model(folder: Path, name: str = "tiny-random", shard: str = "5GB") -> Path:
    """An embedded model as a repository of the hub has one; shard "200KB" gives it an index."""
    from dynslice.inputs.embedded_models import EMBEDDED

    model, tokenizer = EMBEDDED[name]()
    model.save_pretrained(folder, max_shard_size=shard)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\nRandom weights.\n")
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
    return folder


def write_rows(path: Path, column: str, texts: list[str]) -> None:
    """Texts as rows of a Parquet file or of compressed JSON lines, by the ending of the path."""
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.table({column: texts}), path)
    else:
        lines = "".join(json.dumps({column: text}) + "\n" for text in texts)
        path.write_bytes(gzip.compress(lines.encode()))


def write_text(root: Path, name: str, splits: dict[str, list[str]]) -> None:
    """The documents of each split as the repository that `corpora.yaml` names, at its revision."""
    from dynslice.inputs.corpora import HUB

    corpus, files = HUB[name], {}
    for split, part in corpus.parts.items():  # splits can share a file
        files.setdefault(part.files.replace("*", "00001"), []).extend(splits[split])
    ending = f"@{quote(corpus.revision, safe='')}" if corpus.revision else ""
    for path, documents in files.items():
        rows = [line for d in documents for line in d.splitlines()] if corpus.joined else documents
        write_rows(root / "datasets" / (corpus.repository + ending) / path, corpus.column, rows)
