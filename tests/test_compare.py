"""Paired comparisons, the choice of SB, and the ablations, on results made for the purpose."""

import itertools
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from dynslice.core.errors import RunError
from dynslice.experiment.profile import load
from dynslice.experiment.store import Request, Result, Store
from dynslice.experiment.study import Study
from dynslice.report import ablations, claims, pages, perplexity, single_layer, statistics
from dynslice.report import tasks as task_report

RNG = np.random.default_rng(4)
LAYERS, ITEMS = 12, 40
TASKS = {"piqa": ITEMS, "arc_easy": ITEMS}
UNTIED = 30 * 10**6  # what a second table would add
TEXT_LEVEL = {"sotu": 3.0, "wikipedia": 3.4}
SETTINGS = {
    "slice_percentages": [0.2, 0.3],
    "slice_bases": [0.0, 0.1],
    "eval_texts": ["sotu", "wikipedia"],
    "tasks": TASKS,
    "task_slice_percentages": [0.2, 0.3],
    "ablation_slice_percentage": 0.3,
    "beyond_slice_percentages": [],
    "instead_slice_percentages": [],
}


class Invented(Study):
    """A study whose results are invented by `nll_of` and `correct_of` instead of measured."""

    def nll_of(self, config):
        """Level of the text plus a cost of the slice; dynamic costs 0.05 less."""
        level = TEXT_LEVEL[config["text"]]
        if config["slice"] is None:
            return level
        plan = config["slice"]["plan"]
        plan = plan.get("of", plan)
        inner = plan.get("to", plan)
        return level + inner["slice_percentage"] - 0.05 * (plan["schedule"] == "dynamic")

    def value(self, request):
        config = request.config
        rng = np.random.default_rng(1)  # the same windows and items for every network
        if request.kind in ("ppl", "centred"):
            noise = 0.3 * rng.standard_normal(24)
            nll = self.nll_of({"slice": None, **config}) + noise
            return {"nll": nll.tolist(), "perplexity": float(np.exp(nll.mean())), "windows": 24}
        if request.kind == "task":
            correct = (rng.random(ITEMS) < 0.6).astype(int)
            margin = rng.standard_normal(ITEMS)
            version = {"lm_eval_version": "0"}
            return {
                "correct": correct.tolist(),
                "acc": float(np.mean(correct)),
                "margin": margin.tolist(),
                "acc_norm": None,
            } | version
        if request.kind == "lr":
            layers = [
                {
                    "index": i,
                    "lr": 0.5 + i / 40,
                    "angular_distance": 0.4 - i / 40,
                    "update_norm": 1.0,
                }
                for i in range(LAYERS)
            ]
            return {"layers": layers, "tokens": config["max_tokens"], "windows": 3}
        if request.kind == "sensitivity":
            dense = rng.standard_normal(8)
            layers = [{"index": i, "nll": (dense + 0.5 - i / 40).tolist()} for i in range(LAYERS)]
            return {"dense": dense.tolist(), "layers": layers}
        return self.size_of(config)

    def size_of(self, config):
        plan = (config.get("slice") or config).get("plan") or {"schedule": "dense"}
        plan = plan.get("of", plan)
        inner = plan.get("to", plan)
        shares = inner.get("slice_percentage", 0.0), inner.get("slice_base", None)
        size = 200e6 * (1 - shares[0]) + (1e6 if shares[1] is not None else 0)
        slices = [shares[0]] * LAYERS
        widths = [64] * LAYERS
        sizes = {"parameters": int(size), "shortcut_parameters": 10**6, "mean_slice": shares[0]}
        sizes["parameters_dense"] = 200 * 10**6
        if shares[0]:  # the dense model has no other layout
            sizes["parameters_untied"] = int(size) + UNTIED + (shares[1] is not None) * 10**6
        return {**sizes, "widths": widths, "final_slice": slices}

    def fill(self):
        """Put a result for every request into the store."""
        for request in self.requests():
            where = {"device": "a test", "threads": 1, "commit": "0" * 40, "dirty": False}
            result = Result(request.kind, request.config, self.value(request), 1.0, 0, where)
            self.store.put(result)
        return self


@pytest.fixture
def invented(tmp_path):
    return Invented(load("smoke", SETTINGS), Store(tmp_path), "cpu", from_record=True).fill()


def alter(study, request, change):
    """Replace a stored value by `change(value)`."""
    result = study.store.get(request)
    study.store.put(replace(result, value=change(result.value)))


