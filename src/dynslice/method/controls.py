"""Plans to compare with: of equal size, of one layer, in random order, with the embedding apart."""

from dataclasses import replace

import numpy as np

from dynslice.core.errors import RequestError
from dynslice.method.plan import ModelDims, SlicePlan, check_request, constant


def matched(plan: SlicePlan) -> SlicePlan:
    """The constant plan of equal stored parameters, as near as the rounding allows.

    The first layer also sets the width of the embedding; where its step is too coarse to come
    within 0.05 %, that layer alone is rounded the other way.
    """
    check_request(plan.shape, 0.0, 0.0, plan.round_to)

    def miss(candidate: SlicePlan) -> int:
        return abs(candidate.parameters - plan.parameters)

    even = _nearest(plan, 0.0)
    if miss(even) <= 5e-4 * plan.parameters:
        return even
    return min(even, _nearest(plan, 0.49), _nearest(plan, -0.49), key=miss)


def single(shape: ModelDims, layer: int, slice_percentage: float, round_to: int = 8) -> SlicePlan:
    """One layer cut by a share, all others whole; the embedding stays whole too.

    So layer 0 is cut before its MLP only. Raises RequestError for no such layer.
    """
    check_request(shape, slice_percentage, slice_percentage, round_to)
    if layer not in range(shape.layers):
        raise RequestError(f"layer {layer} is outside 0 to {shape.layers - 1}; count from 0")
    cut = constant(shape, slice_percentage, round_to).widths[0]
    d = shape.hidden_size
    return SlicePlan(
        schedule="single",
        slice_percentage=slice_percentage / shape.layers,
        slice_base=0.0,
        round_to=round_to,
        final_slice=tuple(slice_percentage * (i == layer) for i in range(shape.layers)),
        widths=tuple(cut if i == layer else d for i in range(shape.layers)),
        shape=shape,
        own_attention=tuple(cut if i == layer > 0 else d for i in range(shape.layers)),
    )


def shuffled(plan: SlicePlan, seed: int, keep_first: bool = False) -> SlicePlan:
    """The widths of a plan in a random order of layers; the embedding keeps its own.

    The control of a schedule: nearly equal stored parameters, without regard to the layer.
    keep_first: the first layer keeps its width, which decides more than all others.
    """
    kept = np.arange(int(keep_first))
    moved = np.random.default_rng(seed).permutation(plan.shape.layers - len(kept)) + len(kept)
    order = [*kept.tolist(), *moved.tolist()]
    return replace(
        plan,
        schedule="shuffled",
        final_slice=tuple(plan.final_slice[i] for i in order),
        widths=(widths := tuple(plan.widths[i] for i in order)),
        own_attention=(plan.attention_widths[0], *widths[1:]),
    )


def with_embedding(plan: SlicePlan, embedding_slice: float) -> SlicePlan:
    """The plan with an embedding of its own width, d (1 - embedding_slice) rounded."""
    shape, round_to = plan.shape, plan.round_to
    check_request(shape, embedding_slice, embedding_slice, round_to)
    width = round(shape.hidden_size * (1 - embedding_slice) / round_to) * round_to
    return replace(plan, own_attention=(width, *plan.attention_widths[1:]))


def _nearest(plan: SlicePlan, phase: float) -> SlicePlan:
    shape = plan.shape
    total_units = shape.layers * shape.hidden_size // plan.round_to

    def with_units(units: int) -> SlicePlan:
        return constant(shape, 1 - units / total_units, plan.round_to, phase, plan.layout)

    low, high = shape.layers, total_units  # parameters grow with the units: bisect
    while high - low > 1:
        middle = (low + high) // 2
        if with_units(middle).parameters <= plan.parameters:
            low = middle
        else:
            high = middle
    return min(map(with_units, (low, high)), key=lambda p: abs(p.parameters - plan.parameters))
