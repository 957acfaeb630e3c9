"""What a machine may lack: room and rights on its disks, memory, a terminal, a checkout."""

import errno
import os
import pty
import resource
import shutil
import socket
import ssl
import subprocess
import sys
from contextlib import contextmanager, suppress

import pytest
from datasets.exceptions import DatasetGenerationError
from prose import paragraphs
from safetensors import SafetensorError
from test_faults import can_mount

from dynslice.cli import commands
from dynslice.core import assets, errors, paths, tensors
from dynslice.core.errors import DiskError, RequestError, disk_trouble
from dynslice.experiment import agenda
from dynslice.experiment.store import Request, Store
from dynslice.inputs import models, texts

TINY = "embedded:tiny-random"
NO_CHECKOUT = "is part of a checkout; clone the repository"

# Disks

FULL = ("ENOSPC", "EDQUOT", "EROFS", "EFBIG", "EMFILE", "ENFILE")
LOST = ("EIO", "ENXIO", "ENODEV", "ESTALE", "ENOTCONN", "EREMOTEIO", "EUCLEAN", "ESHUTDOWN")
OF_PATHS = ("EACCES", "EPERM", "ENOTDIR", "ENAMETOOLONG", "ELOOP", "EXDEV", "EBUSY", "ETXTBSY")


def made_from(error, cause):
    """An error as `raise error from cause` leaves it."""
    error.__cause__ = cause
    return error


# How the libraries tell of an error of the system.
TOLD_BY = {
    "the system": lambda n: OSError(n, os.strerror(n), "/there/file"),
    "shutil": lambda n: OSError(n, os.strerror(n), "/here/file", None, "/there/file"),
    "safetensors": lambda n: SafetensorError(f"I/O error: {os.strerror(n)} (os error {n})"),
    "Arrow": lambda n: OSError(f"[Errno {n}] Error writing bytes to file. Detail: [errno {n}]"),
    "datasets": lambda n: made_from(
        DatasetGenerationError("An error occurred while generating the dataset"),
        OSError(n, os.strerror(n), "/there/file"),
    ),
}


@pytest.mark.parametrize("by", TOLD_BY)
@pytest.mark.parametrize("name", [*FULL, *LOST[:-1], *OF_PATHS])  # the last is also EPIPE's type
def test_each_error_of_a_disk_ends_a_command_in_one_sentence(name, by, ask, monkeypatch):
    def fail(_options):
        raise TOLD_BY[by](getattr(errno, name))

    monkeypatch.setattr(commands, "plan_of", fail)
    status, out, said = ask("plan", "--model", TINY, "--slice-percentage", 0.2)
    assert (status, out) == (1, "")
    [sentence] = said.strip().splitlines()
    assert sentence.startswith("dynslice: ")
    assert "; " in sentence  # what to do
    assert "Error" not in sentence
    if by not in ("safetensors", "Arrow") and name not in ("EMFILE", "ENFILE"):
        assert "/there/file'" in sentence
        assert "here/file' " not in sentence.replace("there/file", "")


@pytest.mark.parametrize("by", TOLD_BY)
@pytest.mark.parametrize("name", [*FULL, *LOST])
def test_a_disk_that_fails_ends_a_study(name, by, tmp_path):
    class Runner:
        store = Store(tmp_path)

        def measure(self, *_):
            raise made_from(RequestError("save it anew"), TOLD_BY[by](getattr(errno, name)))

    with pytest.raises(DiskError, match="; "):
        agenda.attempt(Runner(), Request("ppl", {}), None)


