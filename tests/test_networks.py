"""Where the networks of a study are kept does not change what is measured on them."""

from functools import partial

import hub_stand_in
import pytest
import torch
from conftest import CPU

from dynslice.core import assets, paths
from dynslice.evaluate.harness import tasks
from dynslice.evaluate.perplexity import perplexity
from dynslice.experiment.study import Study
from dynslice.inputs import corpora, models
from dynslice.inputs.checkpoints import save
from dynslice.inputs.data_files import SPLITS
from dynslice.method.architectures import dims_of
from dynslice.method.plan import constant
from dynslice.method.redundancy import layer_redundancy
from dynslice.method.slicing import slice_model

SMALL = {
    "ablation_slice_percentage": None,
    "single_layer_slice": None,
    "ablation_lr_tokens": [],
    "beyond_slice_percentages": [],
    "instead_slice_percentages": [],
}
ONE_AT_A_TIME = {"speed_slice_percentages": [], "host_memory_gib": 0.5}


@pytest.fixture
def crowded(monkeypatch):
    """Memory for the embedding and one of four layers; accelerate keeps the others on disk."""
    load = models.AutoModelForCausalLM.from_pretrained
    room = partial(load, max_memory={"cpu": 450_000})
    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", room)


def on_disk(model):
    return sum(p.device.type == "meta" for p in model.parameters())


def test_a_spread_network_gives_the_same_values(crowded, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CACHE", tmp_path)
    windows = torch.randint(257, (4, 64), generator=torch.Generator().manual_seed(0))
    dense, tokenizer = models.load("embedded:tiny-random", CPU, torch.float32)
    save(dense, tokenizer, tmp_path / "dense", shard="100KB")
    plan = constant(dims_of(dense.config), 0.25)
    save(slice_model(dense, windows, plan).model, tokenizer, tmp_path / "sliced")
    for name in ("dense", "sliced"):
        whole, _ = models.load(str(tmp_path / name), CPU, torch.float32)
        spread, _ = models.load(str(tmp_path / name), CPU, torch.float32, spread=True)
        assert on_disk(whole) == 0 < on_disk(spread)
        wanted = perplexity(whole, windows)["nll"]
        assert perplexity(spread, windows)["nll"] == pytest.approx(wanted, abs=1e-6)
        if name == "dense":
            lr = layer_redundancy(whole, windows, 64).lr
            assert layer_redundancy(spread, windows, 64).lr == pytest.approx(lr, abs=1e-6)


def test_a_spread_network_answers_tasks_the_same(crowded):
    assets.fetch()
    whole, tokenizer = models.load("embedded:tiny-random", CPU, torch.float32)
    spread, _ = models.load("embedded:tiny-random", CPU, torch.float32, spread=True)
    assert on_disk(spread) > 0
    margins = [tasks(m, tokenizer, ["piqa"], 6)["piqa"]["margin"] for m in (whole, spread)]
    assert margins[1] == pytest.approx(margins[0], abs=1e-3)


def values_of(place, folder, **extra):
    """What a small study measures where its networks are placed so."""
    assets.fetch()
    changes = {**SMALL, **extra, "placement": place, "tasks": {"piqa": 4}, "slice_bases": [0.0]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "OUTPUT", folder)
        study = Study.open("smoke", device="cpu", **changes)
        requests = study.requests()
        study.ensure(requests)
        return [study.get(request).value for request in requests]


@pytest.fixture(scope="module")
def resident(tmp_path_factory):
    return values_of("resident", tmp_path_factory.mktemp("resident"), speed_slice_percentages=[])


@pytest.mark.parametrize("placement", ["streamed", "spread"])
def test_a_study_measures_the_same_in_every_placement(placement, resident, tmp_path):
    found = values_of(placement, tmp_path, **ONE_AT_A_TIME)
    assert not list((paths.CACHE / "sliced").glob("sliced-*/.a*"))
    for ours, theirs in zip(found, resident, strict=True):
        for name in ("perplexity", "parameters", "widths", "margin", "acc"):
            if name in theirs:
                assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name


def test_what_was_read_of_the_hub_is_recorded_with_its_commit(tmp_path, monkeypatch):
    assets.fetch()
    monkeypatch.setattr(paths, "OUTPUT", tmp_path)
    root, wikitext = tmp_path / "root", corpora.HUB["wikitext2"].repository
    hub_stand_in.write_model(root / "models/somebody/tiny@v1")
    lines = [" ".join(f"word {i}" for i in range(3000))]
    hub_stand_in.write_text(root, "wikitext2", dict.fromkeys(SPLITS, lines))
    (root / "datasets" / wikitext).rename(root / "datasets" / f"{wikitext}@v2")
    study = Study.open(
        "smoke",
        device="cpu",
        model="somebody/tiny",
        revisions={"somebody/tiny": "v1", "wikitext2": "v2"},
        eval_texts=["wikitext2"],
        calibration_text="sotu",
    )
    request = study.perplexity_request(study.points()[0], "wikitext2")
    assert (request.config["revision"], request.config["text_revision"]) == ("v1", "v2")
    stood_in = Study.open("smoke", stand_ins={"sotu": "c4"}, revisions={"c4": "abc"})
    assert stood_in.design.text("sotu", "train")["text_revision"] == "abc"
    with hub_stand_in.serving(root) as hub, hub_stand_in.connected(hub, tmp_path / "home"):
        commits = {
            "somebody/tiny": hub.commit("models", "somebody/tiny", "v1"),
            "wikitext2": hub.commit("datasets", wikitext, "v2"),
        }
        assert study.get(request).provenance["hub_commits"] == commits
        assert [r for r in hub.requests if "HEAD" in r and commits["somebody/tiny"] in r]
