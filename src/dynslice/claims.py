"""What the results say of the paper: verdicts by rule, deviations, and the README's sentences."""

import pandas as pd

from dynslice import ablations, compare, paths, report
from dynslice.compare import BASES, EQUAL_SIZE, EQUAL_SLICE, Difference, Pair
from dynslice.study import Study

SUPPORTED, DIRECTION = "supported", "supported in direction, not in size"
NOT_SUPPORTED, NOT_TESTED = "not supported", "not tested here"


def claims_table(study: Study) -> pd.DataFrame:
    """Each headline claim of the paper beside what was measured, with a verdict by `verdict`.

    A claim says "up to", so one dynamic network speaks for it. For perplexity it is the one that
    gains most on the validation windows; in a profile without those, and for tasks, the one that
    gains most in what is shown, which favours the claim. On models that the study did not run the
    verdict is `not tested here`.
    """
    claims = pd.read_csv(paths.PUBLISHED / "claims.csv")
    rows = []
    for claim in claims.itertuples():
        tested = study.profile.model in claim.models.split(";")
        for basis in BASES:
            for measured_on, network, how, change in _measured(study, claim.metric, basis):
                here = verdict(change, claim.value)
                unit = "%" if claim.metric == "perplexity" else "points"
                rows.append(
                    {
                        "claim": claim.claim,
                        "published": f"{claim.value:+d} {'%' if claim.unit == 'percent' else ''}",
                        "at": basis,
                        "measured on": measured_on,
                        "network": network,
                        "chosen": how,
                        "measured": change.format(unit) if change else "-",
                        "verdict on this model": here,
                        "verdict on the paper's models": here if tested else NOT_TESTED,
                        "source": claim.source,
                    }
                )
    return pd.DataFrame(rows)


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


def claims_prose(table: pd.DataFrame, study: Study) -> str:
    """The verdicts as sentences (Markdown), in words that follow from the numbers."""
    lines = []
    for claim, rows in table.groupby("claim", sort=False):
        lines.append(f"**{claim}** (published: {rows.iloc[0]['published'].strip()}).")
        lines.append("")
        for row in rows.to_dict("records"):
            lines.append(
                f"- At {row['at']}, on {row['measured on']}: dynamic slicing ({row['network']}, "
                f"{row['chosen']}) differs from constant slicing by {row['measured']}: "
                f"**{row['verdict on this model']}** on {study.profile.model}."
                if row["measured"] != "-"
                else f"- At {row['at']} this profile measures no such pair: **{NOT_TESTED}**."
            )
        if (rows["verdict on the paper's models"] == NOT_TESTED).all():
            lines.append(f"- On Llama3-8B and Mistral-7B: **{NOT_TESTED}**.")
        lines.append("")
    return "\n".join(lines)


def _measured(
    study: Study, metric: str, basis: str
) -> list[tuple[str, str, str, Difference | None]]:
    """(measured on, network, how it was chosen, change), a row per text or one for the tasks."""
    if metric == "perplexity":
        return [_on_text(study, basis, text) for text in study.profile.eval_texts]
    tasks = list(study.profile.tasks)
    pairs = [p for p in compare.pairs(study.task_points()) if p[2] == basis and tasks]
    changes = [(p[0].label, compare.accuracy_change(study, *p[:2], tasks)) for p in pairs]
    name, change = max(changes, key=lambda c: c[1].estimate, default=("-", None))
    how = f"the best of {len(pairs)}" if len(pairs) > 1 else "the only one with tasks"
    return [("the average of the tasks", name, how, change)]


def _on_text(study: Study, basis: str, text: str) -> tuple[str, str, str, Difference | None]:
    pair, how = compare.chosen(study, basis), "chosen on validation windows"
    if pair is None:
        pair, how = compare.best(study, basis, text), "the best in hindsight"
    if pair is None:
        return (text, "-", how, None)
    return (text, pair[0].label, how, compare.perplexity_change(study, *pair[:2], text))


# What we found


