"""Notebooks 01 to 03 from results: layer redundancy, and networks over the grid of SP and SB."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from dynslice.experiment.profile import percent
from dynslice.experiment.study import Study
from dynslice.report import statistics, style
from dynslice.report.comparison import LEGEND_COLUMNS, constant_and_dynamic, difference_columns
from dynslice.report.style import COLUMN_WIDTH

# Perplexity


def perplexity_table(study: Study) -> pd.DataFrame:
    """One row per network and text: size, perplexity, and its interval over windows."""
    study.ensure(study.perplexity_requests())
    rows = []
    for point in study.points():
        size = study.get(study.slice_request(point)).value
        for text in study.profile.eval_texts:
            request = study.perplexity_request(point, text)
            low, high = statistics.interval(statistics.nll(study, request))
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
    for dynamic, other, basis in statistics.pairs(study.points()):
        sizes = [study.get(study.slice_request(p)).value["parameters"] for p in (dynamic, other)]
        for text in study.profile.eval_texts:
            change = statistics.perplexity_change(study, dynamic, other, text)
            rows.append(
                {
                    "SP": dynamic.slice_percentage,
                    "SB": dynamic.slice_base,
                    "against constant at": basis,
                    "text": text,
                    "size (%)": 100 * (sizes[0] / sizes[1] - 1),
                    **difference_columns(change, "perplexity (%)"),
                }
            )
    names = ["SP", "SB", "against constant at", "text", "size (%)"]
    return pd.DataFrame(rows, columns=[*names, *difference_columns(None, "perplexity (%)")])


def perplexity_figure(table: pd.DataFrame) -> plt.Figure:
    """Perplexity against mean slice (as published) and against stored parameters."""
    style.style()
    texts = table["text"].unique()
    bases = table[table["schedule"] == "dynamic"]["SB"].nunique()
    legend = max(0.4, 0.2 * math.ceil((2 + bases) / LEGEND_COLUMNS))  # inches
    size = (2 * COLUMN_WIDTH, 2.5 * len(texts) + legend - 0.4)
    figure, axes = plt.subplots(len(texts), 2, figsize=size, squeeze=False, sharey="row")
    for row, text in zip(axes, texts, strict=True):
        here = table[table["text"] == text]
        for axis, x, factor in ((row[0], "mean slice", 100), (row[1], "parameters (M)", 1)):
            constant_and_dynamic(axis, here, x, "perplexity", factor)
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
    style.style()
    if comparison.empty:
        return style.nothing()
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
        for basis in statistics.BASES:
            picked = statistics.chosen(study, basis, sp)
            for text in study.profile.eval_texts if picked else []:
                best = statistics.best(study, basis, text, sp)
                change = statistics.perplexity_change(study, *picked[:2], text)
                optimistic = statistics.perplexity_change(study, *best[:2], text)
                rows.append(
                    {
                        "SP": sp,
                        "against constant at": basis,
                        "text": text,
                        "SB chosen on validation": picked[0].slice_base,
                        **difference_columns(change, "perplexity (%)"),
                        "best SB in hindsight": best[0].slice_base,
                        "in hindsight (%)": optimistic.estimate,
                        "low, hindsight": optimistic.low,
                        "high, hindsight": optimistic.high,
                    }
                )
    names = ["SP", "against constant at", "text", "SB chosen on validation"]
    names += [
        *difference_columns(None, "perplexity (%)"),
        "best SB in hindsight",
        "in hindsight (%)",
    ]
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


def _sweep_panel(axis: plt.Axes, rows: pd.DataFrame, sp: float) -> None:
    looks = {statistics.EQUAL_SLICE: ("s--", "C2", -0.2), statistics.EQUAL_SIZE: ("o-", "C0", 0.2)}
    for basis, (form, colour, aside) in looks.items():
        here = rows[rows["against constant at"] == basis]
        x = 100 * here["SB"] + aside
        style.points_with_intervals(axis, x, here, "perplexity (%)", form, colour, f"at {basis}")
    axis.axhline(0, color="0.6", linewidth=1)
    axis.plot(100 * sp, 0, "k|", markersize=8)
