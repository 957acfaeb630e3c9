"""How tables, figures and sentences look, and where they are written; nothing is measured here."""

import re
from collections.abc import Iterable
from functools import cache, partial
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import yaml
from matplotlib.axis import Axis
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from dynslice.core import files, paths
from dynslice.experiment.across import Across
from dynslice.experiment.profile import percent
from dynslice.experiment.study import Study
from dynslice.report import statistics

COLUMN_WIDTH, PAGE_WIDTH = 3.4, 6.8  # inches, of a page with two columns

MARKERS = "D^vsP*<>"
TURNED = "1 - LR (small: redundant)"  # on axes

ASKED_SHARES = ["SP", "SB", "SB chosen on validation", "best SB in hindsight"]

ROWS = 12  # of a table in a notebook, before the others are folded

SAVED = re.compile(r'save_figure\([^"]*"(\w+)"\)')  # the figures that a notebook writes

# What a cell says that has nothing to say; its section falls away (`cli.rendering`).
NONE = "This profile asks for no such measurement."


def panels(
    rows: int = 1, columns: int = 1, height: float = 2.5, width: float = PAGE_WIDTH, **grid: Any
) -> tuple[plt.Figure, Any]:
    """An empty figure and its axes, in the one look of all; width and height in inches."""
    matplotlib.rcdefaults()  # and none of a user's
    sns.set_theme(context="paper", style="ticks", palette="colorblind", font_scale=0.8)
    plt.rcParams.update({"pdf.fonttype": 42, "savefig.dpi": 200, "axes.grid": True})
    plt.rcParams.update({"grid.linewidth": 0.4, "axes.spines.top": False, "legend.frameon": False})
    plt.rcParams.update({"axes.spines.right": False, "figure.dpi": 120})
    return plt.subplots(rows, columns, figsize=(width, height), layout="constrained", **grid)


def save_figure(figure: plt.Figure | None, study: Study | Across, name: str) -> None:
    """Write a figure as PDF and PNG to figures/<profile>/, if there is one."""
    if figure is None:
        return
    with files.writing(_folder(study)) as folder:
        # Without dates, so that the same results give the same files.
        figure.savefig(folder / f"{name}.pdf", metadata={"CreationDate": None})
        figure.savefig(folder / f"{name}.png", metadata={"Software": None})


def save_table(table: pd.DataFrame, study: Study | Across, name: str, digits: int = 2) -> None:
    """Write a table as CSV (full precision), Markdown and LaTeX to figures/<profile>/.

    The latter two say what the intervals are. A profile that has nothing to show writes nothing.
    """
    if table.empty:
        return
    keep_index = table.index.name is not None
    shown, note = rounded(table, digits), interval_note(table)
    text = shown.to_markdown(index=keep_index, disable_numparse=True)
    latex = shown.to_latex(index=keep_index, escape=True, caption=note.replace("%", r"\%") or None)
    with files.writing(_folder(study)) as folder:
        table.to_csv(folder / f"{name}.csv", index=keep_index)
        (folder / f"{name}.md").write_text(f"{text}\n\n{note}".rstrip() + "\n", encoding="utf-8")
        (folder / f"{name}.tex").write_text(latex, encoding="utf-8")


def interval_note(table: pd.DataFrame) -> str:
    """What `low` and `high` of a table are; nothing where it has none."""
    names = " ".join(map(str, table.columns))
    if "measured" in table.columns:
        return f"In brackets: {statistics.INTERVAL}, windows or items resampled in pairs."
    if "low" not in names:
        return ""
    of_items = "task" in table.columns or "accuracy (points)" in table.columns
    resampled = "items resampled" if of_items else "windows resampled"
    paired = " in pairs" if "(%)" in names or "(points)" in names else ""  # a difference
    if "draw" in table.columns:
        paired += ", over all draws the draws of calibration windows too"
    return f"low, high: {statistics.INTERVAL}, {resampled}{paired}."


