"""The real clients of the hub against the stand-in."""

import time
from pathlib import Path

import datasets
import hub_stand_in
import huggingface_hub
import pytest
import torch
from hub_stand_in import Rule
from huggingface_hub import HfApi, errors, hf_hub_download, snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer

MODEL = "rehearsal/tiny"
FILE = "model.safetensors"


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    """A model whole and, on another branch, another one in shards; a data set."""
    root = tmp_path_factory.mktemp("hub")
    hub_stand_in.write_model(root / "models" / MODEL)
    hub_stand_in.write_model(root / "models" / f"{MODEL}@v2", "tiny-llama-3", "200KB")
    hub_stand_in.write_rows(root / "datasets/some/set/data/train-0.parquet", "text", ["a", "b"])
    hub_stand_in.write_rows(root / "datasets/some/set/en/train.json.gz", "text", ["c"])
    return root


@pytest.fixture
def hub(repositories, tmp_path):
    """The stand-in, to which this process is connected with an empty cache."""
    with hub_stand_in.serving(repositories) as hub, hub_stand_in.connected(hub, tmp_path):
        yield hub


def test_models_whole_and_sharded_at_two_revisions(hub):
    at = {}
    for revision in ("main", "v2"):
        model = AutoModelForCausalLM.from_pretrained(MODEL, revision=revision)
        assert len(AutoTokenizer.from_pretrained(MODEL, revision=revision)) == 257
        at[revision] = HfApi().model_info(MODEL, revision=revision).sha
        assert at[revision] == hub.commit("models", MODEL, revision)
        assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()
    folder = Path(snapshot_download(MODEL, revision=at["v2"], allow_patterns="*.safetensors"))
    assert folder.name == at["v2"] != at["main"]
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert HfApi().model_info(MODEL, expand=["cardData"]).card_data["license"] == "mit"
    assert HfApi().auth_check(MODEL) is None


def test_data_sets_by_pattern_and_by_name(hub):
    folder = Path(snapshot_download("some/set", repo_type="dataset", allow_patterns="data/*"))
    assert [path.name for path in folder.rglob("*.*")] == ["train-0.parquet"]
    path = hf_hub_download("some/set", "en/train.json.gz", repo_type="dataset")
    rows = datasets.load_dataset("json", data_files=[path], split="train", streaming=True)
    assert list(rows) == [{"text": "c"}]
    by_name = datasets.load_dataset("some/set", data_dir="data", split="train", streaming=True)
    assert list(by_name) == [{"text": "a"}, {"text": "b"}]


def test_head_that_moved_and_the_commit_before_it(hub, tmp_path_factory):
    root = tmp_path_factory.mktemp("moving")
    (card := root / "models/a/b/README.md").parent.mkdir(parents=True)
    hub.root = root
    card.write_text("one")
    before = HfApi().model_info("a/b").sha
    card.write_text("two, longer")
    assert HfApi().model_info("a/b").sha == hub.commit("models", "a/b") != before
    assert Path(hf_hub_download("a/b", "README.md", revision=before)).read_text() == "one"


def test_cut_connection_is_resumed_and_redirects_are_followed(hub):
    whole = hub.folder("models", MODEL) / FILE
    hub.rules += [Rule(FILE, "GET", cut=1000, times=1), Rule(FILE, cdn=True)]
    path = hf_hub_download(MODEL, FILE)
    assert Path(path).read_bytes() == whole.read_bytes()
    assert [r for r in hub.requests if r.startswith("GET /cdn/")]
    assert hub.rules[0].times == 0


def test_wrong_content_under_the_right_etag(hub):
    hub.rules = [Rule(FILE, content=lambda data: data[::-1])]
    path = Path(hf_hub_download(MODEL, FILE))
    assert path.read_bytes() == (hub.folder("models", MODEL) / FILE).read_bytes()[::-1]
    assert path.resolve().name == hub_stand_in.etag(FILE, path.read_bytes()[::-1])


@pytest.mark.parametrize(
    ("rule", "error"),
    [
        (hub_stand_in.gated(MODEL, "hf_granted"), errors.GatedRepoError),
        (hub_stand_in.private(MODEL, "hf_granted"), errors.RepositoryNotFoundError),
        (Rule("auth-check", status=404), errors.HfHubHTTPError),
        (Rule("", status=429, headers={"Retry-After": "1"}), errors.HfHubHTTPError),
        (Rule("", status=503), errors.HfHubHTTPError),
        (Rule("", drop=True), Exception),
    ],
)
def test_refusals_and_whom_they_spare(hub, rule, error):
    hub.rules = [rule]
    for token in (None, "hf_other"):
        with pytest.raises(error) as refusal:
            HfApi(token=token).auth_check(MODEL)
    if rule.code == "GatedRepo":
        assert refusal.value.response.status_code == 403
    if rule.status == 429:
        assert refusal.value.response.headers["Retry-After"] == "1"
    if rule.token:
        assert HfApi(token=rule.token).auth_check(MODEL) is None
    rule.times = 0
    assert HfApi().auth_check(MODEL) is None


def test_names_revisions_files_and_tokens_that_are_not_there(hub):
    for name, revision, kind in (
        ("no/body", None, errors.RepositoryNotFoundError),
        (MODEL, "v3", errors.RevisionNotFoundError),
        (MODEL, "0" * 40, errors.RevisionNotFoundError),
        (MODEL, "v2", errors.EntryNotFoundError),
    ):
        with pytest.raises(kind):
            hf_hub_download(name, FILE, revision=revision)
    hub.token = "hf_valid"
    with pytest.raises(errors.HfHubHTTPError, match="Invalid credentials") as refusal:
        HfApi(token="hf_stale").model_info(MODEL)
    assert refusal.value.response.status_code == 401
    assert HfApi(token="hf_valid").model_info(MODEL).id == MODEL


def test_pull_request_of_the_bot(hub, tmp_path_factory):
    root = tmp_path_factory.mktemp("converted")
    hub.root = root
    hub_stand_in.write_model(hub.folder("models", "a/b"))
    hub_stand_in.write_model(hub.folder("models", "a/b", "refs/pr/1"), "tiny-mistral")
    [found] = huggingface_hub.get_repo_discussions("a/b")
    commits = [c.commit_id for c in HfApi().list_repo_commits("a/b", revision=found.git_reference)]
    assert (found.author, found.is_pull_request) == ("SFconvertbot", True)
    assert commits == [hub.commit("models", "a/b", "refs/pr/1"), hub.commit("models", "a/b")]
    assert Path(hf_hub_download("a/b", FILE, revision="refs/pr/1")).parent.name == commits[0]


def test_it_ends_by_itself(repositories, tmp_path):
    with (
        hub_stand_in.serving(repositories, seconds=0.3) as hub,
        hub_stand_in.connected(hub, tmp_path),
    ):
        hub.rules = [Rule("", stall=30)]
        start = time.perf_counter()
        with pytest.raises(Exception, match=r"disconnected|refused|reset"):
            HfApi().auth_check(MODEL)
        assert time.perf_counter() - start < 5
