"""Notebook 09: slicing and what a user would pick instead, by perplexity and stored bytes."""

from collections.abc import Iterable
from statistics import median

import matplotlib.pyplot as plt
import pandas as pd

from dynslice.evaluate.task_table import chance
from dynslice.experiment.alternatives import RECIPE
from dynslice.experiment.equal_size import SLICEGPT
from dynslice.experiment.profile import percent
from dynslice.experiment.requests import DENSE, Point
from dynslice.experiment.study import Study
from dynslice.report import efficiency, statistics, style
from dynslice.report.statistics import PERPLEXITY, columns, of_row

STORED = "stored (MB)"  # weights that are not rounded count 16 bits each
OWN = "its own"  # the size of what has no other network to be equal to
BITS = ("int", "half", f"{RECIPE}, int8")  # of the forms below, those of fewer bits
FORMS = {  # of the figure: what a name starts with, its mark, and how it is called there
    SLICEGPT: ("o", "SliceGPT"),
    f"{RECIPE}, int8": ("h", "best recipe, int8"),
    f"{RECIPE} and": ("P", "best recipe, fewer neurons"),
    RECIPE: ("D", "best recipe"),
    "fewer layers": ("s", "fewer layers"),
    "fewer neurons": ("^", "fewer neurons"),
    "int": ("v", "fewer bits"),
    "half": ("<", "bits by layer"),
}


def stored_bytes(study: Study, point: Point) -> int:
    """What a network stores, weights that are not rounded at 16 bits each."""
    value = study.get(study.slice_request(point)).value
    return value.get("bytes", 2 * value["parameters"])


def compared(study: Study) -> list[tuple[str, list[Point]]]:
    """The networks by the size that they share, SliceGPT first; of LoRA the rate that won."""
    found = [(OWN, [DENSE])]
    for sp in study.instead.sizes:
        tuned = [_best(study, rates) for rates in study.instead.recovered(sp)]
        found.append((f"SP {percent(sp)}", [*_at_size(study, sp), *tuned]))
    return [*found, (OWN, [*study.instead.rounded(), *study.instead.sliced_and_rounded()])]


def _at_size(study: Study, sp: float) -> list[Point]:
    """The networks of a size but those that fewer neurons alone made so small: no slice is left."""
    points = study.instead.at_size(sp)
    made = [study.get(study.slice_request(point)).value for point in points]
    return [p for p, value in zip(points, made, strict=True) if value.get("mean_slice", 1) > 0]


def _best(study: Study, points: list[Point]) -> Point:
    """The network of lowest perplexity on validation windows; the first where there are none."""
    if study.profile.selection_windows is None:
        return points[0]
    return min(points, key=lambda p: study.get(study.selection_request(p)).value["perplexity"])


def alternatives_table(study: Study) -> pd.DataFrame:
    """A row for each network: bytes, perplexity by text, accuracy, and the seconds of making it.

    The changes of perplexity are from SliceGPT of the same size, fine-tuned where the network is,
    paired by window.
    """
    if not study.instead.sizes:
        return pd.DataFrame()
    study.ensure(study.instead.requests())
    rows = []
    for size, points in compared(study):
        for point in points:
            reference = None if size == OWN else next(p for p in points if _alike(p, point))
            rows.append(_row(study, size, point, reference))
    return pd.DataFrame(rows)


def view(table: pd.DataFrame) -> pd.DataFrame:
    """The table for a page: behind an accuracy stands what guessing gives."""
    if table.empty:
        return table
    both = zip(table["accuracy (%)"], table["chance (%)"], strict=True)
    told = ["-" if pd.isna(value) else f"{value:.1f} ({chance:.1f})" for value, chance in both]
    return table.assign(**{"accuracy (%)": told}).drop(columns="chance (%)")


def _alike(a: Point, b: Point) -> bool:
    """Whether both are fine-tuned, or neither."""
    return ("recovery" in a.network) == ("recovery" in b.network)


def _row(study: Study, size: str, point: Point, reference: Point | None) -> dict:
    row = {"size of": size, "network": point.name, STORED: stored_bytes(study, point) / 1e6}
    for text in study.profile.eval_texts:
        row[f"perplexity, {text}"] = study.perplexity(point, text)
    for text in study.profile.eval_texts:
        change = None
        if reference not in (None, point):
            change = statistics.perplexity_change(study, point, reference, text)
        row |= columns(change, f"{PERPLEXITY}, {text}", f"{{}}, {text}")
    tasks = statistics.choice_tasks(study)
    if has_tasks := bool(tasks) and point in study.instead.tasked():
        row["accuracy (%)"] = statistics.accuracy(study, point, tasks)
    row |= {} if has_tasks else {"accuracy (%)": None}
    made = point is not DENSE and study.get(study.slice_request(point)).seconds
    return {**row, "chance (%)": chance(tasks) if tasks else None, "made in (s)": made or None}


