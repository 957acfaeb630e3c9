"""Tables and figures from results, nothing else: no number here is measured or typed."""

from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.ticker import MaxNLocator
from scipy import stats

from dynslice import paths
from dynslice.study import Point, Study

CONFIDENCE = 0.95
RESAMPLES = 9999
INTERVAL = f"{CONFIDENCE:.0%} percentile bootstrap interval, {RESAMPLES:,} resamples, seed 0"
COLUMN_WIDTH = 3.4  # inches, one column of a two-column page
EQUAL_SLICE, EQUAL_SIZE = "equal mean slice", "equal stored parameters"


@dataclass(frozen=True)
class Difference:
    """A paired difference with its bootstrap interval."""

    estimate: float
    low: float
    high: float

    @property
    def direction(self) -> str:
        """`lower`, `higher`, or `no difference shown`, by where the interval lies."""
        if self.high < 0:
            return "lower"
        return "higher" if self.low > 0 else "no difference shown"

    def format(self, unit: str) -> str:
        """`+1.2 % [-0.3, +2.7]`."""
        return f"{self.estimate:+.1f} {unit} [{self.low:+.1f}, {self.high:+.1f}]"


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


def redundancy_figure(table: pd.DataFrame, study: Study) -> plt.Figure:
    """Left LR by layer and text; right the slice FS of each layer, base and rest."""
    style()
    base, target = study.profile.figure_slice_base, study.profile.figure_slice_percentage
    figure, (left, right) = plt.subplots(1, 2, figsize=(2 * COLUMN_WIDTH, 2.4))
    lr_columns = [name for name in table.columns if name.startswith("LR")]
    for column, marker, line in zip(lr_columns, "os^Dv", ["-", "--", ":", "-.", "-"], strict=False):
        left.plot(table.index, table[column], line, marker=marker, markersize=3, label=column)
    left.set(xlabel="layer", ylabel="layer redundancy (cosine)")
    left.legend(frameon=False)
    for axis in (left, right):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.bar(table.index, 100 * base, color="0.7", label=f"slice base, {base:.0%}")
    right.bar(table.index, 100 * table["SLR"], bottom=100 * base, color="C0", label="SLR")
    right.axhline(100 * target, color="k", linestyle="--", linewidth=1, label=f"mean, {target:.0%}")
    right.set(xlabel="layer", ylabel="final slice (% of the width)", ylim=(0, 150 * target))
    right.legend(frameon=False, ncols=3, loc="upper center", columnspacing=0.8, handlelength=1.2)
    figure.tight_layout()
    return figure


# Perplexity


def perplexity_table(study: Study) -> pd.DataFrame:
    """One row per network and text: size, perplexity, and its interval over windows."""
    study.ensure(study.perplexity_requests())
    rows = []
    for point in study.points():
        size = study.get(study.slice_request(point)).value
        for text in study.profile.eval_texts:
            value = study.get(study.perplexity_request(point, text)).value
            low, high = _interval(np.array(value["nll"]))
            rows.append(
                {
                    "network": point.label,
                    "schedule": point.schedule,
                    "SP": point.slice_percentage,
                    "SB": point.slice_base,
                    "mean slice": size["mean_slice"],
                    "parameters (M)": size["parameters"] / 1e6,
                    "text": text,
                    "perplexity": value["perplexity"],
                    "low": np.exp(low),
                    "high": np.exp(high),
                    "windows": value["windows"],
                }
            )
    return pd.DataFrame(rows)


def perplexity_comparison(study: Study) -> pd.DataFrame:
    """Each dynamic network against constant, at equal mean slice and at equal size.

    The change of perplexity in percent, exp(mean difference of NLL) - 1, paired by window.
    """
    study.ensure(study.perplexity_requests())
    rows = []
    for dynamic, other, basis in _pairs(study.points()):
        for text in study.profile.eval_texts:
            change = perplexity_change(study, dynamic, other, text)
            sizes = [
                study.get(study.slice_request(p)).value["parameters"] for p in (dynamic, other)
            ]
            rows.append(
                {
                    "dynamic": f"SP {dynamic.slice_percentage:.0%}, SB {dynamic.slice_base:.0%}",
                    "against constant at": basis,
                    "text": text,
                    "size (%)": 100 * (sizes[0] / sizes[1] - 1),
                    "perplexity (%)": change.estimate,
                    "low": change.low,
                    "high": change.high,
                    "dynamic is": change.direction,
                }
            )
    names = ["dynamic", "against constant at", "text", "size (%)", "perplexity (%)"]
    return pd.DataFrame(rows, columns=[*names, "low", "high", "dynamic is"])


