"""Notebook 07: what wins at equal stored parameters."""

from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from dynslice.experiment.profile import percent
from dynslice.experiment.requests import Point
from dynslice.experiment.store import Request
from dynslice.experiment.study import Study
from dynslice.method.scores import rises
from dynslice.report import statistics, style
from dynslice.report.comparison import forest
from dynslice.report.statistics import ACCURACY, PERPLEXITY, columns

COLOURS = ("C0", "C1", "C2", "C3")


def contests(study: Study) -> dict[float, list[Point]]:
    """The networks that are compared at each size, which constant slicing gives, the first."""
    return {sp: study.beyond.contest(sp) for sp in study.profile.beyond_slice_percentages}


def name(point: Point) -> str:
    """A network by its schedule and what was done to it, the size left out."""
    return ", ".join(x for x in point.label.split(", ") if not x.startswith("size of SP"))


def contest_table(study: Study) -> pd.DataFrame:
    """Perplexity by size, network and text, and its change from plain constant slicing."""
    study.ensure(study.beyond.requests())
    return pd.DataFrame(
        {
            "SP": sp,
            "network": name(point),
            "parameters (M)": study.size(point) / 1e6,
            **_perplexity(study, point, contest[0], text),
        }
        for sp, contest in contests(study).items()
        for text in study.profile.eval_texts
        for point in contest
    )


def _perplexity(study: Study, point: Point, reference: Point, text: str) -> dict:
    change = statistics.perplexity_change(study, point, reference, text)
    found = {"text": text, "perplexity": study.perplexity(point, text)}
    return found | columns(change, PERPLEXITY)


def accuracy_table(study: Study) -> pd.DataFrame:
    """Average accuracy by size and network, and its change from plain constant slicing."""
    tasks = statistics.choice_tasks(study)
    return pd.DataFrame(
        {
            "SP": sp,
            "network": name(point),
            "tasks": len(tasks),
            "accuracy (%)": statistics.accuracy(study, point, tasks),
            **columns(statistics.accuracy_change(study, point, contest[0], tasks), ACCURACY),
        }
        for sp, contest in contests(study).items()
        for point in contest
        if tasks
    )


def cost_table(study: Study) -> pd.DataFrame:
    """What each network took: passes over the calibration tokens, seconds, memory.

    Evidence is what its schedule rests on (LR, losses by place, a search), once for all of them.
    """
    rows = []
    for sp, point in [(sp, point) for sp, contest in contests(study).items() for point in contest]:
        sliced = study.get(study.slice_request(point))
        asked = point.network["plan"].get("evidence")
        row = {"SP": sp, "network": name(point)}
        row["calibration passes"] = 2 if point.network.get("compensation") else 1
        row["slicing (s)"] = sliced.seconds
        row["evidence (s)"] = asked and study.get(Request(**asked)).seconds
        row["peak memory (GB)"] = sliced.peak_memory_bytes / 1e9
        rows.append(row)
    return pd.DataFrame(rows)


def contest_figure(changes: pd.DataFrame, accuracies: pd.DataFrame) -> plt.Figure:
    """Change from plain constant slicing by network: perplexity left, accuracy right."""
    if changes.empty:
        return style.nothing()
    percentages = changes["SP"].unique()
    height = (0.55 + 0.24 * changes["network"].nunique()) * len(percentages) + 0.3
    shown = [(changes, PERPLEXITY, "text")]
    shown += [] if accuracies.empty else [(accuracies, ACCURACY, None)]
    figure, axes = style.panels(
        len(percentages), len(shown), height, squeeze=False, sharey="row", sharex="col"
    )
    for row, sp in zip(axes, percentages, strict=True):
        for axis, (table, column, by) in zip(row, shown, strict=True):
            forest(axis, table[table["SP"] == sp], column, "network", by)
            if sp == percentages[-1]:
                axis.set_xlabel(f"change of {column}")
        row[0].set_title(f"size of constant, SP {percent(sp)}", fontsize=7, loc="left")
    axes[0, 0].legend(fontsize=6)
    return figure


def question_prose(study: Study) -> str:
    """What compensation and each schedule change at equal size, as sentences (Markdown)."""
    if not contests(study):
        return style.NONE
    ours = "constant, compensated"
    asked = [(style.say("compensation"), ours, "constant")]
    for schedule in study.profile.beyond_schedules:
        asked += [(style.say("schedule", schedule=schedule), f"{schedule}, compensated", ours)]
    lines = []
    for said, *pair in asked:
        found = "; ".join(_difference(study, sp, *pair) for sp in contests(study))
        lines.append(f"- {said}: {found}.")
    return "\n".join(lines)


def _difference(study: Study, sp: float, *names: str) -> str:
    """How two networks of a size differ in perplexity on each text, and in accuracy."""
    named = {name(point): point for point in contests(study)[sp]}
    a, b = map(named.get, names)
    found = [
        (f"perplexity on {text}", statistics.perplexity_change(study, a, b, text), "%")
        for text in study.profile.eval_texts
    ]
    if tasks := statistics.choice_tasks(study):
        found.append(("accuracy", statistics.accuracy_change(study, a, b, tasks), "points"))
    changes = ", ".join(f"{of} {x.format(unit)} (**{x.direction}**)" for of, x, unit in found)
    return f"at SP {percent(sp)} {changes}"


