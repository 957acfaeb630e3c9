"""The command line: one JSON object on stdout, or a table."""

import contextlib
import json
import os
import shutil
import subprocess
import sys

import pytest
from prose import paragraphs
from safetensors import safe_open

from dynslice.core import assets, paths
from dynslice.evaluate import harness, task_table

MODEL = ["--model", "embedded:tiny-random"]


@pytest.fixture(autouse=True, scope="module")
def places(tmp_path_factory):
    """A folder with texts, in which the tests run."""
    assets.fetch()
    folder = tmp_path_factory.mktemp("cli")
    text = paragraphs(70)
    assert len(text) > 20_000
    for name, content in {"text.txt": text, "page.txt": paragraphs(8)}.items():
        (folder / name).write_text(content, encoding="utf-8")
    with contextlib.chdir(folder):
        yield folder


@pytest.fixture
def result(ask):
    """The JSON object of a command that succeeds."""

    def run(*arguments):
        status, stdout, stderr = ask(*arguments, "--json")
        assert status == 0, stderr
        assert stdout.count("\n") == 1  # nothing but the object
        return json.loads(stdout)

    return run


def test_lr_json(result, tmp_path):
    out = tmp_path / "lr.json"
    lr = result("lr", *MODEL, "--text", "text.txt", "--max-tokens", 1000, "--out", out)
    assert {"layers", "tokens", "window", "stride"} <= lr.keys()
    assert len(lr["layers"]) == 4
    assert all({"index", "lr", "normalised"} <= layer.keys() for layer in lr["layers"])
    assert (lr["tokens"], lr["window"], lr["stride"]) == (1000, 1000, 256)
    assert json.loads(out.read_text()) == lr


def test_lr_takes_window_stride_and_definition(result):
    request = ["lr", *MODEL, "--text", "text.txt", "--max-tokens", 1000]
    raw = result(*request, "--window", 256, "--stride", 128)
    assert (raw["tokens"], raw["windows"], raw["window"], raw["stride"]) == (896, 6, 256, 128)
    normed = result(*request, "--window", 256, "--stride", 128, "--last-layer", "normed")
    assert normed["layers"][-1]["lr"] != raw["layers"][-1]["lr"]


def test_plan_json(result):
    plan = result("plan", *MODEL, "--slice-percentage", 0.25)
    assert plan["widths"] == [48] * 4
    assert plan["final_slice"] == [0.25] * 4
    assert plan["mean_slice"] == 0.25
    assert isinstance(plan["parameters"], int)
    assert isinstance(plan["parameters_dense"], int)


def test_slice_json(result, tmp_path):
    out = tmp_path / "sliced"
    calibration = ["--calibration", "text.txt", "--windows", 4, "--window", 64]
    sliced = result("slice", *MODEL, "--slice-percentage", 0.25, *calibration, "--out", out)
    plan = result("plan", *MODEL, "--slice-percentage", 0.25)
    assert sliced["out"] == str(out)
    assert sliced["seconds"] > 0
    assert sliced["peak_memory_bytes"] > 2**20
    for name in ("parameters", "parameters_dense"):
        assert sliced[name] == plan[name]
    with safe_open(out / "model.safetensors", "pt") as saved:
        stored = sum(saved.get_tensor(name).numel() for name in saved.keys())  # noqa: SIM118
    assert stored == sliced["parameters"]


def test_ppl_json(result):
    ppl = result("ppl", *MODEL, "--text", "text.txt", "--windows", 3, "--window", 128)
    assert {"perplexity", "nll_mean", "nll_stderr"} <= ppl.keys()
    assert (ppl["windows"], ppl["window"], ppl["tokens"]) == (3, 128, 3 * 127)


def test_ppl_takes_the_whole_text_by_default(result, places):
    ppl = result("ppl", *MODEL, "--text", "page.txt", "--window", 128)
    every = result("ppl", *MODEL, "--text", "page.txt", "--window", 128, "--windows", "all")
    assert ppl["windows"] == (len((places / "page.txt").read_text()) + 2) // 128
    assert every["perplexity"] == ppl["perplexity"]


