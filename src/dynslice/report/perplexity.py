"""Notebook 02: perplexity over the grid of SP and SB, and the choice of SB."""

import math
from itertools import product

import matplotlib.pyplot as plt
import pandas as pd

from dynslice.experiment.profile import percent
from dynslice.experiment.study import Study
from dynslice.report import comparison, statistics, style
from dynslice.report.comparison import BY, SAYS
from dynslice.report.statistics import PERPLEXITY, SIZE, UNTIED, columns

LEGEND_COLUMNS = 4


def perplexity_table(study: Study) -> pd.DataFrame:
    """One row per network and text: size, perplexity, and its interval over windows."""
    study.ensure(study.design.perplexity_requests())
    return pd.DataFrame(
        {
            "network": point.label,
            "schedule": point.schedule,
            "SP": point.slice_percentage,
            "SB": point.slice_base,
            "mean slice": study.get(study.slice_request(point)).value["mean_slice"],
            **statistics.sizes(study, point),
            "text": text,
            **columns(statistics.perplexity(study, point, text), "perplexity"),
            "windows": study.get(study.perplexity_request(point, text)).value["windows"],
        }
        for point in study.points()
        for text in study.profile.eval_texts
    )


def perplexity_comparison(study: Study) -> pd.DataFrame:
    """Each dynamic network against constant, at equal mean slice and at equal size.

    The change of perplexity in percent, exp(mean difference of NLL) - 1, paired by window.
    """
    study.ensure(study.design.perplexity_requests())
    return pd.DataFrame(
        {
            "SP": a.slice_percentage,
            "SB": a.slice_base,
            BY: basis,
            "text": text,
            **statistics.size_changes(study, a, b),
            **columns(statistics.perplexity_change(study, a, b, text), PERPLEXITY, says=SAYS),
        }
        for a, b, basis in statistics.pairs(study.points())
        for text in study.profile.eval_texts
    )


def perplexity_figure(table: pd.DataFrame) -> plt.Figure:
    """Perplexity against mean slice (as published) and against stored parameters."""
    texts = table["text"].unique()
    bases = table[table["schedule"] == "dynamic"]["SB"].nunique()
    height = 2.1 * len(texts) + 0.2 * math.ceil((2 + bases) / LEGEND_COLUMNS)
    figure, axes = style.panels(len(texts), 2, height, squeeze=False, sharey="row")
    for row, text in zip(axes, texts, strict=True):
        here = table[table["text"] == text].assign(percent=100 * table["mean slice"])
        for axis, x in zip(row, ("percent", "parameters (M)"), strict=True):
            comparison.constant_and_dynamic(axis, here, x, "perplexity")
        row[0].set(xlabel="mean slice (% of the width)", ylabel=f"perplexity ({text})")
        row[1].set(xlabel="stored parameters (millions)")
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=LEGEND_COLUMNS)
    return figure


def size_prose(table: pd.DataFrame) -> str:
    """How the sliced networks compare with the dense one in what they store, as Markdown."""
    networks = table.drop_duplicates("network").set_index("schedule")
    dense, sliced = networks.loc["dense", SIZE], networks.drop("dense")
    counts = {
        name: {"more": int((sizes > dense).sum()), **sizes.describe()}
        for name, sizes in (("stored", sliced[SIZE]), ("untied", sliced[UNTIED].astype(float)))
    }
    name = "size_of_one" if len(sliced) == 1 else "size_of_several"
    found = style.say(name, dense=dense, **counts)
    if sliced[SIZE].equals(sliced[UNTIED].astype(float)):
        return f"{found} {style.say('size_is_untied')}"
    return f"{found} {style.say(f'{name}_untied', dense=dense, **counts)}"


# Choosing the slice base


def sweep_figure(changes: pd.DataFrame) -> plt.Figure | None:
    """Change of perplexity from constant to dynamic by SB: a row per text, a column per SP.

    SB = SP is constant slicing itself, where both changes are zero.
    """
    if changes.empty:
        return None
    looks = {statistics.EQUAL_SLICE: ("s--", "C2", -0.2), statistics.EQUAL_SIZE: ("o-", "C0", 0.2)}
    texts, percentages = changes["text"].unique(), changes["SP"].unique()
    figure, axes = style.panels(
        len(texts), len(percentages), 2.2 * len(texts), squeeze=False, sharex="col", sharey="row"
    )
    for row, text in zip(axes, texts, strict=True):
        for axis, sp in zip(row, percentages, strict=True):
            here = changes[(changes["text"] == text) & (changes["SP"] == sp)]
            for basis, (form, colour, aside) in looks.items():
                rows = here[here[BY] == basis]
                x = 100 * rows["SB"] + aside
                style.points_with_intervals(axis, x, rows, PERPLEXITY, form, colour, f"at {basis}")
            style.zero_line(axis)
            axis.plot(100 * sp, 0, "k|", markersize=8)
            axis.set_title(f"{text}, SP {percent(sp)}")
        row[0].set_ylabel("change of perplexity (%)")
    for axis in axes[-1]:
        axis.set_xlabel("slice base (% of the width)")
    axes[0, 0].legend()
    return figure


def selection_table(study: Study) -> pd.DataFrame:
    """Per SP, basis and text: the SB that validation chose, its change on the reported windows.

    Then the SB that is best on the reported windows themselves; its gain is optimistic, because
    the numbers that chose it are those that are shown.
    """
    study.ensure(study.design.perplexity_requests())
    rows = []
    for sp, basis in product(study.profile.slice_percentages, statistics.BASES):
        picked = statistics.chosen(study, basis, sp)
        for text in study.profile.eval_texts if picked else []:
            best = statistics.best(study, basis, text, sp)
            change = statistics.perplexity_change(study, *picked[:2], text)
            optimistic = statistics.perplexity_change(study, *best[:2], text)
            row = {"SP": sp, BY: basis, "text": text}
            row["SB chosen on validation"] = picked[0].slice_base
            row |= columns(change, PERPLEXITY, says=SAYS)
            row["best SB in hindsight"] = best[0].slice_base
            row |= columns(optimistic, "in hindsight (%)", "{}, hindsight")
            rows.append(row)
    return pd.DataFrame(rows)


def selection_prose(table: pd.DataFrame) -> str:
    """What choosing on validation windows changes, as Markdown."""
    if table.empty:
        return style.NONE
    gaps = table[PERPLEXITY] - table["in hindsight (%)"]
    differ = int((gaps > 0).sum())
    return style.say(
        "hindsight" if differ else "hindsight_same", gaps=gaps.describe(), differ=differ
    )
