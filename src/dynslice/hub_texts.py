"""Texts in data files: corpora of the Hugging Face hub by name, and directories of files.

Files of a hub corpus are downloaded into the hub's own cache and read from there, so that a
corpus which was read once needs no network again, and a revision means the same either way.
"""

import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from dynslice.errors import RequestError

SPLITS = ("train", "validation", "test")

# The revision at which the hub keeps its own Parquet files of a data set that is a script, which
# `datasets` no longer runs.
CONVERTED = "refs/convert/parquet"
INSTEAD = "give a local file or directory in its place"  # what one can do without the hub


@dataclass(frozen=True)
class Part:
    """Which documents of the hub's files make a split.

    files: pattern of paths in the repository. folds, of: document i is taken where i modulo `of`
    is one of the folds. cap: stop after that many documents; what is behind them is not read.
    """

    files: str
    folds: tuple[int, ...] = (0,)
    of: int = 1
    cap: int | None = None


@dataclass(frozen=True)
class HubText:
    """One corpus of the hub.

    revision: the default one; None is the main branch. joined: rows are lines, and a split is one
    document, its rows joined by blank lines; otherwise each row is a document, taken once.
    """

    repository: str
    column: str
    parts: dict[str, Part]
    revision: str | None = None
    joined: bool = False


def _each(pattern: str) -> dict[str, Part]:
    return {split: Part(pattern.format(split)) for split in SPLITS}


# The lines of wikitext2 and ptb are joined as GPTQ and SliceGPT do. A document of C4 has about 480
# tokens: 2,048 of them hold 128 windows of 2,048 tokens three times over, and 8,192 SliceGPT's
# 1,024 windows. C4 has no test split, Alpaca nothing but training rows. A book of PG-19 has about
# 100,000 tokens; its own repository is a script without Parquet files of its own.
HUB = {
    "wikitext2": HubText(
        "Salesforce/wikitext", "text", _each("wikitext-2-raw-v1/{}-*.parquet"), joined=True
    ),
    "ptb": HubText(
        "ptb-text-only/ptb_text_only",
        "sentence",
        _each("penn_treebank/{}/*.parquet"),
        revision=CONVERTED,
        joined=True,
    ),
    "c4": HubText(
        "allenai/c4",
        "text",
        {
            "train": Part("en/c4-train.00000-of-01024.json.gz", cap=8192),
            "validation": Part("en/c4-validation.00000-of-00008.json.gz", (0,), 2, 2048),
            "test": Part("en/c4-validation.00000-of-00008.json.gz", (1,), 2, 2048),
        },
    ),
    "alpaca": HubText(
        "tatsu-lab/alpaca",
        "text",
        {
            "train": Part("data/train-*.parquet", (0, 1, 2), 5),
            "validation": Part("data/train-*.parquet", (3,), 5),
            "test": Part("data/train-*.parquet", (4,), 5),
        },
    ),
    "pg19": HubText(
        "emozilla/pg19",
        "text",
        {
            "train": Part("data/train-00000-of-*.parquet", cap=64),
            "validation": Part("data/validation-*.parquet"),
            "test": Part("data/test-*.parquet"),
        },
    ),
}


@lru_cache(maxsize=4)
def documents(name: str, split: str, revision: str | None = None) -> list[str]:
    """The documents of a split of a hub corpus, downloaded if they are not in the hub's cache.

    Raises RequestError when they cannot be had (see `fetch`) or the column is not there.
    """
    corpus = HUB[name]
    part = corpus.parts[split]
    texts = _column(_rows(name, split, revision), corpus.column, f"text {name!r}")
    if corpus.joined:
        return ["\n\n".join(texts)]
    chosen = (text for i, text in enumerate(_once(texts)) if i % part.of in part.folds)
    return list(islice(chosen, part.cap))


