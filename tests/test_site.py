"""The report to read in a browser: complete, whole without a network, readable at any width."""

import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser

import pytest

from dynslice.cli import reproduce, site
from dynslice.core import paths
from dynslice.experiment.across import Across
from dynslice.experiment.study import Study

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
# What a page itself tells of its width and pictures, to the page that frames it.
ASK = """<script>addEventListener("load", () => parent.postMessage(JSON.stringify({
width: document.documentElement.scrollWidth, shown: innerWidth,
broken: [...document.images].filter(i => !i.naturalWidth).map(i => i.src.slice(0, 80)) }), "*"))
</script>"""
FRAME = """<!DOCTYPE html><title></title><script>
addEventListener("message", event => {{ document.title = event.data }})</script>
<iframe src="asked.html" width="{width}" height="900" style="border: 0"></iframe>"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The report of the record of `quick`, from its committed notebooks and figures."""
    folder = tmp_path_factory.mktemp("site")
    for part in ("notebooks/rendered/quick", "figures/quick"):
        shutil.copytree(paths.ROOT / part, folder / part)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "OUTPUT", folder)
        across = Across.open("quick", from_record=True)
        needs = {n: needed(across.studies[0]) for n, needed in reproduce.NEEDS.items()}
        index = site.write_site(across, needs)
    return sorted(index.parent.glob("*.html"))


class Links(HTMLParser):
    """What a page links to and shows."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found += [value for name, value in attributes if name in ("href", "src")]


def test_there_is_a_page_for_each_notebook_and_an_index_of_them(pages):
    rendered = paths.ROOT / "notebooks/rendered/quick"
    notebooks = sorted(path.stem for path in rendered.glob("*.ipynb"))
    assert [page.stem for page in pages] == [*notebooks, "index"]
    index = pages[-1].read_text()
    assert all(f'href="{name}.html"' in index for name in notebooks)
    commands = re.findall(r"<code>(./run_all.sh --profile quick --only \d\d)</code>", index)
    assert len(commands) >= 8  # a figure each
    assert "data/record/quick" in index


def test_no_link_is_broken_and_nothing_comes_from_a_network(pages):
    for page in pages:
        for target in Links(page.read_text()).found:
            if target.startswith(("#", "data:", "https://arxiv.org", "https://")):
                continue
            assert (page.parent / target.partition("#")[0]).is_file(), (page.name, target)
        text = page.read_text()
        assert not re.search(r'<(script|link|img|iframe)[^>]*(src|href)="https?:', text), page.name


def test_a_page_measures_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "OUTPUT", tmp_path)
    monkeypatch.setattr(Study, "ensure", lambda *_: pytest.fail("work began"))
    across = Across.open("smoke", device="cpu")
    index = site.write_site(across, {})
    assert "A part of this profile is measured" in index.read_text()


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")
@pytest.mark.parametrize("width", [1100, 400])
def test_pages_are_whole_and_readable_in_a_browser(pages, width, tmp_path):
    """In a frame, since a browser's own window has a least width."""
    for page in pages:
        asked, frame = page.with_name("asked.html"), page.with_name("frame.html")
        asked.write_text(page.read_text().replace("</body>", ASK + "</body>"))
        frame.write_text(FRAME.format(width=width))
        told = in_browser(frame, tmp_path)
        asked.unlink()
        frame.unlink()
        assert "CONSOLE" not in told.stderr, told.stderr
        [answer] = re.findall(r"<title>(.*?)</title>", told.stdout)
        found = json.loads(unescape(answer))
        assert found["broken"] == [], page.name
        assert found["width"] <= found["shown"] == width, page.name


def test_a_page_that_is_too_wide_or_lacks_a_picture_is_noticed(pages, tmp_path):
    if CHROMIUM is None:
        pytest.skip("no chromium: apt-get install chromium")
    asked, frame = tmp_path / "asked.html", tmp_path / "frame.html"
    bad = '<div style="width: 900px">wide</div><img src="none.png">'
    asked.write_text(f"<html><body>{bad}{ASK}</body></html>")
    frame.write_text(FRAME.format(width=400))
    [answer] = re.findall(r"<title>(.*?)</title>", in_browser(frame, tmp_path).stdout)
    found = json.loads(unescape(answer))
    assert found["width"] > 400
    assert len(found["broken"]) == 1


def in_browser(page, folder):
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={folder / 'user'}", "--enable-logging=stderr"]
    command += ["--hide-scrollbars", "--window-size=1300,900"]
    return subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120)
