"""Tables, figures and sentences of notebook 07, from results: what wins at equal size."""

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
from dynslice.report.statistics import Difference
from dynslice.report.style import COLUMN_WIDTH, MARKERS

NONE = "This profile asks for no networks of equal size."

_PAPER = "lr"  # the schedule by layer redundancy


def sizes(study: Study) -> list[float]:
    """The slice percentages of constant slicing that give the sizes."""
    return study.profile.beyond_slice_percentages


def contest_table(study: Study) -> pd.DataFrame:
    """Perplexity by size, network and text, and its change from plain constant slicing."""
    study.ensure(study.beyond_requests())
    rows = []
    for sp in sizes(study):
        reference = study.contest(sp)[0]
        for text in study.profile.eval_texts:
            for point in study.contest(sp):
                change = statistics.perplexity_change(study, point, reference, text)
                rows.append(
                    {
                        "SP": sp,
                        "network": name(point),
                        "parameters (M)": _parameters(study, point) / 1e6,
                        "text": text,
                        "perplexity": _perplexity(study, point, text),
                        "perplexity (%)": change.estimate,
                        "low": change.low,
                        "high": change.high,
                    }
                )
    return pd.DataFrame(rows)


def accuracy_table(study: Study) -> pd.DataFrame:
    """Average accuracy by size and network, and its change from plain constant slicing."""
    tasks, rows = statistics.choice_tasks(study), []
    for sp in sizes(study) if tasks else []:
        reference = study.contest(sp)[0]
        for point in study.contest(sp):
            change = statistics.accuracy_change(study, point, reference, tasks)
            rows.append(
                {
                    "SP": sp,
                    "network": name(point),
                    "tasks": len(tasks),
                    "accuracy (%)": statistics.accuracy(study, point, tasks),
                    "accuracy (points)": change.estimate,
                    "low": change.low,
                    "high": change.high,
                }
            )
    return pd.DataFrame(rows)


def cost_table(study: Study) -> pd.DataFrame:
    """What each network took: passes over the calibration tokens, seconds, memory.

    Evidence is what its schedule rests on (LR, losses by place, a search), once for all of them.
    """
    rows = []
    for sp in sizes(study):
        for point in study.contest(sp):
            sliced = study.get(study.slice_request(point))
            evidence = evidence_of(study, point)
            rows.append(
                {
                    "SP": sp,
                    "network": name(point),
                    "calibration passes": 2 if point.network.get("compensation") else 1,
                    "slicing (s)": sliced.seconds,
                    "evidence (s)": evidence and evidence.seconds,
                    "peak memory (GB)": sliced.peak_memory_bytes / 1e9,
                }
            )
    return pd.DataFrame(rows)


def contest_figure(changes: pd.DataFrame, accuracies: pd.DataFrame) -> plt.Figure:
    """Change from plain constant slicing by network: perplexity left, accuracy right."""
    style.style()
    if changes.empty:
        return style.nothing()
    percentages = changes["SP"].unique()
    count = changes["network"].nunique()
    columns = 2 if len(accuracies) else 1
    figure, axes = plt.subplots(
        len(percentages),
        columns,
        figsize=(2 * COLUMN_WIDTH, (0.55 + 0.24 * count) * len(percentages) + 0.3),
        squeeze=False,
        sharey="row",
        sharex="col",
    )
    for row, sp in zip(axes, percentages, strict=True):
        here = changes[changes["SP"] == sp]
        names = list(here["network"].unique())
        _marks(row[0], here, names, "perplexity (%)", "text")
        row[0].set_title(f"size of constant, SP {percent(sp)}", fontsize=7, loc="left")
        if columns == 2:
            _marks(row[1], accuracies[accuracies["SP"] == sp], names, "accuracy (points)", None)
    for axis, label in zip(axes[-1], ("perplexity (%)", "accuracy (points)"), strict=False):
        axis.set_xlabel(f"change of {label}")
    axes[0, 0].legend(frameon=False, fontsize=6)
    figure.tight_layout()
    return figure


