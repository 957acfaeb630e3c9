"""`dynslice reproduce`: a profile from measurements to rendered notebooks."""

import json
import logging
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from dynslice.cli.record import agree, agreement_line, of_models
from dynslice.core import files, interrupt, paths
from dynslice.core.errors import RequestError, RunError
from dynslice.core.paths import shown_path
from dynslice.experiment.across import Across
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
        runs.append((study, chosen, unique([r for n in notebooks for r in NEEDS[n](study)])))
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
        try:
            outcomes.append(_run_one(profile, study, chosen, of_each, requests, *how))
        except RunError as error:  # the other models go on
            failed.append(f"{study.profile.name}: {error}" if len(runs) > 1 else str(error))
    if failed:
        raise RunError("\n".join(failed))
    if ACROSS in notebooks:
        rendered = paths.rendered(load(profile, overrides).folder)
        _render({ACROSS: notebooks[ACROSS]}, rendered, profile, runs[0][0], overrides)
    facts, lines = of_models(outcomes)
    index = _site(profile, from_record, device, overrides, runs[0][0])
    return {**facts, "report": index}, [*lines, f"report to read in a browser: {index}"]


def _site(
    profile: str, from_record: bool, device: str, overrides: dict[str, Any], study: Study
) -> str:
    from dynslice.cli.site import write_site

    across = Across.open(profile, from_record, device, **overrides)
    needs = {number: needed(study) for number, needed in NEEDS.items()}
    return shown_path(write_site(across, needs))


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

    assets.fetch()
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
    _render(notebooks, rendered, profile, study, overrides)
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
    return outcome, [line, *places, agreement_line(outcome["agreement"], name)]


def _render(
    notebooks: dict[str, Path],
    rendered: Path,
    profile: str,
    study: Study,
    overrides: dict[str, Any],
) -> None:
    """Execute notebooks with the overrides of a run; a study says from where and on what device."""
    # A notebook's own None keeps the profile's value, and its texts are read as YAML.
    chosen = {key: "null" if value is None else value for key, value in overrides.items()}
    where = {"from_record": study.from_record, "device": study.device}
    waiting = "another run renders the notebooks; waiting for it"
    with files.claim(rendered / ".rendering", partial(print, waiting, file=sys.stderr)):
        for position, path in enumerate(notebooks.values(), start=1):
            print(f"notebook {position} of {len(notebooks)}: {path.stem}", file=sys.stderr)
            _execute(path, rendered / path.name, {"profile": profile, **where, **chosen})


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


def _execute(source: Path, target: Path, parameters: dict[str, Any]) -> None:
    """Run a notebook by papermill; `target` appears when it is complete."""
    import papermill
    from nbclient.exceptions import DeadKernelError

    # It warns of parameters that a notebook's cell does not list; the study checks them all.
    logging.getLogger("papermill").setLevel(logging.ERROR)
    with files.scratch(target.parent) as scratch, ThreadPoolExecutor(1) as thread:
        unfinished = scratch / target.name
        running = thread.submit(  # in a thread no signals reach it, which it would take for itself
            papermill.execute_notebook,
            str(source),
            str(unfinished),
            parameters,
            cwd=os.getcwd(),  # relative paths of models and texts mean what they mean here
            kernel_name="python3",
            progress_bar=sys.stderr.isatty(),
            extra_arguments=["--log-level=50"],  # no advice, and no word of an interrupt at its end
        )
        try:
            running.result()
        except KeyboardInterrupt:
            interrupt.kill_children()
            raise
        except papermill.PapermillExecutionError as error:
            raise RunError(
                f"notebook {source.name} failed: {error.ename}: {error.evalue}; open it in "
                "Jupyter to see the cell"
            ) from error
        except DeadKernelError as error:
            raise RunError(
                f"the kernel of notebook {source.name} died; is there memory enough? The same "
                "command again goes on from there"
            ) from error
        content = json.loads(unfinished.read_text(encoding="utf-8"))
        # Paths and clock times of this machine do not belong in a rendered notebook.
        for part in (content, *content["cells"]):
            part["metadata"].pop("papermill", None)
            part["metadata"].pop("execution", None)
        unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(unfinished, target)


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
