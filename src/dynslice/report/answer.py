"""The README's first screen: what was found on all models, in sentences, a figure and a table."""

import json
from collections.abc import Iterable
from itertools import chain, product
from pathlib import Path

import pandas as pd

from dynslice.core import paths
from dynslice.evaluate.task_table import chance
from dynslice.experiment.across import Across
from dynslice.experiment.alternatives import INT8
from dynslice.experiment.equal_size import SLICEGPT
from dynslice.experiment.profile import percent
from dynslice.experiment.requests import DENSE, Point
from dynslice.experiment.study import Study
from dynslice.report import across as models
from dynslice.report import alternatives, claims, equal_size, short, statistics, style, variants
from dynslice.report.statistics import EQUAL_SIZE, SIZE

WINS = {"perplexity": "lower", "accuracy": "higher"}
RULE = {"shared": "shared bases", "whole": "recipe"}
OF_RECORD = "standard"  # the profile whose answer the README gives, with those next to it


def answer_block() -> str:
    """What the README says of the records: nothing while there is none (Markdown)."""
    if not paths.record(OF_RECORD).is_dir():
        return "No result is recorded yet."
    return answer(Across.open(OF_RECORD, from_record=True))


def notebooks_block() -> str:
    """A row of the README for each rendered notebook of the record, with one finding (Markdown)."""
    if not paths.record(OF_RECORD).is_dir():
        return "No result is recorded yet."
    compared = Across.open(OF_RECORD, from_record=True)
    study = next(s for s in compared.studies if s.name == OF_RECORD)
    rows = ["| notebook | in short |", "|---|---|"]
    for path in sorted(paths.rendered(OF_RECORD).glob("[0-9][0-9]_*.ipynb")):
        number, title = path.stem[:2], _title(path)
        is_across = number not in short.FINDINGS
        told = short.across(compared) if is_across else short.FINDINGS[number](study)
        link = f"[{number} {title}](notebooks/rendered/{OF_RECORD}/{path.name})"
        rows.append(f"| {link} | {short.first(told)} |")
    return "\n".join(rows)


def _title(path: Path) -> str:
    first, *_ = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "".join(first["source"]).splitlines()[0].removeprefix("# ").partition(":")[0]


def applies(across: Across) -> bool:
    """Whether every study has the four networks of the answer, at one slice percentage."""
    at = {headline(study) for study in across.studies}
    return len(at) == 1 and all(len(_networks(study)) == 4 for study in across.studies)


def answer(across: Across) -> str:
    """The answer in short, what changes, what it costs, and where it comes from (Markdown)."""
    across.ensure()
    studies = across.studies
    absent = ", ".join(f"`{profile}`" for profile in across.absent)
    told = [_cost(studies), instead(studies)]
    told += [style.say("across_absent", profiles=absent)] if absent else []
    parts = [f"{_lead(studies)} {_limits(studies)}", style.say("answer_changes")]
    parts += [style.markdown(change_table(across))]
    parts += ["\n".join(f"- {sentence}" for sentence in filter(None, told))]
    parts += [style.say("answer_figure", profile=across.name)]
    parts += [style.markdown(answer_table(across), digits=1), _source(across)]
    return "\n\n".join(parts)


def headline(study: Study) -> float:
    """The slice percentage that the answer is about: the smallest at which tasks are run."""
    p = study.profile
    return min(p.task_slice_percentages or p.slice_percentages)


def change_table(across: Across) -> pd.DataFrame:
    """A row for each claim, step of the recipe and rule, a column for each model.

    Changes at equal stored size, `-` where a study makes no such comparison; steps at the slice
    percentages at which every study has them.
    """
    studies = across.studies
    shares = set.intersection(*(set(equal_size.ladders(study)) for study in studies))
    found = {models.name(study): _changes(study, sorted(shares)) for study in studies}
    rows = list(dict.fromkeys(chain.from_iterable(found.values())))
    table = pd.DataFrame(found, index=rows).fillna("-")
    return table.rename_axis("change at equal stored size").reset_index()