def test_ppl_takes_the_split_and_the_seed(result):
    request = ["ppl", *MODEL, "--text", "wikipedia", "--windows", 2, "--window", 64]
    plain, validation, test, one, again = (
        result(*request, *extra)["perplexity"]
        for extra in (
            [],
            ["--split", "validation"],
            ["--split", "test"],
            ["--seed", 1],
            ["--seed", 1],
        )
    )
    assert plain == validation
    assert one == again
    assert len({plain, test, one}) == 3


def test_tasks_json(result):
    answer = result("tasks", *MODEL, "--tasks", "piqa,winogrande", "--limit", 5)
    assert set(answer["tasks"]) == {"piqa", "winogrande"}
    for score in answer["tasks"].values():
        assert {"acc", "acc_norm", "acc_stderr", "acc_norm_stderr", "n"} <= score.keys()
        assert score["n"] == 5
    assert answer["lm_eval_version"].startswith("0.4.")
    stratified = ["--tasks", "piqa", "--limit", 5, "--subset", "stratified"]
    items = result("tasks", *MODEL, *stratified)["tasks"]["piqa"]["items"]
    assert len(items) == 5
    assert items != [0, 1, 2, 3, 4]


def test_from_text_to_perplexity_of_a_dynamic_slice(result, tmp_path):
    lr, plan, folder = tmp_path / "lr.json", tmp_path / "plan.json", tmp_path / "sliced"
    result("lr", *MODEL, "--text", "text.txt", "--max-tokens", 2000, "--out", lr)
    amounts = ["--lr", lr, "--slice-percentage", 0.3, "--slice-base", 0.1]
    dynamic = result("plan", *amounts, "--out", plan)
    assert dynamic["schedule"] == "dynamic"
    assert len(set(dynamic["widths"])) > 1
    assert json.loads(plan.read_text()) == dynamic
    assert result("plan", *MODEL, *amounts) == dynamic

    matched = result("plan", "--match-parameters", plan)
    assert matched["schedule"] == "constant"
    assert matched["parameters"] == pytest.approx(dynamic["parameters"], rel=0.02)

    calibration = ["--calibration", "text.txt", "--windows", 4, "--window", 64]
    result("slice", *MODEL, "--plan", plan, *calibration, "--out", folder)
    saved = json.loads((folder / "plan.json").read_text())
    assert saved == dynamic
    text = ["--text", "text.txt", "--windows", 4, "--window", 64]
    sliced = result("ppl", "--model", folder, *text)["perplexity"]
    assert sliced != result("ppl", *MODEL, *text)["perplexity"]


def test_without_json_a_table_is_printed(ask):
    status, stdout, stderr = ask("plan", *MODEL, "--slice-percentage", 0.25)
    assert (status, stderr) == (0, "")
    assert "mean slice 0.2500" in stdout
    assert len(stdout.splitlines()) == 6  # heading, four layers, sum


def test_dropped_tokens_are_said(ask):
    _, lr, _ = ask("lr", *MODEL, "--text", "text.txt", "--max-tokens", 1000, "--window", 300)
    assert "tokens after the last full window are dropped" in lr
    text = ["--text", "text.txt", "--windows", 1, "--window", 64]
    assert "1 consecutive windows of 64 tokens; a last short" in ask("ppl", *MODEL, *text)[1]
    assert "1 sampled windows" in ask("ppl", *MODEL, *text, "--seed", 1)[1]


CALIBRATION = ["--calibration", "text.txt", "--windows", 4, "--window", 64]
VALIDATION = [*CALIBRATION, "--text", "page.txt"]


def stored_in(folder):
    with safe_open(folder / "model.safetensors", "pt") as saved:
        return sum(saved.get_tensor(name).numel() for name in saved.keys())  # noqa: SIM118


def test_slice_compensates(result, tmp_path):
    out = tmp_path / "sliced"
    asked = ["slice", *MODEL, "--slice-percentage", 0.25, *CALIBRATION]
    plain = result(*asked, "--out", tmp_path / "plain")
    ours = result(*asked, "--compensate", "--ridge", 0.5, "--out", out)
    assert plain["compensation"] is None
    assert ours["compensation"] == {"ridge": 0.5, "shortcut": True}
    assert stored_in(out) == ours["parameters"] == plain["parameters"]
    assert json.loads((out / "slice.json").read_text())["compensation"]["ridge"] == 0.5
    default = result(*asked, "--compensate", "--out", tmp_path / "default")
    assert default["compensation"]["ridge"] == 0.1
    text = ["--text", "text.txt", "--window", 64, "--windows", 4]
    nll = [result("ppl", "--model", tmp_path / name, *text)["nll_mean"] for name in ("plain", out)]
    assert nll[0] != nll[1]


