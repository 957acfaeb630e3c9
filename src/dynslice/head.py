"""The head of a network in parts, where the logits are the head of the last hidden states."""

from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

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