def _changes(study: Study, shares: list[float]) -> dict[str, str]:
    cells: dict[str, list[str]] = {}
    for o in _judged(study):
        said = f"**{o['verdict on this model']}**: {o['measured']}"
        said += f" ({o['network'].removeprefix('dynamic, ')})"
        cells.setdefault(f"claim: {claims.claimed(o)}", []).append(said)
    for sp in shares:
        for step, change in equal_size.steps(study, sp).items():
            said = f"SP {percent(sp)}: {change.told('%')}"
            cells.setdefault(f"step: {step}", []).append(said)
    for lever, change in variants.first_layer_rule(study).items():
        said = f"{RULE[lever]}, SP {percent(equal_size.last_ladder(study)[0])}: {change.told('%')}"
        cells.setdefault("rule: first layer whole, in place of LR", []).append(said)
    return {row: "<br>".join(said) for row, said in cells.items()}


def answer_table(across: Across) -> pd.DataFrame:
    """A row for each model and network at the headline slice percentage, and at 8 bits.

    Absolute values, and the paired change of perplexity from SliceGPT on the first text.
    """
    rows = []
    for study in across.studies:
        here, text = _networks(study), study.profile.eval_texts[0]
        for network, point in (here | _others(study)).items():
            row = {"model": models.name(study), "network": network}
            row[SIZE] = study.size(point) / 1e6
            row["bytes (%)"] = f"{100 * _share_of_bytes(study, point):.0f}"
            for read in study.profile.eval_texts:
                row[f"perplexity, {read}"] = study.perplexity(point, read)
            row["accuracy (%)"] = _accuracy(study, point)
            is_sliced = network not in (DENSE.schedule, SLICEGPT)
            change = statistics.perplexity_change(study, point, here[SLICEGPT], text)
            row[f"{text}, against SliceGPT (%)"] = change.format() if is_sliced else "-"
            rows.append(row)
    return pd.DataFrame(rows)


def _networks(study: Study) -> dict[str, Point]:
    return models.networks(study, headline(study))


def _accuracy(study: Study, point: Point) -> str:
    if not models.runs_tasks(study, point):
        return "-"
    tasks = statistics.choice_tasks(study)
    return f"{statistics.accuracy(study, point, tasks):.1f} ({chance(tasks):.1f})"


def _lead(studies: list[Study]) -> str:
    """On how many of the models LR, its stand-in and fewer bits do better."""
    better: dict[str, list[bool]] = {"perplexity": [], "accuracy": []}
    for o in chain.from_iterable(map(_judged, studies)):
        better[o["metric"]].append(o["change"].direction == WINS[o["metric"]])
    clauses = [
        style.say(f"answer_lead_{metric}", wins=sum(of), count=len(of))
        for metric, of in better.items()
        if of
    ]
    if rules := [x for study in studies for x in variants.first_layer_rule(study).values()]:
        as_good = sum(change.direction != "higher" for change in rules)
        clauses.append(style.say("answer_lead_rule", wins=as_good, count=len(rules)))
    if bits := [_bits_win(study) for study in studies if INT8 in _others(study)]:
        clauses.append(style.say("answer_lead_bits", wins=sum(bits), count=len(bits)))
    return style.say("answer_lead", clauses="; ".join(clauses))


def _bits_win(study: Study) -> bool:
    """Whether the model at 8 bits is smaller and better, on every text, than each slice here."""
    rounded, slices = _others(study)[INT8], list(_networks(study).values())[1:]
    return all(
        alternatives.stored_bytes(study, rounded) < alternatives.stored_bytes(study, point)
        and study.perplexity(rounded, text) < study.perplexity(point, text)
        for point, text in product(slices, study.profile.eval_texts)
    )


