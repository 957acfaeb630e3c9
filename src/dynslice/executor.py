"""How missing measurements are worked off: one after the other here, or side by side by Ray.

The store is where everybody meets: who measures looks there first and puts each result there, so
workers, restarted workers and plain runs mix. A measurement that fails is noted, and the others
go on.
"""

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from tqdm.auto import tqdm

from dynslice import interrupt, paths
from dynslice.design import unique
from dynslice.errors import (
    WRITING,
    DiskError,
    RequestError,
    RunError,
    disk_trouble,
    in_one_line,
)
from dynslice.profile import Profile
from dynslice.results import Measurement, Store

EXECUTORS = ("local", "ray")

_ATTEMPTS = 3  # at a measurement whose worker dies
_PATIENCE = 15  # seconds for a Ray cluster to answer
_SHOWN = 10  # errors that the last message spells out


@dataclass(frozen=True)
class Unit:
    """What one worker takes at once: measurements of one network, None for the dense model."""

    network: dict | None
    requests: list[Measurement]

    @property
    def name(self) -> str:
        """What a process claims that takes it: the network, or the dense model's measurement."""
        return name_of(self.network) if self.network else self.requests[0].key


class Agenda:
    """What is left to measure, what can start now, and what failed."""

    def __init__(self, missing: list[Measurement], store: Store):
        needed = [n for request in missing for n in needs(request) if store.get(n) is None]
        everything = unique([*needed, *missing])  # no two workers shall measure the same LR
        self.waiting = units(everything)
        self.left = {request.key: request for request in everything}
        self.failed: dict[str, tuple[Measurement, str]] = {}
        self.bar = tqdm(total=len(everything), desc="measurements", unit="measurement")

    def take(self, is_claimed: Callable[[str], bool] = lambda name: False) -> Unit | None:
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

    def started(self, request: Measurement, by_another: bool = False) -> None:
        """Show what is being measured."""
        self.bar.set_postfix_str("another run is at " * by_another + describe(request))

    def finished(self, request: Measurement, error: str | None) -> None:
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


def work_off(
    missing: list[Measurement],
    settings: Profile,
    store: Store,
    device: str,
    executor: str = "local",
    address: str | None = None,
) -> int:
    """Measure what the store lacks, and the LR which that needs; how many were asked for.

    executor: `local`, in this process; or `ray`, at `address` or on this machine. Raises
    RequestError where that cannot start, RunError at the end when measurements failed.
    """
    agenda = Agenda(missing, store)
    try:
        if executor == "ray":
            _by_ray(agenda, settings, store, device, address)
        else:
            _locally(agenda, settings, store, device)
    finally:
        agenda.bar.close()
    agenda.check()
    return len(missing)


def check(executor: str, address: str | None, placement: str = "resident") -> None:
    """Refuse what cannot be started before anything heavy starts. Raises RequestError."""
    if executor == "ray" and placement == "spread":
        raise RequestError(
            "placement 'spread' takes all GPUs for one network, and Ray gives each worker one; use "
            "--executor local, or placement streamed"
        )
    if executor not in EXECUTORS:
        raise RequestError(f"executor {executor!r} is unknown; use {' or '.join(EXECUTORS)}")
    if address is not None and executor != "ray":
        raise RequestError(f"--address {address} is Ray's; add --executor ray, or leave it out")
    if executor == "ray":
        _ray()


def needs(request: Measurement) -> list[Measurement]:
    """What the plan of a request rests on: LR, or other evidence of the dense model."""
    plan = (request.config.get("slice") or request.config).get("plan")
    while plan and not ("lr" in plan or "evidence" in plan):
        plan = plan.get("to", plan.get("of"))
    if not plan:
        return []
    return [Measurement("lr", plan["lr"]) if "lr" in plan else Measurement(**plan["evidence"])]


