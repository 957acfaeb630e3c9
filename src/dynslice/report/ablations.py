"""Tables, figures and sentences of the ablations (notebook 04), from results."""

from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from scipy import stats

from dynslice.experiment.profile import percent
from dynslice.experiment.requests import Point
from dynslice.experiment.study import Study
from dynslice.method.scores import scores_of
from dynslice.report import statistics, style
from dynslice.report.statistics import Difference
from dynslice.report.style import COLUMN_WIDTH, MARKERS

_AGAINST_LR = ("against LR order (%)", "low, LR", "high, LR")

FEWEST_LAYERS = 8  # below that a rank correlation says nothing, and resamples of it are undefined

NONE = "This profile asks for no such ablation."

OF_SCORES = {"angular": "angular distance", "update": "update norm"}  # what a score is made of

QUESTIONS = ("last layer", "score", "rounding", "embedding", "calibration text")

# LR itself


def lr_table(study: Study) -> pd.DataFrame:
    """LR per layer: on each text, with other definitions of the last layer, and other scores."""
    columns = {f"{r.config['text']}": _lr(study, r) for r in study.lr_requests()}
    for end in study.profile.ablation_last_layers:
        request = study.lr_request(last_layer=end)
        columns[f"{request.config['text']}, last layer {end}"] = _lr(study, request)
    layers = study.get(study.lr_request()).value["layers"]
    for name in _other_scores(study):
        columns[OF_SCORES[name]] = [layer[OF_SCORES[name].replace(" ", "_")] for layer in layers]
    table = pd.DataFrame(columns)
    table.index.name = "layer"
    return table


def _other_scores(study: Study) -> list[str]:
    """The scores beside the cosine, which is LR itself, that the profile asks for."""
    return [score for score in study.profile.ablation_scores if score in OF_SCORES]


def lr_figure(table: pd.DataFrame) -> plt.Figure:
    """LR by layer, a curve per text and definition."""
    style.style()
    figure, axis = plt.subplots(figsize=(COLUMN_WIDTH, 2.6))
    curves = [name for name in table if name not in OF_SCORES.values()]
    looks = zip(cycle(MARKERS), cycle(["-", "--", ":", "-.", "-"]), strict=False)
    for name, (marker, line) in zip(curves, looks, strict=False):
        axis.plot(table.index, table[name], line, marker=marker, markersize=3, label=name)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set(xlabel="layer", ylabel="layer redundancy (cosine)")
    axis.legend(frameon=False)
    figure.tight_layout()
    return figure


def lr_agreement(study: Study) -> pd.DataFrame:
    """How LR on other texts, last layers and scores ranks the layers beside the profile's own.

    Spearman's rank correlation over layers, and the largest difference of LR in any layer.
    """
    own = study.lr_request()
    reference = _lr(study, own)
    rows = []

    def add(what: str, variant: str, scores: list[float], same_scale: bool = True) -> None:
        gap = np.abs(np.subtract(scores, reference)).max() if same_scale else None
        rank = float(stats.spearmanr(scores, reference).statistic)
        rows.append(
            {
                "varied": what,
                "variant": variant,
                "rank correlation": rank,
                "largest |difference| of LR": gap,
            }
        )

    for request in study.lr_requests()[1:]:
        add("text", request.config["text"], _lr(study, request))
    for end in study.profile.ablation_last_layers:
        add("last layer", end, _lr(study, study.lr_request(last_layer=end)))
    for score in _other_scores(study):
        layers = study.get(own).value["layers"]
        add("score", score, scores_of(layers, score), same_scale=False)
    return pd.DataFrame(rows)


