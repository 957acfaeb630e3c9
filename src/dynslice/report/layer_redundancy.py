"""Notebook 01: layer redundancy and the slices that follow from it."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from dynslice.experiment.profile import percent
from dynslice.experiment.study import Study
from dynslice.report import style


def redundancy_table(study: Study) -> pd.DataFrame:
    """Per layer: LR on each text, and n, SLR, FS and width of the plan of the figure."""
    study.ensure(study.design.redundancy_requests())
    table = pd.DataFrame({f"LR ({r.config['text']})": study.lr(r) for r in study.lr_requests()})
    plan = study.get(study.design.figure_request()).value
    columns = {
        "n": [x["normalised"] for x in study.get(study.lr_request()).value["layers"]],
        "SLR": np.array(plan["final_slice"]) - study.profile.figure_slice_base,
        "FS": plan["final_slice"],
        "width": plan["widths"],
    }
    return table.assign(**columns).rename_axis("layer")


def last_layer_prose(study: Study) -> str:
    """What the last layer is compared by, as Markdown."""
    return style.say(f"last_layer_{study.profile.lr_last_layer}")


def redundancy_figure(table: pd.DataFrame, study: Study) -> plt.Figure:
    """Left 1 - LR by layer and text; right the slice FS of each layer, base and rest."""
    base, target = study.profile.figure_slice_base, study.profile.figure_slice_percentage
    figure, (left, right) = style.panels(1, 2, 2.4)
    style.lr_curves(left, table.filter(like="LR ("))
    right.bar(table.index, 100 * base, color="0.7", label=f"slice base, {percent(base)}")
    right.bar(table.index, 100 * table["SLR"], bottom=100 * base, color="C0", label="SLR")
    mean = f"mean, {percent(target)}"
    right.axhline(100 * target, color="k", linestyle="--", linewidth=1, label=mean)
    top = 100 * max(1.5 * target, 1.2 * table["FS"].max(), 0.01)  # the legend above the bars
    right.set(xlabel="layer", ylabel="final slice (% of the width)", ylim=(0, top))
    style.whole_numbers(right)
    right.legend(ncols=3, loc="upper center", columnspacing=0.8, handlelength=1.2)
    return figure
