"""Notebook 03: accuracies and their paired differences."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from dynslice.evaluate.task_table import TASKS
from dynslice.experiment.requests import Point
from dynslice.experiment.study import Study
from dynslice.report import comparison, statistics, style
from dynslice.report.comparison import BY


def task_table(study: Study) -> pd.DataFrame:
    """One row per network and task, then the average: accuracy with its interval, and margin.

    Accuracies in percent; the margin in nats (see `statistics.margin_change`). A generation task
    has its main metric in percent in place of the accuracy, no margin, and no part in the average.
    """
    study.ensure(study.design.task_requests())
    averaged = statistics.choice_tasks(study)
    groups = [[task] for task in study.profile.tasks] + ([averaged] if averaged else [])
    return pd.DataFrame(
        {
            "network": point.label,
            "schedule": point.schedule,
            "SP": point.slice_percentage,
            "SB": point.slice_base,
            "parameters (M)": study.size(point) / 1e6,
            **_scores(study, point, tasks, "average" if tasks is averaged else tasks[0]),
        }
        for point in study.task_points()
        for tasks in groups
    )


def _scores(study: Study, point: Point, tasks: list[str], name: str) -> dict:
    """Accuracy and margin of a network on a task, or on average."""
    values = [study.get(study.task_request(point, task)).value for task in tasks]
    metric = values[0].get("metric")
    correct = [100 * np.array(value["score" if metric else "correct"]) for value in values]
    margins = [np.array(value["margin"]) for value in values if not metric]
    low, high = statistics.interval(*correct)
    margin_low, margin_high = statistics.interval(*margins) if margins else (None, None)
    normed = [value["acc_norm"] for value in values]
    return {
        "task": f"{name} ({metric})" if metric else name,
        "items": sum(map(len, correct)),
        "accuracy": np.mean([c.mean() for c in correct]),
        "low": low,
        "high": high,
        "acc_norm": 100 * np.mean(normed) if None not in normed else None,
        "margin": np.mean([m.mean() for m in margins]) if margins else None,
        "margin low": margin_low,
        "margin high": margin_high,
    }


def task_prose(study: Study) -> str:
    """What the scores of the profile's tasks are, and what guessing gives, as Markdown."""
    tasks = {name: TASKS[name] for name in study.profile.tasks}
    if not tasks:
        return "This profile runs no tasks."
    guess: dict[int, list[str]] = {}
    splits: dict[str, list[str]] = {}
    for row in tasks.values():
        splits.setdefault(row.split, []).append(row.title)
        if row.choices:
            guess.setdefault(row.choices, []).append(row.title)
    sources = [f"the {split} split for {_listed(names)}" for split, names in splits.items()]
    chances = [f"{100 / choices:.0f} % on {_listed(names)}" for choices, names in guess.items()]
    generated = ", or the metric that stands next to a task" * any(r.metric for r in tasks.values())
    return (
        f"In percent (`acc` of lm-eval{generated}), with the bootstrap interval over items. "
        f"The items come from {_listed(sources)}."
    ) + (
        f" Guessing gives {_listed(chances)}: a score near that says that the network no longer "
        "knows the task."
    ) * bool(chances)


def _listed(names: list[str]) -> str:
    """`a, b and c`, each name once."""
    *others, last = dict.fromkeys(names)
    return f"{', '.join(others)} and {last}" if others else last


def accuracy_view(table: pd.DataFrame) -> pd.DataFrame:
    """The task table for reading: a row per task, a column per network, `45.0 [38.0, 52.0]`."""
    if table.empty:
        return table
    text = [f"{r.accuracy:.1f} [{r.low:.1f}, {r.high:.1f}]" for r in table.itertuples()]
    view = table.assign(text=text).pivot_table(
        index="task", columns="network", values="text", aggfunc="first"
    )
    return view.loc[table["task"].unique(), table["network"].unique()]


def accuracy_figure(table: pd.DataFrame) -> plt.Figure:
    """Average accuracy, and average margin of the right choice, against stored parameters."""
    here = table if table.empty else table[table["task"] == "average"]
    if here.empty:
        return style.nothing()
    figure, (left, right) = style.panels(1, 2)
    x = "parameters (M)"
    comparison.constant_and_dynamic(left, here, x, "accuracy")
    margins = here.assign(low=here["margin low"], high=here["margin high"])
    comparison.constant_and_dynamic(right, margins, x, "margin")
    left.set(xlabel="stored parameters (millions)", ylabel="average accuracy (%)")
    right.set(xlabel="stored parameters (millions)", ylabel="average margin (nats)")
    left.legend()
    return figure


def task_comparison(study: Study) -> pd.DataFrame:
    """Accuracy of dynamic minus constant in points, per task and on average, paired by item.

    Next to it McNemar's exact p, and the change of the mean margin in nats.
    """
    study.ensure(study.design.task_requests())
    every = statistics.choice_tasks(study)
    rows = []
    for dynamic, other, basis in statistics.pairs(study.task_points()):
        for tasks in [*([task] for task in every), every] if every else []:
            change = statistics.accuracy_change(study, dynamic, other, tasks)
            margin = statistics.margin_change(study, dynamic, other, tasks)
            alone = len(tasks) == 1
            rows.append(
                {
                    "SP": dynamic.slice_percentage,
                    "SB": dynamic.slice_base,
                    BY: basis,
                    "task": tasks[0] if alone else "average",
                    **comparison.columns(change, "accuracy (points)"),
                    "McNemar p": (
                        statistics.mcnemar(study, dynamic, other, tasks[0]) if alone else None
                    ),
                    "margin (nats)": margin.estimate,
                    "margin low": margin.low,
                    "margin high": margin.high,
                    "margin of dynamic is": margin.direction,
                }
            )
    return pd.DataFrame(rows)