def width_table(study: Study) -> pd.DataFrame:
    """What other ways to LR do to the widths of the ablated dynamic plan, and to its size."""
    own, *others = [study.get(request).value for request in study.lr_plan_requests()] or [None]
    if own is None:
        return pd.DataFrame()
    texts = [f"LR on {request.config['text']}" for request in study.lr_requests()]
    plans = dict(zip(texts, [own, *others], strict=True))
    for ablation in study.ablations():
        if ablation.question in ("last layer", "score"):
            plans[ablation.point.label] = study.get(study.slice_request(ablation.point)).value
    rows = []
    for name, plan in plans.items():
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
    """LR on growing beginnings of the text beside LR on the longest."""
    if not study.profile.ablation_lr_tokens:
        return pd.DataFrame()
    requests = study.lr_by_tokens()
    longest = _lr(study, requests[-1])
    rows = []
    for request in requests:
        lr, value = _lr(study, request), study.get(request).value
        rows.append(
            {
                "tokens": value["tokens"],
                "windows": value["windows"],
                "rank correlation with the longest": float(stats.spearmanr(lr, longest).statistic),
                "largest |difference| of LR": float(np.abs(np.subtract(lr, longest)).max()),
            }
        )
    return pd.DataFrame(rows)


# What a change of the slice does


def ablation_table(study: Study) -> pd.DataFrame:
    """Every ablated network on the first text: size, perplexity, and two paired changes.

    `change` compares with the same kind of network (dynamic, or constant) as the main comparison
    makes it, `against the curve` with constant slicing of the same stored parameters, interpolated
    between the constant networks of the study (`compare.curve_change`); where a size lies outside
    them, `against the nearest` compares with the constant network of the nearest size. In percent.
    """
    text = study.profile.eval_texts[0]
    reference = {point.schedule: point for point in study.ablated()}
    rows = [_ablation_row(study, "as in the main comparison", p, p, text) for p in study.ablated()]
    for ablation in study.ablations():
        schedule = "dynamic" if ablation.point.schedule == "shuffled" else ablation.point.schedule
        for text in ablation.texts:
            rows.append(
                _ablation_row(study, ablation.question, ablation.point, reference[schedule], text)
            )
    return pd.DataFrame(rows)


def changes_prose(table: pd.DataFrame) -> str:
    """What every change by itself does, under the name of what is changed (Markdown)."""
    if table.empty:
        return ""
    return "\n\n".join(f"**{q.capitalize()}**\n\n{ablation_prose(table, q)}" for q in QUESTIONS)


def ablation_prose(table: pd.DataFrame, question: str) -> str:
    """What the networks of one question differ by, as Markdown."""
    rows = table[table["varied"] == question] if not table.empty else table
    if rows.empty:
        return NONE
    lines = []
    for row in rows.itertuples(index=False):
        values = dict(zip(table.columns, row, strict=True))
        change = Difference(values["change (%)"], values["low"], values["high"])
        against = f"{change.format('%')} against the reference: **{change.direction}**"
        lines.append(
            f"- {values['network']} ({values['parameters (M)']:.1f} M parameters, "
            f"{values['text']}): perplexity {values['perplexity']:.1f}, "
            f"{against}{curve_phrase(values)}."
        )
    return "\n".join(lines)


def curve_phrase(row: dict | pd.Series) -> str:
    """How a row of `ablation_table` lies beside constant slicing of its size; ends a sentence."""
    if not pd.isna(row["against the curve (%)"]):
        names = ("against the curve (%)", "low, curve", "high, curve")
        change = Difference(*(row[name] for name in names))
        return f"; against constant slicing of its own size {change.format('%')}"
    names = ("against the nearest (%)", "low, nearest", "high, nearest")
    change = Difference(*(row[name] for name in names))
    return (
        f"; its size lies outside the constant curve, against the nearest constant network, of "
        f"{row['nearest (M)']:.1f} M, {change.format('%')}"
    )


def seed_table(study: Study) -> pd.DataFrame:
    """Dynamic against constant of equal size, by calibration seed, then mean and deviation.

    The spread over calibrations is a variance of its own, which no interval over evaluation
    windows holds.
    """
    text = study.profile.eval_texts[0]
    rows = []
    for seed, dynamic, matched in _by_seed(study):
        change = statistics.perplexity_change(study, dynamic, matched, text)
        rows.append(
            {
                "calibration seed": str(seed),
                "dynamic": _perplexity(study, dynamic, text),
                "constant of equal size": _perplexity(study, matched, text),
                "change (%)": change.estimate,
                "low": change.low,
                "high": change.high,
            }
        )
    table = pd.DataFrame(rows)
    if len(rows) < 2:
        return pd.DataFrame()
    numbers = table[["dynamic", "constant of equal size", "change (%)"]]
    spread = pd.DataFrame([numbers.mean(), numbers.std()])
    spread.insert(0, "calibration seed", ["mean", "standard deviation"])
    return pd.concat([table, spread], ignore_index=True)