def commit_of(name: str, revision: str | None = None) -> str | None:
    """The commit that a revision of a hub corpus is now, asked of the hub or else of its cache.

    None when neither knows it.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.file_download import repo_folder_name

    repository, revision = HUB[name].repository, revision or HUB[name].revision or "main"
    try:
        return HfApi().dataset_info(repository, revision=revision, expand=["sha"]).sha
    except Exception:  # a dozen types, from no network to no such revision
        folder = repo_folder_name(repo_id=repository, repo_type="dataset")
        cached = Path(constants.HF_HUB_CACHE) / folder
        if (cached / "snapshots" / revision).is_dir():
            return revision
        reference = cached / "refs" / revision
        return reference.read_text(encoding="utf-8").strip() if reference.is_file() else None


def obstacle(name: str, split: str | None, revision: str | None = None) -> str | None:
    """Why a corpus of the hub can't be had now, asked without downloading; None where it can.

    None for texts that are no corpora of the hub.
    """
    if name not in HUB:
        return None
    corpus = HUB[name]
    files = corpus.parts[split].files
    return refusal(f"text {name!r}", corpus.repository, files, revision or corpus.revision)


def refusal(
    what: str, repository: str, files: str, revision: str | None, instead: str = INSTEAD
) -> str | None:
    """What `fetch` would say now, asked without downloading; None where it would download."""
    try:
        if _is_away(repository, revision):
            fetch(what, repository, files, revision, instead)  # from the cache, or refused at once
    except RequestError as error:
        return str(error)
    except Exception:  # no such repository or revision, or no access
        return f"{what}: the hub does not give dataset {repository} at revision {revision!r}"
    return None


def fetch(
    what: str,
    repository: str,
    files: str,
    revision: str | None,
    instead: str = INSTEAD,
) -> list[Path]:
    """The data files of a hub repository that match a pattern, in name order, downloaded once.

    what, instead: for whom, and what else one can do, in the words of an error. Raises
    RequestError in one sentence when the hub cannot be reached, refuses, or has no such revision
    or file. Nothing that the hub's client says is quoted there: it may hold addresses with
    credentials.
    """
    from huggingface_hub import errors, hf_hub_download, snapshot_download

    where = {"repo_type": "dataset", "revision": revision}
    try:
        if "*" in files:
            folder = Path(snapshot_download(repository, allow_patterns=[files], **where))
            found = sorted(folder.glob(files))
        else:  # without listing the repository: C4 has very many files
            away = _is_away(repository, revision)
            found = [Path(hf_hub_download(repository, files, local_files_only=away, **where))]
    except errors.RevisionNotFoundError as error:
        raise RequestError(
            f"{what}: dataset {repository} has no revision {revision!r} on the hub; name a branch, "
            "tag or commit of it, or leave the revision out"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise RequestError(_unreachable(what, repository, instead)) from error
    except errors.EntryNotFoundError:
        found = []
    except (errors.RepositoryNotFoundError, errors.HfHubHTTPError) as error:
        if error.response.status_code not in (401, 403, 404):
            raise RequestError(_unreachable(what, repository, instead)) from error
        raise RequestError(
            f"{what}: the hub gives no access to dataset {repository}; accept its terms there and "
            f"run `hf auth login`, or {instead}"
        ) from error
    except Exception as error:  # what the network raises in the middle of a download
        raise RequestError(_unreachable(what, repository, instead)) from error
    if not found:
        raise RequestError(
            f"{what}: dataset {repository} has no files {files} at revision "
            f"{revision or 'main'!r}; name another revision, or {instead}"
        )
    return found


def _is_away(repository: str, revision: str | None) -> bool:
    """Whether the hub does not answer; asked because a download would try for half a minute."""
    from huggingface_hub import HfApi, errors

    try:
        HfApi().dataset_info(repository, revision=revision, expand=["sha"])
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        raise
    except Exception:  # of the network, as far down as the socket, or of a hub out of order
        return True
    return False


def _unreachable(what: str, repository: str, instead: str) -> str:
    return (
        f"{what} is dataset {repository} of the Hugging Face hub, which could not be reached; "
        f"connect to the network, or {instead}"
    )


def _rows(name: str, split: str, revision: str | None) -> Iterable[dict[str, Any]]:
    corpus = HUB[name]
    files = corpus.parts[split].files
    return rows(fetch(f"text {name!r}", corpus.repository, files, revision or corpus.revision))


# Directories

_FORMATS = {"txt": "text", "jsonl": "json", "json": "json", "parquet": "parquet"}
_FILE = re.compile(
    rf"(?P<split>{'|'.join(SPLITS)})(-\d+-of-\d+(-[0-9a-f]+)?)?\.(?P<format>{'|'.join(_FORMATS)})"
    r"(?P<gz>\.gz)?"
)


def files_of(folder: Path) -> dict[str, list[Path]]:
    """The files of each split that a directory, or else its folder `data`, holds, in name order.

    Raises RequestError when one split comes in several formats.
    """
    for place in (folder, folder / "data"):
        found: dict[str, list[Path]] = {}
        for path in sorted(place.iterdir()) if place.is_dir() else []:
            match = _FILE.fullmatch(path.name)
            if match and path.is_file() and not (match["gz"] and match["format"] == "txt"):
                found.setdefault(match["split"], []).append(path)
        for split, paths in found.items():
            formats = sorted({_FILE.fullmatch(path.name)["format"] for path in paths})
            if len(formats) > 1:
                raise RequestError(
                    f"text {str(folder)!r} holds split {split} in several formats "
                    f"({', '.join(formats)}); leave one of them"
                )
        if found:
            return {split: found[split] for split in SPLITS if split in found}
    return {}


def split_files(folder: str, split: str) -> list[Path]:
    """The files of one split of a directory. Raises RequestError when it has none."""
    found = files_of(Path(folder))
    if split not in found:
        have = ", ".join(found) or "none"
        raise RequestError(
            f"text {folder!r} is a directory without split {split!r} (it has {have}); add "
            f"{split}.txt, .jsonl, .json, .json.gz or .parquet, or use a split that is there"
        )
    return found[split]


def folder_documents(folder: str, split: str) -> list[str]:
    """The rows of a split's files as documents: their column `text`, or the only one of strings.

    Empty rows are left out. Raises RequestError when a file cannot be read or it is not clear
    which column is meant.
    """
    read = iter(rows(split_files(folder, split)))
    first = next(read, None)
    if first is None:
        raise RequestError(f"text {folder!r} has no rows in split {split}; fill its files")
    strings = [name for name, value in first.items() if isinstance(value, str)]
    if "text" not in first and len(strings) != 1:
        raise RequestError(
            f"text {folder!r} has no column 'text' in split {split}, and not exactly one of "
            f"strings (columns: {', '.join(first)}); name the one to read 'text'"
        )
    column = "text" if "text" in first else strings[0]

    def every() -> Iterator[dict[str, Any]]:
        yield first
        yield from read

    texts = _column(every(), column, f"text {folder!r}")
    return [text for text in texts if text.strip()]


def rows(files: list[Path]) -> Iterator[dict[str, Any]]:
    """The rows of data files of one format, one after the other; only what is asked for is read."""
    import datasets

    datasets.logging.set_verbosity(logging.CRITICAL)  # what is wrong is said below
    kind = _FORMATS[files[0].name.removesuffix(".gz").rpartition(".")[2]]
    try:
        names = [str(path) for path in files]
        yield from datasets.load_dataset(kind, data_files=names, split="train", streaming=True)
    except Exception as error:  # of datasets, Arrow, gzip and json, each its own
        shown = f"{files[0].name} and {len(files) - 1} more" if files[1:] else files[0].name
        raise RequestError(
            f"{shown} in {str(files[0].parent)!r} cannot be read as {kind}; mend or replace the "
            "file"
        ) from error


def _column(read: Iterable[dict[str, Any]], column: str, what: str) -> Iterator[str]:
    for row in read:
        text = row.get(column)
        if column not in row or not isinstance(text, str | None):
            raise RequestError(
                f"{what} has no column {column!r} of strings (columns: {', '.join(row)}); use "
                "another revision or file"
            )
        yield text or ""


def _once(texts: Iterable[str]) -> Iterator[str]:
    """Texts that are not blank, each the first time."""
    seen = set()
    for text in texts:
        if text.strip() and text not in seen:
            seen.add(text)
            yield text
