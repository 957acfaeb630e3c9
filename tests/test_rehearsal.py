"""The profile `paper` rehearsed on a stand-in for the hub, and a user's own model."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import hub_stand_in
import pytest
import rehearse
import yaml
from conftest import run_all
from notebook_kernels import one_kernel
from prose import paragraphs

from dynslice.core import assets, paths
from dynslice.experiment.estimate import Machine
from dynslice.experiment.profile import load
from dynslice.experiment.store import Store
from dynslice.experiment.study import Study
from dynslice.inputs import corpora, models

MODELS = ("tiny-llama-3", "tiny-mistral")
# Those that the profile asks something for, and one for all models.
NOTEBOOKS = sorted(path.name for path in paths.NOTEBOOKS.glob("0[1-7]*.ipynb"))
ACROSS = "08_models.ipynb"
SECONDS = 180  # that a run of both models may take


@pytest.fixture
def quick_to_plan(machine, monkeypatch):
    monkeypatch.setattr(Machine, "measured", lambda *_: machine)


@pytest.fixture
def hub(tmp_path):
    """The stand-in of the rehearsal, to which this process is connected with an empty cache."""
    assets.fetch()
    rehearse.make_repositories(tmp_path / "served")
    with (
        hub_stand_in.serving(tmp_path / "served") as hub,
        hub_stand_in.connected(hub, tmp_path / "home"),
    ):
        yield hub


def reproduced(folder, ask, *options):
    """Run the profile in this process: what it says of each model, and how long it took."""
    start = time.perf_counter()
    with one_kernel(folder):
        status, out, err = ask("reproduce", "--profile", "rehearsal", "--json", *options)
    assert status == 0, err[-2000:]
    outcome = json.loads(out)
    return outcome.get("models", [outcome]), time.perf_counter() - start


def check_rendered(folder, run, notebooks):
    """The notebooks of a model: all of them, of this model, without errors, with their figures."""
    rendered = sorted((folder / "notebooks/rendered" / run["profile"]).glob("*.ipynb"))
    name = run["profile"].rpartition("/")[2]
    assert [path.name for path in rendered] == notebooks
    for notebook in rendered:
        assert f"rehearsal/{name}" in notebook.read_text()
        for cell in json.loads(notebook.read_text())["cells"]:
            for output in cell.get("outputs", []):
                assert output["output_type"] != "error"
                assert output.get("name") != "stderr", output.get("text")
    for stem in ("perplexity", "slice_base_sweep"):
        assert (folder / "figures" / run["profile"] / f"{stem}.pdf").stat().st_size > 100


def check_rendered_across(folder, runs):
    """The notebook about all models stands above their folders and names each of them."""
    profile = runs[0]["profile"].partition("/")[0]
    text = (folder / "notebooks/rendered" / profile / ACROSS).read_text()
    assert all(f"rehearsal/{run['profile'].rpartition('/')[2]}" in text for run in runs)
    assert (folder / "figures" / profile / "models.pdf").stat().st_size > 100


def check_from_hub(folder, name, requests, commits):
    """Every request has its result, which names the commits of what the hub served."""
    store = Store(folder / "data/results/rehearsal" / name)
    results = [store.get(request) for request in requests]
    assert None not in results
    assert not any("stand_in" in result.config for result in results)
    read = {}
    for result in results:
        read |= result.provenance.get("hub_commits", {})
    assert f"rehearsal/{name}" in read
    assert read.items() <= commits.items()
    return set(read)


def commits_of(hub):
    """The commits at which the models and texts of the rehearsal are served."""
    found = {name: hub.commit("models", name) for name in load("rehearsal").models}
    for name in rehearse.FILLED_BY:
        text = corpora.HUB[name]
        found[name] = hub.commit("datasets", text.repository, text.revision or "main")
    return found


# One task in the place of six, and slicing layer by layer from what was downloaded.
ONE_TASK = ("--set", "tasks={piqa: 2}")
STREAMED = ("--set", "placement=streamed", "--set", "host_memory_gib=0.25")
STREAMED += ("--set", "speed_slice_percentages=[]", "--set", "lr_compare_texts=[]")


def test_rehearsal_runs_the_paper_from_a_hub_and_streams_sharded_models(
    ask, hub, quick_to_plan, tmp_path
):
    """The second model wholly, the first streamed to its perplexities; all of it by `-m long`."""
    first, second = (("--set", f"model=rehearsal/{name}") for name in MODELS)
    [plan], _ = reproduced(tmp_path, ask, *second, *ONE_TASK, "--dry-run")
    assert (plan["obstacles"], len(plan["missing"])) == ([], len(plan["measurements"]))
    assert not any("safetensors" in request for request in hub.requests)
    [whole], seconds = reproduced(tmp_path, ask, *second, *ONE_TASK)
    assert whole["measured"] == whole["measurements"] > 50
    [streamed], more = reproduced(tmp_path, ask, *first, *STREAMED, "--only", "02")
    assert streamed["profile"].endswith(f"/{MODELS[0]}")
    assert streamed["measured"] == streamed["measurements"] > 10
    assert seconds + more < SECONDS
    assert any("/model-00002-of-" in request for request in hub.requests)
    assert not any("discussions" in request for request in hub.requests)
    check_rendered(tmp_path, whole, NOTEBOOKS)
    check_rendered(tmp_path, streamed, NOTEBOOKS[1:2])
    check_rendered_across(tmp_path, [whole])
    for stem in ("layer_redundancy", "tasks"):
        assert (tmp_path / "figures" / whole["profile"] / f"{stem}.pdf").stat().st_size > 100
    commits, tasks = commits_of(hub), {"piqa": 2}
    study = Study.open("rehearsal", model=f"rehearsal/{MODELS[1]}", tasks=tasks)
    read = check_from_hub(tmp_path, MODELS[1], study.requests(), commits)
    assert read == {f"rehearsal/{MODELS[1]}", *rehearse.FILLED_BY}
    study = Study.open("rehearsal", lr_compare_texts=[])
    check_from_hub(tmp_path, MODELS[0], study.design.perplexity_requests(), commits)


@pytest.mark.long
def test_rehearsal_runs_all_of_the_paper_within_three_minutes(tmp_path):
    assets.fetch()
    start = time.perf_counter()
    run = run_all(tmp_path, "--profile", "rehearsal", "--json")
    assert run.returncode == 0, run.stderr[-2000:]
    assert time.perf_counter() - start < SECONDS
    told = json.loads(run.stdout[run.stdout.index("\n{") :])
    for outcome, name in zip(told["models"], MODELS, strict=True):
        assert outcome["measured"] == outcome["measurements"] > 50
        assert outcome["profile"] == f"rehearsal/{name}"
        check_rendered(tmp_path, outcome, NOTEBOOKS)
    check_rendered_across(tmp_path, told["models"])


@pytest.fixture
def handlers():
    """Put the signal handlers of this process back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


