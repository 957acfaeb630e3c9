"""The authors' raw outputs of June 2024: what a forerunner of LR changed, by their own numbers."""

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from scipy import stats

from dynslice.core import paths
from dynslice.report import style

LOGS = "dynamicslicing_logs.csv"
CONSTANT = 0.0  # the variation whose widths are all equal


def averages() -> pd.DataFrame:
    """Accuracy in percent, the mean over tasks, by model and variation, with its standard error.

    The error takes the tasks as independent: sqrt(sum of squares) / number of tasks.
    """
    logs = pd.read_csv(paths.PUBLISHED / LOGS)
    by_task = logs.groupby(["model", "variation"], sort=False)
    errors = by_task["acc_stderr"].agg(lambda e: 100 * np.sqrt((e**2).sum()) / len(e))
    found = {"accuracy (%)": 100 * by_task["acc"].mean(), "standard error": errors}
    return pd.DataFrame({**found, "tasks": by_task["acc"].size()}).reset_index()


def table() -> pd.DataFrame:
    """By model: constant slicing, the best of the other variations, the largest one, and a test.

    `gain of the best` is over constant. `best by luck` is how far the best of so many variations
    lies above constant on average if all are equal: the standard error times the expected maximum
    of that many standard normal numbers. `p` is that of the best, one-sided, times the number of
    variations (Bonferroni). Both take the errors of networks as independent; they answer the same
    items, so the true error of a difference is smaller.
    """
    rows = []
    for model, found in averages().groupby("model", sort=False):
        accuracy = found.set_index("variation")["accuracy (%)"]
        error, others = found["standard error"].iloc[0], accuracy.drop(CONSTANT)
        gain = others.max() - accuracy[CONSTANT]
        p = stats.norm.sf(gain / (np.sqrt(2) * error)) * len(others)
        rows.append(
            {
                "model": model,
                "tasks": found["tasks"].iloc[0],
                "constant (%)": accuracy[CONSTANT],
                "standard error": error,
                f"best of {len(others)} (%)": others.max(),
                "its variation": others.idxmax(),
                f"variation {others.index.max():g} (%)": others.iloc[-1],
                "gain of the best": gain,
                "best by luck": error * _expected_maximum(len(others)),
                "p": min(1.0, p),
            }
        )
    return pd.DataFrame(rows)


def _expected_maximum(count: int) -> float:
    """The mean of the largest of so many standard normal numbers."""
    x = np.linspace(-8, 8, 4001)
    density = count * stats.norm.pdf(x) * stats.norm.cdf(x) ** (count - 1)
    return float(np.trapezoid(x * density, x))


def figure() -> plt.Figure:
    """Average accuracy against the variation, a panel per model, with standard errors."""
    models = averages().groupby("model", sort=False)
    drawn, axes = style.panels(1, len(models), height=2.0, sharex=True)
    for axis, (model, found) in zip(axes, models, strict=True):
        bars = {"yerr": found["standard error"], "markersize": 3, "linewidth": 0.8}
        axis.errorbar(found["variation"], found["accuracy (%)"], fmt="o-", color="C0", **bars)
        constant = found.loc[found["variation"] == CONSTANT, "accuracy (%)"].item()
        axis.axhline(constant, color="0.4", linestyle="--", linewidth=1)
        axis.set_title(model.rpartition("/")[2], fontsize=7)
    axes[0].set_ylabel("average accuracy (%)")
    drawn.supxlabel("variation of the widths (dashed: none, constant slicing)", fontsize=8)
    return drawn


def prose() -> str:
    """What the outputs are, and how often the best of them is more than luck."""
    found = table()
    better = found[found["p"] < 0.05]
    return style.say(
        "forerunner",
        count=len(found),
        better=len(better),
        which=", ".join(better["model"]) or "none",
        luck=found["best by luck"].describe(),
        gain=found["gain of the best"].describe(),
    )
