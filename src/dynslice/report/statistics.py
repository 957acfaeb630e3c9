"""Paired comparisons of networks: estimates with bootstrap intervals, and the choice of SB."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats

from dynslice.core.errors import RunError
from dynslice.evaluate.task_table import CHOICE_TASKS
from dynslice.experiment.requests import Point
from dynslice.experiment.store import Request
from dynslice.experiment.study import Study

CONFIDENCE = 0.95

RESAMPLES = 9999

INTERVAL = f"{CONFIDENCE:.0%} percentile bootstrap interval, {RESAMPLES:,} resamples, seed 0"

EQUAL_SLICE, EQUAL_SIZE = "equal mean slice", "equal stored parameters"

BASES = (EQUAL_SLICE, EQUAL_SIZE)

Pair = tuple[Point, Point, str]


@dataclass(frozen=True)
class Difference:
    """A paired difference with its bootstrap interval."""

    estimate: float
    low: float
    high: float

    @property
    def direction(self) -> str:
        """`lower`, `higher`, or `no difference shown`, by where the interval lies."""
        if self.high < 0:
            return "lower"
        return "higher" if self.low > 0 else "no difference shown"

    def format(self, unit: str) -> str:
        """`+1.2 % [-0.3, +2.7]`."""
        return f"{self.estimate:+.1f} {unit} [{self.low:+.1f}, {self.high:+.1f}]"

    def times(self, factor: float) -> "Difference":
        """The same in another unit."""
        return Difference(*(factor * x for x in (self.estimate, self.low, self.high)))

    @classmethod
    def of_row(cls, row: Mapping, name: str, suffix: str = "") -> "Difference":
        """The difference that `columns` put into a row of a table."""
        return cls(*(row[column] for column in _names(name, suffix)))


def columns(change: Difference | None, name: str, suffix: str = "") -> dict[str, float | None]:
    """A difference as cells of a row: `name`, low and high (with `suffix`); None for no change."""
    numbers = (change.estimate, change.low, change.high) if change else (None,) * 3
    return dict(zip(_names(name, suffix), numbers, strict=True))


def _names(name: str, suffix: str) -> tuple[str, ...]:
    return name, *(f"{bound}, {suffix}" if suffix else bound for bound in ("low", "high"))


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


# Perplexity


def perplexity_change(study: Study, a: Point, b: Point, text: str) -> Difference:
    """Perplexity of a relative to b in percent, paired by window."""
    return relative_change(*(nll(study, study.perplexity_request(p, text)) for p in (a, b)))


def selection_change(study: Study, a: Point, b: Point) -> Difference:
    """The same on the validation windows that choose SB."""
    return relative_change(*(nll(study, study.selection_request(p)) for p in (a, b)))


def nll(study: Study, request: Request) -> np.ndarray:
    """Mean negative log-likelihood of each window, in nats per token."""
    return np.array(study.get(request).value["nll"])


def relative_change(a: np.ndarray, b: np.ndarray) -> Difference:
    """Perplexity of a relative to b in percent from NLL by window: exp(mean difference) - 1."""
    difference = a - b
    low, high = interval(difference)
    return Difference(*(float(100 * np.expm1(x)) for x in (difference.mean(), low, high)))


def curve_change(study: Study, point: Point, text: str) -> Difference | None:
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


def accuracy_change(study: Study, a: Point, b: Point, tasks: list[str]) -> Difference:
    """Accuracy of a minus b in points, the mean over tasks, resampling items within each task."""
    return _task_change(study, a, b, tasks, "correct").times(100)


def accuracy(study: Study, point: Point, tasks: list[str]) -> float:
    """Accuracy in percent, the mean over tasks."""
    correct = [study.get(study.task_request(point, task)).value["correct"] for task in tasks]
    return float(100 * np.mean([np.mean(items) for items in correct]))


def margin_change(study: Study, a: Point, b: Point, tasks: list[str]) -> Difference:
    """Mean log-likelihood margin of the right choice, a minus b in nats, paired by item.

    The margin of an item is the log-likelihood of its right choice minus that of the best wrong
    one. It moves before an answer changes.
    """
    return _task_change(study, a, b, tasks, "margin")


def mcnemar(study: Study, a: Point, b: Point, task: str) -> float:
    """McNemar's exact p: are the items that only one of the two has right split evenly?"""
    first, second = _items(study, a, b, task, "correct")
    only_a = int(((first == 1) & (second == 0)).sum())
    only_b = int(((first == 0) & (second == 1)).sum())
    if only_a + only_b == 0:
        return 1.0
    return float(stats.binomtest(only_a, only_a + only_b).pvalue)


# The bootstrap


def interval(*samples: np.ndarray) -> tuple[float, float]:
    """Bootstrap interval of the mean of the samples' means, resampling each on its own."""
    if all(len(set(sample)) == 1 for sample in samples):  # nothing to resample
        mean = float(np.mean([sample.mean() for sample in samples]))
        return mean, mean

    several = [sample for sample in samples if len(sample) > 1]  # one item has no resamples
    alone = float(sum(sample[0] for sample in samples if len(sample) == 1))

    def mean_of_means(*resampled: np.ndarray, axis: int) -> np.ndarray:
        means = np.sum([r.mean(axis=axis) for r in resampled], axis=0)
        return (means + alone) / len(samples)

    bounds = bootstrap(tuple(several), mean_of_means, paired=False)
    return float(bounds.low), float(bounds.high)


def bootstrap(samples: tuple[np.ndarray, ...], statistic: Callable, paired: bool):
    """The percentile interval that every table quotes, by scipy."""
    return stats.bootstrap(
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


def _task_change(study: Study, a: Point, b: Point, tasks: list[str], what: str) -> Difference:
    differences = [np.subtract(*_items(study, a, b, task, what)) for task in tasks]
    low, high = interval(*differences)
    return Difference(float(np.mean([d.mean() for d in differences])), low, high)


def _items(study: Study, a: Point, b: Point, task: str, what: str) -> list[np.ndarray]:
    values = [study.get(study.task_request(p, task)).value for p in (a, b)]
    if values[0].get("items") != values[1].get("items"):
        raise RunError(f"two results of task {task!r} are of different items; measure them anew")
    return [np.array(value[what]) for value in values]


def _constants(study: Study) -> list[Point]:
    return [point for point in study.points() if point.schedule in ("constant", "matched")]