def rounded(table: pd.DataFrame, digits: int = 2) -> pd.DataFrame:
    """The table as text: floats with so many decimals, shares as percentages, `-` for nothing."""

    def text(value: object, column: str) -> object:
        if value is None or value != value:  # NaN
            return "-"
        if not isinstance(value, float):
            return value
        if column in ASKED_SHARES:
            return percent(value)
        if column == "mean slice":
            return f"{100 * value:.3g}%"
        if "(tokens/s)" in column:
            return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
        tiny = column == "ratio" and 0 < abs(value) < 0.01  # of a check: decimals show nothing
        return f"{value:.1e}" if tiny else f"{value:.{digits}f}"

    return table.apply(lambda column: column.map(partial(text, column=column.name)))


def shown(table: pd.DataFrame, digits: int = 2, otherwise: str = "") -> Any:
    """What a notebook displays of a table: ROWS rows of text, the others folded below them.

    Of an empty table a sentence, or nothing, so that its section falls away (`cli.rendering`).
    """
    from IPython.display import HTML, Markdown

    if table.empty:
        return Markdown(otherwise) if otherwise else None
    text = with_intervals(table, digits)
    first, more = (_as_html(part) for part in (text[:ROWS], text[ROWS:]))
    count = len(text) - ROWS
    summary = f"{count} more row{'s' * (count > 1)}"
    folded = f"<details><summary>{summary}</summary>{more}</details>"
    return HTML(first + folded * (count > 0))


def _as_html(table: pd.DataFrame) -> str:
    """A table of text; its numbers stay on one line with their intervals where a page has room."""
    html = table.to_html(index=False, border=0)
    if html.count(" [") > 3 * len(table):  # more than three such columns
        return html
    return re.sub(r"<td>(?=[-+.\d]+( %)? \[[^]]*]</td>)", '<td style="white-space: nowrap">', html)


def with_intervals(table: pd.DataFrame, digits: int = 2) -> pd.DataFrame:
    """The text of a table, with `-2.8 [-3.8, -1.9]` in place of an estimate, its low and high.

    Of repeats, their least and most stand there.
    """
    table = table if table.index.name is None else table.reset_index()
    text, names = rounded(table, digits), list(map(str, table))
    for estimate, low, high in zip(names, names[1:], names[2:], strict=False):
        ends = ("low", "high") if "low" in low else ("least", "most")
        if ends[0] in low and high == low.replace(*ends, 1):
            is_change = "(%)" in estimate or "(points)" in estimate
            one = "{:+.1f}" if is_change else f"{{:.{digits}f}}"
            cells = zip(table[estimate], table[low], table[high], strict=True)
            text[estimate] = [_with_bounds(*values, one) for values in cells]
            text = text.drop(columns=[low, high])
    return text


def _with_bounds(estimate: float, low: float, high: float, one: str) -> str:
    if pd.isna(estimate):
        return "-"
    value = one.format(estimate)
    return value if pd.isna(low) else f"{value} [{one.format(low)}, {one.format(high)}]"


def markdown(table: pd.DataFrame, digits: int = 2) -> str:
    """The text of a table without an index, as Markdown."""
    return rounded(table, digits).to_markdown(index=False, disable_numparse=True)


def say(name: str, /, **values: object) -> str:
    """A sentence of sentences.yaml with values in its places."""
    return _sentences()[name].format(**values)


