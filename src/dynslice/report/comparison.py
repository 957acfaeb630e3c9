"""Tables and figures of paired differences that several notebooks share."""

from itertools import cycle, product

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator

from dynslice.experiment.profile import percent
from dynslice.report import statistics, style
from dynslice.report.style import COLUMN_WIDTH, MARKERS

LEGEND_COLUMNS = 4


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
    style.style()
    if comparison.empty:
        return style.nothing()
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


def constant_and_dynamic(
    axis: plt.Axes, table: pd.DataFrame, x: str, y: str, factor: float = 1.0
) -> None:
    """y with its interval (low, high) against factor * x: constant as a curve, dynamic as marks."""
    dense = table[table["schedule"] == "dense"].iloc[0]
    axis.xaxis.set_major_locator(MaxNLocator(6))
    axis.axhline(dense[y], color="0.5", linestyle=":", label="dense")
    constant = table[table["schedule"].isin(["constant", "matched"])]
    style.points_with_intervals(axis, factor * constant[x], constant, y, "o-", "C0", "constant")
    dynamic = table[table["schedule"] == "dynamic"].groupby("SB")
    looks = cycle(product(("C1", "C3", "C4", "C2"), MARKERS))  # as many as there are SB
    for (colour, marker), (sb, rows) in zip(looks, dynamic, strict=False):
        label = f"dynamic, SB {percent(sb)}"
        style.points_with_intervals(axis, factor * rows[x], rows, y, marker, colour, label)


def difference_columns(change: statistics.Difference | None, name: str) -> dict:
    if change is None:
        return dict.fromkeys((name, "low", "high", "dynamic is"))
    values = (change.estimate, change.low, change.high, change.direction)
    return dict(zip((name, "low", "high", "dynamic is"), values, strict=True))
