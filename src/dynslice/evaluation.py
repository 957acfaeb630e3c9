"""Perplexity on token windows, and tasks through lm-eval."""

import math

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dynslice import task_table
from dynslice.corpora import batches
from dynslice.errors import RequestError
from dynslice.head import has_plain_head, head_chunks
from dynslice.models import check_finite, check_tokens
from dynslice.task_table import data_files

SUBSETS = ("first", "stratified")


@torch.inference_mode()
def perplexity(model: PreTrainedModel, windows: torch.Tensor) -> dict:
    """exp of the mean of per-window mean negative log-likelihoods (METHOD section 2).

    windows: token ids [n, T]; each window predicts its tokens 2 to T. Returns perplexity,
    nll_mean and nll_stderr (nats per token; standard error over windows, None for one window),
    tokens (predicted), windows, window, and nll per window.
    Raises RequestError for windows of fewer than 2 tokens and for logits that are not finite.
    """
    count, window = windows.shape
    if window < 2:
        raise RequestError(f"window {window} predicts no token; use at least 2")
    check_tokens(model.config, windows)
    nll = []
    whole = not has_plain_head(model.config)
    for ids in batches(windows, "perplexity", model.device, logits=whole):
        nll.append(_losses(model, ids).double().view(len(ids), -1).mean(dim=1))
    nll = torch.cat(nll)
    check_finite(nll, "the log-likelihood", model.dtype)
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


def _losses(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """ids [b, T] -> negative log-likelihoods of tokens 2 to T in nats, [b * (T - 1)]."""
    if not has_plain_head(model.config):
        logits = model(ids, use_cache=False).logits[:, :-1].float()
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return head_losses(model, model.base_model(ids, use_cache=False).last_hidden_state, ids)


def head_losses(model: PreTrainedModel, normed: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihoods of tokens 2 to T in nats, [b * (T - 1)], of a model's plain head.

    normed: the stream [b, T, d] behind the final norm. ids [b, T].
    """
    chunks = head_chunks(model, normed[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    return torch.cat([F.cross_entropy(*chunk, reduction="none") for chunk in chunks])


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

    Nothing is drawn while scoring: zero-shot multiple choice has no random part, and generation
    is greedy. Zero-shot holds for gsm8k_cot too, whose official definition shows eight examples.

    limit: items of each task; None takes all of them.
    batch_size: requests at once where choices cannot share their context (see `choices`).
    subset: which items a limit takes. "first": the first of each task, of each subject for MMLU
    (lm-eval's own meaning). "stratified": drawn by `seed`, in proportion to the
    positions of the right answers; for MMLU `limit` is the total, in proportion to the sizes of
    the subjects.
    share_contexts: compute a context once for its choices; False is lm-eval's own HFLM.
    Returns by task: acc, acc_norm (None where lm-eval defines none), their standard errors, n,
    and per item: correct, correct_norm, margin (log-likelihood of the right choice minus that of
    the best wrong one, nats) and, for drawn items only, items (indices in the task's data, for
    MMLU "subject:index"). MMLU's items are in the order of its subjects' names.
    Of a generation task these are None but for n and items; it has metrics and metrics_stderr
    (by name, with lm-eval's filter where there are several), metric (the name of the main one),
    and score, the main one of each item.
    Raises RequestError for an unknown task or subset, a limit below 1, and data that cannot be had.
    """
    task_table.check(names)
    check_subset(subset, limit)
    check_data(names)
    # Imported here: lm-eval's modules take a second or two that only tasks need.
    from lm_eval.models.huggingface import HFLM

    from dynslice.choices import SharedContextLM
    from dynslice.items import items_of

    items = {name: items_of(name, limit, subset, seed) for name in names}
    lm_class = SharedContextLM if share_contexts else HFLM
    lm = lm_class(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    return {name: items[name].score(lm) for name in names}


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
