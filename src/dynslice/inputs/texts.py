"""Texts by name, file or directory.

A text is the name of a corpus (see `corpora`), the path of a file without splits (one document in
UTF-8, or a data file with a document a row), or that of a directory with files for each split (see
`data_files`). A document is in one split.
"""

import gzip
import zlib
from collections.abc import Callable
from pathlib import Path

from dynslice.core import assets, hub
from dynslice.core.errors import RequestError
from dynslice.core.files import check_no_pointer
from dynslice.inputs import corpora
from dynslice.inputs.corpora import CORPORA, HUB
from dynslice.inputs.data_files import ALSO, SPLITS, is_data, row_documents, split_files


def has_splits(text: str) -> bool:
    """Whether a text is a corpus or a directory; a file has no splits."""
    return text in CORPORA or text in HUB or _is(text, Path.is_dir)


def check(text: str, split: str | None, revision: str | None = None) -> None:
    """Raise RequestError unless `text` is a corpus or directory with that split, or a file.

    The network is not asked for hub corpora before they are read.
    """
    if revision is not None and text not in HUB:
        raise RequestError(
            f"text {text!r} has no revisions, only corpora of the hub do ({', '.join(HUB)}); "
            f"leave revision {revision!r} out"
        )
    if has_splits(text):
        if split is not None and split not in SPLITS:
            raise RequestError(f"split {split!r} is unknown; use {', '.join(SPLITS)}")
    elif split is not None and _is(text, Path.is_file):
        raise RequestError(f"text {text!r} is a file and has no splits; leave --split out")
    found = files_of(text, split)
    if not (has_splits(text) or (found and is_data(found[0]))):  # rows are read when they are used
        _read(text)


def default_split(text: str, split: str | None, default: str = "validation") -> str | None:
    """`split` by its usual name, or for a corpus or directory the default; files have none."""
    return default if split is None and has_splits(text) else ALSO.get(split, split)


def checked_split(text: str, split: str | None, default: str = "validation") -> str | None:
    """`default_split`, of a text that is there. Raises RequestError as `check`, `assets.locate`."""
    check(text, split := default_split(text, split, default))
    if text in CORPORA:
        assets.locate(corpora.ASSETS[text])
    return split


def documents(text: str, split: str | None, revision: str | None = None) -> list[str]:
    """The documents of a split of a corpus or directory, or of a file, which may be only one.

    revision: branch, tag or commit of a hub corpus; None takes its default one. Raises RequestError
    as `check`, and when a hub corpus is not available.
    """
    split = default_split(text, split)
    check(text, split, revision)
    if text in CORPORA:
        return corpora.embedded(text)[split]
    if text in HUB:
        return corpora.documents(text, split, revision)
    files = files_of(text, split)
    if is_data(files[0]):
        return row_documents(files, f"text {text!r}" + f" in split {split}" * (split is not None))
    return [_read(str(path)) for path in files]


def files_of(text: str, split: str | None) -> list[Path]:
    """The files of a text, none for a corpus. Raises RequestError for a directory without any."""
    if text in CORPORA or text in HUB:
        return []
    if has_splits(text):
        found = split_files(text, default_split(text, split))
    else:
        found = [Path(text)] if _is(text, Path.is_file) else []
    for path in found:
        check_no_pointer(path)
    return found


def source_of(config: dict) -> tuple[str, str | None, str | None]:
    """The text that a request reads, its split and its revision."""
    return config.get("stand_in", config["text"]), config["split"], config.get("text_revision")


def commit_of(text: str, revision: str | None = None) -> str | None:
    """The commit at which a hub corpus was read last; None for others, and before it is read."""
    if text not in HUB:
        return None
    return hub.commit_of(HUB[text].repository, revision or HUB[text].revision)


def _is(name: str, kind: Callable[[Path], bool]) -> bool:
    try:
        return kind(Path(name))
    except OSError:  # a name too long to be one, such as a text given in place of its name
        return False


def _read(name: str) -> str:
    path = Path(name)
    if not _is(name, Path.is_file):
        name = name if len(name) <= 80 else f"{name[:80]}..."
        known = ", ".join([*CORPORA, *HUB])
        raise RequestError(
            f"text {name!r} is neither a corpus ({known}) nor a file or directory; check the name"
        )
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if path.suffix.lower() == ".gz" else raw
        text = raw.decode("utf-8-sig")  # without a byte order mark
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise RequestError(f"text {name!r} is no gzip file; name it otherwise") from error
    except UnicodeDecodeError as error:
        raise RequestError(
            f"text {name!r} is not UTF-8 (byte {error.start}); convert it to UTF-8"
        ) from error
    if not text.strip():
        raise RequestError(f"text {name!r} is empty; give a file with words in it")
    if "\x00" in text:
        raise RequestError(f"text {name!r} is binary (it holds NUL bytes); give a text file")
    return text
