"""The results store: what was asked decides the file, and a broken file is no result."""

import errno
import json
from dataclasses import replace

import pytest

from dynslice.core.errors import DiskError
from dynslice.experiment.store import Request, Result, Store

CONFIG = {"model": "m", "plan": {"slice_percentage": 0.25}, "text": "sotu", "seed": 1}
RESULT = Result(
    kind="ppl",
    config=CONFIG,
    value={"perplexity": 12.5, "nll": [2.5, 2.25]},
    seconds=3.5,
    peak_memory_bytes=1024,
    provenance={"commit": "abc", "device": "here"},
)
ASKED = Request("ppl", CONFIG)


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "results")
    store.put(RESULT)
    return store


def files(store):
    return sorted(path.name for path in store.folder.iterdir())


def test_what_is_put_is_got(store):
    assert store.get(ASKED) == RESULT


def test_what_is_missing_is_none(store):
    assert store.get(Request("ppl", {**CONFIG, "seed": 2})) is None
    assert store.get(Request("lr", CONFIG)) is None


def test_put_leaves_one_readable_file(store):
    store.put(replace(RESULT, seconds=9.0))
    assert files(store) == [f"{ASKED.key}.json"]
    assert store.get(ASKED).seconds == 9.0


def test_key_ignores_where_when_and_what_came_out():
    for change in (
        {"seconds": 1.0},
        {"peak_memory_bytes": 5},
        {"provenance": {"commit": "other"}},
        {"value": {}},
    ):
        assert replace(RESULT, **change).request.key == ASKED.key


@pytest.mark.parametrize(
    "change",
    [{"seed": 2}, {"plan": {"slice_percentage": 0.3}}, {"text": "wikipedia"}, {"limit": None}],
)
def test_key_depends_on_everything_asked(change):
    assert Request("ppl", {**CONFIG, **change}).key != ASKED.key


def test_key_depends_on_the_kind_and_not_on_the_order():
    assert Request("lr", CONFIG).key != ASKED.key
    assert Request("ppl", dict(reversed(CONFIG.items()))).key == ASKED.key


def test_key_depends_on_the_method_version(monkeypatch):
    before = ASKED.key
    monkeypatch.setattr("dynslice.experiment.store.METHOD_VERSION", -1)
    assert ASKED.key != before


def altered(text):
    values = json.loads(text)
    return json.dumps({**values, "config": {**values["config"], "seed": 2}})


def of_another_request(text):
    values = json.loads(altered(text))
    del values["checksum"]  # as of a version that wrote none
    return json.dumps(values)


def without_value(text):
    wanted = ("value", "checksum")
    return json.dumps({k: v for k, v in json.loads(text).items() if k not in wanted})


DAMAGE = {
    "truncated": (lambda text: text[: len(text) // 2], "is broken"),
    "emptied": (lambda _: "", "is broken"),
    "a list": (lambda text: f"[{text}]", "is broken"),
    "altered": (altered, "its checksum does not match"),
    "one digit altered": (lambda text: text.replace("12.5", "12.6", 1), "its checksum"),
    "answers another request": (of_another_request, "it answers another request"),
    "lacks its value": (without_value, "value"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_broken_file_is_reported_and_set_aside(name, store, capsys):
    damage, message = DAMAGE[name]
    path = store.folder / f"{ASKED.key}.json"
    broken = damage(path.read_text())
    path.write_text(broken)
    assert store.get(ASKED) is None
    said = capsys.readouterr()
    assert said.out == ""
    assert path.name in said.err
    assert message in said.err
    assert files(store) == [f"{ASKED.key}.broken"]
    assert (store.folder / f"{ASKED.key}.broken").read_text() == broken
    store.put(RESULT)
    assert store.get(ASKED) == RESULT


def test_failed_write_leaves_the_old_result_and_no_temporary_file(store, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(DiskError, match="is full; free some"):
        patch.setattr("dynslice.core.files.os.replace", full)
        store.put(replace(RESULT, seconds=9.0))
    assert store.get(ASKED) == RESULT
    assert files(store) == [f"{ASKED.key}.json"]
