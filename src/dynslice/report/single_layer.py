"""Notebook 04, each layer cut alone: does LR predict what hurts?"""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from scipy import stats

from dynslice.experiment.profile import percent
from dynslice.experiment.study import Study
from dynslice.report import statistics, style

FEWEST_LAYERS = 8  # below that a rank correlation says nothing, and resamples of it are undefined
OUTLIERS = 4  # by 1 - LR and by loss, that a figure numbers
LOSS = statistics.PERPLEXITY


def table(study: Study) -> pd.DataFrame:
    """Per layer: LR, and by how many percent cutting that layer alone raises the perplexity."""
    request = study.ablation.single_layer_request()
    if request is None:
        return pd.DataFrame()
    value, lr = study.get(request).value, study.lr()
    dense = np.array(value["dense"])
    return pd.DataFrame(
        {
            "layer": layer["index"],
            "LR": lr[layer["index"]],
            **statistics.columns(statistics.relative_change(np.array(layer["nll"]), dense), LOSS),
        }
        for layer in value["layers"]
    )


def rank_correlation(losses: pd.DataFrame) -> statistics.Estimate:
    """Spearman's correlation of LR with the measured loss; the interval resamples layers."""

    def spearman(x: np.ndarray, y: np.ndarray, axis: int) -> np.ndarray:
        ranks = (stats.rankdata(values, axis=axis) for values in (x, y))
        return stats.pearsonr(*ranks, axis=axis).statistic

    samples = losses["LR"].to_numpy(), losses[LOSS].to_numpy()
    bounds = statistics.bootstrap(samples, spearman, paired=True)
    return statistics.Estimate(float(spearman(*samples, axis=-1)), *bounds)


def prose(losses: pd.DataFrame, study: Study) -> str:
    """Whether layers with high LR are those that are cheap to cut (Markdown)."""
    if losses.empty:
        return style.NONE
    inner = losses.iloc[1:-1]
    if len(inner) < FEWEST_LAYERS:
        return f"{len(losses)} layers are too few for a rank correlation."
    found = {}
    for name, layers in {"within": inner, "over_all": losses}.items():
        rho = rank_correlation(layers)
        says = style.say(f"single_layer_{rho.direction}")
        found[name] = {"layers": len(layers), "rho": rho.format(digits=2), "says": says}
    for name, layer in {
        "worst": losses[LOSS].idxmax(),
        "mildest": losses[LOSS].idxmin(),
    }.items():
        found[name] = losses.loc[layer]
    parts = np.array_split(losses[LOSS].to_numpy(), 3)
    thirds = ", ".join(f"{np.median(part):+.1f}" for part in parts)
    p, found = study.profile, {**found, "thirds": thirds}
    return style.say("single_layer", p=p, share=percent(p.single_layer_slice), **found)


def figure(losses: pd.DataFrame) -> plt.Figure | None:
    """Left the loss against 1 - LR, outliers with the layer's number; right the loss by layer."""
    if losses.empty:
        return None
    fig, (left, right) = style.panels(1, 2, sharey=True)
    change = 1 - losses["LR"]
    for axis, x in ((left, change), (right, losses["layer"])):
        style.points_with_intervals(axis, x, losses, LOSS, "o", "C0", "")
    outliers = {*change.nlargest(OUTLIERS).index, *losses[LOSS].nlargest(OUTLIERS).index}
    for i in outliers:
        where = {"xytext": (3, 3), "textcoords": "offset points", "fontsize": 7}
        left.annotate(losses["layer"][i], (change[i], losses[LOSS][i]), **where)
    left.set(xlabel="1 - layer redundancy", ylabel="perplexity, layer cut alone (%)")
    left.set_xscale("log")
    if (losses["low"] > 0).all():
        left.set_yscale("log")
    for axis in (left.xaxis, left.yaxis):
        if axis.get_scale() == "log":
            style.log_ticks(axis, 1, 2, 5)
    right.set(xlabel="layer")
    style.whole_numbers(right)
    return fig
