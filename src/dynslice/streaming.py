"""Slicing a model that is never in memory as a whole: read layer by layer, written shard by shard.

Only the current layer's weights, its workspace and the signals that fit are on the device; other
signals are in host memory or on disk (`signals`). Weights come lazily from safetensors.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save

from dynslice import files, memory, models
from dynslice.compensation import Compensation
from dynslice.errors import RequestError, in_one_line
from dynslice.exactness import Exactness
from dynslice.memory import shown
from dynslice.models import INDEX
from dynslice.plan import SlicePlan
from dynslice.signals import Signals
from dynslice.slicing import Sliced, check_plan, empty_sliced, sliced_weights

LARGEST_SHARD = 5 * 2**30


@dataclass(frozen=True)
class Budget:
    """Bytes that slicing may take, None for no limit; the Python process itself comes on top.

    On a CPU only `host` counts: the device is the host.
    """

    device: int | None = None
    host: int | None = None


def slice_to(
    folder: Path,
    model: str,
    windows: Tensor,
    plan: SlicePlan,
    device: torch.device,
    dtype: torch.dtype,
    revision: str | None = None,
    budget: Budget = Budget(),
    compensation: Compensation | None = None,
) -> Sliced:
    """Slice a saved model into `folder`, which appears complete or not at all.

    The same tensors as `slicing.slice_model` makes, but no model: load it from `folder`.
    Raises RequestError as `slice_model` does, for a budget that one layer and its workspace
    exceed, and for a model without safetensors.
    """
    start = time.perf_counter()
    source = Source(model, device, dtype, revision)
    check_plan(source.model.config, plan)
    room = _rooms(source.model, plan, windows, device, budget, compensation is not None)
    with files.appearing(folder) as unfinished:
        x = Signals(device, room["device"], room["host"], unfinished.parent)
        empty = empty_sliced(source.model, plan).to(dtype)
        shards = ShardWriter(unfinished, empty, room["shard"])
        exactness = Exactness()
        made = (source.model, windows, plan, x, exactness, source.use, compensation)
        for name, tensor in sliced_weights(*made):
            shards.add(name, tensor)
        shards.finish()
        empty.config.architectures = [type(empty).__name__]
        custom_object_save(empty, unfinished, config=empty.config)
        empty.config.save_pretrained(unfinished)
        empty.generation_config.save_pretrained(unfinished)
        models.load_tokenizer(model, revision).save_pretrained(unfinished)
    models.synchronise(device)
    errors = exactness.rotation_error, exactness.basis_error
    return Sliced(None, time.perf_counter() - start, *errors)


class Source:
    """A model without weights, and its checkpoint from which they come when they are used."""

    def __init__(
        self, name: str, device: torch.device, dtype: torch.dtype, revision: str | None = None
    ):
        config = models.load_config(name, revision)
        models.require_dense(config, "slicing")
        self.name, self.device, self.dtype = name, device, dtype
        self._files = _weight_files(name, revision)
        with init_empty_weights(include_buffers=False), models.quiet():
            self.model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        for module in self.model.modules():
            for key, buffer in module.named_buffers(recurse=False):
                setattr(module, key, buffer.to(device))
        for key, _ in self.model.named_parameters():
            self._stored_name(key)  # refuses a checkpoint that lacks a weight before any work
        self.model.generation_config = _generation_config(name, revision, self.model)

    @contextmanager
    def use(self, path: str) -> Iterator[nn.Module]:
        """A module by its name, with its weights on the device until the context ends."""
        module = self.model.get_submodule(path)
        names = [name for name, _ in module.named_parameters()]
        try:
            for name, weight in zip(names, self._read([f"{path}.{n}" for n in names]), strict=True):
                set_module_tensor_to_device(module, name, self.device, weight)
            yield module
        finally:
            for name in names:
                set_module_tensor_to_device(module, name, "meta")

    def _read(self, names: list[str]) -> Iterator[Tensor]:
        for name in names:
            stored = self._stored_name(name)
            try:
                with safe_open(self._files[stored], framework="pt") as file:
                    # A copy: products of memory that a file is mapped to round differently.
                    weight = file.get_tensor(stored).to(self.device, self.dtype, copy=True)
            except (OSError, SafetensorError) as error:
                raise RequestError(_broken(self._files[stored], error)) from error
            models.check_weight(weight, stored, self.name)
            wanted = self.model.get_parameter(name).shape
            if weight.shape != wanted:
                raise RequestError(
                    f"weight {stored} of model {self.name!r} is of shape {list(weight.shape)}, its "
                    f"config.json asks for {list(wanted)}; save the model anew with transformers"
                )
            yield weight

    def _stored_name(self, name: str) -> str:
        """The name of a weight in the checkpoint: a tied head is the embedding."""
        prefix = f"{self.model.base_model_prefix}."
        tied = (self.model.config.tie_word_embeddings and name == "lm_head.weight") or None
        family = models.family_of(self.model.config)
        every = [name, tied and f"{family.embedding}.weight"]
        for candidate in filter(None, every):
            for spelling in (candidate, candidate.removeprefix(prefix)):
                if spelling in self._files:
                    return spelling
        raise RequestError(
            f"the checkpoint holds no weight {name!r}; load the model with transformers and save "
            "it anew, or slice it without streaming"
        )


class ShardWriter:
    """Writes the weights of a network as they come, each shard when it is complete."""

    def __init__(self, folder: Path, empty: PreTrainedModel, shard_bytes: int):
        self.folder = folder
        split = split_torch_state_dict_into_shards(
            empty.state_dict(),
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
            models.free_memory()

    def finish(self) -> None:
        """Write the index of the shards, where there are several."""
        assert not self._pending, "a weight of the network was not made"
        if len(self._files) > 1:
            (self.folder / INDEX).write_text(json.dumps(self._index, indent=1), encoding="utf-8")


def _rooms(
    model: PreTrainedModel,
    plan: SlicePlan,
    windows: Tensor,
    device: torch.device,
    budget: Budget,
    compensated: bool,
) -> dict[str, int | None]:
    """Bytes for signals on the device and in host memory, and of a shard, within a budget."""
    window, dtype = windows.shape[1], model.dtype
    workspace = memory.slicing_workspace(model.config, plan, window, device, dtype, compensated)
    on_cpu = device.type == "cpu"
    limit = budget.host if on_cpu else budget.device
    shard = LARGEST_SHARD
    if budget.host is not None:  # a shard is held twice while it is written
        shard = max(budget.host // 10, memory.largest_weight(model.config, dtype))
    needed = workspace + (2 * shard if on_cpu and budget.host is not None else 0)
    if limit is not None and limit < needed:
        raise RequestError(
            f"a {'host' if on_cpu else 'device'} memory of {shown(limit)} is less than the "
            f"{shown(needed)} that one layer and its workspace take; give at least that, or "
            "a smaller --window"
        )
    rooms = {"device": limit and limit - needed, "host": budget.host, "shard": shard}
    if budget.host is not None and not on_cpu:
        rooms["host"] = max(0, budget.host - 2 * shard)
    return rooms


def _weight_files(name: str, revision: str | None) -> dict[str, Path]:
    """The safetensors file of each stored weight."""
    folder = Path(models.resolve(name, revision))
    if not folder.is_dir():
        patterns = ["model*.safetensors", "model*.safetensors.index.json"]
        try:
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
        except Exception as error:  # of the network, in the middle of a download
            raise RequestError(
                f"the weights of model {name!r} could not be had from the hub; give the same "
                "command again, what was downloaded is kept"
            ) from error
    return models.weight_files(folder, name)


def _broken(path: Path, error: Exception) -> str:
    reason = in_one_line(error)
    return f"the weights in {path.name} cannot be read ({reason}); save the model anew"


def _generation_config(name: str, revision: str | None, model: PreTrainedModel) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(models.resolve(name, revision), revision=revision)
    except Exception:  # it is optional
        return model.generation_config
