"""Notebook 07: the ladder at equal stored parameters, one lever more on each rung."""

from itertools import pairwise, product

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from dynslice.evaluate.task_table import chance
from dynslice.experiment.equal_size import BEST_RECIPE, SLICEGPT
from dynslice.experiment.profile import percent
from dynslice.experiment.requests import DENSE, Point
from dynslice.experiment.store import Request
from dynslice.experiment.study import Study
from dynslice.report import efficiency, statistics, style
from dynslice.report.statistics import ACCURACY, PERPLEXITY, Estimate, columns, of_row

# The columns of a change and of its interval: from the rung before, from SliceGPT.
STEP = ("this step (%)", "{}, step")
WHOLE = (f"against {SLICEGPT} (%)", f"{{}}, {SLICEGPT}")
ALL_DRAWS = "all"


def ladders(study: Study) -> dict[float, list[Point]]:
    """The rungs of each size, lowest first, by the share that constant slicing cuts there."""
    return {sp: study.beyond.contest(sp) for sp in sorted(study.profile.beyond_slice_percentages)}


def last_ladder(study: Study) -> tuple[float, list[Point]]:
    """The size that the profile names last, where variants are tried, and its rungs."""
    sp = study.profile.beyond_slice_percentages[-1]
    return sp, ladders(study)[sp]


def rung(rungs: list[Point], lever: str) -> Point:
    """The rung that has a lever as its last."""
    return next(point for point in rungs if point.name == lever)


def ladder_table(study: Study) -> pd.DataFrame:
    """Perplexity by size, text and rung, and its paired changes from the rung before and SliceGPT.

    The dense model stands above the rungs of each text, with no change.
    """
    study.ensure(study.beyond.requests())
    rows = []
    for (sp, rungs), text in product(ladders(study).items(), study.profile.eval_texts):
        changes = _changes(study, rungs, text)
        for point in (DENSE, *rungs):
            row = {"SP": sp, "text": text, "network": point.name}
            row |= columns(statistics.perplexity(study, point, text), "perplexity")
            step, whole = changes.get(point.label, (None, None))
            rows.append({**row, **columns(step, *STEP), **columns(whole, *WHOLE)})
    return pd.DataFrame(rows)


def _changes(
    study: Study, rungs: list[Point], text: str
) -> dict[str, tuple[statistics.Estimate | None, statistics.Estimate]]:
    """The changes from the rung before, and from SliceGPT, by label."""

    def change(a: Point, b: Point) -> statistics.Estimate:
        return statistics.perplexity_change(study, a, b, text)

    reference, before = rung(rungs, SLICEGPT), [None, *rungs[:-1]]
    return {
        point.label: (change(point, lower) if lower else None, change(point, reference))
        for lower, point in zip(before, rungs, strict=True)
    }


def accuracy_table(study: Study) -> pd.DataFrame:
    """Average accuracy by size and rung, and its change from SliceGPT in points."""
    rows = []
    for sp, rungs in ladders(study).items():
        tasks = _tasks(study, sp)
        for point in (DENSE, *rungs) if tasks else ():
            pair = (point, rung(rungs, SLICEGPT))
            change = None if point is DENSE else statistics.accuracy_change(study, *pair, tasks)
            row = {"SP": sp, "network": point.name, "tasks": len(tasks)}
            row["accuracy (%)"] = statistics.accuracy(study, point, tasks)
            row["chance (%)"] = chance(tasks)
            rows.append({**row, **columns(change, ACCURACY)})
    return pd.DataFrame(rows)


def _tasks(study: Study, sp: float) -> list[str]:
    return statistics.choice_tasks(study) if study.beyond.has_tasks(sp) else []


def cost_table(study: Study) -> pd.DataFrame:
    """What each rung stores and took: seconds of slicing (and fine-tuning), and peak memory.

    Evidence is what its widths rest on, measured once for all networks that use it.
    """
    rows = []
    for sp, point in [(sp, point) for sp, rungs in ladders(study).items() for point in rungs]:
        sliced = study.get(study.slice_request(point))
        asked = point.network["plan"].get("evidence")
        row = {"SP": sp, "network": point.name, **statistics.sizes(study, point)}
        row["of dense (%)"] = 100 * study.size(point) / sliced.value["parameters_dense"]
        row["evidence (s)"] = asked and study.get(Request(**asked)).seconds
        row["slicing (s)"] = sliced.seconds
        row["peak memory (GB)"] = sliced.peak_memory_bytes / 1e9
        rows.append(row)
    return pd.DataFrame(rows)