def findings(study: Study) -> str:
    """What a record says of the paper's idea, what holds first (Markdown list)."""
    table = claims_table(study)
    holds = [_finding(row) for row in table.to_dict("records") if row["measured"] != "-"]
    comparison = report.task_comparison(study)
    averages = comparison[comparison["task"] == "average"]
    lines = [
        "**The claims, by rule:**",
        "",
        *(f"- {line}" for line in holds),
        "",
        "**What else a reader should know:**",
        "",
        f"- {report.size_prose(report.perplexity_table(study))}",
        *(f"- {line}" for line in _margins(averages)),
        *(f"- {line}" for line in _ablation_findings(study)),
    ]
    return "\n".join(lines)


def _finding(row: dict) -> str:
    quantity = "perplexity" if "perplexity" in row["claim"] else "accuracy"
    words = {SUPPORTED: "Holds", DIRECTION: "Holds in direction only"}
    word = words.get(row["verdict on this model"], "Does not hold")
    return (
        f"**{word}**: {quantity} at {row['at']}, on {row['measured on']}: {row['measured']} "
        f"({row['network']}, {row['chosen']}; published {row['published'].strip()})."
    )


def _margins(averages: pd.DataFrame) -> list[str]:
    return [
        f"Margin of the right choice, dynamic minus constant at {basis}, average of the tasks: "
        + "; ".join(
            f"SP {row['SP']:.0%} {row['margin (nats)']:+.3f} nats "
            f"[{row['margin low']:+.3f}, {row['margin high']:+.3f}]"
            for row in rows.to_dict("records")
        )
        + "."
        for basis, rows in averages.groupby("against constant at", sort=False)
    ]


def _ablation_findings(study: Study) -> list[str]:
    if not study.ablations():
        return []
    return [
        "Does LR predict what hurts? "
        + ablations.sensitivity_prose(ablations.sensitivity_table(study)),
        "Does the order matter? " + ablations.shuffle_prose(ablations.shuffle_table(study)),
        "Does the draw of the calibration windows matter? At equal size: "
        + ablations.seed_prose(ablations.seed_table(study)),
    ]


# The README's parts


def readme_block(study: Study) -> str:
    """What the README says of a record: verdicts where SB was chosen, else the comparison."""
    name = study.profile.name
    seconds = sum(study.store.get(request).seconds for request in study.requests())
    figure = (
        f"![Perplexity against mean slice and against stored parameters, profile {name}]"
        f"(figures/{name}/perplexity.png)"
    )
    body = [figure, "", findings(study)]
    if study.profile.selection_windows is None:
        comparison = report.rounded(report.perplexity_comparison(study)).drop(columns=["text"])
        body = [comparison.to_markdown(index=False, disable_numparse=True)]
    return "\n".join(
        [
            *body,
            "",
            f"Perplexity of dynamic relative to constant slicing of {study.profile.model} on "
            f"`{'`, `'.join(study.profile.eval_texts)}` ({study.profile.eval_split} split), "
            f"negative is better; intervals: {compare.INTERVAL}, windows and items in pairs. "
            f"{report.device_line(study)} Its {len(study.requests())} measurements took "
            f"{seconds / 60:.0f} minutes.",
        ]
    )


def deviations_block(study: Study) -> str:
    """The published code beside this one, and what each difference changes, as Markdown."""
    rows = [
        {"published code": there, "here": here, "what it changes": changes}
        for there, here, changes in _deviations(study)
    ]
    table = pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)
    model, text = study.profile.model, study.profile.eval_texts[0]
    where = (
        f"Measured on {model}, text `{text}` where no other is named. {report.device_line(study)}"
    )
    return f"{table}\n\n{where} Intervals: {compare.INTERVAL}."


