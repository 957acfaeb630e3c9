"""Notebook 07, beside the ladder: where the width goes, and what else was tried.

All at the last of the sizes, by validation windows only.
"""

from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from dynslice.experiment.equal_size import BEST_RECIPE, SHARED, SLICEGPT
from dynslice.experiment.profile import percent
from dynslice.experiment.requests import Point
from dynslice.experiment.study import Study
from dynslice.method.layout import basis_groups
from dynslice.report import statistics, style
from dynslice.report.equal_size import WHOLE, ladders, last_ladder, rung
from dynslice.report.statistics import Estimate, columns

# The columns of a change from what a variant varies, and of its interval.
VARIED = ("one change (%)", "{}, change")


def variant_table(study: Study) -> pd.DataFrame:
    """Perplexity on validation windows of the rungs and of all that was tried at the last size.

    A variant changes one thing of a rung, and is compared with it and with SliceGPT.
    """
    if not ladders(study) or study.profile.selection_windows is None:
        return pd.DataFrame()
    sp, rungs = last_ladder(study)
    reference, rows = rung(rungs, SLICEGPT), []
    for point in [*rungs, *study.beyond.variants(sp)]:
        varied = None if point in rungs else _varied(point, rungs)
        row = {"network": point.name, "varies": varied.name if varied else "-"}
        row |= statistics.sizes(study, point)
        value = study.get(study.selection_request(point)).value
        row["validation perplexity"] = value["perplexity"]
        change = statistics.selection_change(study, point, varied) if varied else None
        whole = statistics.selection_change(study, point, reference)
        rows.append({**row, **columns(change, *VARIED), **columns(whole, *WHOLE)})
    return pd.DataFrame(rows)


def _varied(point: Point, rungs: list[Point]) -> Point:
    """The rung of which a variant changes one thing."""
    if "compensation" in point.network:
        return rung(rungs, BEST_RECIPE)
    slicegpt = rung(rungs, SLICEGPT)
    is_constant = point.network["plan"] == slicegpt.network["plan"]
    return slicegpt if is_constant else rung(rungs, SHARED)


def choice_prose(study: Study, table: pd.DataFrame) -> str:
    """Whether validation windows choose the recipe, and what the variants did (Markdown)."""
    if table.empty:
        return style.NONE
    sp, rungs = last_ladder(study)
    tuned = [point.name for point in rungs if "recovery" in point.network]
    ranked = table[~table["network"].isin(tuned)].sort_values("validation perplexity")
    best, recipe = ranked.iloc[0], ranked[ranked["network"] == BEST_RECIPE].iloc[0]
    ours = style.say("choice_ours" if best.equals(recipe) else "choice_other", recipe=recipe)
    lines = [style.say("choice", count=len(ranked), share=percent(sp), best=best, ours=ours)]
    variants = table[table["varies"] != "-"]
    shuffled = [p.name for p in study.beyond.variants(sp) if p.schedule == "shuffled"]
    orders = variants[variants["network"].isin(shuffled)]
    for said, rows in (("variants", variants), ("orders", orders)):
        if len(rows):
            higher, lower = (rows[VARIED[1].format(end)] for end in ("low", "high"))
            better = "; ".join(rows["network"][lower < 0]) or "none"
            counts = {"count": len(rows), "worse": int((higher > 0).sum()), "better": better}
            lines.append(style.say(said, **counts, changes=rows[VARIED[0]].describe()))
    if rule := {key: x.format("%") for key, x in first_layer_rule(study).items()}:
        lines.append(style.say("orders_rule", **rule))
    return "\n\n".join(lines)


def first_layer_rule(study: Study) -> dict[str, Estimate]:
    """What the rule changes that keeps the first layer whole, in place of LR; empty without it.

    On validation windows at the last size, with shared bases and with compensation besides.
    """
    if "first" not in study.profile.beyond_candidates or study.profile.selection_windows is None:
        return {}
    sp, rungs = last_ladder(study)
    tried = {point.name: point for point in study.beyond.variants(sp)}
    return {
        key: statistics.selection_change(study, tried[f"first widths, {lever}"], rung(rungs, lever))
        for key, lever in (("shared", SHARED), ("whole", BEST_RECIPE))
    }


def widths_figure(study: Study) -> plt.Figure | None:
    """The width of the stream at each place, by network, at the last of the sizes.

    Vertical lines are where the recipe takes another basis.
    """
    if not ladders(study):
        return None
    sp, rungs = last_ladder(study)
    calibration, candidates = rungs[0].network["calibration"], study.profile.beyond_candidates
    tried = [p for p in study.beyond.variants(sp) if p.network["plan"]["schedule"] in candidates]
    tried = [p for p in tried if p.network["calibration"] == calibration]
    figure, axis = style.panels(height=2.4)
    looks = zip(cycle(["-", "--", ":", "-."]), cycle([f"C{i}" for i in range(10)]), strict=False)
    for point in [*rungs, *tried]:
        if {"compensation", "recovery"} & set(point.network):
            continue  # they leave the widths alone
        value = study.get(study.slice_request(point)).value
        attention = value.get("attention_widths", value["widths"])
        pairs = np.column_stack((attention, value["widths"])).ravel()
        line, colour = next(looks)
        at = np.arange(len(pairs)) / 2
        axis.step(at, pairs, line, where="mid", color=colour, label=point.name)
    layers, asked = len(value["widths"]), study.profile.beyond_basis_layers
    for layer in np.cumsum(basis_groups(1, layers, asked, study.lr()))[:-1]:
        axis.axvline(layer - 0.25, color="0.6", linewidth=0.8, zorder=0)
    axis.set(xlabel="layer (MLP half a layer later)", ylabel=f"width, size of SP {percent(sp)}")
    style.whole_numbers(axis)
    axis.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure
