"""Directories of text files by split, and rows of data files.

A split is `<split>.txt` (one document), `.jsonl`, `.json`, `.json.gz` or `.parquet` (a document a
row); it may be in shards and in a folder `data`, as in a snapshot of a hub repository.
"""

import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dynslice.core.errors import RequestError

SPLITS = ("train", "validation", "test")

ALSO = dict.fromkeys(("valid", "val", "dev"), "validation")  # as people name splits too
_ROWS = re.compile(r"\.(jsonl|ndjson|json|(?P<parquet>parquet|pq))(\.gz)?$", re.IGNORECASE)
_FILE = re.compile(
    rf"(?P<split>{'|'.join((*SPLITS, *ALSO))})(-\d+-of-\d+(-[0-9a-f]+)?)?"
    rf"(?P<ending>\.txt(\.gz)?|{_ROWS.pattern})",
    re.IGNORECASE,
)


def split_files(folder: str, split: str) -> list[Path]:
    """The files of one split in a directory, or else in its folder `data`, in name order.

    Raises RequestError when there are none, and when a split comes in several formats.
    """
    found: dict[str, dict[str, list[Path]]] = {}
    for place in (Path(folder), Path(folder, "data")):
        for path in sorted(place.iterdir()) if place.is_dir() and not found else []:
            if (match := _FILE.fullmatch(path.name)) and path.is_file():
                name = match["split"].lower()
                formats = found.setdefault(ALSO.get(name, name), {})
                formats.setdefault(match["split"] + match["ending"], []).append(path)
    for name, formats in found.items():
        if len(formats) > 1:
            raise RequestError(
                f"text {folder!r} holds split {name} several times "
                f"({', '.join(sorted(formats))}); leave one of them"
            )
    if split not in found:
        have = ", ".join(name for name in SPLITS if name in found) or "none"
        raise RequestError(
            f"text {folder!r} is a directory without split {split!r} (it has {have}); add "
            f"{split}.txt, .jsonl, .json, .json.gz or .parquet, or use a split that is there"
        )
    [files] = found[split].values()
    return files


def is_data(path: Path) -> bool:
    """Whether a file has rows, by its name, and is no text itself."""
    return _ROWS.search(path.name) is not None


def row_documents(files: list[Path], what: str) -> list[str]:
    """The rows of data files that are not empty: their column `text`, or the only one of strings.

    Rows may lack it. what: the text in words. Raises RequestError when a file cannot be read or it
    is not clear which column is meant.
    """
    kinds: dict[str, set[type]] = {}
    for row in rows(files, whole=True):
        for name, value in row.items():
            kinds.setdefault(name, set()).add(type(value))
        if "text" in kinds:
            break
    if not kinds:
        raise RequestError(f"{what} has no rows; fill its files")
    strings = [name for name, found in kinds.items() if {str} <= found <= {str, type(None)}]
    if "text" not in kinds and len(strings) != 1:
        raise RequestError(
            f"{what} has no column 'text', and not exactly one of strings (columns: "
            f"{', '.join(kinds)}); name the one to read 'text'"
        )
    column = "text" if "text" in kinds else strings[0]
    return [text for text in column_of(rows(files, whole=True), column, what) if text.strip()]


def rows(files: list[Path], whole: bool = False) -> Iterator[dict[str, Any]]:
    """The rows of data files of one format, one after the other; only what is asked for is read.

    whole: a file at once, up to 2 GiB, so that columns may begin anywhere in one of JSON.
    """
    import datasets

    datasets.logging.set_verbosity(logging.CRITICAL)  # what is wrong is said below
    kind = "parquet" if _ROWS.search(files[0].name)["parquet"] else "json"
    for path in files:  # alone, since each may have other columns
        given = {"data_files": str(path), "split": "train", "streaming": True}
        if whole and kind == "json":
            size = path.stat().st_size * (32 if path.suffix.lower() == ".gz" else 1)
            given["chunksize"] = min(max(size, 2**20), 2**31)
        try:
            yield from datasets.load_dataset(kind, **given)
        except Exception as error:  # of datasets, Arrow, gzip and json, each its own
            raise RequestError(
                f"{path.name} in {str(path.parent)!r} cannot be read as {kind}; replace the file"
            ) from error


def column_of(read: Iterable[dict[str, Any]], column: str, what: str) -> Iterator[str]:
    """The texts of a column, "" for rows without; what: whose rows, in the words of an error.

    Raises RequestError at a value that is no string, and at the end where no row had the column.
    """
    columns: dict[str, None] = {}
    for row in read:
        columns |= dict.fromkeys(row)
        if not isinstance(text := row.get(column), str | None):
            break
        yield text or ""
    else:
        if column in columns or not columns:
            return
    raise RequestError(
        f"{what} has no column {column!r} of strings (columns: {', '.join(columns)}); use "
        "another revision or file"
    )


def once(texts: Iterable[str]) -> Iterator[str]:
    """Texts that are not blank, each the first time."""
    seen = set()
    for text in texts:
        if text.strip() and text not in seen:
            seen.add(text)
            yield text
