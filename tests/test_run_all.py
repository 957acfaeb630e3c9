"""./run_all.sh on the smoke profile, from nothing to notebooks, and then again."""

import json
import os
import shutil
import subprocess

import papermill
import yaml
from conftest import SMOKE, measured, run_all
from prose import paragraphs

from dynslice.core import paths
from dynslice.experiment.estimate import Machine
from dynslice.inputs import models


def test_first_run_measures_everything(smoke):
    done, total = measured(smoke.stdout)
    assert done == total == len(smoke.results) > 20
    assert "set-up took" in smoke.stdout
    assert "profile smoke took" in smoke.stdout


def test_notebooks_are_rendered_without_errors_or_warnings(smoke):
    rendered = sorted((smoke.output / "notebooks/rendered/smoke").glob("*.ipynb"))
    assert [p.name for p in rendered] == [p.name for p in sorted(paths.NOTEBOOKS.glob("*.ipynb"))]
    for path in rendered:
        text = path.read_text()
        assert str(paths.ROOT) not in text
        assert str(smoke.output) not in text
        for cell in json.loads(text)["cells"]:
            for result in cell.get("outputs", []):
                assert result["output_type"] != "error"
                assert result.get("name") != "stderr", result.get("text")


def test_figures_and_tables_are_written_in_all_formats(smoke):
    folder = smoke.output / "figures" / "smoke"
    for name in ("layer_redundancy", "perplexity", "tasks", "lr_by_corpus", "sensitivity"):
        for suffix in ("pdf", "png", "csv", "md", "tex"):
            assert (folder / f"{name}.{suffix}").stat().st_size > 100
    for name in ("accuracy", "slice_base_sweep", "shuffled"):
        assert (folder / f"{name}.pdf").stat().st_size > 100
    for name in ("perplexity_comparison", "task_comparison", "claims", "selection", "ablations"):
        assert (folder / f"{name}.csv").is_file()


def test_second_run_computes_nothing(smoke):
    """Notebook 06 needs every measurement; the others were rendered by the first run."""
    finished = run_all(smoke.output, *SMOKE, "--only", "06")
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert measured(finished.stdout) == (0, len(smoke.results))
    folder = smoke.output / "data/results/smoke"
    assert {p.name: p.read_bytes() for p in folder.glob("*-*.json")} == smoke.results


def test_a_notebook_runs_alone_from_its_folder_with_other_parameters(smoke, tmp_path, monkeypatch):
    shutil.copytree(smoke.output / "data", tmp_path / "data")
    monkeypatch.setenv("DYNSLICE_OUTPUT", str(tmp_path))
    target = tmp_path / "alone.ipynb"
    parameters = {"profile": "smoke", "slice_percentages": [0.5], "slice_bases": [0.25]}
    papermill.execute_notebook(
        str(paths.NOTEBOOKS / "02_perplexity.ipynb"),
        str(target),
        parameters,
        cwd=str(paths.NOTEBOOKS),
        kernel_name="python3",
        progress_bar=False,
    )
    assert "dynamic, SP 50%, SB 25%" in target.read_text()


def test_the_script_works_in_its_own_folder_wherever_that_is(tmp_path):
    checkout = tmp_path / "check out"
    python = checkout / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "$PWD: $*"\n')
    python.chmod(0o755)
    for name in ("run_all.sh", "requirements.lock", "pyproject.toml"):
        shutil.copy(paths.ROOT / name, checkout)
    pins = (checkout / "requirements.lock").read_bytes() + (
        checkout / "pyproject.toml"
    ).read_bytes()
    stamp = subprocess.run("cksum", input=pins, capture_output=True, check=True).stdout
    (checkout / ".venv/.complete").write_bytes(stamp)
    (tmp_path / "other/check out").mkdir(parents=True)
    here = {**os.environ, "CDPATH": "other", "VIRTUAL_ENV": "", "CONDA_PREFIX": ""}
    command = ["bash", "check out/run_all.sh", "--profile", "my own.yaml"]
    done = subprocess.run(command, cwd=tmp_path, env=here, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == (
        f"{checkout}: -m dynslice reproduce --profile my own.yaml"
    )


def test_a_failing_request_is_one_sentence(tmp_path):
    finished = run_all(tmp_path, "--profile", "smoke", "--set", "slice_percentage=0.5")
    assert finished.returncode == 2
    last = finished.stderr.strip().splitlines()[-1]
    assert "nearest valid name is 'slice_percentages'" in last
    assert "Traceback" not in finished.stderr


def test_own_model_texts_and_profile_by_relative_paths(ask, machine, tmp_path, monkeypatch):
    shutil.copytree(models.resolve("embedded:tiny-random"), tmp_path / "DIR")
    for name in ("train.txt", "held_out.txt"):
        (tmp_path / name).write_text(paragraphs(20), encoding="utf-8")
    settings = yaml.safe_load((paths.PROFILES / "smoke.yaml").read_text())
    settings |= {"lr_text": "train.txt", "lr_compare_texts": [], "slice_bases": []}
    settings |= {"selection_windows": None}  # a file has no validation split
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(settings))
    request = ["--profile", "own.yaml", "--only", "01", "02", "--set", "model=DIR"]
    request += ["--set", "calibration_text=train.txt", "--set", "eval_texts=[held_out.txt]"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Machine, "measured", lambda *_: machine)
    monkeypatch.setattr(paths, "OUTPUT", tmp_path / "out")
    monkeypatch.setenv("DYNSLICE_OUTPUT", str(tmp_path / "out"))
    status, stdout, stderr = ask("reproduce", *request)
    assert status == 0, stderr[-2000:]
    done, total = measured(stdout)
    assert done == total
    [page] = tmp_path.glob("out/notebooks/rendered/own+*/02_perplexity.ipynb")
    assert "held_out.txt" in page.read_text()
