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
from dynslice.extensions.compensation import RIDGES
from dynslice.extensions.schedules import BEST
from dynslice.inputs import corpora
from dynslice.method.layout import basis_groups

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
    assert "with embedding and head apart 160,624 parameters" in stdout
    assert len(stdout.splitlines()) == 7  # heading, four layers, sums of both layouts


def test_dropped_tokens_are_said(ask):
    _, lr, _ = ask("lr", *MODEL, "--text", "text.txt", "--max-tokens", 1000, "--window", 300)
    assert "tokens after the last full window are dropped" in lr
    text = ["--text", "text.txt", "--windows", 1, "--window", 64]
    assert "1 consecutive windows of 64 tokens; a last short" in ask("ppl", *MODEL, *text)[1]
    assert "1 sampled windows" in ask("ppl", *MODEL, *text, "--seed", 1)[1]


@pytest.mark.parametrize(
    "command", ["lr --text", "ppl --text", "slice --slice-percentage 0.2 --calibration"]
)
def test_a_text_that_is_not_fetched_is_named_before_a_model_is_made(
    command, ask, monkeypatch, tmp_path
):
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")
    corpora.embedded.cache_clear()
    out = [] if command.startswith("ppl") else ["--out", tmp_path / "out"]
    status, _, said = ask(*command.split(), "sotu", *MODEL, *out)
    assert (status, said.count("\n")) == (2, 1)
    assert "asset 'sotu' is not in" in said
    assert not (tmp_path / "cache" / "models").exists()


CALIBRATION = ["--calibration", "text.txt", "--windows", 4, "--window", 64]


def stored_in(folder):
    with safe_open(folder / "model.safetensors", "pt") as saved:
        return sum(saved.get_tensor(name).numel() for name in saved.keys())  # noqa: SIM118


def test_slice_compensates(result, tmp_path):
    out = tmp_path / "sliced"
    asked = ["slice", *MODEL, "--slice-percentage", 0.25, *CALIBRATION]
    plain = result(*asked, "--out", tmp_path / "plain")
    ours = result(*asked, "--compensate", "--ridge", 0.5, "--out", out)
    assert plain["compensation"] is None
    assert ours["compensation"] == {"ridge": 0.5, "shortcut": True, "chosen": [0.5] * 8}
    assert stored_in(out) == ours["parameters"] == plain["parameters"]
    assert json.loads((out / "slice.json").read_text())["compensation"]["ridge"] == 0.5
    default = result(*asked, "--compensate", "--out", tmp_path / "default")
    assert default["compensation"]["ridge"] is None
    chosen = default["compensation"]["chosen"]
    assert len(chosen) == 8
    assert {*chosen} <= {None, *RIDGES}
    saved = json.loads((tmp_path / "default" / "slice.json").read_text())
    assert saved["compensation"] == default["compensation"]
    text = ["--text", "text.txt", "--window", 64, "--windows", 4]
    nll = [result("ppl", "--model", tmp_path / name, *text)["nll_mean"] for name in ("plain", out)]
    assert nll[0] != nll[1]


