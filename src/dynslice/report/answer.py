"""The README's first screen: what was found on all models, in sentences, a figure and a table."""

import json
from collections import Counter
from pathlib import Path

import pandas as pd

from dynslice.core import paths
from dynslice.evaluate.task_table import chance
from dynslice.experiment.across import Across
from dynslice.experiment.equal_size import SLICEGPT
from dynslice.experiment.profile import percent
from dynslice.experiment.requests import DENSE, Point
from dynslice.experiment.study import Study
from dynslice.report import across as models
from dynslice.report import alternatives, claims, equal_size, short, statistics, style, variants
from dynslice.report.statistics import EQUAL_SIZE, SIZE

INT8 = "int8"
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
    """Whether every study has the four networks of the answer at its headline."""
    return all(len(_networks(study)) == 4 for study in across.studies)


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
    """A row for each model and network at the headline slice percentage, in absolute values.

    The last column is the paired change of perplexity from SliceGPT on the first text.
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
    """What slicing costs, the claims, the levers, what LR does, what else there is; the limits.

    Each with the numbers of the models in their order.
    """
    said = (_cost, _claims, _levers, _first_layer, instead, _limits)
    told = [say(across.studies) for say in said]
    absent = ", ".join(f"`{profile}`" for profile in across.absent)
    told += [style.say("across_absent", profiles=absent)] if absent else []
    return "\n".join(f"- {sentence}" for sentence in filter(None, told))


def _cost(studies: list[Study]) -> str:
    """What SliceGPT saves, and how far above the dense model each network is."""
    saved, above = [], {SLICEGPT: [], models.DYNAMIC: [], models.RECIPE: []}
    for study in studies:
        here, text = _networks(study), study.profile.calibration_text
        saved.append(f"{100 * (1 - study.size(here[SLICEGPT]) / study.size(DENSE)):.0f}")
        dense = study.perplexity(DENSE, text)
        for network, told in above.items():
            told.append(f"{100 * (study.perplexity(here[network], text) / dense - 1):.0f}")
    rises = map(style.listed, above.values())
    return style.say(
        "answer_cost",
        models=style.listed(map(models.name, studies))
        + " (numbers in this order)" * (len(saved) > 1),
        share=percent(headline(studies[0])),
        saved=style.listed(saved),
        **dict(zip(("slicegpt", "dynamic", "recipe"), rises, strict=True)),
    )


def _claims(studies: list[Study]) -> str:
    """By claim: on which models it holds, graded on the text of the calibration at equal size."""
    found = []
    for study in studies:
        read = (study.profile.calibration_text, claims.TASKS_ON_AVERAGE)
        for o in claims.outcomes(study):
            if o["at"] == EQUAL_SIZE and o["measured on"] in read:
                on = f"{models.name(study)} ({o['measured']})"
                found.append((claims.claimed(o), o["verdict on this model"], on))
    return style.say("answer_claims", claims=claims.by_verdict(found))


def _levers(studies: list[Study]) -> str:
    """The steps of the ladder from SliceGPT to the recipe, each against the one before."""
    changes: dict[str, list[str]] = {}
    for study in studies:
        for step, change in equal_size.steps(study, headline(study)).items():
            changes.setdefault(step, []).append(change.told("%"))
    steps = "; ".join(f"{step} {style.listed(told)}" for step, told in changes.items())
    return style.say("answer_levers", share=percent(headline(studies[0])), steps=steps)


def _first_layer(studies: list[Study]) -> str:
    """What the rule changes that keeps the first layer whole, in place of LR, on validation."""
    if not (changes := list(filter(None, map(variants.first_layer_rule, studies)))):
        return ""
    levers = {key: style.listed(of[key].format("%") for of in changes) for key in changes[0]}
    said = Counter(change.direction for of in changes for change in of.values())
    shown = style.listed(f"{way} in {count} of {said.total()}" for way, count in said.items())
    return style.say("answer_first", **levers, shown=shown)


def instead(studies: list[Study]) -> str:
    """What fewer bits cost, and whether a slice is worth its bytes; empty where none was asked."""
    if not (studies := [study for study in studies if study.instead.sizes]):
        return ""
    shares, changes, fronts = [], {}, []
    for study in studies:
        rounded, texts = _others(study)[INT8], study.profile.eval_texts
        shares.append(f"{100 * _share_of_bytes(study, rounded):.0f}")
        for text in texts:
            change = statistics.perplexity_change(study, rounded, DENSE, text)
            changes.setdefault(text, []).append(f"{change.estimate:+.1f}")
        table = alternatives.alternatives_table(study)
        slices = alternatives.slices_of(alternatives.fronts_of(table, texts))
        fronts.append(f"{', '.join(slices) or 'none'} on {models.name(study)}")
    return style.say(
        "answer_instead",
        models=style.listed(map(models.name, studies)),
        shares=style.listed(shares),
        changes=style.listed(f"{style.listed(of)} % on {text}" for text, of in changes.items()),
        slices="; ".join(fronts),
    )


def _others(study: Study) -> dict[str, Point]:
    """What one could do instead, at the last of its sizes and at 8 bits."""
    if not study.instead.sizes:
        return {}
    finalists = study.instead.finalists(study.instead.sizes[-1])
    called = {alternatives.FORMS[alternatives.form(p.name)][1]: p for p in finalists}
    rounded = {p.name: p for p in study.instead.rounded()}
    return {**called, INT8: rounded[INT8]}


def _share_of_bytes(study: Study, point: Point) -> float:
    return alternatives.stored_bytes(study, point) / alternatives.stored_bytes(study, DENSE)


def _limits(studies: list[Study]) -> str:
    """How little the answer rests on."""
    sizes = [f"{study.size(DENSE) / 1e9:.2g}" for study in studies]
    count = "One model" if len(sizes) == 1 else f"{len(sizes)} models"
    return style.say("answer_limits", models=count, sizes=style.listed(sizes))


def _source(across: Across) -> str:
    measured = " ".join(
        f"{models.name(study)}: {style.device_line(study)}" for study in across.studies
    )
    return style.say("answer_source", interval=statistics.INTERVAL, measured=measured)
