"""The two ways in which dynslice says no, and any error in one line."""

import traceback
from pathlib import Path


class RequestError(ValueError):
    """A request that cannot be served: names the setting, its value and the mend (exit 2)."""


class RunError(RuntimeError):
    """A failure while running a request that looked sound (exit 1)."""


def in_one_line(error: BaseException) -> str:
    """What an error says; of those that dynslice does not raise itself also the type and place."""
    if isinstance(error, RequestError | RunError):
        return str(error)
    if type(error).__name__ == "OutOfMemoryError":  # torch's; torch may not be loaded
        return "the GPU is out of memory; use smaller windows, or the dtype bfloat16"
    text = (str(error).strip().splitlines() or ["no message"])[0]
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {text}{place}"
