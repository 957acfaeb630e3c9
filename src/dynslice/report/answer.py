"""The README's first screen: what was found on all models, in sentences, a figure and a table."""

import json
from collections import Counter
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
    """The sentences, the figure, the table and where they come from (Markdown)."""
    across.ensure()
    parts = [_sentences(across), style.say("answer_figure", profile=across.name)]
    parts += [style.markdown(answer_table(across), digits=1), _source(across)]
    return "\n\n".join(parts)


def headline(study: Study) -> float:
    """The slice percentage that the answer is about: the smallest at which tasks are run."""
    p = study.profile
    return min(p.task_slice_percentages or p.slice_percentages)


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


def _sentences(across: Across) -> str:
    """The answer in short with its limits; then what slicing costs, the claims, the levers, what LR
    does and what else there is, each with the numbers of the models in their order.
    """
    said = (_cost, _claims, _levers, _first_layer, instead)
    told = [say(across.studies) for say in said]
    absent = ", ".join(f"`{profile}`" for profile in across.absent)
    told += [style.say("across_absent", profiles=absent)] if absent else []
    first = f"{_lead(across.studies)} {_limits(across.studies)}"
    return "\n".join([first, "", *(f"- {sentence}" for sentence in filter(None, told))])


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
    saved = []
    above: dict[str, dict[str, list[str]]] = {key: {} for key in named}
    for study in studies:
        here = _networks(study)
        saved.append(f"{100 * (1 - study.size(here[SLICEGPT]) / study.size(DENSE)):.0f}")
        for text, (key, network) in product(study.profile.eval_texts, named.items()):
            rise = study.perplexity(here[network], text) / study.perplexity(DENSE, text) - 1
            above[key].setdefault(text, []).append(f"{100 * rise:.0f}")
    return style.say(
        "answer_cost",
        models=style.listed(map(models.name, studies))
        + " (numbers in this order)" * (len(saved) > 1),
        share=percent(headline(studies[0])),
        saved=style.listed(saved),
        **{key: _by_text(rises) for key, rises in above.items()},
    )


def _by_text(rises: dict[str, list[str]]) -> str:
    return style.listed(f"on {text} by {style.listed(of)} %" for text, of in rises.items())


def _judged(study: Study) -> list[dict]:
    """The claims at equal size, on the text of the calibration and on the tasks on average."""
    read = (study.profile.calibration_text, claims.TASKS_ON_AVERAGE)
    of_size = (o for o in claims.outcomes(study) if o["at"] == EQUAL_SIZE and o["change"])
    return [o for o in of_size if o["measured on"] in read]


def _claims(studies: list[Study]) -> str:
    """By claim: on which models it holds."""
    found = [
        (
            claims.claimed(o),
            o["verdict on this model"],
            f"{models.name(study)} ({o['measured']}; {o['network'].removeprefix('dynamic, ')})",
        )
        for study in studies
        for o in _judged(study)
    ]
    return style.say("answer_claims", claims=claims.by_verdict(found))


def _levers(studies: list[Study]) -> str:
    """The steps of the ladder from SliceGPT to the recipe, each against the one before."""
    changes: dict[str, list[str]] = {}
    raised = []
    for study in studies:
        at = {sp: equal_size.steps(study, sp) for sp in equal_size.ladders(study)}
        for step, change in at.pop(headline(study)).items():
            changes.setdefault(step, []).append(change.told("%"))
        raised += [
            f"{step} on {models.name(study)} at SP {percent(sp)} ({change.format('%')})"
            for sp, steps in at.items()
            for step, change in steps.items()
            if change.direction == "higher"
        ]
    steps = "; ".join(f"{step} {style.listed(told)}" for step, told in changes.items())
    more = style.say("answer_raised", steps=style.listed(raised)) if raised else ""
    share = percent(headline(studies[0]))
    return style.say("answer_levers", share=share, steps=steps, raised=more).rstrip()


def _first_layer(studies: list[Study]) -> str:
    """What the rule changes that keeps the first layer whole, in place of LR, on validation."""
    found = [(study, of) for study in studies if (of := variants.first_layer_rule(study))]
    if not found:
        return ""
    levers = {
        key: style.listed(of[key].format("%") for _, of in found) for key in ("shared", "whole")
    }
    said = Counter(change.direction for _, of in found for change in of.values())
    shown = style.listed(f"{way} in {count} of {said.total()}" for way, count in said.items())
    shares = style.listed(percent(equal_size.last_ladder(study)[0]) for study, _ in found)
    return style.say("answer_first", **levers, shown=shown.capitalize(), shares=shares)


def instead(studies: list[Study]) -> str:
    """What fewer bits cost, and whether a slice is worth its bytes; empty where none was asked."""
    if not (studies := [study for study in studies if INT8 in _others(study)]):
        return ""
    shares, fronts = [], []
    changes: dict[str, list[str]] = {}
    for study in studies:
        rounded, texts = _others(study)[INT8], study.profile.eval_texts
        shares.append(f"{100 * _share_of_bytes(study, rounded):.0f}")
        for text in texts:
            change = statistics.perplexity_change(study, rounded, DENSE, text)
            changes.setdefault(text, []).append(f"{change.estimate:+.1f}")
        found = alternatives.fronts_of(alternatives.alternatives_table(study), texts)
        for text, names in found.items():
            slices = alternatives.slices_of({text: names})
            fronts += [f"on {models.name(study)} and {text} {style.listed(slices)}"] * bool(slices)
    return style.say(
        "answer_instead",
        models=style.listed(map(models.name, studies)),
        shares=style.listed(shares),
        changes=style.listed(f"{style.listed(of)} % on {text}" for text, of in changes.items()),
        share=percent(studies[0].instead.sizes[-1]),
        lowest=_lowest(studies),
        slices="; ".join(fronts) or "none",
    )


def _lowest(studies: list[Study]) -> str:
    """What has the lowest perplexity at the last size, by text."""
    lowest: dict[str, list[str]] = {}
    for study, text in ((s, text) for s in studies for text in s.profile.eval_texts):
        finalists = study.instead.finalists(study.instead.sizes[-1])
        levels = {point.name: study.perplexity(point, text) for point in finalists}
        form = alternatives.form(min(levels, key=levels.get))
        lowest.setdefault(text, []).append(alternatives.FORMS[form][1])
    return style.listed(f"{style.listed(of)} on {text}" for text, of in lowest.items())


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
    return style.say("answer_limits", models=count, sizes=style.listed(sizes), absent=none)


def _source(across: Across) -> str:
    measured = " ".join(
        f"{models.name(study)}: {style.device_line(study)}" for study in across.studies
    )
    return style.say("answer_source", interval=statistics.INTERVAL, measured=measured)
