"""Results of record: copying a run, and how another run agrees with it."""

import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from dynslice.core import files, paths
from dynslice.core.errors import RequestError
from dynslice.core.paths import shown_path
from dynslice.experiment.kinds import KINDS
from dynslice.experiment.profile import by_model
from dynslice.experiment.store import Request, Store
from dynslice.experiment.study import Study
from dynslice.report import answer, efficiency, pages

README = paths.ROOT / "README.md"  # what it answers rests on several records
# The other pages with parts that a record or a benchmark speaks for, between its markers.
PAGES = {
    paths.ROOT / "docs" / "usage.md": pages.claims_block,
    paths.ROOT / "docs" / "artifact.md": pages.artifact_block,
    paths.ROOT / "docs" / "deviations.md": pages.deviations_block,
    paths.ROOT / "docs" / "costs.md": pages.claims_block,  # it has the benchmark's part only
}


def record(profile: str) -> tuple[dict, list[str]]:
    """Copy the results of a complete run of a clean tree to data/record/<profile>.

    A record can be extended: with its files in data/results/<profile> a run measures only what they
    lack, and the record names every commit. Raises RequestError when results are missing, when one
    was not measured at a clean commit, and when they read what the hub gave at several commits.
    """
    return of_models([_record_one(profile, chosen) for chosen in by_model(profile, {})])


def of_models(outcomes: list[tuple[dict, list[str]]]) -> tuple[dict, list[str]]:
    """What a command answers that did the same for each model of a profile."""
    facts, lines = zip(*outcomes, strict=True)
    return facts[0] if len(facts) == 1 else {"models": list(facts)}, [*chain(*lines)]


def _record_one(profile: str, chosen: dict[str, Any]) -> tuple[dict, list[str]]:
    study = Study.open(profile, **chosen)
    requests = study.requests()
    if missing := study.missing(requests):
        raise RequestError(
            f"profile {profile!r} lacks {len(missing)} of {len(requests)} measurements; run "
            f"`dynslice reproduce --profile {profile}` first"
        )
    results = [study.store.get(request) for request in requests]
    commits = Counter(result.provenance["commit"] for result in results)
    if None in commits or any(r.provenance["dirty"] is not False for r in results):
        raise RequestError(
            f"the results of {profile!r} do not all come from a clean commit; commit, delete "
            f"{shown_path(study.store.folder)} and run the profile again"
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
    name = study.profile.name
    facts = {"profile": name, "results": len(results), "commits": dict(commits)}
    of = ", ".join(f"{count} of commit {commit[:10]}" for commit, count in commits.items())
    return facts, [f"{len(results)} results are the record of {name}: {of}"]


def update_pages(study: Study) -> None:
    """Rewrite the parts of the README and of docs/ that a record or a benchmark speaks for."""
    _fill(README, "answer", answer.answer_block)
    _fill(README, "notebooks", answer.notebooks_block)
    for path, block in PAGES.items():
        _fill(path, f"record:{study.profile.name}", partial(block, study))
        _fill(path, "bench", efficiency.bench_block)


def _fill(page: Path, name: str, text: Callable[[], str]) -> None:
    """Write `text` between the markers of that name, where a page has them."""
    before, start, rest = page.read_text(encoding="utf-8").partition(f"<!-- {name} -->")
    _, end, after = rest.partition(f"<!-- /{name} -->")
    if start and end:
        files.write(page, f"{before}{start}\n{linked(page, text())}\n{end}{after}")


def linked(page: Path, text: str) -> str:
    """A text with links from the root, for a page there or in docs/."""
    return re.sub(r"\]\((?![a-z]+:|#)", "](../", text) if page.parent.name == "docs" else text


def agree(study: Study, requests: list[Request]) -> dict | None:
    """Compare every value with the record; None where there is no record to compare with.

    Tolerance: relative 0.1 % where both were measured on the same class of device; otherwise 1 %,
    and for accuracies 0.02. LR lies between 0 and 1, so there it is absolute.
    """
    record = Store(paths.record(study.profile.stored_as), of_record=True)
    agreeing, deviations = [], {None: 0.0}
    for request in requests:
        ours, theirs = study.store.get(request), record.get(request)
        if ours is None or theirs is None:
            continue
        same_class = ours.provenance["device_class"] == theirs.provenance["device_class"]
        quoted = KINDS[request.kind].quoted
        wanted = quoted(theirs.value)
        for name, value in quoted(ours.value).items():
            apart = abs(value - wanted[name])
            deviation = apart / (max(abs(wanted[name]), 1e-12) if request.kind != "lr" else 1)
            deviations[f"{name} in {request.key}"] = deviation
            within = deviation <= (1e-3 if same_class else 1e-2)
            of_task = request.kind == "task" and not same_class
            agreeing.append(apart <= 0.02 if of_task else within)
    if not agreeing:
        return None
    where = max(deviations, key=deviations.get)
    counts = {"agree": sum(agreeing), "values": len(agreeing)}
    return {**counts, "largest_deviation": deviations[where], "largest_deviation_at": where}


def agreement_line(agreement: dict | None, profile: str) -> str:
    """What `agree` found, in a sentence."""
    if agreement is None:
        have = "holds none of these values" if paths.record(profile).is_dir() else "does not exist"
        return f"nothing to compare with: the record of profile {profile} {have}"
    where = agreement["largest_deviation_at"]
    return (
        f"{agreement['agree']} of {agreement['values']} values agree with the record "
        f"(largest deviation {agreement['largest_deviation']:.2%}{f', {where}' if where else ''})"
    )
