"""Files and folders that are complete or absent, held by one process, and unaltered.

Whatever is written is made in a scratch folder beside its place and renamed when it is complete.
Scratch folders and claims are locked by the system for as long as their process lives, so those of
a killed process are free at once, and its leftovers are swept away by whoever writes there next.
"""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from dynslice.core.errors import DiskError, RequestError, disk_trouble, in_one_line

CHECKSUMS = "checksums.json"

_SCRATCH = ".unfinished-"

_LOCK = "lock"  # beside the folder "new" that is given

_YOUNG = 60  # seconds for which a scratch folder may not be locked yet


@contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """An empty folder below `parent`, gone when the context ends. Raises DiskError."""
    with explained(parent):
        parent.mkdir(parents=True, exist_ok=True)
        sweep(parent)
        made = tempfile.TemporaryDirectory(dir=parent, prefix=_SCRATCH)
        with made as folder, _open(Path(folder) / _LOCK) as fd:
            _lock(fd)
            inside = Path(folder) / "new"
            inside.mkdir()
            yield inside


def sweep(parent: Path) -> None:
    """Remove the scratch folders that killed processes left in `parent`."""
    for left in parent.glob(f"{_SCRATCH}*"):
        with suppress(OSError):  # or another process was faster
            if time.time() - left.stat().st_mtime < _YOUNG:
                continue
            with _open(left / _LOCK) as fd:
                if _lock(fd):
                    shutil.rmtree(left, ignore_errors=True)


@contextmanager
def writing(folder: Path) -> Iterator[Path]:
    """A folder for files that go to `folder`, each complete, when the context ends well."""
    with scratch(folder) as made:
        yield made
        for path in made.iterdir():
            os.replace(path, folder / path.name)


def write(path: Path, text: str) -> None:
    """Write a text file that is complete or absent. Raises DiskError where it can't be written."""
    with writing(path.parent) as folder:
        (folder / path.name).write_text(text, encoding="utf-8")


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """An empty folder to fill, which takes the name `folder` when the context ends well.

    A folder that is there already is replaced.
    """
    with scratch(folder.parent) as unfinished:
        yield unfinished
        if folder.is_dir():
            os.replace(folder, unfinished.parent / "old")
        os.replace(unfinished, folder)


@contextmanager
def claim(path: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold `path` as the only process; `waiting` is told first when another one holds it.

    `path` is a file that is there only while it is held, or left by a killed process.
    """
    with explained(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = _held(path, waiting)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # before it is let go: who waits sees that it is gone
        os.close(fd)


def is_claimed(path: Path) -> bool:
    """Whether a living process holds `path`."""
    try:
        with _open(path, create=False) as fd:
            return _lock(fd) is False
    except OSError:
        return False


def _held(path: Path, waiting: Callable[[], None]) -> int:
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT)
        try:
            if _lock(fd) is False:
                waiting()
                fcntl.flock(fd, fcntl.LOCK_EX)
            if path.exists() and os.path.samestat(os.fstat(fd), os.stat(path)):
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # its holder has removed it


def _lock(fd: int) -> bool | None:
    """Whether the lock of an open file is ours now, until the process ends; None without locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system that has none: whoever asks goes on
        return None
    return True


@contextmanager
def _open(path: Path, create: bool = True) -> Iterator[int]:
    fd = os.open(path, os.O_RDWR | (os.O_CREAT if create else 0))
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def explained(place: Path) -> Iterator[None]:
    """Turn errors of a full or closed disk into one DiskError that names `place`."""
    try:
        yield
    except Exception as error:  # safetensors has its own
        if sentence := disk_trouble(error, place):
            raise DiskError(sentence) from error
        raise


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(folder: Path) -> None:
    """Write the SHA-256 of each file of a folder beside them."""
    sums = {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.is_file()}
    (folder / CHECKSUMS).write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")


def damage(folder: Path) -> str | None:
    """What is wrong with a sealed folder; None for one that is sound or was never sealed.

    Files are read once per process, and again when their size or time has changed.
    """
    if not (folder / CHECKSUMS).is_file():
        return None
    seen = sorted((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in folder.iterdir())
    return _damage(folder, tuple(seen))


def is_sound(folder: Path) -> bool:
    """Whether a folder is there, sealed, and as it was when that was done."""
    return (folder / CHECKSUMS).is_file() and damage(folder) is None


@cache
def _damage(folder: Path, _seen: tuple) -> str | None:
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


def check_writable(folder: Path, mend: str) -> None:
    """Raise RequestError, with the mend, where nothing can be written to `folder`."""
    try:
        with scratch(folder) as place:
            (place / "try").write_text("x" * 4096, encoding="utf-8")
    except (DiskError, OSError) as error:
        raise RequestError(f"{in_one_line(error).partition(';')[0]}; {mend}") from error


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
