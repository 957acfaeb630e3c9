"""Numbers that others published next to those of a study; see `data/published/README.md`."""

import csv
import re
from collections.abc import Callable, Iterator
from itertools import product
from math import isclose
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from dynslice.core import paths
from dynslice.core.errors import RequestError
from dynslice.experiment.requests import Point, split_for
from dynslice.experiment.study import Study
from dynslice.inputs.texts import SPLITS
from dynslice.report import style

CLAIMS = "claims.csv"  # the headline claims, which claims.py reads; every other CSV holds cells

GUIDE = "data/published/README.md"

PERPLEXITY, ACCURACY = ("perplexity",), ("acc", "acc_norm")

# The networks of a study that a published method names; any other method has none here.
SCHEDULES = {name: name for name in ("dense", "constant", "dynamic")} | {"slicegpt": "constant"}

# A network of the study, what is compared of its settings (published, here), and its number.
Ours = tuple[Point, dict[str, tuple], float | None]


class Cell(BaseModel):
    """One published number with its settings: a line of a CSV, an empty field is None.

    None is "not stated". Shares of the width are 0 to below 1, accuracies are in percent.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    method: str
    model: str
    metric: Literal["perplexity", "acc", "acc_norm"]
    dataset: str
    slice_percentage: float = Field(ge=0, lt=1)
    slice_base: float | None = Field(None, ge=0, lt=1)
    calibration: str | None = None
    calibration_windows: int | None = Field(None, ge=1)
    calibration_window: int | None = Field(None, ge=2)
    eval_windows: Annotated[int, Field(ge=1)] | Literal["all"] | None = None
    window: int | None = Field(None, ge=2)
    value: float = Field(gt=0)
    source: str
    nearest_for: str | None = None

    @field_validator("slice_base", "value")
    @classmethod
    def _fits(cls, number: float | None, info: ValidationInfo) -> float | None:
        if info.field_name == "slice_base":
            if number is not None and number > info.data.get("slice_percentage", 1):
                raise ValueError("exceeds slice_percentage")
        elif info.data.get("metric") == "perplexity" and number < 1:
            raise ValueError("a perplexity is at least 1")
        elif info.data.get("metric") in ACCURACY and number > 100:
            raise ValueError("an accuracy is at most 100 percent")
        return number

    @property
    def relatives(self) -> list[str]:
        """Models without published numbers of their own, for which this one is the nearest."""
        return [model.strip() for model in (self.nearest_for or "").split(";") if model.strip()]


def read() -> list[Cell]:
    """Every published number in data/published, the files in the order of their names.

    Raises RequestError naming the file, line and column that cannot be read.
    """
    files = [path for path in sorted(paths.PUBLISHED.glob("*.csv")) if path.name != CLAIMS]
    return [cell for path in files for cell in _cells(path)]


def table(study: Study) -> pd.DataFrame:
    """Published perplexities of the study's model, each next to what the study measured.

    A row for each published number and each network and text of the study that it speaks of, or
    one row without a number of ours. `settings` is `equal`, or names what differs or is not
    stated. Numbers of the nearest published model are among them. Nothing is measured here.
    """

    def ours(cell: Cell) -> Iterator[Ours]:
        p, split = study.profile, _text(cell.dataset)[1]
        texts = [text for text in p.eval_texts if _text(cell.dataset)[0] == _text(text)[0]]
        for point, text in product(_networks(cell, study.points()), texts):
            here, count = split_for(text, p.eval_split) or _text(text)[1], p.eval_windows
            request = study.perplexity_request(point, text)
            chooses = text == p.eval_texts[0] and p.selection_windows is not None
            if chooses and split == "validation":
                here, count = "validation", p.selection_windows
                request = study.selection_request(point)
            result = study.store.get(request)
            compared = {
                "split": (split, here),
                "windows": (cell.eval_windows, count or "all"),
                "window": (cell.window, p.eval_window),
            }
            yield point, compared, result and result.value["perplexity"]

    return _joined(study, PERPLEXITY, ours)


def task_table(study: Study) -> pd.DataFrame:
    """The same for accuracies, in percent, by the name of the task and the metric of lm-eval."""

    def ours(cell: Cell) -> Iterator[Ours]:
        task = cell.dataset.lower()
        for point in _networks(cell, study.task_points()) if task in study.profile.tasks else []:
            result, limit = (
                study.store.get(study.task_request(point, task)),
                study.profile.tasks[task],
            )
            # lm-eval's `limit` counts the first items of a task.
            sampled = limit is not None and study.profile.task_subset != "first"
            items = f"{limit} drawn" if sampled else limit or "all"
            compared = {"items": (cell.eval_windows, items)}
            yield point, compared, result and _accuracy(result.value, cell.metric)

    return _joined(study, ACCURACY, ours)


def page(found: pd.DataFrame, study: Study, metrics: tuple[str, ...] = PERPLEXITY) -> str:
    """A table of published numbers with a sentence that says what it holds, as Markdown.

    found: what `table` made, or `task_table` with `metrics` ACCURACY.
    """
    what = "perplexity" if metrics == PERPLEXITY else "accuracy"
    if found.empty:
        held = [cell for cell in read() if cell.metric in metrics]
        models = ", ".join(dict.fromkeys(cell.model for cell in held))
        rest = (
            f"`data/published` holds {len(held)} of other models: {models}."
            if held
            else f"`data/published` holds none of any model; `{GUIDE}` says how to add some."
        )
        return f"No published {what} is for {study.profile.model}; {rest}"
    joined = found[found["ours"].notna()]
    equal = int((joined["settings"] == "equal").sum())
    return (
        f"**{len(joined)} of {len(found)}** rows have a number of ours next to the published "
        f"{what}, {equal} of them with equal settings.\n\n{style.markdown(found)}"
    )


# Reading


def _cells(path: Path) -> Iterator[Cell]:
    try:
        # utf-8-sig: spreadsheets put a mark before the first column's name.
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, strict=True)
            _check_header(path, rows.fieldnames or [])
            for row in rows:
                yield _cell(path, rows.line_num, row)
    except UnicodeDecodeError as error:
        raise RequestError(
            f"published file {path.name} is not UTF-8 (byte {error.start}); save it as UTF-8"
        ) from error
    except csv.Error as error:
        raise RequestError(
            f"published file {path.name}, line {rows.line_num} is not CSV ({error}); see {GUIDE}"
        ) from error


def _check_header(path: Path, header: list[str]) -> None:
    fields = Cell.model_fields
    missing = [name for name in fields if fields[name].is_required() and name not in header]
    unknown = [name for name in header if name not in fields or header.count(name) > 1]
    for problem, names in (("lacks", missing), ("has an unknown or repeated", unknown)):
        if names:
            raise RequestError(
                f"published file {path.name}, line 1 {problem} column {names[0]!r}; the columns "
                f"are {', '.join(fields)} (see {GUIDE})"
            )


def _cell(path: Path, line: int, row: dict[str | None, Any]) -> Cell:
    """One line; csv puts fields beyond the header under None, and None for those that lack."""
    where = f"published file {path.name}, line {line}"
    if None in row or None in row.values():
        raise RequestError(
            f"{where} has {'more' if None in row else 'fewer'} fields than line 1 has columns; "
            "put text with commas in quotes, and leave a field empty rather than out"
        )
    stated = {name: text.strip() for name, text in row.items() if text.strip()}
    try:
        return Cell(**stated)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        column = errors[0]["loc"][0]
        message = " or ".join(e["msg"] for e in errors if e["loc"][0] == column)
        raise RequestError(
            f"{where}, column {column} = {row.get(column, '')!r}: {message}; see {GUIDE}"
        ) from error


# Joining


def _joined(
    study: Study, metrics: tuple[str, ...], ours: Callable[[Cell], Iterator[Ours]]
) -> pd.DataFrame:
    rows = []
    model = study.profile.model
    for cell in read():
        if cell.metric in metrics and _is_any(model, [cell.model, *cell.relatives]):
            found = [
                (value, "not measured here" if value is None else _settings(cell, study, *of))
                for *of, value in ours(cell)
            ]
            # No network, or none that was measured on this text or task.
            points = study.points() if metrics == PERPLEXITY else study.task_points()
            unread = f"{cell.dataset} is not read here"
            absent = unread if _networks(cell, points) else "no such network here"
            rows += [_row(cell, *pair) for pair in found or [(None, absent)]]
    names = ["method", "model", "SP", "SB", "dataset", "metric", "published", "stated settings"]
    return pd.DataFrame(rows, columns=[*names, "ours", "settings", "source"])


def _row(cell: Cell, ours: float | None, settings: str) -> tuple:
    stated = [
        f"{name} {value}"
        for name, value in (
            ("calibration", cell.calibration),
            ("calibration windows", cell.calibration_windows),
            ("calibration window", cell.calibration_window),
            ("windows" if cell.metric == "perplexity" else "items", cell.eval_windows),
            ("window", cell.window),
        )
        if value is not None
    ]
    network = (cell.method, cell.model, cell.slice_percentage, cell.slice_base)
    number = (cell.dataset, cell.metric, cell.value, "; ".join(stated) or "-")
    return *network, *number, ours, settings, cell.source


def _settings(cell: Cell, study: Study, point: Point, compared: dict[str, tuple]) -> str:
    """`equal`, or each setting (published, here) that differs or is not stated."""
    p = study.profile
    if not _is_any(p.model, [cell.model]):
        compared = {"model": (cell.model, p.model), **compared}
    if point.schedule == "dynamic":
        compared["SB"] = (cell.slice_base, point.slice_base)
    if point.network is not None:  # the dense model is calibrated on nothing
        text = cell.calibration and _text(cell.calibration)[0]
        compared["calibration"] = (text, _text(p.calibration_text)[0])
        compared["calibration windows"] = (cell.calibration_windows, p.calibration_windows)
        compared["calibration window"] = (cell.calibration_window, p.calibration_window)
    differing = [
        f"{name} {there}, here {here or 'not known'}"
        for name, (there, here) in compared.items()
        if there is not None and there != here
    ]
    read = dict.fromkeys((_text(cell.dataset)[0], _text(cell.calibration or "")[0]))
    differing += [f"{t} read from {p.stand_ins[t]}" for t in read if t in p.stand_ins]
    unstated = ", ".join(name for name, (there, _) in compared.items() if there is None)
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


def _is_any(model: str, others: list[str]) -> bool:
    return model.lower() in [other.lower() for other in others]


def _accuracy(value: dict, metric: str) -> float | None:
    """In percent; None where lm-eval defines no acc_norm."""
    share = value["acc_norm"] if metric == "acc_norm" else fmean(value["correct"])
    return None if share is None else 100 * share
