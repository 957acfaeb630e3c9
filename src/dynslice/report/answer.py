"""The README's first screen: what was found on all models, in a figure, sentences and a table."""

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from dynslice.core import paths
from dynslice.evaluate.task_table import chance
from dynslice.experiment.across import Across
from dynslice.experiment.equal_size import SHARED, SLICEGPT
from dynslice.experiment.profile import percent
from dynslice.experiment.requests import DENSE, Point
from dynslice.experiment.study import Study
from dynslice.report import across as models
from dynslice.report import alternatives, claims, equal_size, short, statistics, style
from dynslice.report.statistics import EQUAL_SIZE, SIZE

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
    """The figure, the sentences, the table and where they come from (Markdown)."""
    across.ensure()
    parts = [style.say("answer_figure", profile=across.name), _sentences(across)]
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
        for network, point in here.items():
            row = {"model": models.name(study), "network": network}
            row[SIZE] = study.size(point) / 1e6
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
    """One sentence each: what slicing costs, the paper's claims, the levers, and what LR does."""
    asked = (_cost_clause, _lever_clause, _first_layer_clause, instead_clause)
    cost, levers, rule, instead = (_for_each(across, told) for told in asked)
    share = percent(headline(across.studies[0]))
    told = [
        style.say("answer_cost", share=share, clauses=cost),
        style.say("answer_claims", claims=_verdicts(across)),
        style.say("answer_levers", share=share, clauses=levers),
    ]
    told += [style.say("answer_first", clauses=rule)] if rule else []
    told += [style.say("answer_instead", clauses=instead)] if instead else []
    absent = ", ".join(f"`{profile}`" for profile in across.absent)
    told += [style.say("across_absent", profiles=absent)] if absent else []
    return "\n".join(f"- {sentence}" for sentence in told)


def _for_each(across: Across, clause: Callable[[Study], str]) -> str:
    return "; ".join(filter(None, map(clause, across.studies)))


def _cost_clause(study: Study) -> str:
    here, text = _networks(study), study.profile.calibration_text
    levels = {name: study.perplexity(point, text) for name, point in here.items()}
    named = {"dense": DENSE.schedule, "slicegpt": SLICEGPT}
    named |= {"dynamic": models.DYNAMIC, "recipe": models.RECIPE}
    return style.say(
        "answer_cost_clause",
        model=models.name(study),
        stored=study.size(here[SLICEGPT]) / 1e6,
        whole=study.size(DENSE) / 1e6,
        **{key: levels[name] for key, name in named.items()},
    )


def _verdicts(across: Across) -> str:
    """By claim: on which models it holds, graded on the text of the calibration at equal size."""
    found = []
    for study in across.studies:
        read = (study.profile.calibration_text, claims.TASKS_ON_AVERAGE)
        for o in claims.outcomes(study):
            if o["at"] == EQUAL_SIZE and o["measured on"] in read:
                on = f"{models.name(study)} ({o['measured']}, {o['network']})"
                found.append((claims.claimed(o), o["verdict on this model"], on))
    return claims.by_verdict(found)


def _lever_clause(study: Study) -> str:
    """The steps of the ladder from SliceGPT to the recipe, each against the one before."""
    return f"{models.name(study)}: {equal_size.steps(study, headline(study))}"


def _first_layer_clause(study: Study) -> str:
    """What the rule changes that keeps the first layer whole, in place of LR, on validation."""
    if "first" not in study.profile.beyond_candidates or study.profile.selection_windows is None:
        return ""
    sp = study.profile.beyond_slice_percentages[-1]
    rungs = study.beyond.contest(sp)
    tried = {point.name: point for point in study.beyond.variants(sp)}
    pairs = {"shared bases": SHARED, "compensation": equal_size.BEST_RECIPE}
    told = []
    for lever, by_lr in pairs.items():
        rule = tried[f"first widths, {lever}"]
        change = statistics.selection_change(study, rule, equal_size.rung(rungs, by_lr))
        told.append(f"with {lever} {change.format('%')} ({change.direction})")
    return f"on {models.name(study)} at the size of SP {percent(sp)} {', '.join(told)}"


def instead_clause(study: Study) -> str:
    """What else keeps one size, and the dense model at fewer bits; empty where none was asked."""
    if not study.instead.sizes:
        return ""
    sp, texts = study.instead.sizes[-1], study.profile.eval_texts
    said = []
    for point in study.instead.finalists(sp):
        _mark, called = alternatives.FORMS[alternatives.form(point.name)]
        said.append(f"{called} {alternatives.levels(study, point)}")
    clause = f"{', '.join(said)} (size of SP {percent(sp)})"
    for point in (p for p in study.instead.rounded() if "uniform" in p.network["bits"]):
        share = alternatives.stored_bytes(study, point) / alternatives.stored_bytes(study, DENSE)
        clause += f", {point.name} {alternatives.levels(study, point)} ({share:.0%} of the bytes)"
    fronts = alternatives.fronts_of(alternatives.alternatives_table(study), texts)
    slices = ", ".join(alternatives.slices_of(fronts)) or "none"
    return style.say(
        "answer_instead_clause",
        model=models.name(study),
        texts=" and ".join(texts),
        levels=clause,
        slices=slices,
    )


def _source(across: Across) -> str:
    measured = " ".join(
        f"{models.name(study)}: {style.device_line(study)}" for study in across.studies
    )
    return style.say("answer_source", interval=statistics.INTERVAL, measured=measured)