def perplexity_change(study: Study, a: Point, b: Point, text: str) -> Difference:
    """Perplexity of a relative to b in percent, paired by window."""
    nll = [np.array(study.get(study.perplexity_request(p, text)).value["nll"]) for p in (a, b)]
    difference = nll[0] - nll[1]
    low, high = _interval(difference)
    return Difference(*(100 * np.expm1(x) for x in (difference.mean(), low, high)))


def perplexity_figure(table: pd.DataFrame) -> plt.Figure:
    """Perplexity against mean slice (as published) and against stored parameters."""
    style()
    texts = table["text"].unique()
    figure, axes = plt.subplots(
        len(texts), 2, figsize=(2 * COLUMN_WIDTH, 2.5 * len(texts)), squeeze=False, sharey="row"
    )
    for row, text in zip(axes, texts, strict=True):
        here = table[table["text"] == text]
        for axis, x, factor in ((row[0], "mean slice", 100), (row[1], "parameters (M)", 1)):
            _perplexity_panel(axis, here, x, factor)
        row[0].set(xlabel="mean slice (% of the width)", ylabel=f"perplexity ({text})")
        row[1].set(xlabel="stored parameters (millions)")
    axes[0, 0].legend(frameon=False)
    figure.tight_layout()
    return figure


def size_prose(table: pd.DataFrame) -> str:
    """How the sliced networks compare with the dense one in what they store, as Markdown."""
    networks = table.drop_duplicates("network")
    dense = networks[networks["schedule"] == "dense"]["parameters (M)"].iloc[0]
    sliced = networks[networks["schedule"] != "dense"]["parameters (M)"]
    more = int((sliced > dense).sum())
    return (
        f"Of the {len(sliced)} sliced networks **{more} store more parameters than the dense "
        f"model** ({dense:.1f} M): slicing unties the embedding and adds the shortcut matrices. "
        f"They store {sliced.min():.1f} to {sliced.max():.1f} M."
    )


# Tasks


def task_table(study: Study) -> pd.DataFrame:
    """Accuracy in percent by task and network, with the average over tasks in the last row."""
    study.ensure(study.task_requests())
    columns = {}
    for point in study.task_points():
        accuracy = {
            task: 100 * study.get(study.task_request(point, task)).value["acc"]
            for task in study.profile.tasks
        }
        average = {"average": np.mean(list(accuracy.values()))} if accuracy else {}
        columns[point.label] = {**accuracy, **average}
    table = pd.DataFrame(columns)
    if table.empty:
        return table
    first = study.task_points()[0]
    items = [study.get(study.task_request(first, task)).value["n"] for task in study.profile.tasks]
    table.insert(0, "items", [*items, sum(items)])
    table.index.name = "task"
    return table


def task_comparison(study: Study) -> pd.DataFrame:
    """Accuracy of dynamic minus constant in points, per task and on average, paired by item."""
    study.ensure(study.task_requests())
    rows = []
    for dynamic, other, basis in _pairs(study.task_points()):
        every = list(study.profile.tasks)
        for tasks in [*([task] for task in every), every] if every else []:
            change = accuracy_change(study, dynamic, other, tasks)
            rows.append(
                {
                    "dynamic": f"SP {dynamic.slice_percentage:.0%}, SB {dynamic.slice_base:.0%}",
                    "against constant at": basis,
                    "task": tasks[0] if len(tasks) == 1 else "average",
                    "accuracy (points)": change.estimate,
                    "low": change.low,
                    "high": change.high,
                    "dynamic is": change.direction,
                }
            )
    names = ["dynamic", "against constant at", "task", "accuracy (points)"]
    return pd.DataFrame(rows, columns=[*names, "low", "high", "dynamic is"])


