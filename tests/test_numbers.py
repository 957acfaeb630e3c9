"""Every number that the project states is recomputed from the committed record, or is no result."""

import io
import json
import re
import subprocess
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from notebook_kernels import one_kernel

from dynslice.cli import commands, record
from dynslice.core import assets, paths
from dynslice.experiment.estimate import EIGENVECTORS_AT, MACHINES
from dynslice.experiment.kinds import KINDS
from dynslice.experiment.profile import load
from dynslice.experiment.study import Study
from dynslice.extensions.finetuning import FineTuning
from dynslice.inputs import models
from dynslice.report import answer, pages

RECORDED = [folder.name for folder in (paths.ROOT / "data" / "record").glob("*/")]
SOURCES = sorted(paths.NOTEBOOKS.glob("*.ipynb"))


def committed(path):
    """The committed text of a file, which a run may have rewritten since."""
    command = ["git", "-C", str(paths.ROOT), "show", f"HEAD:{path}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module", params=RECORDED)
def again(request, tmp_path_factory):
    """A profile rendered anew from its record, in a place of its own."""
    folder = tmp_path_factory.mktemp(request.param)
    with one_kernel(folder):
        assert commands.main(["reproduce", "--from-record", "--profile", request.param]) == 0
    return SimpleNamespace(profile=request.param, folder=folder)


def outputs(notebook):
    """All that a rendered notebook says, figures apart: per code cell what it printed and shows."""
    cells = [c for c in json.loads(notebook)["cells"] if c["cell_type"] == "code"]
    return [
        (_printed(cell), *(_shown(o) for o in cell["outputs"] if o["output_type"] != "stream"))
        for cell in cells
    ]


def _printed(cell):
    """What a cell printed; how Jupyter cuts it into pieces depends on time."""
    streams = [output for output in cell["outputs"] if output["output_type"] == "stream"]
    assert {output["name"] for output in streams} <= {"stdout"}
    return "".join("".join(output["text"]) for output in streams)


def _shown(output):
    assert output["output_type"] != "error"
    data = output.get("data", {})
    return [data.get(f"text/{form}") for form in ("markdown", "html", "plain") if data]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_rendered_notebooks_say_what_the_record_says(again, source):
    path = f"notebooks/rendered/{again.profile}/{source.name}"
    if not (again.folder / path).is_file():  # a notebook that this profile asks nothing of
        assert source.name not in committed(f"notebooks/rendered/{again.profile}/").split()
        return
    assert outputs(committed(path)) == outputs((again.folder / path).read_text())


def test_tables_of_a_record_are_those_of_its_results(again):
    folder = again.folder / "figures" / again.profile
    listed = committed(f"figures/{again.profile}/").split()[2:]
    assert sorted(path.name for path in folder.iterdir()) == sorted(listed)
    for path in sorted(folder.glob("*.csv")):
        before = pd.read_csv(io.StringIO(committed(f"figures/{again.profile}/{path.name}")))
        pd.testing.assert_frame_equal(pd.read_csv(path), before, rtol=1e-6)
    for path in sorted(folder.glob("*.md")):
        assert path.read_text() == committed(f"figures/{again.profile}/{path.name}"), path.name


# Columns of tables that were taken away, or have another name now.
GONE: set[tuple[str, str]] = set()  # (table, column), or (table, "*")
RENAMED: dict[tuple[str, str], str] = {}


def test_tables_hold_the_numbers_that_they_held_before_the_code_was_made_smaller(again):
    """Every numeric column of every table, in its order (`tests/data/golden`)."""
    golden = json.loads((Path(__file__).parent / f"data/golden/{again.profile}.json").read_text())
    compared = 0
    for name, columns in golden.items():
        if (name, "*") in GONE:
            continue
        table = pd.read_csv(again.folder / "figures" / again.profile / f"{name}.csv")
        for column, values in columns.items():
            if (name, column) in GONE:
                continue
            now = pd.to_numeric(table[RENAMED.get((name, column), column)])
            before = pd.to_numeric(pd.Series(values, dtype=object))
            assert now.tolist() == pytest.approx(before.tolist(), rel=1e-9, nan_ok=True), (
                name,
                column,
            )
            compared += len(values)
    assert compared > 1000


@pytest.mark.parametrize("name", RECORDED)
def test_pages_say_what_the_record_says(name):
    study = Study.open(name, from_record=True)
    found = 0
    for path, block in record.PAGES.items():
        _, start, rest = path.read_text().partition(f"<!-- record:{name} -->\n")
        if start:
            found += 1
            written = rest.partition(f"\n<!-- /record:{name} -->")[0]
            assert written == record.linked(path, block(study)), path.name
    assert found


def test_the_readme_answers_what_the_records_say():
    text = record.README.read_text()
    assert text.count("<!-- answer -->") == 1
    written = text.partition("<!-- answer -->\n")[2].partition("\n<!-- /answer -->")[0]
    assert written == answer.answer_block()


