"""The ways in which dynslice says no, and any error in one line."""

import errno
import os
import re
import traceback
from pathlib import Path


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
    if not re.search(r"\b(sensitivity|search)", text):
        return ""
    return "; the schedules sensitivity and search were removed (docs/method.md), use lr or first"


class DiskError(RunError):
    """A disk that is full or may not be written: whatever follows would fail too."""


_AGAIN = "free some space and give the same command again, what was finished is kept"
_ELSEWHERE = "name another place, or let this one be written"
_DISK = {
    errno.ENOSPC: f"the disk of {{place}} is full; {_AGAIN}",
    errno.EDQUOT: f"the disk quota of {{place}} is used up; {_AGAIN}",
    errno.EROFS: f"{{place}} is on a read-only file system; {_ELSEWHERE}",
    errno.EACCES: f"{{place}}: permission is denied; {_ELSEWHERE}",
    errno.EPERM: f"{{place}}: the system does not permit it; {_ELSEWHERE}",
    errno.ENOTDIR: "{place}: a part of its path is a file; name another place",
}

WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # by these only writing can fail


def disk_trouble(error: BaseException, place: Path, numbers=tuple(_DISK)) -> str | None:
    """What an error says of a disk and what to do, in a sentence; None for errors of other kinds.

    place: where something was written, if the error does not tell.
    """
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (told := re.search(r"os error (\d+)", str(error))):  # of safetensors
        number = int(told[1])
    if number not in numbers:
        return None
    if isinstance(getattr(error, "filename", None), str):
        place = Path(error.filename)
    return _DISK[number].format(place=repr(os.path.relpath(place)))


def in_one_line(error: BaseException) -> str:
    """What an error says; of those that dynslice does not raise itself also the type and place."""
    if isinstance(error, RequestError | RunError):
        return str(error)
    if type(error).__name__ == "OutOfMemoryError":  # torch's; torch may not be loaded
        return (
            "the GPU is out of memory; use fewer or smaller windows, a smaller batch size, the "
            "dtype bfloat16, or the device cpu"
        )
    if sentence := disk_trouble(error, Path()):
        return without_secrets(sentence)
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
