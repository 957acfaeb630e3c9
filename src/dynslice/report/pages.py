"""The parts of README and docs that a record speaks for."""

import pandas as pd

from dynslice.core import paths
from dynslice.experiment.study import Study
from dynslice.report import ablations, claims, perplexity, statistics, style
from dynslice.report.statistics import EQUAL_SIZE, EQUAL_SLICE


def claims_block(study: Study) -> str:
    """What the README says of a record: verdicts where SB was chosen, else the comparison."""
    p = study.profile
    if p.selection_windows is None:
        changes = perplexity.perplexity_comparison(study)
        shown = style.markdown(changes.drop(columns="text", errors="ignore"))
    else:
        shown = f"{style.say('figure', profile=p.name)}\n\n{claims.findings(study)}"
    seconds = [study.store.get(request).seconds for request in study.requests()]
    source = style.say(
        "claims",
        p=p,
        texts="`, `".join(p.eval_texts),
        interval=statistics.INTERVAL,
        device=style.device_line(study),
        count=len(seconds),
        minutes=sum(seconds) / 60,
    )
    return f"{shown}\n\n{source}"


def artifact_block(study: Study) -> str:
    """A row for each judged claim: what to run for it, and what to expect (Markdown)."""
    table = pd.DataFrame(o for o in claims.outcomes(study) if o["change"])
    table["command"] = f"`{study.profile.command} --only 06`"
    shown = ["claim", "at", "measured on", "measured", "verdict on this model", "command"]
    seconds = sum(study.store.get(request).seconds for request in study.requests())
    told = style.say("artifact", p=study.profile, minutes=seconds / 60)
    where = style.device_line(study)
    return f"{style.markdown(table[shown])}\n\n{told} {where} In brackets: {statistics.INTERVAL}."


def deviations_block(study: Study) -> str:
    """How the published code and this one differ, and what each difference changes (Markdown).

    The words are those of docs/deviations.csv, the numbers in them are the record's.
    """
    p, dense, constant = study.profile, study.points()[0], study.ablation.ablated()[0]
    sliced = study.get(study.slice_request(constant)).value
    largest = study.design.points_at([max(p.slice_percentages)], [])[-1]
    last_layers = (study.lr(study.lr_request(last_layer=end))[-1] for end in ("raw", "normed"))
    networks = ablations.ablation_table(study).drop_duplicates("varied").set_index("varied")
    dynamic = [point for point in study.points() if point.schedule == "dynamic"]
    plans = [study.get(study.slice_request(point)).value for point in dynamic]
    matched = statistics.pairs(study.points(), EQUAL_SIZE)
    chosen, *_ = statistics.chosen(study, EQUAL_SLICE)
    numbers = {
        "p": p,
        "texts": ", ".join(p.eval_texts),
        "dense": study.get(study.perplexity_request(dense, p.eval_texts[0])).value,
        "validation": study.get(study.selection_request(dense)).value,
        "centred": study.get(study.ablation.centred_request()).value,
        "constant": constant,
        "layout": {"network": largest.label, **statistics.sizes(study, largest)},
        "dense_size": sliced["parameters_dense"] / 1e6,
        "stored": sliced["parameters"] / 1e6,
        "shortcuts": sliced["shortcut_parameters"] / 1e6,
        "largest": max(max(plan["final_slice"]) for plan in plans),
        "last_layer": dict(zip(("raw", "normed"), last_layers, strict=True)),
        "last_layer_change": ablations.phrase(networks.loc["last layer"]),
        "rounding_change": ablations.phrase(networks.loc["rounding"]),
        "inflation": perplexity.selection_prose(perplexity.selection_table(study)),
        "pairs": len(matched),
        "largest_gap": max(abs(study.size(a) / study.size(b) - 1) for a, b, _ in matched),
        "chosen": chosen,
        "on_both_bases": ", ".join(
            f"at {basis} {statistics.perplexity_change(study, a, b, text).format('%')} ({text})"
            for a, b, basis in statistics.pairs(study.points())
            for text in p.eval_texts
            if a == chosen
        ),
    }
    table = pd.read_csv(paths.ROOT / "docs" / "deviations.csv")
    return (
        f"{style.markdown(table.map(lambda words: words.format(**numbers)))}\n\nModel {p.model}, "
        f"text `{p.eval_texts[0]}` where no other is named. {style.device_line(study)} "
        f"Intervals: {statistics.INTERVAL}."
    )
