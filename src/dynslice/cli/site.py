"""A static report of a profile: an index and a page per notebook, read without a network."""

import json
import logging
import re
import shutil
from html import escape
from pathlib import Path

from dynslice.core import files, paths
from dynslice.core.paths import shown_path
from dynslice.experiment.across import Across
from dynslice.experiment.store import Request
from dynslice.report import answer, pages, style

# Code stands folded above what it shows.
_TEMPLATE = """
{%- extends 'basic/index.html.j2' -%}
{%- block input -%}
<details><summary>code</summary>{{ super() }}</details>
{%- endblock input -%}
"""
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; }}
body {{ color: #222; background: #fff; overflow-wrap: anywhere; }}
img {{ max-width: 100%; height: auto; }}
table {{ border-collapse: collapse; display: block; overflow-x: auto; font-size: 0.85rem; }}
th, td {{ padding: 0.2rem 0.6rem; border-bottom: 1px solid #ddd; text-align: left; }}
th, td {{ overflow-wrap: normal; }}
pre {{ white-space: pre-wrap; font-size: 0.8rem; background: #f6f6f6; padding: 0.5rem; }}
.anchor-link {{ display: none; }}
details {{ color: #666; font-size: 0.85rem; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def write_site(across: Across, needs: dict[str, list[Request]]) -> Path:
    """Write report/<profile>/ from the rendered notebooks and figures; the path of its index.

    needs: the measurements of each notebook by its number, as the index tells them.
    """
    folder = paths.report(across.name)
    studies = [s for s in across.studies if f"{s.name}/".startswith(f"{across.name}/")]
    names = list(dict.fromkeys([across.name, *(study.name for study in studies)]))
    with files.appearing(folder) as made:
        linked = [row for name in names for row in _pages(name, across.name, made)]
        text = _index(across, studies, linked, needs)
        body = _with_local_links(_as_html(text), across.name, made)
        title = f"dynslice, profile {across.name}"
        (made / "index.html").write_text(_PAGE.format(title=title, body=body), encoding="utf-8")
    return folder / "index.html"


def _pages(name: str, profile: str, made: Path) -> list[dict]:
    """A page for each rendered notebook of a profile, or of one of its models."""
    found, model = [], name.removeprefix(profile).strip("/")
    for path in sorted(paths.rendered(name).glob("[0-9][0-9]_*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        page = f"{model}-{path.stem}.html" if model else f"{path.stem}.html"
        sources = ["".join(cell["source"]) for cell in notebook["cells"]]
        title = next(line for line in "".join(sources[0]).splitlines() if line.startswith("# "))
        back = '<p><a href="index.html">All of this profile</a></p>'
        body = _with_local_links(back + _notebook_as_html(path), profile, made)
        text = _PAGE.format(title=escape(title[2:]), body=body)
        (made / page).write_text(text, encoding="utf-8")
        figures = [figure for source in sources for figure in style.SAVED.findall(source)]
        found.append(
            {"page": page, "title": title[2:], "model": model, "stem": path.stem}
            | {"figures": figures, "folder": name}
        )
    return found


def _notebook_as_html(path: Path) -> str:
    from nbconvert import HTMLExporter

    logging.getLogger("traitlets").setLevel(logging.ERROR)  # it advises on texts for images
    hidden = {"remove_input_tags": ("parameters", "injected-parameters"), "enabled": True}
    prompts = {"exclude_input_prompt": True, "exclude_output_prompt": True}
    exporter = HTMLExporter(
        raw_template=_TEMPLATE, config={"TagRemovePreprocessor": hidden, "HTMLExporter": prompts}
    )
    return exporter.from_filename(str(path))[0]


def _as_html(text: str) -> str:
    from nbconvert.filters import markdown2html

    return markdown2html(text)


def _index(across: Across, studies: list, linked: list[dict], needs: dict) -> str:
    """The first page (Markdown): the answer, the notebooks, and where each figure comes from."""
    told = [f"# {studies[0].profile.description}"]
    if any(study.missing(study.requests()) for study in across.studies):
        told.append(style.say("site_partly"))  # nothing is measured for a page
    elif answer.applies(across):
        told.append(answer.answer(across))
    else:
        told += [pages.claims_block(study) for study in studies]
    rows = [f"- [{row['title']}]({row['page']}) {row['model']}".rstrip() for row in linked]
    told += ["## Notebooks", "\n".join(rows), "## Where each figure comes from"]
    folder = studies[0].store.folder
    kept = shown_path(folder.parent if len(studies) > 1 else folder)
    commits = " ".join(dict.fromkeys(style.device_line(study) for study in studies))
    told.append(style.say("site_provenance", kept=kept, commits=commits))
    table = ["| figure | notebook | command | measurements |", "|:--|:--|:--|--:|"]
    for row in linked:
        number = row["stem"][:2]
        command = f"{studies[0].profile.command} --only {number}"
        for figure in row["figures"]:
            png = f"figures/{row['folder']}/{figure}.png"
            if (paths.figures(row["folder"]) / f"{figure}.png").is_file():
                cells = (f"[{figure}]({png})", f"[{row['stem']}]({row['page']})", f"`{command}`")
                table.append(f"| {' | '.join(cells)} | {len(needs[number])} |")
    return "\n\n".join([*told, "\n".join(table)])


def _with_local_links(body: str, profile: str, made: Path) -> str:
    """The text with links that work where it lies: pictures copied, notebooks as pages.

    What is elsewhere in the checkout is named, not linked.
    """

    def local(match: re.Match) -> str:
        attribute, target = match["attribute"], match["target"]
        if target.startswith(("http", "#", "data:", "mailto:")) or "/" not in target:
            return match[0]
        path = paths.OUTPUT / re.sub(r"^(\.\./)+", "", target)
        if path.suffix == ".png" and path.is_file():
            copied = made / f"{path.parent.name}-{path.name}"
            shutil.copy(path, copied)
            return f'{attribute}="{copied.name}"'
        if path.suffix == ".ipynb" and path.parent == paths.rendered(profile):
            return f'{attribute}="{path.stem}.html"'
        return f'title="{escape(target)}"'

    return re.sub(r'(?P<attribute>src|href)="(?P<target>[^"]*)"', local, body)
