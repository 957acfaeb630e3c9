"""Notebook 08: several models next to each other, and the paper's claims on each of them."""

from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from dynslice.evaluate.task_table import chance
from dynslice.experiment.across import Across
from dynslice.experiment.equal_size import BEST_RECIPE, SLICEGPT
from dynslice.experiment.requests import DENSE, Point
from dynslice.experiment.study import Study
from dynslice.report import claims, equal_size, published, statistics, style
from dynslice.report.statistics import EQUAL_SIZE, EQUAL_SLICE, PERPLEXITY, SIZE, columns

DYNAMIC, RECIPE = "by LR", "best recipe"
CHANCE, AVERAGE = "chance (%)", "average accuracy (%)"


def name(study: Study) -> str:
    """A model as tables and figures name it."""
    return study.profile.model.rstrip("/").rpartition("/")[2].removeprefix("embedded:")


def networks(study: Study, slice_percentage: float) -> dict[str, Point]:
    """Dense, SliceGPT, the dynamic network at the SB chosen on validation windows, the recipe.

    What the study does not have at this slice percentage is left out. Without validation windows
    the dynamic network is that of the smallest SB, whatever it gives.
    """
    sp = slice_percentage
    found = {DENSE.schedule: DENSE, SLICEGPT: study.design.point(study.design.constant(sp))}
    dynamic = [a for a, _, _ in statistics.pairs(study.points(), EQUAL_SLICE, sp)]
    if pair := statistics.chosen(study, EQUAL_SLICE, sp):
        found[DYNAMIC] = pair[0]
    elif dynamic:
        found[DYNAMIC] = min(dynamic, key=lambda point: point.slice_base)
    if sp in study.profile.beyond_slice_percentages:
        found[RECIPE] = equal_size.rung(study.beyond.contest(sp), BEST_RECIPE)
    return found


def model_table(across: Across) -> pd.DataFrame:
    """A row for each model, slice percentage and measure, with a column for each network.

    The measures: stored parameters in millions, perplexity on each text, accuracy in percent on
    each task and on average, with what guessing gives. None where a network has no such value; a
    row that says something of the dense model alone is left out.
    """
    across.ensure()
    tables = []
    for study in across.studies:
        tasks = statistics.choice_tasks(study)
        guessing = {task: chance([task]) for task in tasks} | {AVERAGE: chance(tasks)}
        for sp in study.profile.slice_percentages:
            here = {n: _measures(study, point) for n, point in networks(study, sp).items()}
            table = pd.DataFrame(here).dropna(subset=SLICEGPT)
            table = table.rename_axis("measured").reset_index()
            table.insert(0, "SP", sp)
            table.insert(0, "model", name(study))
            tables.append(table.assign(**{CHANCE: table["measured"].map(guessing)}))
    found = pd.concat(tables, ignore_index=True)
    return found[[*found.columns.drop(CHANCE), CHANCE]]


def _measures(study: Study, point: Point) -> dict[str, float | None]:
    found = {SIZE: study.size(point) / 1e6}
    for text in study.profile.eval_texts:
        found[f"perplexity, {text}"] = study.perplexity(point, text)
    tasks, runs = statistics.choice_tasks(study), runs_tasks(study, point)
    for task in tasks:
        found[task] = statistics.accuracy(study, point, [task]) if runs else None
    if tasks:
        found[AVERAGE] = statistics.accuracy(study, point, tasks) if runs else None
    return found


def runs_tasks(study: Study, point: Point) -> bool:
    """Whether a study runs its tasks on a network."""
    asked = {request.key for request in study.requests()}
    tasks = statistics.choice_tasks(study)
    return bool(tasks) and study.task_request(point, tasks[0]).key in asked


def change_table(across: Across) -> pd.DataFrame:
    """Paired changes of perplexity by model, slice percentage and text, in percent of SliceGPT's.

    The dynamic network at equal mean slice and at equal size, and the recipe at equal size.
    """
    across.ensure()
    rows = []
    for study in across.studies:
        for sp in study.profile.slice_percentages:
            for network, basis, a, b in _compared(study, sp):
                for text in study.profile.eval_texts:
                    row = {"model": name(study), "SP": sp, "network": network}
                    row |= {"against SliceGPT at": basis, "text": text}
                    change = statistics.perplexity_change(study, a, b, text)
                    rows.append({**row, **columns(change, PERPLEXITY)})
    return pd.DataFrame(rows)


def _compared(study: Study, sp: float) -> list[tuple[str, str, Point, Point]]:
    here = networks(study, sp)
    pairs = [
        (DYNAMIC, basis, a, b)
        for a, b, basis in statistics.pairs(study.points(), slice_percentage=sp)
        if a == here.get(DYNAMIC)
    ]
    if RECIPE in here:
        pairs.append((RECIPE, EQUAL_SIZE, here[RECIPE], study.beyond.slicegpt(sp)))
    return pairs


