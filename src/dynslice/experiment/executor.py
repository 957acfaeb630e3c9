"""How missing measurements are taken: one after the other here, or in parallel by workers of Ray.

All look into the store first and put each result there, so workers and plain runs mix.
"""

import gc
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import cached_property, partial
from typing import Any

from dynslice.core import interrupt, paths
from dynslice.core.errors import DiskError, RequestError, RunError, in_one_line
from dynslice.experiment.agenda import Job, WorkQueue, attempt
from dynslice.experiment.profile import Profile
from dynslice.experiment.store import Request, Store

_ATTEMPTS = 3  # at a measurement whose worker dies
_PATIENCE = 15  # seconds for a Ray cluster to answer


def check_executor(executor: str, address: str | None, placement: str = "resident") -> None:
    """Refuse what cannot be started before anything heavy starts. Raises RequestError."""
    if executor == "ray" and placement == "spread":
        raise RequestError(
            "placement 'spread' takes all GPUs for one network, and Ray gives each worker one; use "
            "--executor local, or placement streamed"
        )
    if executor not in ("local", "ray"):
        raise RequestError(f"executor {executor!r} is unknown; use local or ray")
    if address is not None and executor != "ray":
        raise RequestError(f"--address {address} is Ray's; add --executor ray, or leave it out")
    if executor == "ray":
        _import_ray()


def run_all(
    missing: list[Request],
    settings: Profile,
    store: Store,
    device: str,
    executor: str = "local",
    address: str | None = None,
) -> int:
    """Measure what the store lacks, and the LR which that needs; how many that were.

    executor: `local`, in this process; or `ray`, at `address` or on this machine. Raises
    RequestError where that cannot start, RunError at the end when measurements failed.
    """
    queue = WorkQueue(missing, store)
    try:
        if executor == "ray":
            _run_by_ray(queue, settings, store, device, address)
        else:
            _run_here(queue, settings, store, device)
    finally:
        queue.bar.close()
    queue.check()
    return queue.bar.total


def _run_here(queue: WorkQueue, settings: Profile, store: Store, device: str) -> None:
    from dynslice.experiment.runner import Runner  # loads torch, which a report does not need

    runner = Runner(settings, store, device)
    gc.freeze()  # collecting after each network need not pass through the libraries
    while job := queue.take(store.is_claimed):
        with store.claim(job.name, partial(queue.started, job.requests[0], by_another=True)):
            for request in job.requests:
                queue.started(request)
                queue.finished(request, attempt(runner, request, job.network))


class Worker:
    """A process of Ray's that keeps its model; what it loses when killed can be made again."""

    def __init__(self, threads: int, folder: str, *given: Any):
        self.threads, self.folder, self.given = threads, folder, given

    @cached_property
    def runner(self) -> Any:
        """The runner with the dense model loaded; made again where a killed worker restarts."""
        import torch

        from dynslice.experiment.runner import Runner

        os.chdir(self.folder)  # relative paths of models and texts mean what they mean there
        torch.set_num_threads(self.threads)
        return Runner(*self.given)

    def load(self) -> None:
        """Make the runner before there is a job for it."""
        self.runner  # noqa: B018

    def measure(self, request: Request, network: dict | None) -> str | None:
        """Why a measurement failed, None when its result is in the store."""
        with self.runner.store.claim(Job(network, [request]).name, lambda: None):
            return attempt(self.runner, request, network)


