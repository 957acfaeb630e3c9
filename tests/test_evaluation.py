"""Perplexity by its definition, and tasks by lm-eval's own command line."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import TINY
from prose import paragraphs

from dynslice import assets, corpora, evaluation, models
from dynslice.errors import RequestError, RunError
from dynslice.plan import Shape, constant
from dynslice.slicing import slice_model

CPU = torch.device("cpu")


@torch.inference_mode()
def nll_by_definition(model, windows):
    """Mean negative log-likelihood of tokens 2 to T, window by window, in float64."""
    means = []
    for ids in windows:
        log_p = model(ids[None]).logits[0].double().log_softmax(-1)
        means.append(-np.mean([log_p[t, ids[t + 1]].item() for t in range(len(ids) - 1)]))
    return np.array(means)


def test_perplexity_is_that_of_the_definition(tiny, tokens):
    got = evaluation.perplexity(tiny, tokens)
    nll = nll_by_definition(tiny, tokens)
    assert got["nll"] == pytest.approx(nll, rel=1e-6)
    assert got["nll_mean"] == pytest.approx(nll.mean(), rel=1e-6)
    assert got["perplexity"] == pytest.approx(np.exp(nll.mean()), rel=1e-5)
    assert got["nll_stderr"] == pytest.approx(nll.std(ddof=1) / np.sqrt(6), rel=1e-5)
    assert (got["windows"], got["window"], got["tokens"]) == (6, 24, 6 * 23)


def test_windows_do_not_see_each_other(tokens):
    model = TINY["llama"]()
    whole = evaluation.perplexity(model, tokens)["nll"]
    alone = [evaluation.perplexity(model, window[None])["nll"][0] for window in tokens]
    assert whole == pytest.approx(alone, rel=1e-5)


def test_one_window_has_no_standard_error(tokens):
    assert evaluation.perplexity(TINY["llama"](), tokens[:1])["nll_stderr"] is None


def test_window_that_predicts_nothing_is_refused(tokens):
    with pytest.raises(RequestError, match="window 1 predicts no token"):
        evaluation.perplexity(TINY["llama"](), tokens[:, :1])


def test_non_finite_logits_are_an_error(tokens):
    model = TINY["llama"]()
    model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(RunError, match="log-likelihood is not finite"):
        evaluation.perplexity(model, tokens)


# Tasks


@pytest.fixture(scope="module")
def tiny_random():
    assets.fetch()
    return models.load("embedded:tiny-random", CPU, torch.float32)


@pytest.fixture(scope="module")
def scores(tiny_random):
    return evaluation.tasks(*tiny_random, ["piqa", "winogrande", "arc_easy"], limit=5)


@pytest.mark.parametrize("name", ["piqa", "winogrande", "arc_easy"])
def test_accuracy_is_the_mean_over_items(name, scores):
    score = scores[name]
    assert score["n"] == len(score["correct"]) == len(score["margin"]) == 5
    assert set(score["correct"]) <= {0, 1}
    assert score["acc"] == np.mean(score["correct"])
    assert score["acc_stderr"] == pytest.approx(np.std(score["correct"], ddof=1) / np.sqrt(5))


@pytest.mark.parametrize("name", ["piqa", "winogrande", "arc_easy"])
def test_margin_is_positive_where_correct(name, scores):
    signs = [int(margin > 0) for margin in scores[name]["margin"]]
    assert signs == scores[name]["correct"]


def test_normalised_accuracy_only_where_lm_eval_defines_it(scores):
    assert scores["winogrande"]["acc_norm"] is None
    assert scores["winogrande"]["correct_norm"] is None
    assert scores["piqa"]["acc_norm"] == np.mean(scores["piqa"]["correct_norm"])


def test_mmlu_takes_the_limit_per_subject(tiny_random):
    score = evaluation.tasks(*tiny_random, ["mmlu"], limit=1)["mmlu"]
    assert score["n"] == len(score["margin"]) == 57
    assert score["acc"] == pytest.approx(np.mean(score["correct"]), abs=1e-12)
    assert [int(margin > 0) for margin in score["margin"]] == score["correct"]


def test_unknown_task_is_refused(tiny_random):
    with pytest.raises(RequestError, match=r"task 'piqua' is unknown; the tasks are .*piqa"):
        evaluation.tasks(*tiny_random, ["piqua"], limit=1)


def test_lm_eval_command_line_agrees_on_a_sliced_directory(tiny_random, tmp_path, dynslice):
    model, tokenizer = tiny_random
    text, folder, out = tmp_path / "text.txt", tmp_path / "sliced", tmp_path / "lm_eval.json"
    text.write_text(paragraphs(4), encoding="utf-8")
    calibration = corpora.windows(str(text), None, tokenizer, 64, 4)
    sliced = slice_model(model, calibration, constant(Shape.of(model.config), 0.25)).model
    models.save(sliced, tokenizer, folder)

    names = ["piqa", "winogrande", "arc_easy", "mmlu"]
    asked = ["--tasks", ",".join(names), "--limit", "5"]
    status, stdout, stderr = dynslice("tasks", "--model", folder, *asked, "--json")
    assert status == 0, stderr
    ours = json.loads(stdout)["tasks"]

    command = ["lm_eval", "--model", "hf", "--device", "cpu", "--output_path", str(out), *asked]
    command += ["--model_args", f"pretrained={folder},trust_remote_code=True"]
    command += ["--include_path", str(evaluation.TASK_FILES)]
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    finished = subprocess.run(
        [sys.executable, "-m", *command],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    [written] = tmp_path.glob("lm_eval*.json")
    theirs = json.loads(written.read_text())["results"]
    for name in names:
        assert ours[name]["n"] == (5 * 57 if name == "mmlu" else 5)
        assert ours[name]["acc"] == theirs[name]["acc,none"]
        assert ours[name]["acc_norm"] == theirs[name].get("acc_norm,none")