def accuracy_change(study: Study, a: Point, b: Point, tasks: list[str]) -> Difference:
    """Accuracy of a minus b in points, the mean over tasks, resampling items within each task."""
    differences = [
        np.subtract(*(study.get(study.task_request(p, task)).value["correct"] for p in (a, b)))
        for task in tasks
    ]
    low, high = _interval(*differences)
    estimate = np.mean([d.mean() for d in differences])
    return Difference(*(100 * x for x in (estimate, low, high)))


def comparison_prose(comparison: pd.DataFrame, column: str, quantity: str) -> str:
    """What a table of paired differences says, per basis of comparison, as Markdown."""
    if comparison.empty:
        return f"This profile compares no dynamic with a constant network by {quantity}."
    lines = []
    unit = column.partition("(")[2].rstrip(")")
    for basis, rows in comparison.groupby("against constant at", sort=False):
        counts = rows["dynamic is"].value_counts()
        found = [
            f"no difference is shown in {count}"
            if word == "no difference shown"
            else f"{quantity} of dynamic slicing is {word} in {count}"
            for word, count in counts.items()
        ]
        low, high = (f"{x:+.1f}" for x in (rows[column].min(), rows[column].max()))
        changes = f"the change is {low}" if low == high else f"the changes are {low} to {high}"
        lines.append(
            f"- At **{basis}**, of {len(rows)} comparison{'s' * (len(rows) > 1)}: "
            f"{', '.join(found)}; {changes} {unit}."
        )
    return "\n".join(lines)


def difference_figure(comparison: pd.DataFrame, column: str, label: str) -> plt.Figure:
    """Paired differences with their intervals, one panel per basis of comparison.

    column: the difference, named `quantity (unit)`; label: the column that names the rows. An
    average is a filled circle.
    """
    style()
    if comparison.empty:
        figure, axis = plt.subplots(figsize=(COLUMN_WIDTH, 0.8))
        axis.axis("off")
        axis.text(0.5, 0.5, "nothing to compare in this profile", ha="center", va="center")
        return figure
    groups = list(comparison.groupby("against constant at", sort=False))
    figure, axes = plt.subplots(
        1,
        len(groups),
        figsize=(2 * COLUMN_WIDTH, 0.9 + 0.22 * len(groups[0][1])),
        sharey=True,
        sharex=True,
        squeeze=False,
    )
    for axis, (basis, rows) in zip(axes[0], groups, strict=True):
        y = np.arange(len(rows))[::-1]
        errors = [rows[column] - rows["low"], rows["high"] - rows[column]]
        fill = ["k" if name.startswith("average") else "w" for name in rows[label]]
        axis.errorbar(rows[column], y, xerr=errors, fmt="none", color="0.4", capsize=2, zorder=1)
        axis.scatter(rows[column], y, c=fill, edgecolors="k", s=18, zorder=2)
        axis.axvline(0, color="0.6", linewidth=1)
        axis.set_yticks(y, rows[label])
        axis.set_ylim(-0.5, len(rows) - 0.5)
        axis.set_title(f"against constant at {basis}")
        quantity, _, unit = column.rstrip(")").partition(" (")
        axis.set_xlabel(f"change of {quantity} ({unit})")
    figure.tight_layout()
    return figure


# Claims


def claims_table(study: Study) -> pd.DataFrame:
    """Each headline claim of the paper beside what was measured, with a verdict by rule.

    Rule: of all dynamic networks of the study the one that gains most counts, as in an `up to`
    claim. Its verdict is `not supported` unless the interval of the gain excludes zero on the
    claimed side; then it is `supported` when the gain is at least the published one, and
    `supported in direction, not in size` when it is smaller. On models that the study did not
    run it is `not tested here`.
    """
    claims = pd.read_csv(paths.PUBLISHED / "claims.csv")
    rows = []
    for claim in claims.itertuples():
        tested = study.profile.model in claim.models.split(";")
        for basis in (EQUAL_SLICE, EQUAL_SIZE):
            name, change = _best(study, claim.metric, basis)
            unit = "%" if claim.metric == "perplexity" else "points"
            here = _verdict(change, claim.value)
            rows.append(
                {
                    "claim": claim.claim,
                    "published": f"{claim.value:+d} {'%' if claim.unit == 'percent' else ''}",
                    "at": basis,
                    "best dynamic network": name,
                    "measured": change.format(unit) if change else "-",
                    "verdict on this model": here,
                    "verdict on the paper's models": here if tested else "not tested here",
                    "source": claim.source,
                }
            )
    return pd.DataFrame(rows)