def _marks(
    axis: plt.Axes, table: pd.DataFrame, names: list[str], column: str, by: str | None
) -> None:
    """Estimates with intervals, a line per network, side by side by the values of a column."""
    groups = [(None, table)] if by is None else list(table.groupby(by, sort=False))
    y = {network: len(names) - 1 - i for i, network in enumerate(names)}
    looks = zip(groups, cycle("os^D"), cycle(("C0", "C1", "C2", "C3")), strict=False)
    for i, ((label, rows), marker, colour) in enumerate(looks):
        at = rows["network"].map(y) + 0.22 * ((len(groups) - 1) / 2 - i)
        bars = [rows[column] - rows["low"], rows["high"] - rows[column]]
        look = {"fmt": marker, "color": colour, "markersize": 4, "capsize": 2, "linewidth": 1}
        axis.errorbar(rows[column], at, xerr=bars, label=label, **look)
    axis.axvline(0, color="0.6", linewidth=1)
    axis.set_yticks(list(y.values()), list(y))
    axis.set_ylim(-0.6, len(names) - 0.4)


def question_prose(study: Study) -> str:
    """The paper's question again, and what compensation does, as sentences (Markdown)."""
    if not sizes(study):
        return NONE
    lines = []
    for sp in sizes(study):
        by_name = _by_name(study, sp)
        pairs = [("constant, compensated", "constant")]
        if _PAPER in by_name:
            pairs += [(_PAPER, "constant"), (f"{_PAPER}, compensated", "constant, compensated")]
        others = [s for s in study.profile.beyond_schedules if s != _PAPER]
        for other in others:
            pairs += [(other, "constant"), (f"{other}, compensated", "constant, compensated")]
        lines += [f"At the size of constant slicing with SP {percent(sp)}:", ""]
        for a, b in pairs:
            lines.append(f"- {a} against {b}: {_both(study, by_name[a], by_name[b])}.")
        lines.append("")
    if not study.profile.beyond_schedules:
        lines.append("This profile compares no other schedule at equal size.")
    return "\n".join(lines)


def _both(study: Study, a: Point, b: Point) -> str:
    """How two networks differ in perplexity on each text, and in accuracy."""
    parts = []
    for text in study.profile.eval_texts:
        change = statistics.perplexity_change(study, a, b, text)
        parts.append(f"perplexity on {text} {change.format('%')} (**{change.direction}**)")
    if tasks := statistics.choice_tasks(study):
        change = statistics.accuracy_change(study, a, b, tasks)
        parts.append(f"accuracy {change.format('points')} (**{change.direction}**)")
    return ", ".join(parts)


# What validation windows say of the choices


def variant_table(study: Study) -> pd.DataFrame:
    """Perplexity on validation windows of everything that was tried at the last of the sizes."""
    if not sizes(study) or study.profile.selection_windows is None:
        return pd.DataFrame()
    sp = sizes(study)[-1]
    contest = study.contest(sp)
    rows = []
    for point in [*contest, *study.variants(sp)]:
        change = statistics.selection_change(study, point, contest[0])
        value = study.get(study.selection_request(point)).value
        rows.append(
            {
                "network": name(point),
                "parameters (M)": _parameters(study, point) / 1e6,
                "validation perplexity": value["perplexity"],
                "perplexity (%)": change.estimate,
                "low": change.low,
                "high": change.high,
            }
        )
    return pd.DataFrame(rows)


def choice_prose(study: Study, table: pd.DataFrame) -> str:
    """Whether the networks that are compared are those that validation windows would choose."""
    if not sizes(study):
        return NONE
    if table.empty:
        return "This profile has no validation windows, so nothing is chosen in it."
    ranked = table.sort_values("validation perplexity", ignore_index=True)
    best = ranked.iloc[0]
    compared = {name(point) for point in study.contest(sizes(study)[-1])}
    first = ranked[ranked["network"].isin(compared)].iloc[0]
    line = (
        f"Of {len(table)} networks at the size of SP {percent(sizes(study)[-1])}, "
        f"**{best['network']}** has the lowest perplexity on validation windows "
        f"({best['validation perplexity']:.1f}, {best['perplexity (%)']:+.1f} % against plain "
        "constant slicing)"
    )
    if best["network"] in compared:
        return f"{line}; it is one of those compared above."
    return (
        f"{line}; of those compared above it is {first['network']} "
        f"({first['validation perplexity']:.1f})."
    )


