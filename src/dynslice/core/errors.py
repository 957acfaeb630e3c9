"""The ways in which dynslice says no, and any error in one line."""

import errno
import os
import re
import socket
import ssl
import traceback
from collections.abc import Set
from pathlib import Path

from dynslice.core import paths


class _InOneLine(Exception):
    def __init__(self, sentence: str):
        super().__init__(without_secrets(sentence))

    def _render_traceback_(self) -> list[str]:
        """What IPython shows in a notebook: the sentence, not the way to it."""
        return [f"{type(self).__name__}: {self}"]


class RequestError(_InOneLine, ValueError):
    """A request that cannot be served: names the setting, its value and what to do (exit 2)."""

    def __init__(self, sentence: str):
        super().__init__(" ".join(sentence.split()))  # what it quotes may have several lines


class RunError(_InOneLine, RuntimeError):
    """A failure while running a request that looked sound (exit 1)."""


def removed(text: str) -> str:
    """What replaces a removed name that a text holds, to add to a refusal; "" where it has none."""
    if not re.search(r"'(--)?(sensitivity|search)|--sensitivity|\b(sensitivity|search)_", text):
        return ""
    return "; the schedules sensitivity and search were removed (docs/method.md), use lr or first"


class DiskError(RunError):
    """A disk that is full or may not be written: whatever follows would fail too."""


_TMP, _GPU = 10**9, 10**9 + 1  # no numbers of the system
_AGAIN = "give the same command again, what was finished is kept"
_SMALLER = "use fewer or smaller windows, a smaller batch size, "
_UNUSABLE = "{place} cannot be used ({cause}); name another place, or change its permissions"
_SENTENCES = {
    "ENOSPC": f"the disk of {{place}} is full; free some space and {_AGAIN}",
    "EDQUOT": f"the disk quota of {{place}} is used up; free some space and {_AGAIN}",
    "EFBIG": f"a file at {{place}} exceeds the limit on file sizes; raise it and {_AGAIN}",
    "EROFS": "{place} is on a read-only file system; {elsewhere}",
    "EMFILE ENFILE": f"too many files are open; raise the limit (`ulimit -n`) and {_AGAIN}",
    "EIO ENXIO ENODEV ESTALE ENOTCONN EREMOTEIO ESHUTDOWN EUCLEAN EBADMSG ENOMEDIUM": "the disk of "
    f"{{place}} fails ({{cause}}); see that it is mounted and sound, then {_AGAIN}",
    "EACCES EPERM ENOTDIR ENAMETOOLONG ELOOP EXDEV EBUSY ETXTBSY": _UNUSABLE,
    "ENOMEM": f"the memory of this machine, or its limit, is used up; {_SMALLER}or a larger "
    "machine",
}
_NAMED = [(name, said) for names, said in _SENTENCES.items() for name in names.split()]
_SAYS = {getattr(errno, name): said for name, said in _NAMED if hasattr(errno, name)}
_SAYS[_TMP] = "no folder for temporary files can be written; set TMPDIR to one with room"
_SAYS[_GPU] = f"the GPU is out of memory; {_SMALLER}the dtype bfloat16, or the device cpu"
DISK = _SAYS.keys() - {errno.ENOMEM, _GPU}
LASTING = {number for number in DISK if _SAYS[number] != _UNUSABLE}  # whatever follows fails too
# How libraries tell of the system in errors of their own: safetensors, Arrow, datasets, torch.
_QUOTED = re.compile(r"(?i)\bos error (\d+)|\[errno (\d+)\]")
_WORDS = {
    "no space left on device": errno.ENOSPC,
    "not enough disk space": errno.ENOSPC,
    "no usable temporary directory": _TMP,
    "t allocate memory": errno.ENOMEM,  # can't, cannot
}


def _number_of(error: BaseException) -> int | None:
    if type(error).__name__ in ("OutOfMemoryError", "MemoryError"):  # torch may not be loaded
        return errno.ENOMEM if isinstance(error, MemoryError) else _GPU
    if isinstance(error, ssl.SSLError | socket.gaierror):
        return None  # numbers of their own
    if isinstance(error, OSError) and error.errno in _SAYS:
        return error.errno
    text = str(error)[:10_000].lower()
    quoted = _QUOTED.search(text)
    said = int(quoted[1] or quoted[2]) if quoted else None
    return next((number for words, number in _WORDS.items() if words in text), said)


def disk_trouble(
    error: BaseException, place: Path | None = None, numbers: Set[int] = _SAYS.keys()
) -> str | None:
    """What an error says of a disk, or of memory, and what to do; None for errors of other kinds.

    One that a library makes of such an error says the same; what dynslice says of a request stands
    unless the disk as a whole fails. place: what was read or written, if the error does not tell.
    numbers: of the system, that count.
    """
    cause = error
    if isinstance(error, RequestError | RunError):
        numbers = {number for number in numbers if _SAYS[number] != _UNUSABLE}
    for _ in range(20):  # a chain can be a circle
        if cause is None or isinstance(cause, DiskError):
            break
        if {kind.__name__ for kind in type(cause).__mro__} & {"NetworkError", "TimeoutException"}:
            return None  # of a client of HTTP; what is below it is the network's
        if (number := _number_of(cause)) in numbers:
            named = getattr(cause, "filename2", None) or getattr(cause, "filename", None)
            return _sentence(number, Path(named) if isinstance(named, str) else place)
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return str(cause) if isinstance(cause, DiskError) else None


def _sentence(number: int, place: Path | None) -> str:
    told = {"place": "a file in use", "elsewhere": "name another place"}
    if place is not None:
        place = Path(str(place.absolute()).partition(f"/{paths.SCRATCH}")[0])  # gone by then
        told["place"] = repr(os.path.relpath(place))
        if place.is_relative_to(paths.CACHE):
            told["elsewhere"] = "set DYNSLICE_CACHE to another place"
    return without_secrets(_SAYS[number].format(**told, cause=os.strerror(number).lower()))


def in_one_line(error: BaseException) -> str:
    """What an error says; of those that dynslice does not raise itself also the type and place."""
    if isinstance(error, RequestError | RunError):
        return str(error)
    if sentence := disk_trouble(error):
        return sentence
    lines = str(error).strip().splitlines() or ["no message"]
    text = without_secrets(" ".join(lines[: 2 if lines[0].endswith(":") else 1]))
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {text}{place}"


def without_secrets(text: str) -> str:
    """A text with tokens, and what stands before the @ of an address, blotted out."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN"):
        if token := os.environ.get(name):
            text = text.replace(token, "***")
    text = re.sub(r"\bhf_\w{8,}", "***", text)
    text = re.sub(r"(?i)\b(token=|password=|bearer )[^\s&'\"]+", r"\1***", text)
    return re.sub(r"://[^/\s]+@", "://***@", text)