def shift_nll(amount):
    def change(value):
        nll = (np.array(value["nll"]) + amount).tolist()
        return {**value, "nll": nll, "perplexity": float(np.exp(np.mean(nll)))}

    return change


def points(study, schedule):
    return [point for point in study.points() if point.schedule == schedule]


def test_a_perplexity_change_is_paired(invented):
    dynamic, matched = points(invented, "dynamic")[0], points(invented, "matched")[0]
    change = statistics.perplexity_change(invented, dynamic, matched, "sotu")
    expected = 100 * np.expm1(-0.05)  # the windows' noise is common to both and cancels
    assert change.estimate == pytest.approx(expected)
    assert change.low == pytest.approx(expected)
    assert change.direction == "lower"


def test_sb_is_chosen_on_validation_windows_alone(invented):
    """Whatever the reported windows say: the choice must not move, the hindsight must."""
    at_03 = [p for p in points(invented, "dynamic") if p.slice_percentage == 0.3]
    favourite, other = at_03
    alter(invented, invented.selection_request(favourite), shift_nll(-0.2))
    for text in ("sotu", "wikipedia"):
        alter(invented, invented.perplexity_request(other, text), shift_nll(-0.5))
    for basis in statistics.BASES:
        assert statistics.chosen(invented, basis, 0.3)[0] == favourite
        assert statistics.best(invented, basis, "sotu", 0.3)[0] == other
    table = perplexity.selection_table(invented)
    rows = table[table["SP"] == 0.3]
    assert set(rows["SB chosen on validation"]) == {favourite.slice_base}
    assert set(rows["best SB in hindsight"]) == {other.slice_base}
    assert (rows["in hindsight (%)"] < rows["perplexity (%)"] - 10).all()


def test_selection_windows_are_of_the_validation_split(invented):
    requests = [invented.selection_request(p).config for p in invented.points()]
    assert {r["split"] for r in requests} == {"validation"}
    reported = {
        invented.perplexity_request(p, t).config["split"]
        for p, t in itertools.product(invented.points(), invented.profile.eval_texts)
    }
    assert reported == {"test"}


@pytest.mark.parametrize(
    ("shift", "noise", "verdict"),
    [
        (-0.3, 0.0, claims.SUPPORTED),
        (0.0, 0.0, claims.DIRECTION),
        (0.0, 1.0, claims.UNSEEN),  # the same mean, but the interval holds zero and what is claimed
        (0.3, 0.0, claims.NOT_SUPPORTED),
    ],
)
def test_verdicts_are_those_of_the_chosen_network(invented, shift, noise, verdict):
    """Only the network that validation chose is altered; the others would be `supported`."""
    speaks, *others = points(invented, "dynamic")
    alter(invented, invented.selection_request(speaks), shift_nll(-0.01))
    spread = noise * (np.arange(24) - 11.5) / 12
    alter(invented, invented.perplexity_request(speaks, "wikipedia"), shift_nll(shift + spread))
    for other in others:
        alter(invented, invented.perplexity_request(other, "wikipedia"), shift_nll(-0.5))
    table = claims.claims_table(invented)
    rows = table[table["claim"].str.contains("perplexity")]
    verdicts = rows.groupby("measured on")["verdict on this model"].unique()
    assert verdicts["wikipedia"].tolist() == [verdict]
    assert verdicts["sotu"].tolist() == [claims.DIRECTION]  # untouched
    word, said = verdict.capitalize(), claims.findings(invented).splitlines()
    assert any(f"**{word}**: perplexity lower" in line and "wikipedia" in line for line in said)
    assert claims.view(invented)["verdict"].tolist() == [*table["verdict on this model"]]
    assert [name.split("/")[0] for name in claims.not_tested(invented)] == [
        "meta-llama",
        "mistralai",
    ]


def test_points_and_ratio_are_both_said_where_they_disagree(invented):
    pairs = [p for p in statistics.pairs(invented.task_points()) if p[2] == statistics.EQUAL_SIZE]
    right = {"constant": 4, "matched": 4, "dynamic": 9}
    for point, task in itertools.product([p for pair in pairs for p in pair[:2]], TASKS):
        correct = [int(i < right[point.schedule]) for i in range(ITEMS)]
        request = invented.task_request(point, task)
        alter(invented, request, lambda v, made=correct: {**v, "correct": made})
    outcome = next(
        o
        for o in claims.outcomes(invented)
        if o["metric"] == "accuracy" and o["at"] == statistics.EQUAL_SIZE
    )
    assert outcome["change"].estimate == pytest.approx(12.5)
    assert outcome["ratio"].estimate == pytest.approx(125)
    assert outcome["verdict on this model"] == claims.SUPPORTED
    weaker = claims.verdicts(statistics.Estimate(2.5, 0.5, 4.5), outcome["ratio"], 5)
    assert weaker == "supported in direction, not in size (read as a ratio: supported)"