def test_slice_by_a_schedule_of_equal_size(result, tmp_path):
    """Each stores what its plan says, and no more than constant slicing."""
    result("lr", *MODEL, "--text", "page.txt", "--window", 64, "--out", tmp_path / "lr.json")
    share = ["--slice-percentage", 0.25]
    losses = tmp_path / "losses.json"
    result("sensitivity", *MODEL, *share, *VALIDATION, "--reach", 0.5, "--out", losses)
    budget = result("plan", *MODEL, *share)["parameters"]
    evidence = {
        "constant": [],
        "lr": ["--lr", tmp_path / "lr.json"],
        "sensitivity": ["--sensitivity", losses],
    }
    for name, given in evidence.items():
        out = tmp_path / name
        asked = [*MODEL, *share, "--schedule", name, *given]
        sliced = result("slice", *asked, *CALIBRATION, "--compensate", "--out", out)
        plan = result("plan", *asked)
        saved = json.loads((out / "plan.json").read_text())
        assert saved == plan
        assert saved["schedule"] == name
        assert stored_in(out) == plan["parameters"] == sliced["parameters"] <= budget


def test_slice_measures_lr_itself(result, tmp_path):
    """On the calibration windows, so that nothing but a model and a text is needed."""
    asked = [*MODEL, "--slice-percentage", 0.25, "--schedule", "lr"]
    result("slice", *asked, *CALIBRATION, "--out", tmp_path / "out")
    text = ["--text", "text.txt", "--window", 64, "--stride", 64, "--max-tokens", 256]
    result("lr", *MODEL, *text, "--out", tmp_path / "lr.json")
    plan = result("plan", *asked, "--lr", tmp_path / "lr.json")
    assert json.loads((tmp_path / "out/plan.json").read_text())["widths"] == plan["widths"]


@pytest.mark.parametrize("asked", [["--slice-base", 0.1], ["--schedule", "dynamic"]])
def test_a_dynamic_slice_without_lr_measures_it_on_the_calibration_windows(asked, result, tmp_path):
    """The same slice as by the three commands, tensor by tensor."""
    amounts = [*MODEL, "--slice-percentage", 0.3, *asked]
    direct = result("slice", *amounts, *CALIBRATION, "--out", tmp_path / "direct")
    text = ["--text", "text.txt", "--window", 64, "--stride", 64, "--max-tokens", 256]
    result("lr", *MODEL, *text, "--out", tmp_path / "lr.json")
    plan = tmp_path / "plan.json"
    widths = result("plan", *amounts, "--lr", tmp_path / "lr.json", "--out", plan)["widths"]
    by_plan = result("slice", *MODEL, "--plan", plan, *CALIBRATION, "--out", tmp_path / "by-plan")
    assert json.loads((tmp_path / "direct/plan.json").read_text())["widths"] == widths
    assert len(set(widths)) > 1
    assert (direct["measured_lr"], by_plan["measured_lr"]) == (True, False)
    assert direct["schedule"] == by_plan["schedule"] == "dynamic"
    check_same_tensors(tmp_path / "direct", tmp_path / "by-plan")


def check_same_tensors(*folders):
    first, second = (safe_open(folder / "model.safetensors", "pt") for folder in folders)
    assert set(first.keys()) == set(second.keys())
    for name in first.keys():  # noqa: SIM118
        assert first.get_tensor(name).equal(second.get_tensor(name)), name


def test_the_line_of_a_slice_says_where_lr_was_measured(ask, tmp_path):
    asked = ["slice", *MODEL, "--slice-percentage", 0.3, *CALIBRATION]
    _, constant, _ = ask(*asked, "--out", tmp_path / "constant")
    _, dynamic, _ = ask(*asked, "--schedule", "dynamic", "--out", tmp_path / "dynamic")
    assert "windows of 64 tokens\n" in constant
    assert "windows of 64 tokens, on which layer redundancy was measured too\n" in dynamic


