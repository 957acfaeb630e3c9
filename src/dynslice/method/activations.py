"""The residual stream of the calibration tokens, kept where there is room for it."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from dynslice.core.tensors import batches, opened
from dynslice.method.architectures import family_of
from dynslice.method.modeling_sliced import Block, Family, block_output, subtracts_mean


class Activations:
    """Batches of hidden states [b, T, d]: on the device, then in host memory, then on disk.

    Budgets are in bytes, None is no limit; on a CPU that of the device counts. A batch that fits
    into neither goes to a file in `folder`. Iterating gives every batch on the device.
    """

    def __init__(
        self,
        device: torch.device,
        device_budget: int | None = None,
        host_budget: int | None = None,
        folder: Path | None = None,
    ):
        self.device = device
        host = 0 if device.type == "cpu" else host_budget
        self._room = {"device": device_budget, "host": host}  # what is left of it
        self._scratch, self._folder = None, folder
        self._batches: list[Tensor | Path] = []
        self._places: list[str] = []

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self._batches:
            yield self._fetch(batch)

    def empty_store(self) -> "Activations":
        """An empty store that shares the budgets of this one."""
        other = Activations(self.device, folder=self._folder)
        other._room = self._room
        return other

    def copied(self) -> "Activations":
        """The same batches in a store that shares the budgets."""
        other = self.empty_store()
        for batch in self:
            other.append(batch.clone())
        return other

    def clear(self) -> None:
        """Let go of every batch, and give its room back."""
        for batch, where in zip(self._batches, self._places, strict=True):
            if isinstance(batch, Path):
                batch.unlink()
            elif self._room[where] is not None:
                self._room[where] += batch.nbytes
        self._batches, self._places = [], []

    def append(self, batch: Tensor) -> None:
        """Keep one more batch, in the nearest place that has room."""
        fits = [at for at, room in self._room.items() if room is None or batch.nbytes <= room]
        where = (*fits, "disk")[0]
        if where != "disk" and self._room[where] is not None:
            self._room[where] -= batch.nbytes
        self._places.append(where)
        if where == "device":
            self._batches.append(batch)
        elif where == "host":
            self._batches.append(batch.to("cpu").pin_memory())
        else:
            if self._scratch is None:
                self._scratch = tempfile.TemporaryDirectory(
                    dir=self._folder, prefix=".activations-"
                )
            path = Path(self._scratch.name) / f"{len(self._batches)}.safetensors"
            self._write(path, batch)
            self._batches.append(path)

    def update(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace each batch by what `change` makes of it; it may work in place."""
        for i, kept in enumerate(self._batches):
            batch = change(self._fetch(kept))
            if isinstance(kept, Path):
                self._write(kept, batch)
            elif kept.device != batch.device:
                kept.copy_(batch)
            else:
                self._batches[i] = batch

    def _fetch(self, kept: Tensor | Path) -> Tensor:
        if isinstance(kept, Path):
            with opened(kept, "a part of the activations") as file:
                return file.get_tensor("x").to(self.device, copy=True)  # it will be replaced
        return kept.to(self.device, non_blocking=True)

    @staticmethod
    def _write(path: Path, batch: Tensor) -> None:
        unfinished = path.with_suffix(".new")
        save_file({"x": batch.to("cpu").contiguous()}, unfinished)
        unfinished.replace(path)


def centring(model: PreTrainedModel, family: Family) -> Callable[[Tensor], Tensor]:
    """x [.., d] less its mean over d where the family's norms take it away, else x itself."""
    if not subtracts_mean(model.get_submodule(family.final_norm)):
        return lambda x: x
    return lambda x: x - x.mean(dim=-1, keepdim=True)


class _Caught(Exception):
    """Stops a forward pass."""


@torch.inference_mode()
def residual_stream(model: PreTrainedModel, windows: Tensor, x: Activations) -> list[dict]:
    """Fill x with what enters layer 0, [b, T, d]; the other arguments of each layer, by layer.

    No layer runs. Masks and positions are those of a single window, and broadcast over a batch.
    """
    family = family_of(model.config)
    layers = model.get_submodule(family.layers)
    centred = centring(model, family)
    arguments: list[dict] = []

    def pass_on(hidden_states: Tensor, **kwargs) -> Tensor:
        arguments.append(kwargs)
        if len(arguments) == len(layers):
            raise _Caught
        return hidden_states

    def catch(hidden_states: Tensor, **kwargs) -> None:
        x.append(centred(hidden_states))
        raise _Caught

    def forward(ids: Tensor) -> None:
        with suppress(_Caught):
            model.base_model(ids, use_cache=False)

    try:
        for layer in layers:
            layer.forward = pass_on
        forward(windows[:1].to(x.device))
        layers[0].forward = catch
        for batch in batches(windows, "embedding", x.device):
            forward(batch)
    finally:
        for layer in layers:
            del layer.forward
    return arguments


@dataclass(frozen=True)
class BlockInPlace:
    """A block of a dense layer with the layer's other arguments, as a function of the stream."""

    layer: nn.Module
    block: Block
    arguments: dict
    centred: Callable[[Tensor], Tensor]

    def __call__(self, stream: Tensor) -> Tensor:
        """x [b, T, d] -> what the block adds to it."""
        return self.centred(block_output(self.layer, self.block, stream, self.arguments))


@torch.inference_mode()
def run_block(x: Activations, R: Tensor | None, block: BlockInPlace) -> None:
    """In place, batch by batch: x <- x P + block(x P) with P = Q Q^T = 1 - R R^T; 1 without R.

    R [d, d - w] holds the directions that are cut, which are the fewer. x stays in the original
    coordinates. The projected stream has the same RMS (divisor d) as its w coordinates in the
    sliced network, so the dense block computes here what the sliced block will compute there.
    """

    def past(stream: Tensor) -> Tensor:
        if R is not None:
            cut = R.to(stream.dtype)
            stream -= stream @ cut @ cut.T
        stream += block(stream)
        return stream

    x.update(past)
