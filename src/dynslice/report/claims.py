"""Notebook 06: verdicts on the paper's claims by rule, and what a record says of its idea."""

from dataclasses import dataclass

import pandas as pd

from dynslice.core import paths
from dynslice.experiment.study import Study
from dynslice.report import ablations, perplexity, single_layer, statistics
from dynslice.report.statistics import BASES, Difference, Pair

SUPPORTED, DIRECTION = "supported", "supported in direction, not in size"

NOT_SUPPORTED, NOT_TESTED = "not supported", "not tested here"

ON_VALIDATION, IN_HINDSIGHT = "chosen on validation windows", "the best in hindsight"


@dataclass(frozen=True)
class Outcome:
    """One claim, on one basis of comparison, with what was measured of it.

    change: from constant to dynamic slicing, None where nothing was measured; in percent of
    perplexity, or in points of accuracy with `ratio`, the same in percent of constant's accuracy
    where that is not zero.
    """

    claim: str
    source: str
    metric: str
    published: float
    basis: str
    measured_on: str
    network: str
    how: str
    change: Difference | None
    ratio: Difference | None

    @property
    def verdict(self) -> str:
        """See `verdict`; where points and ratio disagree, both are said."""
        plain = verdict(self.change, self.published)
        if self.ratio is None or verdict(self.ratio, self.published) == plain:
            return plain
        return f"{plain} (read as a ratio: {verdict(self.ratio, self.published)})"

    @property
    def measured(self) -> str:
        """The change with its interval, as text."""
        if self.change is None:
            return "-"
        if self.metric == "perplexity":
            return self.change.format("%")
        points = self.change.format("points")
        return points + (f", as a ratio {self.ratio.estimate:+.1f} %" if self.ratio else "")


def verdict(change: Difference | None, published: float) -> str:
    """The rule: `not supported` unless the interval lies beyond zero on the claimed side.

    Then `supported` when the change is at least the published one, else `supported in direction,
    not in size`. Nothing measured is `not tested here`.
    """
    if change is None:
        return NOT_TESTED
    if change.direction != ("lower" if published < 0 else "higher"):
        return NOT_SUPPORTED
    return SUPPORTED if abs(change.estimate) >= abs(published) else DIRECTION


def outcomes(study: Study) -> list[Outcome]:
    """Every headline claim of the paper, at equal mean slice and at equal stored parameters.

    A claim says "up to", so one dynamic network speaks for it: of those that the study compares,
    the one with the largest gain in perplexity on the validation windows. A profile without
    validation windows takes the one with the largest gain in what is shown, which favours the
    claim.
    """
    measure = {"perplexity": _perplexities, "accuracy": _accuracy}
    return [
        Outcome(claim.claim, claim.source, claim.metric, claim.value, basis, *measured)
        for claim in _claims().itertuples()
        for basis in BASES
        for measured in measure[claim.metric](study, basis)
    ]


def claims_table(study: Study) -> pd.DataFrame:
    """The outcomes as a table; on models that the study did not run, `not tested here`."""
    models = dict.fromkeys(model for row in _claims()["models"] for model in row.split(";"))
    ran = study.profile.model
    return pd.DataFrame(
        {
            "claim": outcome.claim,
            "published": f"{outcome.published:+.0f} %",
            "at": outcome.basis,
            "measured on": outcome.measured_on,
            "network": outcome.network,
            "chosen": outcome.how,
            "measured": outcome.measured,
            "verdict on this model": outcome.verdict,
            **{f"on {m}": outcome.verdict if m == ran else NOT_TESTED for m in models},
            "source": outcome.source,
        }
        for outcome in outcomes(study)
    )


Measured = tuple[str, str, str, Difference | None, Difference | None]


def _claims() -> pd.DataFrame:
    return pd.read_csv(paths.PUBLISHED / "claims.csv")


