"""Notebook 06: verdicts on the paper's claims by rule, and what a record says of its idea."""

from collections.abc import Iterable
from itertools import product

import pandas as pd

from dynslice.core import paths
from dynslice.experiment.study import Study
from dynslice.report import ablations, perplexity, single_layer, statistics, style
from dynslice.report.statistics import BASES, EQUAL_SLICE, Estimate, Pair

SUPPORTED, DIRECTION = "supported", "supported in direction, not in size"
NOT_SUPPORTED, UNSEEN = "not supported", "could not have been seen"
NOT_TESTED = "not tested here"
VERDICTS = (SUPPORTED, DIRECTION, NOT_SUPPORTED, UNSEEN, NOT_TESTED)
TASKS_ON_AVERAGE = "the average of the tasks"
ON_VALIDATION, IN_HINDSIGHT = "chosen on validation windows", "the best in hindsight"


def verdict(change: Estimate | None, published: float) -> str:
    """The rule, by the interval of a change.

    Beyond zero on the claimed side: the claim is `supported` when the change is at least the
    published one, else `supported in direction, not in size`. An interval that holds both zero and
    the published change decides nothing: that change `could not have been seen`. Any other is `not
    supported`; nothing measured is `not tested here`.
    """
    if change is None:
        return NOT_TESTED
    if change.direction == ("lower" if published < 0 else "higher"):
        return SUPPORTED if abs(change.estimate) >= abs(published) else DIRECTION
    holds_both = change.low <= min(0, published) and max(0, published) <= change.high
    return UNSEEN if holds_both else NOT_SUPPORTED


def verdicts(change: Estimate | None, ratio: Estimate | None, published: float) -> str:
    """The verdict on a change; where it disagrees with that on the ratio, both."""
    plain, as_ratio = (verdict(x, published) for x in (change, ratio or change))
    return plain if as_ratio == plain else f"{plain} (read as a ratio: {as_ratio})"


def outcomes(study: Study) -> list[dict]:
    """Every headline claim of the paper, at equal mean slice and at equal stored parameters.

    A claim says "up to", so one dynamic network speaks for it: of those that the study compares,
    the one with the largest gain in perplexity on the validation windows. A profile without
    validation windows takes the one with the largest gain in what is shown, which favours the
    claim. `stored` is how much more it stores than the constant network, in both counts. `change`
    is that from constant to dynamic slicing, None where nothing was measured; in percent of
    perplexity, or in points of accuracy with `ratio`, the same in percent of constant's accuracy
    where that is not zero.
    """
    measure = {"perplexity": _perplexities, "accuracy": _accuracy}
    claims = pd.read_csv(paths.PUBLISHED / "claims.csv").itertuples()
    return [
        {
            "claim": claim.claim,
            "published": f"{claim.value:+.0f} %",
            "at": basis,
            "measured on": on,
            "network": network,
            "chosen": how,
            "stored": stored,
            "measured": _measured(claim.metric, change, ratio),
            "verdict on this model": verdicts(change, ratio, claim.value),
            "source": claim.source,
            "metric": claim.metric,
            "value": claim.value,
            "models": claim.models.split(";"),
            "change": change,
            "ratio": ratio,
        }
        for claim, basis in product(claims, BASES)
        for on, network, how, stored, change, ratio in measure[claim.metric](study, basis)
    ]


def _measured(metric: str, change: Estimate | None, ratio: Estimate | None) -> str:
    if change is None:
        return "-"
    said = change.format("%" if metric == "perplexity" else "points")
    return f"{said}, as a ratio {ratio.estimate:+.1f} %" if ratio else said


def claims_table(study: Study) -> pd.DataFrame:
    """The outcomes as a table; on models that the study did not run, `not tested here`."""
    every = pd.DataFrame(outcomes(study))
    table, sources = every.loc[:, :"verdict on this model"], every["source"]
    for model in dict.fromkeys(every["models"].sum()):
        here = table["verdict on this model"] if model == study.profile.model else NOT_TESTED
        table = table.assign(**{f"on {model}": here})
    return table.assign(source=sources)


def view(study: Study) -> pd.DataFrame:
    """The outcomes in few words, for a page."""
    kept = ("at", "measured on", "network", "stored", "measured", "verdict on this model")
    rows = [{"claim": claimed(o), **{key: o[key] for key in kept}} for o in outcomes(study)]
    return pd.DataFrame(rows).rename(columns={"verdict on this model": "verdict"})


def not_tested(study: Study) -> list[str]:
    """The models that a claim was published for and that are not this study's."""
    models = dict.fromkeys(model for outcome in outcomes(study) for model in outcome["models"])
    return [model for model in models if model != study.profile.model]


# A text or tasks, the network that speaks, how it was chosen and what it stores against constant,
# then the changes of an outcome.
Measured = tuple[str, str, str, str, Estimate | None, Estimate | None]

NOTHING = ("-", "-", "-", None, None)


def how(study: Study) -> str:
    """How the dynamic network that speaks for a claim was chosen."""
    return IN_HINDSIGHT if study.profile.selection_windows is None else ON_VALIDATION


