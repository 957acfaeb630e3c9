"""Notebooks 01 to 03 from results: layer redundancy, and networks over the grid of SP and SB."""

import math
from itertools import cycle, product

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator

from dynslice import compare, report
from dynslice.design import percent
from dynslice.report import COLUMN_WIDTH, MARKERS
from dynslice.study import Study
from dynslice.task_table import TASKS, TaskRow

LEGEND_COLUMNS = 4


# Layer redundancy


def redundancy_table(study: Study) -> pd.DataFrame:
    """Per layer: LR on each text, and n, SLR, FS and width of the plan of the figure."""
    study.ensure(study.redundancy_requests())
    columns = {
        f"LR ({request.config['text']})": [x["lr"] for x in study.get(request).value["layers"]]
        for request in study.lr_requests()
    }
    plan = study.get(study.figure_request()).value
    base = study.profile.figure_slice_base
    table = pd.DataFrame(columns)
    table["n"] = [x["normalised"] for x in study.get(study.lr_request()).value["layers"]]
    table["SLR"] = np.array(plan["final_slice"]) - base
    table["FS"] = plan["final_slice"]
    table["width"] = plan["widths"]
    table.index.name = "layer"
    return table


def last_layer_prose(study: Study) -> str:
    """What the last layer is compared by, as Markdown."""
    if study.profile.lr_last_layer == "raw":
        return (
            "The last layer is compared by its **raw** output, as the definition says. The "
            "published code compares with the state after the final norm, which can make the last "
            'layer look far less redundant than it is; set `lr_last_layer = "normed"` above to '
            "see it."
        )
    return (
        "The last layer is compared by the state **after the final norm**, as the published code "
        "does, which can make it look far less redundant than it is. The definition says its raw "
        'output; set `lr_last_layer = "raw"` above to see it.'
    )


def redundancy_figure(table: pd.DataFrame, study: Study) -> plt.Figure:
    """Left LR by layer and text; right the slice FS of each layer, base and rest."""
    report.style()
    base, target = study.profile.figure_slice_base, study.profile.figure_slice_percentage
    figure, (left, right) = plt.subplots(1, 2, figsize=(2 * COLUMN_WIDTH, 2.4))
    looks = zip(cycle("os^Dv"), cycle(["-", "--", ":", "-.", "-"]), strict=False)
    for column, (marker, line) in zip(
        [c for c in table if c.startswith("LR")], looks, strict=False
    ):
        left.plot(table.index, table[column], line, marker=marker, markersize=3, label=column)
    left.set(xlabel="layer", ylabel="layer redundancy (cosine)")
    left.legend(frameon=False)
    for axis in (left, right):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.bar(table.index, 100 * base, color="0.7", label=f"slice base, {percent(base)}")
    right.bar(table.index, 100 * table["SLR"], bottom=100 * base, color="C0", label="SLR")
    mean = f"mean, {percent(target)}"
    right.axhline(100 * target, color="k", linestyle="--", linewidth=1, label=mean)
    top = 100 * max(1.5 * target, 1.2 * table["FS"].max(), 0.01)  # the legend above the bars
    right.set(xlabel="layer", ylabel="final slice (% of the width)", ylim=(0, top))
    right.legend(frameon=False, ncols=3, loc="upper center", columnspacing=0.8, handlelength=1.2)
    figure.tight_layout()
    return figure


# Perplexity


def perplexity_table(study: Study) -> pd.DataFrame:
    """One row per network and text: size, perplexity, and its interval over windows."""
    study.ensure(study.perplexity_requests())
    rows = []
    for point in study.points():
        size = study.get(study.slice_request(point)).value
        for text in study.profile.eval_texts:
            request = study.perplexity_request(point, text)
            low, high = compare.interval(compare.nll(study, request))
            value = study.get(request).value
            rows.append(
                {
                    "network": point.label,
                    "schedule": point.schedule,
                    "SP": point.slice_percentage,
                    "SB": point.slice_base,
                    "mean slice": size["mean_slice"],
                    "parameters (M)": size["parameters"] / 1e6,
                    "text": text,
                    "perplexity": value["perplexity"],
                    "low": np.exp(low),
                    "high": np.exp(high),
                    "windows": value["windows"],
                }
            )
    return pd.DataFrame(rows)