def test_sensitivity_json(result):
    found = result("sensitivity", *MODEL, "--slice-percentage", 0.25, *VALIDATION)
    assert found["shares"] == pytest.approx([0.15, 0.35])
    assert [place["layer"] for place in found["places"]] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert len(found["plan"]) == 4


def test_search_makes_a_plan_that_slice_takes(result, tmp_path):
    plan = tmp_path / "plan.json"
    amounts = ["--slice-percentage", 0.25, "--evaluations", 3]
    found = result("search", *MODEL, *amounts, *VALIDATION, "--out", plan)
    assert len(found["tried"]) == 3
    assert found["parameters"] <= found["budget"]
    sliced = result("slice", *MODEL, "--plan", plan, *CALIBRATION, "--out", tmp_path / "out")
    assert stored_in(tmp_path / "out") == sliced["parameters"] == found["parameters"]


def test_slice_recovers(result, tmp_path):
    asked = ["slice", *MODEL, "--slice-percentage", 0.25, *CALIBRATION]
    out = tmp_path / "out"
    sliced = result(*asked, "--compensate", "--recovery-steps", 2, "--out", out)
    assert sliced["recovery"]["steps"] == 2
    assert sliced["recovery"]["rank"] == 32
    assert sliced["recovery_seconds"] > 0
    assert stored_in(out) == sliced["parameters"]


def test_slice_streams_a_compensation(result, tmp_path):
    asked = ["slice", *MODEL, "--slice-percentage", 0.25, *CALIBRATION, "--compensate"]
    result(*asked, "--out", tmp_path / "whole")
    result(*asked, "--stream", "--out", tmp_path / "streamed")
    check_same_tensors(tmp_path / "whole", tmp_path / "streamed")


HEAVY = ("torch", "transformers", "datasets", "lm_eval")


def loads(command, output):
    """Which of the libraries that take seconds a command loads, its notebooks left out."""
    code = (
        "import sys\n"
        "from dynslice.cli import commands, reproduce\n"
        "reproduce._execute = lambda *_: None\n"
        f"assert commands.main({command!r}) == 0\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    environment = {**os.environ, "DYNSLICE_OUTPUT": str(output)}
    finished = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stderr.splitlines()[-1]


def test_what_is_there_already_costs_no_heavy_import(ask, tmp_path):
    """Neither `assets fetch` nor a run of which every value has been measured."""
    assert ask("assets", "fetch")[0] == 0
    assert loads(["assets", "fetch"], tmp_path) == "[]"
    shutil.copytree(paths.record("quick"), tmp_path / "data/results/quick")
    for extra in ([], ["--from-record"]):
        assert loads(["reproduce", "--profile", "quick", *extra], tmp_path) == "[]"


def test_task_files_that_were_altered_are_written_anew(result, tmp_path, monkeypatch):
    for module in (harness, paths):
        monkeypatch.setattr(module, "TASK_FILES", tmp_path / "tasks")
    result("assets", "fetch")
    path = tmp_path / "tasks" / "piqa.yaml"
    before = path.read_text()
    path.write_text("task: piqa\n")
    result("assets", "fetch")
    assert path.read_text() == before
    (path.parent / "made-by").write_text("another version")
    path.unlink()
    result("assets", "fetch")
    assert path.read_text() == before


def test_a_changed_table_of_tasks_makes_new_task_files(result, tmp_path, monkeypatch):
    """Or any other file of the definitions that are this package's own."""
    for module in (harness, paths):
        monkeypatch.setattr(module, "TASK_FILES", tmp_path / "tasks")
    own = shutil.copytree(task_table.OWN, tmp_path / "own")
    monkeypatch.setattr(task_table, "OWN", own)
    stamps = []
    for changed in (None, "table.yaml", "xlsum_en.yaml"):
        if changed:
            with (own / changed).open("a") as file:
                file.write("# changed\n")
        result("assets", "fetch")
        stamps.append((tmp_path / "tasks" / "made-by").read_text())
    assert len(set(stamps)) == 3
