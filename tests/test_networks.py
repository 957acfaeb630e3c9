"""Where the networks of a study are kept does not change what is measured on them."""

from functools import partial

import pytest
import torch
from conftest import CPU

from dynslice.core import assets, hub, paths
from dynslice.evaluate.harness import tasks
from dynslice.evaluate.perplexity import perplexity
from dynslice.experiment.study import Study
from dynslice.inputs import corpora, models, texts
from dynslice.inputs.checkpoints import save
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
    """The hub's answers are stood in for; what is done with them is not."""
    assets.fetch()
    asked = []
    folder = models.resolve("embedded:tiny-random")
    monkeypatch.setattr(paths, "OUTPUT", tmp_path)
    monkeypatch.setattr(hub, "model_refusal", lambda *_: "cannot be reached")
    monkeypatch.setattr(
        hub, "snapshot", lambda name, revision=None: asked.append(revision) or folder
    )
    monkeypatch.setattr(hub, "commit_of", lambda *_: "c0ffee")
    monkeypatch.setattr(texts, "commit_of", lambda text, revision: f"{text} at {revision}")
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
    read = []
    monkeypatch.setattr(
        corpora, "documents", lambda *a: read.append(a) or texts.documents("wikipedia", "test")
    )
    stood_in = Study.open("smoke", stand_ins={"sotu": "c4"}, revisions={"c4": "abc"})
    assert stood_in.design.text("sotu", "train")["text_revision"] == "abc"
    commits = study.get(request).provenance["hub_commits"]
    assert commits == {"somebody/tiny": "c0ffee", "wikitext2": "wikitext2 at v2"}
    assert read == [("wikitext2", "test", "v2")]
    assert set(asked) >= {"c0ffee"}  # loaded by its commit
