"""Notebook 02: perplexity over the grid of SP and SB, and the choice of SB."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from dynslice.experiment.profile import percent
from dynslice.experiment.study import Study
from dynslice.report import comparison, statistics, style
from dynslice.report.comparison import BY

LEGEND_COLUMNS = 4


def perplexity_table(study: Study) -> pd.DataFrame:
    """One row per network and text: size, perplexity, and its interval over windows."""
    study.ensure(study.design.perplexity_requests())
    rows = []
    for point in study.points():
        size = study.get(study.slice_request(point)).value
        for text in study.profile.eval_texts:
            request = study.perplexity_request(point, text)
            low, high = statistics.interval(statistics.nll(study, request))
            rows.append(
                {
                    "network": point.label,
                    "schedule": point.schedule,
                    "SP": point.slice_percentage,
                    "SB": point.slice_base,
                    "mean slice": size["mean_slice"],
                    "parameters (M)": size["parameters"] / 1e6,
                    "text": text,
                    "perplexity": study.perplexity(point, text),
                    "low": np.exp(low),
                    "high": np.exp(high),
                    "windows": study.get(request).value["windows"],
                }
            )
    return pd.DataFrame(rows)


def perplexity_comparison(study: Study) -> pd.DataFrame:
    """Each dynamic network against constant, at equal mean slice and at equal size.

    The change of perplexity in percent, exp(mean difference of NLL) - 1, paired by window.
    """
    study.ensure(study.design.perplexity_requests())
    return pd.DataFrame(
        {
            "SP": dynamic.slice_percentage,
            "SB": dynamic.slice_base,
            BY: basis,
            "text": text,
            "size (%)": 100 * (study.size(dynamic) / study.size(other) - 1),
            **comparison.columns(
                statistics.perplexity_change(study, dynamic, other, text), "perplexity (%)"
            ),
        }
        for dynamic, other, basis in statistics.pairs(study.points())
        for text in study.profile.eval_texts
    )


def perplexity_figure(table: pd.DataFrame) -> plt.Figure:
    """Perplexity against mean slice (as published) and against stored parameters."""
    texts = table["text"].unique()
    bases = table[table["schedule"] == "dynamic"]["SB"].nunique()
    height = 2.1 * len(texts) + 0.2 * math.ceil((2 + bases) / LEGEND_COLUMNS)
    figure, axes = style.panels(len(texts), 2, height, squeeze=False, sharey="row")
    for row, text in zip(axes, texts, strict=True):
        here = table[table["text"] == text]
        for axis, x, factor in ((row[0], "mean slice", 100), (row[1], "parameters (M)", 1)):
            comparison.constant_and_dynamic(axis, here, x, "perplexity", factor)
        row[0].set(xlabel="mean slice (% of the width)", ylabel=f"perplexity ({text})")
        row[1].set(xlabel="stored parameters (millions)")
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=LEGEND_COLUMNS)
    return figure


def size_prose(table: pd.DataFrame) -> str:
    """How the sliced networks compare with the dense one in what they store, as Markdown."""
    networks = table.drop_duplicates("network").set_index("schedule")["parameters (M)"]
    dense, sliced = networks["dense"], networks.drop("dense")
    why = "slicing unties a tied embedding and adds the shortcut matrices"
    if len(sliced) == 1:
        return f"The sliced network stores {sliced.iloc[0]:.1f} M parameters, the dense model " + (
            f"{dense:.1f} M: {why}."
        )
    return (
        f"Of the {len(sliced)} sliced networks **{int((sliced > dense).sum())} store more "
        f"parameters than the dense model** ({dense:.1f} M): {why}. "
        f"They store {sliced.min():.1f} to {sliced.max():.1f} M."
    )


# Choosing the slice base


def sweep_figure(changes: pd.DataFrame) -> plt.Figure:
    """Change of perplexity from constant to dynamic by SB: a row per text, a column per SP.

    SB = SP is constant slicing itself, where both changes are zero.
    """
    if changes.empty:
        return style.nothing()
    texts, percentages = changes["text"].unique(), changes["SP"].unique()
    figure, axes = style.panels(
        len(texts), len(percentages), 2.2 * len(texts), squeeze=False, sharex="col", sharey="row"
    )
    for row, text in zip(axes, texts, strict=True):
        for axis, sp in zip(row, percentages, strict=True):
            _sweep_panel(axis, changes[(changes["text"] == text) & (changes["SP"] == sp)], sp)
            axis.set_title(f"{text}, SP {percent(sp)}")
        row[0].set_ylabel("change of perplexity (%)")
    for axis in axes[-1]:
        axis.set_xlabel("slice base (% of the width)")
    axes[0, 0].legend()
    return figure


def _sweep_panel(axis: plt.Axes, rows: pd.DataFrame, sp: float) -> None:
    looks = {statistics.EQUAL_SLICE: ("s--", "C2", -0.2), statistics.EQUAL_SIZE: ("o-", "C0", 0.2)}
    for basis, (form, colour, aside) in looks.items():
        here = rows[rows[BY] == basis]
        x = 100 * here["SB"] + aside
        style.points_with_intervals(axis, x, here, "perplexity (%)", form, colour, f"at {basis}")
    style.zero_line(axis)
    axis.plot(100 * sp, 0, "k|", markersize=8)


def selection_table(study: Study) -> pd.DataFrame:
    """Per SP, basis and text: the SB that validation chose, its change on the reported windows.

    Then the SB that is best on the reported windows themselves; its gain is optimistic, because
    the numbers that chose it are those that are shown.
    """
    study.ensure(study.design.perplexity_requests())
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
                        BY: basis,
                        "text": text,
                        "SB chosen on validation": picked[0].slice_base,
                        **comparison.columns(change, "perplexity (%)"),
                        "best SB in hindsight": best[0].slice_base,
                        **statistics.columns(optimistic, "in hindsight (%)", "hindsight"),
                    }
                )
    return pd.DataFrame(rows)


def selection_prose(table: pd.DataFrame, study: Study) -> str:
    """What choosing on validation windows changes, as Markdown."""
    if study.profile.selection_windows is None:
        return "This profile chooses no SB: its `selection_windows` is null."
    if table.empty:
        return "This profile chooses no SB: it has no dynamic network."
    gaps = table["perplexity (%)"] - table["in hindsight (%)"]
    return (
        f"The best SB in hindsight looks up to {gaps.max():.1f} points better than the chosen one "
        f"({int((gaps > 0).sum())} of {len(gaps)} comparisons differ)."
    )