def _verdict(change: Difference | None, published: float) -> str:
    if change is None:
        return "not tested here"
    if change.direction != ("lower" if published < 0 else "higher"):
        return "not supported"
    return "supported" + (
        "" if abs(change.estimate) >= abs(published) else " in direction, not in size"
    )


def claims_prose(table: pd.DataFrame, study: Study) -> str:
    """The verdicts as sentences (Markdown), in words that follow from the numbers."""
    lines = []
    for claim, rows in table.groupby("claim", sort=False):
        lines.append(f"**{claim}** (published: {rows.iloc[0]['published'].strip()}).")
        for row in rows.itertuples(index=False):
            at, network, measured, verdict = row[2:6]
            lines.append(
                f"- At {at} the best dynamic network ({network}) differs from constant slicing "
                f"by {measured}: **{verdict}** on {study.profile.model}."
                if measured != "-"
                else f"- At {at} this profile measures no such pair: **{verdict}**."
            )
        untested = (rows["verdict on the paper's models"] == "not tested here").all()
        if untested:
            lines.append("- On Llama3-8B and Mistral-7B: **not tested here**.")
        lines.append("")
    return "\n".join(lines)


# The README's part


def readme_block(study: Study) -> str:
    """What the README says of a record: a figure, the paired comparison, the verdicts."""
    name = study.profile.name
    seconds = [study.store.get(request).seconds for request in study.requests()]
    comparison = rounded(perplexity_comparison(study)).drop(columns=["text"])
    return "\n".join(
        [
            f"![Perplexity against mean slice and against stored parameters, profile {name}]"
            f"(figures/{name}/perplexity.png)",
            "",
            comparison.to_markdown(index=False, disable_numparse=True),
            "",
            size_prose(perplexity_table(study)),
            "",
            f"Perplexity of dynamic relative to constant slicing of {study.profile.model} on "
            f"`{'`, `'.join(study.profile.eval_texts)}` ({study.profile.eval_split} split), "
            f"negative is better; low and high: {INTERVAL}, windows resampled in pairs.",
            "",
            claims_prose(claims_table(study), study).strip(),
            "",
            f"{device_line(study)} Its {len(seconds)} measurements took "
            f"{sum(seconds) / 60:.1f} minutes.",
        ]
    )


# Writing


def style() -> None:
    """One look for all figures: column width, readable in grey, fonts embedded as text."""
    sns.set_theme(context="paper", style="ticks", palette="colorblind", font_scale=0.8)
    plt.rcParams.update({"pdf.fonttype": 42, "savefig.dpi": 200, "axes.grid": True})
    plt.rcParams.update({"grid.linewidth": 0.4, "axes.spines.top": False})
    plt.rcParams.update({"axes.spines.right": False, "figure.dpi": 120})


def save_figure(figure: plt.Figure, study: Study, name: str) -> None:
    """Write a figure as PDF and PNG to figures/<profile>/."""
    folder = _folder(study)
    # Without dates, so that the same results give the same files.
    figure.savefig(folder / f"{name}.pdf", metadata={"CreationDate": None})
    figure.savefig(folder / f"{name}.png", metadata={"Software": None})


def save_table(table: pd.DataFrame, study: Study, name: str, digits: int = 2) -> None:
    """Write a table as CSV (full precision), Markdown and LaTeX to figures/<profile>/."""
    stem = _folder(study) / name
    keep_index = table.index.name is not None
    table.to_csv(stem.with_suffix(".csv"), index=keep_index)
    shown = rounded(table, digits)
    text = shown.to_markdown(index=keep_index, disable_numparse=True)
    stem.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    latex = shown.to_latex(index=keep_index, escape=True)
    stem.with_suffix(".tex").write_text(latex, encoding="utf-8")


def rounded(table: pd.DataFrame, digits: int = 2) -> pd.DataFrame:
    """The table with its floats as text of so many decimals."""
    return table.map(lambda v: f"{v:.{digits}f}" if isinstance(v, float) else v)