def _run_by_ray(
    queue: WorkQueue, settings: Profile, store: Store, device: str, address: str | None
) -> None:
    """Measure all that a queue holds. Raises RequestError where Ray cannot start."""
    if device not in ("auto", "cpu", "cuda"):
        raise RequestError(
            f"device {device!r} names one GPU, and Ray hands them out itself; use auto, cpu or cuda"
        )
    queue.bar.set_postfix_str("waiting for Ray")
    with _cluster(address) as ray:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        device, count, cpus = shares(nodes, device, len(queue.waiting))
        moved = {"DYNSLICE_CACHE": str(paths.CACHE), "DYNSLICE_OUTPUT": str(paths.OUTPUT)}
        remote = ray.remote(
            num_gpus=int(device == "cuda"),
            num_cpus=cpus,
            max_restarts=-1,
            max_task_retries=_ATTEMPTS - 1,
            runtime_env={"env_vars": moved},
        )(Worker)
        given = (max(cpus, 1), os.getcwd(), settings, store, device)
        _hand_out(queue, ray, partial(remote.remote, *given), count)


def _hand_out(queue: WorkQueue, ray: Any, make: Callable, count: int) -> None:
    """Give each worker that has loaded the model one measurement after the other."""
    busy: dict[Any, tuple[Any, Job | None]] = {}  # what is awaited -> whose it is, of which job
    idle = []

    def give(worker: Any, job: Job | None) -> None:
        if job is None:
            awaited = worker.load.remote()
        else:
            queue.started(job.requests[0])
            awaited = worker.measure.remote(job.requests[0], job.network)
        busy[awaited] = (worker, job)

    for _ in range(count):
        give(make(), None)
    while queue.left:
        [done], _ = ray.wait(list(busy))
        worker, job = busy.pop(done)
        try:
            error = ray.get(done)
        except ray.exceptions.RayError as failure:
            if isinstance(cause := getattr(failure, "cause", None), DiskError):
                raise cause from failure
            error = _reason(failure)
            if job is None:
                raise RunError(f"a worker could not load the model: {error}") from failure
            for request in job.requests:  # a network that kills its worker is not sliced again
                queue.finished(request, error)
            ray.kill(worker)
            give(make(), None)
        else:
            idle.append(worker)
            if job is not None:
                queue.finished(job.requests[0], error)
                if others := job.requests[1:]:
                    give(idle.pop(), Job(job.network, others))
        while idle and (job := queue.take()):
            give(idle.pop(), job)
        while idle and not queue.waiting:  # room for a worker whose node was lost
            ray.kill(idle.pop())


def shares(nodes: list[dict], device: str, wanted: int) -> tuple[str, int, int]:
    """Device, number of workers and CPUs of each, for `wanted` jobs on the nodes of a cluster.

    nodes: the resources of each. One worker per GPU, else one per CPU, or with more CPUs where
    there are fewer jobs. Raises RequestError where a GPU is wanted and there is none.
    """
    with_gpu = [node for node in nodes if node.get("GPU", 0) >= 1]
    if device == "cuda" and not with_gpu:
        raise RequestError("device 'cuda' is not available in the Ray cluster; use --device cpu")
    if with_gpu and device != "cpu":
        count = min(wanted, sum(int(node["GPU"]) for node in with_gpu))
        return "cuda", count, min(int(n.get("CPU", 0) // n["GPU"]) for n in with_gpu)
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


def _import_ray() -> Any:
    """Ray. Raises RequestError where it is not installed."""
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
    ray = _import_ray()
    options = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address is None:  # its small store is enough, because nothing is sent
        options |= {"include_dashboard": False, "object_store_memory": 100 * 2**20}
    else:
        _reach(address)
    # Whatever it is told, Ray prints on stdout that a worker died, where results go.
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        try:
            ray.init(address=address or "local", **options)
            interrupt.handle_again()  # or Ray would end the process in its own way
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
        subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=True)
        return
    except subprocess.TimeoutExpired:
        reason = f"no answer in {_PATIENCE} s"
    except subprocess.CalledProcessError as failed:
        reason = (failed.stderr.strip().splitlines() or ["no reason given"])[-1].partition(". ")[0]
    raise RequestError(
        f"no Ray cluster can be reached at address {address!r} ({reason}); give auto or the "
        "host:port that `ray start` printed on this machine, with RAY_AUTH_MODE=token set if it "
        "asks for a token, or leave --address out"
    )