def perplexity_comparison(study: Study) -> pd.DataFrame:
    """Each dynamic network against constant, at equal mean slice and at equal size.

    The change of perplexity in percent, exp(mean difference of NLL) - 1, paired by window.
    """
    study.ensure(study.perplexity_requests())
    rows = []
    for dynamic, other, basis in compare.pairs(study.points()):
        sizes = [study.get(study.slice_request(p)).value["parameters"] for p in (dynamic, other)]
        for text in study.profile.eval_texts:
            change = compare.perplexity_change(study, dynamic, other, text)
            rows.append(
                {
                    "SP": dynamic.slice_percentage,
                    "SB": dynamic.slice_base,
                    "against constant at": basis,
                    "text": text,
                    "size (%)": 100 * (sizes[0] / sizes[1] - 1),
                    **_columns(change, "perplexity (%)"),
                }
            )
    names = ["SP", "SB", "against constant at", "text", "size (%)"]
    return pd.DataFrame(rows, columns=[*names, *_columns(None, "perplexity (%)")])


def perplexity_figure(table: pd.DataFrame) -> plt.Figure:
    """Perplexity against mean slice (as published) and against stored parameters."""
    report.style()
    texts = table["text"].unique()
    bases = table[table["schedule"] == "dynamic"]["SB"].nunique()
    legend = max(0.4, 0.2 * math.ceil((2 + bases) / LEGEND_COLUMNS))  # inches
    size = (2 * COLUMN_WIDTH, 2.5 * len(texts) + legend - 0.4)
    figure, axes = plt.subplots(len(texts), 2, figsize=size, squeeze=False, sharey="row")
    for row, text in zip(axes, texts, strict=True):
        here = table[table["text"] == text]
        for axis, x, factor in ((row[0], "mean slice", 100), (row[1], "parameters (M)", 1)):
            _constant_and_dynamic(axis, here, x, "perplexity", factor)
        row[0].set(xlabel="mean slice (% of the width)", ylabel=f"perplexity ({text})")
        row[1].set(xlabel="stored parameters (millions)")
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="upper center", ncols=LEGEND_COLUMNS, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 1 - legend / figure.get_figheight()))
    return figure


def size_prose(table: pd.DataFrame) -> str:
    """How the sliced networks compare with the dense one in what they store, as Markdown."""
    networks = table.drop_duplicates("network")
    dense = networks[networks["schedule"] == "dense"]["parameters (M)"].iloc[0]
    sliced = networks[networks["schedule"] != "dense"]["parameters (M)"]
    more = int((sliced > dense).sum())
    why = "slicing unties a tied embedding and adds the shortcut matrices"
    if len(sliced) == 1:
        return f"The sliced network stores {sliced.iloc[0]:.1f} M parameters, the dense model " + (
            f"{dense:.1f} M: {why}."
        )
    return (
        f"Of the {len(sliced)} sliced networks **{more} store more parameters than the dense "
        f"model** ({dense:.1f} M): {why}. "
        f"They store {sliced.min():.1f} to {sliced.max():.1f} M."
    )


# Choosing the slice base


def sweep_figure(comparison: pd.DataFrame) -> plt.Figure:
    """Change of perplexity from constant to dynamic by SB: a row per text, a column per SP.

    SB = SP is constant slicing itself, where both changes are zero.
    """
    report.style()
    if comparison.empty:
        return report.nothing()
    texts, percentages = comparison["text"].unique(), comparison["SP"].unique()
    size = (2 * COLUMN_WIDTH, 2.2 * len(texts))
    figure, axes = plt.subplots(
        len(texts), len(percentages), figsize=size, squeeze=False, sharex="col", sharey="row"
    )
    for row, text in zip(axes, texts, strict=True):
        for axis, sp in zip(row, percentages, strict=True):
            here = comparison[(comparison["text"] == text) & (comparison["SP"] == sp)]
            _sweep_panel(axis, here, sp)
            axis.set_title(f"{text}, SP {percent(sp)}")
        row[0].set_ylabel("change of perplexity (%)")
    for axis in axes[-1]:
        axis.set_xlabel("slice base (% of the width)")
    axes[0, 0].legend(frameon=False)
    figure.tight_layout()
    return figure


