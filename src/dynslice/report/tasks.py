"""Notebook 03: accuracies and their paired differences."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from dynslice.evaluate.task_table import TASKS, TaskRow
from dynslice.experiment.study import Study
from dynslice.report import statistics, style
from dynslice.report.comparison import constant_and_dynamic, difference_columns
from dynslice.report.style import COLUMN_WIDTH

# Tasks


def task_table(study: Study) -> pd.DataFrame:
    """One row per network and task, then the average: accuracy with its interval, and margin.

    Accuracies in percent; the margin in nats (see `compare.margin_change`). A generation task has
    its main metric in percent in place of the accuracy, no margin, and no part in the average.
    """
    study.ensure(study.task_requests())
    averaged = statistics.choice_tasks(study)
    groups = [[task] for task in study.profile.tasks] + ([averaged] if averaged else [])
    rows = []
    for point in study.task_points():
        size = study.get(study.slice_request(point)).value["parameters"] / 1e6
        for tasks in groups:
            values = [study.get(study.task_request(point, task)).value for task in tasks]
            metric = values[0].get("metric")
            name = f"{tasks[0]} ({metric})" if metric else tasks[0]
            scores = [value["score"] if metric else value["correct"] for value in values]
            correct = [100 * np.array(score) for score in scores]
            margins = [np.array(value["margin"]) for value in values if not metric]
            low, high = statistics.interval(*correct)
            normed = [value["acc_norm"] for value in values]
            rows.append(
                {
                    "network": point.label,
                    "schedule": point.schedule,
                    "SP": point.slice_percentage,
                    "SB": point.slice_base,
                    "parameters (M)": size,
                    "task": "average" if tasks is averaged else name,
                    "items": sum(map(len, correct)),
                    "accuracy": np.mean([c.mean() for c in correct]),
                    "low": low,
                    "high": high,
                    "acc_norm": 100 * np.mean(normed) if None not in normed else None,
                    "margin": np.mean([m.mean() for m in margins]) if margins else None,
                }
            )
            margin_low, margin_high = statistics.interval(*margins) if margins else (None, None)
            rows[-1] |= {"margin low": margin_low, "margin high": margin_high}
    return pd.DataFrame(rows)


def task_prose(study: Study) -> str:
    """What the scores of the profile's tasks are, and what guessing gives, as Markdown."""
    tasks = {name: TASKS[name] for name in study.profile.tasks}
    if not tasks:
        return "This profile runs no tasks."
    guess: dict[int, list[str]] = {}
    for row in tasks.values():
        if row.choices:
            guess.setdefault(row.choices, []).append(row.title)
    chances = [f"{100 / choices:.0f} % on {_listed(names)}" for choices, names in guess.items()]
    arc = "; lm-eval's own ARC uses the test split, so ARC scores are not those of a leaderboard"
    generated = ", or the metric that stands beside a task" * any(r.metric for r in tasks.values())
    return (
        f"In percent (`acc` of lm-eval{generated}), with the bootstrap interval over items. "
        f"{_splits_of(tasks)}{arc * any(row.title == 'ARC' for row in tasks.values())}."
    ) + (
        f" Guessing gives {_listed(chances)}: a score near that says that the network no longer "
        "knows the task."
    ) * bool(chances)


def _splits_of(tasks: dict[str, TaskRow]) -> str:
    """Where the items of the tasks come from; a sentence without its full stop."""
    tested = [row.title for row in tasks.values() if row.split == "test"]
    if not tested:
        return "The items come from the validation splits"
    if len(tested) == len(tasks):
        return "The items come from the test splits"
    return (
        f"The items come from the validation splits, and for {_listed(tested)} from the test split"
    )


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
    style.style()
    here = table if table.empty else table[table["task"] == "average"]
    if here.empty:
        return style.nothing()
    figure, (left, right) = plt.subplots(1, 2, figsize=(2 * COLUMN_WIDTH, 2.5))
    x = "parameters (M)"
    constant_and_dynamic(left, here, x, "accuracy")
    margins = here.drop(columns=["low", "high"])
    margins = margins.rename(columns={"margin low": "low", "margin high": "high"})
    constant_and_dynamic(right, margins, x, "margin")
    left.set(xlabel="stored parameters (millions)", ylabel="average accuracy (%)")
    right.set(xlabel="stored parameters (millions)", ylabel="average margin (nats)")
    left.legend(frameon=False)
    figure.tight_layout()
    return figure


def task_comparison(study: Study) -> pd.DataFrame:
    """Accuracy of dynamic minus constant in points, per task and on average, paired by item.

    Beside it McNemar's exact p, and the change of the mean margin in nats.
    """
    study.ensure(study.task_requests())
    every = statistics.choice_tasks(study)
    rows = []
    for dynamic, other, basis in statistics.pairs(study.task_points()):
        for tasks in [*([task] for task in every), every] if every else []:
            margin = statistics.margin_change(study, dynamic, other, tasks)
            rows.append(
                {
                    "SP": dynamic.slice_percentage,
                    "SB": dynamic.slice_base,
                    "against constant at": basis,
                    "task": tasks[0] if len(tasks) == 1 else "average",
                    **difference_columns(
                        statistics.accuracy_change(study, dynamic, other, tasks),
                        "accuracy (points)",
                    ),
                    "McNemar p": (
                        statistics.mcnemar(study, dynamic, other, tasks[0])
                        if len(tasks) == 1
                        else None
                    ),
                    "margin (nats)": margin.estimate,
                    "margin low": margin.low,
                    "margin high": margin.high,
                    "margin of dynamic is": margin.direction,
                }
            )
    names = [
        "SP",
        "SB",
        "against constant at",
        "task",
        *difference_columns(None, "accuracy (points)"),
    ]
    names += ["McNemar p", "margin (nats)", "margin low", "margin high", "margin of dynamic is"]
    return pd.DataFrame(rows, columns=names)
