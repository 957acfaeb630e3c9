"""Numbers that others published next to those of a study; see `data/published/README.md`."""

import csv
import re
from collections.abc import Iterator
from math import isclose
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from dynslice.core import paths
from dynslice.core.errors import RequestError
from dynslice.experiment.requests import Point, split_for
from dynslice.experiment.study import Study
from dynslice.inputs.texts import SPLITS
from dynslice.report import style

# What claims.py and forerunner.py read; every other CSV holds cells.
NO_CELLS = ("claims.csv", "dynamicslicing_logs.csv")
GUIDE = "data/published/README.md"

PERPLEXITY, ACCURACY = ("perplexity",), ("acc", "acc_norm")

# The networks of a study that a published method names; any other method has none here.
SCHEDULES = {name: name for name in ("dense", "constant", "dynamic")} | {"slicegpt": "constant"}

COLUMNS = ["method", "model", "SP", "SB", "dataset", "metric", "published", "stated settings"]
COLUMNS += ["ours", "settings", "source"]

# The settings of a number of ours, named as those of a cell, and the number if there is one.
Ours = tuple[dict[str, str | int | float | None], float | None]

_Count = Annotated[int, Field(ge=1)] | Literal["all"]


class Cell(BaseModel):
    """One published number with its settings: a line of a CSV, an empty field is None.

    None is "not stated". Shares of the width are 0 to below 1, accuracies are in percent.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    method: str
    model: str
    metric: Literal["perplexity", "acc", "acc_norm"]
    dataset: str
    slice_percentage: float = Field(ge=0, lt=1, serialization_alias="SP")
    slice_base: float | None = Field(None, ge=0, lt=1, serialization_alias="SB")
    calibration: str | None = None
    calibration_windows: int | None = Field(None, ge=1, serialization_alias="calibration windows")
    calibration_window: int | None = Field(None, ge=2, serialization_alias="calibration window")
    eval_windows: _Count | None = Field(None, serialization_alias="windows")
    window: int | None = Field(None, ge=2)
    value: float = Field(gt=0, serialization_alias="published")
    source: str
    nearest_for: str | None = None

    @field_validator("slice_base", "value")
    @classmethod
    def _fits(cls, number: float | None, info: ValidationInfo) -> float | None:
        others, is_value = info.data, info.field_name == "value"
        if not is_value and (number or 0) > others.get("slice_percentage", 1):
            raise ValueError("exceeds slice_percentage")
        if is_value and others.get("metric") == "perplexity" and number < 1:
            raise ValueError("a perplexity is at least 1")
        if is_value and others.get("metric") in ACCURACY and number > 100:
            raise ValueError("an accuracy is at most 100 percent")
        return number

    @property
    def models(self) -> list[str]:
        """Its model and those that have no numbers and are nearest to it, in lower case."""
        others = (self.nearest_for or "").split(";")
        return [model.strip().lower() for model in (self.model, *others)]

    def shown(self) -> dict[str, Any]:
        """Its fields by the names that tables and settings have, and the stated ones in words."""
        cells = self.model_dump(by_alias=True)
        cells["items" if self.metric in ACCURACY else "windows"] = cells.pop("windows")
        named = ("calibration", "calibration windows", "calibration window")
        named += ("windows", "items", "window")
        stated = (f"{name} {cells[name]}" for name in named if cells.get(name) is not None)
        return {**cells, "stated settings": "; ".join(stated) or "-"}


def read() -> list[Cell]:
    """Every published number in data/published, the files in the order of their names.

    Raises RequestError naming the file, line and column that cannot be read.
    """
    files = [path for path in sorted(paths.PUBLISHED.glob("*.csv")) if path.name not in NO_CELLS]
    return [cell for path in files for cell in _cells(path)]


def table(study: Study) -> pd.DataFrame:
    """Published perplexities of the study's model, each next to what the study measured.

    A row for each published number and each network and text of the study that it speaks of, or
    one row without a number of ours. `settings` is `equal`, or names what differs or is not
    stated. Numbers of the nearest published model are among them. Nothing is measured here.
    """
    return _joined(study, PERPLEXITY)


def task_table(study: Study) -> pd.DataFrame:
    """The same for accuracies, in percent, by the name of the task and the metric of lm-eval."""
    return _joined(study, ACCURACY)


def page(found: pd.DataFrame, metrics: tuple[str, ...] = PERPLEXITY) -> str:
    """A table of published numbers with a sentence that says what it holds, as Markdown.

    found: what `table` made, or `task_table` with `metrics` ACCURACY.
    """
    what = "perplexity" if metrics == PERPLEXITY else "accuracy"
    if found.empty:
        return style.NONE
    joined = found[found["ours"].notna()]
    equal = (joined["settings"] == "equal").sum()
    counts = {"joined": len(joined), "every": len(found), "equal": equal}
    return f"{style.say('published', what=what, **counts)}\n\n{style.markdown(found)}"


# Reading


def _cells(path: Path) -> Iterator[Cell]:
    where = f"published file {path.name}"
    try:
        # utf-8-sig: spreadsheets put a mark before the first column's name.
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, strict=True)
            header, fields = rows.fieldnames or [], Cell.model_fields
            required = [name for name in fields if fields[name].is_required()]
            wrong = [n for n in (*required, *header) if n not in fields or header.count(n) != 1]
            if wrong:
                raise RequestError(
                    f"{where}, line 1: column {wrong[0]!r} is missing, unknown or repeated; the "
                    f"columns are {', '.join(fields)} (see {GUIDE})"
                )
            for row in rows:
                yield _cell(f"{where}, line {rows.line_num}", row)
    except (UnicodeDecodeError, csv.Error) as error:
        raise RequestError(
            f"{where}, line {rows.line_num} or later, is no CSV in UTF-8 ({error}); see {GUIDE}"
        ) from error


def _cell(where: str, row: dict[str | None, Any]) -> Cell:
    """One line; csv puts fields beyond the header under None, and None for those that lack."""
    if None in row or None in row.values():
        raise RequestError(
            f"{where} has {'more' if None in row else 'fewer'} fields than line 1 has columns; "
            "put text with commas in quotes, and leave a field empty rather than out"
        )
    try:
        return Cell(**{name: text.strip() for name, text in row.items() if text.strip()})
    except ValidationError as error:
        errors = error.errors(include_url=False)
        column = errors[0]["loc"][0]
        message = " or ".join(e["msg"] for e in errors if e["loc"][0] == column)
        raise RequestError(
            f"{where}, column {column} = {row.get(column, '')!r}: {message}; see {GUIDE}"
        ) from error


# Joining


def _joined(study: Study, metrics: tuple[str, ...]) -> pd.DataFrame:
    of_tasks = metrics == ACCURACY
    points = study.task_points() if of_tasks else study.points()
    measured = _accuracies if of_tasks else _perplexities
    cells, model = [cell for cell in read() if cell.metric in metrics], study.profile.model.lower()
    rows = []
    for cell in (cell for cell in cells if model in cell.models):
        networks = _networks(cell, points)
        found = [
            {"ours": value, "settings": _compared(cell, study, point, here, value)}
            for point in networks
            for here, value in measured(study, cell, point)
        ]
        unread = f"{cell.dataset} is not read here" if networks else "no such network here"
        for ours in found or [{"ours": None, "settings": unread}]:
            rows.append({**cell.shown(), **ours})
    return pd.DataFrame(rows, columns=COLUMNS)


def _perplexities(study: Study, cell: Cell, point: Point) -> Iterator[Ours]:
    """On each text of the study that a cell speaks of."""
    p, (name, split) = study.profile, _text(cell.dataset)
    for text in (text for text in p.eval_texts if _text(text)[0] == name):
        split_here, count = split_for(text, p.eval_split) or _text(text)[1], p.eval_windows
        request = study.perplexity_request(point, text)
        chooses = text == p.eval_texts[0] and p.selection_windows is not None
        if chooses and split == "validation":
            split_here, count = "validation", p.selection_windows
            request = study.selection_request(point)
        result = study.store.get(request)
        here = {"split": split_here, "windows": count or "all", "window": p.eval_window}
        yield here, result and result.value["perplexity"]


def _accuracies(study: Study, cell: Cell, point: Point) -> Iterator[Ours]:
    """On the task of a cell, if the study has it; in percent, None where lm-eval has no number."""
    p, task = study.profile, cell.dataset.lower()
    if task not in p.tasks:
        return
    result, limit = study.store.get(study.task_request(point, task)), p.tasks[task]
    # lm-eval's `limit` counts the first items of a task.
    sampled = limit is not None and p.task_subset != "first"
    here = {"items": f"{limit} drawn" if sampled else limit or "all"}
    share = result and result.value[cell.metric]
    yield here, None if share is None else 100 * share


def _compared(cell: Cell, study: Study, point: Point, here: dict, value: float | None) -> str:
    """`equal`, or each setting that differs or is not stated."""
    if value is None:
        return "not measured here"
    p, (dataset, split) = study.profile, _text(cell.dataset)
    calibration = cell.calibration and _text(cell.calibration)[0]
    there = {**cell.shown(), "split": split, "calibration": calibration}
    if p.model.lower() != cell.model.lower():
        here = {"model": p.model, **here}
    if point.schedule == "dynamic":
        here["SB"] = point.slice_base
    if point.network is not None:  # the dense model is calibrated on nothing
        here["calibration"] = _text(p.calibration_text)[0]
        here["calibration windows"] = p.calibration_windows
        here["calibration window"] = p.calibration_window
    differing = [
        f"{name} {there[name]}, here {ours or 'not known'}"
        for name, ours in here.items()
        if there[name] not in (None, ours)
    ]
    read = dict.fromkeys((dataset, calibration))
    differing += [f"{t} read from {p.stand_ins[t]}" for t in read if t in p.stand_ins]
    unstated = ", ".join(name for name in here if there[name] is None)
    return "; ".join(differing + [f"{unstated} not stated"] * bool(unstated)) or "equal"


def _networks(cell: Cell, points: list[Point]) -> list[Point]:
    """The networks of a study that a published number speaks of.

    SB = SP is constant slicing. A dynamic network whose SB is not stated may be any of that SP.
    """
    sp, sb = cell.slice_percentage, cell.slice_base
    schedule = SCHEDULES.get(cell.method.lower())
    if schedule == "dynamic" and sb is not None and isclose(sp, sb):
        schedule = "constant"
    return [
        point
        for point in points
        if point.schedule == schedule
        and isclose(point.slice_percentage, sp)
        and (schedule != "dynamic" or sb is None or isclose(point.slice_base, sb))
    ]


def _text(name: str) -> tuple[str, str | None]:
    """`wikitext2 test` -> (wikitext2, test), in lower case; so is a file wikitext2-test.txt."""
    name = Path(name).stem if Path(name).is_file() else name
    found = re.fullmatch(rf"(.+)[ _-]({'|'.join(SPLITS)})", name.lower())
    return (found[1], found[2]) if found else (name.lower(), None)
