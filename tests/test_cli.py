"""The command line: JSON on stdout, and one sentence for each kind of bad request."""

import json
import os

import pytest
from prose import paragraphs
from safetensors import safe_open

from dynslice import assets, cli, corpora

MODEL = ["--model", "embedded:tiny-random"]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A folder with a text and with every kind of file that a request may not name."""
    assets.fetch()
    folder = tmp_path_factory.mktemp("cli")
    text = paragraphs(70)
    assert len(text) > 20_000
    files = {
        "text.txt": text,
        "page.txt": paragraphs(8),
        "short.txt": "Too short to slice with.",
        "not.json": "layers: 4",
        "list.json": "[1, 2]",
        "other.json": json.dumps({"answer": 42}),
        "no-scores.json": json.dumps({"layers": [1, 2, 3, 4]}),
        "config-only/config.json": json.dumps({"model_type": "llama"}),
        "unsupported/config.json": json.dumps({"model_type": "gpt2"}),
        "no-type/config.json": "{}",
        "broken/config.json": "{",
        "mine.yaml": "description: [",
        "quick.yaml": "description: mine",
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")
    (folder / "empty").mkdir()
    return folder


@pytest.fixture
def ask(capfd, places, monkeypatch):
    """Run a command in this process, in the folder of `places`: (exit status, stdout, stderr)."""
    monkeypatch.chdir(places)

    def run(*arguments):
        capfd.readouterr()
        try:
            status = cli.main(list(map(str, arguments)))
        except SystemExit as stop:  # argparse's own way out
            status = stop.code
        said = capfd.readouterr()
        return status, said.out, said.err

    return run


@pytest.fixture
def result(ask):
    """The JSON object of a command that succeeds."""

    def run(*arguments):
        status, stdout, stderr = ask(*arguments, "--json")
        assert status == 0, stderr
        assert stdout.count("\n") == 1  # nothing beside the object
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
    drawn = ["--tasks", "piqa", "--limit", 5, "--subset", "stratified"]
    items = result("tasks", *MODEL, *drawn)["tasks"]["piqa"]["items"]
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


# Bad requests: what is typed, and what the one sentence on stderr must hold

PPL = "ppl --model embedded:tiny-random --text text.txt --windows 1 --window 32"
LR = "lr --model embedded:tiny-random --text text.txt --max-tokens 64"
PLAN = "plan --model embedded:tiny-random"
SLICE = "slice --model embedded:tiny-random --calibration text.txt --windows 1 --window 32"
TASKS = "tasks --model embedded:tiny-random --limit 1"
SMOKE = "reproduce --profile smoke --dry-run"

BAD_REQUESTS = {
    # models
    "ppl --model embedded:gpt --text text.txt": "embedded model 'gpt' is unknown",
    "ppl --model no/such/directory --text text.txt": "model 'no/such/directory' is no embedded",
    "ppl --model empty --text text.txt": "'empty' is a directory without config.json",
    "ppl --model unsupported --text text.txt": "'gpt2' can't be sliced exactly: it keeps its maps",
    "ppl --model no-type --text text.txt": "model 'no-type'",
    "ppl --model broken --text text.txt": "model 'broken'",
    "ppl --model config-only --text text.txt": "model 'config-only'",
    # texts
    f"{LR} --text nowhere.txt": "text 'nowhere.txt' is neither a corpus",
    f"{LR} --text empty": "text 'empty' is a directory without split 'validation' (it has none)",
    f"{PPL} --text wikipedia --split dev": "split 'dev' is unknown; use train, validation",
    f"{PPL} --split test": "is a file and has no splits",
    f"{PPL} --text short.txt --window 64": "holds 26 tokens, fewer than 1 windows of 64",
    f"{SLICE} --slice-percentage 0.2 --out new --window 99999": "fewer than 1 windows of 99999",
    f"{LR} --max-tokens 1": "LR needs at least 2",
    f"{PPL} --window 1": "window 1 predicts no token",
    # amounts
    PLAN: "--slice-percentage is missing",
    f"{PLAN} --slice-percentage 1.5": "slice percentage 1.5 is outside 0 to",
    f"{PLAN} --slice-percentage 30": "slice percentage 30.0 is outside 0 to",
    f"{PLAN} --slice-percentage -0.1": "slice percentage -0.1 is outside 0 to",
    f"{PLAN} --slice-percentage nan": "slice percentage nan is outside 0 to",
    f"{PLAN} --slice-percentage half": "invalid float value: 'half'",
    f"{PLAN} --slice-percentage 0.2 --slice-base 0.3 --lr lr.json": "slice base 0.3 is outside 0",
    f"{PLAN} --slice-percentage 0.2 --round-to 7": "round_to 7 does not divide the hidden size 64",
    f"{PLAN} --slice-percentage 0.2 --round-to 0": "0 is no whole number of at least 1",
    f"{PLAN} --slice-percentage 0.2 --schedule dynamic": "a dynamic plan needs LR scores",
    f"{PLAN} --slice-percentage 0.2 --slice-base 0.1": "a dynamic plan needs LR scores",
    f"{PLAN} --slice-percentage 0.2 --schedule linear": "invalid choice: 'linear'",
    f"{PLAN} --slice-percentage 0.2 --match-parameters plan.json": "leave --slice-percentage out",
    "plan --slice-percentage 0.2": "a plan needs --model or --lr",
    # files
    f"{PLAN} --slice-percentage 0.2 --lr nowhere.json": "LR file 'nowhere.json' cannot be read",
    f"{PLAN} --slice-percentage 0.2 --lr not.json": "LR file 'not.json' is not JSON",
    f"{PLAN} --slice-percentage 0.2 --lr list.json": "LR file 'list.json' holds no JSON object",
    f"{PLAN} --slice-percentage 0.2 --lr other.json": "the LR file lists no layers",
    f"{PLAN} --slice-percentage 0.2 --lr no-scores.json": "the LR file lists no layers",
    "plan --slice-percentage 0.2 --lr other.json": "shape of the model is incomplete",
    f"{SLICE} --plan plan.json --round-to 16 --out new": "leave --round-to out",
    "plan --match-parameters plan.json --slice-base 0.1": "leave --slice-base out",
    f"{SLICE} --plan nowhere.json --out new": "plan file 'nowhere.json' cannot be read",
    f"{SLICE} --plan not.json --out new": "plan file 'not.json' is not JSON",
    f"{SLICE} --plan other.json --out new": "incomplete",
    f"{SLICE} --plan float.json --out new": "40.5",
    f"{SLICE} --plan plan.json --slice-percentage 0.2 --out new": "leave --slice-percentage out",
    f"{SLICE} --slice-percentage 0.2 --out empty": "output 'empty' exists already",
    f"{SLICE} --slice-percentage 0.2 --out text.txt/new": "output 'text.txt/new' cannot be written",
    f"{SLICE} --slice-percentage 0.2": "required: --out",
    f"{PLAN} --slice-percentage 0.2 --out no/such/plan.json": "output 'no/such/plan.json' cannot",
    f"{LR} --out no/such/lr.json": "output 'no/such/lr.json' cannot be written",
    # tasks
    f"{TASKS} --tasks piqua": "task 'piqua' is unknown; the tasks are hellaswag",
    f"{TASKS} --tasks ,": "--tasks names none",
    f"{TASKS} --tasks piqa --limit 0": "0 is no whole number of at least 1",
    # machine
    f"{PPL} --device tpu": "device 'tpu' is unknown; use auto, cpu, cuda or cuda:N",
    f"{PPL} --device cuda:99": "device 'cuda:99' is not available",
    f"{PPL} --dtype float8": "dtype 'float8' is unknown; use auto, float32",
    f"{PPL} --seed -1": "-1 is no whole number",
    f"{PPL} --seed one": "one is no whole number",
    # spelling
    f"{PPL} --windows few": "few",
    f"{PPL} --windws 4": "unrecognized arguments: --windws 4",
    "prune --model embedded:tiny-random": "invalid choice: 'prune'",
    # profiles
    "reproduce --profile nope --dry-run": "profile 'nope' is unknown; there are",
    "record --profile nope": "profile 'nope' is unknown; there are",
    "reproduce --profile mine.yaml --dry-run": "profile 'mine.yaml' is not YAML",
    "reproduce --profile quick.yaml --dry-run": "has the name of a built-in profile",
    f"{SMOKE} --set eval_window_size=64": "'eval_window_size' is unknown; the nearest valid name",
    f"{SMOKE} --set round-to=4": "'round-to' is unknown; the nearest valid name is 'round_to'",
    f"{SMOKE} --set eval_windows=many": "eval_windows = 'many'",
    f"{SMOKE} --set slice_percentages=0.25": "slice_percentages = 0.25",
    f"{SMOKE} --set round_to=[8": "value '[8' of round_to is not YAML",
    f"{SMOKE} --set round_to": "--set 'round_to' is not of the form key=value",
    f"{SMOKE} --only 99": "notebook '99' is unknown",
}


def check_refusal(status, stdout, stderr, message):
    assert status == 2, stderr
    assert stdout == ""
    assert "Traceback" not in stderr
    assert message in stderr
    [sentence] = filter(str.strip, stderr.splitlines())
    assert sentence.startswith("dynslice")


@pytest.fixture(scope="module")
def made(places):
    """A sound LR file and two plans, one with a width that is no integer."""
    lr, plan = str(places / "lr.json"), str(places / "plan.json")
    text = ["--text", str(places / "text.txt"), "--max-tokens", "64"]
    assert cli.main(["lr", *MODEL, *text, "--out", lr]) == 0
    assert cli.main(["plan", *MODEL, "--slice-percentage", "0.25", "--out", plan]) == 0
    values = json.loads((places / "plan.json").read_text())
    (places / "float.json").write_text(json.dumps({**values, "widths": [40.5, 48, 48, 48]}))


@pytest.mark.parametrize("request_", BAD_REQUESTS)
def test_bad_request_is_refused_in_one_sentence(request_, ask, made, places):
    before = sorted(path.name for path in places.rglob("*"))
    check_refusal(*ask(*request_.split()), BAD_REQUESTS[request_])
    assert sorted(path.name for path in places.rglob("*")) == before


def test_sliced_model_is_not_sliced_again(ask, result, tmp_path):
    calibration = ["--calibration", "text.txt", "--windows", 1, "--window", 32]
    first = [*MODEL, "--slice-percentage", 0.25, *calibration, "--out", tmp_path / "one"]
    result("slice", *first)
    again = ["--model", tmp_path / "one", "--slice-percentage", 0.25, *calibration]
    refused = ask("slice", *again, "--out", tmp_path / "two")
    check_refusal(*refused, "needs a dense model, and this one is sliced already")
    refused = ask("lr", "--model", tmp_path / "one", "--text", "text.txt")
    check_refusal(*refused, "needs a dense model, and this one is sliced already")


def test_plan_of_another_model_is_refused(ask, made, places, tmp_path):
    plan = json.loads((places / "plan.json").read_text())
    plan["shape"]["vocab_size"] = 1000
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    refused = ask(*SLICE.split(), "--plan", tmp_path / "plan.json", "--out", tmp_path / "new")
    check_refusal(*refused, "made for another model (vocab_size 1000, here 257)")


def test_long_text_in_place_of_a_name_is_refused(ask):
    refused = ask("ppl", *MODEL, "--text", paragraphs(2))
    check_refusal(
        *refused, f"neither a corpus ({', '.join([*corpora.CORPORA, *corpora.HUB])}) nor a file"
    )


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ("ppl --model nobody/no-such-model --text text.txt", "could not be had from the hub"),
        (f"{SLICE} --slice-percentage 2 --out new", "slice percentage 2.0 is outside"),
        (f"{PPL} --text no-such-text", "neither a corpus"),
    ],
)
def test_bad_request_in_a_process_of_its_own(request_, message, dynslice, places):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    check_refusal(*dynslice(*request_.split(), cwd=places, env=environment), message)
