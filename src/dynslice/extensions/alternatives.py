"""What a user would pick instead of slicing: methods of one signature.

Each makes a model that stores at most `budget` parameters from a dense one, by what token windows
[n, T] of a calibration text show. The result is an ordinary checkpoint, and the dense model is left
as it was. Each raises RequestError for a budget that it can't keep.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from dynslice.core.errors import RequestError
from dynslice.extensions import layers, neurons
from dynslice.extensions.compensation import Compensation


@dataclass(frozen=True)
class Smaller:
    """A smaller model, and which of its parts are gone: layers by number, a share of neurons."""

    model: PreTrainedModel
    dropped_layers: tuple[int, ...] = ()
    dropped_neurons: float = 0.0


def fewer_layers(
    model: PreTrainedModel,
    windows: Tensor,
    budget: int,
    one_by_one: bool = False,
    mapped: bool = False,
) -> Smaller:
    """Without the layers of highest LR.

    one_by_one: LR is measured anew after each. mapped: what writes the stream before a dropped span
    is refitted towards the stream behind it.
    """
    dropped = layers.chosen(model, windows, layers.within(model, budget), one_by_one)
    compensation = Compensation() if mapped else None
    return Smaller(layers.drop_layers(model, dropped, windows, compensation), tuple(dropped))


def fewer_neurons(model: PreTrainedModel, windows: Tensor, budget: int) -> Smaller:
    """With so few neurons in each MLP, those of highest leverage, that the budget is kept."""
    share = neurons.share_within(model, budget)
    narrower = neurons.drop_neurons(model, windows, share)
    return Smaller(narrower, dropped_neurons=share)


METHODS: dict[str, Callable[..., Smaller]] = {"layers": fewer_layers, "neurons": fewer_neurons}


def smaller(
    model: PreTrainedModel, windows: Tensor, budget: int, method: str, **settings: bool
) -> Smaller:
    """A smaller model by the method of that name. Raises RequestError for an unknown one."""
    if method not in METHODS:
        raise RequestError(f"method {method!r} is unknown; there are {', '.join(METHODS)}")
    return METHODS[method](model, windows, budget, **settings)
