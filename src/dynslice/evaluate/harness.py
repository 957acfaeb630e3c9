"""The items of tasks: lm-eval's official definitions on the fetched data, asked and scored.

Imported where tasks run, because loading lm-eval takes seconds that only they need.
"""

import atexit
import logging
import math
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import datasets
import lm_eval
import lm_eval.utils
import numpy as np
import torch
import yaml
from lm_eval.api.model import LM
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dynslice.core import files, paths
from dynslice.core.errors import DiskError
from dynslice.core.tensors import check_finite, evaluating
from dynslice.evaluate import task_table
from dynslice.evaluate.task_table import TASKS, check_data, check_subset, data_files, local_files

OFFICIAL = Path(lm_eval.__file__).parent / "tasks"
TASK_FILES = paths.TASK_FILES
_kept = ExitStack()
atexit.register(_kept.close)


def tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: list[str],
    limit: int | None = None,
    batch_size: int = 8,
    subset: str = "first",
    share_contexts: bool = True,
    seed: int = 0,
) -> dict[str, dict]:
    """Zero-shot scores by lm-eval's official task definitions on the data of `task_table`.

    Nothing is random in scoring. limit: items of each task; None takes all. batch_size: requests at
    once where choices cannot share their context. subset: which items a limit takes. "first": the
    first of each task, of each subject for MMLU (lm-eval's own meaning). "stratified": sampled by
    `seed`, in proportion to the positions of the right answers; for MMLU `limit` is the total, in
    proportion to the sizes of the subjects. share_contexts: compute a context once for its choices;
    False is lm-eval's own HFLM.

    Returns by task: acc, acc_norm (None where lm-eval defines none), their standard errors, n, and
    per item: correct, correct_norm, margin (log-likelihood of the right choice minus that of the
    best wrong one, nats) and, where items were sampled, items (indices in the task's data, for MMLU
    "subject:index", in the order of the subjects' names), and contexts_cut where some are longer
    than the model has positions. A generation task has metrics and
    metrics_stderr by name, metric (the main one), and its score of each item instead.
    Raises RequestError for an unknown task or subset, a limit below 1, and missing data.
    """
    task_table.check_names(names)
    check_subset(subset, limit)
    check_data(names)
    from lm_eval.models.huggingface import HFLM

    from dynslice.evaluate.shared_context import SharedContextLM

    items = {name: items_of(name, limit, subset, seed) for name in names}
    lm_class = SharedContextLM if share_contexts else HFLM
    lm = lm_class(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    scores = {}
    with evaluating(model):
        for name in names:
            before = getattr(lm, "contexts_cut", 0)
            scores[name] = items[name].score(lm)
            if cut := getattr(lm, "contexts_cut", 0) - before:
                scores[name]["contexts_cut"] = cut
    return scores


@dataclass(frozen=True)
class Items:
    """What is asked of one task (of all subjects, for MMLU).

    loaded: lm-eval's tasks with their groups. limit: how many of the first items of each, None for
    all. sampled: indices of the items that are asked by lm-eval's name of the task; None for all.
    """

    name: str
    loaded: dict
    limit: int | None
    sampled: dict[str, list[int]] | None

    def score(self, lm: LM) -> dict:
        """The scores of a model and its outcome on each item (see `tasks`)."""
        outcome = lm_eval.evaluate(lm, self.loaded, limit=self.limit, samples=self.sampled)
        generated = TASKS[self.name].metric is not None
        value = self._of_generation(outcome) if generated else self._of_choices(outcome)
        if self.sampled:
            value["items"] = [
                i if task == self.name else f"{task.removeprefix(f'{self.name}_')}:{i}"
                for task, items in sorted(self.sampled.items())
                for i in items
            ]
        return value

    def _of_choices(self, outcome: dict) -> dict:
        by_task = dict(sorted(outcome["samples"].items()))
        samples = [sample for samples in by_task.values() for sample in samples]
        # Where some subjects of MMLU are left out, lm-eval reports no score of their group.
        scores = outcome["results"].get(self.name) or _pooled_accuracy(samples)
        accuracies, margins = ("acc", "acc_norm"), [_margin(sample) for sample in samples]
        check_finite(torch.tensor(margins), f"the log-likelihood of task {self.name!r}")
        return {
            **{key: scores.get(f"{key},none") for key in accuracies},
            **{f"{key}_stderr": _number(scores, f"{key}_stderr,none") for key in accuracies},
            "n": len(samples),
            "correct": [int(sample["acc"]) for sample in samples],
            "correct_norm": [int(s["acc_norm"]) for s in samples if "acc_norm" in s] or None,
            "margin": margins,
        }

    def _of_generation(self, outcome: dict) -> dict:
        scores = outcome["results"][self.name]
        values = {key.removesuffix(",none"): x for key, x in scores.items() if "," in key}
        errors = {key.replace("_stderr", ""): x for key, x in values.items() if "_stderr" in key}
        metric, _, chosen = TASKS[self.name].metric.partition(",")
        every = outcome["samples"][self.name]  # each item once for every filter of answers
        samples = [sample for sample in every if sample["filter"] == (chosen or "none")]
        nothing = ("acc", "acc_norm", "acc_stderr", "acc_norm_stderr")
        nothing += ("correct", "correct_norm", "margin")
        return {
            **dict.fromkeys(nothing),
            "n": len(samples),
            "metric": TASKS[self.name].metric,
            "metrics": {key: x for key, x in values.items() if "_stderr" not in key},
            "metrics_stderr": {key: _number(errors, key) for key in errors},
            "score": [float(sample[metric]) for sample in samples],
        }


@cache
def items_of(name: str, limit: int | None, subset: str, seed: int = 0) -> Items:
    """The items of a task, loaded once per process, with requests that are built once."""
    loaded = load(name)
    for task in loaded["tasks"].values():
        task.set_config(key="num_fewshot", value=0)
        _build_once(task)
    if subset == "first" or limit is None:
        return Items(name, loaded, limit, None)
    sampled = sample_items(loaded["tasks"], limit, seed)
    return Items(name, {"tasks": {task: loaded["tasks"][task] for task in sampled}}, None, sampled)


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


def write_task_files(folder: Path | None = None) -> Path:
    """Write the task YAMLs that point lm-eval's official definitions at the fetched data.

    They keep the official names, so `lm_eval --include_path` with this folder runs the same tasks
    as `dynslice tasks`. Tasks of the hub are written when they are loaded. folder: by default the
    one in the cache. Returns it. Raises DiskError where it cannot be written.
    """
    folder = folder or TASK_FILES
    for name, row in TASKS.items():
        if row.folder is not None and name != "mmlu" and (found := local_files(row.folder)):
            _write_task_file(folder, name, OFFICIAL / row.definition, found, row.settings)
    mmlu = TASKS["mmlu"]
    for definition in sorted((OFFICIAL / mmlu.definition).glob("mmlu_*.yaml")):
        found = local_files(f"{mmlu.folder}/{definition.stem.removeprefix('mmlu_')}")
        _write_task_file(folder, definition.stem, definition, found, {})
    return folder


def load(name: str) -> dict:
    """A task (with its subjects and their groups, for MMLU) as lm-eval's TaskManager gives it.

    Raises RequestError when its data are not available.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    row, found, own = TASKS[name], data_files(name), _own_folder()
    if row.hub is not None:
        settings = (name, OFFICIAL / row.definition, found, row.settings)
        _write_task_file(own / "tasks", *settings)
        _task_manager.cache_clear()  # it lists the files when it is made
        with suppress(DiskError):  # that is for others; the cache may be closed
            _write_task_file(TASK_FILES, *settings)
    with files.explained(own):
        return _task_manager().load([name])


@cache
def _own_folder() -> Path:
    """Task files and lm-eval's copies of data, of this process alone: nobody else alters them."""
    return _kept.enter_context(files.scratch(files.room(paths.CACHE / "datasets")))


@cache
def _task_manager() -> TaskManager:
    # lm-eval compiles the template of a task anew for each item, which takes longer than the rest.
    lm_eval.utils.env.from_string = cache(lm_eval.utils.env.from_string)
    # Only what is needed: lm-eval takes many seconds to read all of its thousands of tasks. The
    # groups of MMLU are the official ones, their subjects come from our files, which win.
    official = OFFICIAL / TASKS["mmlu"].definition
    ours = write_task_files(_own_folder() / "tasks")
    return TaskManager(include_defaults=False, include_path=[str(official), str(ours)])


def _write_task_file(
    folder: Path, name: str, definition: Path, found: dict[str, list[Path]], settings: dict
) -> None:
    kind = next(iter(found.values()))[0].suffix.removeprefix(".")
    splits = {split: [str(path) for path in paths_] for split, paths_ in found.items()}
    copies = paths.CACHE / "datasets" if folder == TASK_FILES else folder.with_name("copies")
    settings = {
        "include": str(definition),
        "task": name,
        "dataset_path": kind,
        "dataset_name": None,
        "dataset_kwargs": {"data_files": splits, "cache_dir": str(copies)},
        "training_split": None,
        "validation_split": "validation" if "validation" in found else None,
        "test_split": "test" if "test" in found else None,
        **settings,
    }
    text, path = yaml.safe_dump(settings), folder / f"{name}.yaml"
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        files.write(path, text)  # others may be reading


def sample_items(tasks: dict[str, Task], limit: int, seed: int = 0) -> dict[str, list[int]]:
    """Ascending indices of `limit` items (all, if there are fewer), by lm-eval's task names."""
    parts = strata(tasks)
    counts = _proportional(limit, [len(members) for _, members in parts])
    rng = np.random.default_rng(seed)
    sampled = {}
    for (task, members), count in zip(parts, counts, strict=True):
        sampled.setdefault(task, []).extend(rng.permutation(members)[:count].tolist())
    return {task: sorted(ids) for task, ids in sampled.items() if ids}


def strata(tasks: dict[str, Task]) -> list[tuple[str, np.ndarray]]:
    """(lm-eval's task, indices of its items): subjects of MMLU, else right answers' positions.

    One stratum for a generation task, which has no positions.
    """
    if len(tasks) > 1 or next(iter(tasks.values())).OUTPUT_TYPE == "generate_until":
        return [(name, np.arange(len(tasks[name].eval_docs))) for name in sorted(tasks)]
    [(name, task)] = tasks.items()
    answers = np.array([right_answer(doc, task.doc_to_target(doc)) for doc in task.eval_docs])
    return [(name, np.flatnonzero(answers == answer)) for answer in np.unique(answers)]


def _proportional(limit: int, sizes: list[int]) -> list[int]:
    """Share `limit` out in proportion to `sizes` by largest remainder, earlier ones first."""
    limit = min(limit, sum(sizes))
    counts, remainders = np.divmod(limit * np.array(sizes), sum(sizes))
    counts[np.argsort(-remainders, kind="stable")[: limit - counts.sum()]] += 1
    return counts.tolist()


def right_answer(doc: dict, target: int | str) -> int:
    """The position of the right answer."""
    # WinoGrande scores one ending after two contexts, so its target is a text, not an index.
    return target if isinstance(target, int) else int(doc["answer"]) - 1


def _pooled_accuracy(samples: list[dict]) -> dict[str, float | None]:
    """The accuracy over all items and its standard error, by lm-eval's names."""
    n, p = len(samples), float(np.mean([sample["acc"] for sample in samples]))
    return {"acc,none": p, "acc_stderr,none": math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else None}


def _number(scores: dict, name: str) -> float | None:
    """A standard error; lm-eval says N/A where there is none, as for a single item."""
    return scores[name] if isinstance(scores.get(name), float) else None


def _margin(sample: dict) -> float:
    likelihoods = np.array([float(response[0]) for response in sample["filtered_resps"]])
    right = right_answer(sample["doc"], sample["target"])
    return round(float(likelihoods[right] - np.delete(likelihoods, right).max()), 4)
