"""Memory, bytes and operations of slicing and of a network, counted without weights."""

import copy
import math
import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from dynslice.core.tensors import tokens_per_batch
from dynslice.method.architectures import family_of
from dynslice.method.numerics import ROWS
from dynslice.method.plan import SlicePlan

FLOAT32, FLOAT64 = 4, 8


def slicing_workspace(
    config: PretrainedConfig,
    plan: SlicePlan,
    window: int,
    device: torch.device,
    dtype: torch.dtype,
    compensated: bool = False,
) -> int:
    """Bytes on the device at the peak of streamed slicing, without activations and finished shards.

    The largest of its steps counts.
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
    block = layers_workspace(config, dtype, count * window)
    steps = {
        # A stored table and the changed one; a part of them in float32.
        "tables": basis + 2 * shape.vocab_size * d * size + rows * (FLOAT32 + size),
        "block": weights + basis + d * d * size + block,
        # The covariance, and a batch in float64.
        "covariance": weights + basis + d * d * FLOAT64 + count * window * d * FLOAT64,
        # The covariance, its eigenvectors in two orders, and what LAPACK needs besides.
        "eigenvectors": weights + basis + 4 * d * d * FLOAT64,
        "fold": weights + 2 * basis + d * d * FLOAT32 + largest * (2 * FLOAT32 + size),
    }
    if plan.layout.shares_bases:
        # The layer that is run, the one before it, and the covariance of the group so far.
        steps["ahead"] = 2 * weights + basis + d * d * FLOAT64 + block
        steps["covariance"] += d * d * FLOAT64
    if compensated:
        known = _most_regressed(plan)
        system = 2 * known * (known + d) * FLOAT64  # of two halves of the windows
        steps["block"] += system
        # The products, and a batch of inputs as it is and divided by the size of the stream.
        products = known * known * FLOAT32
        batch = count * window * (known * (size + FLOAT32) + 2 * d * FLOAT32)
        steps["sums"] = weights + basis + system + products + batch
        # A ridge is tried on halves in float32; the solution has a factor and a right side.
        steps["choice"] = weights + basis + system + 5 * known * known * FLOAT32
        steps["regression"] = weights + basis + system + known * (known + d) * FLOAT64
    return max(steps.values())


def largest_weight(config: PretrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of the largest single weight of a model."""
    with META:
        model = AutoModelForCausalLM.from_config(config)
    return max(p.numel() for p in model.parameters()) * dtype.itemsize


def activation_bytes(
    plan: SlicePlan, tokens: int, dtype: torch.dtype, compensated: bool = False
) -> int:
    """Bytes of the residual stream of all calibration tokens.

    A compensation keeps the dense stream too, and what the writing maps of a block are given. A
    group of places that share a basis looks ahead on a copy.
    """
    d = plan.shape.hidden_size
    kept = 2 * d if compensated else d
    extra = _most_regressed(plan) if compensated else 0
    ahead = d * plan.layout.shares_bases  # before a block runs, so not next to its inputs
    return tokens * (kept + max(extra, ahead)) * dtype.itemsize


def _most_regressed(plan: SlicePlan) -> int:
    """Inputs of the largest regression of a compensation: of writing maps, and of a shortcut."""
    writes, widths = plan.shape.writes, plan.place_widths
    return max(
        writes[place % len(writes)] + has_shortcut * widths[place]
        for place, has_shortcut in enumerate(plan.shortcuts)
    )


def shown_bytes(size: int) -> str:
    """Bytes as a reader would say them."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}" if size < 10 * unit else f"{size / unit:.0f} {name}"
    return f"{size} B"


META = torch.device("meta")


def flops(config: PretrainedConfig, batch: int, length: int, head: bool = True) -> int:
    """Floating-point operations of one pass over token ids [batch, length], counted by torch.

    head: with the logits of the last position of each row.
    """
    step = _imagined(config, torch.float32, batch, length, head)
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def layers_workspace(config: PretrainedConfig, dtype: torch.dtype, tokens: int) -> int:
    """Bytes that a pass of tokens through the layers takes, without weights and the first stream.

    Counted in rows of 16 tokens, as attention that never holds its scores takes them.
    """
    rows, few = math.ceil(tokens / 16), copy.deepcopy(config)
    few.num_hidden_layers = min(2, config.num_hidden_layers)  # one after the other: no more at once
    stream = rows * 16 * config.hidden_size * dtype.itemsize
    step = _imagined(few, dtype, rows, 16, head=False)
    with _FusedAttention():
        return extra_memory(step, META) - stream


class _FusedAttention(TorchFunctionMode):
    """Attention as one operation, as devices have it; the meta device takes it apart in float32."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is nn.functional.scaled_dot_product_attention:
            query, _, value = args[:3]
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return function(*args, **(kwargs or {}))


def _imagined(
    config: PretrainedConfig, dtype: torch.dtype, batch: int, length: int, head: bool
) -> Callable[[], None]:
    """A pass over token ids [batch, length] through a model without storage."""
    with META:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        ids = torch.zeros(batch, length, dtype=torch.long)
        # Given, because making one reads values; OPT reads its positions off the mask.
        mask = torch.zeros(batch, 1, length, length, dtype=dtype)
        given = {"attention_mask": mask, "position_ids": ids, "use_cache": False}

    @torch.no_grad()
    def step() -> None:
        if head:
            model(ids, logits_to_keep=1, **given)
        else:
            model.base_model(ids, **given)

    return step


def stored_bytes(model: PreTrainedModel) -> int:
    """Bytes of the weights, a tied matrix once."""
    return sum(parameter.nbytes for parameter in model.parameters())


def decode_bytes(model: PreTrainedModel) -> int:
    """Bytes of weights that one decoded token reads: all but an untied embedding."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return stored_bytes(model) - (0 if embedding is head else embedding.nbytes)


def extra_memory(step: Callable, device: torch.device) -> int:
    """Bytes of tensors that a call makes and holds at its peak, on top of what was there before.

    On a GPU by torch's allocator; elsewhere counted. On the meta device: what a call would take.
    """
    if device.type == "cuda":
        held = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device) - held
    with _TensorCount(device.type) as count:
        step()
    return count.peak


class _TensorCount(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, as long as they live."""

    def __init__(self, device_type: str):
        super().__init__()
        self.device_type = device_type
        self.alive = self.peak = 0
        self.known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        known_before = tree_leaves((args, kwargs))
        result = operation(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in known_before if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage.device.type == self.device_type and storage not in self.known:
            self.known[storage] = True
            weakref.finalize(storage, self._drop, storage.nbytes())
            self.alive += storage.nbytes()
            self.peak = max(self.peak, self.alive)

    def _drop(self, size: int) -> None:
        self.alive -= size