def test_what_one_file_refuses_ends_one_measurement(tmp_path):
    class Runner:
        store = Store(tmp_path)

        def measure(self, *_):
            raise PermissionError(errno.EACCES, "Permission denied", "/there/file")

    reason = agenda.attempt(Runner(), Request("ppl", {}), None)
    assert "there/file' cannot be used (permission denied); name another place" in reason


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError("Not enough disk space. Needed: 2 GiB (download: 1 GiB)"), "is full; free some"),
        (FileNotFoundError(2, "No usable temporary directory found in ['/tmp']"), "; set TMPDIR"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "the memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "the memory of this machine"),
        (MemoryError(), "is used up; use fewer or smaller windows"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_has_no_number_is_understood_by_its_words(error, sentence, ask, monkeypatch):
    def fail(_options):
        raise error

    monkeypatch.setattr(commands, "plan_of", fail)
    status, _, said = ask("plan", "--model", TINY, "--slice-percentage", 0.2)
    assert status == 1
    assert sentence in said
    assert said.count("\n") == 1


def test_what_is_said_of_a_request_stands_unless_the_disk_fails():
    closed = made_from(RequestError("check the path"), PermissionError(errno.EACCES, "denied"))
    assert errors.disk_trouble(closed) is None
    lost = made_from(RequestError("save it anew"), SafetensorError("(os error 5)"))
    assert "fails (input/output error); see that it is mounted" in errors.disk_trouble(lost)


@contextmanager
def no_file_above(size):
    """A disk that takes no more than so many bytes a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("command", ["slice", "slice --stream", "slice --plain", "quantize"])
def test_a_real_limit_of_a_disk_ends_what_writes_models(command, tmp_path, ask, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(paragraphs(10), encoding="utf-8")
    how = "--bits 8" if command == "quantize" else "--slice-percentage 0.25 --calibration text.txt"
    how += "" if command == "quantize" else " --windows 2 --window 64"
    words = f"{command} --model {models.resolve(TINY)} --out MADE {how}".split()
    with no_file_above(3000):
        status, out, said = ask(*words)
    assert (status, out) == (1, "")
    assert said.startswith("dynslice: a file at '.' exceeds the limit on file sizes; raise it")
    assert said.count("\n") == 1
    assert os.listdir(tmp_path) == ["text.txt"]


def test_a_full_standard_output_is_named(dynslice):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "dynslice", "assets", "list"]
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 1
    assert ended.stderr.startswith("dynslice: the disk of 'standard output' is full; ")
    assert ended.stderr.count("\n") == 1


# Memory

GROUPS = {
    "version 2": ("0::/a/b", {"a/b/memory.max": 100}, 100),
    "version 2, of the group above": ("0::/a/b", {"a/memory.max": 90, "a/b/memory.max": "max"}, 90),
    "version 2, in a container": ("0::/", {"memory.max": 80}, 80),
    "version 1": ("4:memory:/a", {"memory/a/memory.limit_in_bytes": 70}, 70),
    "version 1, in a container": ("4:hugetlb,memory:/x", {"memory/memory.limit_in_bytes": 60}, 60),
    "none": ("4:cpu:/a", {"cpu/a/memory.limit_in_bytes": 50}, None),
    "no limit": ("4:memory:/", {"memory/memory.limit_in_bytes": 2**63 - 4096}, None),
}


@pytest.mark.parametrize("case", GROUPS)
def test_the_limits_of_control_groups_are_the_machines_memory(case, tmp_path):
    line, limits, expected = GROUPS[case]
    groups = tmp_path / "proc/self/cgroup"
    groups.parent.mkdir(parents=True)
    groups.write_text(f"{line}\n1:name=systemd:/a\n")
    for name, limit in limits.items():
        file = tmp_path / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{limit}\n")
    without = tensors.memory_of_machine(tmp_path / "nothing")
    assert without > 2**20
    assert tensors.memory_of_machine(tmp_path) == (expected or without)


def test_the_limit_of_the_process_is_the_machines_memory(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (2**20, resource.RLIM_INFINITY))
    assert tensors.memory_of_machine() == 2**20


# Terminals

BARS = """
import sys
from dynslice.cli import commands
def bars(_options):
    from tqdm.auto import tqdm
    list(tqdm(range(4), ncols=50, nrows=20, disable=False))
    list(tqdm(range(5), ncols=50, nrows=20))
    return {}, []
commands.COMMANDS["assets"] = bars
sys.exit(commands.main(["assets", "list"]))
"""


def _read(terminal):
    with suppress(OSError):  # its end
        while said := os.read(terminal, 1000):
            yield said


@pytest.mark.parametrize("is_terminal", [False, True])
def test_bars_are_drawn_on_a_terminal_alone(is_terminal):
    """Libraries ask for theirs by disable=False, which TQDM_DISABLE does not outweigh."""
    ours, theirs = pty.openpty() if is_terminal else os.pipe()
    environment = {name: x for name, x in os.environ.items() if name != "TQDM_DISABLE"}
    ended = subprocess.run([sys.executable, "-c", BARS], stderr=theirs, env=environment)
    os.close(theirs)
    said = b"".join(_read(ours))
    assert ended.returncode == 0, said
    assert [said.count(b"4/4"), said.count(b"5/5")] == ([1, 1] if is_terminal else [0, 0])
    assert is_terminal == (b"\r" in said)


# Checkouts


def test_a_wheel_outside_a_checkout_does_what_needs_none(tmp_path):
    shutil.copytree(paths.PACKAGE, tmp_path / "site" / "dynslice")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "text.txt").write_text(paragraphs(4), encoding="utf-8")
    asked = f"--model {models.resolve(TINY)} --text text.txt --windows 1 --window 32"
    commands_ = [f"ppl {asked}", "assets list", "ppl --text sotu --model x/y"]
    code = f"from dynslice.cli.commands import main\nfor c in {commands_}: print(main(c.split()))"
    hidden = ("DYNSLICE_CACHE", "DYNSLICE_OUTPUT")
    environment = {name: x for name, x in os.environ.items() if name not in hidden}
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "here",
        env={**environment, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert ended.stdout.startswith("perplexity "), ended.stderr
    assert ended.stdout.split("\n")[1:4] == ["0", "2", "2"]
    assert ended.stderr.count("dynslice: data/assets.json, which lists the embedded") == 2
    assert ended.stderr.count(NO_CHECKOUT) == ended.stderr.count("\n") == 2


def test_what_is_embedded_needs_the_list_of_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "ASSET_MANIFEST", tmp_path / "assets.json")
    with pytest.raises(RequestError, match=NO_CHECKOUT):
        texts.checked_split("wikipedia", "test")


# Caches that are shared, and closed


@pytest.mark.skipif(not can_mount(), reason="no file system can be mounted here")
def test_a_cache_that_may_only_be_read(tmp_path):
    assets.fetch()
    cache, output = tmp_path / "cache", tmp_path / "output"
    for name in ("tiny-random", "smollm2-135m"):
        models.resolve(f"embedded:{name}")
    (cache / "models").mkdir(parents=True)
    output.mkdir()
    for name in ("assets", "models/tiny-random", "models/smollm2-135m"):
        (cache / name).symlink_to(paths.CACHE / name)
    tasks = f"tasks --model {TINY} --tasks piqa --limit 2"
    asked = [tasks, "assets fetch", "plan --slice-percentage 0.2 --model embedded:tiny-mistral"]
    code = f"from dynslice.cli.commands import main\nfor c in {asked}: print(main(c.split()))"
    script = (
        f"for f in {cache} {paths.CACHE}; do mount --bind $f $f && mount -o remount,ro,bind $f; "
        'done; exec "$@"'
    )
    ended = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", sys.executable, "-c", code],
        env={**os.environ, "DYNSLICE_CACHE": str(cache), "DYNSLICE_OUTPUT": str(output)},
        capture_output=True,
        text=True,
    )
    assert [int(line) for line in ended.stdout.split("\n") if len(line) == 1] == [0, 1, 1], ended
    assert "piqa " in ended.stdout
    of_tasks, of_models = ended.stderr.strip().splitlines()
    assert "lm_eval_tasks' is on a read-only file system; set DYNSLICE_CACHE" in of_tasks
    assert "tiny-mistral' is on a read-only file system; set DYNSLICE_CACHE" in of_models


def test_numbers_of_other_makers_are_none_of_the_disks():
    """TLS, name servers and a firewall have numbers that errors of a disk have too."""
    tls = made_from(OSError("no"), ssl.SSLCertVerificationError(1, "certificate verify failed"))
    names = made_from(OSError("no"), socket.gaierror(5, "no address"))
    assert disk_trouble(tls) is None
    assert disk_trouble(names) is None
    network = type("NetworkError", (Exception,), {})("as clients of HTTP call it")
    firewall = made_from(network, PermissionError(errno.EPERM, "not permitted"))
    assert disk_trouble(firewall) is None


def test_a_chain_of_errors_that_is_a_circle_is_no_trouble_of_a_disk():
    first, second = ValueError("plain words"), KeyError("others")
    first.__cause__, second.__cause__ = second, first
    assert disk_trouble(first) is None