@pytest.mark.parametrize("name", RECORDED)
def test_pages_are_what_a_record_would_write(name, tmp_path, monkeypatch):
    copies = {tmp_path / p.relative_to(paths.ROOT): block for p, block in record.PAGES.items()}
    for path, copy in zip(record.PAGES, copies, strict=True):
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(path.read_text().replace("Measured on", "Dreamt on"))
    before = {path.name: path.read_text() for path in record.PAGES}
    monkeypatch.setattr(record, "PAGES", copies)
    monkeypatch.setattr(record, "README", readme := tmp_path / "README.md")
    readme.write_text(record.paths.ROOT.joinpath("README.md").read_text().replace(" M ", " N "))
    record.update_pages(Study.open(name, from_record=True))
    assert readme.read_text() == (paths.ROOT / "README.md").read_text()
    pages = {path.name: path.read_text() for path in copies}
    for page in pages:
        block = re.search(rf"<!-- record:{name} -->.*?<!-- /record:{name} -->", before[page], re.S)
        assert block is None or block[0] in pages[page]


def test_a_changed_result_changes_what_the_readme_would_say():
    study = Study.open("quick", from_record=True)
    before = pages.claims_block(study)
    original = study.store.get
    victim = study.perplexity_request(study.points()[2], "sotu").key

    def get(request):
        result = original(request)
        if request.key == victim:
            result.value["nll"][0] += 0.5
        return result

    study.store.get = get
    assert pages.claims_block(study) != before


# Numbers outside the generated parts. They are no results: each is a fact of the method, of a
# profile or of the published work, and is checked where the project knows it.


def prose():
    """(where, text) of everything that people wrote: pages without blocks, code and links."""
    for path in (record.README, *record.PAGES):
        yield (
            path.name,
            re.sub(r"<!-- ([\w:.-]+) -->.*?<!-- /\1 -->", "", path.read_text(), flags=re.S),
        )
    for path in SOURCES:
        for cell in json.loads(path.read_text())["cells"]:
            if cell["cell_type"] == "markdown":
                yield path.stem, "".join(cell["source"])


def numbers(text):
    """The numbers of a text, without those in code, formulas, addresses and names."""
    for pattern in (r"```.*?```", r"\$\$.*?\$\$", r"\$[^$]*\$", r"`[^`]*`", r"\]\([^)]*\)"):
        text = re.sub(pattern, " ", text, flags=re.S)
    text = re.sub(r"^\d+\. ", "", text, flags=re.M)  # of a numbered list
    text = re.sub(
        r"SmolLM2-135M(-Instruct)?|NVIDIA H200|Llama-?3-8B|Mistral-7B|WikiText-2|PG-19", " ", text
    )
    text = re.sub(
        r"Llama 2 and 3|Qwen2 and 2\.5|Qwen2\.5-Coder|Qwen[23]|Phi-[23]|Gemma 2", " ", text
    )
    text = re.sub(
        r"SHA-256|UTF-8|arXiv \d+\.\d+|(EMNLP|ACL) 20\d\d|float(32|64)|bfloat16", " ", text
    )
    text = re.sub(r"(notebook|section|Figure|[Ll]ayer)s? \d+(, \d+)*|\b0\d \w+|\[0\d\b", " ", text)
    return re.findall(r"\d[\d,.]*\d|\d", text)


LAYERS = "the layers of SmolLM2-135M"
FACTS = {
    ("README.md", "7"): "billions of parameters of the paper's models",
    ("README.md", "8"): "and of the other one",
    ("README.md", "180"): "megabytes of the wheels, which asset tests compare",
    ("README.md", "3.11.5"): "the oldest Python, for the lock file",
    ("README.md", "3"): "gigabytes of disk",
    ("README.md", "15"): "minutes of `quick`, and of the tests, about",
    ("usage.md", "30"): LAYERS,
    ("usage.md", "5"): "hours of `standard-0.5b`, about",
    ("usage.md", "4"): "bits of the weights of SmolLM2-135M, and hours of `standard-1.5b`, about",
    ("usage.md", "0.5"): "billions of parameters of a Qwen model",
    ("usage.md", "1.5"): "and of the larger one",
    ("usage.md", "8"): "bits of the other layers",
    ("usage.md", "20"): "per cent, SP of its tasks",
    ("usage.md", "491"): "megabytes of the one",
    ("usage.md", "1,117"): "and of the other",
    ("usage.md", "150"): "items per task of `standard`",
    ("usage.md", "10,000"): "the rope theta that transformers before 5 reads",
    ("usage.md", "32"): "the multiple of widths that llama.cpp quantises",
    ("usage.md", "16"): "bits in which it leaves the others",
    ("usage.md", "3.1"): "of Llama, whose GGUF files have scaled rope",
    ("artifact.md", "0.1"): "per cent of agreement with the record, as `record.agree` has it",
    ("artifact.md", "1"): "per cent on another class of device",
    ("artifact.md", "2"): "items of a task there",
    ("artifact.md", "100"): "of so many",
    ("artifact.md", "854"): "values of `standard` on another device,",
    ("artifact.md", "0.4"): "per cent of perplexity within which they agree,",
    ("artifact.md", "150"): "and so many items, of which one may differ",
    ("03_tasks", "30"): "per cent, the mean slice of the authors' outputs",
    ("03_tasks", "2024"): "when they were made",
    ("05_efficiency", "10"): "per cent to either side, the band of the figure",
    ("07_ladder", "32"): "the rank of LoRA",
    ("07_ladder", "10"): "and its alpha",
    ("07_ladder", "3"): "the learning rate,",
    ("07_ladder", "4"): "times ten to minus this",
    ("09_alternatives", "8"): "bits of a rounded weight",
    ("09_alternatives", "4"): "and fewer of them",
    ("09_alternatives", "256"): "values of the one",
    ("09_alternatives", "16"): "of the other, and bits of a weight that is not rounded",
}


