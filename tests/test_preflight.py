"""The plan of a run before it starts: estimates, and what stands in the way."""

import json

import psutil
import pytest
import torch
from conftest import CPU
from huggingface_hub import constants
from safetensors.torch import save_file

from dynslice.cli import reproduce
from dynslice.core import assets, hub, paths
from dynslice.core.errors import RequestError, RunError
from dynslice.experiment import preflight
from dynslice.experiment.agenda import WorkQueue
from dynslice.experiment.estimate import MACHINES, Estimator, Machine, text_tokens
from dynslice.experiment.kinds import task_tokens
from dynslice.experiment.study import Study
from dynslice.inputs import corpora, models
from dynslice.method import footprint

# That of the committed benchmark, data/bench/smollm2-135m-cpu.json; the eigen-decomposition of
# the same cores.
MACHINE = Machine(CPU, 0.189e12, 0.0945e12, eigenvectors=0.02, copies=2e10, share=0.85)
PAPER = ("meta-llama/Meta-Llama-3-8B", "mistralai/Mistral-7B-v0.1")


@pytest.fixture(scope="module", autouse=True)
def counted_once():
    """What is counted of a model's shape is the same in every test, and takes seconds of it."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("flops", "layers_workspace", "slicing_workspace"):
            patch.setattr(footprint, name, remembered(getattr(footprint, name)))
        yield


def remembered(count):
    kept = {}

    def ask(config, *given, **options):
        key = (config.to_json_string(), repr(given), repr(options))
        if key not in kept:
            kept[key] = count(config, *given, **options)
        return kept[key]

    return ask


@pytest.fixture
def no_hub(monkeypatch):
    """No network, and no local cache of the hub."""

    def refuse(name, *_):
        raise RequestError(f"model {name!r} is not available from the hub: connect to the network")

    monkeypatch.setattr(hub, "model", refuse)
    monkeypatch.setattr(corpora, "obstacle", lambda text, *_: f"text {text!r} is away")


@pytest.mark.parametrize("name", ["quick", "standard"])
def test_estimates_are_those_of_the_record(name):
    assets.fetch()
    study = Study.open(name, from_record=True)
    requests = study.requests()
    estimates = Estimator(study.profile, CPU, MACHINE).estimate(requests)
    results = {request.key: study.store.get(request) for request in requests}
    for kind in ("slice", "ppl", "task"):
        keys = [request.key for request in requests if request.kind == kind]
        measured = sum(results[key].seconds for key in keys)
        assert sum(estimates[key].seconds for key in keys) == pytest.approx(measured, rel=0.35)
    total = sum(result.seconds for result in results.values())
    assert sum(e.seconds for e in estimates.values()) == pytest.approx(total, rel=0.25)
    for key, expected in estimates.items():
        # What tensors take; the process and what it keeps of texts come on top.
        assert expected.memory_bytes < results[key].peak_memory_bytes


def test_estimates_count_slicing_once_for_each_network():
    assets.fetch()
    study = Study.open("quick")
    point = study.points()[1]
    slicing, reading = study.slice_request(point), study.perplexity_request(point, "sotu")
    both = Estimator(study.profile, CPU, MACHINE).estimate([slicing, reading])
    alone = Estimator(study.profile, CPU, MACHINE).estimate([reading])
    whole = both[slicing.key].seconds + both[reading.key].seconds
    assert alone[reading.key].seconds == pytest.approx(whole)
    assert both[reading.key].seconds < both[slicing.key].seconds


def test_a_model_of_the_hub_is_planned_by_its_published_shape(no_hub):
    study = Study.open("paper-full", device="cpu", model=PAPER[0])
    found = preflight.forecast(study, study.missing(study.requests()), machine=MACHINE)
    parameters = 8_030_261_248  # as the hub's model card counts them
    assert found.download_bytes == 2 * parameters
    assert found.seconds > 30 * 86400
    # Dense and sliced network in float16, and some gigabytes to work with.
    assert 4 * parameters < found.memory_bytes < 5 * parameters
    assert found.memory_bytes <= found.gpu_memory_bytes < 6 * parameters
    assert found.obstacles[0].startswith(f"model {PAPER[0]!r} is not available from the hub")
    assert "text 'wikitext2' is away" in found.obstacles


def test_placements_take_less_memory_and_more_disk(no_hub):
    found = {}
    for placement in ("resident", "streamed"):
        study = Study.open("paper", model=PAPER[1], placement=placement, speed_slice_percentages=[])
        requests = study.missing(study.design.perplexity_requests())
        found[placement] = preflight.forecast(study, requests, machine=MACHINE)
    assert found["streamed"].memory_bytes < 0.6 * found["resident"].memory_bytes
    assert found["resident"].disk_bytes == 0 < found["streamed"].disk_bytes


def test_too_little_memory_and_disk_are_said_with_what_to_do(no_hub, monkeypatch):
    memory = type("Memory", (), {"total": 2**30})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    disk = type("Usage", (), {"free": 2**30})
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: disk)
    study = Study.open("paper", device="cpu", model=PAPER[1])
    obstacles = preflight.forecast(study, study.requests(), machine=MACHINE).obstacles
    assert any(
        "of host memory, this machine has 1.0 GiB; --set placement=streamed" in o for o in obstacles
    )
    assert any(
        "of disk in the hub's cache, 1.0 GiB are free there" in o and "HF_HOME" in o
        for o in obstacles
    )


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        ("GatedRepoError", ", which gives it only to accounts that may read it: accept its terms"),
        ("HfHubHTTPError", ", which gives it only to accounts that may read it"),
        ("RevisionNotFoundError", ", which has no revision 'v9' of it: name a branch"),
        (None, ": connect to the network, or give the directory of a downloaded model"),
    ],
)
def test_the_hubs_refusals_are_told_apart_without_its_words(error, sentence, monkeypatch):
    import httpx
    import huggingface_hub

    def refuse(*_args, **_options):
        if error is None:
            raise OSError("https://hub/x?token=hf_secret")
        request = httpx.Request("GET", "https://hub/x?token=hf_secret")
        response = httpx.Response(403, request=request)
        raise getattr(huggingface_hub.errors, error)("token=hf_secret", response=response)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    with pytest.raises(RequestError) as refusal:
        hub.model("somebody/some-model", "v9")
    said = str(refusal.value)
    assert said.startswith(f"model 'somebody/some-model' is not available from the hub{sentence}")
    assert "hf_secret" not in said


def test_a_run_stops_at_the_first_obstacle_before_any_work(no_hub, monkeypatch):
    monkeypatch.setattr(assets, "fetch", list)
    monkeypatch.setattr(Study, "ensure", lambda *_: pytest.fail("work began"))
    with pytest.raises(RequestError, match=r"^model 'meta-llama/.* is not available from the hub"):
        reproduce.run("paper", {}, device="cpu")
    with pytest.raises(RequestError, match=r"the stand-in that `./run_all.sh --profile rehearsal`"):
        reproduce.run("rehearsal", {}, device="cpu")


@pytest.mark.parametrize("profile", ["smoke", "quick", "standard", "full"])
def test_dry_run_of_every_profile_lists_each_measurement(profile, monkeypatch):
    assets.fetch()
    monkeypatch.setattr(Machine, "measured", lambda *_: MACHINE)
    facts, lines = reproduce.run(profile, {}, dry_run=True, device="cpu", verbose=True)
    for run in facts.get("models", [facts]):
        assert run["obstacles"] == []
        assert set(run["estimates"]) == set(run["missing"])
        text = "\n".join(lines)
        assert all(key in text for key in run["measurements"])
        if run["missing"]:
            assert run["seconds"] > 0
            assert run["memory_bytes"] > 0


@pytest.mark.parametrize("only", ["02", "04"])
def test_a_plan_counts_what_a_run_counts(only, monkeypatch, tmp_path):
    """The LR that a plan rests on too, which no notebook of these asks for."""
    monkeypatch.setattr(Machine, "measured", lambda *_: MACHINE)
    monkeypatch.setattr(paths, "OUTPUT", tmp_path)
    facts, lines = reproduce.run("smoke", {}, [only], dry_run=True, device="cpu")
    study = Study.open("smoke", device="cpu")
    every = {request.key: request for request in study.requests()}
    queue = WorkQueue([every[key] for key in facts["missing"]], study.store)
    assert queue.bar.total == len(facts["missing"]) == len(facts["measurements"])
    assert f"{queue.bar.total} of {queue.bar.total} measurements are missing" in lines


@pytest.mark.parametrize("profile", ["quick", "standard", "full"])
def test_a_plan_fits_a_screen(profile, monkeypatch, tmp_path):
    assets.fetch()
    monkeypatch.setattr(Machine, "measured", lambda *_: MACHINE)
    monkeypatch.setattr(paths, "OUTPUT", tmp_path)
    _, lines = reproduce.run(profile, {}, dry_run=True, device="cpu")
    lines = [line for line in lines if "are missing" not in line]  # the sum
    assert len(lines) < 50
    study = Study.open(profile)
    counted = sum(int(line.split()[0]) for line in lines[2:] if " of " in line[:12])
    assert counted <= len(study.requests())
    assert (counted == len(study.requests())) == (not any("more networks" in x for x in lines))


def test_the_paper_takes_a_day_of_an_h100(no_hub):
    whole = 0.0
    for model in PAPER:
        study = Study.open("paper", model=model)
        missing = study.missing(study.requests())
        found = preflight.forecast(study, missing, machine=MACHINES["h100"])
        assert "assumed of an H100" in "\n".join(preflight.lines(study, missing, found))
        whole += found.seconds
    assert 3600 < whole < 24 * 3600


def test_dry_run_of_the_paper_offline_prints_the_whole_plan(ask, tmp_path, monkeypatch):
    monkeypatch.setattr(Machine, "measured", lambda *_: MACHINE)
    monkeypatch.setattr(paths, "OUTPUT", tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    command = ("reproduce", "--profile", "paper", "--device", "cpu")
    status, stdout, _ = ask(*command, "--dry-run", "--json")
    assert status == 0
    for run, model in zip(json.loads(stdout)["models"], PAPER, strict=True):
        assert run["model"] == model
        assert len(run["estimates"]) == len(run["measurements"]) > 100
        assert any("is not available from the hub" in o for o in run["obstacles"])

    status, stdout, stderr = ask(*command)
    assert (status, stdout) == (2, "")
    [sentence] = stderr.strip().splitlines()
    assert sentence.startswith("dynslice: model 'meta-llama/Meta-Llama-3-8B' is not available")


def test_sizes_that_nobody_knows_are_none_not_zero():
    assert text_tokens("alpaca", "validation") is None
    assert task_tokens("gsm8k_cot", 10, None) is None
    assert task_tokens("mmlu", 10, "first") == 57 * task_tokens("mmlu", 10, "stratified")
    assert task_tokens("piqa", None, None) == task_tokens("piqa", 10**6, None)
    assert text_tokens("wikitext2", "test") == pytest.approx(245_569 * 1.3, abs=1)


def test_the_machines_yardsticks_are_measured():
    machine = Machine.measured(CPU, torch.float16)  # a CPU is asked for float32
    assert machine.rate > 1e8
    assert machine.rate_float64 > 1e8
    assert 0 < machine.eigenvectors < 10
    assert 0.3 < machine.share <= 1


def test_tasks_of_the_hub_are_in_the_way_without_it(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    study = Study.open("smoke", device="cpu", tasks={"gsm8k_cot": 2})
    found = preflight.forecast(study, study.design.task_requests(), machine=MACHINE)
    assert [o for o in found.obstacles if o.startswith("task 'gsm8k_cot' is dataset")]
    assert found.unknown == 4


def test_a_split_that_is_not_named_is_the_default_one(monkeypatch):
    asked = []
    monkeypatch.setattr(
        hub, "dataset_refusal", lambda what, repository, files, _: asked.append(files)
    )
    study = Study.open("paper", device="cpu", model="embedded:tiny-random", lr_split=None)
    preflight.forecast(study, study.design.redundancy_requests(), machine=MACHINE)
    assert corpora.HUB["pg19"].parts["validation"].files in asked


def test_no_more_workers_are_counted_than_there_are_networks(monkeypatch):
    counted = []
    monkeypatch.setattr(preflight.os, "cpu_count", lambda: 64)
    monkeypatch.setattr(preflight, "_room_obstacles", lambda *given: counted.append(given[2]) or [])
    study = Study.open("smoke", device="cpu")
    two = [study.slice_request(point) for point in study.points()[1:3]]
    preflight.forecast(study, two, executor="ray")
    preflight.forecast(study, two)
    assert counted == [2, 1]


def test_a_configuration_alone_is_no_downloaded_model(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "model", lambda *_: (tmp_path, []))
    (tmp_path / "config.json").write_text("{}")
    assert not models.in_cache("somebody/model")
    names = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    save_file({"a": torch.zeros(1)}, tmp_path / "model-1.safetensors")
    assert not models.in_cache("somebody/model")
    save_file({"b": torch.zeros(1)}, tmp_path / "model-2.safetensors")
    assert models.in_cache("somebody/model")


def test_one_models_failure_does_not_keep_the_next_from_running(monkeypatch):
    ran = []

    def fail(_profile, study, *_):
        ran.append(study.profile.model)
        raise RunError("a measurement failed")

    monkeypatch.setattr(reproduce, "_prepare", lambda *_: None)
    monkeypatch.setattr(reproduce, "_run_one", fail)
    with pytest.raises(RunError, match=r"tiny-llama-3: a measure.*\n.*tiny-mistral: a measure"):
        reproduce.run("rehearsal", {}, device="cpu")
    assert ran == ["rehearsal/tiny-llama-3", "rehearsal/tiny-mistral"]