def speed_table(study: Study) -> pd.DataFrame:
    """Tokens per second of the finalists, and how many times those of the dense model they are.

    Measured in turn with the dense model, and counted.
    """
    rows = []
    for point in (p for sp in study.instead.sizes for p in study.instead.finalists(sp)):
        for request in study.beyond.speed_requests(point):  # one, or none
            value, row = study.get(request).value, {"network": point.name}
            for step in efficiency.STEPS:
                seconds = median(value[f"{step}_seconds"]["sliced"])
                row[f"{step} (tokens/s)"] = value[f"{step}_tokens"] / seconds
                row |= efficiency.gain_columns(value, step)
            rows.append(row)
    return pd.DataFrame(rows)


def alternatives_figure(table: pd.DataFrame) -> plt.Figure | None:
    """Perplexity against stored bytes, a panel per text, with the Pareto front; dense is a star."""
    if table.empty:
        return None
    measured = [c for c in table if c.startswith("perplexity, ")]
    size = {"height": 3.1, "squeeze": False, "sharex": True}
    figure, axes = style.panels(1, len(measured), **size)
    for axis, of in zip(axes[0], measured, strict=True):
        style.pareto_front(axis, table[STORED], table[of])
        for look, (start, (mark, label)) in enumerate(FORMS.items()):
            rows = table[[form(network) == start for network in table["network"]]]
            for tuned, here in rows.groupby(_is_tuned(rows)):
                face = f"C{look}" if tuned else "w"
                is_first = label not in axis.get_legend_handles_labels()[1] and not tuned
                axis.plot(
                    here[STORED],
                    here[of],
                    mark,
                    color=f"C{look}",
                    markerfacecolor=face,
                    markersize=5,
                    label=label if is_first else None,
                )
        dense = table[table["network"] == DENSE.schedule]
        axis.plot(dense[STORED], dense[of], "k*", markersize=9, label="dense")
        axis.set(yscale="log", xlabel=STORED, ylabel=of)
        style.log_ticks(axis.yaxis, 1, 2, 3, 5, 7)
    if _is_tuned(table).any():
        axes[0, 0].plot([], [], "ko", markersize=5, label="filled: after LoRA")
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=4)
    return figure


def _is_tuned(table: pd.DataFrame) -> pd.Series:
    """Which rows are of networks after LoRA."""
    return table["network"].str.contains("LoRA")


def form(network: str) -> str | None:
    """The form of the figure that a network has."""
    return next((start for start in FORMS if network.startswith(start)), None)


# In sentences


def prose(study: Study, table: pd.DataFrame) -> str:
    """When slicing is the right choice, in sentences made from the table (Markdown)."""
    if table.empty:
        return style.NONE
    both = _slice_and_bits(study) if study.instead.rounded() else ""
    return _bullets([*_fronts(study, table), both])


def details(study: Study, table: pd.DataFrame) -> str:
    """What is best at each size, after LoRA, and at fewer bits (Markdown)."""
    if table.empty:
        return style.NONE
    lines = [_size_prose(study, table, sp) for sp in study.instead.sizes]
    bits = _bits(study) if study.instead.rounded() else ""
    return _bullets([*lines, _tuned(study, table), bits])


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in filter(None, lines))


def _fronts(study: Study, table: pd.DataFrame) -> list[str]:
    """What no other network equals or beats in no more bytes, and slices where none is rounded."""
    texts, has_bits = study.profile.eval_texts, table["network"].map(form).isin(BITS)
    fronts = fronts_of(table, texts)
    sliced = _listed(slices_of(fronts))
    lines = [style.say("instead_front", told=_by_text(fronts), sliced=sliced)]
    if has_bits.any():
        of_parts = fronts_of(table[~has_bits], texts)
        slices = {text: slices_of({text: names}) for text, names in of_parts.items()}
        lines.append(style.say("instead_front_of_parts", told=_by_text(slices)))
    return lines


def _by_text(networks: dict[str, list[str]]) -> str:
    return " ".join(f"On {text}: {_listed(names)}." for text, names in networks.items())