def readme_prose(study: Study) -> str:
    """The same under a heading that says what is compared; nothing where nothing is."""
    heading = style.say("beyond", profile=study.profile.name)
    return f"{heading}\n\n{question_prose(study)}" if contests(study) else ""


# What else was tried at the last of the sizes


def variant_table(study: Study) -> pd.DataFrame:
    """Perplexity on validation windows of everything that was tried at the last of the sizes."""
    if not contests(study) or study.profile.selection_windows is None:
        return pd.DataFrame()
    *_, (sp, contest) = contests(study).items()
    return pd.DataFrame(
        {
            "network": name(point),
            "parameters (M)": study.size(point) / 1e6,
            "validation perplexity": study.get(study.selection_request(point)).value["perplexity"],
            **columns(statistics.selection_change(study, point, contest[0]), PERPLEXITY),
        }
        for point in [*contest, *study.beyond.variants(sp)]
    )


def choice_prose(study: Study, table: pd.DataFrame) -> str:
    """Whether the networks that are compared are those that validation windows would choose."""
    if not contests(study):
        return style.NONE
    if table.empty:
        return "This profile has no validation windows, so nothing is chosen in it."
    *_, (sp, contest) = contests(study).items()
    ranked = table.sort_values("validation perplexity", ignore_index=True)
    compared = ranked[ranked["network"].isin(map(name, contest))]
    best, first = ranked.iloc[0], compared.iloc[0]
    ours = style.say("choice_ours" if compared.index[0] == 0 else "choice_other", first=first)
    return style.say("choice", count=len(table), share=percent(sp), best=best, ours=ours)


def widths_figure(study: Study) -> plt.Figure:
    """The width of the stream at each place, by schedule, at the last of the sizes."""
    if not contests(study):
        return style.nothing()
    *_, (sp, contest) = contests(study).items()
    figure, axis = style.panels(height=2.2)
    looks = zip(cycle(["-", "--", ":", "-."]), cycle(COLOURS), strict=False)
    for point in [*contest, *study.beyond.variants(sp)]:
        if point.network != {**contest[0].network, "plan": point.network["plan"]}:
            continue  # compensation and the calibration text leave the widths alone
        value = study.get(study.slice_request(point)).value
        attention = value.get("attention_widths", value["widths"])
        pairs = np.column_stack((attention, value["widths"])).ravel()
        places = np.arange(len(pairs)) / 2
        line, colour = next(looks)
        axis.step(places, pairs, line, where="mid", color=colour, label=point.schedule)
    axis.set(xlabel="layer (MLP half a layer later)", ylabel=f"width, size of SP {percent(sp)}")
    style.whole_numbers(axis)
    axis.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def places_figure(study: Study) -> plt.Figure | None:
    """The rise of the loss by place, cut less or more than all others.

    None where no schedule is `sensitivity`, which rests on these losses.
    """
    schedules = (*study.profile.beyond_schedules, *study.profile.beyond_candidates)
    if not contests(study) or "sensitivity" not in schedules:
        return None
    value = study.get(study.beyond.places_request([*contests(study)][-1])).value
    table = pd.DataFrame(rises(value))
    figure, axis = style.panels(height=2.2)
    for share, form in zip(value["shares"], ("oC0", "vC1"), strict=True):
        axis.plot(table[share], form, markersize=3, label=f"{percent(share)} cut there")
    style.zero_line(axis)
    axis.set(xlabel="place in the stream", ylabel="rise of the loss (nats per token)")
    style.whole_numbers(axis)
    axis.legend()
    return figure


# Recovery fine-tuning


def recovery_table(study: Study) -> pd.DataFrame:
    """Closed form and fine-tuning: minutes, perplexity, and its change from plain slicing."""
    if not contests(study) or not study.profile.recovery_steps:
        return pd.DataFrame()
    *_, (sp, contest) = contests(study).items()
    constant = [p for p in contest if p.schedule == "constant"]
    return pd.DataFrame(
        {
            "network": name(point),
            "minutes": study.get(study.slice_request(point)).seconds / 60,
            **_perplexity(study, point, constant[0], text),
        }
        for text in study.profile.eval_texts
        for point in [*constant, *study.beyond.recovered(sp)]
    )


def recovery_figure(table: pd.DataFrame) -> plt.Figure:
    """Change of perplexity against minutes, a panel per text."""
    if table.empty:
        return style.nothing()
    texts = list(table.groupby("text", sort=False))
    figure, axes = style.panels(1, len(texts), squeeze=False)
    for axis, (text, rows) in zip(axes[0], texts, strict=True):
        networks = rows.groupby("network", sort=False)
        for (label, row), marker, colour in zip(networks, "D^vs", COLOURS, strict=False):
            look = (marker, colour, label)
            style.points_with_intervals(axis, row["minutes"], row, PERPLEXITY, *look)
        axis.set(xlabel="minutes (slicing and fine-tuning)", ylabel=f"perplexity (%), {text}")
        style.zero_line(axis)
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=2)
    return figure