def device_line(study: Study) -> str:
    """On what the results of a study were measured."""
    provenances = [
        result.provenance for r in study.requests() if (result := study.store.get(r)) is not None
    ]
    devices = sorted({f"{p['device']} ({p['threads']} threads)" for p in provenances})
    commits = sorted({(p["commit"] or "unknown")[:10] for p in provenances})
    return f"Measured on {'; '.join(devices)}, code at commit {', '.join(commits)}."


def lm_eval_line(study: Study) -> str:
    """Which version of lm-eval scored the tasks."""
    requests = [r for r in study.task_requests() if r.kind == "task"]
    versions = sorted({study.get(r).value["lm_eval_version"] for r in requests})
    return f"Scored by lm-eval {', '.join(versions) or '-'}."


def _folder(study: Study) -> Path:
    folder = paths.figures(study.profile.name)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _pairs(points: list[Point]) -> list[tuple[Point, Point, str]]:
    """(dynamic, constant to compare with, basis of the comparison)."""
    pairs = []
    for a in points:
        if a.schedule != "dynamic":
            continue
        for b in points:
            same_sp = b.slice_percentage == a.slice_percentage
            if b.schedule == "constant" and same_sp:
                pairs.append((a, b, EQUAL_SLICE))
            if b.schedule == "matched" and same_sp and b.slice_base == a.slice_base:
                pairs.append((a, b, EQUAL_SIZE))
    return pairs


def _best(study: Study, metric: str, basis: str) -> tuple[str, Difference | None]:
    """The dynamic network with the largest gain, and that gain."""
    if metric == "perplexity":
        gains = [
            (f"{a.label}, {text}", perplexity_change(study, a, b, text))
            for a, b, on in _pairs(study.points())
            if on == basis
            for text in study.profile.eval_texts
        ]
        return min(gains, key=lambda g: g[1].estimate, default=("-", None))
    tasks = list(study.profile.tasks)
    gains = [
        (a.label, accuracy_change(study, a, b, tasks))
        for a, b, on in _pairs(study.task_points())
        if on == basis and tasks
    ]
    return max(gains, key=lambda g: g[1].estimate, default=("-", None))


def _interval(*samples: np.ndarray) -> tuple[float, float]:
    """Bootstrap interval of the mean of the samples' means, resampling each on its own."""
    if all(len(set(sample)) == 1 for sample in samples):  # nothing to resample
        mean = float(np.mean([sample.mean() for sample in samples]))
        return mean, mean

    def mean_of_means(*resampled: np.ndarray, axis: int) -> np.ndarray:
        return np.mean([r.mean(axis=axis) for r in resampled], axis=0)

    interval = stats.bootstrap(
        samples,
        mean_of_means,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        vectorized=True,
        batch=1000,  # bounds the memory on whole task sets
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def _perplexity_panel(axis: plt.Axes, table: pd.DataFrame, x: str, factor: float) -> None:
    dense = table[table["schedule"] == "dense"].iloc[0]
    axis.axhline(dense["perplexity"], color="0.5", linestyle=":", label="dense")
    constant = table[table["schedule"].isin(["constant", "matched"])]
    _points_with_intervals(axis, constant, x, factor, "o-", "C0", "constant")
    dynamic = table[table["schedule"] == "dynamic"].groupby("SB")
    for marker, (sb, rows) in zip("D^vsP*<>", dynamic, strict=False):
        _points_with_intervals(axis, rows, x, factor, marker, "C1", f"dynamic, SB {sb:.0%}")


def _points_with_intervals(
    axis: plt.Axes, rows: pd.DataFrame, x: str, factor: float, form: str, colour: str, label: str
) -> None:
    rows = rows.sort_values(x)
    errors = [rows["perplexity"] - rows["low"], rows["high"] - rows["perplexity"]]
    artist = axis.errorbar(
        factor * rows[x],
        rows["perplexity"],
        yerr=errors,
        fmt=form,
        color=colour,
        markerfacecolor="w" if "-" in form else colour,
        markersize=4,
        linewidth=1,
        capsize=2,
        label=label,
    )
    for bar in artist[2]:
        bar.set_alpha(0.5)
