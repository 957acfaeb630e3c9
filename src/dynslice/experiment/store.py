"""The results store: one JSON file per measurement, keyed by what was asked."""

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory

from dynslice.core import files, paths

# Raised whenever a change of the code changes what a measurement means.
METHOD_VERSION = 1

# What a run rewrites in a checkout; it does not make the code that measured dirty.
_GENERATED = ("data/record", "data/results", "figures", "notebooks/rendered")
_GENERATED += ("README.md", "docs/deviations.md")

_PACKAGES = ("torch", "transformers", "lm-eval", "datasets", "tokenizers", "numpy")


@dataclass(frozen=True)
class Request:
    """What is asked for: a kind and everything that decides its value, nothing else."""

    kind: str
    config: dict

    @property
    def key(self) -> str:
        """File name stem: the kind and a hash of what was asked."""
        asked = {"kind": self.kind, "config": self.config, "method_version": METHOD_VERSION}
        text = json.dumps(asked, sort_keys=True)
        return f"{self.kind}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def unique(requests: list[Request]) -> list[Request]:
    """Each request once, in the order of first appearance."""
    return list({request.key: request for request in requests}.values())


@dataclass(frozen=True)
class Result:
    """A measured value with what was asked, what it cost, and where it comes from."""

    kind: str
    config: dict
    value: dict
    seconds: float
    peak_memory_bytes: int
    provenance: dict

    @property
    def request(self) -> Request:
        """What was asked."""
        return Request(self.kind, self.config)


class Store:
    """A folder of results. A broken file is reported and set aside, or left in a record for git."""

    def __init__(self, folder: Path, of_record: bool = False):
        self.folder, self.of_record = folder, of_record

    def get(self, request: Request) -> Result | None:
        """The stored result, or None where there is none that can be used."""
        path = self.folder / f"{request.key}.json"
        if not path.is_file():
            return None
        try:
            row = json.loads(path.read_text(encoding="utf-8"))
            if (told := row.pop("checksum", None)) is not None and told != _checksum(row):
                raise ValueError("its checksum does not match")
            result = Result(**row)
            if result.request.key != request.key:
                raise ValueError("it answers another request")
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            aside = path.with_suffix(".broken")
            said = f"{path.name} is broken ({error}); set aside as {aside.name}, measuring again"
            if self.of_record:
                said = f"{path.name} of the record is broken ({error}); restore it"
            else:
                os.replace(path, aside)
            print(said, file=sys.stderr)
            return None
        return result

    def put(self, result: Result) -> None:
        """Write a result so that the file is complete or absent. Raises DiskError."""
        row = json.loads(json.dumps(asdict(result)))
        text = json.dumps({**row, "checksum": _checksum(row)}, indent=1)
        files.write(self.folder / f"{result.request.key}.json", text)

    def claim(self, name: str, waiting: Callable[[], None]) -> AbstractContextManager[None]:
        """Be the only process to work on `name`; `waiting` is told first when another one does."""
        return files.claim(self.folder / ".claims" / name, waiting)

    def is_claimed(self, name: str) -> bool:
        """Whether a living process works on `name`."""
        return files.is_claimed(self.folder / ".claims" / name)


def _checksum(row: dict) -> str:
    return hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()


def provenance(device) -> dict:
    """Where a number comes from: commit, versions, device, threads, date."""
    import torch

    return {
        **_checkout(),
        "packages": {name: metadata.version(name) for name in _PACKAGES},
        "device_class": device.type,
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


@cache
def _checkout() -> dict:
    """Commit of the code that runs, and whether it differs; read once: a run keeps what it started.

    Both are None where no git repository has this package as src/dynslice in its last commit.
    """
    # What the environment or the index of the checkout say can hide changes, or another repository.
    here = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(paths.PACKAGE.parents[1]), *arguments]
        done = subprocess.run(command, capture_output=True, env=here, check=True)
        return os.fsdecode(done.stdout.removesuffix(b"\n"))

    try:
        with TemporaryDirectory() as scratch:
            here["GIT_INDEX_FILE"] = str(Path(scratch, "index"))
            commit, _ = git("rev-parse", "HEAD", "HEAD:src/dynslice").split()
            if Path(git("rev-parse", "--show-toplevel"), "src/dynslice").resolve() != paths.PACKAGE:
                return {"commit": None, "dirty": None}
            git("read-tree", commit)
            code = ("--", ".", *(f":!{path}" for path in _GENERATED))
            changed = git("diff", "--name-only", "--no-renames", "--ignore-submodules=none", *code)
            changed += git("ls-files", "--others", "--exclude-standard", *code)
            changed += git("ls-files", "--others", "--", "src/*.py", "src/*.yaml")
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}
    return {"commit": commit, "dirty": bool(changed)}


@cache
def _device_name(device) -> str:
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    named = cpuinfo.is_file() and re.search(r"^model name\s*:(.*)", cpuinfo.read_text(), re.M)
    return named[1].strip() if named else platform.processor() or platform.machine()
