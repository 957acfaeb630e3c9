"""Corpora of the hub and directories: what is read, in which order, and what is refused."""

import gzip
import json
import socket
import time
from pathlib import Path

import huggingface_hub
import pytest
from datasets import Dataset
from huggingface_hub import constants, errors

from dynslice.core import hub
from dynslice.core.errors import RequestError
from dynslice.experiment.study import Study
from dynslice.inputs import corpora, texts
from dynslice.inputs.corpora import HUB
from dynslice.inputs.data_files import SPLITS
from dynslice.inputs.windows import token_stream

TEXTS = ["One day.", "Two days later,\nit rained.", "The end."]


@pytest.fixture(autouse=True)
def nothing_remembered():
    corpora.documents.cache_clear()
    yield
    corpora.documents.cache_clear()


@pytest.fixture(params=["told to be offline", "no such host"])
def offline(request, tmp_path, monkeypatch):
    """No network, and an empty cache of the hub; what is said of it."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    if request.param == "told to be offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        return "is not asked while HF_HUB_OFFLINE is set; unset it and connect to the network"

    def unknown(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    return "could not be reached; connect to the network"


@pytest.fixture
def served(monkeypatch):
    """Serve rows in place of every hub file; the calls and how many rows were read."""
    calls, read = [], []

    def serve(column, texts):
        def rows(name, split, revision):
            calls.append((name, split, revision))
            for row in Dataset.from_dict({column: texts, "other": [0] * len(texts)}):
                read.append(row[column])
                yield row

        monkeypatch.setattr(corpora, "_rows", rows)
        return calls, read

    return serve


# The table


@pytest.mark.parametrize("name", HUB)
def test_rows_of_the_table_are_complete(name):
    corpus = HUB[name]
    assert corpus.repository.count("/") == 1
    assert corpus.column
    assert tuple(corpus.parts) == SPLITS
    for part in corpus.parts.values():
        assert part.files.endswith((".parquet", ".json.gz"))
        assert set(part.folds) <= set(range(part.of))


@pytest.mark.parametrize("name", HUB)
def test_no_two_splits_share_a_document_by_the_table(name):
    taken = [
        (part.files, fold, part.of) for part in HUB[name].parts.values() for fold in part.folds
    ]
    assert len(set(taken)) == len(taken)
    for files in {part.files for part in HUB[name].parts.values()}:
        assert len({of for where, _, of in taken if where == files}) == 1


@pytest.mark.parametrize("name", ["wikitext2", "ptb"])
def test_lines_are_joined_to_one_document(name, served):
    lines = ["", " = Title = \n", "", " A line . \n", "A line", "A line"]
    served(HUB[name].column, lines)
    assert texts.documents(name, "test") == ["\n\n".join(lines)]


@pytest.mark.parametrize("name", ["c4", "alpaca"])
def test_splits_of_the_same_rows_are_disjoint(name, served):
    rows = [f"document {i % 90}" for i in range(100)]  # ten of them twice
    served("text", [*rows, " "])
    parts = {split: texts.documents(name, split) for split in SPLITS}
    if name == "c4":  # the training rows are another file
        del parts["train"]
    every = [text for part in parts.values() for text in part]
    assert sorted(every) == sorted(set(rows))
    assert all(parts.values())


def test_reading_stops_at_the_cap(served):
    _, read = served("text", [f"document {i}" for i in range(20_000)])
    assert len(texts.documents("c4", "validation")) == 2048
    assert len(read) <= 2 * 2048
    assert texts.documents("c4", "test")[-1] == "document 4095"
    read.clear()
    assert len(texts.documents("pg19", "train")) == len(read) == 64


def test_capped_c4_holds_the_published_windows():
    # About 480 tokens a document; a third of that would do.
    assert all(part.cap * 160 > 128 * 2048 for part in HUB["c4"].parts.values())


def test_column_that_is_not_there_is_refused(served):
    served("content", TEXTS)
    with pytest.raises(
        RequestError, match=r"'c4' has no column 'text' of strings \(columns: content, other\)"
    ):
        texts.documents("c4", "train")


# The hub


@pytest.mark.parametrize("name", HUB)
def test_unreachable_hub_is_one_sentence(name, offline):
    texts.check(name, "test")
    start = time.perf_counter()
    with pytest.raises(RequestError) as refusal:
        texts.documents(name, "test")
    assert time.perf_counter() - start < 3
    assert str(refusal.value) == (
        f"text '{name}' is dataset {HUB[name].repository} of the Hugging Face hub, which {offline}"
        ", or give a local file or directory in its place"
    )
    assert texts.commit_of(name) is None


@pytest.mark.parametrize("name", HUB)
def test_split_and_revision_reach_the_hub(name, tmp_path, monkeypatch):
    asked = []

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: None)

    def refuse(repository, files=None, allow_patterns=None, **where):
        asked.append((repository, files or allow_patterns[0], where["revision"]))
        raise ConnectionError

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    for revision in (None, "abc"):
        with pytest.raises(RequestError, match="could not be reached"):
            token_stream(name, "validation", None, revision=revision)
    files = HUB[name].parts["validation"].files
    default = "refs/convert/parquet" if name == "ptb" else None
    repository = HUB[name].repository
    assert asked == [(repository, files, default), (repository, files, "abc")]


class Response:
    headers = {}
    request = None

    def __init__(self, status):
        self.status_code = status


def http(kind, status):
    return kind("https://hub/x?token=hf_secret", response=Response(status))


REFUSALS = {
    "gated": (http(errors.GatedRepoError, 403), "may read it; accept its terms .*`hf auth login`"),
    "unauthorised": (http(errors.RepositoryNotFoundError, 401), "this account can see; check the"),
    "no revision": (http(errors.RevisionNotFoundError, 404), "no revision 'v9' of it; name a"),
    "no file": (http(errors.RemoteEntryNotFoundError, 404), "has no files .* at revision 'v9'"),
    "broken": (http(errors.HfHubHTTPError, 503), r"fails now \(status 503\); try again later"),
    "cut off": (OSError("https://hub/x?token=hf_secret"), "could not be reached"),
}


@pytest.mark.parametrize("name", ["wikitext2", "c4"])
@pytest.mark.parametrize("case", REFUSALS)
def test_refusal_of_the_hub_is_one_sentence_without_secrets(name, case, monkeypatch):
    error, message = REFUSALS[case]

    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.setattr(hub, "PAUSES", (0, 0))
    with pytest.raises(RequestError, match=message) as refusal:
        texts.documents(name, "train", "v9")
    assert HUB[name].repository in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert "secret" not in str(refusal.value)


def cached_file(tmp_path, monkeypatch, name, split, revision="main", commit="c" * 40):
    """Put a file of the hub where its cache keeps it."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / f"datasets--{HUB[name].repository.replace('/', '--')}"
    path = folder / "snapshots" / commit / HUB[name].parts[split].files.replace("*", "0000")
    path.parent.mkdir(parents=True)
    (folder / "refs" / revision).parent.mkdir(parents=True, exist_ok=True)
    (folder / "refs" / revision).write_text(commit)
    return path


