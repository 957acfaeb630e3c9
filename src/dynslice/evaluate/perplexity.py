"""Perplexity on token windows."""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from dynslice.core.errors import RequestError
from dynslice.core.tensors import batches, check_finite, check_tokens, evaluating


@torch.inference_mode()
def perplexity(model: PreTrainedModel, windows: torch.Tensor) -> dict:
    """exp of the mean of per-window mean negative log-likelihoods (docs/method.md).

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
    with evaluating(model):
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


# Positions at which the head runs at once. The logits of a whole batch are hundreds of megabytes,
# gigabytes on a GPU, which an allocator maps anew each time.
LOGIT_CHUNK = 128


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
        logits = head(part).float()
        yield logits, target.to(logits.device)  # a network can be spread over several devices