def seed_prose(table: pd.DataFrame) -> str:
    """The spread over calibrations in a sentence (Markdown)."""
    if table.empty:
        return NONE
    *draws, mean, deviation = table["change (%)"]
    signs = {np.sign(change) for change in draws}
    return (
        f"Over {len(draws)} calibrations the change is {mean:+.1f} % on average with a standard "
        f"deviation of {deviation:.1f} points, from {min(draws):+.1f} to {max(draws):+.1f} %: "
        + (
            "its sign is the same in all of them."
            if len(signs) == 1
            else "**its sign depends on the draw of the calibration windows.**"
        )
    )


def overfit_table(study: Study) -> pd.DataFrame:
    """Constant slicing by calibration size: perplexity on its calibration windows and on test."""
    points = [a.point for a in study.ablations() if a.question == "calibration size"]
    if not points:
        return pd.DataFrame()
    text = study.profile.eval_texts[0]
    rows = []
    for point in [study.ablated()[0], *points]:
        calibration = point.network["calibration"]
        own = study.get(study.calibration_request(point)).value
        rows.append(
            {
                "calibration tokens": calibration["windows"] * calibration["window"],
                "perplexity, own calibration windows": own["perplexity"],
                f"perplexity, {text}": _perplexity(study, point, text),
            }
        )
    return pd.DataFrame(rows).sort_values("calibration tokens", ignore_index=True)


# Does LR predict what hurts?


def sensitivity_table(study: Study) -> pd.DataFrame:
    """Per layer: LR, and by how many percent cutting that layer alone raises the perplexity."""
    request = study.sensitivity_request()
    if request is None:
        return pd.DataFrame()
    value = study.get(request).value
    lr = _lr(study, study.lr_request())
    rows = []
    for layer in value["layers"]:
        difference = np.subtract(layer["nll"], value["dense"])
        low, high = statistics.interval(difference)
        numbers = (100 * np.expm1(x) for x in (difference.mean(), low, high))
        row = dict(zip(("perplexity (%)", "low", "high"), numbers, strict=True))
        rows.append({"layer": layer["index"], "LR": lr[layer["index"]], **row})
    return pd.DataFrame(rows)


def rank_correlation(table: pd.DataFrame) -> Difference:
    """Spearman's correlation of LR with the measured loss; the interval resamples layers."""

    def spearman(x: np.ndarray, y: np.ndarray, axis: int) -> np.ndarray:
        ranks = (stats.rankdata(values, axis=axis) for values in (x, y))
        return stats.pearsonr(*ranks, axis=axis).statistic

    samples = table["LR"].to_numpy(), table["perplexity (%)"].to_numpy()
    bounds = statistics.bootstrap(samples, spearman, paired=True)
    return Difference(float(spearman(*samples, axis=-1)), float(bounds.low), float(bounds.high))


def sensitivity_prose(table: pd.DataFrame, study: Study) -> str:
    """Whether layers with high LR are those that are cheap to cut (Markdown)."""
    if table.empty:
        return NONE
    inner = table.iloc[1:-1]
    if len(inner) < FEWEST_LAYERS:
        return f"{len(table)} layers are too few for a rank correlation."
    rho, within = rank_correlation(table), rank_correlation(inner)
    worst, mildest = (
        table.loc[getattr(table["perplexity (%)"], f)()] for f in ("idxmax", "idxmin")
    )
    says = {
        "lower": "layers with a higher LR do lose less: LR predicts what hurts",
        "higher": "layers with a higher LR lose **more**: LR ranks the layers the wrong way round",
        "no difference shown": "no relation is shown between LR and what a cut costs",
    }
    p = study.profile
    return (
        f"Each layer cut alone by {percent(p.single_layer_slice)} ({p.eval_texts[0]}, "
        f"{p.single_layer_eval_windows} validation windows): the rank correlation of LR with the "
        f"loss is {_interval(within)} over the {len(inner)} layers between the first and the last: "
        f"{says[within.direction]}. Over all {len(table)} it is {_interval(rho)}: "
        f"{says[rho.direction]}. Cutting layer {worst['layer']:.0f} costs most "
        f"({worst['perplexity (%)']:+.1f} %, LR {worst['LR']:.3f}), layer {mildest['layer']:.0f} "
        f"least ({mildest['perplexity (%)']:+.1f} %, LR {mildest['LR']:.3f})."
    )


