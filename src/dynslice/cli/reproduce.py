"""`dynslice reproduce`: a profile from measurements to rendered notebooks."""

import time
from itertools import chain
from pathlib import Path
from typing import Any

from dynslice.cli import rendering
from dynslice.cli.record import agree, agreement_line, of_models
from dynslice.core import files, paths
from dynslice.core.errors import RequestError, RunError
from dynslice.core.paths import shown_path
from dynslice.experiment.across import Across
from dynslice.experiment.agenda import needs
from dynslice.experiment.executor import check_executor
from dynslice.experiment.profile import by_model, load
from dynslice.experiment.store import Request, unique
from dynslice.experiment.study import Study
from dynslice.experiment.validate import check_settings, check_study

# What each notebook needs measured, by its number.
NEEDS = {
    "01": lambda study: study.design.redundancy_requests(),
    "02": lambda study: study.design.perplexity_requests(),
    "03": lambda study: study.design.task_requests(),
    "04": lambda study: study.ablation.requests(),
    "05": lambda study: study.design.efficiency_requests(),
    "06": lambda study: study.requests(),
    "07": lambda study: study.beyond.requests(),
    "08": lambda study: study.requests(),
    "09": lambda study: study.instead.requests(),
}
ACROSS = "08"  # about all models of a profile, so it is rendered once, after them


def run(
    profile: str,
    overrides: dict[str, Any],
    only: list[str] | None = None,
    dry_run: bool = False,
    from_record: bool = False,
    device: str = "auto",
    executor: str = "local",
    address: str | None = None,
    verbose: bool = False,
    machine: str | None = None,
) -> tuple[dict, list[str]]:
    """Measure what is missing, execute the notebooks, and say how the values agree with the record.

    executor, address: see `executor.run_all`. verbose, machine: of a dry run, which then lists each
    measurement, or tells the times of another machine (`estimate.MACHINES`). Returns the outcome as
    a dict and as lines. Raises RequestError before anything heavy starts, RunError when a
    measurement or a notebook fails.
    """
    how = (executor, address)
    check_executor(*how, load(profile, overrides).placement)
    runs, notebooks = [], _notebooks(only)
    for chosen in by_model(profile, overrides):
        study = Study.open(profile, from_record, device, **chosen)
        asked = [request for number in notebooks for request in NEEDS[number](study)]
        runs.append((study, chosen, unique([*chain(*map(needs, asked)), *asked])))
    if dry_run:
        asked = [(study, requests) for study, _, requests in runs]
        return of_models([_dry_run(*pair, verbose, machine, *how) for pair in asked])
    for study, _, requests in runs:
        name = study.profile.name
        results = [] if from_record else [study.store.folder]
        hint = "let it be written, or set DYNSLICE_OUTPUT to another place"
        for place in (*results, paths.figures(name), paths.rendered(name)):
            files.check_writable(place, hint)
        if not from_record:
            _prepare(study, requests, *how)
    outcomes, failed = [], []
    of_each = {number: path for number, path in notebooks.items() if number != ACROSS}
    for study, chosen, requests in runs:
        # One about nothing is rendered only where it is asked for.
        rendered = {n: path for n, path in of_each.items() if only or NEEDS[n](study)}
        try:
            outcomes.append(_run_one(profile, study, chosen, rendered, requests, *how))
        except RunError as error:  # the other models go on
            failed.append(f"{study.profile.name}: {error}" if len(runs) > 1 else str(error))
    if failed:
        raise RunError("\n".join(failed))
    if ACROSS in notebooks:
        rendered = paths.rendered(load(profile, overrides).folder)
        rendering.render({ACROSS: notebooks[ACROSS]}, rendered, profile, runs[0][0], overrides)
    facts, lines = of_models(outcomes)
    index = _site(profile, from_record, device, overrides, runs[0][0])
    return {**facts, "report": index}, [*lines, f"report to read in a browser: {index}"]


def _site(
    profile: str, from_record: bool, device: str, overrides: dict[str, Any], study: Study
) -> str:
    from dynslice.cli.site import write_site

    across = Across.open(profile, from_record, device, **overrides)
    read = {number: needed(study) for number, needed in NEEDS.items()}
    return shown_path(write_site(across, read))


def _dry_run(
    study: Study, requests: list[Request], verbose: bool, machine: str | None, *how: str | None
) -> tuple[dict, list[str]]:
    from dynslice.experiment import preflight
    from dynslice.experiment.estimate import MACHINES

    found = preflight.forecast(study, study.missing(requests), *how, MACHINES.get(machine))
    lines = preflight.lines(study, requests, found, verbose)
    return preflight.facts(study, requests, found), lines


def _prepare(study: Study, requests: list[Request], *how: str | None) -> None:
    """Refuse what cannot run, before anything heavy starts. Raises RequestError."""
    if not (missing := study.missing(requests)):
        return
    from dynslice.core import assets
    from dynslice.experiment import preflight
    from dynslice.inputs import models

    assets.fetch()
    if whole := models.unfetched(study.profile.model):
        assets.fetch(whole.name)
    if not preflight.is_remote(study.profile.model):  # of the others the forecast says why not
        check_settings(study.profile)
    if obstacles := preflight.forecast(study, missing, *how).obstacles:
        raise RequestError(obstacles[0])
    check_study(study)


def _run_one(
    profile: str,
    study: Study,
    overrides: dict[str, Any],
    notebooks: dict[str, Path],
    requests: list[Request],
    *how: str | None,
) -> tuple[dict, list[str]]:
    start, name = time.perf_counter(), study.profile.name
    measured = study.ensure(requests, *how)
    measuring = time.perf_counter() - start

    rendered = paths.rendered(name)
    rendering.render(notebooks, rendered, profile, study, overrides)
    seconds = time.perf_counter() - start

    outcome = {
        "profile": name,
        "measured": measured,
        "measurements": len(requests),
        "seconds": round(seconds, 1),
        "notebooks": shown_path(rendered),
        "figures": shown_path(paths.figures(name)),
        "agreement": None if study.from_record else agree(study, requests),
    }
    places = [
        f"profile {name} took {_minutes(seconds)}",
        f"rendered notebooks: {outcome['notebooks']}",
        f"figures and tables: {outcome['figures']}",
    ]
    if study.from_record:
        return outcome, [f"rendered {len(requests)} measurements of the record", *places]
    stored = ", the others were in the store" if measured < len(requests) else ""
    line = f"measured {measured} of {len(requests)} values in {_minutes(measuring)}{stored}"
    return outcome, [line, *places, agreement_line(outcome["agreement"], study.profile.stored_as)]


def _notebooks(only: list[str] | None) -> dict[str, Path]:
    """Notebook sources by number, all or the chosen ones, in order."""
    every = {path.name[:2]: path for path in sorted(paths.NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))}
    if not every:
        raise RequestError(
            f"no notebooks in {shown_path(paths.NOTEBOOKS)}; run from a checkout of the repository"
        )
    for name in only or []:
        number = Path(name).name[:2]
        if number not in every or not every[number].stem.startswith(Path(name).stem):
            have = ", ".join(path.stem for path in every.values())
            raise RequestError(f"notebook {name!r} is unknown; there are {have}")
    numbers = every if only is None else sorted({Path(name).name[:2] for name in only})
    return {number: every[number] for number in numbers}


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
