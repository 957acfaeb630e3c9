"""Schedules at equal size: from what is known of a model and a budget of parameters to a plan.

Each schedule is given the same budget of stored parameters, and none exceeds it. What a layout of
shared bases or of one table saves goes into the widths.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dynslice.core.errors import RequestError
from dynslice.method import plan
from dynslice.method.controls import with_embedding
from dynslice.method.layout import PUBLISHED, Layout
from dynslice.method.plan import ModelDims, SlicePlan


@dataclass(frozen=True)
class Evidence:
    """What is known of a model: the shape, and LR [layers]. slice_base: SB of schedules by LR."""

    shape: ModelDims
    round_to: int = 8
    lr: Sequence[float] | None = None
    layout: Layout = PUBLISHED
    slice_base: float = 0.0


# Plans by the share that is cut: of what is known of the model, and a share.


def _constant(known: Evidence, share: float) -> SlicePlan:
    """All layers equally (SliceGPT)."""
    return plan.constant(known.shape, share, known.round_to, layout=known.layout)


def _lr(known: Evidence, share: float) -> SlicePlan:
    """The paper's slices, with the SP that keeps the budget."""
    given = max(share, known.slice_base), known.slice_base, known.round_to, known.layout
    return plan.dynamic(known.shape, known.lr, *given)


def entropic_slices(
    lr: Sequence[float], share: float, slice_base: float, limit: float
) -> tuple[float, ...]:
    """FS_i in proportion to exp(LR_i / eps), with mean(FS) = share and none above `limit`.

    To first order in LR_i - mean(LR) this is the paper's rule, where
    eps = share (mean(LR) - min(LR)) / (share - SB): SB is a temperature, and at SB = share all
    slices are alike. (MoDeGPT, arXiv 2408.09632, allocates by such a softmax.)
    """
    values = np.array(lr)
    scale = share * (values.mean() - values.min())
    if scale <= 0 or share <= slice_base:
        return (share,) * len(lr)
    heat = (share - slice_base) / scale * (values - values.max())
    return plan.final_slices(np.exp(heat).tolist(), share, 0.0, limit)


def _entropic(known: Evidence, share: float) -> SlicePlan:
    """Slices by a softmax of LR, with the mean that keeps the budget."""
    d, unit, base = known.shape.hidden_size, known.round_to, known.slice_base
    plan.check_request(known.shape, max(share, base), base, unit)
    slices = entropic_slices(known.lr, share, base, 1 - unit / d)
    widths = plan.rounded_widths(slices, d, unit)
    given = share, min(share, base), unit, slices, widths, known.shape
    return SlicePlan("entropic", *given, layout=known.layout)


def _embedding(known: Evidence, share: float) -> SlicePlan:
    """The embedding whole, and all places after it equally."""
    return with_embedding(_constant(known, share), 0.0)


def _first(known: Evidence, share: float) -> SlicePlan:
    """The first layer whole, embedding included, and all layers after it equally.

    The control of `lr`, which keeps that layer whole in every model that was looked at.
    """
    whole = len(known.shape.reads)
    places = _constant(known, share).place_widths[whole:-1]
    widths = [known.shape.hidden_size] * whole + list(places)
    return plan.of_places("first", known.shape, widths, known.round_to, known.layout)


def _widest(
    at: Callable[[Evidence, float], SlicePlan], evidence: Evidence, budget: int
) -> SlicePlan:
    """The plan of the smallest share, in steps of one rounding unit in one layer, in the budget.

    Rounding can make a plan of a larger share a little larger, so that bisection alone could end
    above a plan that fits: from where it ends, shares grow until the plan fits.
    """
    shape, unit = evidence.shape, evidence.round_to
    units = shape.layers * shape.hidden_size // unit
    most = units - shape.layers  # one unit must remain in each layer
    low, high = 0, most
    while low < high:
        middle = (low + high) // 2
        if at(evidence, middle / units).parameters <= budget:
            high = middle
        else:
            low = middle + 1
    for share in range(low, most + 1):
        if (made := at(evidence, share / units)).parameters <= budget:
            return made
    raise _too_small(budget, made)


def _too_small(budget: int, least: SlicePlan) -> RequestError:
    return RequestError(
        f"a budget of {budget} parameters is below the {least.parameters} that the narrowest plan "
        "stores; give a smaller slice percentage, or a larger size"
    )


# By name: the plan of a share that is cut, of what is known of the model.
SCHEDULES: dict[str, Callable[[Evidence, float], SlicePlan]] = {
    "constant": _constant,
    "dynamic": _lr,
    "lr": _lr,
    "embedding": _embedding,
    "first": _first,
    "entropic": _entropic,
}
BY_LR = ("dynamic", "lr", "entropic")  # those that need LR


# Chosen on validation windows before the record was made; by those of the record a basis for each 4
# layers is a little better (notebook 07).
BEST = {"schedule": "lr", "basis_layers": 8, "compensate": True}


def within(name: str, evidence: Evidence, budget: int) -> SlicePlan:
    """The plan of a schedule that stores at most `budget` parameters.

    Raises RequestError for an unknown schedule, LR that was not measured, and a budget
    that no plan of the schedule keeps.
    """
    if name not in SCHEDULES:
        raise RequestError(f"schedule {name!r} is unknown; there are {', '.join(SCHEDULES)}")
    if name in BY_LR and evidence.lr is None:
        raise RequestError(f"schedule {name!r} needs LR, which was not measured")
    return replace(_widest(SCHEDULES[name], evidence, budget), schedule=name)


def budget_of(
    shape: ModelDims, slice_percentage: float, round_to: int, layout: Layout = PUBLISHED
) -> int:
    """What constant slicing at a slice percentage stores: the size that is to be kept.

    Every place has its own basis there, whatever the layout of what is to keep it.
    """
    apart = Layout(tied=layout.tied)
    return plan.constant(shape, slice_percentage, round_to, layout=apart).parameters


def size_range(shape: ModelDims, round_to: int, layout: Layout) -> tuple[int, int]:
    """Stored parameters of the narrowest and of the widest plan in a layout."""
    shares = 1 - round_to / shape.hidden_size, 0.0
    return tuple(plan.constant(shape, x, round_to, layout=layout).parameters for x in shares)