def selection_table(study: Study) -> pd.DataFrame:
    """Per SP, basis and text: the SB that validation chose, its change on the reported windows.

    Beside it the SB that is best on the reported windows themselves; its gain is optimistic,
    because the numbers that chose it are those that are shown.
    """
    study.ensure(study.perplexity_requests())
    rows = []
    for sp in study.profile.slice_percentages:
        for basis in compare.BASES:
            picked = compare.chosen(study, basis, sp)
            for text in study.profile.eval_texts if picked else []:
                best = compare.best(study, basis, text, sp)
                change = compare.perplexity_change(study, *picked[:2], text)
                optimistic = compare.perplexity_change(study, *best[:2], text)
                rows.append(
                    {
                        "SP": sp,
                        "against constant at": basis,
                        "text": text,
                        "SB chosen on validation": picked[0].slice_base,
                        **_columns(change, "perplexity (%)"),
                        "best SB in hindsight": best[0].slice_base,
                        "in hindsight (%)": optimistic.estimate,
                        "low, hindsight": optimistic.low,
                        "high, hindsight": optimistic.high,
                    }
                )
    names = ["SP", "against constant at", "text", "SB chosen on validation"]
    names += [*_columns(None, "perplexity (%)"), "best SB in hindsight", "in hindsight (%)"]
    return pd.DataFrame(rows, columns=[*names, "low, hindsight", "high, hindsight"])


def selection_prose(table: pd.DataFrame, study: Study) -> str:
    """What choosing on validation windows changes, as Markdown."""
    if study.profile.selection_windows is None:
        return "This profile chooses no SB: its `selection_windows` is null."
    if table.empty:
        return "This profile chooses no SB: it has no dynamic network."
    lines = []
    reported = f"{study.profile.eval_split or 'the reported'} windows"
    for basis, rows in table.groupby("against constant at", sort=False):
        counts = rows["dynamic is"].value_counts()
        found = ", ".join(f"{word} in {count}" for word, count in counts.items())
        plural = "s" * (len(rows) > 1)
        inflation = (rows["perplexity (%)"] - rows["in hindsight (%)"]).max()
        lines.append(
            f"- At **{basis}**, with SB chosen on validation windows, the perplexity of dynamic "
            f"slicing is, of {len(rows)} comparison{plural} on {reported}: {found}. "
            f"The best SB in hindsight would look better by up to {inflation:.1f} points."
        )
    return "\n".join(lines)


# Tasks


def task_table(study: Study) -> pd.DataFrame:
    """One row per network and task, then the average: accuracy with its interval, and margin.

    Accuracies in percent; the margin in nats (see `compare.margin_change`). A generation task has
    its main metric in percent in place of the accuracy, no margin, and no part in the average.
    """
    study.ensure(study.task_requests())
    averaged = compare.choice_tasks(study)
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
            low, high = compare.interval(*correct)
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
            margin_low, margin_high = compare.interval(*margins) if margins else (None, None)
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
    report.style()
    here = table if table.empty else table[table["task"] == "average"]
    if here.empty:
        return report.nothing()
    figure, (left, right) = plt.subplots(1, 2, figsize=(2 * COLUMN_WIDTH, 2.5))
    x = "parameters (M)"
    _constant_and_dynamic(left, here, x, "accuracy")
    margins = here.drop(columns=["low", "high"])
    margins = margins.rename(columns={"margin low": "low", "margin high": "high"})
    _constant_and_dynamic(right, margins, x, "margin")
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
    every = compare.choice_tasks(study)
    rows = []
    for dynamic, other, basis in compare.pairs(study.task_points()):
        for tasks in [*([task] for task in every), every] if every else []:
            margin = compare.margin_change(study, dynamic, other, tasks)
            rows.append(
                {
                    "SP": dynamic.slice_percentage,
                    "SB": dynamic.slice_base,
                    "against constant at": basis,
                    "task": tasks[0] if len(tasks) == 1 else "average",
                    **_columns(
                        compare.accuracy_change(study, dynamic, other, tasks), "accuracy (points)"
                    ),
                    "McNemar p": (
                        compare.mcnemar(study, dynamic, other, tasks[0])
                        if len(tasks) == 1
                        else None
                    ),
                    "margin (nats)": margin.estimate,
                    "margin low": margin.low,
                    "margin high": margin.high,
                    "margin of dynamic is": margin.direction,
                }
            )
    names = ["SP", "SB", "against constant at", "task", *_columns(None, "accuracy (points)")]
    names += ["McNemar p", "margin (nats)", "margin low", "margin high", "margin of dynamic is"]
    return pd.DataFrame(rows, columns=names)


