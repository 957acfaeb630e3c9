"""How missing measurements are taken: one after the other here, or side by side by Ray.

The store is where everybody meets: who measures looks there first and puts each result there, so
workers, restarted workers and plain runs mix. A measurement that fails is noted, and the others
go on.
"""

from functools import partial

from dynslice.core.errors import RequestError
from dynslice.experiment.agenda import WorkQueue, attempt
from dynslice.experiment.profile import Profile
from dynslice.experiment.ray_executor import import_ray, run_by_ray
from dynslice.experiment.store import Request, Store

EXECUTORS = ("local", "ray")


def run_all(
    missing: list[Request],
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
    queue = WorkQueue(missing, store)
    try:
        if executor == "ray":
            run_by_ray(queue, settings, store, device, address)
        else:
            _locally(queue, settings, store, device)
    finally:
        queue.bar.close()
    queue.check()
    return len(missing)


def check_executor(executor: str, address: str | None, placement: str = "resident") -> None:
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
        import_ray()


def _locally(queue: WorkQueue, settings: Profile, store: Store, device: str) -> None:
    from dynslice.experiment.runner import Runner  # loads torch, which a report does not need

    runner = Runner(settings, store, device)
    runner.prepare()
    while job := queue.take(store.is_claimed):
        waiting = partial(queue.started, job.requests[0], by_another=True)
        with store.claim(job.name, waiting):
            for request in job.requests:
                queue.started(request)
                queue.finished(request, attempt(runner, request, job.network))