def _cost(studies: list[Study]) -> str:
    """What SliceGPT saves, and how far above the dense model each network is."""
    named = {"slicegpt": SLICEGPT, "dynamic": models.DYNAMIC, "recipe": models.RECIPE}
    texts = dict.fromkeys(chain.from_iterable(study.profile.eval_texts for study in studies))

    def rise(study: Study, network: str, text: str) -> float:
        point = _networks(study)[network]
        return 100 * (study.perplexity(point, text) / study.perplexity(DENSE, text) - 1)

    rises = {
        key: style.listed(
            f"{_span(rise(s, network, text) for s in studies if text in s.profile.eval_texts)} % "
            f"on {text}"
            for text in texts
        )
        for key, network in named.items()
    }
    saved = (100 * (1 - s.size(_networks(s)[SLICEGPT]) / s.size(DENSE)) for s in studies)
    share = percent(headline(studies[0]))
    return style.say("answer_cost", share=share, saved=_span(saved), **rises)


def _span(values: Iterable[float], form: str = ".0f") -> str:
    """`9 to 66`, or the one number that all of them are."""
    found = sorted(values)
    return " to ".join(dict.fromkeys(f"{x:{form}}" for x in (found[0], found[-1])))


def _judged(study: Study) -> list[dict]:
    """The claims at equal size, on the text of the calibration and on the tasks on average."""
    read = (study.profile.calibration_text, claims.TASKS_ON_AVERAGE)
    of_size = (o for o in claims.outcomes(study) if o["at"] == EQUAL_SIZE and o["change"])
    return [o for o in of_size if o["measured on"] in read]


def instead(studies: list[Study]) -> str:
    """What fewer bits cost, and whether a slice is worth its bytes; empty where none was asked."""
    if not (studies := [study for study in studies if INT8 in _others(study)]):
        return ""
    changes, fronts = [], []
    for study in studies:
        rounded, texts = _others(study)[INT8], study.profile.eval_texts
        changes += [
            statistics.perplexity_change(study, rounded, DENSE, text).estimate for text in texts
        ]
        found = alternatives.fronts_of(alternatives.alternatives_table(study), texts)
        for text, names in found.items():
            slices = alternatives.slices_of({text: names})
            fronts += [f"on {models.name(study)} and {text} {style.listed(slices)}"] * bool(slices)
    return style.say(
        "answer_instead",
        models=style.listed(map(models.name, studies)),
        shares=_span(100 * _share_of_bytes(study, _others(study)[INT8]) for study in studies),
        changes=_span(changes, "+.1f"),
        slices="; ".join(fronts) or "none",
    )


def _others(study: Study) -> dict[str, Point]:
    """What one could do instead: of the size of the headline, and at 8 bits."""
    if not (sizes := study.instead.sizes):
        return {}
    here = study.instead.finalists(sizes[-1]) if sizes[-1] == headline(study) else []
    found = {alternatives.FORMS[alternatives.form(point.name)][1]: point for point in here}
    found |= {point.name: point for point in study.instead.rounded() if point.name == INT8}
    return {name: point for name, point in found.items() if name not in (SLICEGPT, models.RECIPE)}


def _share_of_bytes(study: Study, point: Point) -> float:
    return alternatives.stored_bytes(study, point) / alternatives.stored_bytes(study, DENSE)


def _limits(studies: list[Study]) -> str:
    """How little the answer rests on."""
    sizes = [f"{study.size(DENSE) / 1e9:.2g}" for study in studies]
    count = "one model" if len(sizes) == 1 else f"{len(sizes)} models"
    absent = set.intersection(*({*claims.not_tested(study)} for study in studies))
    papers = style.listed(sorted(name.rpartition("/")[2] for name in absent))
    none = style.say("answer_absent", models=papers) if absent else ""
    texts = style.listed(dict.fromkeys(study.profile.calibration_text for study in studies))
    of = {"models": count, "sizes": style.listed(sizes), "texts": texts}
    return style.say("answer_limits", **of, absent=none)


def _source(across: Across) -> str:
    measured = " ".join(
        f"{models.name(study)}: {style.device_line(study)}" for study in across.studies
    )
    of = {"share": percent(headline(across.studies[0])), "interval": statistics.INTERVAL}
    return style.say("answer_source", **of, measured=measured)
