"""Notebook 04: what one change at a time does, and whether the order of the widths matters."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from scipy import stats

from dynslice.experiment.requests import Point
from dynslice.experiment.study import Study
from dynslice.method.scores import scores_of
from dynslice.report import comparison, statistics, style
from dynslice.report.statistics import Difference

OF_SCORES = {"angular": "angular distance", "update": "update norm"}  # what a score is made of

BY_LR, BY_SIZE = "against LR order (%)", "against constant of equal size (%)"

# LR itself


def lr_table(study: Study) -> pd.DataFrame:
    """LR per layer: on each text, with other definitions of the last layer, and other scores."""
    columns = {r.config["text"]: study.lr(r) for r in study.lr_requests()}
    for end in study.profile.ablation_last_layers:
        request = study.lr_request(last_layer=end)
        columns[f"{request.config['text']}, last layer {end}"] = study.lr(request)
    layers = study.get(study.lr_request()).value["layers"]
    for name in _other_scores(study):
        columns[OF_SCORES[name]] = [layer[OF_SCORES[name].replace(" ", "_")] for layer in layers]
    table = pd.DataFrame(columns)
    table.index.name = "layer"
    return table


def _other_scores(study: Study) -> list[str]:
    """The scores that the profile asks for, without the cosine, which is LR itself."""
    return [score for score in study.profile.ablation_scores if score in OF_SCORES]


def lr_figure(table: pd.DataFrame) -> plt.Figure:
    """LR by layer, a curve per text and definition."""
    figure, axis = style.panels(height=2.6, width=style.COLUMN_WIDTH)
    style.lr_curves(axis, table.drop(columns=OF_SCORES.values(), errors="ignore"))
    return figure


def lr_agreement(study: Study) -> pd.DataFrame:
    """How LR on other texts, last layers and scores ranks the layers, against the profile's own.

    Spearman's rank correlation over layers, and the largest difference of LR in any layer.
    """
    p, reference = study.profile, study.lr()
    layers = study.get(study.lr_request()).value["layers"]
    found = [("text", r.config["text"], study.lr(r)) for r in study.lr_requests()[1:]]
    for end in p.ablation_last_layers:
        found.append(("last layer", end, study.lr(study.lr_request(last_layer=end))))
    found += [("score", score, scores_of(layers, score)) for score in _other_scores(study)]
    return pd.DataFrame(
        {
            "varied": varied,
            "variant": variant,
            "rank correlation": _rank_correlation(scores, reference),
            "largest |difference| of LR": (
                None if varied == "score" else _largest_gap(scores, reference)  # another scale
            ),
        }
        for varied, variant, scores in found
    )


def _rank_correlation(a: list[float], b: list[float]) -> float:
    return float(stats.spearmanr(a, b).statistic)


def _largest_gap(a: list[float], b: list[float]) -> float:
    return np.abs(np.subtract(a, b)).max()


def width_table(study: Study) -> pd.DataFrame:
    """What other ways to LR do to the widths of the ablated dynamic plan, and to its size."""
    plans = {
        f"LR on {lr.config['text']}": study.get(plan).value
        for lr, plan in zip(study.lr_requests(), study.ablation.lr_plan_requests(), strict=False)
    }
    for ablation in study.ablation.variants():
        if ablation.question in ("last layer", "score"):
            plans[ablation.point.label] = study.get(study.slice_request(ablation.point)).value
    rows = []
    for name, plan in plans.items():
        own = next(iter(plans.values()))
        gaps = np.abs(np.subtract(plan["widths"], own["widths"]))
        rows.append(
            {
                "plan": name,
                "narrowest": min(plan["widths"]),
                "widest": max(plan["widths"]),
                "layers with another width": int((gaps > 0).sum()),
                "largest change of a width": int(gaps.max()),
                "parameters (M)": plan["parameters"] / 1e6,
            }
        )
    return pd.DataFrame(rows)


def lr_tokens_table(study: Study) -> pd.DataFrame:
    """LR on growing beginnings of the text, compared with LR on the longest."""
    requests = study.ablation.lr_by_tokens() if study.profile.ablation_lr_tokens else []
    return pd.DataFrame(
        {
            "tokens": study.get(request).value["tokens"],
            "windows": study.get(request).value["windows"],
            "rank correlation with the longest": _rank_correlation(
                study.lr(request), study.lr(requests[-1])
            ),
            "largest |difference| of LR": _largest_gap(study.lr(request), study.lr(requests[-1])),
        }
        for request in requests
    )


# What a change of the slice does


def ablation_table(study: Study) -> pd.DataFrame:
    """Every ablated network on the first text: size, perplexity, and two paired changes.

    `change` compares with the same kind of network (dynamic, or constant) as the main comparison
    makes it, `against the curve` with constant slicing of the same stored parameters, interpolated
    between the constant networks of the study (`statistics.curve_change`); where a size lies
    outside them, `against the nearest` compares with the constant network of the nearest size. In
    percent.
    """
    text = study.profile.eval_texts[0]
    reference = {point.schedule: point for point in study.ablation.ablated()}
    reference["shuffled"] = reference.get("dynamic")
    asked = [
        ("as in the main comparison", point, point, text) for point in study.ablation.ablated()
    ]
    asked += [
        (ablation.question, ablation.point, reference[ablation.point.schedule], text)
        for ablation in study.ablation.variants()
        for text in ablation.texts
    ]
    return pd.DataFrame(_ablation_row(study, *what) for what in asked)


def _ablation_row(study: Study, question: str, point: Point, reference: Point, text: str) -> dict:
    change = statistics.perplexity_change(study, point, reference, text)
    curve = statistics.curve_change(study, point, text)
    nearest = statistics.nearest_constant(study, point)
    to_nearest = None if curve else statistics.perplexity_change(study, point, nearest, text)
    return {
        "varied": question,
        "network": point.label,
        "text": text,
        "parameters (M)": study.size(point) / 1e6,
        "perplexity": study.perplexity(point, text),
        **statistics.columns(change, "change (%)"),
        **statistics.columns(curve, "against the curve (%)", "curve"),
        "nearest (M)": study.size(nearest) / 1e6,
        **statistics.columns(to_nearest, "against the nearest (%)", "nearest"),
    }


def curve_phrase(row: dict | pd.Series) -> str:
    """How a row of `ablation_table` compares with constant slicing of its size; ends a sentence."""
    if not pd.isna(row["against the curve (%)"]):
        change = Difference.of_row(row, "against the curve (%)", "curve")
        return f"; against constant slicing of its own size {change.format('%')}"
    change = Difference.of_row(row, "against the nearest (%)", "nearest")
    return (
        f"; its size lies outside the constant curve, against the nearest constant network, of "
        f"{row['nearest (M)']:.1f} M, {change.format('%')}"
    )


def seed_table(study: Study) -> pd.DataFrame:
    """Dynamic against constant of equal size, by calibration seed, then mean and deviation.

    The spread over calibrations is a variance of its own, which no interval over evaluation
    windows holds.
    """
    others = [a.point for a in study.ablation.variants() if a.question == "calibration seed"]
    if not others:
        return pd.DataFrame()
    text, points = study.profile.eval_texts[0], [*study.ablation.ablated()[1:], *others]
    table = pd.DataFrame(
        {
            "calibration seed": str(dynamic.network["calibration"]["seed"]),
            "dynamic": study.perplexity(dynamic, text),
            "constant of equal size": study.perplexity(matched, text),
            **statistics.columns(
                statistics.perplexity_change(study, dynamic, matched, text), "change (%)"
            ),
        }
        for dynamic, matched in zip(points[::2], points[1::2], strict=True)
    )
    numbers = table[["dynamic", "constant of equal size", "change (%)"]]
    spread = pd.DataFrame([numbers.mean(), numbers.std()])
    spread.insert(0, "calibration seed", ["mean", "standard deviation"])
    return pd.concat([table, spread], ignore_index=True)


def seed_prose(table: pd.DataFrame) -> str:
    """The spread over calibrations in a sentence (Markdown)."""
    if table.empty:
        return style.NONE
    *changes, mean, deviation = table["change (%)"]
    same = len({np.sign(change) for change in changes}) == 1
    return (
        f"Over {len(changes)} calibrations the change is {mean:+.1f} % on average with a standard "
        f"deviation of {deviation:.1f} points, from {min(changes):+.1f} to {max(changes):+.1f} %: "
    ) + (
        "its sign is the same in all of them."
        if same
        else "**its sign depends on the sample of calibration windows.**"
    )


def overfit_table(study: Study) -> pd.DataFrame:
    """Constant slicing by calibration size: perplexity on its calibration windows and on test."""
    points = [a.point for a in study.ablation.variants() if a.question == "calibration size"]
    if not points:
        return pd.DataFrame()
    text, rows = study.profile.eval_texts[0], []
    for point in [study.ablation.ablated()[0], *points]:
        calibration = point.network["calibration"]
        own = study.get(study.ablation.calibration_request(point)).value
        rows.append(
            {
                "calibration tokens": calibration["windows"] * calibration["window"],
                "perplexity, own calibration windows": own["perplexity"],
                f"perplexity, {text}": study.perplexity(point, text),
            }
        )
    return pd.DataFrame(rows).sort_values("calibration tokens", ignore_index=True)


# Is it the order that helps?


def shuffle_table(study: Study) -> pd.DataFrame:
    """The dynamic network, its shuffles, and equal widths with the embedding as wide as its.

    Each against constant slicing of equal size, and against the order by LR.
    """
    controls = [a.point for a in study.ablation.variants() if a.question == "shuffled"]
    if not controls:
        return pd.DataFrame()
    constant = [a.point for a in study.ablation.variants() if a.point.schedule == "constant"]
    controls += [point for point in constant if "embedding" in point.variant]
    text, dynamic = study.profile.eval_texts[0], study.ablation.ablated()[1]
    widths = study.get(study.slice_request(dynamic)).value["widths"]
    rows = []
    for point in [dynamic, *controls]:
        own = study.get(study.slice_request(point)).value["widths"]
        change = statistics.perplexity_change(study, point, dynamic, text)
        curve = statistics.curve_change(study, point, text)
        rows.append(
            {
                "order of the widths": point.variant or "by LR",
                "layers with the width by LR": int(np.equal(own, widths).sum()),
                "parameters (M)": study.size(point) / 1e6,
                "perplexity": study.perplexity(point, text),
                **statistics.columns(curve, BY_SIZE, "constant"),
                **statistics.columns(change, BY_LR, "LR"),
            }
        )
    return pd.DataFrame(rows)


def shuffle_prose(table: pd.DataFrame) -> str:
    """Whether the order that LR gives is better than random orders (Markdown)."""
    if table.empty:
        return style.NONE
    orders = table[table["order of the widths"].str.startswith("shuffled")]
    worse, better = int((orders["low, LR"] > 0).sum()), int((orders["high, LR"] < 0).sum())
    changes, kept = orders[BY_LR], orders["layers with the width by LR"]
    lines = [
        f"Of {len(orders)} random order{'s' * (len(orders) > 1)} of the same widths {worse} have a "
        f"higher perplexity than the order by LR, {better} a lower one, by intervals that exclude "
        f"zero ({changes.min():+.1f} to {changes.max():+.1f} %). {kept.min()} to {kept.max()} "
        f"layers keep their width in them, and the embedding does in all. "
    ]
    if worse == len(orders):
        lines.append(
            f"If the order did not matter, LR's would come first of {len(orders) + 1} with "
            f"probability 1 in {len(orders) + 1}."
        )
    elif better == len(orders):
        lines.append("**The order by LR is worse than all of them.**")
    else:
        lines.append("**The order by LR is not shown to matter.**")
    for row in table[table["order of the widths"].str.contains("embedding")].to_dict("records"):
        change = Difference.of_row(row, BY_LR, "LR")
        lines.append(
            f" One width for all layers, with the embedding whole ({row['parameters (M)']:.1f} M "
            f"parameters, by LR {table.iloc[0]['parameters (M)']:.1f} M), has a perplexity that is "
            f"{change.format('%')} against the order by LR: **{change.direction}**."
        )
    return "".join(lines)


def shuffle_figure(table: pd.DataFrame) -> plt.Figure:
    """Left against constant slicing of equal size, right against the order by LR."""
    if table.empty:
        return style.nothing()
    figure, axes = style.panels(1, 2, 0.9 + 0.25 * len(table), sharey=True)
    for axis, (column, suffix) in zip(axes, ((BY_SIZE, "constant"), (BY_LR, "LR")), strict=True):
        rows = "order of the widths"
        comparison.forest(axis, table, column, rows, suffix=suffix, filled=["by LR"])
        axis.set_xlabel(f"perplexity {column}")
    return figure
