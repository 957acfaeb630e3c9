"""Schedules at equal size: from what is known of a model and a budget of parameters to a plan.

Each schedule is given the same budget of stored parameters, and none exceeds it. What a layout of
shared bases or of one table saves goes into the widths.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from dynslice.core.errors import RequestError
from dynslice.method import plan
from dynslice.method.controls import with_embedding
from dynslice.method.layout import PUBLISHED, Layout
from dynslice.method.plan import ModelDims, SlicePlan


@dataclass(frozen=True)
class Evidence:
    """What is known of a model: the shape, LR [layers], and the rise of the loss by place.

    rises: at each place {share that is cut: rise of the NLL in nats per token}, the other places
    cut as a plan says (`scores.rises`). slice_base: SB of the schedules by LR.
    """

    shape: ModelDims
    round_to: int = 8
    lr: Sequence[float] | None = None
    rises: Sequence[dict[float, float]] | None = None
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


def sensitivity(evidence: Evidence, budget: int) -> SlicePlan:
    """Widths of places whose predicted losses, added up, are least.

    Losses grow as convex parabolas near the measured rises. From the smallest measured share
    everywhere, rounding units are cut one by one, each where the predicted rise is least for the
    parameters that it saves; no place loses more than the largest measured share.
    """
    shape, unit = evidence.shape, evidence.round_to
    d = shape.hidden_size
    curves = [_parabola(rises) for rises in evidence.rises]
    most = [round(d * (1 - min(rises)) / unit) * unit for rises in evidence.rises]
    least = [max(unit, round(d * (1 - max(rises)) / unit) * unit) for rises in evidence.rises]
    widths = list(most)

    def price(place: int) -> float:
        """The rise of the loss for each parameter saved, if one more unit is cut here."""
        before, after = (curves[place](1 - w / d) for w in (widths[place], widths[place] - unit))
        return (after - before) / (unit * _stored_per_dimension(made, place))

    made = plan.of_places("sensitivity", shape, widths, unit, evidence.layout)
    while made.parameters > budget:
        open_ = [place for place, width in enumerate(widths) if width - unit >= least[place]]
        if not open_:
            raise _too_small(budget, made)
        widths[min(open_, key=price)] -= unit
        made = plan.of_places("sensitivity", shape, widths, unit, evidence.layout)
    return made


def search(
    evidence: Evidence, budget: int, loss: Callable[[SlicePlan], float], evaluations: int
) -> tuple[SlicePlan, list[dict]]:
    """Coordinate search from the constant plan: the best plan, and every one that was tried.

    Slices are those of the constant plan times factors of groups of places: the first layer, those
    before attention and before the MLP, and thirds of the depth. One factor at a time goes up or
    down by a step, the slice percentage follows so that the budget is kept, and what lowers the
    loss stays. A round without a gain halves the step. `loss` is asked `evaluations` times.
    """
    groups = _groups(evidence.shape)
    d, unit = evidence.shape.hidden_size, evidence.round_to
    places = len(evidence.shape.reads) * evidence.shape.layers

    def plan_of(factors: dict[str, float]) -> SlicePlan:
        logs = [sum(factors[g] for g in groups if p in groups[g]) for p in range(places)]

        def at(_evidence: Evidence, share: float) -> SlicePlan:
            exact = np.clip([d * (1 - share * math.exp(log)) for log in logs], unit, d)
            # The running sum is rounded, so that neighbours make up for each other.
            units = np.diff(np.rint(np.cumsum(exact) / unit), prepend=0).astype(int)
            widths = [min(d, max(1, count) * unit) for count in units.tolist()]
            return plan.of_places("search", evidence.shape, widths, unit, evidence.layout)

        return _widest(at, evidence, budget)

    factors, step, tried = dict.fromkeys(groups, 0.0), 0.5, []
    best, least, gained = plan_of(factors), math.inf, True
    moves = iter([("none", 0.0)])
    while len(tried) < evaluations:
        move = next(moves, None)
        if move is None:
            step, gained = (step, False) if gained else (step / 2, False)
            moves = iter([(g, sign * step) for g in groups for sign in (1, -1)])
            continue
        group, change = move
        proposed = {**factors, group: factors.get(group, 0.0) + change} if change else factors
        try:
            made = plan_of(proposed)
        except RequestError:  # no plan of such proportions keeps the budget
            if not tried:
                raise
            continue
        found = loss(made)
        tried.append({"group": group, "change": change, "loss": found})
        if found < least:
            best, least, factors, gained = made, found, proposed, True
    return best, tried


def _groups(shape: ModelDims) -> dict[str, set[int]]:
    blocks, places = len(shape.reads), len(shape.reads) * shape.layers
    groups = {"first layer": set(range(blocks))}
    if blocks > 1:
        groups |= {"attention": set(range(0, places, blocks)), "mlp": set(range(1, places, blocks))}
    bounds = [round(third * places / 3) for third in range(4)]
    names = ("first third", "middle third", "last third")
    thirds = zip(names, bounds, bounds[1:], strict=False)
    return groups | {name: set(range(low, high)) for name, low, high in thirds}


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


@dataclass(frozen=True)
class Schedule:
    """A function from evidence and budget to a plan, and the evidence that it needs."""

    make: Callable[[Evidence, int], SlicePlan]
    needs: str | None = None


SCHEDULES = {
    "constant": Schedule(partial(_widest, _constant)),
    "dynamic": Schedule(partial(_widest, _lr), needs="lr"),
    "lr": Schedule(partial(_widest, _lr), needs="lr"),
    "embedding": Schedule(partial(_widest, _embedding)),
    "first": Schedule(partial(_widest, _first)),
    "sensitivity": Schedule(sensitivity, needs="rises"),
    "entropic": Schedule(partial(_widest, _entropic), needs="lr"),
}


# Chosen on validation windows before the record was made; by those of the record a basis for each 4
# layers is a little better (notebook 07).
BEST = {"schedule": "lr", "basis_layers": 8, "compensate": True}


def within(name: str, evidence: Evidence, budget: int) -> SlicePlan:
    """The plan of a schedule that stores at most `budget` parameters.

    Raises RequestError for an unknown schedule, evidence that is missing or of another model, and
    a budget that no plan of the schedule keeps.
    """
    if name not in SCHEDULES:
        raise RequestError(f"schedule {name!r} is unknown; there are {', '.join(SCHEDULES)}")
    schedule = SCHEDULES[name]
    if schedule.needs and getattr(evidence, schedule.needs) is None:
        raise RequestError(f"schedule {name!r} needs {schedule.needs}, which was not measured")
    places = len(evidence.shape.reads) * evidence.shape.layers
    if schedule.needs == "rises" and len(evidence.rises) != places:
        raise RequestError(
            f"there are losses for {len(evidence.rises)} places, and the model has {places}; "
            "measure them anew with `dynslice sensitivity`"
        )
    return replace(schedule.make(evidence, budget), schedule=name)


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


def _parabola(rises: dict[float, float]) -> Callable[[float], float]:
    """The parabola of least squares through rises by share; where it is hollow, one without slope.

    Losses grow faster and faster, so a hollow one is noise; a straight line would let ties decide.
    """
    shares, values = np.array([*rises]), np.array([*rises.values()])
    fitted = np.polyfit(shares, values, min(2, len(shares) - 1))
    if len(fitted) == 3 and fitted[0] < 0:
        steepness, level = np.polyfit(shares**2, values, 1)
        fitted = (steepness, 0.0, level)
    return lambda share: float(np.polyval(fitted, share))


def _stored_per_dimension(made: SlicePlan, place: int) -> int:
    """Parameters that one more dimension at a place stores."""
    shape, widths, shortcuts = made.shape, made.place_widths, made.shortcuts
    blocks = len(shape.reads)
    stored = shape.reads[place % blocks] + shortcuts[place] * widths[place + 1]
    if place > 0:
        stored += shape.writes[(place - 1) % blocks]
        return stored + shortcuts[place - 1] * widths[place - 1]
    table = shape.hidden_size if made.layout.tied else shape.vocab_size
    return stored + table + shape.position_rows
