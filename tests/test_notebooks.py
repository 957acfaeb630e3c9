"""The notebooks with other parameters: nothing in them holds for one model or one grid alone."""

import getpass
import json
import os
import platform
import re
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import nbformat
import pandas as pd
import papermill
import pytest
from nbclient import NotebookClient
from notebook_kernels import one_kernel, with_parameters

from dynslice.cli import commands, rendering
from dynslice.core import paths
from dynslice.core.errors import RequestError, RunError
from dynslice.experiment.estimate import Machine
from dynslice.experiment.profile import load, percent
from dynslice.experiment.requests import DENSE
from dynslice.experiment.study import Study
from dynslice.inputs import models
from dynslice.report import (
    alternatives,
    answer,
    claims,
    layer_redundancy,
    perplexity,
    statistics,
    style,
)

SOURCES = sorted(paths.NOTEBOOKS.glob("*.ipynb"))
SMOKE = load("smoke")

# Everything differs from the profile `smoke`; a single item has nothing to resample.
CHANGED = {
    "model": "embedded:tiny-mistral",
    "seed": 7,
    "slice_percentages": [0.125, 0.5],
    "slice_bases": [0.0625],
    "round_to": 4,
    "lr_text": "mmlu",
    "lr_max_tokens": 896,
    "lr_last_layer": "normed",
    "lr_compare_texts": [],
    "calibration_text": "mmlu",
    "calibration_windows": 6,
    "eval_texts": ["mmlu"],
    "eval_windows": 7,
    "eval_window": 96,
    "selection_windows": 5,
    "tasks": {"piqa": 5, "arc_easy": 1},
    "task_slice_percentages": [0.125],
    "task_slice_bases": [0.0625],
    "speed_slice_percentages": [0.125],
    "speed_slice_bases": [0.0625],
    "speed_window": 48,
    "figure_slice_percentage": 0.375,
    "figure_slice_base": 0.1875,
    "ablation_slice_percentage": 0.375,
    "ablation_slice_base": 0.0625,
    "ablation_last_layers": ["raw"],
    "ablation_scores": ["angular"],
    "ablation_round_to": [16],
    "ablation_shuffles": 1,
    "ablation_calibration_windows": [3],
    "ablation_calibration_texts": ["wikipedia"],
    "ablation_calibration_seeds": [11],
    "ablation_lr_tokens": [640],
    "single_layer_slice": 0.375,
    "beyond_slice_percentages": [0.125, 0.375],
    "beyond_basis_layers": 1,
    "beyond_tasks": False,
    "beyond_plain": False,
    "beyond_calibration_seeds": [11],
    "beyond_basis_layers_tried": [2],
    "beyond_candidates": ["embedding"],
    "beyond_slice_bases": [0.0625],
    "beyond_shuffles": 1,
    "beyond_ridges": [0.0625, 2.0],
    "beyond_calibration_windows": [3],
    "recovery_steps": 1,
    "sound_tokens": 4,
    "sound_prompt": 6,
    "instead_slice_percentages": [0.375],
    "instead_layers": ["one by one"],
    "instead_neurons": [0.25],
    "instead_bits": True,
    "instead_int8_slice_percentages": [0.375],
    "instead_learning_rates": [0.0006],
    "instead_tasks": False,
}

