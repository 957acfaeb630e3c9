"""The parts of README and docs that a record speaks for."""

import pandas as pd

from dynslice.core import paths
from dynslice.experiment.study import Study
from dynslice.report import ablations, equal_size, perplexity, statistics, style
from dynslice.report.claims import findings
from dynslice.report.statistics import EQUAL_SIZE, EQUAL_SLICE, Difference


def claims_block(study: Study) -> str:
    """What the README says of a record: verdicts where SB was chosen, else the comparison."""
    name = study.profile.name
    seconds = sum(study.store.get(request).seconds for request in study.requests())
    figure = (
        f"![Perplexity against mean slice and against stored parameters, profile {name}]"
        f"(figures/{name}/perplexity.png)"
    )
    parts = [f"{figure}\n\n{findings(study)}"]
    if study.profile.selection_windows is None:
        changes = perplexity.perplexity_comparison(study)
        parts = [style.markdown(changes.drop(columns="text", errors="ignore"))]
    parts += [sentences] if (sentences := equal_size.readme_prose(study)) else []
    parts.append(
        f"Model {study.profile.model}; perplexity on `{'`, `'.join(study.profile.eval_texts)}` "
        f"({study.profile.eval_split} split, the layers cut alone apart), negative changes are "
        f"better. Intervals: {statistics.INTERVAL}; windows, items or layers, in pairs. "
        f"{style.device_line(study)} Its {len(study.requests())} measurements took "
        f"{seconds / 60:.0f} minutes."
    )
    return "\n\n".join(parts)


def deviations_block(study: Study) -> str:
    """How the published code and this one differ, and what each difference changes (Markdown).

    The words are those of docs/deviations.csv, the numbers in them are the record's.
    """
    p = study.profile
    numbers = {
        "p": p,
        "texts": ", ".join(p.eval_texts),
        "last_layer": _last_layer(study),
        "closeness": _closeness(study),
        "two_bases": _two_bases(study),
        "centred": _centred(study),
        "shortcuts": _shortcuts(study),
        "splits": _splits(study),
        "inflation": perplexity.selection_prose(perplexity.selection_table(study), study),
        "largest_slice": _largest_slice(study),
        "rounding": _ablated(study, "rounding"),
    }
    table = pd.read_csv(paths.ROOT / "docs" / "deviations.csv")
    return (
        f"{style.markdown(table.map(lambda words: words.format(**numbers)))}\n\nModel {p.model}, "
        f"text `{p.eval_texts[0]}` where no other is named. {style.device_line(study)} "
        f"Intervals: {statistics.INTERVAL}."
    )


def _last_layer(study: Study) -> str:
    raw, normed = (study.lr(study.lr_request(last_layer=end))[-1] for end in ("raw", "normed"))
    return (
        f"LR of the last layer is {normed:.2f} instead of {raw:.2f}. "
        f"{_ablated(study, 'last layer')}"
    )


def _ablated(study: Study, question: str) -> str:
    networks = ablations.ablation_table(study)
    row = networks[networks["varied"] == question].iloc[0]
    change = Difference.of_row(row, "change (%)").format("%")
    return f"Perplexity of the dynamic network {change}{ablations.curve_phrase(row)}."


def _closeness(study: Study) -> str:
    """How far sizes of matched constants lie from those of their dynamic networks."""
    pairs = statistics.pairs(study.points(), EQUAL_SIZE)
    gap = max(abs(study.size(a) / study.size(b) - 1) for a, b, _ in pairs)
    return f"those of the {len(pairs)} pairs differ by at most {gap:.2%}"


def _two_bases(study: Study) -> str:
    """One network against both of its constants."""
    dynamic, *_ = statistics.chosen(study, EQUAL_SLICE)
    parts = []
    for a, other, basis in statistics.pairs(study.points()):
        for text in study.profile.eval_texts if a == dynamic else []:
            change = statistics.perplexity_change(study, dynamic, other, text)
            parts.append(f"at {basis} {change.format('%')} ({text})")
    return f"Change of perplexity to {dynamic.label}: {', '.join(parts)}."


def _centred(study: Study) -> str:
    before = study.perplexity(study.points()[0], study.profile.eval_texts[0])
    after = study.get(study.ablation.centred_request()).value["perplexity"]
    return f"Perplexity of the dense model {before:.3f} becomes {after:.3f} before any slicing."


def _shortcuts(study: Study) -> str:
    constant = study.ablation.ablated()[0]
    shortcuts = study.get(study.slice_request(constant)).value["shortcut_parameters"]
    return (
        f"In {constant.label}, of {study.size(constant) / 1e6:.1f} M stored parameters "
        f"{shortcuts / 1e6:.1f} M are shortcuts."
    )


def _splits(study: Study) -> str:
    dense = study.points()[0]
    validation = study.get(study.selection_request(dense)).value
    test = study.get(study.perplexity_request(dense, study.profile.eval_texts[0])).value
    return (
        f"Perplexity of the dense model is {validation['perplexity']:.1f} on "
        f"{validation['windows']} validation windows and {test['perplexity']:.1f} on "
        f"{test['windows']} {study.profile.eval_split} windows."
    )


def _largest_slice(study: Study) -> str:
    dynamic = [study.slice_request(p) for p in study.points() if p.schedule == "dynamic"]
    largest = max(max(study.get(request).value["final_slice"]) for request in dynamic)
    return f"The largest slice of a layer in these plans is {largest:.0%} of its width."