def test_numbers_in_prose_are_no_results():
    stated = {(where, number) for where, text in prose() for number in numbers(text)}
    assert stated == set(FACTS)


def test_facts_in_prose_are_true():
    assets.fetch()
    config = models.load_config("embedded:smollm2-135m")
    assert config.num_hidden_layers == 30
    assert config.rms_norm_eps == pytest.approx(
        1e-5
    )  # the eps that docs/deviations.md calls the same
    assert "Q4_1" in paths.ASSET_MANIFEST.read_text()
    assert set(load("standard").tasks.values()) == {150}
    paper = load("paper")
    assert (paper.calibration_windows, paper.selection_windows) == (128, 120)
    lora = FineTuning(steps=1)
    assert (lora.rank, lora.alpha, lora.learning_rate) == (32, 10, 3e-4)
    assert load("standard-0.5b").task_slice_percentages == [0.2]
    project = tomllib.loads((paths.ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">=3.11.5"


def test_the_record_came_out_the_same_on_another_device():
    """What docs/artifact.md says of the H200, from each value beside that of the record."""
    told = json.loads((paths.BENCH / "standard-h200.json").read_text())
    assert told["provenance"]["device"] == "NVIDIA H200" and not told["provenance"]["dirty"]
    found = pd.DataFrame(told["rows"], columns=told["columns"])
    study = Study.open("standard", from_record=True)
    asked = {request.key: request for request in study.requests()}
    for key, rows in found.groupby("result"):
        quoted = KINDS[asked[key].kind].quoted(study.store.get(asked[key]).value)
        assert dict(zip(rows["value"], rows["cpu"], strict=True)) == pytest.approx(quoted)
    assert len(found) == 854
    assert {key for key in asked if key not in set(found["result"])} == {
        key for key, request in asked.items() if request.kind == "continuation"
    }
    apart = (found["h200"] - found["cpu"]).abs()
    assert (apart / found["cpu"])[found["kind"] == "ppl"].max() < 0.004
    assert apart[found["kind"] == "task"].max() < 1.01 / 150
    assert apart[found["kind"] == "lr"].max() < 1e-5


def test_what_a_gpu_took_for_four_layers_is_what_its_benchmark_says():
    """And what `--machine h100` assumes, both in docs/scale.md."""
    rows = json.loads((paths.BENCH / "llama-3-8b-cuda.json").read_text())["rows"]
    [seconds] = [row["seconds"] for row in rows if row["step"] == "slice, constant, SP 25%"]
    assumed = MACHINES["h100"].eigenvectors * (4096 / EIGENVECTORS_AT) ** 3
    text = (paths.ROOT / "docs" / "scale.md").read_text().replace("\n", " ")
    assert (
        f"sliced in {seconds:.1f} s, where the forecast for an H100 assumes {assumed:.0f} s" in text
    )


def test_a_number_that_is_no_fact_is_found():
    """The test above can fail: it would see a result typed into the README or a notebook."""
    assert numbers("At equal size dynamic slicing gains 15 % and loses 3.5 points.") == [
        "15",
        "3.5",
    ]
    assert ("02_perplexity", "15") not in FACTS


@pytest.mark.parametrize(
    ("name", "minutes"), [("quick", 15), ("standard", 1.1 * 300), ("standard-0.5b", 1.1 * 300)]
)
def test_a_recorded_profile_took_no_longer_than_is_said(name, minutes):
    """At most a quarter of an hour; about five hours."""
    study = Study.open(name, from_record=True)
    assert sum(study.store.get(r).seconds for r in study.requests()) < 60 * minutes