# As little as a profile can ask for.
BARE = {
    "slice_percentages": [0.375],
    "slice_bases": [],
    "lr_compare_texts": [],
    "eval_windows": 1,
    "selection_windows": None,
    "tasks": {},
    "task_slice_percentages": [],
    "task_slice_bases": [],
    "speed_slice_percentages": [],
    "speed_slice_bases": [],
    "figure_slice_percentage": 0.0,
    "figure_slice_base": 0.0,
    "ablation_slice_percentage": None,
    "ablation_last_layers": [],
    "ablation_scores": [],
    "ablation_round_to": [],
    "ablation_embedding": False,
    "ablation_shuffles": 0,
    "ablation_calibration_windows": [],
    "ablation_calibration_texts": [],
    "ablation_calibration_seeds": [],
    "ablation_lr_tokens": [],
    "single_layer_slice": None,
    "beyond_slice_percentages": [],
    "beyond_calibration_seeds": [],
    "beyond_basis_layers_tried": [],
    "beyond_candidates": [],
    "beyond_slice_bases": [],
    "beyond_shuffles": 0,
    "beyond_ridges": [],
    "beyond_calibration_windows": [],
    "recovery_steps": 0,
    "sound_tokens": 0,
    "instead_slice_percentages": [],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("changed")


@pytest.fixture(scope="module")
def changed(folder, machine):
    """Every notebook by `dynslice reproduce` with other parameters: cells by notebook."""
    command = ["reproduce", "--profile", "smoke"]
    for key, value in CHANGED.items():
        command += ["--set", f"{key}={json.dumps(value)}"]
    with pytest.MonkeyPatch.context() as patch, one_kernel(folder):
        patch.setattr(Machine, "measured", lambda *_: machine)
        assert commands.main(command) == 0
    name = load("smoke", CHANGED).name
    rendered = sorted((folder / "notebooks/rendered" / name).glob("*.ipynb"))
    assert [path.name for path in rendered] == [path.name for path in SOURCES]
    return [nbformat.read(path, 4) for path in rendered]


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """Every notebook of the least that can be asked for, one after another in one kernel."""
    output = tmp_path_factory.mktemp("bare")
    # A None in a notebook keeps the profile's value, the text null does not.
    given = {key: "null" if value is None else value for key, value in BARE.items()}
    whole, lengths = nbformat.v4.new_notebook(), []
    for source in SOURCES:
        cells = with_parameters(source, {"profile": "smoke", **given}).cells
        whole.cells += [*cells, nbformat.v4.new_code_cell("%reset -f")]
        lengths.append(len(cells))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "OUTPUT", output)
        patch.setenv("DYNSLICE_OUTPUT", str(output))
        study = Study.open("smoke", **BARE)
        study.ensure(study.requests())
        done = sorted(output.rglob("*-*.json"))
        NotebookClient(whole, kernel_name="python3", timeout=300).execute()
    assert sorted(output.rglob("*-*.json")) == done  # the notebooks asked for nothing else
    cells, found = iter(json.loads(nbformat.writes(whole))["cells"]), []
    for length in lengths:
        part = {"metadata": {}, "cells": list(islice(cells, length))}
        whole = {**rendering.tidied(part), "nbformat": 4, "nbformat_minor": 5}
        found.append(nbformat.reads(json.dumps(whole), 4))
        next(cells)
    return found


def said(notebooks):
    """What the code cells show as text, figures apart: (id of the cell, text)."""
    cells = [cell for notebook in notebooks for cell in notebook.cells]
    return [
        (cell.get("id"), text)
        for cell in cells
        if cell.cell_type == "code"
        for output in cell.outputs
        for text in (output.get("text"), *_texts_of(output.get("data", {})))
        if text is not None
    ]


def _texts_of(data):
    return [data.get(f"text/{form}") for form in ("markdown", "plain", "html", "latex")]


def of_the_run(notebooks):
    """All that is said of the run: the benchmarks of the machines speak of models of their own."""
    cells = [c for n in notebooks for c in n.cells if c.cell_type == "code"]
    apart = {cell["id"] for cell in cells if "efficiency.bench" in cell.source}
    apart |= {cell["id"] for cell in cells if "efficiency.unmeasured" in cell.source}
    assert len(apart) == 2
    return "\n".join(text for name, text in said(notebooks) if name not in apart)


def private():
    """Names of this machine that a rendered notebook must not hold, words of the project apart."""
    found = {str(paths.ROOT), str(paths.CACHE), sys.prefix, str(Path.home())}
    names = {getpass.getuser(), platform.node(), platform.node().partition(".")[0]}
    ours = [*SOURCES, *Path(style.__file__).parent.glob("*.py")]
    words = set(re.findall(r"[\w-]+", " ".join(path.read_text() for path in ours).lower()))
    return found | {name for name in names if len(name) > 3 and name.lower() not in words}


