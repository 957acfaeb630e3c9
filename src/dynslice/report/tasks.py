"""Notebook 03: accuracies and their paired differences."""

from itertools import product

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from dynslice.evaluate.task_table import CHOICE_TASKS, TASKS, chance
from dynslice.experiment.requests import Point
from dynslice.experiment.study import Study
from dynslice.report import comparison, statistics, style
from dynslice.report.comparison import BY, SAYS
from dynslice.report.statistics import ACCURACY, SIZE, UNTIED, columns

MARGIN = ("margin", "margin {}")  # the columns of a margin and of its interval


def task_table(study: Study) -> pd.DataFrame:
    """One row per network and task, then the average: accuracy with its interval, and margin.

    Accuracies in percent; the margin in nats (see `statistics.margin_change`). A generation task
    has its main metric in percent in place of the accuracy, no margin, and no part in the average.
    """
    study.ensure(study.design.task_requests())
    groups = _groups(list(study.profile.tasks), statistics.choice_tasks(study))
    return pd.DataFrame(
        {
            "network": point.label,
            "schedule": point.schedule,
            "SP": point.slice_percentage,
            "SB": point.slice_base,
            **statistics.sizes(study, point),
            **_scores(study, point, tasks, name),
        }
        for point in study.task_points()
        for name, tasks in groups.items()
    )


def _groups(alone: list[str], averaged: list[str]) -> dict[str, list[str]]:
    """The rows of a table: each task, then the average of some, if any."""
    return {task: [task] for task in alone} | ({"average": averaged} if averaged else {})


def _scores(study: Study, point: Point, tasks: list[str], name: str) -> dict:
    """Accuracy and margin of a network on a task, or on average."""
    values = [study.get(study.task_request(point, task)).value for task in tasks]
    metric = values[0].get("metric")
    correct = [100 * np.array(value["score" if metric else "correct"]) for value in values]
    margins = [np.array(value["margin"]) for value in values if not metric]
    normed = [value["acc_norm"] for value in values]
    return {
        "task": f"{name} ({metric})" if metric else name,
        "items": sum(map(len, correct)),
        **columns(statistics.mean(*correct), "accuracy"),
        "acc_norm": 100 * np.mean(normed) if None not in normed else None,
        **columns(statistics.mean(*margins) if margins else None, *MARGIN),
    }


def task_prose(study: Study) -> str:
    """What the scores of the profile's tasks are, and what guessing gives, as Markdown."""
    tasks = pd.DataFrame([vars(TASKS[name]) for name in study.profile.tasks])
    if tasks.empty:
        return style.NONE
    titles = tasks.groupby("split", sort=False)["title"]
    generated = ", or the metric that stands next to a task" * bool(any(tasks["metric"]))
    sources = [
        f"the {split} split for {style.listed(dict.fromkeys(names))}" for split, names in titles
    ]
    found = style.say("tasks", generated=generated, sources=style.listed(sources))
    titles = tasks.groupby("choices", sort=False)["title"]
    chances = [
        f"{100 / choices:.0f} % on {style.listed(dict.fromkeys(names))}"
        for choices, names in titles
    ]
    return f"{found} {style.say('guessing', chances=style.listed(chances))}" if chances else found


def accuracy_view(table: pd.DataFrame) -> pd.DataFrame:
    """The task table for reading: a row per task, a column per network, `45.0 [38.0, 52.0]`.

    First what guessing gives. Below, what each network stores in millions of parameters.
    """
    if table.empty:
        return table
    text = [f"{r.accuracy:.1f} [{r.low:.1f}, {r.high:.1f}]" for r in table.itertuples()]
    view = table.assign(text=text).pivot_table(
        index="task", columns="network", values="text", aggfunc="first"
    )
    sizes = table.drop_duplicates("network").set_index("network")[[SIZE, UNTIED]].T
    sizes = sizes.map(lambda x: "-" if pd.isna(x) else f"{x:.1f}")
    shown = pd.concat([view.loc[table["task"].unique()], sizes])[table["network"].unique()]
    chances = [_chance(table, row) for row in shown.index]
    shown.insert(0, "chance", ["-" if x is None else f"{x:.1f}" for x in chances])
    return shown.rename_axis(index="task", columns=None)


def _chance(table: pd.DataFrame, row: str) -> float | None:
    """What guessing gives on a task of a task table, or on their average; None where nothing."""
    averaged = [task for task in table["task"].unique() if task in CHOICE_TASKS]
    names = averaged if row == "average" else [row]
    return chance(names) if set(names) <= set(averaged) else None


def accuracy_figure(table: pd.DataFrame) -> plt.Figure | None:
    """Average accuracy, and average margin of the right choice, against stored parameters."""
    here = table if table.empty else table[table["task"] == "average"]
    if here.empty:
        return None
    figure, (left, right) = style.panels(1, 2)
    x = "parameters (M)"
    comparison.constant_and_dynamic(left, here, x, "accuracy")
    margins = here.assign(low=here["margin low"], high=here["margin high"])
    comparison.constant_and_dynamic(right, margins, x, "margin")
    left.axhline(_chance(table, "average"), color="0.5", linestyle="-.", label="chance")
    left.set(xlabel="stored parameters (millions)", ylabel="average accuracy (%)")
    right.set(xlabel="stored parameters (millions)", ylabel="average margin (nats)")
    handles = left.get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=len(handles[1]))
    return figure


def power_prose(comparison: pd.DataFrame) -> str:
    """How large a difference of the average has to be to show, as Markdown; nothing where none."""
    rows = comparison if comparison.empty else comparison[comparison["task"] == "average"]
    if rows.empty:
        return ""
    return style.say("power", half=((rows["high"] - rows["low"]) / 2).describe())


def task_comparison(study: Study) -> pd.DataFrame:
    """Accuracy of dynamic minus constant in points, per task and on average, paired by item.

    Next to it McNemar's exact p, and the change of the mean margin in nats.
    """
    study.ensure(study.design.task_requests())
    every, rows = statistics.choice_tasks(study), []
    groups = _groups(every, every)
    for (dynamic, other, basis), name in product(statistics.pairs(study.task_points()), groups):
        what = (study, dynamic, other, groups[name])
        change, margin = statistics.accuracy_change(*what), statistics.margin_change(*what)
        row = {"SP": dynamic.slice_percentage, "SB": dynamic.slice_base, BY: basis, "task": name}
        row |= columns(change, ACCURACY, says=SAYS)
        alone = name != "average"
        row["McNemar p"] = statistics.mcnemar(study, dynamic, other, name) if alone else None
        row |= columns(margin, "margin (nats)", MARGIN[1], "margin of dynamic is")
        rows.append(row)
    return pd.DataFrame(rows)