def widths_figure(study: Study) -> plt.Figure:
    """The width of the stream at each place, by schedule, at the last of the sizes."""
    style.style()
    if not sizes(study):
        return style.nothing()
    sp = sizes(study)[-1]
    points, own = [*study.contest(sp), *study.variants(sp)], study.contest(sp)[0].network
    # Compensation and the calibration text leave the widths alone.
    plain = [p for p in points if p.network == {**own, "plan": p.network["plan"]}]
    figure, axis = plt.subplots(figsize=(2 * COLUMN_WIDTH, 2.2))
    looks = zip(cycle(["-", "--", ":", "-."]), cycle(("C0", "C1", "C2", "C3")), strict=False)
    for point, (line, colour) in zip(plain, looks, strict=False):
        value = study.get(study.slice_request(point)).value
        attention = value.get("attention_widths", value["widths"])
        pairs = [width for pair in zip(attention, value["widths"], strict=True) for width in pair]
        before = [place / 2 for place in range(len(pairs))]
        axis.step(before, pairs, line, where="mid", color=colour, label=point.schedule)
    axis.set(xlabel="layer (MLP half a layer later)", ylabel=f"width, size of SP {percent(sp)}")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.tight_layout()
    return figure


def places_prose(study: Study) -> str:
    """How to read the figure of places, where there is one (Markdown)."""
    if not sizes(study) or not _uses(study, "sensitivity"):
        return "This profile asks for no schedule `sensitivity`, which measures them."
    return (
        "All places are cut as constant slicing cuts them, and one alone is cut less (circles) or "
        "more (triangles): how far does the loss rise? Where circles lie near zero, more width at "
        "one place buys nothing, since what an earlier place dropped does not come back."
    )


def places_figure(study: Study) -> plt.Figure | None:
    """The rise of the loss by place, cut less or more than all others; None if not measured."""
    if not sizes(study) or not _uses(study, "sensitivity"):
        return None
    style.style()
    value = study.get(study.places_request(sizes(study)[-1])).value
    found = rises(value)
    figure, axis = plt.subplots(figsize=(2 * COLUMN_WIDTH, 2.2))
    for share, marker, colour in zip(value["shares"], "ov", ("C0", "C1"), strict=True):
        rise = [at_place[share] for at_place in found]
        label = f"{percent(share)} cut there"
        axis.plot(range(len(rise)), rise, marker, color=colour, markersize=3, label=label)
    axis.axhline(0, color="0.6", linewidth=1)
    axis.set(xlabel="place in the stream", ylabel="rise of the loss (nats per token)")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(frameon=False)
    figure.tight_layout()
    return figure


# Recovery fine-tuning


def recovery_table(study: Study) -> pd.DataFrame:
    """Closed form beside fine-tuning: minutes, perplexity, and its change from plain slicing."""
    if not sizes(study) or not study.profile.recovery_steps:
        return pd.DataFrame()
    sp = sizes(study)[-1]
    constant = [p for p in study.contest(sp) if p.schedule == "constant"]
    rows = []
    for text in study.profile.eval_texts:
        for point in [*constant, *study.recovered(sp)]:
            change = statistics.perplexity_change(study, point, constant[0], text)
            rows.append(
                {
                    "network": name(point),
                    "minutes": study.get(study.slice_request(point)).seconds / 60,
                    "text": text,
                    "perplexity": _perplexity(study, point, text),
                    "perplexity (%)": change.estimate,
                    "low": change.low,
                    "high": change.high,
                }
            )
    return pd.DataFrame(rows)