def test_slice_by_a_schedule_of_equal_size(result, tmp_path):
    """Each stores what its plan says, and no more than constant slicing."""
    result("lr", *MODEL, "--text", "page.txt", "--window", 64, "--out", tmp_path / "lr.json")
    share = ["--slice-percentage", 0.25]
    budget = result("plan", *MODEL, *share)["parameters"]
    evidence = {
        "constant": [],
        "lr": ["--lr", tmp_path / "lr.json"],
        "first": [],
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


def test_a_small_share_on_shared_bases_needs_no_lr_file(result, tmp_path):
    """Its widths are given by SP, whatever the shortcuts of other layouts would store."""
    shared = ["--slice-percentage", 0.04, "--schedule", "dynamic", "--basis-layers", "all"]
    made = result("slice", *MODEL, *shared, *CALIBRATION, "--out", tmp_path / "out")
    assert (made["schedule"], made["measured_lr"]) == ("dynamic", True)


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


# Sizes, layouts and recipes


def test_what_a_compensation_chose_is_said(ask, monkeypatch, tmp_path):
    asked = ["slice", *MODEL, "--slice-percentage", 0.25, *CALIBRATION, "--compensate"]
    _, given, _ = ask(*asked, "--ridge", 0.5, "--out", tmp_path / "given")
    assert "\ncompensated 8 of 8 blocks, with ridges from 0.5 to 0.5\n" in given
    one = ["--windows", 1, "--out", tmp_path / "one"]  # it has nothing to judge by
    _, none, _ = ask(*asked, *one)
    assert "compensated 0 of 8 blocks: held-out calibration windows showed no gain" in none


@pytest.mark.parametrize("layout", [[], ["--untie"], ["--basis-layers", 2], ["--plain"]])
@pytest.mark.parametrize(
    ("size", "parameters"),
    [
        (["0.84"], 138_163),  # of 164,480
        (["150K"], 150_000),
        (["0.0006GB"], 150_000),  # in float32
        (["0.28MB", "--save-dtype", "bfloat16"], 140_000),
        (["0.14m"], 140_000),
    ],
)
def test_a_size_is_a_share_a_count_or_bytes(size, parameters, layout, result):
    plan = result("plan", *MODEL, "--size", *size, *layout)
    assert 0.95 * parameters < plan["parameters"] <= parameters
    assert plan["layout"]["tied"] == (layout == [] or layout[0] == "--basis-layers")
    # As much as fits: the next wider plan does not.
    unit = 4 if layout == ["--plain"] else 8 / 4
    wider = plan["slice_percentage"] - unit / 64
    more = result("plan", *MODEL, "--slice-percentage", wider, *layout)
    assert more["parameters"] > parameters


def test_a_slice_of_a_size_stores_no_more(result, tmp_path):
    out = tmp_path / "sliced"
    sliced = result("slice", *MODEL, "--size", "140K", *CALIBRATION, "--out", out)
    assert 0.95 * 140_000 < stored_in(out) == sliced["parameters"] <= 140_000


def test_a_tied_model_is_sliced_into_one_table_unless_it_is_untied(result, tmp_path):
    asked = ["slice", *MODEL, "--slice-percentage", 0.25, *CALIBRATION]
    tied = result(*asked, "--out", tmp_path / "tied")
    apart = result(*asked, "--untie", "--out", tmp_path / "apart")
    assert (tied["layout"]["tied"], apart["layout"]["tied"]) == (True, False)
    assert tied["parameters"] == stored_in(tmp_path / "tied") == 151_424
    assert apart["parameters"] == stored_in(tmp_path / "apart") == 160_624
    assert tied["parameters_untied"] == apart["parameters_untied"] == 160_624
    text = ["--text", "text.txt", "--window", 64, "--windows", 4]
    one, two = (
        result("ppl", "--model", tmp_path / name, *text)["perplexity"] for name in ("tied", "apart")
    )
    assert one == pytest.approx(two, rel=1e-5)
    untied = ["--model", "embedded:tiny-llama-3", "--slice-percentage", 0.25]
    assert not result("plan", *untied)["layout"]["tied"]


def test_the_best_recipe_needs_a_model_a_size_and_a_text(ask, result, tmp_path):
    out = tmp_path / "best"
    asked = ["slice", *MODEL, "--size", 0.84, *CALIBRATION, "--recipe", "best"]
    best = result(*asked, "--out", out)
    text = ["--text", "text.txt", "--window", 64, "--stride", 64, "--max-tokens", 256]
    lr = result("lr", *MODEL, *text, "--out", tmp_path / "lr.json")
    groups = basis_groups(2, 4, BEST["basis_layers"], [layer["lr"] for layer in lr["layers"]])
    assert best["schedule"] == BEST["schedule"] == "lr"
    assert best["layout"] == {"tied": True, "basis_groups": list(groups), "plain": False}
    assert best["compensation"]["ridge"] is None
    assert len(best["compensation"]["chosen"]) == 8
    assert stored_in(out) == best["parameters"] <= 0.84 * 164_480
    assert json.loads((out / "slice.json").read_text())["recipe"] == "best"
    # The same by its parts.
    parts = ["--schedule", "lr", "--lr", tmp_path / "lr.json", "--compensate"]
    parts += ["--basis-layers", BEST["basis_layers"], "--out", tmp_path / "parts"]
    result("slice", *MODEL, "--size", 0.84, *CALIBRATION, *parts)
    check_same_tensors(out, tmp_path / "parts")
    # A GPU or not: a tasks run and a pass over a text work on it.
    assert (
        result("tasks", "--model", out, "--tasks", "piqa", "--limit", 2)["tasks"]["piqa"]["n"] == 2
    )


def test_options_go_before_the_recipe(result, tmp_path):
    asked = ["slice", *MODEL, "--size", 0.84, *CALIBRATION, "--recipe", "best"]
    own = ["--schedule", "constant", "--basis-layers", 1, "--untie", "--ridge", 0.5]
    made = result(*asked, *own, "--out", tmp_path / "own")
    assert (made["schedule"], made["measured_lr"]) == ("constant", False)
    assert made["layout"] == {"tied": False, "basis_groups": [2, 2, 2, 2], "plain": False}
    assert made["compensation"]["chosen"] == [0.5] * 8
    plain = result(*asked, "--plain", "--out", tmp_path / "plain")
    assert (plain["schedule"], plain["layout"]["plain"]) == ("constant", True)
    assert len(plain["compensation"]["chosen"]) == 8


def test_the_published_recipe_is_what_is_made_without_one(result, tmp_path):
    asked = ["slice", *MODEL, "--slice-percentage", 0.25, *CALIBRATION]
    result(*asked, "--out", tmp_path / "none")
    result(*asked, "--recipe", "published", "--out", tmp_path / "published")
    check_same_tensors(tmp_path / "none", tmp_path / "published")


@pytest.mark.parametrize("compensated", [[], ["--compensate"]])
def test_a_plain_slice_is_an_ordinary_checkpoint(compensated, ask, result, tmp_path):
    out, asked = tmp_path / "plain", ["slice", *MODEL, "--plain", *CALIBRATION, *compensated]
    status, stdout, stderr = ask(*asked, "--size", 0.84, "--out", out)
    assert status == 0, stderr
    config = json.loads((out / "config.json").read_text())
    width = config["hidden_size"]
    assert f"an ordinary checkpoint of hidden size {width}, which transformers loads" in stdout
    assert (config["model_type"], "auto_map" in config) == ("llama", False)
    assert config["head_dim"] == 16
    assert width % 4 == 0  # the number of heads
    assert 0.95 * 0.84 * 164_480 < stored_in(out) <= 0.84 * 164_480
    assert not list(out.glob("*.py"))
    tasks = result("tasks", "--model", out, "--tasks", "piqa", "--limit", 2)["tasks"]
    assert tasks["piqa"]["n"] == 2
    result(*asked, "--size", 0.84, "--stream", "--out", tmp_path / "streamed")
    check_same_tensors(out, tmp_path / "streamed")


def test_a_grouped_slice_is_streamed(result, tmp_path):
    asked = ["slice", *MODEL, "--size", "140K", *CALIBRATION, "--basis-layers", "all"]
    for extra in ([], ["--compensate"]):
        folders = [tmp_path / f"{name}{len(extra)}" for name in ("whole", "streamed")]
        result(*asked, *extra, "--out", folders[0])
        result(*asked, *extra, "--stream", "--out", folders[1])
        check_same_tensors(*folders)


def test_files_of_an_earlier_version_still_serve(result, tmp_path):
    """They know neither of one table nor of layouts."""
    result("lr", *MODEL, "--text", "page.txt", "--window", 64, "--out", tmp_path / "lr.json")
    amounts = ["--slice-percentage", 0.3, "--lr", tmp_path / "lr.json", "--untie"]
    plan = result("plan", *MODEL, *amounts, "--out", tmp_path / "plan.json")
    for name in ("lr.json", "plan.json"):
        values = json.loads((tmp_path / name).read_text())
        for key in {*values["shape"]} & {"tied", "final_scale", "heads"}:
            del values["shape"][key]
        for key in {*values} & {"layout", "parameters_untied"}:
            del values[key]
        (tmp_path / f"old-{name}").write_text(json.dumps(values))
    lr = ["--slice-percentage", 0.3, "--lr", tmp_path / "old-lr.json"]
    assert result("plan", *lr)["parameters"] == plan["parameters"]
    assert result("plan", *MODEL, *lr, "--untie")["parameters"] == plan["parameters"]
    assert result("plan", *MODEL, *lr)["parameters"] == plan["parameters"] - 257 * 64 + 64
    match = result("plan", "--match-parameters", tmp_path / "old-plan.json")
    assert match["parameters"] == pytest.approx(plan["parameters"], rel=0.02)
    for name in ("plan", "old-plan"):
        by_plan = ["--plan", tmp_path / f"{name}.json", *CALIBRATION, "--out", tmp_path / name]
        assert result("slice", *MODEL, *by_plan)["parameters"] == plan["parameters"]
    check_same_tensors(tmp_path / "plan", tmp_path / "old-plan")


HEAVY = ("torch", "transformers", "datasets", "lm_eval")


def loads(command, output):
    """Which of the libraries that take seconds a command loads, its notebooks left out."""
    code = (
        "import sys\n"
        "from dynslice.cli import commands, reproduce\n"
        "reproduce.rendering.execute = lambda *_: None\n"
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
    # The record first: where it lacks a value it says so, and the other would measure it.
    for extra in (["--from-record"], []):
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