ASK = """
import os, signal, time, urllib.request
urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/api/models/rehearsal/tiny-mistral")
assert os.environ["HF_HOME"].startswith(os.environ["HERE"])
"""
TELL = "os.kill(os.getppid(), signal.{0})\ntime.sleep(60)"  # it gets the signal itself


@pytest.mark.parametrize(
    ("then", "status"),
    [(TELL.format("SIGTERM"), 143), (TELL.format("SIGINT"), 130), ("os._exit(3)", 3), ("", 0)],
)
def test_rehearsal_ends_as_its_command_and_leaves_nothing(
    then, status, tmp_path, monkeypatch, handlers
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("HERE", str(tmp_path))
    if "SIGINT" in then:
        then = "signal.signal(signal.SIGINT, signal.SIG_DFL)\n" + then
    assert rehearse.main([sys.executable, "-c", ASK + then]) == status
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "program"),
    [
        (("--profile", "rehearsal", "--dry-run"), "tests/rehearse.py"),
        (("--only", "02", "--profile=rehearsal"), "tests/rehearse.py"),
        (("--profile", "smoke"), "-m dynslice"),
        ((), "-m dynslice"),
    ],
)
def test_run_all_rehearses_with_a_hub_of_its_own(options, program, tmp_path):
    """What the script runs last, by an interpreter that only tells how it was called."""
    (interpreter := tmp_path / "python").write_text('#!/bin/sh\necho "$@"\n')
    interpreter.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "VIRTUAL_ENV": str(tmp_path)}
    command = [paths.ROOT / "run_all.sh", *options]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.stdout.splitlines()[-1] == " ".join([program, "reproduce", *options])


# What differs but for sizes: the models, and what a CPU and tiny models make of it.
APART = {"name", "description", "model", "model_hint", "models", "dtype", "task_subset"}
APART |= {"lr_compare_texts"}  # all texts of the hub, so that each is read


def test_rehearsal_asks_for_all_that_the_paper_does_but_for_sizes():
    paper, rehearsal = load("paper"), load("rehearsal")
    for key in type(paper).model_fields.keys() - APART:
        asked, cut = getattr(paper, key), getattr(rehearsal, key)
        if isinstance(asked, list | dict):
            assert bool(asked) == bool(cut), key
            names = [name for name in asked if isinstance(name, str)]
            assert names == [name for name in cut if isinstance(name, str)], key
        elif not isinstance(asked, float | int | None) or isinstance(asked, bool):
            assert asked == cut, key
    assert (paper.seed, paper.round_to) == (rehearsal.seed, rehearsal.round_to)
    assert {*paper.lr_compare_texts} <= {*rehearsal.lr_compare_texts}
    assert len(paper.models) == len(rehearsal.models)
    sizes = (paper.calibration_windows, paper.calibration_window, paper.selection_windows)
    assert sizes == (128, 2048, 120)
    assert paper.eval_windows is None
    assert (paper.lr_window, paper.lr_stride) == (1024, 256)
    assert set(paper.tasks.values()) == {1000}
    classes = [models.load_config(f"embedded:{name}").model_type for name in MODELS]
    assert classes == ["llama", "mistral"]


