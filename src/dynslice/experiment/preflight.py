"""Before a run starts: what it will measure, what that takes, and what stands in the way."""

import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from huggingface_hub import constants

from dynslice.core import assets, hub, paths
from dynslice.core.errors import DiskError, RequestError
from dynslice.core.tensors import memory_of_machine, pick_device
from dynslice.evaluate.task_table import TASKS
from dynslice.experiment.agenda import by_network, describe, jobs
from dynslice.experiment.estimate import Estimate, Estimator, Machine
from dynslice.experiment.profile import Profile
from dynslice.experiment.requests import texts_of
from dynslice.experiment.store import Request
from dynslice.experiment.study import Study
from dynslice.inputs import corpora, models, texts
from dynslice.inputs.models import is_remote
from dynslice.method.footprint import shown_bytes

SCREEN = 40  # networks that a plan lists
SMOLLM2 = "embedded:smollm2-135m"  # whose shape is not known before it is fetched


@dataclass(frozen=True)
class Forecast:
    """What the missing measurements of one study take; nothing where its model is not known."""

    missing: list[Request]
    device: torch.device
    obstacles: list[str]  # what is in the way and what to do
    estimates: dict[str, Estimate] = field(default_factory=dict)  # by key
    rate: float = 0.0  # FLOP/s of this machine's matrix product
    assumed: str = ""  # the machine that was asked about, where it is not this one
    download_bytes: int = 0
    disk_bytes: int = 0
    memory_bytes: int = 0  # on the device here
    gpu_memory_bytes: int = 0  # on a GPU, which works on larger batches

    @property
    def seconds(self) -> float:
        """The time of those whose size is known."""
        return sum(e.seconds or 0.0 for e in self.estimates.values())

    @property
    def unknown(self) -> int:
        """How many have a time that is not known."""
        return sum(e.seconds is None for e in self.estimates.values())


def forecast(
    study: Study,
    missing: list[Request],
    executor: str = "local",
    address: str | None = None,
    machine: Machine | None = None,
) -> Forecast:
    """What a study will take, and what stands in its way.

    Of a cluster at an address nothing is known here: times are this machine's, and its room is
    not asked about; nor is it where another machine is assumed. Raises RequestError for a device
    that is not there.
    """
    profile, assumed = study.profile, machine.assumed if machine else ""
    device = machine.device if assumed else pick_device("auto" if address else study.device)
    model, revision = profile.model, profile.model_revision
    is_here, obstacles = not (missing and is_remote(model)), []
    try:
        is_here = is_here or models.in_cache(model, revision)
    except (RequestError, DiskError) as error:
        hint = f"; {profile.model_hint}" if profile.model_hint else ""
        obstacles.append(f"{error}{hint}")
    obstacles += _data_obstacles(missing)
    whole = models.unfetched(model)
    if not missing or whole or (model == SMOLLM2 and not assets.are_there()):
        return Forecast(missing, device, obstacles, download_bytes=whole.bytes if whole else 0)
    try:
        estimator = Estimator(profile, device, machine)
    except RequestError as error:
        return Forecast(missing, device, obstacles or [str(error)])
    on_gpu = Estimator(profile, torch.device("cuda"), estimator.machine)
    found = Forecast(
        missing,
        device,
        obstacles,
        estimates=estimator.estimate(missing),
        rate=estimator.machine.rate,
        assumed=assumed,
        download_bytes=0 if is_here else 2 * estimator.dims.dense_parameters,  # half precision
        disk_bytes=estimator.disk(missing),
        memory_bytes=estimator.peak(missing),
        gpu_memory_bytes=on_gpu.peak(missing),
    )
    if address is None and not assumed:
        is_shared = executor == "ray" and device.type == "cpu"
        workers = min(os.cpu_count() or 1, len(jobs(missing))) if is_shared else 1
        obstacles += _room_obstacles(profile, found, workers)
    return found


def lines(
    study: Study, requests: list[Request], found: Forecast, verbose: bool = False
) -> list[str]:
    """The plan of a study as a reader wants it: the networks, the sums, the obstacles.

    verbose: each measurement instead of each network.
    """
    p, missing = study.profile, {request.key for request in found.missing}
    told = [
        f"profile {p.name}: {p.model} in {p.dtype}, placement {p.placement}, on {found.device.type}"
    ]
    told += _measurements(requests, found) if verbose else _networks(requests, found)
    told.append(f"{len(missing)} of {len(requests)} measurements are missing")
    if found.estimates:
        unknown = f" and {found.unknown} unknown" if found.unknown else ""
        of_this = "of this machine's own matrix product"
        rate_of = f"that are assumed of {found.assumed}" if found.assumed else of_this
        is_cpu, gpu = found.device.type == "cpu", shown_bytes(found.gpu_memory_bytes)
        on_gpu = f" (on a GPU {gpu})" * is_cpu
        told.append(
            f"time {_time(found.seconds)}{unknown}, by operations counted at the "
            f"{found.rate / 1e12:.3g} TFLOP/s {rate_of}; "
            f"{_kind(found.device)} memory {shown_bytes(found.memory_bytes)}"
            f"{on_gpu}, disk {shown_bytes(found.disk_bytes)}, "
            f"download of weights {shown_bytes(found.download_bytes)}"
        )
    elif found.download_bytes:
        told.append(
            f"download of weights {shown_bytes(found.download_bytes)}, without which the time is "
            "not known"
        )
    return [*told, *(f"in the way: {obstacle}" for obstacle in found.obstacles)]