def test_accuracy_verdicts_follow_the_items(invented):
    accuracy = "Dynamic slicing performs"
    before = claims.claims_table(invented)
    before = before[before["claim"].str.startswith(accuracy)]
    assert set(before["verdict on this model"]) == {claims.NOT_SUPPORTED}
    for point in invented.task_points():
        if point.schedule == "dynamic":
            for task in invented.profile.tasks:
                request = invented.task_request(point, task)
                alter(invented, request, lambda v: {**v, "correct": [1] * ITEMS})
    after = claims.claims_table(invented)
    after = after[after["claim"].str.startswith(accuracy)]
    assert set(after["verdict on this model"]) == {claims.SUPPORTED}


def test_the_constant_curve_is_interpolated_at_the_networks_size(invented):
    """Between constant networks at 160 M (NLL 3.2) and 141 M (3.3), as at 140 M and 161 M."""
    dynamic = next(p for p in points(invented, "dynamic") if p.slice_percentage == 0.3)
    curve = {
        invented.store.get(invented.slice_request(p)).value["parameters"]: p.slice_percentage
        for p in invented.points()
        if p.schedule in ("constant", "matched")
    }
    for size in (150e6, 158e6):
        alter(invented, invented.slice_request(dynamic), lambda v, s=size: {**v, "parameters": s})
        costs = np.interp(size, sorted(curve), [curve[s] for s in sorted(curve)])
        change = statistics.curve_change(invented, dynamic, "sotu")
        assert change.estimate == pytest.approx(100 * np.expm1(0.25 - costs))
    alter(invented, invented.slice_request(dynamic), lambda v: {**v, "parameters": 5})
    assert statistics.curve_change(invented, dynamic, "sotu") is None


def test_both_counts_of_stored_parameters_are_shown(invented):
    """Dense 200 M; sliced 160, 161, 140, 141 M, and 30 M more with a second table, 31 dynamic."""
    table = perplexity.perplexity_table(invented).drop_duplicates("network")
    counts = table.set_index("network")[[statistics.SIZE, statistics.UNTIED]]
    assert tuple(counts.loc["constant, SP 30%"]) == (140, 170)
    assert tuple(counts.loc["dynamic, SP 30%, SB 0%"]) == (141, 172)
    assert np.isnan(counts.loc["dense", statistics.UNTIED])
    said = perplexity.size_prose(table)
    assert "**0 store more parameters than the dense model** (200.0 M)" in said
    assert "would store 170.0 to 192.0 M, 0 of them more" in said
    view = task_report.accuracy_view(task_report.task_table(invented))
    assert view.loc[statistics.SIZE, "dynamic, SP 30%, SB 0%"] == "141.0"
    assert view.loc[statistics.UNTIED, "dense"] == "-"
    changes = perplexity.perplexity_comparison(invented)
    at_slice = changes[changes["against constant at"] == statistics.EQUAL_SLICE].iloc[-1]
    assert at_slice["size (%)"] == pytest.approx(100 / 140)
    assert at_slice["size, untied (%)"] == pytest.approx(200 / 170)
    stored = claims.claims_table(invented)["stored"]
    assert stored[0] == "+0.6 %, embedding untied +1.1 %"
    assert "store +0.6 to +0.7 %" in claims.findings(invented)
    assert "it would be +1.1 to +1.2 %" in claims.findings(invented)


def test_a_model_without_a_common_table_has_one_count(invented):
    for point in invented.points()[1:]:
        request = invented.slice_request(point)
        alter(invented, request, lambda v: {**v, "parameters_untied": v["parameters"]})
    said = perplexity.size_prose(perplexity.perplexity_table(invented))
    assert said.endswith("Embedding and head are a table each, in both counts.")


