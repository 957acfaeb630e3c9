"""Files and folders that are complete or absent, held by one process, and unaltered.

What is written is made in a scratch folder next to its place and renamed when it is complete. The
system locks scratch folders and claims while their process lives; leftovers of a killed process are
removed by whoever writes there next.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dynslice.core.errors import DISK, DiskError, RequestError, RunError, disk_trouble, in_one_line
from dynslice.core.paths import SCRATCH

CHECKSUMS = "checksums.json"
_LINE = re.compile(rb'^ "[^"/]+": "[0-9a-f]{64}",?$', re.MULTILINE)  # of `seal`
_LOCK = "lock"  # next to the folder "new" that is given
_YOUNG = 60  # seconds for which a scratch folder may not be locked yet
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # of file systems that have none
_lock = partial(FileLock, fallback_to_soft=False)  # a file in its place would outlive its process


@contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """An empty folder below `parent`, gone when the context ends. Raises DiskError."""
    with explained(parent):
        parent.mkdir(parents=True, exist_ok=True)
        sweep(parent)
        made = tempfile.TemporaryDirectory(dir=parent, prefix=SCRATCH)
        with made as folder, claim(Path(folder, _LOCK)):
            inside = Path(folder, "new")
            inside.mkdir()
            yield inside


def room(folder: Path) -> Path:
    """A folder for scratch: this one, or that of temporary files where it may not be written."""
    there = next(place for place in (folder, *folder.parents) if place.exists())
    return folder if os.access(there, os.W_OK) else Path(tempfile.gettempdir())


def sweep(parent: Path) -> None:
    """Remove the scratch folders that killed processes left in `parent`."""
    for left in parent.glob(f"{SCRATCH}*"):
        with suppress(OSError):  # held, or another process was faster
            if time.time() - left.stat().st_mtime >= _YOUNG:
                with _lock(left / _LOCK).acquire(blocking=False):
                    shutil.rmtree(left, ignore_errors=True)


@contextmanager
def writing(folder: Path) -> Iterator[Path]:
    """A folder for files that go to `folder`, each complete, when the context ends well."""
    with scratch(folder) as made:
        yield made
        for path in made.iterdir():
            os.replace(path, folder / path.name)


def write(path: Path, text: str) -> None:
    """Write a text file that is complete or absent. Raises DiskError where it can't be written.

    A link stays one: what it leads to is written.
    """
    path = path.resolve()
    with writing(path.parent) as folder:
        (folder / path.name).write_text(text, encoding="utf-8")


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """An empty folder to fill, which replaces `folder` when the context ends well."""
    with scratch(folder.parent) as unfinished:
        yield unfinished
        if folder.is_dir():
            os.replace(folder, unfinished.parent / "old")
        os.replace(unfinished, folder)


@contextmanager
def new(folder: Path) -> Iterator[Path]:
    """An empty folder to fill, which appears as `folder` when the context ends well.

    Raises RequestError where something is there, or another process makes it; RunError where
    something appeared meanwhile, which is left alone.
    """

    def refuse() -> None:
        raise RequestError(f"output {str(folder)!r} is being made by another run; name another")

    with claim(folder.with_name(f".making-{folder.name}"), refuse):
        if os.path.lexists(folder):
            raise RequestError(f"output {str(folder)!r} exists already; name a new directory")
        with scratch(folder.parent) as unfinished:
            yield unfinished
            if os.path.lexists(folder):
                raise RunError(
                    f"output {str(folder)!r} appeared while it was made; what is there was left "
                    "alone, give the command again with another name"
                )
            os.replace(unfinished, folder)


@contextmanager
def claim(path: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold `path` as the only process; `waiting` is called first when another one holds it.

    The file is there only while it is held, or left by a killed process. Without locks go on.
    """
    lock = _lock(path)
    with explained(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            waiting()
            lock.acquire()
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # before it is let go: who waits sees it gone
        lock.release()


def is_claimed(path: Path) -> bool:
    """Whether a living process holds `path`."""
    try:
        if path.exists():
            with _lock(path).acquire(blocking=False):
                pass
    except OSError as error:
        return isinstance(error, Timeout)
    return False


@contextmanager
def explained(place: Path) -> Iterator[None]:
    """Turn errors of a full, closed or lost disk into one DiskError that names `place`."""
    try:
        yield
    except Exception as error:  # safetensors and others have their own
        if sentence := disk_trouble(error, place, DISK):
            raise DiskError(sentence) from error
        raise


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_pointer(path: Path) -> bool:
    """Whether a file is what git has in place of a large one until `git lfs pull`."""
    if not path.is_file() or path.stat().st_size > 1024:
        return False
    return path.read_bytes().startswith(b"version https://git-lfs")


def check_no_pointer(path: Path) -> None:
    """Raise RequestError where git has put a pointer in place of a large file."""
    if is_pointer(path):
        raise RequestError(
            f"{str(path)!r} is a git-LFS pointer and not the file; run `git lfs pull` there"
        )


def content_sha256(path: Path) -> str:
    """The same, read again only when the size or time of the file has changed."""
    stat = path.stat()
    return _sha256_of(path.resolve(), stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=256)
def _sha256_of(path: Path, _mtime_ns: int, _size: int) -> str:
    return sha256(path)


def seal(folder: Path) -> None:
    """Write the SHA-256 of each file of a folder next to them."""
    sealed = [p for p in sorted(folder.iterdir()) if p.is_file() and p.name != CHECKSUMS]
    sums = {path.name: sha256(path) for path in sealed}
    (folder / CHECKSUMS).write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")


def damage(folder: Path) -> str | None:
    """What is wrong with a sealed folder; None for one that is sound or was never sealed.

    A file of that name which another tool made seals nothing.
    """
    if not _is_sealed(folder):
        return None
    seen = sorted((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in folder.iterdir())
    return _damage(folder, tuple(seen))


def is_sound(folder: Path) -> bool:
    """Whether a folder is there, sealed, and as it was when that was done."""
    return _is_sealed(folder) and damage(folder) is None


def _is_sealed(folder: Path) -> bool:
    """Whether any line of its checksums, which may be damaged, is as `seal` writes it."""
    try:
        return _LINE.search((folder / CHECKSUMS).read_bytes()) is not None
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return False


@cache
def _damage(folder: Path, _seen: tuple) -> str | None:
    """Read again only when the size or time of a file, which `_seen` holds, has changed."""
    try:
        sums = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        for name, digest in sums.items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            if sha256(folder / name) != digest:
                return f"{name} was altered or is damaged"
    except (ValueError, AttributeError, RecursionError):
        return f"{CHECKSUMS} is damaged"
    return None


def check_writable(folder: Path, what_to_do: str) -> None:
    """Raise RequestError, with what to do, where nothing can be written to `folder`."""
    try:
        with scratch(folder) as place:
            (place / "try").write_text("x" * 4096, encoding="utf-8")
    except (DiskError, OSError) as error:
        raise RequestError(f"{in_one_line(error).partition(';')[0]}; {what_to_do}") from None


def read_json(path: str | Path, what: str) -> dict:
    """Parse a JSON file that a user named. Raises RequestError when it is none."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(f"{what} file {str(path)!r} cannot be read; check the path") from error
    except (ValueError, RecursionError) as error:
        raise RequestError(
            f"{what} file {str(path)!r} is not JSON ({error}); make it anew with `dynslice`"
        ) from error
    if not isinstance(values, dict):
        raise RequestError(f"{what} file {str(path)!r} holds no JSON object; make it anew")
    return values


def validated(kind: type, values: dict, what: str, anew: str) -> Any:
    """The values of a JSON file as a dataclass, by its annotations.

    what: the file in words; anew: the command that makes it. Raises RequestError naming what is
    missing or does not fit.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if first["type"] == "value_error":  # of the class itself, which says it in its own words
            raise first["ctx"]["error"] from error
        where = ".".join(map(str, first["loc"]))
        told = f"has {where} {first['input']!r}, which fits no {what}"
        if first["type"] == "missing":
            told = f"is incomplete (no {where})"
        raise RequestError(f"the {what} {told}; make it anew with {anew}") from error