def _measurements(requests: list[Request], found: Forecast) -> list[str]:
    told, missing = [], {request.key for request in found.missing}
    for request in requests:
        state, cost = "missing" if request.key in missing else "stored", ""
        if estimate := found.estimates.get(request.key):
            cost = f"{_time(estimate.seconds):>9} {shown_bytes(estimate.memory_bytes):>9}"
        told.append(f"{state:8} {request.key:24} {cost:19}  {describe(request)}".rstrip())
    return told


def _networks(requests: list[Request], found: Forecast) -> list[str]:
    """A line for each network, those that take longest where there are more than a screen holds."""
    missing, rows = {request.key for request in found.missing}, []
    for title, of_network in by_network(requests):
        left = [request for request in of_network if request.key in missing]
        estimates = [found.estimates[r.key] for r in left if r.key in found.estimates]
        seconds = sum(e.seconds or 0.0 for e in estimates)
        size = max((e.memory_bytes for e in estimates), default=0)
        cost = f"{_time(seconds):>9} {shown_bytes(size):>9}" if estimates else ""
        rows.append((seconds, f"{len(left):4} of {len(of_network):3} {cost:19}  {title}"))
    least = sorted((seconds for seconds, _ in rows), reverse=True)[:SCREEN][-1:]
    kept = [line.rstrip() for seconds, line in rows if [seconds] >= least][:SCREEN]
    more = f"and {len(rows) - len(kept)} more networks; --verbose lists each measurement"
    heading = "   missing      time    memory  network"
    return [heading, *kept, *([more] if len(kept) < len(rows) else [])]


def facts(study: Study, requests: list[Request], found: Forecast) -> dict:
    """The same as plain values."""
    names = ("seconds", "memory_bytes", "gpu_memory_bytes", "disk_bytes", "download_bytes")
    return {
        "profile": study.profile.name,
        "model": study.profile.model,
        "missing": [request.key for request in found.missing],
        "measurements": [request.key for request in requests],
        "estimates": {key: asdict(estimate) for key, estimate in found.estimates.items()},
        "seconds_unknown": found.unknown,
        **{name: getattr(found, name) for name in (*names, "obstacles")},
    }


def _data_obstacles(missing: list[Request]) -> list[str]:
    """Texts and tasks of the hub that are not available now."""
    read = {texts.source_of(part) for request in missing for part in texts_of(request.config)}
    found = [
        corpora.obstacle(text, texts.default_split(text, split), revision)
        for text, split, revision in sorted(read, key=str)
    ]
    for task in sorted({r.config["task"] for r in missing if r.kind == "task"}):
        if at_hub := TASKS[task].hub:
            found.append(hub.dataset_refusal(f"task {task!r}", *at_hub, "leave it out"))
    return list(dict.fromkeys(filter(None, found)))


def _room_obstacles(settings: Profile, forecast: Forecast, workers: int) -> list[str]:
    """Memory that this machine lacks, and disk, each where downloads and sliced networks go."""
    found, device, needed = [], forecast.device, forecast.memory_bytes
    if device.type == "cuda":
        spread = range(torch.cuda.device_count()) if settings.placement == "spread" else [device]
        have = sum(torch.cuda.get_device_properties(gpu).total_memory for gpu in spread)
    else:
        have = memory_of_machine()
    if needed * workers > have:
        other = {"resident": "streamed", "streamed": "spread"}.get(settings.placement)
        instead = f"--set placement={other}, or " if other else ""
        each = f" for each of {workers} workers" if workers > 1 else ""
        found.append(
            f"{settings.model!r} in {settings.dtype} with placement {settings.placement} takes "
            f"{shown_bytes(needed)} of {_kind(device)} memory{each}, this machine has "
            f"{shown_bytes(have)}; {instead}use a larger machine or fewer calibration windows"
        )
    disk = forecast.disk_bytes * workers
    for needed, folder, variable, what in (
        (forecast.download_bytes, Path(constants.HF_HUB_CACHE), "HF_HOME", "the hub's cache"),
        (disk, paths.CACHE, "DYNSLICE_CACHE", "the cache of dynslice"),
    ):
        there = next(path for path in (folder, *folder.parents) if path.is_dir())
        if needed > (free := shutil.disk_usage(there).free):
            found.append(
                f"the run takes {shown_bytes(needed)} of disk in {what}, {shown_bytes(free)} are "
                f"free there; free some, or move it with {variable}"
            )
    return found


def _kind(device: torch.device) -> str:
    return "host" if device.type == "cpu" else "device"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    for unit, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.1f} s"
