"""Notebook 04: what one change at a time does, and whether the order of the widths matters."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from scipy import stats

from dynslice.experiment.requests import Point
from dynslice.experiment.study import Study
from dynslice.report import comparison, statistics, style
from dynslice.report.statistics import columns

OF_SCORES = {"angular": "angular distance", "update": "update norm"}  # what a score is made of

BY_LR, BY_SIZE = "against LR order (%)", "against constant of equal size (%)"
CURVE, NEAREST = ("against the curve (%)", "{}, curve"), ("against the nearest (%)", "{}, nearest")


def variants(study: Study, question: str) -> list[Point]:
    """The networks in which one thing was varied."""
    return [a.point for a in study.ablation.variants() if a.question == question]


# LR itself


def _by_layer(study: Study) -> list[tuple[str, str, str, list[float]]]:
    """(what is varied, how, its name, values by layer), LR as the profile has it first."""
    p, layers = study.profile, pd.DataFrame(study.get(study.lr_request()).value["layers"])
    texts = {request.config["text"]: study.lr(request) for request in study.lr_requests()}
    ends = {end: study.lr(study.lr_request(last_layer=end)) for end in p.ablation_last_layers}
    scores = {score: OF_SCORES[score] for score in p.ablation_scores if score in OF_SCORES}
    return [
        *(("text", text, text, lr) for text, lr in texts.items()),
        *(("last layer", end, f"{p.lr_text}, last layer {end}", lr) for end, lr in ends.items()),
        *(("score", x, name, [*layers[name.replace(" ", "_")]]) for x, name in scores.items()),
    ]


def lr_table(study: Study) -> pd.DataFrame:
    """LR per layer: on each text, with other definitions of the last layer, and other scores."""
    return pd.DataFrame({name: x for *_, name, x in _by_layer(study)}).rename_axis("layer")


def lr_figure(table: pd.DataFrame) -> plt.Figure:
    """1 - LR by layer, a curve per text and definition."""
    figure, axis = style.panels(height=2.6, width=style.COLUMN_WIDTH)
    style.lr_curves(axis, table.drop(columns=OF_SCORES.values(), errors="ignore"))
    return figure


def lr_agreement(study: Study) -> pd.DataFrame:
    """How LR on other texts, last layers and scores ranks the layers, against the profile's own.

    Spearman's rank correlation over layers, and the largest difference of LR in any layer.
    """
    (*_, own), *others = _by_layer(study)
    rows = []
    for varied, variant, _, values in others:
        is_score = varied == "score"  # on another scale, and high where a layer changes much
        correlation, gap = _agreement(np.negative(values) if is_score else values, own)
        row = {"varied": varied, "variant": variant, "rank correlation": correlation}
        rows.append({**row, "largest |difference| of LR": None if is_score else gap})
    return pd.DataFrame(rows)


def _agreement(a: list[float], b: list[float]) -> tuple[float, float]:
    """Rank correlation and largest difference over layers."""
    return float(stats.spearmanr(a, b).statistic), float(np.abs(np.subtract(a, b)).max())


def width_table(study: Study) -> pd.DataFrame:
    """What other ways to LR do to the widths of the ablated dynamic plan, and to its size."""
    plans = {
        f"LR on {lr.config['text']}": study.get(plan).value
        for lr, plan in zip(study.lr_requests(), study.ablation.lr_plan_requests(), strict=False)
    }
    for point in variants(study, "last layer") + variants(study, "score"):
        plans[point.label] = study.get(study.slice_request(point)).value
    if not plans:
        return pd.DataFrame()
    widths = pd.DataFrame({name: plan["widths"] for name, plan in plans.items()})
    gaps = widths.sub(widths.iloc[:, 0], axis="index").abs()
    columns = {
        "narrowest": widths.min(),
        "widest": widths.max(),
        "layers with another width": (gaps > 0).sum(),
        "largest change of a width": gaps.max(),
        "parameters (M)": pd.Series(
            {name: plan["parameters"] / 1e6 for name, plan in plans.items()}
        ),
    }
    return pd.DataFrame(columns).rename_axis("plan").reset_index()


def lr_tokens_table(study: Study) -> pd.DataFrame:
    """LR on growing beginnings of the text, compared with LR on the longest."""
    requests = study.ablation.lr_by_tokens() if study.profile.ablation_lr_tokens else []
    rows = []
    for request in requests:
        correlation, gap = _agreement(study.lr(request), study.lr(requests[-1]))
        row = {name: study.get(request).value[name] for name in ("tokens", "windows")}
        row["rank correlation with the longest"] = correlation
        rows.append({**row, "largest |difference| of LR": gap})
    return pd.DataFrame(rows)


# What a change of the slice does


def ablation_table(study: Study) -> pd.DataFrame:
    """Every ablated network on the first text: size, perplexity, and two paired changes.

    `change` compares with the same kind of network (dynamic, or constant) as the main comparison
    makes it, `against the curve` with constant slicing of the same stored parameters, interpolated
    between the constant networks of the study (`statistics.curve_change`); where a size lies
    outside them, `against the nearest` compares with the constant network of the nearest size. In
    percent.
    """
    ablated, texts = study.ablation.ablated(), study.profile.eval_texts[:1]
    reference = {point.schedule: point for point in ablated}
    asked = [("as in the main comparison", point, texts) for point in ablated]
    asked += [(a.question, a.point, a.texts) for a in study.ablation.variants()]
    rows = []
    for question, point, text in ((*of, text) for *of, texts in asked for text in texts):
        plain = reference["dynamic" if point.schedule == "shuffled" else point.schedule]
        curve = statistics.curve_change(study, point, text)
        nearest = statistics.nearest_constant(study, point)
        to_nearest = None if curve else statistics.perplexity_change(study, point, nearest, text)
        change = statistics.perplexity_change(study, point, plain, text)
        rows.append(
            {
                "varied": question,
                "network": point.label,
                "text": text,
                "parameters (M)": study.size(point) / 1e6,
                "perplexity": study.perplexity(point, text),
                **columns(change, "change (%)"),
                **columns(curve, *CURVE),
                "nearest (M)": study.size(nearest) / 1e6,
                **columns(to_nearest, *NEAREST),
            }
        )
    return pd.DataFrame(rows)


def phrase(row: pd.Series) -> str:
    """What a row of `ablation_table` changes, also against constant slicing of its size."""
    outside = pd.isna(row[CURVE[0]])
    fair = statistics.of_row(row, *(NEAREST if outside else CURVE)).format("%")
    change = statistics.of_row(row, "change (%)").format("%")
    name = "beyond_the_curve" if outside else "on_the_curve"
    return style.say(name, change=change, fair=fair, size=row["nearest (M)"])


def seed_table(study: Study) -> pd.DataFrame:
    """Dynamic against constant of equal size, by calibration seed, then mean and deviation.

    The spread over calibrations is a variance of its own, which no interval over evaluation
    windows holds.
    """
    if not (others := variants(study, "calibration seed")):
        return pd.DataFrame()
    text, points = study.profile.eval_texts[0], [*study.ablation.ablated()[1:], *others]
    table = pd.DataFrame(
        {
            "calibration seed": str(dynamic.network["calibration"]["seed"]),
            "dynamic": study.perplexity(dynamic, text),
            "constant of equal size": study.perplexity(matched, text),
            **columns(statistics.perplexity_change(study, dynamic, matched, text), "change (%)"),
        }
        for dynamic, matched in zip(points[::2], points[1::2], strict=True)
    )
    spread = table[["dynamic", "constant of equal size", "change (%)"]].agg(["mean", "std"])
    spread.insert(0, "calibration seed", ["mean", "standard deviation"])
    return pd.concat([table, spread], ignore_index=True)


def seed_prose(table: pd.DataFrame) -> str:
    """The spread over calibrations in a sentence (Markdown)."""
    if table.empty:
        return style.NONE
    changes = table["change (%)"].iloc[:-2]  # without the mean and the deviation
    same = len(set(np.sign(changes))) == 1
    sign = style.say("seeds_same" if same else "seeds_differ")
    return style.say("seeds", changes=changes.describe(), sign=sign)


def overfit_table(study: Study) -> pd.DataFrame:
    """Constant slicing by calibration size: perplexity on its calibration windows and on test."""
    points, text = variants(study, "calibration size"), study.profile.eval_texts[0]
    rows = []
    for point in [study.ablation.ablated()[0], *points] if points else []:
        calibration = point.network["calibration"]
        own = study.get(study.ablation.calibration_request(point)).value
        rows.append(
            {
                "calibration tokens": calibration["windows"] * calibration["window"],
                "perplexity, own calibration windows": own["perplexity"],
                f"perplexity, {text}": study.perplexity(point, text),
            }
        )
    rows.sort(key=lambda row: row["calibration tokens"])
    return pd.DataFrame(rows)


# Is it the order that helps?


def shuffle_table(study: Study) -> pd.DataFrame:
    """The dynamic network, its shuffles, and equal widths with the embedding as wide as its.

    Each against constant slicing of equal size, and against the order by LR.
    """
    if not (controls := variants(study, "shuffled")):
        return pd.DataFrame()
    controls += [point for point in variants(study, "embedding") if point.schedule == "constant"]
    text, dynamic = study.profile.eval_texts[0], study.ablation.ablated()[1]
    rows = []
    for point in [dynamic, *controls]:
        own, widths = (study.get(study.slice_request(p)).value["widths"] for p in (point, dynamic))
        change = statistics.perplexity_change(study, point, dynamic, text)
        curve = statistics.curve_change(study, point, text)
        rows.append(
            {
                "order of the widths": point.variant or "by LR",
                "layers with the width by LR": int(np.equal(own, widths).sum()),
                "parameters (M)": study.size(point) / 1e6,
                "perplexity": study.perplexity(point, text),
                **columns(curve, BY_SIZE, "{}, constant"),
                **columns(change, BY_LR, "{}, LR"),
            }
        )
    return pd.DataFrame(rows)


def first_moves(study: Study) -> str:
    """Where random orders that leave the first layer in place are, if the study has some."""
    return style.say("shuffled_first") if study.profile.beyond_shuffles else ""


def shuffle_prose(table: pd.DataFrame, study: Study) -> str:
    """Whether the order that LR gives is better than random orders (Markdown)."""
    if table.empty:
        return style.NONE
    orders = table[table["order of the widths"].str.startswith("shuffled")]
    worse, better = int((orders["low, LR"] > 0).sum()), int((orders["high, LR"] < 0).sum())
    verdicts = {worse: "shuffled_worse", better: "shuffled_better"}
    verdict = style.say(verdicts.get(len(orders), "shuffled_neither"), networks=len(orders) + 1)
    layers, *kept = table["layers with the width by LR"][: len(orders) + 1]
    found = style.say(
        "shuffled",
        orders=f"{len(orders)} random order{'s' * (len(orders) > 1)}",
        worse=worse,
        better=better,
        changes=orders[BY_LR].describe(),
        kept=" to ".join(str(count) for count in sorted({min(kept), max(kept)})),
        layers=layers,
        verdict=verdict,
        first=first_moves(study),
    )
    for row in table[table["order of the widths"].str.contains("embedding")].to_dict("records"):
        change = statistics.of_row(row, BY_LR, "{}, LR")
        sizes = {"size": row["parameters (M)"], "by_lr": table["parameters (M)"][0]}
        of = {"change": change.format("%"), "direction": change.direction}
        found += f" {style.say('shuffled_embedding', **sizes, **of)}"
    return found


def shuffle_figure(table: pd.DataFrame) -> plt.Figure | None:
    """Left against constant slicing of equal size, right against the order by LR."""
    if table.empty:
        return None
    figure, axes = style.panels(1, 2, 0.9 + 0.25 * len(table), sharey=True)
    for axis, (column, of) in zip(axes, ((BY_SIZE, "constant"), (BY_LR, "LR")), strict=True):
        look = {"bounds": f"{{}}, {of}", "filled": ["by LR"]}
        comparison.forest(axis, table, column, "order of the widths", **look)
        axis.set_xlabel(f"perplexity {column}")
    return figure
