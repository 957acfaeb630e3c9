"""The face of the project: pins, README, notebooks, the record."""

import ast
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from dataclasses import replace

import pandas as pd
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from dynslice.cli import commands, parser, record
from dynslice.core import paths
from dynslice.core.errors import RequestError
from dynslice.experiment.profile import Profile, parse_overrides
from dynslice.experiment.study import Study
from dynslice.report import claims, efficiency

LOCK = paths.ROOT / "requirements.lock"
RECORDED = [folder.name for folder in (paths.ROOT / "data" / "record").glob("*/")]

PAGES = [paths.ROOT / "README.md", *sorted((paths.ROOT / "docs").glob("*.md"))]


def pins(lines):
    return {line.strip() for line in lines if "==" in line}


def test_conda_users_get_the_pins_of_the_lock_file():
    environment = yaml.safe_load((paths.ROOT / "environment.yml").read_text())
    conda = next(part["pip"] for part in environment["dependencies"] if isinstance(part, dict))
    assert pins(conda) == pins(LOCK.read_text().splitlines())


def test_the_lock_with_hashes_has_the_same_pins():
    text = LOCK.with_name("requirements-cpu.lock").read_text(encoding="utf-8")
    entries = re.findall(r"^(\S+==\S+)((?: \\\n    --hash=sha256:[0-9a-f]{64})+)$", text, re.M)
    assert {pin for pin, _ in entries} == pins(LOCK.read_text().splitlines())


def test_every_requirement_of_the_project_is_pinned_within_its_range():
    project = tomllib.loads((paths.ROOT / "pyproject.toml").read_text())["project"]
    locked = dict(line.split("==") for line in pins(LOCK.read_text().splitlines()))
    extras = project["optional-dependencies"].values()
    for text in [*project["dependencies"], *(text for extra in extras for text in extra)]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(locked[canonicalize_name(requirement.name)]), text


@pytest.mark.parametrize("path", sorted(paths.NOTEBOOKS.glob("*.ipynb")), ids=lambda p: p.stem)
def test_notebook_sources_are_clean_and_take_parameters(path):
    notebook = json.loads(path.read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)
    tagged = [cell for cell in code if "parameters" in cell["metadata"].get("tags", [])]
    assert len(tagged) == 1
    assert all(len("".join(cell["source"]).splitlines()) <= 20 for cell in code)
    known = {*Profile.model_fields, "profile", "from_record", "device"}
    names = re.findall(r"^(\w+) =", "".join(tagged[0]["source"]), flags=re.M)
    assert set(names) <= known


# What `from_notebook` takes for a parameter where a name is bound to it.
PLAIN = (ast.Constant, ast.JoinedStr, ast.List, ast.ListComp, ast.Dict, ast.DictComp, ast.Tuple)


@pytest.mark.parametrize("path", sorted(paths.NOTEBOOKS.glob("*.ipynb")), ids=lambda p: p.stem)
def test_no_name_of_a_notebook_is_taken_for_a_parameter_when_it_is_run_again(path):
    """In one kernel: names of loops, texts and lists begin with an underscore."""
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] != "code" or "parameters" in cell["metadata"].get("tags", []):
            continue
        for node in ast.walk(ast.parse("".join(cell["source"]))):
            is_plain = isinstance(node, ast.For) or isinstance(getattr(node, "value", 0), PLAIN)
            if isinstance(node, ast.For | ast.Assign) and is_plain:
                targets = [node.target] if isinstance(node, ast.For) else node.targets
                names = [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]
                assert all(name.startswith("_") for name in names), names


@pytest.mark.parametrize("name", RECORDED)
def test_a_record_is_complete_and_of_clean_commits(name):
    study = Study.open(name, from_record=True)
    results = [study.store.get(request) for request in study.requests()]
    assert None not in results
    assert {result.provenance["dirty"] for result in results} == {False}
    assert None not in {result.provenance["commit"] for result in results}