def model_figure(table: pd.DataFrame) -> plt.Figure:
    """Perplexity against stored parameters: a column per model, a row per text, dense a star."""
    models = table["model"].unique()
    measures = [m for m in table["measured"].unique() if m.startswith("perplexity")]
    rows, height = len(measures), 1.9 * len(measures) + 0.3
    figure, axes = style.panels(rows, len(models), height, squeeze=False, sharex="col")
    for row, measured in zip(axes, measures, strict=True):
        for axis, model in zip(row, models, strict=True):
            here = table[table["model"] == model].set_index(["measured", "SP"])
            _curves(axis, here.loc[SIZE], here.loc[measured])
            axis.set_yscale("log")
            style.log_ticks(axis.yaxis, 1, 2, 3, 5, 7)
            if measured == measures[0]:
                axis.set_title(model)
            if measured == measures[-1]:
                axis.set_xlabel("stored parameters (millions)")
        row[0].set_ylabel(measured)
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=len(handles[1]))
    return figure


def _curves(axis: plt.Axes, sizes: pd.DataFrame, perplexities: pd.DataFrame) -> None:
    """A curve for each kind of network over the slice percentages, with dense as a star."""
    named = [n for n in (DENSE.schedule, SLICEGPT, DYNAMIC, RECIPE) if n in perplexities]
    style.pareto_front(axis, *(pd.concat([of[n] for n in named]) for of in (sizes, perplexities)))
    for network, form, colour in (
        (SLICEGPT, "o-", "C0"),
        (DYNAMIC, "s--", "C1"),
        (RECIPE, "D:", "C2"),
    ):
        if network in perplexities and perplexities[network].notna().any():
            look = {"color": colour, "markersize": 4, "linewidth": 1, "label": network}
            look["markerfacecolor"] = colour if form == "o-" else "w"
            x, y = (of[network].astype(float) for of in (sizes, perplexities))
            axis.plot(x, y, form, **look)
    dense = DENSE.schedule
    axis.plot(sizes[dense].iloc[0], perplexities[dense].iloc[0], "k*", markersize=8, label=dense)


def lr_table(across: Across) -> pd.DataFrame:
    """LR on each profile's own text, by model and layer; `depth` goes from 0 to 1."""
    across.ensure()
    tables = []
    for study in across.studies:
        lr = study.lr()
        depth = np.linspace(0, 1, len(lr))
        found = {"model": name(study), "layer": range(len(lr)), "depth": depth, "LR": lr}
        tables.append(pd.DataFrame(found))
    return pd.concat(tables, ignore_index=True)


def lr_figure(table: pd.DataFrame) -> plt.Figure:
    """1 - LR against the depth of the layer, a curve per model, logarithmic."""
    figure, axis = style.panels(height=2.3)
    models = table.groupby("model", sort=False)
    for (model, rows), form in zip(models, cycle(("o-", "s--", "^:", "D-.")), strict=False):
        axis.plot(rows["depth"], 1 - rows["LR"], form, markersize=3, linewidth=1, label=model)
    axis.set(xlabel="depth of the layer (0: first, 1: last)", ylabel=style.TURNED, yscale="log")
    style.log_ticks(axis.yaxis, 1, 2, 5)
    axis.legend()
    return figure


# The claims


def claims_table(across: Across) -> pd.DataFrame:
    """A row for each claim, basis and measure, with the verdict on each model and its change."""
    across.ensure()
    tables = []
    for study in across.studies:
        found = pd.DataFrame(claims.outcomes(study))
        keys = ["claim", "published", "at", "measured on"]
        said = found["verdict on this model"] + ": " + found["measured"]
        tables.append(found[keys].assign(**{name(study): said}).set_index(keys))
    joined = pd.concat(tables, axis=1).reset_index()
    return joined.fillna(claims.NOT_TESTED)


def claims_prose(across: Across) -> str:
    """On which of the models each claim is supported, by basis (Markdown)."""
    found = pd.concat(
        [pd.DataFrame(claims.outcomes(study)).assign(model=name(study)) for study in across.studies]
    )
    found = found[found["change"].notna()]
    lines = []
    for (claim, basis), of_claim in found.groupby(["claim", "at"], sort=False):
        rows = of_claim[["measured on", "verdict on this model", "model"]]
        said = claims.by_verdict(rows.itertuples(index=False))
        lines.append(style.say("claim_across", claim=claim, at=basis, said=said))
    return "\n".join(f"- {line}" for line in lines) or style.NONE


def published_table(across: Across) -> pd.DataFrame:
    """What others published for these models, next to what was measured (see `published.table`)."""
    tables = [of(s) for s in across.studies for of in (published.table, published.task_table)]
    return pd.concat(tables, ignore_index=True)


def absent_prose(across: Across) -> str:
    """Which models are compared, and which profiles have no record yet (Markdown)."""
    models = ", ".join(f"`{study.profile.model}` ({study.name})" for study in across.studies)
    found = style.say("across", models=models)
    if len(across.studies) == 1 and not across.absent:
        found += f" {style.say('across_one')}"
    missing = ", ".join(f"`{profile}`" for profile in across.absent)
    return f"{found} {style.say('across_absent', profiles=missing)}" if missing else found
