"""`dynslice reproduce` and `dynslice record`: a profile from measurements to rendered notebooks."""

import json
import logging
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from math import exp
from pathlib import Path
from statistics import fmean
from typing import Any

from dynslice import claims, costs, files, interrupt, paths
from dynslice.design import unique
from dynslice.errors import RequestError, RunError
from dynslice.executor import check as check_executor
from dynslice.profile import load as load_profile
from dynslice.results import Measurement, Result, Store
from dynslice.study import Study, check, check_settings

# What each notebook needs measured, by its number.
NEEDS = {
    "01": Study.redundancy_requests,
    "02": Study.perplexity_requests,
    "03": Study.task_requests,
    "04": Study.ablation_requests,
    "05": Study.efficiency_requests,
    "06": Study.requests,
    "07": Study.beyond_requests,
}

# The pages with parts that a record speaks for, between its markers.
PAGES = {
    paths.ROOT / "README.md": claims.readme_block,
    paths.ROOT / "docs" / "deviations.md": claims.deviations_block,
}


def run(
    profile: str,
    overrides: dict[str, Any],
    only: list[str] | None = None,
    dry_run: bool = False,
    from_record: bool = False,
    device: str = "auto",
    executor: str = "local",
    address: str | None = None,
) -> tuple[dict, list[str]]:
    """Measure what is missing, execute the notebooks, and say how the values agree with the record.

    executor, address: see `executor.work_off`. Returns the outcome as a dict and as lines. Raises
    RequestError before anything heavy starts, RunError when a measurement or a notebook fails.
    """
    check_executor(executor, address, load_profile(profile, overrides).placement)
    runs = []
    for chosen in _by_model(profile, overrides):
        study = Study.open(profile, from_record, device, **chosen)
        notebooks = _notebooks(only)
        requests = unique([r for number in notebooks for r in NEEDS[number](study)])
        runs.append((study, chosen, notebooks, requests))
    if dry_run:
        return _dry_run([(study, requests) for study, _, _, requests in runs], executor, address)
    for study, _, _, requests in runs:
        _check_places(study)
        if not from_record:
            _prepare(study, requests, executor, address)
    outcomes, failed = [], []
    for run_ in runs:
        try:
            outcomes.append(_run_one(profile, *run_, executor, address))
        except RunError as error:  # the other models go on
            failed.append(f"{run_[0].profile.name}: {error}" if len(runs) > 1 else str(error))
    if failed:
        raise RunError("\n".join(failed))
    facts = [outcome for outcome, _ in outcomes]
    lines = [line for _, lines in outcomes for line in lines]
    return facts[0] if len(facts) == 1 else {"models": facts}, lines


def _by_model(profile: str, overrides: dict[str, Any]) -> list[dict[str, Any]]:
    """The overrides of each run that a profile asks for: one for each of its models."""
    models = load_profile(profile, overrides).models
    if "model" in overrides or not models:
        return [overrides]
    return [{**overrides, "model": model} for model in models]


def _dry_run(
    planned: list[tuple[Study, list[Measurement]]], executor: str, address: str | None
) -> tuple[dict, list[str]]:
    from dynslice import preflight

    facts, lines = [], []
    for study, requests in planned:
        found = preflight.forecast(study, study.missing(requests), executor, address)
        facts.append(preflight.facts(study, requests, found))
        lines += preflight.lines(study, requests, found)
    return facts[0] if len(facts) == 1 else {"models": facts}, lines


def _check_places(study: Study) -> None:
    """Refuse places that cannot be written, before anything heavy starts. Raises RequestError."""
    name = study.profile.name
    results = [] if study.from_record else [study.store.folder]
    for place in (*results, paths.figures(name), paths.rendered(name)):
        files.check_writable(place, "let it be written, or set DYNSLICE_OUTPUT to another place")


def _prepare(study: Study, requests: list[Measurement], executor: str, address: str | None) -> None:
    """Refuse what cannot run, before anything heavy starts. Raises RequestError."""
    missing = study.missing(requests)
    if not missing:
        return
    from dynslice import assets, preflight

    assets.fetch()
    if not preflight.is_remote(study.profile.model):  # of the others the forecast says why not
        check_settings(study.profile)
    if obstacles := preflight.forecast(study, missing, executor, address).obstacles:
        raise RequestError(obstacles[0])
    check(study.profile)


