"""Whole layers dropped by LR: dynamic slicing taken to its end.

LR is one minus the block influence of ShortGPT (arXiv 2403.03853, eq. 1), so the layers of highest
LR go first. The result is an ordinary checkpoint of fewer layers.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dynslice.core.errors import RequestError
from dynslice.core.tensors import evaluating, of_config, with_own_weights
from dynslice.extensions.compensation import Compensation, corrected
from dynslice.method.activations import (
    Activations,
    BlockInPlace,
    centring,
    residual_stream,
    run_block,
)
from dynslice.method.architectures import family_of, require_dense
from dynslice.method.redundancy import layer_redundancy


def highest(lr: Sequence[float], count: int) -> list[int]:
    """The layers of highest LR, in order: all chosen by one look at the dense model.

    Raises RequestError when no layer would be left.
    """
    if not 0 <= count < len(lr):
        raise RequestError(f"{count} of {len(lr)} layers cannot be dropped; leave at least one")
    return sorted(sorted(range(len(lr)), key=lambda i: -lr[i])[:count])


def one_by_one(model: PreTrainedModel, windows: Tensor, count: int) -> list[int]:
    """The same, with LR measured anew on what is left after each layer (IteRABRe's loop)."""
    kept = list(range(model.config.num_hidden_layers))
    highest(kept, count)  # refuses a count that leaves nothing
    for _ in range(count):
        lr = layer_redundancy(of_layers(model, kept), windows).lr
        kept.pop(lr.index(max(lr)))
    return sorted({*range(model.config.num_hidden_layers)} - {*kept})


def chosen(model: PreTrainedModel, windows: Tensor, count: int, again: bool = False) -> list[int]:
    """The layers that go, in order; again: with LR measured anew after each."""
    if again:
        return one_by_one(model, windows, count)
    return highest(layer_redundancy(model, windows).lr, count)


def within(model: PreTrainedModel, budget: int) -> int:
    """How many layers have to go for a model to store at most so many parameters.

    Raises RequestError where one layer alone is more.
    """
    stored = sum(p.numel() for p in model.parameters())
    layers = model.get_submodule(family_of(model.config).layers)
    each = sum(p.numel() for p in layers[0].parameters())
    count = max(0, -(-(stored - budget) // each))
    if count >= len(layers):
        raise RequestError(
            f"{budget} parameters are fewer than the {stored - (len(layers) - 1) * each} of a "
            "single layer with embedding and head; give a larger size"
        )
    return count


def drop_layers(
    model: PreTrainedModel,
    dropped: Sequence[int],
    windows: Tensor | None = None,
    compensation: Compensation | None = None,
) -> PreTrainedModel:
    """The model without some layers, in evaluation mode; the dense one is left as it was.

    compensation: refit what the layer before each dropped span writes, so that the stream there
    comes near to what the dense model has behind the span; on token windows [n, T]. Nothing stands
    before a span that starts at layer 0; its `chosen` has the ridge of each other span. Raises
    RequestError for a sliced model.
    """
    require_dense(model.config, "dropping layers")
    kept = [i for i in range(model.config.num_hidden_layers) if i not in {*dropped}]
    added = _span_maps(model, windows, kept, compensation) if compensation else {}
    return with_own_weights(of_layers(model, kept, added))


def of_layers(
    model: PreTrainedModel, kept: Sequence[int], added: dict[str, Tensor] | None = None
) -> PreTrainedModel:
    """A model of some of the layers, whose weights it shares but where something is added."""
    layers, config = family_of(model.config).layers, copy.deepcopy(model.config)
    config.num_hidden_layers = len(kept)
    if types := getattr(config, "layer_types", None):
        config.layer_types = [types[i] for i in kept]
    weights = {**model.state_dict()}
    for name, more in (added or {}).items():
        weights[name] = (weights[name].float() + more.float()).to(weights[name].dtype)
    places = {f"{layers}.{old}.": f"{layers}.{new}." for new, old in enumerate(kept)}
    renamed = {}
    for name, weight in weights.items():
        if not name.startswith(f"{layers}."):
            renamed[name] = weight
        for old, new in places.items():
            if name.startswith(old):
                renamed[new + name.removeprefix(old)] = weight
    return of_config(model, config, renamed)


@torch.no_grad()
def _span_maps(
    model: PreTrainedModel, windows: Tensor, kept: list[int], compensation: Compensation
) -> dict[str, Tensor]:
    """What is added to the maps that write before each dropped span, by the name of the weight."""
    family = family_of(model.config)
    layers, centred = model.get_submodule(family.layers), centring(model, family)
    h, added = Activations(model.device), {}
    compensation.chosen.clear()
    nothing = torch.zeros(model.config.hidden_size, 0, device=model.device)
    with evaluating(model):
        arguments = residual_stream(model, windows, h)
        x = h.copied()

        def past(stream: Activations, layer: int, count: int | None = None) -> None:
            for block in family.blocks[:count]:
                here = BlockInPlace(layers[layer], block, arguments[layer], centred)
                run_block(stream, None, here)

        for i in range(kept[0]):
            past(h, i)
        for i, following in zip(kept, [*kept[1:], len(layers)], strict=True):
            for layer in range(i, following):
                past(h, layer)
            if following == i + 1:
                past(x, i)
                continue
            past(x, i, -1)
            last = BlockInPlace(layers[i], family.blocks[-1], arguments[i], centred)
            _, maps = corrected(h, compensation, x, nothing, nothing, last, False)
            added |= {f"{family.layers}.{i}.{name}.weight": D for name, D in maps.items()}
    return added