def speed_table(study: Study) -> pd.DataFrame:
    """How many times as fast as the dense model each rung is, measured and counted.

    A rung of fine-tuning, which changes no shape, has the speed of the one before it.
    """
    rows = []
    for sp, rungs in ladders(study).items():
        speed: dict[str, float] = {}
        for point in rungs:
            for request in study.beyond.speed_requests(point):  # one, or none
                value = study.get(request).value
                for step in efficiency.STEPS:
                    speed |= efficiency.gain_columns(value, step)
            rows += [{"SP": sp, "network": point.name, **speed}] if speed else []
    return pd.DataFrame(rows)


def ladder_figure(table: pd.DataFrame) -> plt.Figure | None:
    """What each rung changes, as steps of a waterfall: a row per size, a column per text.

    A bar goes from the perplexity of the rung before to that of its own; the thin line is the
    interval of this step. A dashed line is the dense model.
    """
    if table.empty:
        return None
    sizes, texts = table["SP"].unique(), table["text"].unique()
    rungs = table["network"].nunique() - 1
    grid = {"squeeze": False, "sharex": "col", "sharey": True}
    height = (0.5 + 0.2 * rungs) * len(sizes) + 0.3
    figure, axes = style.panels(len(sizes), len(texts), height, **grid)
    for row, sp in zip(axes, sizes, strict=True):
        for axis, text in zip(row, texts, strict=True):
            here = table[(table["SP"] == sp) & (table["text"] == text)]
            dense, steps = here[here["network"] == DENSE.schedule], here.iloc[1:]
            axis.axvline(*dense["perplexity"], color="0.4", linestyle="--", linewidth=1)
            _waterfall(axis, steps)
            axis.set_yticks(range(0, -len(steps), -1), steps["network"])
            axis.set_ylim(-len(steps) + 0.4, 0.6)
            axis.set_title(f"size of SP {percent(sp)}, {text}", loc="left")
    for axis in axes[-1]:
        axis.set(xlabel="perplexity (dashed: dense)", xscale="log")
        least, most = axis.get_xlim()
        axis.set_xlim(least, most * (most / least) ** 0.12)  # room for what is written at the bars
        style.log_ticks(axis.xaxis, 1, 2, *([3, 5, 7] if most < 10 * least else [5]))
    return figure


def _waterfall(axis: plt.Axes, steps: pd.DataFrame) -> None:
    """The rungs of one size and text, the first as a mark and each other one as a bar."""
    first, *others = steps.to_dict("records")
    before = first["perplexity"]
    axis.plot(before, 0, "ko", markersize=4)
    for y, row in enumerate(others, start=1):
        level, change = row["perplexity"], of_row(row, *STEP)
        is_lower = level < before
        look = {"color": "C0" if is_lower else "w", "edgecolor": "k", "linewidth": 0.6}
        look["hatch"] = None if is_lower else "////"
        axis.barh(-y, level - before, left=before, height=0.6, **look)
        ends = [before * (1 + bound / 100) for bound in (change.low, change.high)]
        axis.plot(ends, [-y, -y], "k-", linewidth=1)
        told = f"{change.estimate:+.1f} %"
        where = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "fontsize": 7}
        axis.annotate(told, (max(level, before, *ends), -y), **where)
        before = level


# In sentences


def steps(study: Study, sp: float) -> dict[str, Estimate]:
    """From SliceGPT to the recipe, what each step changes on the text of the calibration."""
    text, rungs = study.profile.calibration_text, _to_recipe(study, sp)
    return {
        after.name: statistics.perplexity_change(study, after, before, text)
        for before, after in pairwise(rungs)
    }


def _to_recipe(study: Study, sp: float) -> list[Point]:
    rungs = ladders(study)[sp]
    return rungs[rungs.index(rung(rungs, SLICEGPT)) : rungs.index(rung(rungs, BEST_RECIPE)) + 1]