def sensitivity_figure(table: pd.DataFrame) -> plt.Figure:
    """Left the loss against 1 - LR, a numbered point per layer; right the loss by layer."""
    style.style()
    if table.empty:
        return style.nothing()
    figure, (left, right) = plt.subplots(1, 2, figsize=(2 * COLUMN_WIDTH, 2.5), sharey=True)
    loss, change = "perplexity (%)", 1 - table["LR"]
    for axis, x in ((left, change), (right, table["layer"])):
        style.points_with_intervals(axis, x, table, loss, "o", "C0", "")
    for x, y, layer in zip(change, table[loss], table["layer"], strict=True):
        left.annotate(layer, (x, y), fontsize=5, xytext=(2, 2), textcoords="offset points")
    left.set(xlabel="1 - layer redundancy", ylabel="perplexity, layer cut alone (%)")
    left.set_xscale("log")
    if (table["low"] > 0).all():
        left.set_yscale("log")
        left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        left.yaxis.set_minor_locator(NullLocator())
        left.yaxis.set_major_formatter("{x:g}")
    left.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.xaxis.set_minor_locator(NullLocator())
    left.xaxis.set_major_formatter("{x:g}")
    right.set(xlabel="layer")
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.tight_layout()
    return figure


# Is it the order that helps?


def shuffle_table(study: Study) -> pd.DataFrame:
    """The dynamic network, its shuffles, and all widths alike with the embedding as wide as its.

    Each against constant slicing of equal size, and against the order by LR.
    """
    controls = [a.point for a in study.ablations() if a.question == "shuffled"]
    if not controls:
        return pd.DataFrame()
    whole = [a.point for a in study.ablations() if a.point.schedule == "constant"]
    controls += [point for point in whole if "embedding" in point.variant]
    text = study.profile.eval_texts[0]
    _, dynamic, _ = study.ablated()
    widths = study.get(study.slice_request(dynamic)).value["widths"]
    rows = []
    for point in [dynamic, *controls]:
        own = study.get(study.slice_request(point)).value["widths"]
        change = statistics.perplexity_change(study, point, dynamic, text)
        rows.append(
            {
                "order of the widths": point.variant or "by LR",
                "layers with the width by LR": sum(
                    a == b for a, b in zip(own, widths, strict=True)
                ),
                "parameters (M)": _parameters(study, point) / 1e6,
                "perplexity": _perplexity(study, point, text),
                **_named(
                    statistics.curve_change(study, point, text),
                    "against constant of equal size (%)",
                    "constant",
                ),
                **_named(change, "against LR order (%)", "LR"),
            }
        )
    return pd.DataFrame(rows)


def shuffle_prose(table: pd.DataFrame) -> str:
    """Whether the order that LR gives is better than random orders (Markdown)."""
    if table.empty:
        return NONE
    draws = table[table["order of the widths"].str.startswith("shuffled")]
    worse, better = int((draws["low, LR"] > 0).sum()), int((draws["high, LR"] < 0).sum())
    changes, kept = draws["against LR order (%)"], draws["layers with the width by LR"]
    lines = [
        f"Of {len(draws)} random orders of the same widths {worse} have a higher perplexity than "
        f"the order by LR, {better} a lower one, by intervals that exclude zero "
        f"({changes.min():+.1f} to {changes.max():+.1f} %). {kept.min()} to {kept.max()} layers "
        f"keep their width in them, and the embedding does in all. "
    ]
    if len(draws) == 1:
        change = Difference(*(draws.iloc[0][n] for n in _AGAINST_LR))
        lines = [
            f"One random order of the same widths has a perplexity that is {change.format('%')} "
            f"against the order by LR; layers that keep their width in it: {kept.iloc[0]}, and "
            "the embedding. "
        ]
    if worse == len(draws):
        lines.append(
            f"If the order did not matter, LR's would come first of {len(draws) + 1} with "
            f"probability 1 in {len(draws) + 1}."
        )
    elif better == len(draws):
        lines.append("**The order by LR is worse than all of them.**")
    else:
        lines.append("**The order by LR is not shown to matter.**")
    alike = table[table["order of the widths"].str.contains("embedding")]
    for row in alike.to_dict("records"):
        change = Difference(*(row[n] for n in _AGAINST_LR))
        lines.append(
            f" All layers alike with the embedding whole ({row['parameters (M)']:.1f} M parameters "
            f"beside {table.iloc[0]['parameters (M)']:.1f} M) has a perplexity that is "
            f"{change.format('%')} against the order by LR: **{change.direction}**."
        )
    return "".join(lines)


