"""The authors' raw outputs: what is said of them follows from the file."""

import csv
from statistics import fmean

import numpy as np
import pandas as pd
import pytest

from dynslice.core import paths
from dynslice.report import forerunner, published

LLAMA, MISTRAL = "meta-llama/Meta-Llama-3-8B", "mistralai/Mistral-7B-v0.1"


def accuracies(model, variation):
    """Straight from the file, in percent."""
    with (paths.PUBLISHED / forerunner.LOGS).open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["model"] == model]
    return [100 * float(row["acc"]) for row in rows if float(row["variation"]) == variation]


@pytest.mark.parametrize("model", [LLAMA, MISTRAL])
def test_the_table_holds_the_means_of_the_file(model):
    row = forerunner.table().set_index("model").loc[model]
    every = {v: fmean(accuracies(model, v)) for v in np.arange(0, 0.31, 0.02).round(2)}
    assert len(every) == 16
    assert row["constant (%)"] == pytest.approx(every[0.0])
    assert row["variation 0.3 (%)"] == pytest.approx(every[0.3])
    best = max((v for v in every if v), key=every.get)
    assert row["its variation"] == best
    assert row["gain of the best"] == pytest.approx(every[best] - every[0.0])


def test_luck_is_that_of_the_best_of_so_many():
    draws = np.random.default_rng(0).normal(size=(200_000, 15)).max(axis=1)
    row = forerunner.table().set_index("model").loc[LLAMA]
    assert row["best by luck"] / row["standard error"] == pytest.approx(draws.mean(), abs=0.01)


def test_a_gain_beyond_luck_is_said(tmp_path, monkeypatch):
    logs = pd.read_csv(paths.PUBLISHED / forerunner.LOGS)
    assert "**0 of 5**" in forerunner.prose()
    doctored = (logs["model"] == LLAMA) & (logs["variation"] == 0.08)
    logs.loc[doctored, "acc"] += 0.1
    logs.to_csv(tmp_path / forerunner.LOGS)
    monkeypatch.setattr(paths, "PUBLISHED", tmp_path)
    assert "**1 of 5**" in forerunner.prose()
    assert LLAMA in forerunner.prose()


def test_cells_of_the_field_are_read_with_their_sources():
    cells = [cell for cell in published.read() if cell.method in ("FLAP", "output-aware")]
    assert {cell.value for cell in cells} >= {8.42, 18.04, 13.34}
    assert all("arXiv" in cell.source for cell in cells)


@pytest.mark.parametrize("model", [LLAMA, MISTRAL])
def test_the_constant_row_is_the_anchor_of_the_papers_models_at_30_percent(model):
    cells = [c for c in published.read() if c.source.startswith("raw outputs of the authors")]
    found = [c.value for c in cells if c.model == model]
    assert found == pytest.approx(accuracies(model, 0.0), abs=0.005)
    assert {(c.method, c.slice_percentage, c.eval_windows) for c in cells} == {
        ("SliceGPT", 0.3, 300)
    }
