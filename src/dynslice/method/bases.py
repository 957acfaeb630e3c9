"""The basis of the stream at each place: its own, or one that a group of places shares."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import groupby

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dynslice.method.activations import Activations, BlockInPlace, centring, run_block
from dynslice.method.architectures import family_of
from dynslice.method.modeling_sliced import subtracts_mean
from dynslice.method.numerics import TINY, RoundingAudit, covariance, spectrum
from dynslice.method.plan import ORIGINAL, SlicePlan

# A module of a model by its name, with its weights on the device as long as the context lasts.
Use = Callable[[str], AbstractContextManager[nn.Module]]


class Bases:
    """The bases of a plan, each from the sliced stream x when x has come to its first place.

    A place of its own has the leading directions of x. A group of places that share a basis looks
    ahead from x: the dense blocks run on a copy without a cut, and the basis has the leading
    directions of the covariances of its places, each over the square root of its trace: between
    weighing every place by its size and weighing all equally.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        plan: SlicePlan,
        x: Activations,
        audit: RoundingAudit,
        arguments: list[dict],
        use: Use,
    ):
        """arguments: what each layer is given next to the stream. use, audit: `sliced_weights`."""
        self._plan, self._x, self._audit, self._use = plan, x, audit, use
        self._arguments, self._family = arguments, family_of(model.config)
        self._centred = centring(model, self._family)
        self._mean_free = subtracts_mean(model.get_submodule(self._family.final_norm))
        self._number, self._basis = None, None

    @property
    def last_start(self) -> int:
        """The last place where the stream decides a basis."""
        bases = [*self._plan.bases]
        return max((bases.index(number) for number in bases if number != ORIGINAL), default=0)

    def at(self, place: int) -> tuple[Tensor, Tensor]:
        """Q [d, w] and R [d, d - w] at a place, in float64; x is the stream there."""
        number, width = self._plan.bases[place], self._plan.place_widths[place]
        if number == ORIGINAL:
            d = self._plan.shape.hidden_size
            self._basis = torch.eye(d, dtype=torch.float64, device=self._x.device)
        elif number != self._number:
            bases, widths = self._plan.bases, self._plan.place_widths
            kept = max(w for w, of in zip(widths, bases, strict=False) if of == number)
            found = spectrum(self._covariance(place), self._mean_free)
            self._basis = self._audit.basis(*found, kept)
        self._number = number
        return self._basis[:, :width], self._basis[:, width:]

    @torch.inference_mode()
    def _covariance(self, place: int) -> Tensor:
        """The sum over the places of a group that starts at this one, which keeps its size."""
        total, bases = covariance(self._x), self._plan.bases
        ahead = [p for p in range(place, len(bases) - 1) if bases[p + 1] == bases[place]]
        if ahead:
            stream, size = self._x.copied(), total.trace()
            for layer, places in groupby(ahead, lambda place: place // len(self._family.blocks)):
                with self._use(f"{self._family.layers}.{layer}") as module:
                    for p in places:
                        run_block(stream, None, self._block(module, p))
                        found = covariance(stream)
                        total += found.mul_((size / found.trace().clamp(min=TINY)).sqrt())
            stream.clear()
        return total

    def _block(self, module: nn.Module, place: int) -> BlockInPlace:
        """The dense block at a place, in its layer."""
        layer, block = divmod(place, len(self._family.blocks))
        arguments = self._arguments[layer]
        return BlockInPlace(module, self._family.blocks[block], arguments, self._centred)
