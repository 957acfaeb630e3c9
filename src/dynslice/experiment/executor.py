"""How missing measurements are taken: one after the other here, or in parallel by workers of Ray.

All look into the store first and put each result there, so workers and plain runs mix.
"""

import gc
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from functools import cached_property, partial
from importlib.util import find_spec
from typing import Any

from dynslice.core import interrupt, paths
from dynslice.core.errors import DiskError, RequestError, in_one_line
from dynslice.experiment.agenda import Job, WorkQueue, attempt
from dynslice.experiment.profile import Profile
from dynslice.experiment.store import Request, Store

_RETRIES = 2  # of a network whose worker dies
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
    if executor == "ray" and not find_spec("ray"):
        raise RequestError(
            "executor 'ray' needs the package ray; `pip install -e '.[ray]'`, or use "
            "--executor local"
        )


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
    """A process of Ray's that keeps its model from one network to the next."""

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

    def measure(self, job: Job) -> list[str | None]:
        """Why each request of a job failed; None for those whose result is in the store."""
        with self.runner.store.claim(job.name, lambda: None):
            return [attempt(self.runner, request, job.network) for request in job.requests]


def _run_by_ray(
    queue: WorkQueue, settings: Profile, store: Store, device: str, address: str | None
) -> None:
    """Give each worker one network after the other; Ray restarts a worker that dies, and retries.

    Raises RequestError where Ray cannot start.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise RequestError(
            f"device {device!r} names one GPU, and Ray hands them out itself; use auto, cpu or cuda"
        )
    with _cluster(address) as ray:
        have = ray.cluster_resources()
        on_gpu = device != "cpu" and have.get("GPU", 0) >= 1
        if device == "cuda" and not on_gpu:
            raise RequestError("the Ray cluster has no GPU to give; use --device cpu")
        slots, cpus = int(have.get("GPU" if on_gpu else "CPU", 0)), int(have.get("CPU", 0))
        if slots < 1:
            raise RequestError("the Ray cluster has no CPU to give; start it with --num-cpus")
        count = min(slots, len(queue.waiting))
        threads = max(1, cpus // count)
        # On a cluster a worker of several CPUs may fit on no node; one with a GPU asks for none.
        wanted = 0 if on_gpu else threads if address is None else 1
        moved = {"DYNSLICE_CACHE": str(paths.CACHE), "DYNSLICE_OUTPUT": str(paths.OUTPUT)}
        options = {"num_gpus": int(on_gpu), "num_cpus": wanted, "max_restarts": -1}
        options |= {"max_task_retries": _RETRIES, "runtime_env": {"env_vars": moved}}
        given = (wanted or threads, os.getcwd(), settings, store, "cuda" if on_gpu else "cpu")
        remote = ray.remote(**options)(Worker)
        idle, busy = [remote.remote(*given) for _ in range(count)], {}
        while queue.left:
            while idle and (job := queue.take()):
                queue.started(job.requests[0])
                worker = idle.pop()
                busy[worker.measure.remote(job)] = worker, job
            [done], _ = ray.wait(list(busy))
            worker, job = busy.pop(done)
            idle.append(worker)
            try:
                errors = ray.get(done)
            except ray.exceptions.RayError as failure:
                cause = getattr(failure, "cause", None) or failure
                if isinstance(cause, DiskError):
                    raise cause from failure
                errors = [None if store.get(r) else _reason(cause) for r in job.requests]
            for request, error in zip(job.requests, errors, strict=True):
                queue.finished(request, error)


def _reason(failure: Exception) -> str:
    """Why a worker failed, in a sentence."""
    if "worker process has died" in str(failure):
        return f"its worker died at each of {_RETRIES + 1} attempts; does it have memory enough?"
    return in_one_line(failure)


@contextmanager
def _cluster(address: str | None) -> Iterator[Any]:
    """Ray, connected to the cluster at `address`, or to one of this process on this machine."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to its makers
    import ray

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