@pytest.mark.parametrize("name", RECORDED)
def test_a_record_agrees_with_itself_and_not_with_altered_values(name):
    study = Study.open(name, from_record=True)
    requests = study.requests()
    same = record.agree(study, requests)
    assert same["agree"] == same["values"] > 0
    altered = Study.open(name, from_record=True)
    original = altered.store.get

    def get(request):
        result = original(request)
        if request.kind == "ppl":
            result.value["perplexity"] *= 1.002
        return result

    altered.store.get = get
    outcome = record.agree(altered, requests)
    count = sum(request.kind == "ppl" for request in requests)
    assert outcome["values"] - outcome["agree"] == count
    assert outcome["largest_deviation"] == pytest.approx(0.002)


def test_layer_redundancy_near_zero_agrees_by_its_difference():
    """The first layer's is near zero, where a relative deviation says nothing."""
    study = Study.open("quick", from_record=True)
    request, original = study.lr_request(), study.store.get

    def get(asked, apart=5e-4):
        result = original(asked)
        if asked == request:
            result.value["layers"][0]["lr"] += apart
        return result

    study.store.get = get
    assert record.agree(study, [request])["largest_deviation"] == pytest.approx(5e-4)
    outcome = record.agree(study, [request])
    assert outcome["agree"] == outcome["values"]


