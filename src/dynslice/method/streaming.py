"""Slicing a model that is never in memory as a whole: read layer by layer, written shard by shard.

Only the current layer's weights, its workspace and the activations that fit are on the device;
others are in host memory or on disk (`activations`). Weights come lazily from safetensors.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from dynslice.core import files
from dynslice.core.errors import RequestError
from dynslice.core.tensors import free_memory, synchronise
from dynslice.method.activations import Activations
from dynslice.method.architectures import check_plan, empty_sliced
from dynslice.method.bases import Use
from dynslice.method.footprint import largest_weight, shown_bytes, slicing_workspace
from dynslice.method.numerics import RoundingAudit
from dynslice.method.plan import SlicePlan
from dynslice.method.slicing import Sliced, Step, sliced_weights

LARGEST_SHARD = 5 * 2**30


class OpenCheckpoint(Protocol):
    """A model without weights, which come from its checkpoint when they are used."""

    model: PreTrainedModel
    device: torch.device
    dtype: torch.dtype
    use: Use


@dataclass(frozen=True)
class Budget:
    """Bytes that slicing may take, None for no limit; the Python process itself comes on top.

    On a CPU only `host` counts: the device is the host.
    """

    device: int | None = None
    host: int | None = None


def slice_to(
    folder: Path,
    checkpoint: OpenCheckpoint,
    tokenizer: PreTrainedTokenizerBase,
    windows: Tensor,
    plan: SlicePlan,
    budget: Budget = Budget(),
    start: Callable[[Activations], Step] | None = None,
    dtype: torch.dtype | None = None,
) -> Sliced:
    """Slice a saved model into `folder`, which appears complete or not at all.

    checkpoint: an open one (`inputs.checkpoints`). start: see `sliced_weights`. dtype: of what is
    written, that of the checkpoint by default. The same tensors as
    `slicing.slice_model` makes, but no model: load it from `folder`. Raises RequestError as
    `slice_model` does, and for a budget that one layer and its workspace exceed.
    """
    began, model, device = time.perf_counter(), checkpoint.model, checkpoint.device
    check_plan(model.config, plan)
    room = _rooms(model, plan, windows, device, budget, compensated=start is not None)
    audit = RoundingAudit(dtype or checkpoint.dtype)
    with files.appearing(folder) as unfinished:
        x = Activations(device, room["device"], room["host"], unfinished.parent)
        empty = empty_sliced(model, plan).to(audit.dtype)
        shards = ShardWriter(unfinished, empty, room["shard"])
        weights = sliced_weights(model, windows, plan, x, audit, start, checkpoint.use)
        count = len(dict(empty.named_parameters()))
        for weight in tqdm(weights, "slicing", count, unit="weight", leave=False):
            shards.add(*weight)
        shards.finish()
        audit.check(plan.shape.hidden_size)
        empty.config.architectures, empty.config.dtype = [type(empty).__name__], audit.dtype
        if not plan.layout.plain:
            custom_object_save(empty, unfinished, config=empty.config)
        empty.config.save_pretrained(unfinished)
        empty.generation_config.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
    synchronise(device)
    return Sliced(None, plan, time.perf_counter() - began, **audit.found)


class ShardWriter:
    """Writes the weights of a network as they come, each shard when it is complete."""

    def __init__(self, folder: Path, empty: PreTrainedModel, shard_bytes: int):
        self.folder = folder
        split = split_torch_state_dict_into_shards(
            dict(empty.named_parameters()),  # a table with two names once
            max_shard_size=shard_bytes,
            filename_pattern="model{suffix}.safetensors",
        )
        self._files = dict(split.filename_to_tensors)
        self._index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        self._pending: dict[str, dict[str, Tensor]] = {file: {} for file in self._files}

    def add(self, name: str, weight: Tensor) -> None:
        """Take a weight; it is on disk when the last one of its shard has come."""
        file = self._index["weight_map"][name]
        self._pending[file][name] = weight.to("cpu")
        if len(self._pending[file]) == len(self._files[file]):
            save_file(self._pending.pop(file), self.folder / file, metadata={"format": "pt"})
            free_memory()

    def finish(self) -> None:
        """Write the index of the shards, where there are several."""
        assert not self._pending, "a weight of the network was not made"
        if len(self._files) > 1:
            index = self.folder / SAFE_WEIGHTS_INDEX_NAME
            index.write_text(json.dumps(self._index, indent=1), encoding="utf-8")


def _rooms(
    model: PreTrainedModel,
    plan: SlicePlan,
    windows: Tensor,
    device: torch.device,
    budget: Budget,
    compensated: bool,
) -> dict[str, int | None]:
    """Bytes for activations on the device and in host memory, and of a shard, within a budget."""
    window, dtype = windows.shape[1], model.dtype
    workspace = slicing_workspace(model.config, plan, window, device, dtype, compensated)
    on_cpu = device.type == "cpu"
    limit = budget.host if on_cpu else budget.device
    shard = LARGEST_SHARD
    if budget.host is not None:  # a shard is held twice while it is written
        shard = max(budget.host // 10, largest_weight(model.config, dtype))
    needed = workspace + (2 * shard if on_cpu and budget.host is not None else 0)
    if limit is not None and limit < needed:
        raise RequestError(
            f"a {'host' if on_cpu else 'device'} memory of {shown_bytes(limit)} is less than the "
            f"{shown_bytes(needed)} that one layer and its workspace take; give at least that, or "
            "a smaller --window"
        )
    rooms = {"device": limit and limit - needed, "host": budget.host, "shard": shard}
    if budget.host is not None and not on_cpu:
        rooms["host"] = max(0, budget.host - 2 * shard)
    return rooms