def test_directories_stand_in_for_corpora(ask, quick_to_plan, tmp_path):
    assets.fetch()
    texts = {"pg19": tmp_path / "books", "wikitext2": tmp_path / "articles"}
    for folder in texts.values():
        folder.mkdir()
        for split in ("train", "validation", "test"):
            (folder / f"{split}.txt").write_text(f"{split}. {paragraphs(20)}", encoding="utf-8")
    stand_ins = {name: str(folder) for name, folder in texts.items()}
    settings = {"stand_ins": stand_ins, "lr_compare_texts": [], "tasks": {}}
    settings |= {"task_slice_percentages": [], "ablation_slice_percentage": None}
    settings |= {"model": "embedded:tiny-mistral"}
    pairs = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    options = [part for pair in pairs for part in ("--set", pair)]
    [outcome], _ = reproduced(tmp_path / "out", ask, "--only", "01", "02", *options)
    assert outcome["measured"] == outcome["measurements"]
    study = Study.open("rehearsal", **settings)
    store = Store(tmp_path / "out/data/results/rehearsal/tiny-mistral")
    for request in study.design.perplexity_requests():
        assert store.get(request) is not None
        if "text" in request.config:
            assert request.config["stand_in"] == stand_ins["wikitext2"]
            assert len(request.config["text_sha256"]) == 64


def blocks_of(section, language=""):
    """The code blocks of a section of docs/usage.md."""
    page = (paths.ROOT / "docs" / "usage.md").read_text(encoding="utf-8")
    text = page.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [code for name, code in fenced if name == language]


@pytest.fixture
def shell(tmp_path):
    """A function that runs a command in a folder with the model and texts that the README names."""
    assets.fetch()
    models.resolve("embedded:smollm2-135m")
    shutil.copytree(models.resolve("embedded:tiny-random"), tmp_path / "DIR")
    for name, count in (("my.txt", 120), ("other.txt", 60)):
        (tmp_path / name).write_text(paragraphs(count), encoding="utf-8")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1"}
    environment["HF_MODULES_CACHE"] = str(tmp_path / "modules")

    def run(*command):
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env=environment
        )
        assert done.returncode == 0, (command, done.stderr[-2000:])
        return done.stdout

    return run


@pytest.fixture
def by_the_letter(shell, ask, tmp_path, monkeypatch):
    """A function that runs lines of the README: the first in bash, the others in this process."""

    def run(lines):
        monkeypatch.chdir(tmp_path)
        said = [shell("bash", "-c", lines[0])]
        for line in lines[1:]:
            program, *arguments = shlex.split(line)
            assert program == "dynslice"
            status, out, err = ask(*arguments)
            assert status == 0, (line, err[-2000:])
            said.append(out)
        return said

    return run


def test_a_better_slice_by_the_letter_of_the_readme(by_the_letter, tmp_path):
    commands = [line for code in blocks_of("A smaller model") for line in code.splitlines()]
    said = by_the_letter(commands)
    kinds = [line.split()[1] for line in commands]
    assert kinds == ["slice", "slice"]
    for name, share in (("SMALLER", 0.84), ("ORDINARY", 0.9)):
        found = json.loads((tmp_path / name / "slice.json").read_text())
        assert 0.9 * share < found["parameters"] / found["parameters_dense"] <= share
    assert all("wrote " in line for line in said)


def test_own_model_by_the_letter_of_the_readme(by_the_letter, shell):
    """Every command of the section, in order, on a model and texts of the names that it uses."""
    commands, lm_eval = blocks_of("Your own model")
    lines = commands.strip().splitlines()
    said = by_the_letter(lines)
    assert [line.split()[1] for line in lines] == ["lr", "plan", "slice", "ppl", "tasks"]
    assert "wrote SLICED" in said[2]
    assert "perplexity" in said[3]
    assert re.search(r"piqa +0\.\d+", said[4])
    load, _python = blocks_of("Your own model", "python")
    words = shell(sys.executable, "-c", load + "print(type(model).__name__, len(tokenizer))")
    assert words.split()[0] == "SlicedLlamaForCausalLM"
    folder = paths.CACHE / "lm_eval_tasks"
    assert "--include_path data/cache/lm_eval_tasks" in lm_eval
    limited = lm_eval.replace("data/cache/lm_eval_tasks", f"{folder} --limit 4")
    assert "piqa" in shell("bash", "-c", limited)


def test_profile_of_models_names_a_folder_for_each(tmp_path):
    settings = yaml.safe_load((paths.PROFILES / "smoke.yaml").read_text())
    del settings["model"]
    settings["models"] = ["somebody/one", str(tmp_path / "two")]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(settings))
    named = [load(str(tmp_path / "mine.yaml"), {"model": m}) for m in settings["models"]]
    assert [p.name for p in named] == ["mine/one", "mine/two"]
    assert load(str(tmp_path / "mine.yaml")).model == "somebody/one"