def test_a_page_without_an_end_marker_is_left_as_it_is(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a <!-- answer --> b")
    record._fill(page, "answer", lambda: "new")
    assert page.read_text() == "a <!-- answer --> b"
    page.write_text("a <!-- answer --> b <!-- /answer --> c")
    record._fill(page, "answer", lambda: "new")
    assert page.read_text() == "a <!-- answer -->\nnew\n<!-- /answer --> c"


def test_commands_in_the_readme_are_understood():
    from dynslice.cli.commands import options_of

    text = "\n".join(page.read_text() for page in PAGES)
    commands = [shlex.split(line) for line in text.splitlines() if line.startswith("dynslice ")]
    commands += [
        ["dynslice", "reproduce", *shlex.split(line, comments=True)[1:]]
        for line in text.splitlines()
        if line.startswith("./run_all.sh") and "--test" not in line
    ]
    assert len(commands) >= 10
    for _, *arguments in commands:
        options = options_of(arguments)
        if options.command == "reproduce":
            assert set(parse_overrides(options.set)) <= set(Profile.model_fields)


def test_python_in_the_readme_runs():
    text = (paths.ROOT / "docs" / "usage.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    code = next(block for block in blocks if "dynamic_slicing" in block)
    namespace = {}
    exec(code.replace("embedded:smollm2-135m", "embedded:tiny-random"), namespace)
    sliced = namespace["sliced"]
    assert sliced.model.num_parameters() == sliced.plan.parameters


@pytest.fixture
def on_a_gpu(tmp_path):
    """Run tools/measure_gpu.sh with a `python` that notes what it is asked: (status, asked)."""

    def run(failing):
        (tmp_path / "python").write_text(
            "#!/usr/bin/env bash\n"
            f'[ "$1" = -c ] && exec {sys.executable} "$@"\n'
            f'echo "$*" >> {tmp_path / "asked"}\n'
            f'case "$*" in {failing}) exit 3 ;; esac\n'
        )
        (tmp_path / "python").chmod(0o755)
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        finished = subprocess.run(
            [paths.ROOT / "tools" / "measure_gpu.sh"],
            env={**os.environ, "PATH": path, "VIRTUAL_ENV": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        return finished, (tmp_path / "asked").read_text().splitlines()

    return run


def test_one_command_measures_all_that_needs_a_gpu(on_a_gpu):
    finished, asked = on_a_gpu("nothing")
    assert finished.returncode == 0, finished.stderr
    benches = [line for line in asked if "dynslice bench" in line]
    missing = [c for n, c in efficiency.BENCHES.values() if n.endswith("-cuda")]
    assert benches == [
        f"-m {command} --out data/bench/{name}.json"
        for name, command in efficiency.BENCHES.values()
        if command in missing and not (paths.BENCH / f"{name}.json").is_file()
    ]
    assert "-m pytest tests/test_device.py" in asked
    assert asked[-1] == "-m dynslice reproduce --profile full --device cuda"


def test_a_step_that_fails_on_a_gpu_is_named_and_keeps_no_other_from_running(on_a_gpu):
    finished, asked = on_a_gpu("*pytest*")
    assert finished.returncode == 1
    assert finished.stderr.strip().splitlines()[-1] == "failed: pytest tests/test_device.py"
    assert asked[-1].endswith("--profile full --device cuda")


def test_all_that_is_measured_on_a_gpu_runs_on_a_cpu_on_small_settings(tmp_path):
    command = [paths.ROOT / "tools" / "measure_gpu.sh", "--device", "cpu", "--small"]
    finished = subprocess.run(
        [*command, "--out", tmp_path / "bench"],
        env={**os.environ, "DYNSLICE_OUTPUT": str(tmp_path), **_with_this_python(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert finished.stdout.splitlines()[-1] == "everything was measured"
    made = {path.name for path in (tmp_path / "bench").iterdir()}
    names = [name for name, _ in efficiency.BENCHES.values()]
    assert made == {f"{name}.json" for name in names if name.endswith("-cuda")}
    assert (tmp_path / "notebooks" / "rendered" / "smoke" / "02_perplexity.ipynb").is_file()


def _with_this_python(folder):
    """An environment in which `python` is this one."""
    (folder / "python").write_text(f'#!/usr/bin/env bash\nexec {sys.executable} "$@"\n')
    (folder / "python").chmod(0o755)
    return {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "VIRTUAL_ENV": str(folder)}


@pytest.fixture
def tested(tmp_path):
    """Start `./run_all.sh --test` with a `python` that runs a line of shell in place of pytest."""

    def start(line):
        (tmp_path / "python").write_text(
            f'#!/usr/bin/env bash\ncase "$*" in *pytest*) {line} ;; esac\n'
        )
        (tmp_path / "python").chmod(0o755)
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        return subprocess.Popen(
            [paths.ROOT / "run_all.sh", "--test"],
            env={**os.environ, "PATH": path, "VIRTUAL_ENV": str(tmp_path)},
            stdout=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.mark.parametrize("status", [0, 3])
def test_the_tests_of_run_all_end_with_their_time_and_status(status, tested):
    running = tested(f"exit {status}")
    said, _ = running.communicate(timeout=60)
    assert running.returncode == status
    assert re.fullmatch(r"the tests took 0 min \d+ s", said.splitlines()[-1])


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 2), ("SIGTERM", 143)])
def test_a_signal_to_run_all_reaches_its_tests(name, status, tested):
    """Those decide how it ends, as pytest does with SIGINT."""
    running = tested("trap 'exit 2' INT; echo ready; while :; do sleep 0.1; done")
    assert any(line == "ready\n" for line in running.stdout)
    running.send_signal(getattr(signal, name))
    said, _ = running.communicate(timeout=60)
    assert running.returncode == status
    assert "the tests took 0 min" in said


def test_every_message_that_the_readme_explains_is_one_that_the_code_says():
    page = (paths.ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    [table] = [part for part in page.split("\n\n") if part.startswith("| what you see")]
    sources = [*(paths.ROOT / "src/dynslice").rglob("*.py"), paths.ROOT / "run_all.sh"]
    code = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    code = re.sub(r'"\s*\n\s*f?"', "", code)  # sentences that are written in pieces
    cells = [line.split("|")[1] for line in table.splitlines()[2:]]
    messages = [message for cell in cells for message in re.findall("`(.+?)`", cell)]
    assert len(messages) >= 10
    for message in messages:
        for piece in filter(None, map(str.strip, message.split("..."))):
            assert piece.strip("'.,; ") in code, f"{message}: {piece}"


def test_the_dockerfile_sets_up_by_the_script_that_is_tested_here():
    """No image is built where there is no Docker; its parts are these."""
    text = (paths.ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    steps = [line.split(maxsplit=1) for line in text.splitlines() if line and line[0] != "#"]
    assert [word for word, _ in steps].count("FROM") == 1
    version = tuple(map(int, re.search(r"python:(\d+)\.(\d+)", text).groups()))
    assert version >= (3, 11)
    assert "--require-hashes" in text
    assert "-r requirements-cpu.lock" in text
    runs = [shlex.split(rest) for word, rest in steps if word == "RUN"]
    assert ["./run_all.sh", "--dry-run"] in runs
    parser.parser(commands.COMMANDS, "").parse_args(["reproduce", "--dry-run"])
    (entry,) = (json.loads(rest) for word, rest in steps if word == "ENTRYPOINT")
    assert entry == ["./run_all.sh"]
    assert os.access(paths.ROOT / entry[0], os.X_OK)
    ignored = (paths.ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert {".venv", "data/cache", "data/results"} <= {*ignored}
    assert ".git" not in ignored  # results name their commit


def test_verdicts_are_said_in_one_vocabulary():
    tables = sorted((paths.ROOT / "figures").glob("*/models_claims.csv"))
    assert tables
    for path in tables:
        table = pd.read_csv(path).drop(columns=["claim", "published", "at", "measured on"])
        said = {cell.partition(":")[0].partition(" (")[0] for cell in table.to_numpy().flat}
        assert said <= {*claims.VERDICTS}, path
    readme = PAGES[0].read_text(encoding="utf-8")
    lines = [line for line in readme.splitlines() if line.startswith("| claim: ")]
    verdicts = re.findall(r"\*\*([^*]+)\*\*:", "".join(lines))
    assert verdicts
    words = {word for said in verdicts for word in said.rstrip(")").split(" (read as a ratio: ")}
    assert words <= {*claims.VERDICTS}
    others = re.compile(r"\b(refuted|confirmed|does not hold|holds true|partly supported)\b", re.I)
    for page in [*PAGES, *sorted(paths.NOTEBOOKS.glob("*.ipynb"))]:
        assert not others.search(page.read_text(encoding="utf-8")), page


@pytest.fixture
def results(tmp_path, monkeypatch):
    """The results of `quick` as a run would leave them, and where its record goes."""
    shutil.copytree(paths.record("quick"), tmp_path / "results")
    monkeypatch.setattr(paths, "results", lambda _name: tmp_path / "results")
    monkeypatch.setattr(paths, "record", lambda _name: tmp_path / "record")
    monkeypatch.setattr(record, "update_pages", lambda _study: None)
    return Study.open("quick").store


def test_a_record_names_every_commit_that_measured_for_it(results):
    request = Study.open("quick").requests()[0]
    one = results.get(request)
    results.put(replace(one, provenance={**one.provenance, "commit": "b" * 40}))
    facts, (line,) = record.record("quick")
    assert facts["commits"]["b" * 40] == 1
    assert sum(facts["commits"].values()) == facts["results"]
    assert line.endswith("1 of commit bbbbbbbbbb") or "1 of commit bbbbbbbbbb, " in line
    recorded = Study.open("quick", from_record=True)
    assert recorded.store.get(request).provenance["commit"] == "b" * 40
    assert not recorded.missing(recorded.requests())


@pytest.mark.parametrize("change", [{"dirty": True}, {"dirty": None}, {"commit": None}])
def test_what_no_clean_commit_measured_is_no_record(results, change):
    one = results.get(Study.open("quick").requests()[0])
    results.put(replace(one, provenance={**one.provenance, **change}))
    with pytest.raises(RequestError, match="do not all come from a clean commit"):
        record.record("quick")
    assert not paths.record("quick").exists()


def test_an_incomplete_run_is_no_record(results):
    next(results.folder.glob("*.json")).unlink()
    with pytest.raises(RequestError, match=r"lacks 1 of \d+ measurements"):
        record.record("quick")
