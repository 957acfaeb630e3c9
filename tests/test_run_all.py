"""./run_all.sh on the smoke profile, from nothing to notebooks, and then again."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import papermill
import pytest
import yaml
from prose import paragraphs

from dynslice.core import paths
from dynslice.inputs import models


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return tmp_path_factory.mktemp("output")


def run_all(output, *arguments):
    """Run the script in the environment of the tests, which it finds to be complete."""
    environment = {
        **os.environ,
        "VIRTUAL_ENV": sys.prefix,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "DYNSLICE_OUTPUT": str(output),
        "DYNSLICE_CACHE": str(paths.CACHE),
    }
    script = paths.ROOT / "run_all.sh"
    return subprocess.run(
        [script, *arguments], capture_output=True, text=True, env=environment, cwd=output
    )


@pytest.fixture(scope="module")
def first(output):
    finished = run_all(output, "--profile", "smoke")
    assert finished.returncode == 0, finished.stderr[-2000:]
    return finished.stdout


def measured(stdout):
    return tuple(map(int, re.search(r"measured (\d+) of (\d+) values", stdout).groups()))


def test_first_run_measures_everything(first):
    done, total = measured(first)
    assert done == total > 20
    assert "set-up took" in first
    assert "profile smoke took" in first


def test_notebooks_are_rendered_without_errors_or_warnings(first, output):
    rendered = sorted((output / "notebooks/rendered/smoke").glob("*.ipynb"))
    assert [p.name for p in rendered] == [p.name for p in sorted(paths.NOTEBOOKS.glob("*.ipynb"))]
    for path in rendered:
        text = path.read_text()
        assert str(paths.ROOT) not in text
        assert str(output) not in text
        for cell in json.loads(text)["cells"]:
            for result in cell.get("outputs", []):
                assert result["output_type"] != "error"
                assert result.get("name") != "stderr", result.get("text")


def test_figures_and_tables_are_written_in_all_formats(first, output):
    folder = output / "figures" / "smoke"
    for name in ("layer_redundancy", "perplexity", "tasks", "lr_by_corpus", "sensitivity"):
        for suffix in ("pdf", "png", "csv", "md", "tex"):
            assert (folder / f"{name}.{suffix}").stat().st_size > 100
    for name in ("accuracy", "slice_base_sweep", "shuffled"):
        assert (folder / f"{name}.pdf").stat().st_size > 100
    for name in ("perplexity_comparison", "task_comparison", "claims", "selection", "ablations"):
        assert (folder / f"{name}.csv").is_file()


def test_second_run_computes_nothing(first, output):
    before = {p: p.read_bytes() for p in (output / "data/results/smoke").glob("*-*.json")}
    finished = run_all(output, "--profile", "smoke")
    assert finished.returncode == 0, finished.stderr[-2000:]
    done, total = measured(finished.stdout)
    assert done == 0
    assert total == measured(first)[1]
    assert {p: p.read_bytes() for p in (output / "data/results/smoke").glob("*-*.json")} == before


def test_a_notebook_runs_alone_from_its_folder_with_other_parameters(first, output, monkeypatch):
    monkeypatch.setenv("DYNSLICE_OUTPUT", str(output))
    target = output / "alone.ipynb"
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


def test_a_failing_request_is_one_sentence(output):
    finished = run_all(output, "--profile", "smoke", "--set", "slice_percentage=0.5")
    assert finished.returncode == 2
    last = finished.stderr.strip().splitlines()[-1]
    assert "nearest valid name is 'slice_percentages'" in last
    assert "Traceback" not in finished.stderr


def test_own_model_texts_and_profile_by_relative_paths(dynslice, tmp_path):
    shutil.copytree(models.resolve("embedded:tiny-random"), tmp_path / "DIR")
    for name in ("train.txt", "held_out.txt"):
        (tmp_path / name).write_text(paragraphs(20), encoding="utf-8")
    settings = yaml.safe_load((paths.PROFILES / "smoke.yaml").read_text())
    settings |= {"lr_text": "train.txt", "lr_compare_texts": [], "slice_bases": []}
    settings |= {"selection_windows": None}  # a file has no validation split
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(settings))
    request = ["--profile", "own.yaml", "--only", "01", "02", "--set", "model=DIR"]
    request += ["--set", "calibration_text=train.txt", "--set", "eval_texts=[held_out.txt]"]
    environment = {**os.environ, "DYNSLICE_OUTPUT": str(tmp_path / "out")}
    status, stdout, stderr = dynslice("reproduce", *request, cwd=tmp_path, env=environment)
    assert status == 0, stderr[-2000:]
    done, total = measured(stdout)
    assert done == total
    assert (
        "held_out.txt" in (tmp_path / "out/notebooks/rendered/own/02_perplexity.ipynb").read_text()
    )