@pytest.mark.parametrize("run", ["changed", "bare"])
def test_notebooks_show_no_trouble_and_no_machine(run, request):
    notebooks = request.getfixturevalue(run)
    for notebook in notebooks:
        outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
        assert {o.output_type for o in outputs} <= {"stream", "display_data", "execute_result"}
        assert {o.get("name", "stdout") for o in outputs} == {"stdout"}
        assert "widgets" not in notebook.metadata
    texts = [text for _, text in said(notebooks)]
    metadata = [n.metadata for n in notebooks] + [c.metadata for n in notebooks for c in n.cells]
    for text in [*texts, json.dumps(metadata)]:
        for trouble in ("Warning", "Traceback", "Empty DataFrame", "%%", "None"):
            assert trouble not in text
        assert not re.search(r"\b(nan|inf)\b", text, re.IGNORECASE)
        assert not re.search(r"(?<![\w.<])/(?:[\w.-]+/)+[\w.-]+", text), text
        for name in private():
            assert not re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text), name


def test_changed_parameters_are_those_that_the_notebooks_speak_of(changed):
    text = of_the_run(changed)
    for share in ("SP 12.5%, SB 6.25%", "SP 50%, SB 6.25%", "SP 37.5%, SB 6.25%"):
        assert f"dynamic, {share}" in text
        assert f"constant, size of dynamic {share}" in text
    for words in (
        "embedding cut by 37.5%",
        "Model: embedded:tiny-mistral",
        "(mmlu)",
        "calibrated on wikipedia",
        "SP 37.5%, 3 windows",
        "seed 11",
        "widths rounded to 16",
        "last layer raw",
        "score angular",
        "after the final norm",
        "windows of 48 tokens",
        "Guessing gives 50 % on PIQA and 25 % on ARC",
        "embedding widths, shared bases",
        "LR widths in random order 0",
        "SB 6.25%, shared bases",
        "compensation, ridge 0.0625",
        "compensation, 3 calibration windows",
        "1 steps of LoRA",
    ):
        assert words in text
    for words in ("SmolLM2", "tiny-random", "sotu", "update", "hellaswag", "MMLU", "draw 1"):
        assert words not in text


def test_percentages_models_and_layers_are_those_of_the_run(changed, folder):
    text = of_the_run(changed)
    settings = load("smoke", CHANGED)
    shares = {0.0, statistics.CONFIDENCE}
    for name, value in settings.model_dump().items():
        if re.search(r"slice_(percentages?|bases?)$|_(slice|neurons)$", name):
            shares |= set(value) if isinstance(value, list) else {value}
    tables = folder / "figures" / load("smoke", CHANGED).name
    reached = pd.read_csv(tables / "perplexity.csv")["mean slice"]
    allowed = {percent(share) for share in shares} | {f"{100 * s:.3g}%" for s in reached}
    assert set(re.findall(r"\d[\d.]*%", text)) <= allowed
    assert set(re.findall(r"embedded:[\w.-]*\w", text)) == {settings.model}
    held = "\n".join(path.read_text() for path in paths.PUBLISHED.glob("*.csv"))
    for name in re.findall(r"\b[\w-]+/[\w.-]*(?:[Ll]lama|[Mm]istral|opt|SmolLM)[\w.-]*\w", text):
        assert name in held
    layers = models.load_config(settings.model).num_hidden_layers
    assert set(re.findall(r"(?<!a basis for each )\b(\d+) layers\b", text)) == {str(layers)}
    assert set(re.findall(r"a basis for each (\w+) layers", text)) == {"2"}


def test_sources_hold_no_number_of_a_run():
    """Percentages, layer counts and models belong to the code cells, whose text is the run's."""
    for path in SOURCES:
        notebook = nbformat.read(path, 4)
        prose = "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
        assert set(re.findall(r"\d+ ?%", prose)) <= {
            "10 %",
            "30 %",
        }  # the band of speeds, the authors' outputs
        assert not re.search(r"\d+ layers|SmolLM|embedded:|sotu|wikipedia", prose)
        named = set(re.findall(r"Llama[\w-]*|Mistral[\w-]*", prose))
        assert named <= ({"Llama3-8B", "Mistral-7B"} if path.stem.startswith("06") else set())
        code = [c for c in notebook.cells if c.cell_type == "code"]
        injected = [c for c in code if "parameters" in c.metadata.get("tags", [])]
        for cell in (c for c in code if c not in injected):
            assert not re.search(r"0\.\d|embedded:|sotu|wikipedia|\bSP \d", cell.source)