def fronts_of(table: pd.DataFrame, texts: list[str]) -> dict[str, list[str]]:
    """By text the networks of the Pareto front, by bytes, dense and fine-tuned ones left out."""
    rows, found = table[~_is_tuned(table)], {}
    rows = rows[rows["network"] != DENSE.schedule]
    for text in texts:
        front = style.on_front(rows[STORED], rows[f"perplexity, {text}"]).index
        named = rows.loc[front, ["network", "size of"]].itertuples(index=False)
        found[text] = [name if size == OWN else f"{name} ({size})" for name, size in named]
    return found


def slices_of(fronts: dict[str, list[str]]) -> list[str]:
    """Those of the networks that are slices."""
    names = dict.fromkeys(name for names in fronts.values() for name in names)
    return [name for name in names if name.startswith((SLICEGPT, RECIPE))]


def _size_prose(study: Study, table: pd.DataFrame, sp: float) -> str:
    """What beats SliceGPT at one size on every text, and what does not, before fine-tuning."""
    rows = table[(table["size of"] == f"SP {percent(sp)}") & (table["network"] != SLICEGPT)]
    rows = rows[~_is_tuned(rows)]
    others = []
    for row in rows.to_dict("records"):
        of_texts = [_change(row, text) for text in study.profile.eval_texts]
        if any(change.direction != "lower" for change in of_texts):
            others.append(row["network"])
    better = f"{len(rows) - len(others)} of" if others else "all"
    but = f"; not with: {_listed(others)}" if others else ""
    of = {"better": better, "count": len(rows), "but": but, "chosen": _choice(study, sp)}
    return style.say("instead_size", share=percent(sp), **of)


def _choice(study: Study, sp: float) -> str:
    """What validation windows choose at one size, before fine-tuning, and what the test says."""
    if study.profile.selection_windows is None:
        return ""
    points = _at_size(study, sp)
    chosen = _best(study, points)
    of = {"chosen": levels(study, chosen), "slicegpt": levels(study, points[0])}
    texts = " and ".join(study.profile.eval_texts)
    return style.say("instead_choice", network=chosen.name, texts=texts, **of)


def levels(study: Study, point: Point) -> str:
    """The perplexity of a network on every text."""
    return " and ".join(f"{study.perplexity(point, text):.1f}" for text in study.profile.eval_texts)


def _change(row: dict, text: str) -> statistics.Estimate:
    return of_row(row, f"{PERPLEXITY}, {text}", f"{{}}, {text}")


def _tuned(study: Study, table: pd.DataFrame) -> str:
    rows, text = table[_is_tuned(table)], study.profile.eval_texts[0]
    if rows.empty:
        return ""
    told = []
    for network, level in zip(rows["network"], rows[f"perplexity, {text}"], strict=True):
        name, _, rate = network.partition(", LoRA at ")
        told.append(f"{name} {level:.1f} (at {rate})")
    p = study.profile
    chosen = "" if p.selection_windows is None else style.say("instead_rate")
    of = {"tokens": p.recovery_steps * p.recovery_window, "chosen": chosen}
    return style.say("instead_tuned", text=text, levels=_listed(told), **of)


def _bits(study: Study) -> str:
    """The dense model at fewer bits, next to the smallest recipe."""
    text = study.profile.eval_texts[0]
    int8, int4, *mixed = study.instead.rounded()
    networks = {"int8": int8, "int4": int4, "dense": DENSE}
    networks["recipe"] = study.beyond.recipe(max(study.instead.sizes))
    values = {
        key: {"MB": stored_bytes(study, point) / 1e6, "ppl": study.perplexity(point, text)}
        for key, point in networks.items()
    }
    told = _listed(f"{point.name} {study.perplexity(point, text):.1f}" for point in mixed)
    return style.say("instead_bits", text=text, mixed=told, **values)


def _slice_and_bits(study: Study) -> str:
    """Each slice at 8 bits, against the dense model rounded to the most bytes that are no more."""
    text, told = study.profile.eval_texts[0], []
    sizes = [(stored_bytes(study, p), p) for p in study.instead.rounded()]
    for both in study.instead.sliced_and_rounded():
        most = max((size for size, _ in sizes if size <= stored_bytes(study, both)), default=None)
        if most is None:
            continue
        alone = _best(study, [p for size, p in sizes if size == most])
        change = statistics.perplexity_change(study, both, alone, text)
        clause = style.say(
            "instead_both_clause",
            share=percent(both.slice_percentage),
            alone=alone.name,
            change=change.format("%"),
            says=change.direction,
            ppl=[study.perplexity(point, text) for point in (both, alone)],
            MB=[stored_bytes(study, point) / 1e6 for point in (both, alone)],
        )
        told.append(clause)
    return style.say("instead_both", text=text, told="; ".join(told)) if told else ""


def _listed(names: Iterable[str]) -> str:
    return "; ".join(names) or "none"
