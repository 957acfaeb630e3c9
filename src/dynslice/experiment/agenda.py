"""What is left to measure: jobs in the order in which they can start."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tqdm.auto import tqdm

from dynslice.core.errors import LASTING, DiskError, RunError, disk_trouble, in_one_line
from dynslice.experiment.plan_specs import PlanSpec, plan_spec
from dynslice.experiment.store import Request, Store, unique

_SHOWN = 10  # errors that the last message spells out


@dataclass(frozen=True)
class Job:
    """What one worker takes at once: requests of one network, None for the dense model."""

    network: dict | None
    requests: list[Request]

    @property
    def name(self) -> str:
        """What a process claims that takes it: the network, or the request of the dense model."""
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
        """A job that can start now, if there is one; those that other runs claim come last."""
        ready = [
            job
            for job in self.waiting
            if not any(n.key in self.left for request in job.requests for n in needs(request))
        ]
        job = next((j for j in ready if not is_claimed(j.name)), ready[0] if ready else None)
        if job is not None:
            self.waiting.remove(job)
        return job

    def started(self, request: Request, by_another: bool = False) -> None:
        """Show what is being measured: in the bar, or in a line where there is none."""
        told = "another run is at " * by_another + describe(request)
        self.bar.set_postfix_str(told)
        if self.bar.disable:
            print(f"{self.bar.total - len(self.left)} of {self.bar.total}: {told}", file=sys.stderr)

    def finished(self, request: Request, error: str | None) -> None:
        """Note how a measurement ended; with an error, so did all that need it."""
        del self.left[request.key]
        self.bar.update()
        if error is None:
            return
        if error not in [told for _, told in self.failed.values()]:  # not again what follows
            self.bar.write(f"failed: {describe(request)}: {error}", file=sys.stderr)
        self.failed[request.key] = (request, error)
        for job in list(self.waiting):
            lost = [r for r in job.requests if request.key in [n.key for n in needs(r)]]
            if lost:
                self.waiting.remove(job)
            for dependent in lost:
                self.finished(dependent, f"its plan needs {describe(request)}, which failed")

    def check(self) -> None:
        """Raise RunError naming what failed."""
        if not self.failed:
            return
        by_error: dict[str, list[str]] = {}
        for request, error in self.failed.values():
            by_error.setdefault(error, []).append(describe(request))
        lines = []
        for error, names in by_error.items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"  {', '.join(names[:3])}{more}: {error}")
        if len(lines) > _SHOWN:
            lines[_SHOWN:] = [f"  and {len(lines) - _SHOWN} further errors, each shown above"]
        raise RunError(
            f"{len(self.failed)} of {self.bar.total} measurements failed, the others are stored; "
            "fix the cause and give the same command again\n" + "\n".join(lines)
        )


def needs(request: Request) -> list[Request]:
    """What the plan of a request rests on: LR of the dense model, or nothing."""
    plan = _plan_of(request)
    return plan.needs() if plan else []


def jobs(requests: list[Request]) -> list[Job]:
    """Each of the dense model's by itself, because plans are made from it, then one per network."""
    dense = [Job(None, [request]) for request in requests if request.config.get("slice") is None]
    sliced: dict[str, Job] = {}
    for request in requests:
        if network := request.config.get("slice"):
            sliced.setdefault(name_of(network), Job(network, [])).requests.append(request)
    return [*dense, *sliced.values()]


def by_network(requests: list[Request]) -> list[tuple[str, list[Request]]]:
    """The requests of each network with its name in words, those of the dense model first."""
    found: dict[str, list[Request]] = {}
    for request in requests:
        found.setdefault(name_of(request.config.get("slice")), []).append(request)
    dense = found.pop(name_of(None), [])
    return [("dense", dense)] * bool(dense) + [(network_words(of[0]), of) for of in found.values()]


def name_of(network: dict | None) -> str:
    """A short name for a network; None is the dense model."""
    return Request("network", {"slice": network}).key


def describe(request: Request) -> str:
    """A request in a few words."""
    what = request.config.get("task") or request.config.get("text")
    return " ".join(filter(None, (request.kind, what, network_words(request))))


def network_words(request: Request) -> str:
    """The network of a request in a few words."""
    plan, network = _plan_of(request), request.config.get("slice") or {}
    words = [plan.describe() if plan else "dense"]
    if method := {**network.get("method", {})}:
        words = [f"fewer {method.pop('method')}", *method, "in the size of", *words]
    words += [f"{plan.neurons:.0%} fewer neurons"] if plan and plan.neurons else []
    words += [f"with {name}" for name in ("compensation", "recovery") if name in network]
    words += [f"bits {key} {value}" for key, value in network.get("bits", {}).items()]
    words += [f"seed {read['seed']}" for read in [network.get("calibration")] if read]
    return " ".join(words)


def _plan_of(request: Request) -> PlanSpec | None:
    """The plan of a request's network, or the one that it is about."""
    config = request.config.get("slice") or request.config
    given = config.get("plan")
    return plan_spec(given) if given else None


def attempt(runner: Any, request: Request, network: dict | None) -> str | None:
    """Measure a request unless it is stored; why that failed. Raises DiskError for a full disk."""
    try:
        if runner.store.get(request) is None:
            runner.store.put(runner.measure(request, network))
        return None
    except DiskError:
        raise
    except Exception as error:  # whatever a library raises, the other measurements go on
        if sentence := disk_trouble(error, runner.store.folder, LASTING):
            raise DiskError(sentence) from error
        reason = in_one_line(error)
    from dynslice.core.tensors import free_memory

    free_memory()  # only here are the frames gone that held what failed
    return reason
