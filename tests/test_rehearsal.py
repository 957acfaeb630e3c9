"""The profile `paper` rehearsed: its notebooks and code on stand-ins, and a user's own model."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from notebook_kernels import one_kernel
from prose import paragraphs

from dynslice.core import assets, paths
from dynslice.experiment.estimate import Machine
from dynslice.experiment.profile import load
from dynslice.experiment.store import Store
from dynslice.experiment.study import Study
from dynslice.inputs import models

MODELS = ("tiny-llama-3", "tiny-mistral")
# Those that the profile asks something for, and one for all models.
NOTEBOOKS = sorted(path.name for path in paths.NOTEBOOKS.glob("0[1-6]*.ipynb"))
ACROSS = "08_models.ipynb"
SECONDS = 180  # that a run of both models may take


@pytest.fixture
def quick_to_plan(machine, monkeypatch):
    monkeypatch.setattr(Machine, "measured", lambda *_: machine)


def rehearse(folder, ask, *options):
    """Run the profile in this process: what it says of each model, and how long it took."""
    start = time.perf_counter()
    with one_kernel(folder):
        status, out, err = ask("reproduce", "--profile", "rehearsal", "--json", *options)
    assert status == 0, err[-2000:]
    outcome = json.loads(out)
    return outcome.get("models", [outcome]), time.perf_counter() - start


def check_rendered(folder, name, notebooks):
    """The notebooks of a model: all of them, of this model, without errors, with their figures."""
    rendered = sorted((folder / "notebooks/rendered/rehearsal" / name).glob("*.ipynb"))
    assert [path.name for path in rendered] == notebooks
    for notebook in rendered:
        assert f"embedded:{name}" in notebook.read_text()
        for cell in json.loads(notebook.read_text())["cells"]:
            for output in cell.get("outputs", []):
                assert output["output_type"] != "error"
                assert output.get("name") != "stderr", output.get("text")
    said = (rendered[1].read_text()).replace("\\n", " ")
    assert "`wikipedia` stands in for wikitext2" in said
    for stem in ("layer_redundancy", "perplexity", "slice_base_sweep"):
        assert (folder / "figures/rehearsal" / name / f"{stem}.pdf").stat().st_size > 100


def check_rendered_across(folder, names):
    """The notebook about all models stands above their folders and names each of them."""
    text = (folder / "notebooks/rendered/rehearsal" / ACROSS).read_text()
    assert all(f"embedded:{name}" in text for name in names)
    assert (folder / "figures/rehearsal/models.pdf").stat().st_size > 100


def check_stand_ins(folder, name, requests):
    """Every request of a study has its result, of the texts that stand in."""
    source = Path(models.resolve(f"embedded:{name}"))
    assert len(list(source.glob("model-*.safetensors"))) > 1
    store = Store(folder / "data/results/rehearsal" / name)
    results = [store.get(request) for request in requests]
    assert None not in results
    texts = {r.config["text"]: r.config["stand_in"] for r in results if "text" in r.config}
    assert texts == {"wikitext2": "wikipedia", "alpaca": "mmlu", "c4": "wikipedia"} | {
        "ptb": "wikipedia",
        "pg19": "sotu",
    }


def test_rehearsal_runs_the_paper_on_stand_ins_and_streams_sharded_models(
    ask, quick_to_plan, tmp_path
):
    """The first model wholly, the second to its perplexities; the rest of it by `-m long`."""
    assets.fetch()
    first, seconds = rehearse(tmp_path, ask, "--set", f"model=embedded:{MODELS[0]}")
    assert first[0]["measured"] == first[0]["measurements"] > 50
    both, more = rehearse(tmp_path, ask, "--only", "01", "02")
    assert [run["profile"] for run in both] == [f"rehearsal/{name}" for name in MODELS]
    assert both[0]["measured"] == 0
    assert both[1]["measured"] == both[1]["measurements"] > 10
    assert seconds + more < SECONDS
    check_rendered(tmp_path, MODELS[0], NOTEBOOKS)
    check_rendered(tmp_path, MODELS[1], NOTEBOOKS[:2])
    check_rendered_across(tmp_path, MODELS[:1])
    assert (tmp_path / "figures/rehearsal" / MODELS[0] / "tasks.pdf").stat().st_size > 100
    check_stand_ins(tmp_path, MODELS[0], Study.open("rehearsal").requests())
    second = Study.open("rehearsal", model=f"embedded:{MODELS[1]}").design
    asked = [*second.redundancy_requests(), *second.perplexity_requests()]
    check_stand_ins(tmp_path, MODELS[1], asked)


@pytest.mark.long
def test_rehearsal_runs_all_of_the_paper_within_three_minutes(dynslice, tmp_path):
    assets.fetch()
    start = time.perf_counter()
    command = ("reproduce", "--profile", "rehearsal", "--json")
    status, out, err = dynslice(*command, env={"DYNSLICE_OUTPUT": str(tmp_path)})
    assert status == 0, err[-2000:]
    assert time.perf_counter() - start < SECONDS
    for run, name in zip(json.loads(out)["models"], MODELS, strict=True):
        assert run["measured"] == run["measurements"] > 50
        check_rendered(tmp_path, name, NOTEBOOKS)
        check_rendered_across(tmp_path, MODELS)
        study = Study.open("rehearsal", model=f"embedded:{name}")
        check_stand_ins(tmp_path, name, study.requests())


def test_rehearsal_is_the_paper_but_for_sizes():
    paper, rehearsal = load("paper"), load("rehearsal")
    same = ("calibration_text", "eval_texts", "eval_split", "lr_text", "lr_split", "seed")
    same += ("lr_last_layer", "round_to")
    for key in same:
        assert getattr(paper, key) == getattr(rehearsal, key)
    assert set(paper.tasks) == set(rehearsal.tasks)
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
    [outcome], _ = rehearse(tmp_path / "out", ask, "--only", "01", "02", *options)
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