def _run_one(
    profile: str,
    study: Study,
    overrides: dict[str, Any],
    notebooks: dict[str, Path],
    requests: list[Measurement],
    executor: str,
    address: str | None,
) -> tuple[dict, list[str]]:
    start = time.perf_counter()
    from_record = study.from_record
    measured = study.ensure(requests, executor, address)
    measuring = time.perf_counter() - start

    parameters = {"profile": profile, "from_record": from_record}
    # A notebook's own None keeps the profile's value, and its texts are read as YAML.
    given = {name: "null" if value is None else value for name, value in overrides.items()}
    parameters |= {"device": study.device, **given}
    rendered = paths.rendered(study.profile.name)
    with files.claim(rendered / ".rendering", _say_waiting):
        for position, path in enumerate(notebooks.values(), start=1):
            print(f"notebook {position} of {len(notebooks)}: {path.stem}", file=sys.stderr)
            _execute(path, rendered / path.name, parameters)
    seconds = time.perf_counter() - start

    agreement = None if from_record else agree(study, requests)
    outcome = {
        "profile": study.profile.name,
        "measured": measured,
        "measurements": len(requests),
        "seconds": round(seconds, 1),
        "notebooks": _shown(paths.rendered(study.profile.name)),
        "figures": _shown(paths.figures(study.profile.name)),
        "agreement": agreement,
    }
    lines = [
        f"rendered {len(requests)} measurements of the record"
        if from_record
        else f"measured {measured} of {len(requests)} values in {_minutes(measuring)}"
        + (", the others were in the store" if measured < len(requests) else ""),
        f"profile {study.profile.name} took {_minutes(seconds)}",
        f"rendered notebooks: {outcome['notebooks']}",
        f"figures and tables: {outcome['figures']}",
    ]
    if not from_record:
        lines.append(_agreement_line(agreement, study.profile.name))
    return outcome, lines


def _say_waiting() -> None:
    print("another run renders the notebooks; waiting for it", file=sys.stderr)


def record(profile: str) -> tuple[dict, list[str]]:
    """Copy the results of a complete run of a clean tree to data/record/<profile>.

    Raises RequestError when results are missing or were not all measured at one clean commit, of
    this project and of what the hub gave.
    """
    recorded = [_record_one(profile, chosen) for chosen in _by_model(profile, {})]
    facts = [outcome for outcome, _ in recorded]
    lines = [line for _, line in recorded]
    return facts[0] if len(facts) == 1 else {"models": facts}, lines


def _record_one(profile: str, chosen: dict[str, Any]) -> tuple[dict, str]:
    study = Study.open(profile, **chosen)
    requests = study.requests()
    if missing := study.missing(requests):
        raise RequestError(
            f"profile {profile!r} lacks {len(missing)} of {len(requests)} measurements; run "
            f"`dynslice reproduce --profile {profile}` first"
        )
    results = [study.store.get(request) for request in requests]
    commits = {result.provenance["commit"] for result in results}
    if len(commits) != 1 or None in commits or any(r.provenance["dirty"] for r in results):
        raise RequestError(
            f"the results of {profile!r} do not come from one clean commit; commit, delete "
            f"{_shown(study.store.folder)} and run the profile again"
        )
    for name in {name for r in results for name in r.provenance.get("hub_commits", {})}:
        read = {r.provenance.get("hub_commits", {}).get(name) for r in results} - {None}
        if len(read) > 1:
            raise RequestError(
                f"the results of {profile!r} read {name} at {len(read)} commits of the hub; set "
                f"revisions to one of {', '.join(sorted(read))} and run the profile again"
            )
    with files.appearing(paths.record(study.profile.name)) as fresh:
        for result in results:
            Store(fresh).put(result)
    update_pages(Study.open(profile, from_record=True, **chosen))
    name, commit = study.profile.name, commits.pop()
    facts = {"profile": name, "results": len(results), "commit": commit}
    return facts, f"{len(results)} results of commit {commit[:10]} are the record of {name}"


def update_pages(study: Study) -> None:
    """Rewrite the parts of the README and of docs/ that a record or a benchmark speaks for."""
    for path, block in PAGES.items():
        _fill(path, f"record:{study.profile.name}", lambda block=block: block(study))
        _fill(path, "bench", costs.readme_block)


def _fill(page: Path, name: str, text: Callable[[], str]) -> None:
    """Write `text` between the markers of that name, where a page has them."""
    before, start, rest = page.read_text(encoding="utf-8").partition(f"<!-- {name} -->")
    if start:
        _, end, after = rest.partition(f"<!-- /{name} -->")
        files.write(page, f"{before}{start}\n{text()}\n{end}{after}")


def agree(study: Study, requests: list[Measurement]) -> dict | None:
    """Compare every value with the record; None where there is no record to compare with.

    Tolerance: relative 0.1 % where both were measured on the same class of device; otherwise 1 %,
    and for accuracies 0.02.
    """
    record = Store(paths.record(study.profile.name), of_record=True)
    compared = agreeing = 0
    largest, where = 0.0, None
    for request in requests:
        ours, theirs = study.store.get(request), record.get(request)
        if ours is None or theirs is None:
            continue
        same_class = ours.provenance["device_class"] == theirs.provenance["device_class"]
        for name, (value, expected) in _paired_values(ours, theirs).items():
            deviation = abs(value - expected) / max(abs(expected), 1e-12)
            within = deviation <= (1e-3 if same_class else 1e-2)
            if request.kind == "task" and not same_class:
                within = abs(value - expected) <= 0.02
            compared, agreeing = compared + 1, agreeing + within
            if deviation > largest:
                largest, where = deviation, f"{name} in {request.key}"
    if not compared:
        return None
    return {
        "agree": agreeing,
        "values": compared,
        "largest_deviation": largest,
        "largest_deviation_at": where,
    }