def steps_prose(study: Study, sp: float) -> str:
    """From SliceGPT to the recipe on the text of the calibration, step by step (Markdown)."""
    text, (slicegpt, *_, recipe) = study.profile.calibration_text, _to_recipe(study, sp)
    return style.say(
        "short_ladder",
        share=percent(sp),
        stored=study.size(recipe) / 1e6,
        dense=study.size(DENSE) / 1e6,
        text=text,
        slicegpt=study.perplexity(slicegpt, text),
        recipe=study.perplexity(recipe, text),
        steps=", ".join(f"{name} {x.told('%')}" for name, x in steps(study, sp).items()),
        whole=study.perplexity(DENSE, text),
    )


def heard_prose(study: Study) -> str:
    """What networks write after the same beginning of each text (Markdown)."""
    if not (points := study.beyond.heard()):
        return style.NONE
    study.ensure(study.beyond.requests())
    parts = []
    for text in study.profile.eval_texts:
        said = [study.get(study.beyond.continuation_request(p, text)).value for p in points]
        parts.append(f"**{text}**, beginning with {_verbatim(said[0]['prompt'])}")
        rows = zip(points, said, strict=True)
        parts.append("\n".join(f"- {p.name}: {_verbatim(x['continuation'])}" for p, x in rows))
    return "\n\n".join(parts)


def _verbatim(text: str) -> str:
    """A text in one line, in which Markdown finds nothing to change."""
    return f"`{' '.join(text.replace('`', chr(39)).split())}`"


# Over draws of the calibration windows


def draws_table(study: Study) -> pd.DataFrame:
    """The recipe against SliceGPT by size, text and draw, then over all draws.

    Each draw's interval resamples windows, that over all draws the draws too.
    """
    rows = []
    for sp, text in product(ladders(study), study.profile.eval_texts):
        pairs = study.beyond.draws(sp)
        for pair in pairs if len(pairs) > 1 else ():
            levels = [study.perplexity(point, text) for point in pair]
            change = statistics.perplexity_change(study, *pair, text)
            seed = str(pair[0].network["calibration"]["seed"])
            rows.append({**_draw(sp, text, seed, levels), **columns(change, PERPLEXITY)})
        if len(pairs) > 1:
            levels = [
                np.mean([study.perplexity(point, text) for point in points])
                for points in zip(*pairs, strict=True)
            ]
            change = statistics.change_over_draws(study, pairs, text)
            rows.append({**_draw(sp, text, ALL_DRAWS, levels), **columns(change, PERPLEXITY)})
    return pd.DataFrame(rows)


def _draw(sp: float, text: str, seed: str, levels: list[float]) -> dict:
    names = ("recipe", SLICEGPT)
    return {"SP": sp, "text": text, "draw": seed, **dict(zip(names, levels, strict=True))}


def draws_prose(table: pd.DataFrame) -> str:
    """The recipe against SliceGPT over all draws in a sentence (Markdown)."""
    if table.empty:
        return style.NONE
    found = [
        f"at SP {percent(row['SP'])} on {row['text']} {of_row(row, PERPLEXITY).format('%')}"
        for row in table[table["draw"] == ALL_DRAWS].to_dict("records")
    ]
    return style.say("draws", count=table["draw"].nunique() - 1, changes="; ".join(found))


# Ordinary checkpoints


def plain_table(study: Study) -> pd.DataFrame:
    """Ordinary checkpoints at the sizes of the published layout, and their change from it."""
    rows = []
    for sp, text in product(ladders(study), study.profile.eval_texts):
        published, *ordinary = study.beyond.plain(sp) or [None]
        for point in (published, *ordinary) if published else ():
            widths = study.get(study.slice_request(point)).value["widths"]
            row = {"SP": sp, "text": text, "network": point.name}
            row |= {"mean width": np.mean(widths), statistics.SIZE: study.size(point) / 1e6}
            row |= {"perplexity": study.perplexity(point, text)}
            pair = None if point is published else (point, published)
            change = pair and statistics.perplexity_change(study, *pair, text)
            rows.append({**row, **columns(change, PERPLEXITY)})
    return pd.DataFrame(rows)