def recovery_prose(table: pd.DataFrame) -> str:
    """What each minute beyond plain slicing bought, as sentences (Markdown)."""
    if table.empty:
        return "This profile asks for no fine-tuning."
    lines = []
    for text, rows in table.groupby("text", sort=False):
        plain = rows.iloc[0]
        for row in rows.iloc[1:].to_dict("records"):
            more = row["minutes"] - plain["minutes"]
            change = Difference(row["perplexity (%)"], row["low"], row["high"])
            rate = f", that is {change.estimate / more:+.1f} % a minute" if more > 0 else ""
            lines.append(
                f"- {text}, {row['network']}: {more:+.1f} minutes, perplexity "
                f"{change.format('%')}{rate}."
            )
    return "\n".join(lines)


def recovery_figure(table: pd.DataFrame) -> plt.Figure:
    """Change of perplexity against minutes, a panel per text."""
    style.style()
    if table.empty:
        return style.nothing()
    texts = table["text"].unique()
    figure, axes = plt.subplots(1, len(texts), figsize=(2 * COLUMN_WIDTH, 2.5), squeeze=False)
    for axis, text in zip(axes[0], texts, strict=True):
        rows = table[table["text"] == text].reset_index(drop=True)
        looks = zip(rows.index, MARKERS, ("C0", "C1", "C2", "C3"), strict=False)
        for i, marker, colour in looks:
            row = rows.loc[[i]]
            style.points_with_intervals(
                axis, row["minutes"], row, "perplexity (%)", marker, colour, rows.loc[i, "network"]
            )
        axis.set(xlabel="minutes (slicing and fine-tuning)", ylabel=f"perplexity (%), {text}")
        axis.axhline(0, color="0.6", linewidth=1)
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="upper center", ncols=2, frameon=False
    )
    figure.tight_layout(rect=(0, 0, 1, 0.84))
    return figure


# Sentences of the README


def readme_prose(study: Study) -> str:
    """What wins at equal size: a sentence for compensation and one for each schedule (Markdown)."""
    if not sizes(study):
        return ""
    pairs = [
        ("Constant slicing with compensation against without", "constant, compensated", "constant")
    ]
    for schedule in study.profile.beyond_schedules:
        said = f"Schedule `{schedule}` against constant slicing, both compensated"
        pairs.append((said, f"{schedule}, compensated", "constant, compensated"))
    notebook = f"[notebook 07](notebooks/rendered/{study.profile.name}/07_beyond.ipynb)"
    lines = [
        "**Beyond the paper**, at the stored parameters of plain constant slicing, with one draw "
        f"of the calibration windows ({notebook}):",
        "",
    ]
    for said, a, b in pairs:
        found = []
        for sp in sizes(study):
            by_name = _by_name(study, sp)
            found.append(f"at SP {percent(sp)} {_both(study, by_name[a], by_name[b])}")
        lines.append(f"- {said}: {'; '.join(found)}.")
    return "\n".join(lines)


def name(point: Point) -> str:
    """A network by its schedule and what was done to it, the size left out."""
    parts = point.label.split(", ")
    return ", ".join(part for part in parts if not part.startswith("size of SP"))


def _by_name(study: Study, slice_percentage: float) -> dict[str, Point]:
    return {name(point): point for point in study.contest(slice_percentage)}


def evidence_of(study: Study, point: Point):
    """The result that the plan of a network rests on; None where it needs none."""
    given = point.network["plan"].get("evidence")
    return study.get(Request(**given)) if given else None


def _uses(study: Study, schedule: str) -> bool:
    return schedule in (*study.profile.beyond_schedules, *study.profile.beyond_candidates)


def _perplexity(study: Study, point: Point, text: str) -> float:
    return study.get(study.perplexity_request(point, text)).value["perplexity"]


def _parameters(study: Study, point: Point) -> int:
    return study.get(study.slice_request(point)).value["parameters"]