def test_mcnemar_is_the_exact_binomial_test(invented):
    a, b = invented.task_points()[:2]
    flips = (a, [0, 0, 0, 0, 0, 0, 0, 1]), (b, [1, 1, 1, 1, 1, 1, 1, 0])
    for point, first in flips:
        request = invented.task_request(point, "piqa")
        alter(invented, request, lambda v, f=first: {**v, "correct": [*f, *[1] * (ITEMS - 8)]})
    p = statistics.mcnemar(invented, a, b, "piqa")
    assert p == pytest.approx(2 * sum(stats.binom.pmf(k, 8, 0.5) for k in (0, 1)))
    assert statistics.mcnemar(invented, a, a, "piqa") == 1.0


def test_margins_move_where_accuracy_does_not(invented):
    a, b = invented.task_points()[:2]
    alter(
        invented,
        invented.task_request(a, "piqa"),
        lambda v: {**v, "margin": [m + 0.1 for m in v["margin"]]},
    )
    assert statistics.accuracy_change(invented, a, b, ["piqa"]).estimate == 0
    change = statistics.margin_change(invented, a, b, ["piqa"])
    assert (change.estimate, change.direction) == (pytest.approx(0.1), "higher")


def test_intervals_hold_the_mean_and_shrink_with_more_windows():
    few, many = RNG.normal(1, 1, 20), RNG.normal(1, 1, 2000)
    mean, low, high = statistics.mean(few)
    assert mean == pytest.approx(few.mean())
    assert low < mean < high
    narrow = statistics.mean(many)
    normal = 2 * stats.norm.ppf(0.975) * many.std() / np.sqrt(len(many))
    assert narrow.high - narrow.low == pytest.approx(normal, rel=0.05)
    assert statistics.mean(np.zeros(5)) == (0.0, 0.0, 0.0)


def test_a_single_item_counts_and_is_not_resampled():
    many = RNG.standard_normal(50)
    alone = statistics.mean(many)
    one = statistics.mean(many, np.array([3.0]))
    assert one == pytest.approx([(x + 3.0) / 2 for x in alone])
    assert statistics.mean(np.array([3.0])) == (3.0, 3.0, 3.0)


def test_an_accuracy_of_zero_has_no_ratio(invented):
    for point in invented.task_points():
        for task in TASKS:
            request = invented.task_request(point, task)
            alter(invented, request, lambda value: {**value, "correct": [0] * ITEMS})
    table = claims.claims_table(invented)
    rows = table[table["claim"].str.startswith("Dynamic slicing performs")]
    assert set(rows["measured"]) == {"+0.0 points [+0.0, +0.0]"}
    assert set(rows["verdict on this model"]) == {claims.NOT_SUPPORTED}


def test_tasks_weigh_the_same_whatever_their_items(invented):
    a, b = invented.task_points()[:2]
    for task, count, right in (("piqa", 30, 1), ("arc_easy", 10, 0)):
        for point, correct in ((a, right), (b, 0)):
            made = {"correct": [correct] * count, "margin": [0.0] * count}
            request = invented.task_request(point, task)
            alter(invented, request, lambda v, m=made: {**v, **m})
    change = statistics.accuracy_change(invented, a, b, ["piqa", "arc_easy"])
    assert change.estimate == pytest.approx(50)  # 75 if items weighed the same
    assert statistics.accuracy(invented, a, ["piqa", "arc_easy"]) == pytest.approx(50)


def test_results_of_other_items_are_not_paired(invented):
    a, b = invented.task_points()[:2]
    alter(invented, invented.task_request(a, "piqa"), lambda v: {**v, "items": [1]})
    with pytest.raises(RunError, match="different items"):
        statistics.accuracy_change(invented, a, b, ["piqa"])


def test_cutting_single_layers_tells_whether_lr_predicts_the_loss(invented):
    table = single_layer.table(invented)
    assert single_layer.rank_correlation(table).estimate == pytest.approx(-1)
    assert "LR predicts what hurts" in single_layer.prose(table, invented)

    def turned(value):
        return {
            **value,
            "layers": [
                {**layer, "nll": other["nll"]}
                for layer, other in zip(value["layers"], value["layers"][::-1], strict=True)
            ],
        }

    alter(invented, invented.ablation.single_layer_request(), turned)
    assert "wrong way round" in single_layer.prose(single_layer.table(invented), invented)


