"""Paired comparisons of networks: estimates with bootstrap intervals, and the choice of SB."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from scipy import stats

from dynslice.core.errors import RunError
from dynslice.evaluate.task_table import CHOICE_TASKS
from dynslice.experiment.requests import Point
from dynslice.experiment.store import Request
from dynslice.experiment.study import Study

CONFIDENCE, RESAMPLES = 0.95, 9999
INTERVAL = f"{CONFIDENCE:.0%} percentile bootstrap interval, {RESAMPLES:,} resamples, seed 0"

PERPLEXITY, ACCURACY = "perplexity (%)", "accuracy (points)"  # the columns of changes
SIZE, UNTIED = "parameters (M)", "parameters, untied (M)"  # and those of sizes
EQUAL_SLICE, EQUAL_SIZE = BASES = ("equal mean slice", "equal stored parameters")

Pair = tuple[Point, Point, str]


class Estimate(NamedTuple):
    """A number with its bootstrap interval: a level, or a paired difference."""

    estimate: float
    low: float
    high: float

    @property
    def direction(self) -> str:
        """Of a difference: `lower`, `higher`, or `no difference shown`, by its interval."""
        if self.high < 0:
            return "lower"
        return "higher" if self.low > 0 else "no difference shown"

    def format(self, unit: str = "", digits: int = 1) -> str:
        """`+1.2 % [-0.3, +2.7]`."""
        estimate, low, high = (f"{x:+.{digits}f}" for x in self)
        return " ".join(filter(None, (estimate, unit, f"[{low}, {high}]")))

    def told(self, unit: str = "") -> str:
        """`format`, and in words where no difference is shown."""
        unseen = self.low <= 0 <= self.high
        return self.format(unit) + (f" ({self.direction})" if unseen else "")

    def map(self, function: Callable[[float], float]) -> "Estimate":
        """The same on another scale, by an increasing function."""
        return Estimate(*(float(function(x)) for x in self))


def columns(
    value: Estimate | None, name: str, bounds: str = "{}", says: str = ""
) -> dict[str, float | str | None]:
    """An estimate as cells of a row; None where there is none.

    name: the column of the estimate. bounds: the columns `low` and `high`, put into this text.
    says: the column of its direction in words, if any.
    """
    names = (name, bounds.format("low"), bounds.format("high"))
    cells = dict(zip(names, value or (None,) * 3, strict=True))
    return {**cells, says: value.direction} if says else cells


def of_row(row: Mapping, name: str, bounds: str = "{}") -> Estimate:
    """The estimate that `columns` put into a row of a table."""
    return Estimate(*(row[column] for column in columns(None, name, bounds)))


def pairs(
    points: list[Point], basis: str | None = None, slice_percentage: float | None = None
) -> list[Pair]:
    """(dynamic, constant to compare with, basis of the comparison), all or those asked for."""
    bases = {"constant": EQUAL_SLICE, "matched": EQUAL_SIZE}
    return [
        (a, b, bases[b.schedule])
        for a in points
        for b in points
        if a.schedule == "dynamic"
        and b.schedule in bases
        and a.slice_percentage == b.slice_percentage
        and (b.schedule == "constant" or a.slice_base == b.slice_base)
        and basis in (None, bases[b.schedule])
        and slice_percentage in (None, a.slice_percentage)
    ]


def sizes(study: Study, point: Point) -> dict[str, float | None]:
    """Stored parameters in millions, and with embedding and head apart, as published.

    The latter is None of the dense model, which is stored as it is.
    """
    value = study.get(study.slice_request(point)).value
    untied = value.get("parameters_untied")
    return {SIZE: value["parameters"] / 1e6, UNTIED: untied and untied / 1e6}


def size_changes(study: Study, a: Point, b: Point) -> dict[str, float]:
    """How much more a stores than b in percent, in both counts of `sizes`."""
    names = {"size (%)": SIZE, "size, untied (%)": UNTIED}
    sizes_of = [sizes(study, point) for point in (a, b)]
    return {
        name: 100 * (sizes_of[0][count] / sizes_of[1][count] - 1) for name, count in names.items()
    }


# Perplexity


def perplexity(study: Study, point: Point, text: str) -> Estimate:
    """Perplexity of a network on the reported windows of a text, which the interval resamples."""
    bounds = mean(nll(study, study.perplexity_request(point, text))).map(np.exp)
    return bounds._replace(estimate=study.perplexity(point, text))


def perplexity_change(study: Study, a: Point, b: Point, text: str) -> Estimate:
    """Perplexity of a relative to b in percent, paired by window."""
    return relative_change(*(nll(study, study.perplexity_request(p, text)) for p in (a, b)))


def selection_change(study: Study, a: Point, b: Point) -> Estimate:
    """The same on the validation windows that choose SB."""
    return relative_change(*(nll(study, study.selection_request(p)) for p in (a, b)))


def nll(study: Study, request: Request) -> np.ndarray:
    """Mean negative log-likelihood of each window, in nats per token."""
    return np.array(study.get(request).value["nll"])


def relative_change(a: np.ndarray, b: np.ndarray) -> Estimate:
    """Perplexity of a relative to b in percent from NLL by window: exp(mean difference) - 1."""
    return mean(a - b).map(_percent)


def change_over_draws(study: Study, pairs: list[tuple[Point, Point]], text: str) -> Estimate:
    """Perplexity of a relative to b in percent over draws of the calibration windows.

    pairs: (a, b) of each draw. The interval resamples draws and windows (`mean_over_draws`).
    """
    losses = [[nll(study, study.perplexity_request(p, text)) for p in pair] for pair in pairs]
    return mean_over_draws(np.array([a - b for a, b in losses])).map(_percent)


def _percent(difference: float) -> float:
    return 100 * np.expm1(difference)


def curve_change(study: Study, point: Point, text: str) -> Estimate | None:
    """Perplexity of a network relative to constant slicing at its own size, in percent.

    Constant slicing at that size is interpolated: the NLL of each window between the two
    constant networks of the study whose stored parameters lie around it. None where the size
    lies outside those of the constant networks.
    """
    size, curve = study.size(point), {study.size(p): p for p in _constants(study)}
    sizes = sorted(curve)
    if not sizes or not sizes[0] <= size <= sizes[-1]:
        return None
    windows = [nll(study, study.perplexity_request(curve[s], text)) for s in sizes]
    constant = np.array([np.interp(size, sizes, column) for column in np.transpose(windows)])
    return relative_change(nll(study, study.perplexity_request(point, text)), constant)


def nearest_constant(study: Study, point: Point) -> Point:
    """The constant network of the study whose stored parameters come nearest."""
    return min(_constants(study), key=lambda p: abs(study.size(p) - study.size(point)))


def chosen(study: Study, basis: str, slice_percentage: float | None = None) -> Pair | None:
    """The dynamic network, with its constant, that gains most on the validation windows.

    At one slice percentage, or at all. None without selection windows or a dynamic network.
    """
    if study.profile.selection_windows is None:
        return None
    return min(
        pairs(study.points(), basis, slice_percentage),
        key=lambda pair: selection_change(study, *pair[:2]).estimate,
        default=None,
    )


def best(study: Study, basis: str, text: str, slice_percentage: float | None = None) -> Pair | None:
    """The same by the reported windows themselves, which makes its gain optimistic."""
    return min(
        pairs(study.points(), basis, slice_percentage),
        key=lambda pair: perplexity_change(study, *pair[:2], text).estimate,
        default=None,
    )


# Tasks


def choice_tasks(study: Study) -> list[str]:
    """The tasks of a study that have an accuracy; generation tasks take part in no average."""
    return [task for task in study.profile.tasks if task in CHOICE_TASKS]


def accuracy_change(study: Study, a: Point, b: Point, tasks: list[str]) -> Estimate:
    """Accuracy of a minus b in points, the mean over tasks, resampling items within each task."""
    share = mean(*(np.subtract(*_items(study, a, b, task, "correct")) for task in tasks))
    return share.map(lambda x: 100 * x)


def accuracy(study: Study, point: Point, tasks: list[str]) -> float:
    """Accuracy in percent, the mean over tasks."""
    correct = [study.get(study.task_request(point, task)).value["correct"] for task in tasks]
    return float(100 * np.mean([np.mean(items) for items in correct]))


def margin_change(study: Study, a: Point, b: Point, tasks: list[str]) -> Estimate:
    """Mean log-likelihood margin of the right choice, a minus b in nats, paired by item.

    The margin of an item is the log-likelihood of its right choice minus that of the best wrong
    one. It moves before an answer changes.
    """
    return mean(*(np.subtract(*_items(study, a, b, task, "margin")) for task in tasks))


def mcnemar(study: Study, a: Point, b: Point, task: str) -> float:
    """McNemar's exact p: are the items that only one of the two has right split evenly?"""
    first, second = _items(study, a, b, task, "correct")
    only_a, only_b = int((first > second).sum()), int((first < second).sum())
    differing = only_a + only_b
    return float(stats.binomtest(only_a, differing).pvalue) if differing else 1.0


