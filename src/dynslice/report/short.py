"""What opens each notebook: its findings in a few generated lines."""

from collections.abc import Iterable

from dynslice.evaluate.task_table import chance
from dynslice.experiment.across import Across
from dynslice.experiment.profile import percent
from dynslice.experiment.study import Study
from dynslice.report import ablations as changed
from dynslice.report import across as models
from dynslice.report import (
    alternatives,
    claims,
    efficiency,
    equal_size,
    single_layer,
    statistics,
    style,
)
from dynslice.report.statistics import BASES, Estimate

REDUNDANT = 0.9  # LR above which a layer hardly turns the stream


def _said(lines: Iterable[str]) -> str:
    told = [line for line in lines if line and line != style.NONE]
    return "\n".join(["**In short**", "", *(f"- {line}" for line in told)]) if told else style.NONE


def redundancy(study: Study) -> str:
    """Of notebook 01: how alike the layers are, and what widths follow."""
    lr, p = study.lr(), study.profile
    plan = study.get(study.design.figure_request()).value
    lowest = min(range(len(lr)), key=lr.__getitem__)
    others = [cut for layer, cut in enumerate(plan["final_slice"]) if layer != lowest]
    alike = {
        "alike": sum(round(x, 3) >= REDUNDANT for x in lr),  # as the table shows them
        "layers": len(lr),
        "limit": REDUNDANT,
        "lowest": lowest,
        "least": lr[lowest],
    }
    widths = {
        "at": f"SP {percent(p.figure_slice_percentage)}, SB {percent(p.figure_slice_base)}",
        "lowest": lowest,
        "cut": 100 * plan["final_slice"][lowest],
        "low": 100 * min(others),
        "high": 100 * max(others),
    }
    return _said([style.say("short_alike", **alike), style.say("short_widths", **widths)])


def perplexity(study: Study) -> str:
    """Of notebook 02: the change from constant to dynamic slicing on each basis and text."""
    study.ensure(study.design.perplexity_requests())
    texts, lines = study.profile.eval_texts, []
    for basis in BASES:
        pair = statistics.chosen(study, basis) or statistics.best(study, basis, texts[0])
        if pair:
            changes = {t: statistics.perplexity_change(study, *pair[:2], t) for t in texts}
            network = f"{pair[0].label} ({claims.how(study)})"
            lines.append(_changes("perplexity", basis, network, changes, "%"))
    return _said(lines)


def tasks(study: Study) -> str:
    """Of notebook 03: accuracy of the dense model, of chance, and what dynamic slicing changes."""
    study.ensure(study.design.task_requests())
    names, lines = statistics.choice_tasks(study), []
    if not names:
        return style.NONE
    for basis in BASES:
        pairs = statistics.pairs(study.task_points(), basis)
        changes, margins = (
            {a.label: change(study, a, b, names) for a, b, _ in pairs}
            for change in (statistics.accuracy_change, statistics.margin_change)
        )
        if pairs:
            told = _changes("accuracy", basis, "on average", changes, "points")
            lines.append(style.say("short_margin", told=told, margins=_listed(margins, "nats", 2)))
    levels = [statistics.accuracy(study, point, names) for point in study.task_points()]
    of = {"dense": levels[0], "chance": chance(names)}
    of |= {"low": min(levels[1:], default=levels[0]), "high": max(levels[1:], default=levels[0])}
    return _said([style.say("short_tasks", **of), *lines])


def _changes(what: str, basis: str, network: str, changes: dict[str, Estimate], unit: str) -> str:
    told = _listed(changes, unit)
    return style.say("short_change", what=what, basis=basis, network=network, changes=told)


def _listed(changes: dict[str, Estimate], unit: str, digits: int = 1) -> str:
    return ", ".join(f"{on} {x.format(unit, digits)} ({x.direction})" for on, x in changes.items())