@pytest.mark.parametrize(
    ("shift", "says"),
    [
        (0.1, "first of 3 with probability 1 in 3"),
        (0.0, "not shown to matter"),
        (-0.1, "worse than all"),
    ],
)
def test_shuffles_are_compared_with_the_order_by_lr(invented, shift, says):
    for ablation in invented.ablation.variants():
        if ablation.question == "shuffled":
            alter(invented, invented.perplexity_request(ablation.point, "sotu"), shift_nll(shift))
    table = ablations.shuffle_table(invented)
    assert table["against LR order (%)"].iloc[1:3].mean() == pytest.approx(100 * np.expm1(shift))
    told = ablations.shuffle_prose(table, invented)
    assert says in told
    assert "One width for all layers, with the embedding whole" in told


def test_a_size_outside_the_curve_is_compared_with_the_nearest_constant(invented):
    embedding = next(a.point for a in invented.ablation.variants() if a.question == "embedding")
    alter(invented, invented.slice_request(embedding), lambda v: {**v, "parameters": 10**6})
    rows = ablations.ablation_table(invented)
    phrase = ablations.phrase(rows[rows["network"] == embedding.label].iloc[0])
    assert "outside the constant curve, against the nearest constant network, of 140.0 M" in phrase


def test_a_sign_that_depends_on_the_calibration_is_said(invented):
    assert "the same in all" in ablations.seed_prose(ablations.seed_table(invented))
    first = next(a for a in invented.ablation.variants() if a.question == "calibration seed")
    alter(invented, invented.perplexity_request(first.point, "sotu"), shift_nll(0.2))
    assert "sign depends" in ablations.seed_prose(ablations.seed_table(invented))


def test_every_page_and_figure_comes_from_these_results(invented):
    comparison = perplexity.perplexity_comparison(invented)
    perplexity.sweep_figure(comparison)
    task_report.accuracy_figure(task_report.task_table(invented))
    ablations.lr_figure(ablations.lr_table(invented))
    single_layer.figure(single_layer.table(invented))
    ablations.shuffle_figure(ablations.shuffle_table(invented))
    deviations = pages.deviations_block(invented)
    assert "nan" not in deviations
    assert "constant, SP 30% stores 140.0 M parameters instead of 170.0 M" in deviations
    before = pages.claims_block(invented)
    request = invented.perplexity_request(points(invented, "dynamic")[0], "sotu")
    alter(invented, request, shift_nll(-0.3))
    assert pages.claims_block(invented) != before


@pytest.mark.parametrize("others", [TASKS, {}])
def test_generation_tasks_have_a_row_and_no_part_in_averages(others, tmp_path):
    tasks = {**others, "gsm8k_cot": 4}
    study = Invented(load("smoke", {**SETTINGS, "tasks": tasks}), Store(tmp_path), "cpu", True)
    generated = {"metric": "exact_match,flexible-extract", "score": [1.0, 0.0, 0.0, 1.0]}
    nothing = {"correct": None, "margin": None, "acc": None, "acc_norm": None}
    value = study.value
    study.value = lambda request: {
        **value(request),
        **({**generated, **nothing} if request.config.get("task") == "gsm8k_cot" else {}),
    }
    study.fill()
    rows = task_report.task_table(study)
    shown = rows[rows["task"] == "gsm8k_cot (exact_match,flexible-extract)"]
    assert set(shown["accuracy"]) == {50.0}
    assert shown["margin"].isna().all()
    assert ("average" in set(rows["task"])) == bool(others)
    assert task_report.accuracy_view(rows).shape[0] == len(tasks) + bool(others) + 2
    compared = task_report.task_comparison(study)
    assert set(compared.get("task", [])) == ({*others, "average"} if others else set())
    task_report.accuracy_figure(rows)
    assert "nan" not in claims.claims_table(study).to_markdown() + claims.findings(study)
    if others:
        without = Invented(load("smoke", SETTINGS), Store(tmp_path / "without"), "cpu", True).fill()
        assert claims.findings(study) == claims.findings(without)
        old = task_report.task_table(without)
        new = rows[~rows["task"].str.startswith("gsm8k")].reset_index(drop=True)
        pd.testing.assert_frame_equal(new, old, check_dtype=False)


def test_requests_of_the_ablations_differ_in_what_they_vary(invented):
    """No two variants ask for the same network, and each differs from its reference."""
    networks = [a.point.network for a in invented.ablation.variants()]
    networks += [point.network for point in invented.ablation.ablated()]
    keys = {Request("network", network).key for network in networks}
    assert len(keys) == len(networks)