def units(requests: list[Measurement]) -> list[Unit]:
    """Each of the dense model's by itself, then one per sliced network, so that each is made once.

    A plan is drawn from the dense model too.
    """
    dense = [Unit(None, [request]) for request in requests if request.config.get("slice") is None]
    sliced: dict[str, Unit] = {}
    for request in requests:
        if network := request.config.get("slice"):
            sliced.setdefault(name_of(network), Unit(network, [])).requests.append(request)
    return [*dense, *sliced.values()]


def name_of(network: dict) -> str:
    """A short name for a sliced network."""
    return Measurement("network", {"slice": network}).key


def describe(request: Measurement) -> str:
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


def _attempt(bench: Any, request: Measurement, network: dict | None) -> str | None:
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
    from dynslice import models

    models.free_memory()  # only here are the frames gone that held what failed
    return reason


def _locally(agenda: Agenda, settings: Profile, store: Store, device: str) -> None:
    from dynslice.measure import Workbench  # loads torch, which a rendered report does not need

    bench = Workbench(settings, store, device)
    bench.prepare()
    while unit := agenda.take(store.is_claimed):
        waiting = partial(agenda.started, unit.requests[0], by_another=True)
        with store.claim(unit.name, waiting):
            for request in unit.requests:
                agenda.started(request)
                agenda.finished(request, _attempt(bench, request, unit.network))


class Worker:
    """A process of Ray's that keeps its model; what it loses when killed can be made again."""

    def __init__(self, settings: Profile, store: Store, device: str, threads: int, folder: str):
        self.threads, self.folder = threads, folder
        self.given = (settings, store, device)

    @cached_property
    def bench(self) -> Any:
        """The workbench with the dense model loaded; made again where a killed worker restarts."""
        import torch

        from dynslice.measure import Workbench

        os.chdir(self.folder)  # relative paths of models and texts mean what they mean there
        torch.set_num_threads(self.threads)
        bench = Workbench(*self.given)
        bench.prepare()
        return bench

    def load(self) -> None:
        """Make the workbench before there is a unit for it."""
        self.bench  # noqa: B018

    def measure(self, request: Measurement, network: dict | None) -> str | None:
        """Why a measurement failed, None when its result is in the store."""
        with self.bench.store.claim(Unit(network, [request]).name, lambda: None):
            return _attempt(self.bench, request, network)


def _by_ray(
    agenda: Agenda, settings: Profile, store: Store, device: str, address: str | None
) -> None:
    if device not in ("auto", "cpu", "cuda"):
        raise RequestError(
            f"device {device!r} names one GPU, and Ray hands them out itself; use auto, cpu or cuda"
        )
    agenda.bar.set_postfix_str("waiting for Ray")
    with _cluster(address) as ray:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        device, count, cpus = shares(nodes, device, len(agenda.waiting))
        moved = {"DYNSLICE_CACHE": str(paths.CACHE), "DYNSLICE_OUTPUT": str(paths.OUTPUT)}
        remote = ray.remote(
            num_gpus=int(device == "cuda"),
            num_cpus=cpus,
            max_restarts=-1,
            max_task_retries=_ATTEMPTS - 1,
            runtime_env={"env_vars": moved},
        )(Worker)
        arguments = (settings, store, device, max(cpus, 1), os.getcwd())
        _hand_out(agenda, ray, lambda: remote.remote(*arguments), count)


def _hand_out(agenda: Agenda, ray: Any, make: Callable, count: int) -> None:
    """Give each worker a unit whenever it has none, one measurement at a time.

    A worker gets its first unit when it has loaded the model, so one that finds no place in a
    busy cluster holds nothing back.
    """
    busy: dict[Any, tuple[Any, Unit | None]] = {}  # what is awaited -> whose it is, of which unit
    idle = []

    def load() -> None:
        worker = make()
        busy[worker.load.remote()] = (worker, None)

    def start(worker: Any, unit: Unit) -> None:
        agenda.started(unit.requests[0])
        busy[worker.measure.remote(unit.requests[0], unit.network)] = (worker, unit)

    for _ in range(count):
        load()
    while agenda.left:
        [done], _ = ray.wait(list(busy))
        worker, unit = busy.pop(done)
        try:
            error = ray.get(done)
        except ray.exceptions.RayError as failure:
            if isinstance(cause := getattr(failure, "cause", None), DiskError):
                raise cause from failure
            error = _reason(failure)
            if unit is None:
                raise RunError(f"a worker could not load the model: {error}") from failure
            for request in unit.requests:  # a network that kills its worker is not sliced again
                agenda.finished(request, error)
            ray.kill(worker)
            load()
        else:
            if unit is not None:
                agenda.finished(unit.requests[0], error)
            if unit is not None and unit.requests[1:]:
                start(worker, Unit(unit.network, unit.requests[1:]))
            else:
                idle.append(worker)
        while idle and (unit := agenda.take()):
            start(idle.pop(), unit)
        while idle and not agenda.waiting:  # room for a worker whose node was lost
            ray.kill(idle.pop())