def _perplexities(study: Study, basis: str) -> list[Measured]:
    found = []
    for text in study.profile.eval_texts:
        pair = statistics.chosen(study, basis) or statistics.best(study, basis, text)
        change = statistics.perplexity_change(study, *pair[:2], text) if pair else None
        named = (pair[0].label, _how(study)) if pair else ("-", "-")
        found.append((text, *named, change, None))
    return found


def _how(study: Study) -> str:
    return IN_HINDSIGHT if study.profile.selection_windows is None else ON_VALIDATION


def _accuracy(study: Study, basis: str) -> list[Measured]:
    tasks, on = statistics.choice_tasks(study), "the average of the tasks"
    pairs = statistics.pairs(study.task_points(), basis)
    if not pairs or not tasks:
        return [(on, "-", "-", None, None)]

    def gain(pair: Pair) -> float:
        if study.profile.selection_windows is None:
            return statistics.accuracy_change(study, *pair[:2], tasks).estimate
        return -statistics.selection_change(study, *pair[:2]).estimate

    pair = max(pairs, key=gain)
    how = _how(study) if len(pairs) > 1 else "the only one with tasks"
    change = statistics.accuracy_change(study, *pair[:2], tasks)
    whole = statistics.accuracy(study, pair[1], tasks)
    return [(on, pair[0].label, how, change, change.times(100 / whole) if whole else None)]


# What we found


def findings(study: Study) -> str:
    """What a record says of the paper's idea: the claims, then what the ablations say of it."""
    found = [_finding(outcome) for outcome in outcomes(study) if outcome.change] or [
        f"**{NOT_TESTED.capitalize()}**: this profile compares no dynamic with a constant network."
    ]
    # On a text that nothing was calibrated on, how far a network is from dense says more.
    foreign = [text for text in study.profile.eval_texts if text != study.profile.calibration_text]
    others = [perplexity.size_prose(perplexity.perplexity_table(study))]
    others += [_levels(study, text) for text in foreign] + _ablation_findings(study)
    heading = "**The claims, by rule**, each as the change from constant to dynamic slicing:"
    more = "**What else a reader should know:**"
    lines = [heading, "", *(f"- {line}" for line in found)]
    return "\n".join([*lines, "", more, "", *(f"- {line}" for line in others)])


def _finding(outcome: Outcome) -> str:
    claimed = "lower" if outcome.published < 0 else "higher"
    if verdict(outcome.change, outcome.published) != NOT_SUPPORTED:
        word = "Holds" if outcome.verdict == SUPPORTED else outcome.verdict.capitalize()
    else:
        word = "Not shown" if outcome.change.low <= 0 <= outcome.change.high else "Does not hold"
    return (
        f"**{word}**: {claimed} {outcome.metric} at {outcome.basis}, on {outcome.measured_on}: "
        f"{outcome.measured} ({outcome.network}, {outcome.how}; published "
        f"{outcome.published:+.0f} %)."
    )


def _levels(study: Study, text: str) -> str:
    """How far from the dense model the networks of the largest SP are on a text."""
    largest = max(study.profile.slice_percentages)
    shown = [
        point
        for point in study.points()
        if point.network is None
        or (point.slice_percentage == largest and point.schedule in ("constant", "dynamic"))
    ]
    shown += [a.point for a in study.ablation.variants() if a.question == "calibration text"]
    levels = [f"{point.label}: {study.perplexity(point, text):.1f}" for point in shown]
    return f"Perplexity on {text} (not calibrated on): {'; '.join(levels)}."


def _ablation_findings(study: Study) -> list[str]:
    if not study.ablation.variants():
        return []
    network = f"{study.ablation.ablated()[1].label}, {study.profile.eval_texts[0]}"
    return [
        "Does LR predict what hurts? " + single_layer.prose(single_layer.table(study), study),
        f"Does the order of the widths matter ({network})? "
        + ablations.shuffle_prose(ablations.shuffle_table(study)),
        f"Does the sample of calibration windows matter ({network}, against constant slicing at "
        f"equal stored parameters)? {ablations.seed_prose(ablations.seed_table(study))}",
    ]
