"""Notebook 04, each layer cut alone: does LR predict what hurts?"""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axis import Axis
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from scipy import stats

from dynslice.experiment.profile import percent
from dynslice.experiment.study import Study
from dynslice.report import statistics, style
from dynslice.report.statistics import Difference

FEWEST_LAYERS = 8  # below that a rank correlation says nothing, and resamples of it are undefined

LOSS = "perplexity (%)"


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


def rank_correlation(losses: pd.DataFrame) -> Difference:
    """Spearman's correlation of LR with the measured loss; the interval resamples layers."""

    def spearman(x: np.ndarray, y: np.ndarray, axis: int) -> np.ndarray:
        ranks = (stats.rankdata(values, axis=axis) for values in (x, y))
        return stats.pearsonr(*ranks, axis=axis).statistic

    samples = losses["LR"].to_numpy(), losses[LOSS].to_numpy()
    bounds = statistics.bootstrap(samples, spearman, paired=True)
    return Difference(float(spearman(*samples, axis=-1)), float(bounds.low), float(bounds.high))


def prose(losses: pd.DataFrame, study: Study) -> str:
    """Whether layers with high LR are those that are cheap to cut (Markdown)."""
    if losses.empty:
        return style.NONE
    inner = losses.iloc[1:-1]
    if len(inner) < FEWEST_LAYERS:
        return f"{len(losses)} layers are too few for a rank correlation."
    rho, within = rank_correlation(losses), rank_correlation(inner)
    worst, mildest = losses.loc[losses[LOSS].idxmax()], losses.loc[losses[LOSS].idxmin()]
    says = {
        "lower": "layers with a higher LR do lose less: LR predicts what hurts",
        "higher": "layers with a higher LR lose **more**: LR ranks the layers the wrong way round",
        "no difference shown": "no relation is shown between LR and what a cut costs",
    }
    p = study.profile
    return (
        f"Each layer cut alone by {percent(p.single_layer_slice)} ({p.eval_texts[0]}, "
        f"{p.single_layer_eval_windows} validation windows): the rank correlation of LR with the "
        f"loss is {_interval(within)} over the {len(inner)} layers between the first and the last: "
        f"{says[within.direction]}. Over all {len(losses)} it is {_interval(rho)}: "
        f"{says[rho.direction]}. Cutting layer {worst['layer']:.0f} costs most "
        f"({worst[LOSS]:+.1f} %, LR {worst['LR']:.3f}), layer {mildest['layer']:.0f} "
        f"least ({mildest[LOSS]:+.1f} %, LR {mildest['LR']:.3f})."
    )


def figure(losses: pd.DataFrame) -> plt.Figure:
    """Left the loss against 1 - LR, a numbered point per layer; right the loss by layer."""
    if losses.empty:
        return style.nothing()
    fig, (left, right) = style.panels(1, 2, sharey=True)
    change = 1 - losses["LR"]
    for axis, x in ((left, change), (right, losses["layer"])):
        style.points_with_intervals(axis, x, losses, LOSS, "o", "C0", "")
    for x, y, layer in zip(change, losses[LOSS], losses["layer"], strict=True):
        left.annotate(layer, (x, y), fontsize=5, xytext=(2, 2), textcoords="offset points")
    left.set(xlabel="1 - layer redundancy", ylabel="perplexity, layer cut alone (%)")
    left.set_xscale("log")
    _plain_numbers(left.xaxis)
    if (losses["low"] > 0).all():
        left.set_yscale("log")
        _plain_numbers(left.yaxis)
    right.set(xlabel="layer")
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    return fig


def _plain_numbers(axis: Axis) -> None:
    """1, 2, 5, 10 ... on a logarithmic axis."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")


def _interval(value: Difference) -> str:
    return f"{value.estimate:+.2f} [{value.low:+.2f}, {value.high:+.2f}]"