def ablations(study: Study) -> str:
    """Of notebook 04: what the ablations say of the paper's idea."""
    study.ensure(study.ablation.requests())
    if not study.ablation.variants():
        return style.say("short_no_ablations")
    losses, orders = single_layer.table(study), changed.shuffle_table(study)
    lines = [changed.seed_prose(changed.seed_table(study))]
    if len(losses) - 2 >= single_layer.FEWEST_LAYERS:
        rho = single_layer.rank_correlation(losses.iloc[1:-1])
        says = style.say(f"single_layer_{rho.direction}")
        of = {"rho": rho.format(digits=2), "layers": len(losses) - 2, "says": says}
        lines.insert(0, style.say("short_predicts", **of))
    if len(orders):
        random = orders[orders["order of the widths"].str.startswith("shuffled")]
        worse = int((random["low, LR"] > 0).sum())
        of = {"orders": len(random), "worse": worse, "changes": random[changed.BY_LR].describe()}
        of["first"] = changed.first_moves(study)
        lines.append(style.say("short_orders", **of))
    return _said(lines)


def costs(study: Study) -> str:
    """Of notebook 05: what networks store, and whether what was cut arrives as time."""
    sizes = efficiency.size_table(study)
    dense, *sliced = sizes["against dense (%)"]
    low, high = min(sliced, default=dense), max(sliced, default=dense)
    lines = [style.say("short_sizes", low=low, high=high)]
    speeds = efficiency.speed_table(study)
    for step, rows in speeds.groupby("step") if len(speeds) else ():
        of = {"step": step.capitalize(), "gain": rows["gain (x)"].describe()}
        of["counted"] = rows["gain / counted"].describe()
        lines.append(style.say("short_speed", **of))
    for name, bench in efficiency.benches().items():
        if bench["model"] != study.profile.model:
            continue
        table = efficiency.bench_table(bench)
        limited = table[table["met"] != "-"]
        missed = (limited["met"] == "no").groupby(limited["step"].str.partition(",")[0], sort=False)
        named = ", ".join(f"{x.sum()} of {len(x)} of {step}" for step, x in missed if x.any())
        of = {"met": sum(limited["met"] == "yes"), "count": len(limited)}
        lines.append(style.say("short_bench", name=name, missed=named or "none", **of))
    return _said(lines)


def verdicts(study: Study) -> str:
    """Of notebook 06: the verdict on each claim, by basis."""
    study.ensure(study.requests())
    lines = []
    for basis in BASES:
        said = claims.by_verdict(
            (claims.claimed(o), o["verdict on this model"], o["measured on"])
            for o in claims.outcomes(study)
            if o["at"] == basis and o["change"]
        )
        lines += [style.say("short_verdicts", basis=basis, said=said)] if said else []
    return _said(lines)


def ladder(study: Study) -> str:
    """Of notebook 07: what each step and the whole recipe change at each size."""
    study.ensure(study.beyond.requests())
    lines = [equal_size.steps_prose(study, sp) for sp in equal_size.ladders(study)]
    return _said(lines)


def across(compared: Across) -> str:
    """Of notebook 08: on which models each claim is supported."""
    compared.ensure()
    told = models.claims_prose(compared)
    return _said(line.removeprefix("- ") for line in told.splitlines())


def instead(study: Study) -> str:
    """Of notebook 09: what beats slicing at equal bytes, and what does not."""
    told = alternatives.prose(study, alternatives.alternatives_table(study))
    return _said(line.removeprefix("- ") for line in told.splitlines())


# What each notebook finds in one study, by its number.
FINDINGS = {
    "01": redundancy,
    "02": perplexity,
    "03": tasks,
    "04": ablations,
    "05": costs,
    "06": verdicts,
    "07": ladder,
    "09": instead,
}


def first(told: str) -> str:
    """The first bullet of an opening; nothing where there is none."""
    bullets = [line for line in told.splitlines() if line.startswith("- ")]
    return bullets[0].removeprefix("- ") if bullets else ""
