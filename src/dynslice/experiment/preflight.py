"""Before a run starts: the plan of what it will measure, what it takes, and what stands in the way.

`--dry-run` shows all of it; a run stops at the first obstacle.
"""

import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
import torch
from huggingface_hub import constants

from dynslice.core import assets, hub, paths
from dynslice.core.errors import RequestError
from dynslice.core.tensors import pick_device
from dynslice.evaluate.task_table import TASKS
from dynslice.experiment.agenda import describe
from dynslice.experiment.estimate import Estimate, Estimator, Machine
from dynslice.experiment.profile import Profile
from dynslice.experiment.requests import texts_of
from dynslice.experiment.store import Request
from dynslice.experiment.study import Study
from dynslice.inputs import corpora, models, texts
from dynslice.inputs.models import is_remote
from dynslice.method.footprint import shown_bytes

SMOLLM2 = "embedded:smollm2-135m"  # whose shape is not known before it is fetched


@dataclass(frozen=True)
class Forecast:
    """What the missing measurements of one study take.

    obstacles: sentences that name what is missing and what to do. estimates: by key, none where the
    shape of the model is not known. memory_bytes: on the device here; gpu_memory_bytes: on a GPU,
    which works on larger batches. rate: FLOP/s of this machine's matrix product.
    """

    missing: list[Request]
    device: torch.device
    obstacles: list[str]
    estimates: dict[str, Estimate] = field(default_factory=dict)
    rate: float = 0.0
    download_bytes: int = 0
    disk_bytes: int = 0
    memory_bytes: int = 0
    gpu_memory_bytes: int = 0

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
    not asked about. Raises RequestError for a device that is not there.
    """
    device = pick_device("auto" if address else study.device)
    obstacles = _hub_obstacles(study.profile, missing)
    unfetched = study.profile.model == SMOLLM2 and not assets.are_there()
    if not missing or unfetched:
        return Forecast(missing, device, obstacles)
    try:
        estimator = Estimator(study.profile, device, machine)
    except RequestError as error:
        return Forecast(missing, device, obstacles or [str(error)])
    found = Forecast(
        missing,
        device,
        obstacles,
        estimates=estimator.estimate(missing),
        rate=estimator.machine.rate,
        download_bytes=estimator.download,
        disk_bytes=estimator.disk(missing),
        memory_bytes=estimator.peak(missing),
        gpu_memory_bytes=estimator.on(torch.device("cuda")).peak(missing),
    )
    if address is None:
        workers = (os.cpu_count() or 1) if executor == "ray" and device.type == "cpu" else 1
        obstacles += _room_obstacles(study.profile, device, found.memory_bytes, workers)
        obstacles += _disk_obstacles(found.download_bytes, found.disk_bytes * workers)
    return found


def lines(study: Study, requests: list[Request], found: Forecast) -> list[str]:
    """The plan of a study as a reader wants it: each measurement, the sums, the obstacles."""
    missing = {request.key for request in found.missing}
    rows = []
    for request in requests:
        estimate = found.estimates.get(request.key)
        state = "missing" if request.key in missing else "stored"
        cost = ""
        if estimate:
            cost = f"{_time(estimate.seconds):>9} {shown_bytes(estimate.memory_bytes):>9}"
        rows.append(f"{state:8} {request.key:24} {cost:19}  {describe(request)}".rstrip())
    return [
        f"profile {study.profile.name}: {study.profile.model} in {study.profile.dtype}, "
        f"placement {study.profile.placement}, on {found.device.type}",
        *rows,
        f"{len(missing)} of {len(requests)} measurements are missing",
        *([_sums(found)] if found.estimates else []),
        *(f"in the way: {obstacle}" for obstacle in found.obstacles),
    ]


def _sums(found: Forecast) -> str:
    total = _time(found.seconds) + (f" and {found.unknown} unknown" if found.unknown else "")
    on_a_gpu = f"(on a GPU {shown_bytes(found.gpu_memory_bytes)}), "
    on_a_gpu *= found.device.type == "cpu"
    return (
        f"time {total}, by operations counted at the {found.rate / 1e12:.3g} TFLOP/s of this "
        f"machine's own matrix product; "
        f"{_kind(found.device)} memory {shown_bytes(found.memory_bytes)} {on_a_gpu}"
        f"disk {shown_bytes(found.disk_bytes)}, "
        f"download of weights {shown_bytes(found.download_bytes)}"
    )


def facts(study: Study, requests: list[Request], found: Forecast) -> dict:
    """The same as plain values."""
    names = ("memory_bytes", "gpu_memory_bytes", "disk_bytes", "download_bytes", "obstacles")
    return {
        "profile": study.profile.name,
        "model": study.profile.model,
        "missing": [request.key for request in found.missing],
        "measurements": [request.key for request in requests],
        "estimates": {key: asdict(estimate) for key, estimate in found.estimates.items()},
        "seconds": found.seconds,
        "seconds_unknown": found.unknown,
        **{name: getattr(found, name) for name in names},
    }


def _hub_obstacles(settings: Profile, missing: list[Request]) -> list[str]:
    """A model or texts of the hub that can't be had now."""
    found = []
    model, revision = settings.model, settings.model_revision
    here = not is_remote(model) or models.in_cache(model, revision)
    if missing and not here and (reason := hub.model_refusal(model, revision)):
        found.append(f"model {model!r} {reason}")
    read = {texts.source_of(part) for request in missing for part in texts_of(request.config)}
    for text, split, text_revision in sorted(read, key=str):
        if reason := corpora.obstacle(text, split, text_revision):
            found.append(reason)
    for task in sorted({r.config["task"] for r in missing if r.kind == "task"}):
        at_hub = TASKS[task].hub
        if at_hub and (reason := hub.dataset_refusal(f"task {task!r}", *at_hub, "leave it out")):
            found.append(reason)
    return list(dict.fromkeys(found))


def _room_obstacles(
    settings: Profile, device: torch.device, needed: int, workers: int
) -> list[str]:
    """Memory that this machine lacks."""
    if device.type == "cuda":
        spread = range(torch.cuda.device_count()) if settings.placement == "spread" else [device]
        have = sum(torch.cuda.get_device_properties(gpu).total_memory for gpu in spread)
    else:
        have = psutil.virtual_memory().total
    if needed * workers <= have:
        return []
    other = {"resident": "streamed", "streamed": "spread"}.get(settings.placement)
    instead = f"--set placement={other}, or " if other else ""
    each = f" for each of {workers} workers" if workers > 1 else ""
    return [
        f"{settings.model!r} in {settings.dtype} with placement {settings.placement} takes "
        f"{shown_bytes(needed)} of {_kind(device)} memory{each}, this machine has "
        f"{shown_bytes(have)}; {instead}use a larger machine or fewer calibration windows"
    ]


def _disk_obstacles(download: int, disk: int) -> list[str]:
    """Disk that downloads and sliced networks lack, each where it goes."""
    places = (
        (download, Path(constants.HF_HUB_CACHE), "HF_HOME", "the hub's cache"),
        (disk, paths.CACHE, "DYNSLICE_CACHE", "the cache of dynslice"),
    )
    found = []
    for needed, folder, variable, what in places:
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