def _deviations(study: Study) -> list[tuple[str, str, str]]:
    """(the published code, here, what it changes in numbers of the record)."""
    text = study.profile.eval_texts[0]
    networks = ablations.ablation_table(study).set_index("network")
    constant = study.get(study.slice_request(study.ablated()[0])).value
    sp = study.ablated()[0].slice_percentage
    return [
        (
            "The last layer's LR compares its input with its output *after* the final norm.",
            "The raw output, as the formula says.",
            _last_layer(study, networks),
        ),
        (
            "Dynamic and constant networks are compared at equal mean slice.",
            "Also at equal stored parameters, within 0.1 %.",
            _two_bases(study),
        ),
        (
            "The mean over d is subtracted from the embeddings of RMSNorm models too.",
            "Nothing is subtracted, so that the logits stay as they are.",
            _centred(study, text),
        ),
        (
            "Its RMS normalisation has a fixed eps of 1e-5.",
            "The eps of the model.",
            "Nothing for this model, whose own eps is 1e-5.",
        ),
        (
            "Shortcut matrices are buffers, and parameter counts leave them out.",
            "They are parameters, and counted.",
            f"Constant slicing by {sp:.0%} stores {constant['parameters'] / 1e6:.1f} M parameters, "
            f"{constant['shortcut_parameters'] / 1e6:.1f} M of them in shortcuts.",
        ),
        (
            "Perplexity is taken on sampled validation windows.",
            "On test windows; validation windows only choose SB.",
            _splits(study, text),
        ),
        (
            "SB is chosen by the numbers that are then reported.",
            "Chosen on validation windows, reported on test windows of two texts.",
            _inflation(study),
        ),
        (
            "The sweep reloads the model for every point, reads results from printed text, and "
            "goes on when a point has failed.",
            "One process, the model loaded once, one result file per measurement; a failure ends "
            "the run and the next one goes on from there.",
            "No number of a network.",
        ),
        (
            "A skewed score gives a negative width without an error.",
            "Slices are capped, the excess goes to other layers, the mean is kept.",
            _capped(study),
        ),
        (
            "Widths of dynamic plans are whole numbers, not multiples.",
            "Multiples of 8; the mean of the widths is kept.",
            _phrase(networks, "rounding"),
        ),
        (
            "1 % of the mean diagonal is added to the covariance.",
            "Left out: it moves all eigenvalues alike and no eigenvector.",
            "Nothing.",
        ),
        (
            "fp16 weights.",
            f"{study.profile.dtype}.",
            "Not measured.",
        ),
    ]


def _last_layer(study: Study, networks: pd.DataFrame) -> str:
    raw = study.get(study.lr_request(last_layer="raw")).value["layers"][-1]["lr"]
    normed = study.get(study.lr_request(last_layer="normed")).value["layers"][-1]["lr"]
    return (
        f"LR of the last layer is {normed:.2f} instead of {raw:.2f}. "
        f"{_phrase(networks, 'last layer')}"
    )


def _phrase(networks: pd.DataFrame, question: str) -> str:
    row = networks[networks["varied"] == question].iloc[0]
    own = Difference(row["change (%)"], row["low"], row["high"])
    return f"Perplexity of the dynamic network {own.format('%')}{ablations.curve_phrase(row)}."


def _two_bases(study: Study) -> str:
    parts = []
    for basis in (EQUAL_SLICE, EQUAL_SIZE):
        pair: Pair = compare.chosen(study, basis)
        for text in study.profile.eval_texts:
            change = compare.perplexity_change(study, *pair[:2], text)
            parts.append(f"at {basis} {change.format('%')} ({text})")
    return f"The gain of the network that validation chose: {', '.join(parts)}."


def _centred(study: Study, text: str) -> str:
    dense = study.get(study.perplexity_request(study.points()[0], text)).value["perplexity"]
    centred = study.get(study.centred_request()).value["perplexity"]
    return f"Perplexity of the dense model {dense:.3f} becomes {centred:.3f} before any slicing."


def _splits(study: Study, text: str) -> str:
    dense = study.points()[0]
    validation = study.get(study.selection_request(dense)).value
    test = study.get(study.perplexity_request(dense, text)).value
    return (
        f"Perplexity of the dense model is {validation['perplexity']:.1f} on "
        f"{validation['windows']} validation windows and {test['perplexity']:.1f} on "
        f"{test['windows']} test windows."
    )


def _inflation(study: Study) -> str:
    table = report.selection_table(study)
    gaps = table["perplexity (%)"] - table["its change (%), optimistic"]
    return (
        f"The best SB in hindsight gains up to {gaps.max():.1f} points more than the chosen one "
        f"({int((gaps > 0).sum())} of {len(gaps)} comparisons differ)."
    )


def _capped(study: Study) -> str:
    """How many slices of the study's plans reach the cap, one rounding unit of width left."""
    slices = [
        study.get(study.slice_request(p)).value for p in study.points() if p.schedule == "dynamic"
    ]
    capped = sum(
        share >= 1 - study.profile.round_to / max(value["widths"])
        for value in slices
        for share in value["final_slice"]
    )
    return f"{capped} layers of the {len(slices)} dynamic plans reach the cap on this model."
