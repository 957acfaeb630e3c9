"""The parts of README and docs that a record speaks for."""

import pandas as pd

from dynslice.experiment.study import Study
from dynslice.report import ablations, equal_size, perplexity, statistics, style
from dynslice.report.claims import findings
from dynslice.report.statistics import EQUAL_SIZE, EQUAL_SLICE, Difference

# The README's parts


def claims_block(study: Study) -> str:
    """What the README says of a record: verdicts where SB was chosen, else the comparison."""
    name = study.profile.name
    seconds = sum(study.store.get(request).seconds for request in study.requests())
    figure = (
        f"![Perplexity against mean slice and against stored parameters, profile {name}]"
        f"(figures/{name}/perplexity.png)"
    )
    body = [figure, "", findings(study)]
    if study.profile.selection_windows is None:
        comparison = style.rounded(perplexity.perplexity_comparison(study)).drop(columns=["text"])
        body = [comparison.to_markdown(index=False, disable_numparse=True)]
    if sentences := equal_size.readme_prose(study):
        body += ["", sentences]
    return "\n".join(
        [
            *body,
            "",
            f"Model {study.profile.model}; perplexity on `{'`, `'.join(study.profile.eval_texts)}` "
            f"({study.profile.eval_split} split, the layers cut alone apart), negative changes are "
            f"better. Intervals: {statistics.INTERVAL}; windows, items or layers, in pairs. "
            f"{style.device_line(study)} Its {len(study.requests())} measurements took "
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
    where = (
        f"Model {study.profile.model}, text `{study.profile.eval_texts[0]}` where no other is named"
    )
    return f"{table}\n\n{where}. {style.device_line(study)} Intervals: {statistics.INTERVAL}."


def _deviations(study: Study) -> list[tuple[str, str, str]]:
    """(the published code, here, what it changes in numbers of the record)."""
    p = study.profile
    networks = ablations.ablation_table(study).set_index("network")
    return [
        (
            "The last layer's LR compares its input with its output *after* the final norm.",
            "The raw output, as the formula says.",
            _last_layer(study, networks),
        ),
        (
            "Dynamic and constant networks are compared at equal mean slice.",
            f"Also at equal stored parameters: {_closeness(study)}.",
            _two_bases(study),
        ),
        (
            "The mean over d is subtracted from the embeddings of RMSNorm models too.",
            "Nothing is subtracted, so that the logits stay as they are.",
            _centred(study),
        ),
        (
            "Its RMS normalisation has an eps of its own.",
            "The eps of the model.",
            "Nothing for this model, whose own eps is the same.",
        ),
        (
            "Shortcut matrices are buffers, and parameter counts leave them out.",
            "They are parameters, and counted.",
            _shortcuts(study),
        ),
        (
            "Perplexity is taken on sampled validation windows.",
            f"On windows of the {p.eval_split} split.",
            _splits(study),
        ),
        (
            "SB is chosen by the numbers that are then reported.",
            f"Chosen on validation windows, reported on {p.eval_split} windows of "
            f"{', '.join(p.eval_texts)}.",
            _inflation(study),
        ),
        (
            "The sweep reloads the model for every point, reads results from printed text, and "
            "goes on when a point has failed.",
            "The model is loaded once by each process, and each measurement is a file; one that "
            "failed is named at the end, the run counts as failed, and the next one measures it.",
            "No number of a network.",
        ),
        (
            "A skewed score gives a negative width without an error.",
            "Slices are capped, the excess goes to other layers, the mean is kept.",
            _largest_slice(study),
        ),
        (
            "Widths of dynamic plans are whole numbers, not multiples.",
            f"Multiples of {p.round_to}; the mean of the widths is kept.",
            _phrase(networks, "rounding"),
        ),
        (
            "A hundredth of the mean diagonal is added to the covariance.",
            "Left out: it moves all eigenvalues alike and no eigenvector.",
            "Nothing.",
        ),
        ("fp16 weights.", f"{p.dtype}.", "Not measured."),
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


def _closeness(study: Study) -> str:
    """How far sizes of matched constants lie from those of their dynamic networks."""
    pairs = [pair for pair in statistics.pairs(study.points()) if pair[2] == EQUAL_SIZE]
    sizes = [[_size(study, point)["parameters"] for point in pair[:2]] for pair in pairs]
    gap = max(abs(a / b - 1) for a, b in sizes)
    return f"those of the {len(pairs)} pairs differ by at most {gap:.2%}"


def _two_bases(study: Study) -> str:
    """One network against both of its constants."""
    dynamic, constant, _ = statistics.chosen(study, EQUAL_SLICE)
    matched = next(
        b
        for a, b, basis in statistics.pairs(study.points())
        if a == dynamic and basis == EQUAL_SIZE
    )
    parts = []
    for basis, other in ((EQUAL_SLICE, constant), (EQUAL_SIZE, matched)):
        for text in study.profile.eval_texts:
            change = statistics.perplexity_change(study, dynamic, other, text)
            parts.append(f"at {basis} {change.format('%')} ({text})")
    return f"Change of perplexity to {dynamic.label}: {', '.join(parts)}."


def _centred(study: Study) -> str:
    dense = study.perplexity_request(study.points()[0], study.profile.eval_texts[0])
    before, after = (
        study.get(request).value["perplexity"] for request in (dense, study.centred_request())
    )
    return f"Perplexity of the dense model {before:.3f} becomes {after:.3f} before any slicing."


def _shortcuts(study: Study) -> str:
    constant = study.ablated()[0]
    size = _size(study, constant)
    return (
        f"In {constant.label}, of {size['parameters'] / 1e6:.1f} M stored parameters "
        f"{size['shortcut_parameters'] / 1e6:.1f} M are shortcuts."
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


def _inflation(study: Study) -> str:
    table = perplexity.selection_table(study)
    gaps = table["perplexity (%)"] - table["in hindsight (%)"]
    return (
        f"The best SB in hindsight looks up to {gaps.max():.1f} points better than the chosen one "
        f"({int((gaps > 0).sum())} of {len(gaps)} comparisons differ)."
    )


def _largest_slice(study: Study) -> str:
    dynamic = [point for point in study.points() if point.schedule == "dynamic"]
    largest = max(share for point in dynamic for share in _size(study, point)["final_slice"])
    return f"The largest slice of a layer in these plans is {largest:.0%} of its width."


def _size(study: Study, point) -> dict:
    return study.get(study.slice_request(point)).value