def test_what_was_not_asked_for_leaves_no_trace(bare):
    """No empty section, and no tables but those of LR, perplexity, size and claims."""
    text = of_the_run(bare)
    assert "The sliced network stores" in text
    assert "dynamic, SP" not in text
    code = [cell for n in bare for cell in n.cells if cell.cell_type == "code"]
    tables = [c.id for c in code for o in c.outputs if "text/html" in o.get("data", {})]
    assert [name for name in tables if name != "05-14"] == [
        "01-06",
        "02-05",
        "03-18",
        "05-04",
        "06-03",
        "08-06",
    ]
    assert style.NONE not in text
    assert text.count(f"<td>{claims.NOT_TESTED}</td>") == 4  # both claims at both sizes
    headings = [c.source for n in bare for c in n.cells if c.source.startswith("## ")]
    for gone in ("Paired comparison", "The slice base", "Accuracy", "Does the saving arrive?"):
        assert not any(heading.startswith(f"## {gone}") for heading in headings)


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_an_unknown_parameter_is_refused_with_the_nearest_name(source, tmp_path):
    asked = {"profile": "smoke", "slice_percentage": "0.5"}
    with pytest.raises(papermill.PapermillExecutionError) as refused:
        papermill.execute_notebook(
            str(source), str(tmp_path / source.name), asked, progress_bar=False
        )
    assert refused.value.ename == RequestError.__name__
    assert "'slice_percentage' is unknown" in refused.value.evalue
    assert "nearest valid name is 'slice_percentages'" in refused.value.evalue


def test_figures_name_shares_and_curves_as_asked(changed, folder):
    tables = folder / "figures" / load("smoke", CHANGED).name
    changes = perplexity.sweep_figure(pd.read_csv(tables / "perplexity_comparison.csv"))
    assert [axis.get_title() for axis in changes.axes] == ["mmlu, SP 12.5%", "mmlu, SP 50%"]
    levels = pd.read_csv(tables / "perplexity.csv")
    assert "dynamic, SB 6.25%" in legends(perplexity.perplexity_figure(levels))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "OUTPUT", folder)
        study = Study.open("smoke", **CHANGED)
        figure = layer_redundancy.redundancy_figure(layer_redundancy.redundancy_table(study), study)
        said = answer.instead([study])
        rounded = study.instead.rounded()[0]
        change = statistics.perplexity_change(study, rounded, DENSE, "mmlu")
        others = answer._others(study)
        seen = {
            p.name: study.get(study.selection_request(p)).value["perplexity"]
            for p in study.instead.at_size(0.375)
        }
        prose = alternatives.details(study, alternatives.alternatives_table(study))
        both = study.instead.at_size(0.375)[-1]
        request = study.slice_request(both)
        result = study.get(request)
        study.store.put(replace(result, value={**result.value, "mean_slice": 0.0}))
        left = list(alternatives.alternatives_table(study)["network"])
        study.store.put(result)
    assert both.name not in left and "best recipe" in left  # nothing of it would be sliced
    assert f"SP 37.5%**, validation windows choose **{min(seen, key=seen.get)}**: " in prose
    assert f"perplexity changes by {change.estimate:+.1f} %. Slices" in said
    assert set(others) == {"int8"}  # the table is about another size
    assert {"slice base, 18.75%", "mean, 37.5%"} <= legends(figure)
    assert 100 * pd.read_csv(tables / "layer_redundancy.csv")["FS"].max() < top(figure)


def test_figures_draw_every_slice_base(changed, folder):
    table = pd.read_csv(folder / "figures" / load("smoke", CHANGED).name / "perplexity.csv")
    bases = [base / 100 for base in range(20)]
    dynamic = table[table["schedule"] == "dynamic"].iloc[0]
    rows = pd.DataFrame([{**dynamic, "SB": base} for base in bases])
    many = pd.concat([table[table["schedule"] != "dynamic"], rows])
    figure = perplexity.perplexity_figure(many)
    assert {f"dynamic, SB {percent(base)}" for base in bases} <= legends(figure)
    looks = {(line.get_marker(), line.get_color()) for line in figure.axes[0].lines}
    assert len(looks) >= len(bases)


def legends(figure):
    found = [*figure.legends, *(axis.get_legend() for axis in figure.axes)]
    return {text.get_text() for legend in found if legend for text in legend.get_texts()}


