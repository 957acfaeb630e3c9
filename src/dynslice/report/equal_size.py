"""Notebook 07: what wins at equal stored parameters."""

from itertools import cycle

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.ticker import MaxNLocator

from dynslice.experiment.profile import percent
from dynslice.experiment.requests import Point
from dynslice.experiment.store import Request
from dynslice.experiment.study import Study
from dynslice.method.scores import rises
from dynslice.report import statistics, style
from dynslice.report.comparison import forest
from dynslice.report.style import MARKERS

PERPLEXITY, ACCURACY = "perplexity (%)", "accuracy (points)"  # the columns of changes

COLOURS = ("C0", "C1", "C2", "C3")


def sizes(study: Study) -> list[float]:
    """The slice percentages of constant slicing that give the sizes."""
    return study.profile.beyond_slice_percentages


def name(point: Point) -> str:
    """A network by its schedule and what was done to it, the size left out."""
    parts = point.label.split(", ")
    return ", ".join(part for part in parts if not part.startswith("size of SP"))


def contest_table(study: Study) -> pd.DataFrame:
    """Perplexity by size, network and text, and its change from plain constant slicing."""
    study.ensure(study.beyond.requests())
    return pd.DataFrame(
        {
            "SP": sp,
            "network": name(point),
            "parameters (M)": study.size(point) / 1e6,
            **_compared(study, point, study.beyond.contest(sp)[0], text),
        }
        for sp in sizes(study)
        for text in study.profile.eval_texts
        for point in study.beyond.contest(sp)
    )


def _compared(study: Study, point: Point, reference: Point, text: str) -> dict:
    change = statistics.perplexity_change(study, point, reference, text)
    found = {"text": text, "perplexity": study.perplexity(point, text)}
    return found | statistics.columns(change, PERPLEXITY)


def accuracy_table(study: Study) -> pd.DataFrame:
    """Average accuracy by size and network, and its change from plain constant slicing."""
    tasks, rows = statistics.choice_tasks(study), []
    for sp in sizes(study) if tasks else []:
        contest = study.beyond.contest(sp)
        for point in contest:
            change = statistics.accuracy_change(study, point, contest[0], tasks)
            rows.append(
                {
                    "SP": sp,
                    "network": name(point),
                    "tasks": len(tasks),
                    "accuracy (%)": statistics.accuracy(study, point, tasks),
                    **statistics.columns(change, ACCURACY),
                }
            )
    return pd.DataFrame(rows)


def cost_table(study: Study) -> pd.DataFrame:
    """What each network took: passes over the calibration tokens, seconds, memory.

    Evidence is what its schedule rests on (LR, losses by place, a search), once for all of them.
    """
    rows = []
    for sp in sizes(study):
        for point in study.beyond.contest(sp):
            sliced = study.get(study.slice_request(point))
            evidence = point.network["plan"].get("evidence")
            rows.append(
                {
                    "SP": sp,
                    "network": name(point),
                    "calibration passes": 2 if point.network.get("compensation") else 1,
                    "slicing (s)": sliced.seconds,
                    "evidence (s)": evidence and study.get(Request(**evidence)).seconds,
                    "peak memory (GB)": sliced.peak_memory_bytes / 1e9,
                }
            )
    return pd.DataFrame(rows)


def contest_figure(changes: pd.DataFrame, accuracies: pd.DataFrame) -> plt.Figure:
    """Change from plain constant slicing by network: perplexity left, accuracy right."""
    if changes.empty:
        return style.nothing()
    percentages = changes["SP"].unique()
    height = (0.55 + 0.24 * changes["network"].nunique()) * len(percentages) + 0.3
    shown = [(changes, PERPLEXITY, "text"), (accuracies, ACCURACY, None)][
        : 1 + bool(len(accuracies))
    ]
    figure, axes = style.panels(
        len(percentages), len(shown), height, squeeze=False, sharey="row", sharex="col"
    )
    for row, sp in zip(axes, percentages, strict=True):
        for axis, (table, column, by) in zip(row, shown, strict=True):
            forest(axis, table[table["SP"] == sp], column, "network", by)
        row[0].set_title(f"size of constant, SP {percent(sp)}", fontsize=7, loc="left")
    for axis, (_, column, _) in zip(axes[-1], shown, strict=True):
        axis.set_xlabel(f"change of {column}")
    axes[0, 0].legend(fontsize=6)
    return figure


def question_prose(study: Study) -> str:
    """What compensation and each schedule change at equal size, as sentences (Markdown)."""
    if not sizes(study):
        return style.NONE
    ours = "constant, compensated"
    pairs = [("Constant slicing with compensation against without", ours, "constant")]
    for schedule in study.profile.beyond_schedules:
        said = f"Schedule `{schedule}` against constant slicing, both compensated"
        pairs.append((said, f"{schedule}, compensated", ours))
    lines = []
    for said, a, b in pairs:
        found = [f"at SP {percent(sp)} {_difference(study, sp, a, b)}" for sp in sizes(study)]
        lines.append(f"- {said}: {'; '.join(found)}.")
    return "\n".join(lines)


def _difference(study: Study, slice_percentage: float, *names: str) -> str:
    """How two networks of a size differ in perplexity on each text, and in accuracy."""
    contest = {name(point): point for point in study.beyond.contest(slice_percentage)}
    pair = [contest[each] for each in names]
    parts = []
    for text in study.profile.eval_texts:
        change = statistics.perplexity_change(study, *pair, text)
        parts.append(f"perplexity on {text} {change.format('%')} (**{change.direction}**)")
    if tasks := statistics.choice_tasks(study):
        change = statistics.accuracy_change(study, *pair, tasks)
        parts.append(f"accuracy {change.format('points')} (**{change.direction}**)")
    return ", ".join(parts)