def test_cached_shard_needs_no_network(tmp_path, monkeypatch):
    path = cached_file(tmp_path, monkeypatch, "c4", "train")
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text, "url": "x"}) + "\n" for text in TEXTS)
    assert texts.documents("c4", "train") == TEXTS
    assert texts.commit_of("c4") == "c" * 40
    assert texts.commit_of("c4", "c" * 40) == "c" * 40
    with pytest.raises(RequestError, match="is not asked while HF_HUB_OFFLINE is set"):
        texts.documents("c4", "train", "other")
    assert texts.commit_of("c4", "other") is None


def test_cached_conversion_needs_no_network(tmp_path, monkeypatch):
    path = cached_file(tmp_path, monkeypatch, "ptb", "test", HUB["ptb"].revision)
    Dataset.from_dict({"sentence": TEXTS}).to_parquet(path)
    assert texts.documents("ptb", "test") == ["\n\n".join(TEXTS)]
    assert texts.commit_of("ptb") == "c" * 40


@pytest.mark.parametrize("name", ["sotu", "text.txt"])
def test_only_hub_corpora_have_revisions(name):
    with pytest.raises(RequestError, match=f"'{name}' has no revisions.*leave revision 'v1' out"):
        texts.check(name, None, "v1")


# Directories


def write(path: Path, texts, column="text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"id": i, column: text} for i, text in enumerate(texts)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".txt":
        path.write_text("\n".join(texts), encoding="utf-8")
    elif path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_text(lines if path.suffix == ".jsonl" else json.dumps(rows), encoding="utf-8")


@pytest.mark.parametrize("column", ["text", "sentence"])
@pytest.mark.parametrize("ending", [".jsonl", ".json", ".json.gz", ".jsonl.gz", ".parquet"])
def test_directory_of_rows(ending, column, tmp_path):
    write(tmp_path / f"train{ending}", [*TEXTS, " "], column)
    write(tmp_path / f"test{ending}", ["Another."], column)
    assert texts.documents(str(tmp_path), "train") == TEXTS
    assert texts.documents(str(tmp_path), "test") == ["Another."]


def test_directory_of_texts(tmp_path):
    write(tmp_path / "validation.txt", TEXTS)
    (tmp_path / "notes.txt").write_text("not a split")
    assert texts.has_splits(str(tmp_path))
    assert texts.default_split(str(tmp_path), None) == "validation"
    assert texts.documents(str(tmp_path), None) == ["\n".join(TEXTS)]


def test_snapshot_of_the_hub_is_a_directory(tmp_path):
    for i, text in enumerate(TEXTS):
        write(tmp_path / "data" / f"train-0000{i}-of-00003-a09b74b3ef9c3b56.parquet", [text])
    (tmp_path / "README.md").write_text("about")
    assert texts.documents(str(tmp_path), "train") == TEXTS


def test_shards_follow_each_other_by_name(tmp_path):
    for i in (2, 0, 1):
        write(tmp_path / f"test-0000{i}-of-00003.txt", [TEXTS[i]])
    assert texts.documents(str(tmp_path), "test") == TEXTS


def test_split_without_files_is_refused(tmp_path):
    write(tmp_path / "train.txt", TEXTS)
    for split in ("test", None):
        with pytest.raises(
            RequestError, match=f"without split '{split or 'validation'}' .it has train.; add"
        ):
            texts.check(str(tmp_path), split)
    with pytest.raises(RequestError, match="split 'dev' is unknown"):
        texts.check(str(tmp_path), "dev")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RequestError, match=r"without split 'train' \(it has none\)"):
        texts.documents(str(tmp_path / "empty"), "train")