@cache
def _sentences() -> dict[str, str]:
    text = Path(__file__).with_name("sentences.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)


def points_with_intervals(
    axis: plt.Axes, x: pd.Series, rows: pd.DataFrame, y: str, form: str, colour: str, label: str
) -> None:
    """rows[y] at x, with bars from `low` to `high`; a line where `form` has one."""
    order = np.argsort(x.to_numpy(), kind="stable")
    rows, x = rows.iloc[order], x.iloc[order]
    reach = [(rows[y] - rows["low"]).clip(0), (rows["high"] - rows[y]).clip(0)]
    look = {"color": colour, "markerfacecolor": "w" if "-" in form else colour, "markersize": 4}
    artist = axis.errorbar(
        x, rows[y], yerr=reach, fmt=form, linewidth=1, capsize=2, label=label, **look
    )
    for bar in artist[2]:
        bar.set_alpha(0.5)


def on_front(sizes: pd.Series, losses: pd.Series) -> pd.DataFrame:
    """`size` and `loss` of the networks that none of at most their size equals or beats."""
    rows = pd.DataFrame({"size": sizes, "loss": losses}).dropna().astype(float)
    rows = rows.sort_values(["size", "loss"])
    return rows[rows["loss"] < rows["loss"].cummin().shift(fill_value=np.inf)]


def pareto_front(axis: plt.Axes, sizes: pd.Series, losses: pd.Series) -> None:
    """Steps through the networks on the front."""
    best = on_front(sizes, losses)
    look = {"color": "0.7", "linewidth": 2, "zorder": 1, "label": "Pareto front"}
    axis.step(best["size"], best["loss"], "-", where="post", **look)


def lr_curves(axis: plt.Axes, table: pd.DataFrame) -> None:
    """1 - LR by layer, a curve per column: how much each layer turns the stream.

    The axis is logarithmic, since most layers have LR close to 1.
    """
    looks = zip(cycle(MARKERS), cycle(["-", "--", ":", "-.", "-"]), strict=False)
    for name, (marker, line) in zip(table, looks, strict=False):
        axis.plot(table.index, 1 - table[name], line, marker=marker, markersize=3, label=name)
    whole_numbers(axis)
    axis.set(xlabel="layer", ylabel=TURNED, yscale="log")
    log_ticks(axis.yaxis, 1, 2, 5)
    axis.legend()


def log_ticks(axis: Axis, *digits: int) -> None:
    """Plain numbers on a logarithmic axis: these digits times powers of ten."""
    axis.set_major_locator(LogLocator(subs=digits))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")


def whole_numbers(axis: plt.Axes) -> None:
    """Layers and places are counted."""
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def zero_line(axis: plt.Axes, vertical: bool = False) -> None:
    """Where nothing changes."""
    (axis.axvline if vertical else axis.axhline)(0, color="0.6", linewidth=1, zorder=1)


def listed(names: Iterable[str]) -> str:
    """`a, b and c`; empty for none."""
    *others, last = [*names] or [""]
    return f"{', '.join(others)} and {last}" if others else last


def device_line(study: Study) -> str:
    """On what the results of a study were measured, and what was read in place of a corpus."""
    results = filter(None, map(study.store.get, study.requests()))
    provenances = [result.provenance for result in results]
    devices = sorted({f"{p['device']} ({p['threads']} threads)" for p in provenances})
    commits = sorted(set(map(commit_of, provenances)))
    if not provenances:
        return "Nothing is measured yet."
    line = f"Measured on {'; '.join(devices)}, code at commit {listed(commits)}."
    configs = [request.config for request in study.requests()]
    configs += [(config.get("slice") or {}).get("calibration", {}) for config in configs]
    used = {c["text"]: c["stand_in"] for c in configs if "stand_in" in c}
    stand_ins = "; ".join(f"`{there}` stands in for {name}" for name, there in used.items())
    return f"{line} **Stand-ins**: {stand_ins}." if used else line


def commit_of(provenance: dict) -> str:
    """The commit in short, and whether the code that measured differs from it."""
    changed = " with local changes" if provenance.get("dirty") else ""
    return (provenance["commit"] or "unknown")[:10] + changed


def lm_eval_line(study: Study) -> str:
    """Which version of lm-eval scored the tasks."""
    requests = [r for r in study.design.task_requests() if r.kind == "task"]
    versions = sorted({study.get(r).value["lm_eval_version"] for r in requests})
    return f"Scored by lm-eval {', '.join(versions)}." if versions else "No task was scored."


def _folder(study: Study | Across) -> Path:
    folder = paths.figures(study.name)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