def comparison_prose(comparison: pd.DataFrame, column: str, quantity: str) -> str:
    """What a table of paired differences says, per basis of comparison, as Markdown."""
    if comparison.empty:
        return f"This profile compares no dynamic with a constant network by {quantity}."
    lines = []
    unit = column.partition("(")[2].rstrip(")")
    for basis, rows in comparison.groupby("against constant at", sort=False):
        counts = rows["dynamic is"].value_counts()
        found = [
            f"no difference is shown in {count}"
            if word == "no difference shown"
            else f"{quantity} of dynamic slicing is {word} in {count}"
            for word, count in counts.items()
        ]
        low, high = (f"{x:+.1f}" for x in (rows[column].min(), rows[column].max()))
        changes = f"the change is {low}" if low == high else f"the changes are {low} to {high}"
        lines.append(
            f"- At **{basis}**, of {len(rows)} comparison{'s' * (len(rows) > 1)}: "
            f"{', '.join(found)}; {changes} {unit}."
        )
    return "\n".join(lines)


def difference_figure(comparison: pd.DataFrame, column: str, label: str) -> plt.Figure:
    """Paired differences with their intervals, one panel per basis of comparison.

    column: the difference, named `quantity (unit)`; label: the column that names the rows. An
    average is a filled circle.
    """
    report.style()
    if comparison.empty:
        return report.nothing()
    groups = list(comparison.groupby("against constant at", sort=False))
    figure, axes = plt.subplots(
        1,
        len(groups),
        figsize=(2 * COLUMN_WIDTH, 0.9 + 0.22 * len(groups[0][1])),
        sharey=True,
        sharex=True,
        squeeze=False,
    )
    for axis, (basis, rows) in zip(axes[0], groups, strict=True):
        y = np.arange(len(rows))[::-1]
        errors = [rows[column] - rows["low"], rows["high"] - rows[column]]
        fill = ["k" if name.startswith("average") else "w" for name in rows[label]]
        axis.errorbar(rows[column], y, xerr=errors, fmt="none", color="0.4", capsize=2, zorder=1)
        axis.scatter(rows[column], y, c=fill, edgecolors="k", s=18, zorder=2)
        axis.axvline(0, color="0.6", linewidth=1)
        axis.set_yticks(y, rows[label])
        axis.set_ylim(-0.5, len(rows) - 0.5)
        axis.set_title(f"against constant at {basis}")
        quantity, _, unit = column.rstrip(")").partition(" (")
        axis.set_xlabel(f"change of {quantity} ({unit})")
    if not comparison[[column, "low", "high"]].to_numpy(dtype=float).any():
        axes[0, 0].set_xlim(-1, 1)  # nothing but zeros gives no scale
    figure.tight_layout()
    return figure


# Parts


def _constant_and_dynamic(
    axis: plt.Axes, table: pd.DataFrame, x: str, y: str, factor: float = 1.0
) -> None:
    """y with its interval (low, high) against factor * x: constant as a curve, dynamic as marks."""
    dense = table[table["schedule"] == "dense"].iloc[0]
    axis.xaxis.set_major_locator(MaxNLocator(6))
    axis.axhline(dense[y], color="0.5", linestyle=":", label="dense")
    constant = table[table["schedule"].isin(["constant", "matched"])]
    report.points_with_intervals(axis, factor * constant[x], constant, y, "o-", "C0", "constant")
    dynamic = table[table["schedule"] == "dynamic"].groupby("SB")
    looks = cycle(product(("C1", "C3", "C4", "C2"), MARKERS))  # as many as there are SB
    for (colour, marker), (sb, rows) in zip(looks, dynamic, strict=False):
        label = f"dynamic, SB {percent(sb)}"
        report.points_with_intervals(axis, factor * rows[x], rows, y, marker, colour, label)


def _sweep_panel(axis: plt.Axes, rows: pd.DataFrame, sp: float) -> None:
    looks = {compare.EQUAL_SLICE: ("s--", "C2", -0.2), compare.EQUAL_SIZE: ("o-", "C0", 0.2)}
    for basis, (form, colour, aside) in looks.items():
        here = rows[rows["against constant at"] == basis]
        x = 100 * here["SB"] + aside
        report.points_with_intervals(axis, x, here, "perplexity (%)", form, colour, f"at {basis}")
    axis.axhline(0, color="0.6", linewidth=1)
    axis.plot(100 * sp, 0, "k|", markersize=8)


def _columns(change: compare.Difference | None, name: str) -> dict:
    if change is None:
        return dict.fromkeys((name, "low", "high", "dynamic is"))
    values = (change.estimate, change.low, change.high, change.direction)
    return dict(zip((name, "low", "high", "dynamic is"), values, strict=True))
