"""Models and data sets of a hub, by the real clients, through the stand-in and its faults."""

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import hub_stand_in
import huggingface_hub
import pytest
import torch
from conftest import CPU
from hub_stand_in import Rule
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from dynslice.cli.card import _licence
from dynslice.core import hub as hub_
from dynslice.core.errors import DiskError, RequestError
from dynslice.inputs import checkpoints, models, texts

MODEL, FILE = "some/tiny", "model.safetensors"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n"
# Parameters before and after slicing a quarter, whatever their configs say.
SIZES = {"own-head": (180_928, 160_624), "one-table": (164_480, 151_424)}


def with_head(folder, head, tied):
    """A model whose config says one thing of its head, and whose weights another."""
    weights = load_file(folder / FILE)
    weights["lm_head.weight"] = head(weights["model.embed_tokens.weight"]).contiguous()
    save_file(weights, folder / FILE, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": tied}))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Repositories: a model whole and, on a branch, in shards; heads unlike configs; a text."""
    root = tmp_path_factory.mktemp("hub")
    whole = hub_stand_in.write_model(root / "models" / MODEL)
    hub_stand_in.write_model(root / "models" / f"{MODEL}@v2", "tiny-llama-3", "200KB")
    for name in SIZES:
        shutil.copytree(whole, root / "models/some" / name)
    with_head(root / "models/some/own-head", lambda table: table + 1, tied=True)
    with_head(root / "models/some/one-table", torch.clone, tied=False)
    rows = [f"Line {i}." for i in range(300)]
    hub_stand_in.write_text(root, "wikitext2", dict.fromkeys(("train", "validation", "test"), rows))
    hub_stand_in.write_text(root, "c4", dict.fromkeys(("train", "validation", "test"), rows))
    return root


@pytest.fixture
def hub(root, tmp_path, monkeypatch):
    """The stand-in, to which this process is connected with an empty cache."""
    monkeypatch.setattr(hub_, "PAUSES", (0, 0), raising=False)
    with hub_stand_in.serving(root) as hub, hub_stand_in.connected(hub, tmp_path / "home"):
        yield hub


def forget():
    """As in the next process."""
    hub_stand_in._forget()


def offline(monkeypatch, is_offline=True):
    forget()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", is_offline)


def refusal(*asked):
    with pytest.raises(RequestError) as refused:
        models.load(asked[0], CPU, torch.float32, *asked[1:])
    said = str(refused.value)
    assert "127.0.0.1" not in said
    assert "\n" not in said
    return said


# What goes on, and what is said


GOES_ON = {
    "nothing": [],
    "500": [Rule("api/models", status=500, times=1), Rule(FILE, status=500, times=1)],
    "503": [Rule("api/models", status=503, times=1), Rule(FILE, "GET", status=503, times=1)],
    "429": [Rule("api/models", status=429, times=1), Rule(FILE, status=429, times=1)],
    "dropped": [Rule("api/models", drop=True, times=1)],
    "cut": [Rule(FILE, "GET", cut=1000, times=1)],
    "wrong hash": [Rule(FILE, "GET", content=lambda data: data[::-1], times=1)],
    "another host": [Rule(FILE, cdn=True)],
    "no auth-check": [Rule("auth-check", status=404)],
}


@pytest.mark.parametrize("case", GOES_ON)
def test_faults_that_pass_do_not_end_a_download(case, hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.file_download.time, "sleep", lambda _: None)
    hub.rules = list(GOES_ON[case])
    folder = Path(models.resolve(MODEL))
    assert folder.name == hub.commit("models", MODEL) == models.commit_of(MODEL)
    assert (folder / FILE).read_bytes() == (hub.folder("models", MODEL) / FILE).read_bytes()


RATE = Rule("", status=429, headers={"Retry-After": "100"})
BACKWARDS = Rule("safetensors|gz|parquet", "GET", content=lambda data: data[::-1])
FAULTS = {
    "private": (hub_stand_in.private("some/tiny"), "that this account can see: check the name"),
    "gated": (hub_stand_in.gated(MODEL), "may read it: accept its terms on its page, and log in"),
    "forbidden": (Rule("resolve", status=403), "which gives it only to accounts that may read it"),
    "404": (Rule("api", status=404), "has nothing of this name that this account can see"),
    "busy": (RATE, "(status 429): wait some minutes, or log in with `hf auth login` for a higher"),
    "busy file": (Rule(FILE, "GET", status=429, headers={"Retry-After": "100"}), "(status 429)"),
    "500": (Rule("", status=500), "which fails now (status 500): try again later"),
    "503 of a file": (Rule(FILE, status=503), "which fails now (status 503): try again later"),
    "dropped": (Rule("", drop=True), "broke off, or sent a damaged file: give the same command"),
    "wrong hash": (BACKWARDS, "broke off, or sent a damaged file: give the same command again"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_faults_of_a_model_are_told_apart(case, hub):
    rule, sentence = FAULTS[case]
    hub.rules = [rule]
    start = time.perf_counter()
    assert sentence in refusal(MODEL)
    assert time.perf_counter() - start < 5


def test_names_revisions_and_tokens_that_are_not_there(hub, monkeypatch):
    assert "has nothing of this name" in refusal("some/other")
    assert "has no revision 'v3' of it: name a branch, tag or commit" in refusal(MODEL, "v3")
    with monkeypatch.context() as patched:
        patched.setattr(constants, "ENDPOINT", hub.url.removeprefix("http://"))
        assert "is not what answers here: check HF_ENDPOINT, HTTPS_PROXY and" in refusal(MODEL)
    hub.token = "hf_valid"
    monkeypatch.setenv("HF_TOKEN", "hf_stale_but_secret")
    said = refusal(MODEL)
    assert "does not accept the access token: log in anew with `hf auth login`, or unset" in said
    assert "hf_stale" not in said


@pytest.mark.parametrize("what", ["", "resolve", "safetensors"])
def test_a_hub_that_never_answers_is_given_up(what, hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda _: None)
    for name in ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"):
        monkeypatch.setattr(constants, name, 0.2)
    hub.rules = [Rule(what, stall=60)]
    start = time.perf_counter()
    assert "which does not answer within 0.2 s: try again later" in refusal(MODEL)
    assert time.perf_counter() - start < 5


def test_a_full_disk_and_a_home_that_is_none_are_said_as_such(hub, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(huggingface_hub.file_download, "http_get", full)
        with pytest.raises(DiskError, match=r"is full; free some space .*HF_HOME moves the hub's"):
            models.load(MODEL, CPU, torch.float32)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    with pytest.raises(DiskError, match=r"cannot be used \(not a directory\).*HF_HOME moves"):
        models.load(MODEL, CPU, torch.float32)


def test_two_processes_at_once_have_the_same_folder(hub, tmp_path):
    code = "from dynslice.core import hub; print(hub.model('some/tiny')[0])"
    environment = {**os.environ, **hub_stand_in.environment(hub, tmp_path / "other")}
    command = [sys.executable, "-c", code]
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) for _ in range(2)]
    first, second = (Path(one.communicate()[0].decode().strip()) for one in both)
    assert first == second
    assert (first / FILE).read_bytes() == (hub.folder("models", MODEL) / FILE).read_bytes()


# The cache


@pytest.mark.parametrize("revision", [None, "v2"])
def test_a_model_that_is_whole_in_the_cache_is_the_same_offline(hub, revision, monkeypatch):
    online = models.load(MODEL, CPU, torch.float32, revision)[0]
    commit = models.commit_of(MODEL, revision)
    for switch in (True, False):  # told to be offline, and away
        offline(monkeypatch, switch)
        hub.rules = [Rule("", status=503)]
        again = models.load(MODEL, CPU, torch.float32, revision)[0]
        assert (
            models.commit_of(MODEL, revision)
            == commit
            == hub.commit("models", MODEL, revision or "main")
        )
        for ours, theirs in zip(again.parameters(), online.parameters(), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("revision", "lost"), [(None, FILE), ("v2", "model-00002-of-00006.safetensors")]
)
def test_a_model_that_is_half_in_the_cache_is_refused_offline(hub, revision, lost, monkeypatch):
    hub.rules = [Rule(lost, status=503)]
    refusal(MODEL, revision)
    hub.rules = []
    offline(monkeypatch)
    said = refusal(MODEL, revision)
    assert f"is in the hub's cache only in part ({lost} is missing)" in said
    assert "unset it and connect to the network" in said
    offline(monkeypatch, False)
    models.load(MODEL, CPU, torch.float32, revision)


def test_a_branch_that_moved_on_is_followed_when_the_hub_answers(root, tmp_path, hub, monkeypatch):
    hub.root = tmp_path / "moving"
    shutil.copytree(root / "models" / MODEL, hub.folder("models", MODEL))
    before = models.commit_of(MODEL)
    config = hub.folder("models", MODEL) / "config.json"
    config.write_text(config.read_text().replace("\n", "\n\n", 1))
    offline(monkeypatch)
    assert models.commit_of(MODEL) == before
    offline(monkeypatch, False)
    assert models.commit_of(MODEL) == hub.commit("models", MODEL) != before


@pytest.mark.parametrize("name", SIZES)
def test_a_plan_does_not_depend_on_what_is_cached(name, hub, ask, monkeypatch):
    def parameters(model):
        forget()
        status, out, _ = ask("plan", "--model", model, "--slice-percentage", 0.25, "--json")
        assert status == 0
        return json.loads(out)["parameters_dense"], json.loads(out)["parameters"]

    local = parameters(hub.folder("models", f"some/{name}"))
    assert local == SIZES[name]
    assert [parameters(f"some/{name}") for _ in range(2)] == [local, local]
    offline(monkeypatch)
    assert parameters(f"some/{name}") == local


def test_a_forecast_downloads_no_weights(hub):
    assert models.load_config(MODEL, weights=False).hidden_size == 64
    assert not models.in_cache(MODEL)
    assert not [request for request in hub.requests if "safetensors" in request]
    models.load_config(MODEL)
    assert models.in_cache(MODEL)


# What is loaded is what was named


def test_nothing_but_the_repository_is_asked(hub, root):
    bins = root / "models/some/pickled"
    shutil.copytree(root / "models" / MODEL, bins, ignore=shutil.ignore_patterns("*.safetensors"))
    (bins / "pytorch_model.bin").write_bytes(b"pickle")
    shutil.copytree(root / "models" / f"{MODEL}@v2", root / "models/some/pickled@refs%2Fpr%2F1")
    said = refusal("some/pickled")
    assert "has no safetensors, and other files of weights are not read (pytorch_model.bin)" in said
    models.load(MODEL, CPU, torch.float32)
    asked = {request.split()[1] for request in hub.requests}
    assert not [a for a in asked if "discussions" in a or "refs" in a or "convert" in a]
    ours = ("/api/models/some/", "/some/tiny/resolve/", "/some/pickled/resolve/")
    assert [a for a in asked if not a.startswith((*ours, "/api/agent-harnesses"))] == []


COMMANDS = ("lr --text sotu", "ppl --text sotu", "plan --slice-percentage 0.2")
SLICE = "slice --calibration sotu --slice-percentage 0.2 --out out"
COMMANDS += (SLICE, f"{SLICE} --stream", "quantize --bits 8 --out out")
COMMANDS += ("drop-layers --layers 1 --calibration sotu --out out",)


@pytest.mark.parametrize("command", COMMANDS)
def test_an_adapter_beside_a_model_is_refused_by_every_command(
    command, root, tmp_path, ask, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(root / "models" / MODEL, "both")
    (tmp_path / "both/adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    status, out, err = ask(*command.split(), "--model", "both")
    assert (status, out) == (2, "")
    assert "holds an adapter (adapter_config.json) and a model (config.json); merge them" in err
    assert len(err.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["both"]


def without_weights(*others):
    def make(folder):
        (folder / FILE).unlink()
        for name in others:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(b"x")

    return make


def gguf_only(folder):
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "tiny-q8_0.gguf").write_bytes(b"GGUF")
    (folder / "README.md").write_text("A model")


def replaced(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def only_adapter(folder):
    without_weights("adapter_model.safetensors")(folder)
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')


def slow_tokenizer(first):
    def make(folder):
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer.model").write_bytes(first + b"IQ== 0\n")

    return make


OTHERS = {
    "gguf": (gguf_only, r"only GGUF files \(tiny-q8_0.gguf\); give the path of one"),
    "original": (without_weights("consolidated.safetensors"), r"own format \(consolidated.safet"),
    "variant": (without_weights("model.fp16.safetensors"), r"\(model.fp16.safetensors\); save the"),
    "adapter": (only_adapter, "is a LoRA adapter of some/base; merge it with peft"),
    "pointer": (replaced(FILE, POINTER), "git-LFS pointer in place of model.safetensors; run `git"),
    "pointers": (replaced("tokenizer.json", POINTER), "git-LFS pointer in place of tokenizer.json"),
    "tokenizer": (replaced("tokenizer.json", b"{"), "has a tokenizer.json that is not JSON"),
    "generation": (replaced("generation_config.json", b"{"), "generation_config.json that is not"),
    "tiktoken": (slow_tokenizer(b""), "in tokenizer.model, .* run `pip install tiktoken`"),
    "pieces": (slow_tokenizer(b"\n"), "in tokenizer.model, .* run `pip install sentencepiece"),
}


@pytest.mark.parametrize("place", ["folder", "hub"])
@pytest.mark.parametrize("case", OTHERS)
def test_what_is_no_model_is_named_with_what_to_do(case, place, hub, root, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "_is_installed", lambda package: package == "protobuf")
    hub.root = tmp_path / "root"
    make, message = OTHERS[case]
    shutil.copytree(root / "models" / MODEL, folder := hub.folder("models", MODEL))
    make(folder)
    asked = str(folder) if place == "folder" else MODEL
    with pytest.raises(RequestError, match=message) as refused:
        models.load(asked, CPU, torch.float32)
    assert str(refused.value).count("; ") == 1
    if place == "hub" and case in ("original", "variant"):  # a forecast says it too
        with pytest.raises(RequestError, match=message):
            models.load_config(asked, weights=False)


# Where it comes from


def test_a_slice_names_commit_and_licence_and_no_place_of_this_machine(hub, ask, tmp_path):
    command = ["slice", "--model", MODEL, "--calibration", "sotu", "--slice-percentage", 0.25]
    command += ["--windows", 2, "--window", 64, "--out", tmp_path / "out", "--device", "cpu"]
    assert ask(*command)[0] == 0
    commit = hub.commit("models", MODEL)
    card = (tmp_path / "out/README.md").read_text()
    assert f"| base model | {MODEL} (revision none, commit {commit}) |" in card
    assert "license: mit" in card
    assert json.loads((tmp_path / "out/slice.json").read_text())["commit"] == commit
    for path in (tmp_path / "out").glob("*.json"):
        assert str(tmp_path) not in path.read_text()
    assert _licence(str(hub.folder("models", MODEL)), None) == _licence(MODEL, None) == "mit"


# Data sets


@pytest.mark.parametrize("name", ["wikitext2", "c4"])
def test_texts_of_the_hub_with_commit_offline_and_in_part(name, hub, monkeypatch):
    read = texts.documents(name, "test")
    assert read[0].startswith("Line ")
    repository = texts.HUB[name].repository
    commit = hub.commit("datasets", repository)
    assert texts.commit_of(name) == commit
    offline(monkeypatch)
    assert texts.documents(name, "test") == read
    assert texts.commit_of(name) == commit
    with pytest.raises(RequestError, match="is not asked while HF_HUB_OFFLINE is set; unset it"):
        texts.documents(name, "train")
    offline(monkeypatch, False)
    texts.documents(name, "train")


TEXT_FAULTS = {
    "gated": (Rule("resolve", status=403, code="GatedRepo"), "may read it; accept its terms"),
    "404": (Rule("api/datasets", status=404), "that this account can see; check the name"),
    "429": (Rule("", status=429, headers={"Retry-After": "99"}), r"\(status 429\); wait some"),
    "503": (Rule("resolve", status=503), r"fails now \(status 503\); try again later"),
    "dropped": (Rule("", drop=True), "broke off, or sent a damaged file; give the same"),
    "wrong hash": (BACKWARDS, "broke off, or sent a damaged file; give the same"),
}


@pytest.mark.parametrize("name", ["wikitext2", "c4"])
@pytest.mark.parametrize("case", TEXT_FAULTS)
def test_faults_of_a_data_set_are_told_apart(case, name, hub):
    rule, sentence = TEXT_FAULTS[case]
    hub.rules = [rule]
    start = time.perf_counter()
    with pytest.raises(RequestError, match=sentence) as refused:
        texts.documents(name, "test")
    assert str(refused.value).startswith(
        f"text {name!r} is dataset {texts.HUB[name].repository} of"
    )
    assert time.perf_counter() - start < 5
    if case == "503":
        hub.rules = [Rule("resolve", "GET", status=503, times=1)]
        assert texts.documents(name, "test")
