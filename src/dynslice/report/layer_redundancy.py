"""Notebook 01: layer redundancy and the slices that follow from it."""

from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator

from dynslice.experiment.profile import percent
from dynslice.experiment.study import Study
from dynslice.report import style
from dynslice.report.style import COLUMN_WIDTH

# Layer redundancy


def redundancy_table(study: Study) -> pd.DataFrame:
    """Per layer: LR on each text, and n, SLR, FS and width of the plan of the figure."""
    study.ensure(study.redundancy_requests())
    columns = {
        f"LR ({request.config['text']})": [x["lr"] for x in study.get(request).value["layers"]]
        for request in study.lr_requests()
    }
    plan = study.get(study.figure_request()).value
    base = study.profile.figure_slice_base
    table = pd.DataFrame(columns)
    table["n"] = [x["normalised"] for x in study.get(study.lr_request()).value["layers"]]
    table["SLR"] = np.array(plan["final_slice"]) - base
    table["FS"] = plan["final_slice"]
    table["width"] = plan["widths"]
    table.index.name = "layer"
    return table


def last_layer_prose(study: Study) -> str:
    """What the last layer is compared by, as Markdown."""
    if study.profile.lr_last_layer == "raw":
        return (
            "The last layer is compared by its **raw** output, as the definition says. The "
            "published code compares with the state after the final norm, which can make the last "
            'layer look far less redundant than it is; set `lr_last_layer = "normed"` above to '
            "see it."
        )
    return (
        "The last layer is compared by the state **after the final norm**, as the published code "
        "does, which can make it look far less redundant than it is. The definition says its raw "
        'output; set `lr_last_layer = "raw"` above to see it.'
    )


def redundancy_figure(table: pd.DataFrame, study: Study) -> plt.Figure:
    """Left LR by layer and text; right the slice FS of each layer, base and rest."""
    style.style()
    base, target = study.profile.figure_slice_base, study.profile.figure_slice_percentage
    figure, (left, right) = plt.subplots(1, 2, figsize=(2 * COLUMN_WIDTH, 2.4))
    looks = zip(cycle("os^Dv"), cycle(["-", "--", ":", "-.", "-"]), strict=False)
    for column, (marker, line) in zip(
        [c for c in table if c.startswith("LR")], looks, strict=False
    ):
        left.plot(table.index, table[column], line, marker=marker, markersize=3, label=column)
    left.set(xlabel="layer", ylabel="layer redundancy (cosine)")
    left.legend(frameon=False)
    for axis in (left, right):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.bar(table.index, 100 * base, color="0.7", label=f"slice base, {percent(base)}")
    right.bar(table.index, 100 * table["SLR"], bottom=100 * base, color="C0", label="SLR")
    mean = f"mean, {percent(target)}"
    right.axhline(100 * target, color="k", linestyle="--", linewidth=1, label=mean)
    top = 100 * max(1.5 * target, 1.2 * table["FS"].max(), 0.01)  # the legend above the bars
    right.set(xlabel="layer", ylabel="final slice (% of the width)", ylim=(0, top))
    right.legend(frameon=False, ncols=3, loc="upper center", columnspacing=0.8, handlelength=1.2)
    figure.tight_layout()
    return figure