# The bootstrap


def mean(*samples: np.ndarray) -> Estimate:
    """The mean of the samples' means; its interval resamples each sample on its own."""
    estimate = float(np.mean([sample.mean() for sample in samples]))
    if all(len(set(sample)) == 1 for sample in samples):  # nothing to resample
        return Estimate(estimate, estimate, estimate)

    several = [sample for sample in samples if len(sample) > 1]  # one item has no resamples
    alone = float(sum(sample[0] for sample in samples if len(sample) == 1))

    def mean_of_means(*resampled: np.ndarray, axis: int) -> np.ndarray:
        means = np.sum([r.mean(axis=axis) for r in resampled], axis=0)
        return (means + alone) / len(samples)

    return Estimate(estimate, *bootstrap(tuple(several), mean_of_means, paired=False))


def mean_over_draws(samples: np.ndarray) -> Estimate:
    """The mean of samples [draws, windows]; its interval resamples draws, and windows within.

    All draws read the same windows, so one resample takes the same windows of each of its draws:
    what makes a window hard does not average out over draws.
    """
    rng = np.random.default_rng(0)
    # How often each draw and each window is taken: the same as taking them one by one.
    drawn, read = (rng.multinomial(n, np.full(n, 1 / n), RESAMPLES) for n in samples.shape)
    means = np.sum(drawn @ samples * read, axis=1) / samples.size
    bounds = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(*(float(x) for x in (samples.mean(), *bounds)))


def bootstrap(samples: tuple, statistic: Callable, paired: bool) -> tuple[float, float]:
    """Low and high of the percentile interval that every table quotes, by scipy."""
    bounds = stats.bootstrap(
        samples,
        statistic,
        paired=paired,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        vectorized=True,
        batch=1000,  # bounds the memory on whole task sets
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(bounds.low), float(bounds.high)


def _items(study: Study, a: Point, b: Point, task: str, what: str) -> list[np.ndarray]:
    values = [study.get(study.task_request(p, task)).value for p in (a, b)]
    if values[0].get("items") != values[1].get("items"):
        raise RunError(f"two results of task {task!r} are of different items; measure them anew")
    return [np.array(value[what]) for value in values]


def _constants(study: Study) -> list[Point]:
    return [point for point in study.points() if point.schedule in ("constant", "matched")]
