"""Where the code comes from: the checkout that runs, whatever surrounds it and a user has set."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dynslice.core import paths
from dynslice.experiment.store import Result
from dynslice.experiment.study import Study
from dynslice.report import efficiency, style

UNKNOWN = {"commit": None, "dirty": None}
PARTS = ("__init__.py", "core", "experiment")
STORE = "src/dynslice/experiment/store.py"


def git(folder, *arguments):
    """What git says there; its settings are those of nobody."""
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(folder), *arguments]
    here = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    here["GIT_CONFIG_GLOBAL"] = os.devnull
    done = subprocess.run(command, env=here, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def commit(folder):
    """A repository there with all that is not ignored in one commit; which one that is."""
    git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--allow-empty", "--message", "all")
    return git(folder, "rev-parse", "HEAD")


def copied(folder):
    """The parts of the package that say where they come from, below `folder`/src."""
    package = folder / "src" / "dynslice"
    for part in PARTS:
        source, target = paths.PACKAGE / part, package / part
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            package.mkdir(parents=True)
            shutil.copy(source, target)
    (folder / "pyproject.toml").write_text("[project]\n")
    return folder


@pytest.fixture
def checkout(tmp_path):
    """A checkout with one commit."""
    folder = copied(tmp_path / "check out")
    (folder / ".gitignore").write_text("__pycache__/\n")
    commit(folder)
    return folder


def told(folder, cwd=None, **environment):
    """What the package below `folder`/src says of its checkout, in a process of its own."""
    code = "import json; from dynslice.experiment.store import _checkout as checkout; "
    code += "print(json.dumps(checkout()))"
    here = {**os.environ, "PYTHONPATH": str(folder / "src"), **environment}
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, cwd=cwd or folder, env=here, check=True, capture_output=True)
    return json.loads(done.stdout)


def change(folder):
    """A change of the code."""
    path = folder / STORE
    path.write_text(path.read_text() + "# changed\n")


@pytest.fixture
def elsewhere(tmp_path):
    """A repository that has nothing to do with the code."""
    (tmp_path / "elsewhere").mkdir()
    commit(tmp_path / "elsewhere")
    return tmp_path / "elsewhere"


def variables(repository):
    """What git and its hooks set; each, or one alone, leads to another repository."""
    inside = repository / ".git"
    every = {
        "GIT_DIR": str(inside),
        "GIT_WORK_TREE": str(repository),
        "GIT_INDEX_FILE": str(inside / "index"),
        "GIT_OBJECT_DIRECTORY": str(inside / "objects"),
        "GIT_CEILING_DIRECTORIES": "/",
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": "core.worktree",
        "GIT_CONFIG_VALUE_0": str(repository),
    }
    return [every, {"GIT_DIR": str(inside)}, {"GIT_WORK_TREE": str(repository)}]


def test_the_environment_names_no_other_repository(checkout, elsewhere):
    head = git(checkout, "rev-parse", "HEAD")
    assert told(checkout) == {"commit": head, "dirty": False}
    for given in variables(elsewhere):
        assert told(checkout, **given) == {"commit": head, "dirty": False}
    change(checkout)
    for given in variables(elsewhere):
        assert told(checkout, **given) == {"commit": head, "dirty": True}


def _untracked(checkout):
    (checkout / "src/dynslice/new.py").write_text("")


def _ignored(checkout):
    _untracked(checkout)
    (checkout / "src/dynslice/.gitignore").write_text("*\n")


HIDDEN = {
    "no untracked files": (["status.showUntrackedFiles", "no"], [], _untracked),
    "ignored by a user": (["core.excludesFile", "everything"], [], _untracked),
    "ignored where it lies": ([], [], _ignored),
    "assumed unchanged": ([], ["update-index", "--assume-unchanged", STORE], change),
    "not in the work tree": ([], ["update-index", "--skip-worktree", STORE], change),
}


@pytest.mark.parametrize("case", HIDDEN)
def test_settings_hide_no_changed_code(checkout, case):
    setting, marked, alter = HIDDEN[case]
    (checkout / "everything").write_text("*\n")
    commit(checkout)
    if setting:
        git(checkout, "config", *setting)
    if marked:
        git(checkout, *marked)
    assert told(checkout)["dirty"] is False
    alter(checkout)
    assert told(checkout)["dirty"] is True


def _below(folder):
    """The sources in a folder of another repository, in its commit."""
    return copied(folder / "vendored"), folder


def _ignored_there(folder):
    """The sources at the same place of another repository, which ignores them."""
    (folder / ".gitignore").write_text("src/\n")
    return copied(folder), folder


def _installed(folder):
    """The package outside any repository, run from a repository."""
    outside = copied(folder.parent / "site")
    (outside / "pyproject.toml").unlink()
    return outside, folder


@pytest.mark.parametrize("lay", [_below, _ignored_there, _installed])
def test_code_of_no_commit_has_none(tmp_path, lay):
    somebodys = tmp_path / "somebodys"
    somebodys.mkdir()
    code, repository = lay(somebodys)
    commit(repository)
    assert told(code, cwd=somebodys) == UNKNOWN


def test_a_checkout_within_another_repository_speaks_for_itself(elsewhere):
    inner = copied(elsewhere / "inner")
    head = commit(inner)
    assert told(inner, cwd=elsewhere) == {"commit": head, "dirty": False}
    assert Path(inner, ".git").is_dir()


def test_a_report_says_that_the_code_was_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "OUTPUT", tmp_path)
    study = Study.open("smoke")
    request = study.requests()[0]
    where = {"device": "a CPU", "threads": 1, "commit": "0123456789abcdef"}
    for dirty, words in ((False, "commit 0123456789."), (True, "0123456789 with local changes.")):
        result = Result(request.kind, request.config, {}, 0.0, 0, {**where, "dirty": dirty})
        study.store.put(result)
        assert style.device_line(study).endswith(words)


def test_a_benchmark_of_an_unknown_commit_is_shown():
    bench = json.loads(next(paths.BENCH.glob("*.json")).read_text())
    bench["provenance"] |= UNKNOWN
    assert "code at commit unknown." in efficiency.bench_prose("a machine", bench)