def _stored(study: Study, pair: Pair) -> str:
    stored, untied = statistics.size_changes(study, *pair[:2]).values()
    return f"{stored:+.1f} %, embedding untied {untied:+.1f} %"


def _perplexities(study: Study, basis: str) -> list[Measured]:
    found = []
    for text in study.profile.eval_texts:
        if pair := statistics.chosen(study, basis) or statistics.best(study, basis, text):
            change = statistics.perplexity_change(study, *pair[:2], text)
            found.append((text, pair[0].label, how(study), _stored(study, pair), change, None))
        else:
            found.append((text, *NOTHING))
    return found


def _accuracy(study: Study, basis: str) -> list[Measured]:
    tasks, on = statistics.choice_tasks(study), TASKS_ON_AVERAGE
    pairs = statistics.pairs(study.task_points(), basis)
    if not pairs or not tasks:
        return [(on, *NOTHING)]

    def gain(pair: Pair) -> float:
        if study.profile.selection_windows is None:
            return statistics.accuracy_change(study, *pair[:2], tasks).estimate
        return -statistics.selection_change(study, *pair[:2]).estimate

    pair = max(pairs, key=gain)
    chosen = how(study) if len(pairs) > 1 else "the only one with tasks"
    change = statistics.accuracy_change(study, *pair[:2], tasks)
    whole = statistics.accuracy(study, pair[1], tasks)
    ratio = change.map(lambda points: 100 / whole * points) if whole else None
    return [(on, pair[0].label, chosen, _stored(study, pair), change, ratio)]


# What we found


def findings(study: Study) -> str:
    """What a record says of the paper's idea: the claims, then what the ablations say of it."""
    lines = [_finding(outcome) for outcome in outcomes(study) if outcome["change"]]
    lines = lines or [style.say("finding_none", verdict=NOT_TESTED.capitalize())]
    claims = "\n".join(f"- {line}" for line in lines)
    parts = style.say("findings"), claims, style.say("findings_more"), remarks(study)
    return "\n\n".join(parts)


def remarks(study: Study) -> str:
    """What the sizes, other texts and the ablations say of the claims, as a list (Markdown)."""
    # On a text that nothing was calibrated on, how far a network is from dense says more.
    foreign = [text for text in study.profile.eval_texts if text != study.profile.calibration_text]
    others = [perplexity.size_prose(perplexity.perplexity_table(study))]
    others += _size_gap(study) + [_levels(study, text) for text in foreign]
    others += ablation_findings(study)
    return "\n".join(f"- {line}" for line in others)


def _finding(outcome: dict) -> str:
    word = outcome["verdict on this model"].capitalize()
    return style.say("finding", word=word, claimed=claimed(outcome), o=outcome)


def claimed(outcome: dict) -> str:
    """What a claim says in a few words: `perplexity lower by up to 7 %`."""
    way = "lower" if outcome["value"] < 0 else "higher"
    return f"{outcome['metric']} {way} by up to {abs(outcome['value']):.0f} %"


def by_verdict(found: Iterable[tuple[str, str, str]]) -> str:
    """Triples of what is judged, its verdict, and on what that is, as one list."""
    told: dict[str, dict[str, list[str]]] = {}
    for what, said, on in found:
        told.setdefault(what, {}).setdefault(said, []).append(on)
    return "; ".join(
        f"{what}: " + ", ".join(f"**{said}** on {style.listed(on)}" for said, on in of.items())
        for what, of in told.items()
    )


def _size_gap(study: Study) -> list[str]:
    """What equal mean slice leaves open, in both counts of stored parameters."""
    pairs = statistics.pairs(study.points(), EQUAL_SLICE)
    gaps = pd.DataFrame(statistics.size_changes(study, a, b) for a, b, _ in pairs)
    if gaps.empty:
        return []
    stored, untied = (gaps[column].describe() for column in gaps)
    return [style.say("gap", stored=stored, untied=untied)]


def _levels(study: Study, text: str) -> str:
    """How far from the dense model the networks of the largest SP are on a text."""
    p = study.profile
    points = study.design.points_at([max(p.slice_percentages)], p.slice_bases)
    shown = [point for point in points if point.schedule != "matched"]
    shown += ablations.variants(study, "calibration text")
    levels = "; ".join(f"{point.label}: {study.perplexity(point, text):.1f}" for point in shown)
    return style.say("levels", text=text, levels=levels)


def ablation_findings(study: Study) -> list[str]:
    """Does LR predict what hurts, does the order matter, does the calibration sample?"""
    if not study.ablation.variants():
        return []
    network = f"{study.ablation.ablated()[1].label}, {study.profile.eval_texts[0]}"
    found = {
        "predicts": single_layer.prose(single_layer.table(study), study),
        "shuffles": ablations.shuffle_prose(ablations.shuffle_table(study), study),
        "calibrations": ablations.seed_prose(ablations.seed_table(study)),
    }
    return [
        style.say(question, network=network, answer=answer) for question, answer in found.items()
    ]
