"""What is left to measure: jobs in the order in which they can start."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tqdm.auto import tqdm

from dynslice.core.errors import WRITING, DiskError, RunError, disk_trouble, in_one_line
from dynslice.experiment.store import Request, Store, unique

_SHOWN = 10  # errors that the last message spells out


@dataclass(frozen=True)
class Job:
    """What one worker takes at once: measurements of one network, None for the dense model."""

    network: dict | None
    requests: list[Request]

    @property
    def name(self) -> str:
        """What a process claims that takes it: the network, or the dense model's measurement."""
        return name_of(self.network) if self.network else self.requests[0].key


class WorkQueue:
    """What is left to measure, what can start now, and what failed."""

    def __init__(self, missing: list[Request], store: Store):
        needed = [n for request in missing for n in needs(request) if store.get(n) is None]
        everything = unique([*needed, *missing])  # no two workers shall measure the same LR
        self.waiting = jobs(everything)
        self.left = {request.key: request for request in everything}
        self.failed: dict[str, tuple[Request, str]] = {}
        self.bar = tqdm(total=len(everything), desc="measurements", unit="measurement")

    def take(self, is_claimed: Callable[[str], bool] = lambda name: False) -> Job | None:
        """A unit that can start now; None when there is none, or not before others finish.

        is_claimed: which units, by name, other runs are at; those come last.
        """
        ready = [
            unit
            for unit in self.waiting
            if not any(n.key in self.left for request in unit.requests for n in needs(request))
        ]
        unit = next((u for u in ready if not is_claimed(u.name)), ready[0] if ready else None)
        if unit is not None:
            self.waiting.remove(unit)
        return unit

    def started(self, request: Request, by_another: bool = False) -> None:
        """Show what is being measured."""
        self.bar.set_postfix_str("another run is at " * by_another + describe(request))

    def finished(self, request: Request, error: str | None) -> None:
        """Note how a measurement ended; with an error, so did all that need it."""
        del self.left[request.key]
        self.bar.update()
        if error is None:
            return
        if error not in [told for _, told in self.failed.values()]:  # not again what follows
            self.bar.write(f"failed: {describe(request)}: {error}", file=sys.stderr)
        self.failed[request.key] = (request, error)
        for unit in list(self.waiting):
            lost = [r for r in unit.requests if request.key in [n.key for n in needs(r)]]
            if lost:
                self.waiting.remove(unit)
            for dependent in lost:
                self.finished(dependent, f"its plan needs {describe(request)}, which failed")

    def check(self) -> None:
        """Raise RunError naming what failed."""
        if not self.failed:
            return
        by_error: dict[str, list[str]] = {}
        for request, error in self.failed.values():
            by_error.setdefault(error, []).append(describe(request))
        lines = [f"  {_some(names)}: {error}" for error, names in by_error.items()]
        if len(lines) > _SHOWN:
            lines[_SHOWN:] = [f"  and {len(lines) - _SHOWN} further errors, each shown above"]
        raise RunError(
            f"{len(self.failed)} of {self.bar.total} measurements failed, the others are stored; "
            "mend the cause and give the same command again\n" + "\n".join(lines)
        )


def needs(request: Request) -> list[Request]:
    """What the plan of a request rests on: LR, or other evidence of the dense model."""
    plan = (request.config.get("slice") or request.config).get("plan")
    while plan and not ("lr" in plan or "evidence" in plan):
        plan = plan.get("to", plan.get("of"))
    if not plan:
        return []
    return [Request("lr", plan["lr"]) if "lr" in plan else Request(**plan["evidence"])]


def jobs(requests: list[Request]) -> list[Job]:
    """Each of the dense model's by itself, then one per sliced network, so that each is made once.

    A plan is drawn from the dense model too.
    """
    dense = [Job(None, [request]) for request in requests if request.config.get("slice") is None]
    sliced: dict[str, Job] = {}
    for request in requests:
        if network := request.config.get("slice"):
            sliced.setdefault(name_of(network), Job(network, [])).requests.append(request)
    return [*dense, *sliced.values()]


def name_of(network: dict) -> str:
    """A short name for a sliced network."""
    return Request("network", {"slice": network}).key


def describe(request: Request) -> str:
    """A request in a few words."""
    network = request.config.get("slice")
    dense = request.config.get("budget", {"schedule": "dense"})  # which a search keeps
    plan = (network or request.config).get("plan", dense)
    target = plan.get("to", plan.get("of", plan.get("budget", plan)))
    amounts = [f"SP {target['slice_percentage']}"] if "slice_percentage" in target else []
    amounts += [f"SB {target['slice_base']}"] if "slice_base" in target else []
    what = request.config.get("task") or request.config.get("text")
    extras = [name for name in ("compensation", "recovery") if (network or {}).get(name)]
    words = [request.kind, *([what] if what else []), plan["schedule"], *amounts]
    return " ".join([*words, *(f"with {name}" for name in extras)])


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def attempt(bench: Any, request: Request, network: dict | None) -> str | None:
    """Measure and store one request unless it is stored; why that failed, None when it did not.

    Raises DiskError where nothing can be written any more.
    """
    try:
        if bench.store.get(request) is None:
            bench.store.put(bench.measure(request, network))
    except DiskError:
        raise
    except Exception as error:  # whatever a library raises, the other measurements go on
        if sentence := disk_trouble(error, bench.store.folder, WRITING):
            raise DiskError(sentence) from error
        reason = in_one_line(error)
    else:
        return None
    from dynslice.core.tensors import free_memory

    free_memory()  # only here are the frames gone that held what failed
    return reason
