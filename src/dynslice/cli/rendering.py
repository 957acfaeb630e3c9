"""Notebooks executed by papermill: complete, without traces of this machine or empty sections."""

import json
import logging
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from matplotlib import get_data_path

from dynslice.core import files, interrupt, paths
from dynslice.core.errors import RunError
from dynslice.experiment.study import Study
from dynslice.report.style import NONE, SAVED


def render(
    notebooks: dict[str, Path],
    rendered: Path,
    profile: str,
    study: Study,
    overrides: dict[str, Any],
) -> None:
    """Execute notebooks with the overrides of a run; a study says from where and on what device."""
    # A notebook's own None keeps the profile's value, and its texts are read as YAML.
    chosen = {key: "null" if value is None else value for key, value in overrides.items()}
    where = {"from_record": study.from_record, "device": study.device}
    waiting = "another run renders the notebooks; waiting for it"
    with files.claim(rendered / ".rendering", partial(print, waiting, file=sys.stderr)):
        for position, path in enumerate(notebooks.values(), start=1):
            print(f"notebook {position} of {len(notebooks)}: {path.stem}", file=sys.stderr)
            execute(path, rendered / path.name, {"profile": profile, **where, **chosen})


@contextmanager
def own_kernels() -> Iterator[None]:
    """Kernels that start in this context are this interpreter, without the settings of a user."""
    before, launch = dict(os.environ), [sys.executable, "-m", "ipykernel_launcher", "--ignore-cwd"]
    spec = {"argv": [*launch, "-f", "{connection_file}"], "display_name": "Python 3"}
    with TemporaryDirectory() as folder:
        files.write(Path(folder, "kernels/python3/kernel.json"), json.dumps(spec))
        own = dict.fromkeys(("MPLBACKEND", "PYTHONSTARTUP", "PYTHONWARNINGS"), "")
        own |= dict.fromkeys(("IPYTHONDIR", "JUPYTER_PATH", "JUPYTER_RUNTIME_DIR"), folder)
        own |= {"MATPLOTLIBRC": get_data_path(), "PYTHONPATH": os.pathsep.join(sys.path)}
        os.environ.update(own)
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)


def execute(source: Path, target: Path, parameters: dict[str, Any]) -> None:
    """Run a notebook by papermill; `target` appears when it is complete.

    Raises RunError where a cell fails, the kernel dies, or a figure that was saved is not shown.
    """
    import papermill

    # It warns of parameters that a notebook's cell does not list; the study checks them all.
    logging.getLogger("papermill").setLevel(logging.ERROR)
    before = _figures(target.parent)
    with own_kernels(), files.scratch(target.parent) as scratch, ThreadPoolExecutor(1) as thread:
        unfinished = scratch / target.name
        running = thread.submit(  # in a thread no signals reach it, which it would take for itself
            papermill.execute_notebook,
            str(source),
            str(unfinished),
            parameters,
            cwd=os.getcwd(),  # relative paths of models and texts mean what they mean here
            kernel_name="python3",
            progress_bar=sys.stderr.isatty(),
            extra_arguments=["--log-level=50"],  # no advice, and no word of an interrupt at its end
        )
        try:
            running.result()
        except KeyboardInterrupt:
            interrupt.kill_children()
            raise
        except papermill.PapermillExecutionError as error:
            raise RunError(
                f"notebook {source.name} failed: {error.ename}: {error.evalue}; open it in "
                "Jupyter to see the cell"
            ) from error
        except RuntimeError as error:  # of a kernel that does not start, or dies
            raise RunError(
                f"the kernel of notebook {source.name} died; is there memory enough? The same "
                "command again goes on from there"
            ) from error
        executed = json.loads(unfinished.read_text(encoding="utf-8"))
        check_shown(executed, {name for name, _ in _figures(target.parent) - before}, source.name)
        content = tidied(executed)
        unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(unfinished, target)


def _figures(rendered: Path) -> set[tuple[str, int]]:
    """The figures of the profile whose notebooks are in a folder, with the times of their files."""
    folder = paths.figures(str(rendered.relative_to(paths.rendered(""))))
    return {(path.stem, path.stat().st_mtime_ns) for path in folder.glob("*.png")}


def check_shown(notebook: dict, saved: set[str], name: str) -> None:
    """Raise RunError where a cell of an executed notebook shows fewer figures than it saved."""
    for cell in notebook["cells"]:
        figures = saved.intersection(SAVED.findall("".join(cell["source"])))
        if len(figures) > sum("image/png" in x.get("data", {}) for x in cell.get("outputs", [])):
            raise RunError(
                f"notebook {name} does not show figure {min(figures)!r}; use the matplotlib "
                "backend inline in it"
            )


def tidied(notebook: dict) -> dict:
    """An executed notebook without what is of one run or machine, and without empty sections."""
    for cell in notebook["cells"]:
        if "injected-parameters" in cell["metadata"].get("tags", []):
            cell["id"] = "injected-parameters"  # papermill draws one
    for part in (notebook, *notebook["cells"]):
        part["metadata"].pop("papermill", None)
        part["metadata"].pop("execution", None)
    return {**notebook, "cells": with_something_to_say(notebook["cells"])}


def with_something_to_say(cells: list[dict]) -> list[dict]:
    """The cells without sections in which no code shows anything, and without what says NONE.

    A section starts at a heading of the second level. What stands before the first one is kept, and
    the last cell, which says what was measured where.
    """
    for cell in cells:
        if "outputs" in cell:
            cell["outputs"] = [output for output in cell["outputs"] if not _says_none(output)]
    *cells, last = cells
    sections: list[list[dict]] = [[]]
    for cell in cells:
        if cell["cell_type"] == "markdown" and "".join(cell["source"]).startswith("## "):
            sections.append([])
        sections[-1].append(cell)
    first, *others = sections
    kept = [section for section in others if _shows_something(section)]
    return [*first, *(cell for section in kept for cell in section), last]


def _shows_something(section: list[dict]) -> bool:
    code = [cell for cell in section if cell["cell_type"] == "code"]
    return not code or any(cell["outputs"] for cell in code)


def _says_none(output: dict) -> bool:
    data = output.get("data", {})
    text = data.get("text/markdown", data.get("text/plain", output.get("text", "-")))
    return "".join(text).strip() in ("", NONE)