def top(figure):
    return figure.axes[-1].get_ylim()[1]


START_UP = (
    "lab = 3\nseed = 8\nprofile = 'quick'\nimport matplotlib\nmatplotlib.rc('lines', linewidth=9)\n"
)


@pytest.fixture
def users_own(tmp_path, monkeypatch):
    """What a user may have set up for notebooks and figures of their own."""
    home = tmp_path / "home"
    kernel = home / "jupyter/kernels/python3/kernel.json"
    start_up = home / "ipython/profile_default/startup/mine.py"
    for path, text in (
        (kernel, json.dumps({"argv": ["/no/python"], "display_name": "p", "language": "python"})),
        (start_up, START_UP),
        (home / "matplotlibrc", "figure.facecolor: red\nlines.linewidth: 9\n"),
        (home / "work/matplotlibrc", "axes.facecolor: blue\n"),
        (home / "work/numpy.py", "raise SystemExit\n"),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.chdir(home / "work")
    for name, value in {
        "MPLBACKEND": "Agg",
        "MATPLOTLIBRC": home / "matplotlibrc",
        "IPYTHONDIR": home / "ipython",
        "PYTHONSTARTUP": start_up,
        "PYTHONWARNINGS": "always",
        "JUPYTER_PATH": home / "jupyter",
    }.items():
        monkeypatch.setenv(name, str(value))


@pytest.fixture
def drawing(tmp_path, monkeypatch):
    """What executes a notebook that saves a figure after the line `first`."""
    monkeypatch.setattr(paths, "OUTPUT", tmp_path)
    monkeypatch.setenv("DYNSLICE_OUTPUT", str(tmp_path))
    monkeypatch.syspath_prepend(str(paths.PACKAGE.parent))

    def execute(first=""):
        cells = ["profile = None"], [first], ["import sys"], ["print(sys.executable)"]
        cells[1].append("from dynslice.experiment.study import Study")
        cells[1].append("study = Study.from_notebook(globals())")
        cells[2].append("from dynslice.report import style")
        cells[2].append("figure, axis = style.panels()")
        cells[2].append("axis.plot([1, 2])")
        cells[2].append('style.save_figure(figure, study, "curve")')
        made = [
            nbformat.v4.new_code_cell("\n".join(lines), id=f"c{i}") for i, lines in enumerate(cells)
        ]
        made[0].metadata["tags"] = ["parameters"]
        metadata = nbformat.read(SOURCES[0], 4).metadata
        source = tmp_path / "10_drawing.ipynb"
        nbformat.write(nbformat.v4.new_notebook(cells=made, metadata=metadata), source)
        target = paths.rendered("smoke") / source.name
        rendering.execute(source, target, {"profile": "smoke"})
        return json.loads(target.read_text())

    return execute


def test_what_a_user_set_up_does_not_reach_the_notebooks(drawing, request):
    alone = drawing()
    before = dict(os.environ)
    request.getfixturevalue("users_own")
    given = dict(os.environ)
    assert drawing() == alone
    assert given == dict(os.environ) != before
    assert alone["cells"][-1]["outputs"][0]["text"] == [f"{sys.executable}\n"]
    assert any("image/png" in output["data"] for output in alone["cells"][3]["outputs"])
    assert alone["metadata"]["kernelspec"]["name"] == "python3"


def test_a_figure_that_is_not_shown_fails_the_rendering(drawing):
    with pytest.raises(RunError, match=r"10_drawing\.ipynb does not show figure 'curve'"):
        drawing("%matplotlib agg")
    assert not (paths.rendered("smoke") / "10_drawing.ipynb").exists()


@pytest.mark.usefixtures("users_own")
def test_names_of_a_start_up_file_are_no_parameters(tmp_path, monkeypatch):
    monkeypatch.delenv("JUPYTER_PATH")
    monkeypatch.chdir(tmp_path)
    cells = (
        "profile = 'smoke'\nslice_bases = [0.05]\nseed = 8",
        "from dynslice.experiment.study import Study, parameters",
        "name, fixed, given = parameters(globals())\nprint(name, fixed, sorted(given.items()))",
    )
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(made, kernel_name="python3", timeout=60).execute()
    assert made.cells[-1].outputs[0].text == "smoke {} [('seed', 8), ('slice_bases', [0.05])]\n"
