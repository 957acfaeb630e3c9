"""How much memory slicing takes, predicted from the shape of a model."""

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from dynslice.corpora import tokens_per_batch
from dynslice.efficiency import META, layers_workspace
from dynslice.exactness import ROWS
from dynslice.models import family_of
from dynslice.plan import SlicePlan

FLOAT32, FLOAT64 = 4, 8


def slicing_workspace(
    config: PretrainedConfig,
    plan: SlicePlan,
    window: int,
    device: torch.device,
    dtype: torch.dtype,
    compensated: bool = False,
) -> int:
    """Bytes on the device at the peak of streamed slicing, signals and finished shards apart.

    The largest of its steps counts: rotating the embedding, running a block on a batch of windows,
    the covariance and its eigenvectors, the regression of a compensation, folding a map.
    """
    with META:
        model = AutoModelForCausalLM.from_config(config)
    layer = model.get_submodule(family_of(config).layers)[0]
    shape = plan.shape
    d, size = shape.hidden_size, dtype.itemsize
    count = max(1, tokens_per_batch(device) // window)
    weights = sum(p.numel() for p in layer.parameters()) * size
    basis = d * d * FLOAT64  # one is held all the time, a second one while a block is folded
    rows = min(ROWS, shape.vocab_size) * d
    maps = [module for module in layer.modules() if isinstance(module, nn.Linear)]
    largest = max(linear.in_features * linear.out_features for linear in maps)
    steps = {
        # A stored table and the changed one; a part of them in float32.
        "tables": basis + 2 * shape.vocab_size * d * size + rows * (FLOAT32 + size),
        "block": weights + basis + d * d * size + layers_workspace(config, dtype, count * window),
        # The covariance, beside a batch in float64.
        "covariance": weights + basis + d * d * FLOAT64 + count * window * d * FLOAT64,
        # The covariance, its eigenvectors in two orders, and what LAPACK needs beside them.
        "eigenvectors": weights + basis + 4 * d * d * FLOAT64,
        "fold": weights + 2 * basis + d * d * FLOAT32 + largest * (2 * FLOAT32 + size),
    }
    if compensated:
        known = max(shape.writes) + d  # inputs of the regression
        system = known * (known + d) * FLOAT64
        steps["block"] += system
        # The products, and a batch of inputs as it is and divided by the size of the stream.
        products = known * known * FLOAT32
        batch = count * window * (known * (size + FLOAT32) + 2 * d * FLOAT32)
        steps["sums"] = weights + basis + system + products + batch
        steps["regression"] = weights + basis + 2 * system
    return max(steps.values())


def largest_weight(config: PretrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of the largest single weight of a model."""
    with META:
        model = AutoModelForCausalLM.from_config(config)
    return max(p.numel() for p in model.parameters()) * dtype.itemsize


def signal_bytes(
    plan: SlicePlan, tokens: int, dtype: torch.dtype, compensated: bool = False
) -> int:
    """Bytes of the residual stream of all calibration tokens.

    A compensation keeps the dense stream too, and what the writing maps of a block are given.
    """
    d = plan.shape.hidden_size
    per_token = 3 * d + max(plan.shape.writes) if compensated else d
    return tokens * per_token * dtype.itemsize


def shown(size: int) -> str:
    """Bytes as a reader would say them."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}" if size < 10 * unit else f"{size / unit:.0f} {name}"
    return f"{size} B"
