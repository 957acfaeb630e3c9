"""Missing measurements are run here or by Ray; failures and killed workers lose no other."""

import json
import subprocess
import sys
import threading
import time
from contextlib import suppress

import psutil
import pytest
import torch
from test_study import SMALL

from dynslice.cli import commands
from dynslice.core import assets, paths
from dynslice.core.errors import RequestError, RunError
from dynslice.evaluate import perplexity
from dynslice.experiment import executor
from dynslice.experiment.agenda import WorkQueue, describe, needs
from dynslice.experiment.store import Request, Store
from dynslice.experiment.study import Study
from dynslice.method import redundancy, slicing

# Windows enough for a perplexity to take a while, so that a worker can be killed in the middle;
# and no speed, which is never twice the same.
SLOW = {"eval_windows": 256, "speed_slice_percentages": []}


def study_in(folder, monkeypatch, **overrides):
    monkeypatch.setattr(paths, "OUTPUT", folder)
    return Study.open("smoke", device="cpu", **{**SMALL, **overrides})


def values(study, requests):
    return {r.key: study.store.get(r).value for r in requests if study.store.get(r)}


def of_network(requests, network):
    return {r.key for r in requests if r.config.get("slice") == network}


@pytest.fixture
def small(tmp_path, monkeypatch):
    assets.fetch()
    return study_in(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def sequential(tmp_path_factory):
    """Every value by key as one process measures it, on one thread as each of two workers does."""
    assets.fetch()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        study = study_in(tmp_path_factory.mktemp("sequential"), patch, **SLOW)
        study.ensure(study.requests())
    torch.set_num_threads(threads)
    return values(study, study.requests())


def workers_at_work():
    """The worker processes under this one that measure, by process id.

    What a worker has just forked, to become git, is called as the worker is for a moment; it
    does not count.
    """
    found, parents = {}, {}
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            name = " ".join(process.cmdline()[:1])
            if name.startswith("ray::Worker") and process.status() != psutil.STATUS_ZOMBIE:
                parents[process.pid] = process.ppid()
                if name.endswith(".measure"):
                    found[process.pid] = process
    return {pid: process for pid, process in found.items() if parents[pid] not in parents}


# Failures


def test_a_failed_measurement_is_named_and_does_not_stop_the_others(small, monkeypatch, capfd):
    real, failed = perplexity.perplexity, []

    def fail_once(network, windows):
        if not failed and network.config.model_type.startswith("sliced_"):
            failed.append(network)
            raise ValueError("the moon\nis full")
        return real(network, windows)

    monkeypatch.setattr(perplexity, "perplexity", fail_once)
    requests = small.requests()
    with pytest.raises(RunError) as raised:
        small.ensure(requests)
    [missing] = small.missing(requests)
    assert missing.kind == "ppl"
    first, *others = str(raised.value).splitlines()
    assert first.startswith(f"1 of {len(requests)} measurements failed")
    [line] = others
    assert line.startswith(f"  {describe(missing)}: ValueError: the moon (test_executor")
    assert f"failed: {line.strip()}" in capfd.readouterr().err
    assert small.ensure(requests) == 1


def test_a_network_that_cannot_be_sliced_is_tried_once(small, monkeypatch, capfd):
    slice_model, plans = slicing.slice_model, []

    def fail_first(model, windows, plan, compensation):
        plans.append(plan)
        if len(plans) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return slice_model(model, windows, plan, compensation)

    monkeypatch.setattr(slicing, "slice_model", fail_first)
    requests = small.requests()
    with pytest.raises(RunError, match=r"of \d+ measurements failed") as raised:
        small.ensure(requests)
    networks = [p.network for p in small.points() if p.network]
    assert len(plans) == len(networks)
    assert {r.key for r in small.missing(requests)} == of_network(requests, networks[0])
    assert len(str(raised.value).splitlines()) == 2  # the same error is told once,
    assert capfd.readouterr().err.count("failed: ") == 1  # and was shown once
    assert "the GPU is out of memory; use fewer or smaller windows" in str(raised.value)


def test_what_needs_a_failed_lr_fails_with_it_and_the_rest_is_measured(small, monkeypatch):
    asked = []

    def fail(*amounts):
        asked.append(amounts)
        raise RuntimeError("no luck")

    monkeypatch.setattr(redundancy, "layer_redundancy", fail)
    requests = small.requests()
    with pytest.raises(RunError, match="its plan needs lr sotu dense, which failed"):
        small.ensure(requests)
    assert len(asked) == len([r for r in requests if r.kind == "lr"])
    lost = {r.key for r in requests if r.kind == "lr" or needs(r)}
    assert {r.key for r in small.missing(requests)} == lost
    assert len(lost) < len(requests)


def test_the_lr_that_a_plan_needs_comes_along_and_counts(small):
    dynamic = next(p for p in small.points() if p.schedule == "dynamic")
    assert small.ensure([small.slice_request(dynamic)]) == 2
    assert small.store.get(small.lr_request()) is not None


def test_many_errors_are_not_all_spelled_out_again(tmp_path):
    requests = [Request("ppl", {"slice": None, "text": f"text {i}"}) for i in range(15)]
    queue = WorkQueue(requests, Store(tmp_path))
    for i, request in enumerate(requests):
        queue.finished(request, f"error {i}")
    with pytest.raises(RunError, match="15 of 15") as raised:
        queue.check()
    assert len(str(raised.value).splitlines()) == 12


def test_the_command_line_exits_with_1(small, monkeypatch, capfd):
    def fail(*amounts):
        raise RuntimeError("no luck")

    monkeypatch.setattr(redundancy, "layer_redundancy", fail)
    assert commands.main(["reproduce", "--profile", "smoke", "--only", "01", "--json"]) == 1
    written = capfd.readouterr()
    assert written.out == ""
    assert "dynslice: 3 of 3 measurements failed" in written.err
    assert "RuntimeError: no luck" in written.err
    assert "Traceback" not in written.err


# Who takes what


def test_no_plan_starts_before_its_lr_is_there(small):
    requests = small.requests()
    queue = WorkQueue(requests, small.store)
    taken = []
    while job := queue.take():
        taken.append(job)
    started = {r.key for job in taken for r in job.requests}
    assert small.lr_request().key in started
    assert not [r for job in taken for r in job.requests if needs(r)]
    queue.finished(small.lr_request(), None)
    while job := queue.take():
        taken.append(job)
    assert sorted(r.key for job in taken for r in job.requests) == sorted(r.key for r in requests)
    sliced = [job.network for job in taken if job.network]
    assert len(sliced) == len([p for p in small.points() if p.network])
    assert all(len(job.requests) == 1 for job in taken if job.network is None)


# Ray


def test_two_workers_of_which_one_is_killed_measure_what_one_process_does(
    sequential, tmp_path, monkeypatch, capfd
):
    ray = pytest.importorskip("ray")
    init = ray.init  # counts two CPUs, whatever the machine has
    monkeypatch.setattr(ray, "init", lambda **given: init(**given, num_cpus=2))
    gone = tmp_path / "gone.txt"
    gone.write_text("a text that is not there when it is to be read")
    study = study_in(tmp_path, monkeypatch, **SLOW, lr_compare_texts=[str(gone)])
    requests = study.requests()
    gone.unlink()

    sliced = [p.network for p in study.points() if p.network]
    first = next(r for r in requests if r.kind == "slice" and r.config["slice"] == sliced[0])
    workers, left = set(), []

    def kill_one():
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline:
            time.sleep(0.05)
            found = workers_at_work()
            workers.update(found)
            if found and not left and study.store.get(first) is not None:
                time.sleep(0.1)  # into the next measurement
                left.append(study.missing(requests))
                next(iter(found.values())).kill()
            if len(study.missing(requests)) == 1:
                return

    killer = threading.Thread(target=kill_one)
    killer.start()
    try:
        with pytest.raises(RunError, match=f"1 of {len(requests)} measurements failed") as raised:
            study.ensure(requests, "ray")
    finally:
        killer.join()
    assert len(workers) == 3  # two, and the one that came for the killed one
    assert of_network(left[0], sliced[0])  # which was in the middle of its network
    assert f"lr {gone} dense: " in str(raised.value)
    [missing] = study.missing(requests)
    assert missing.config["text"] == str(gone)
    found = values(study, requests)
    assert found == {key: value for key, value in sequential.items() if key in found}
    files = sorted(p.name for p in study.store.folder.iterdir() if p.name != ".claims")
    assert files == sorted(f"{key}.json" for key in found)
    written = capfd.readouterr()
    assert written.out == ""
    lines = [line for line in written.err.replace("\r", "\n").splitlines() if line.strip()]
    assert [line for line in lines if not line.startswith(("measurements: ", "failed: lr "))] == []


def test_an_address_is_where_ray_connects(small, monkeypatch):
    ray = pytest.importorskip("ray")
    given, ended = [], []

    def init(**asked):
        given.append(asked)
        raise ConnectionError("far enough")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: ended.append(True))
    monkeypatch.setattr(executor, "_reach", lambda address: None)
    with pytest.raises(ConnectionError):
        small.ensure(small.lr_requests(), "ray", "head:6379")
    assert given[0]["address"] == "head:6379"
    assert "object_store_memory" not in given[0]  # which only who starts a cluster may say
    assert ended


# Requests that cannot be served


def test_an_address_where_nothing_answers_is_refused(small, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setattr(executor, "_PATIENCE", 6)
    with pytest.raises(RequestError, match=r"address '127\.0\.0\.1:1' \(no answer in 6 s\)"):
        small.ensure(small.lr_requests(), "ray", "127.0.0.1:1")


def test_ray_refuses_to_be_told_which_gpu(small):
    small.device = "cuda:1"
    with pytest.raises(RequestError, match="'cuda:1' names one GPU"):
        small.ensure(small.lr_requests(), "ray")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--address", "auto"], "--address auto is Ray's; add --executor ray"),
        (["--executor", "ray"], "needs the package ray"),
        (["--executor", "dask"], "invalid choice: 'dask'"),
    ],
)
def test_an_executor_that_cannot_start_is_refused(given, message, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    try:
        status = commands.main(["reproduce", "--profile", "smoke", *given])
    except SystemExit as refused:
        status = refused.code
    assert status == 2
    assert message in capsys.readouterr().err


def test_only_ray_loads_ray():
    code = "import sys, dynslice.experiment.study; print('ray' in sys.modules)"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert json.loads(finished.stdout.lower()) is False