def _paired_values(ours: Result, theirs: Result) -> dict[str, tuple[float, float]]:
    return {name: (value, _values(theirs)[name]) for name, value in _values(ours).items()}


def _values(result: Result) -> dict[str, float]:
    """The numbers of a result that a reader would quote."""
    value = result.value
    if result.kind == "lr":
        return {f"LR of layer {x['index']}": x["lr"] for x in value["layers"]}
    if result.kind in ("ppl", "centred"):
        return {"perplexity": value["perplexity"]}
    if result.kind == "sensitivity":
        nll = {f"layer {x['index']} cut": x["nll"] for x in value["layers"]}
        nll["no layer cut"] = value["dense"]
        return {f"perplexity, {what}": exp(fmean(losses)) for what, losses in nll.items()}
    if result.kind == "places":
        nll = {"as planned": value["plan"]}
        for place in value["places"]:
            where = f"{place['block']} of layer {place['layer']}"
            at_shares = zip(value["shares"], place["losses"], strict=True)
            nll |= {f"{where} cut by {share}": losses for share, losses in at_shares}
        return {f"perplexity, {what}": exp(fmean(losses)) for what, losses in nll.items()}
    if result.kind == "search":
        return {"perplexity, best plan tried": exp(min(step["loss"] for step in value["tried"]))}
    if result.kind == "speed":
        counts = ("stored_bytes", "prefill_flops", "decode_bytes")
        return {f"{name} ({which})": x for name in counts for which, x in value[name].items()}
    if result.kind == "task":
        names = ("acc", "acc_norm")
        accuracies = {name: value[name] for name in names if value[name] is not None}
        return {**accuracies, **value.get("metrics", {})}
    return {"stored parameters": value["parameters"]}


def _agreement_line(agreement: dict | None, profile: str) -> str:
    if agreement is None:
        have = "holds none of these values" if paths.record(profile).is_dir() else "does not exist"
        return f"nothing to compare with: the record of profile {profile} {have}"
    return (
        f"{agreement['agree']} of {agreement['values']} values agree with the record "
        f"(largest deviation {agreement['largest_deviation']:.2%}"
        + (f", {agreement['largest_deviation_at']})" if agreement["largest_deviation_at"] else ")")
    )


def _notebooks(only: list[str] | None) -> dict[str, Path]:
    """Notebook sources by number, all or the chosen ones, in order."""
    every = {path.name[:2]: path for path in sorted(paths.NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))}
    if not every:
        raise RequestError(
            f"no notebooks in {_shown(paths.NOTEBOOKS)}; run from a checkout of the repository"
        )
    if only is None:
        return every
    chosen = {}
    for name in only:
        number = Path(name).name[:2]
        if number not in every or not every[number].stem.startswith(Path(name).stem):
            have = ", ".join(path.stem for path in every.values())
            raise RequestError(f"notebook {name!r} is unknown; there are {have}")
        chosen[number] = every[number]
    return dict(sorted(chosen.items()))


def _execute(source: Path, target: Path, parameters: dict[str, Any]) -> None:
    """Run a notebook by papermill; `target` appears when it is complete."""
    import papermill
    from nbclient.exceptions import DeadKernelError

    # It warns of parameters that a notebook's cell does not list; the study checks them all.
    logging.getLogger("papermill").setLevel(logging.ERROR)
    with files.scratch(target.parent) as scratch:
        unfinished = scratch / target.name
        try:
            _in_a_thread(
                papermill.execute_notebook,
                str(source),
                str(unfinished),
                parameters,
                cwd=os.getcwd(),  # relative paths of models and texts mean what they mean here
                kernel_name="python3",
                progress_bar=sys.stderr.isatty(),
                extra_arguments=["--log-level=40"],  # errors only: no advice about transports
            )
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
        content["metadata"].pop("papermill", None)
        for cell in content["cells"]:
            cell["metadata"].pop("papermill", None)
            cell["metadata"].pop("execution", None)
        unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(unfinished, target)


def _in_a_thread(run: Callable, *arguments, **options) -> None:
    """Run something that would take signals for itself where they do not reach it."""
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run, *arguments, **options)
        try:
            running.result()
        except KeyboardInterrupt:
            interrupt.kill_children()
            raise


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def _shown(path: Path) -> str:
    return os.path.relpath(path)