def test_two_formats_of_a_split_are_refused(tmp_path):
    write(tmp_path / "train.txt", TEXTS)
    write(tmp_path / "train.parquet", TEXTS)
    with pytest.raises(RequestError, match=r"several formats \(parquet, txt\); leave one"):
        texts.check(str(tmp_path), "train")


def test_unclear_column_is_refused(tmp_path):
    rows = [{"title": "a", "body": "b"}]
    (tmp_path / "test.jsonl").write_text(json.dumps(rows[0]))
    with pytest.raises(RequestError, match=r"no column 'text'.* \(columns: title, body\); name"):
        texts.documents(str(tmp_path), "test")


BROKEN = {"test.parquet": b"PAR1", "test.json": b"{", "test.json.gz": b"no gzip"}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file_is_refused(name, tmp_path):
    (tmp_path / name).write_bytes(BROKEN[name])
    with pytest.raises(RequestError, match=f"{name} in .* cannot be read as (json|parquet)"):
        texts.documents(str(tmp_path), "test")


@pytest.mark.parametrize("name", ["test.jsonl", "test.txt"])
def test_empty_file_is_refused(name, tmp_path):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(RequestError, match=r"is empty|cannot be read"):
        texts.documents(str(tmp_path), "test")


def test_requests_are_keyed_by_what_a_directory_holds(tmp_path):
    write(tmp_path / "train.txt", TEXTS)
    write(tmp_path / "test.txt", TEXTS[:1])
    text_of = Study.open("smoke").design.text
    train, test = (text_of(str(tmp_path), split) for split in ("train", "test"))
    assert train["split"] == "train"
    assert train["text_sha256"] != test["text_sha256"]
    write(tmp_path / "train.txt", TEXTS[:2])
    assert text_of(str(tmp_path), "test") == test
    assert text_of(str(tmp_path), "train") != train
    assert "text_sha256" not in text_of("c4", "train")