def shares(nodes: list[dict], device: str, wanted: int) -> tuple[str, int, int]:
    """Device, number of workers and CPUs of each, for `wanted` units on the nodes of a cluster.

    nodes: the resources of each. One worker per GPU, else one per CPU; where there are fewer
    units than that, each worker gets more CPUs. Raises RequestError where a GPU is wanted and
    there is none.
    """
    gpu_nodes = [node for node in nodes if node.get("GPU", 0) >= 1]
    if device == "cuda" and not gpu_nodes:
        raise RequestError("device 'cuda' is not available in the Ray cluster; use --device cpu")
    if gpu_nodes and device != "cpu":
        count = min(wanted, sum(int(node["GPU"]) for node in gpu_nodes))
        return "cuda", count, min(int(n.get("CPU", 0) // n["GPU"]) for n in gpu_nodes)
    cpus = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
    if not cpus:
        raise RequestError("the Ray cluster has no CPU to give; start it with --num-cpus")
    count = min(wanted, sum(cpus))
    return "cpu", count, min(sum(cpus) // count, *cpus)


def _reason(failure: Exception) -> str:
    if (cause := getattr(failure, "cause", None)) is not None:
        return in_one_line(cause)
    text = str(failure)
    if "worker process has died" in text:
        return f"its worker died at each of {_ATTEMPTS} attempts; does it have memory enough?"
    why = text.partition(" because ")[2] or text or "no reason given"
    return f"Ray lost its worker ({why.splitlines()[0].rstrip('.')})"


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to its makers
    try:
        import ray
    except ImportError as error:
        raise RequestError(
            "executor 'ray' needs the package ray; `pip install -e '.[ray]'`, or use "
            "--executor local"
        ) from error
    return ray


@contextmanager
def _cluster(address: str | None) -> Iterator[Any]:
    """Ray, connected to the cluster at `address`, or to one of this process on this machine."""
    ray = _ray()
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    small = {"include_dashboard": False, "object_store_memory": 100 * 2**20}  # nothing is sent
    if address is not None:
        _reach(address)
    # Whatever it is told, Ray prints on stdout that a worker died, where results go.
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        try:
            ray.init(address=address or "local", **quiet, **({} if address else small))
            interrupt.heed_again()  # or Ray would end the process in its own way
            yield ray
        finally:
            ray.shutdown()


def _reach(address: str) -> None:
    """Raise RequestError where no cluster answers.

    Tried in a process of its own, because Ray itself tries for minutes and then ends the process.
    """
    attempt = "import sys, ray; ray.init(address=sys.argv[1], log_to_driver=False)"
    command = [sys.executable, "-c", attempt, address]
    try:
        tried = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE)
    except subprocess.TimeoutExpired:
        reason = f"no answer in {_PATIENCE} s"
    else:
        if tried.returncode == 0:
            return
        last = (tried.stderr.strip().splitlines() or ["no reason given"])[-1]
        reason = last.partition(". ")[0]
    raise RequestError(
        f"no Ray cluster can be reached at address {address!r} ({reason}); give auto or the "
        "host:port that `ray start` printed on this machine, with RAY_AUTH_MODE=token set if it "
        "asks for a token, or leave --address out"
    )