def shuffle_figure(table: pd.DataFrame) -> plt.Figure:
    """Left against constant slicing of equal size, right against the order by LR."""
    style.style()
    if table.empty:
        return style.nothing()
    figure, axes = plt.subplots(
        1, 2, figsize=(2 * COLUMN_WIDTH, 0.9 + 0.25 * len(table)), sharey=True
    )
    y = np.arange(len(table))[::-1]
    names = {"against constant of equal size (%)": "constant", "against LR order (%)": "LR"}
    for axis, (column, suffix) in zip(axes, names.items(), strict=True):
        values = table[column].astype(float)
        bars = [
            values - table[f"low, {suffix}"].astype(float),
            table[f"high, {suffix}"].astype(float) - values,
        ]
        axis.errorbar(values, y, xerr=bars, fmt="none", color="0.4", capsize=2, zorder=1)
        axis.scatter(values, y, c=["k", *["w"] * (len(table) - 1)], edgecolors="k", s=18, zorder=2)
        axis.axvline(0, color="0.6", linewidth=1)
        axis.set_yticks(y, table["order of the widths"])
        axis.set_ylim(-0.5, len(table) - 0.5)
        axis.set_xlabel(f"perplexity {column}")
    figure.tight_layout()
    return figure


def _by_seed(study: Study) -> list[tuple[int, Point, Point]]:
    """(calibration seed, dynamic, constant of equal size): the profile's own seed, then others."""
    if not study.ablated():
        return []
    _, dynamic, matched = study.ablated()
    found = [(study.profile.seed, dynamic, matched)]
    others = [a.point for a in study.ablations() if a.question == "calibration seed"]
    for first, second in zip(others[::2], others[1::2], strict=True):
        found.append((first.network["calibration"]["seed"], first, second))
    return found


def _ablation_row(study: Study, question: str, point: Point, reference: Point, text: str) -> dict:
    change = statistics.perplexity_change(study, point, reference, text)
    curve = statistics.curve_change(study, point, text)
    nearest = statistics.nearest_constant(study, point)
    beside = statistics.perplexity_change(study, point, nearest, text) if curve is None else None
    return {
        "varied": question,
        "network": point.label,
        "text": text,
        "parameters (M)": _parameters(study, point) / 1e6,
        "perplexity": _perplexity(study, point, text),
        "change (%)": change.estimate,
        "low": change.low,
        "high": change.high,
        **_named(curve, "against the curve (%)", "curve"),
        "nearest (M)": _parameters(study, nearest) / 1e6,
        **_named(beside, "against the nearest (%)", "nearest"),
    }


def _named(change: Difference | None, name: str, suffix: str) -> dict:
    numbers = (change.estimate, change.low, change.high) if change else (None,) * 3
    return dict(zip((name, f"low, {suffix}", f"high, {suffix}"), numbers, strict=True))


def _interval(value: Difference) -> str:
    return f"{value.estimate:+.2f} [{value.low:+.2f}, {value.high:+.2f}]"


def _lr(study: Study, request) -> list[float]:
    return [layer["lr"] for layer in study.get(request).value["layers"]]


def _perplexity(study: Study, point: Point, text: str) -> float:
    return study.get(study.perplexity_request(point, text)).value["perplexity"]


def _parameters(study: Study, point: Point) -> int:
    return study.get(study.slice_request(point)).value["parameters"]
