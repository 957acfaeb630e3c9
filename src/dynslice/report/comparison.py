"""Sentences and figures of paired differences that several notebooks share."""

from itertools import cycle, product

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.ticker import MaxNLocator

from dynslice.experiment.profile import percent
from dynslice.report import statistics, style
from dynslice.report.style import MARKERS

BY = "against constant at"  # the column of the basis of a comparison
SAYS = "dynamic is"  # that of the direction of a change


def prose(comparison: pd.DataFrame, column: str, quantity: str) -> str:
    """What a table of paired differences says, per basis of comparison, as Markdown.

    Of a table with tasks, what it says of their average.
    """
    if comparison.empty:
        return style.NONE
    if "task" in comparison:
        comparison = comparison[comparison["task"] == "average"]
    lines = []
    for basis, rows in comparison.groupby(BY, sort=False):
        words = rows[SAYS].value_counts().items()
        low, high = (f"{x:+.1f}" for x in (rows[column].min(), rows[column].max()))
        found = style.say(
            "paired",
            basis=basis,
            comparisons=f"{len(rows)} comparison{'s' * (len(rows) > 1)}",
            found=", ".join(
                style.say(word, quantity=quantity, count=count) for word, count in words
            ),
            changes=f"change is {low}" if low == high else f"changes are {low} to {high}",
            unit=column.partition("(")[2].rstrip(")"),
        )
        lines.append(f"- {found}")
    return "\n".join(lines)


def figure(comparison: pd.DataFrame, column: str) -> plt.Figure | None:
    """Paired differences with their intervals, one panel per basis of comparison.

    column: the difference, named `quantity (unit)`. An average over tasks is a filled circle.
    """
    if comparison.empty:
        return None
    shares = "SP " + comparison["SP"].map(percent) + ", SB " + comparison["SB"].map(percent)
    tasks = "task" in comparison
    names = comparison["task"] + ", " + shares if tasks else shares + ", " + comparison["text"]
    groups = list(comparison.assign(name=names).groupby(BY, sort=False))
    height = 0.9 + 0.22 * len(groups[0][1])
    fig, axes = style.panels(1, len(groups), height, sharey=True, sharex=True, squeeze=False)
    for axis, (basis, rows) in zip(axes[0], groups, strict=True):
        averages = [name for name in rows["name"] if name.startswith("average")]
        forest(axis, rows, column, "name", filled=averages)
        axis.set_title(f"against constant at {basis}")
        axis.set_xlabel(f"change of {column}")
    if not comparison[[column, "low", "high"]].to_numpy(dtype=float).any():
        axes[0, 0].set_xlim(-1, 1)  # nothing but zeros gives no scale
    return fig


# Parts of figures


def forest(
    axis: plt.Axes,
    rows: pd.DataFrame,
    column: str,
    label: str,
    filled: list[str],
    bounds: str = "{}",
) -> None:
    """Differences with their intervals, a line for each name in the column `label`.

    filled: the names whose marks are full. bounds: see `statistics.columns`.
    """
    names = list(rows[label].unique())
    y = rows[label].map({name: len(names) - 1 - i for i, name in enumerate(names)})
    columns = statistics.columns(None, column, bounds)
    values, low, high = (rows[name].astype(float) for name in columns)
    bars = {"color": "0.4", "linewidth": 1, "capsize": 2}
    axis.errorbar(values, y, xerr=[values - low, high - values], fmt="none", zorder=1, **bars)
    faces = ["k" if full else "w" for full in rows[label].isin(filled)]
    axis.scatter(values, y, 18, faces, edgecolors="k", zorder=2)
    style.zero_line(axis, vertical=True)
    axis.set_yticks(range(len(names))[::-1], names)
    axis.set_ylim(-0.6, len(names) - 0.4)


def constant_and_dynamic(axis: plt.Axes, table: pd.DataFrame, x: str, y: str) -> None:
    """y with its interval (low, high) against x: constant as a curve, dynamic as marks."""
    dense = table[table["schedule"] == "dense"].iloc[0]
    axis.xaxis.set_major_locator(MaxNLocator(6))
    axis.axhline(dense[y], color="0.5", linestyle=":", label="dense")
    constant = table[table["schedule"].isin(["constant", "matched"])]
    style.points_with_intervals(axis, constant[x], constant, y, "o-", "C0", "constant")
    dynamic = table[table["schedule"] == "dynamic"].groupby("SB")
    looks = cycle(product(("C1", "C3", "C4", "C2"), MARKERS))  # as many as there are SB
    for (colour, marker), (sb, rows) in zip(looks, dynamic, strict=False):
        label = f"dynamic, SB {percent(sb)}"
        style.points_with_intervals(axis, rows[x], rows, y, marker, colour, label)