def readme_prose(study: Study) -> str:
    """The same under a heading that says what is compared; nothing where nothing is."""
    if not sizes(study):
        return ""
    notebook = f"[notebook 07](notebooks/rendered/{study.profile.name}/07_beyond.ipynb)"
    return (
        "**Beyond the paper**, at the stored parameters of plain constant slicing, with one sample "
        f"of calibration windows ({notebook}):\n\n{question_prose(study)}"
    )


# What validation windows say of the choices


def variant_table(study: Study) -> pd.DataFrame:
    """Perplexity on validation windows of everything that was tried at the last of the sizes."""
    if not sizes(study) or study.profile.selection_windows is None:
        return pd.DataFrame()
    sp = sizes(study)[-1]
    contest = study.beyond.contest(sp)
    return pd.DataFrame(
        {
            "network": name(point),
            "parameters (M)": study.size(point) / 1e6,
            "validation perplexity": study.get(study.selection_request(point)).value["perplexity"],
            **statistics.columns(statistics.selection_change(study, point, contest[0]), PERPLEXITY),
        }
        for point in [*contest, *study.beyond.variants(sp)]
    )


def choice_prose(study: Study, table: pd.DataFrame) -> str:
    """Whether the networks that are compared are those that validation windows would choose."""
    if not sizes(study):
        return style.NONE
    if table.empty:
        return "This profile has no validation windows, so nothing is chosen in it."
    ranked = table.sort_values("validation perplexity", ignore_index=True)
    compared = {name(point) for point in study.beyond.contest(sizes(study)[-1])}
    best, first = ranked.iloc[0], ranked[ranked["network"].isin(compared)].iloc[0]
    line = (
        f"Of {len(table)} networks at the size of SP {percent(sizes(study)[-1])}, "
        f"**{best['network']}** has the lowest perplexity on validation windows "
        f"({best['validation perplexity']:.1f}, {best[PERPLEXITY]:+.1f} % against plain "
        "constant slicing); "
    )
    if best["network"] in compared:
        return f"{line}it is one of those compared above."
    level = first["validation perplexity"]
    return f"{line}of those compared above it is {first['network']} ({level:.1f})."


def widths_figure(study: Study) -> plt.Figure:
    """The width of the stream at each place, by schedule, at the last of the sizes."""
    if not sizes(study):
        return style.nothing()
    sp = sizes(study)[-1]
    points, own = (
        [*study.beyond.contest(sp), *study.beyond.variants(sp)],
        study.beyond.contest(sp)[0].network,
    )
    # Compensation and the calibration text leave the widths alone.
    plain = [p for p in points if p.network == {**own, "plan": p.network["plan"]}]
    figure, axis = style.panels(height=2.2)
    looks = zip(cycle(["-", "--", ":", "-."]), cycle(COLOURS), strict=False)
    for point, (line, colour) in zip(plain, looks, strict=False):
        value = study.get(study.slice_request(point)).value
        attention = value.get("attention_widths", value["widths"])
        pairs = [width for pair in zip(attention, value["widths"], strict=True) for width in pair]
        places = [place / 2 for place in range(len(pairs))]
        axis.step(places, pairs, line, where="mid", color=colour, label=point.schedule)
    axis.set(xlabel="layer (MLP half a layer later)", ylabel=f"width, size of SP {percent(sp)}")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def places_figure(study: Study) -> plt.Figure | None:
    """The rise of the loss by place, cut less or more than all others.

    None where no schedule is `sensitivity`, which rests on these losses.
    """
    schedules = (*study.profile.beyond_schedules, *study.profile.beyond_candidates)
    if not sizes(study) or "sensitivity" not in schedules:
        return None
    value = study.get(study.beyond.places_request(sizes(study)[-1])).value
    found = rises(value)
    figure, axis = style.panels(height=2.2)
    for share, marker, colour in zip(value["shares"], "ov", ("C0", "C1"), strict=True):
        rise = [at_place[share] for at_place in found]
        label = f"{percent(share)} cut there"
        axis.plot(range(len(rise)), rise, marker, color=colour, markersize=3, label=label)
    style.zero_line(axis)
    axis.set(xlabel="place in the stream", ylabel="rise of the loss (nats per token)")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend()
    return figure


# Recovery fine-tuning


def recovery_table(study: Study) -> pd.DataFrame:
    """Closed form and fine-tuning: minutes, perplexity, and its change from plain slicing."""
    if not sizes(study) or not study.profile.recovery_steps:
        return pd.DataFrame()
    sp = sizes(study)[-1]
    constant = [p for p in study.beyond.contest(sp) if p.schedule == "constant"]
    return pd.DataFrame(
        {
            "network": name(point),
            "minutes": study.get(study.slice_request(point)).seconds / 60,
            **_compared(study, point, constant[0], text),
        }
        for text in study.profile.eval_texts
        for point in [*constant, *study.beyond.recovered(sp)]
    )


def recovery_figure(table: pd.DataFrame) -> plt.Figure:
    """Change of perplexity against minutes, a panel per text."""
    if table.empty:
        return style.nothing()
    texts = table["text"].unique()
    figure, axes = style.panels(1, len(texts), squeeze=False)
    for axis, text in zip(axes[0], texts, strict=True):
        networks = table[table["text"] == text].groupby("network", sort=False)
        for (label, row), marker, colour in zip(networks, MARKERS, COLOURS, strict=False):
            style.points_with_intervals(
                axis, row["minutes"], row, PERPLEXITY, marker, colour, label
            )
        axis.set(xlabel="minutes (slicing and fine-tuning)", ylabel=f"perplexity (%), {text}")
        style.zero_line(axis)
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=2)
    return figure
