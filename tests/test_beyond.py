"""What notebook 07 compares: sizes that are equal, choices that read no test window, its tables."""

import re
from itertools import pairwise

import numpy as np
import pytest
from scipy import stats

from dynslice.core import assets, paths
from dynslice.core.errors import RequestError
from dynslice.experiment.agenda import describe, needs
from dynslice.experiment.equal_size import BEST_RECIPE, LEVERS, LR, SHARED, SLICEGPT, UNTIED
from dynslice.experiment.profile import load, percent
from dynslice.experiment.requests import DENSE
from dynslice.experiment.study import Study
from dynslice.report import equal_size, statistics, style, variants

WANTED = {
    "tasks": {"piqa": 4},
    "task_slice_percentages": [0.5],
    "task_slice_bases": [],
    "speed_slice_percentages": [],
    "lr_compare_texts": [],
    "lr_max_tokens": 512,
    "slice_percentages": [0.25],
    "slice_bases": [],
    "ablation_slice_percentage": None,
    "ablation_lr_tokens": [],
    "ablation_last_layers": [],
    "single_layer_slice": None,
    "beyond_slice_percentages": [0.25, 0.5],
    "beyond_basis_layers_tried": [1, "all"],
    "beyond_candidates": ["first", "embedding", "constant"],
    "beyond_slice_bases": [0.1],
    "beyond_shuffles": 2,
    "beyond_ridges": [1.0],
    "beyond_calibration_windows": [4],
}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    assets.fetch()
    folder = tmp_path_factory.mktemp("beyond")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "OUTPUT", folder)
        study = Study.open("smoke", device="cpu", **WANTED)
        study.ensure(study.beyond.requests())
        yield study


SIZES = WANTED["beyond_slice_percentages"]
LORA = "2 steps of LoRA"


def every(study):
    return [p for sp in SIZES for p in study.beyond.contest(sp)] + study.beyond.variants(0.5)


def rungs_of(study, sp=0.5):
    """The rungs of a size by name."""
    return {point.name: point for point in study.beyond.contest(sp)}


def test_no_network_stores_more_than_the_constant_one_with_its_table(study):
    """Nor much less: widths come in steps, and each network takes the largest that fits."""
    for point in every(study):
        slicegpt = rungs_of(study, point.slice_percentage)[SLICEGPT]
        budget = study.get(study.slice_request(slicegpt)).value
        plan = slicegpt.network["plan"]
        assert (plan["schedule"], plan["layout"]) == ("constant", {"keep_tied": True})
        assert 0.9 * budget["parameters"] < study.size(point) <= budget["parameters"]
    with_lora = rungs_of(study)[LORA]
    assert study.size(with_lora) == study.size(rungs_of(study)[BEST_RECIPE])


def test_each_rung_has_one_lever_more(study):
    for sp in SIZES:
        rungs = study.beyond.contest(sp)
        assert [point.name for point in rungs] == [*LEVERS, LORA]
        for before, point in pairwise(rungs[1:]):
            a, b = before.network, point.network
            changed = [key for key in a | b if a.get(key) != b.get(key)]
            assert len(changed) == 1
    first, second = (rungs_of(study)[rung] for rung in (UNTIED, SLICEGPT))
    sizes = [statistics.sizes(study, point) for point in (first, second)]
    assert sizes[0][statistics.SIZE] == sizes[0][statistics.UNTIED]
    assert sizes[1][statistics.SIZE] < sizes[1][statistics.UNTIED]


def test_a_variant_changes_one_thing_of_the_rung_that_it_is_compared_with(study):
    rungs, table = rungs_of(study), variants.variant_table(study).set_index("network")
    for point in study.beyond.variants(0.5):
        varied = rungs[table.loc[point.name, "varies"]]
        a, b = varied.network, point.network
        assert len([key for key in a | b if a.get(key) != b.get(key)]) == 1
        row = table.loc[point.name]
        change = statistics.selection_change(study, point, varied)
        assert tuple(row[["one change (%)", "low, change", "high, change"]]) == change
    assert set(table["varies"]) == {"-", SLICEGPT, SHARED, BEST_RECIPE}


def test_draws_differ_in_their_calibration_windows_alone(study):
    (recipe, slicegpt), (ours, theirs) = study.beyond.draws(0.5)
    rungs = rungs_of(study)
    assert (recipe, slicegpt) == (rungs[BEST_RECIPE], rungs[SLICEGPT])
    for point, again in ((recipe, ours), (slicegpt, theirs)):
        a, b = point.network, again.network
        assert a | {"calibration": {**a["calibration"], "seed": 1}} == b
        assert a["calibration"]["seed"] == 42


def test_ordinary_checkpoints_store_no_more_than_the_published_layout(study):
    published, *ordinary = study.beyond.plain(0.5)
    budget = study.get(study.slice_request(published)).value
    assert budget["parameters"] == budget["parameters_untied"]
    for point in ordinary:
        value = study.get(study.slice_request(point)).value
        assert 0.9 * budget["parameters"] < value["parameters"] <= budget["parameters"]
        assert len(set(value["widths"])) == 1
    assert [p.network.get("compensation") for p in ordinary] == [None, {}]
    table = equal_size.plain_table(study)
    assert len(table) == 3 * len(study.profile.eval_texts)  # at the last of the sizes
    change = statistics.perplexity_change(study, ordinary[1], published, table["text"].iloc[-1])
    assert table["perplexity (%)"].iloc[-1] == change.estimate


def test_choices_read_no_test_window():
    """Test windows are asked of rungs, their draws and ordinary checkpoints, of nothing else."""
    study = Study.open("smoke", **WANTED)
    compared = [p.network for sp in SIZES for p in study.beyond.contest(sp)] + [None]
    compared += [p.network for sp in SIZES for pair in study.beyond.draws(sp) for p in pair]
    compared += [p.network for sp in SIZES for p in study.beyond.plain(sp)]
    evidence = [n for r in study.beyond.requests() for n in needs(r)]
    assert {request.kind for request in evidence} == {"lr"}
    for request in [*study.beyond.requests(), *evidence]:
        if request.config.get("split") == "test" or request.kind in ("task", "speed"):
            assert request.config["slice"] in compared
        calibration = (request.config.get("slice") or request.config).get("calibration", {})
        assert calibration.get("split") in (None, "train")
    for request in evidence:
        assert request.config["split"] == "validation"


def test_what_plans_rest_on_belongs_to_the_requests():
    """So that it is counted, recorded, and compared with the record."""
    for name in ("smoke", "quick", "standard", "full"):
        requests = Study.open(name).requests()
        keys = {request.key for request in requests}
        assert {needed.key for request in requests for needed in needs(request)} <= keys
        assert len(keys) == len(requests)


def test_labels_and_descriptions_differ(study):
    points = every(study)
    assert len({point.label for point in points}) == len(points)
    names = [p.name for p in [*study.beyond.contest(0.5), *study.beyond.variants(0.5)]]
    assert len(set(names)) == len(names) == 6 + 16
    said = describe(study.slice_request(study.beyond.contest(0.5)[-1]))
    assert said == "slice lr SP 0.5 2 layers a basis with compensation with recovery seed 42"


def test_the_table_compares_with_the_rung_before_and_with_slicegpt(study):
    table, text = equal_size.ladder_table(study), study.profile.eval_texts[0]
    assert len(table) == 2 * 7 * len(study.profile.eval_texts)
    step, whole = (["this step (%)", "low, step", "high, step"], ["against SliceGPT (%)"])
    assert table[table["network"].isin(["dense", UNTIED])][step].isna().all(axis=None)
    assert (table[table["network"] == SLICEGPT][whole] == 0).all(axis=None)
    rungs, here = rungs_of(study), table[table["SP"] == 0.5].set_index("network")
    assert here.loc["dense", "perplexity"] == study.perplexity(DENSE, text)
    for before, name in pairwise(rungs):
        change = statistics.perplexity_change(study, rungs[name], rungs[before], text)
        assert tuple(here.loc[name, step]) == change
        ratio = here.loc[name, "perplexity"] / here.loc[before, "perplexity"]
        assert here.loc[name, step[0]] == pytest.approx(100 * (ratio - 1))
        ratio = here.loc[name, "perplexity"] / here.loc[SLICEGPT, "perplexity"]
        assert here.loc[name, whole[0]] == pytest.approx(100 * (ratio - 1))


def test_accuracy_is_compared_with_slicegpt(study):
    table = equal_size.accuracy_table(study).set_index(["SP", "network"])
    rungs, tasks = rungs_of(study), ["piqa"]
    change = statistics.accuracy_change(study, rungs[LR], rungs[SLICEGPT], tasks)
    assert tuple(table.loc[(0.5, LR), ["accuracy (points)", "low", "high"]]) == change
    assert table.loc[(0.5, SLICEGPT), "accuracy (points)"] == 0
    gap = table.loc[(0.5, LR), "accuracy (%)"] - table.loc[(0.5, SLICEGPT), "accuracy (%)"]
    assert gap == pytest.approx(change.estimate)


def test_what_it_costs(study):
    costs = equal_size.cost_table(study).set_index(["SP", "network"])
    assert costs["evidence (s)"].isna().tolist() == [True, True, *[False] * 4] * 2
    assert costs.loc[(0.5, LR), "evidence (s)"] == study.get(study.lr_request()).seconds
    tuned = study.get(study.slice_request(rungs_of(study)[LORA]))
    assert costs.loc[(0.5, LORA), "slicing (s)"] == tuned.seconds
    share = costs.loc[(0.5, SLICEGPT), "parameters (M)"] / (study.size(DENSE) / 1e6)
    assert costs.loc[(0.5, SLICEGPT), "of dense (%)"] == pytest.approx(100 * share)


def test_speed_is_the_gain_over_dense(study):
    speeds = equal_size.speed_table(study).set_index(["SP", "network"])
    (request,) = study.beyond.speed_requests(rungs_of(study)[BEST_RECIPE])
    value = study.get(request).value
    dense, sliced = (np.median(value["decode_seconds"][name]) for name in ("dense", "sliced"))
    assert speeds.loc[(0.5, BEST_RECIPE), "decode (x)"] == pytest.approx(dense / sliced)
    assert study.beyond.speed_requests(rungs_of(study)[LORA]) == []
    assert (speeds.loc[(0.5, LORA)] == speeds.loc[(0.5, BEST_RECIPE)]).all()
    assert (speeds["prefill, counted (x)"] > 1).all()


def test_each_network_has_one_line_of_widths(study):
    (axis,) = variants.widths_figure(study).axes
    names = [text.get_text() for text in axis.get_legend().get_texts()]
    tried = [f"{name} widths, shared bases" for name in WANTED["beyond_candidates"]]
    assert names == [UNTIED, SLICEGPT, LR, SHARED, *tried]
    lines = dict(zip(names, axis.lines, strict=False))
    width = study.get(study.slice_request(rungs_of(study)[SLICEGPT])).value["widths"][-1]
    assert set(lines[SLICEGPT].get_ydata()) == {width} == {32}
    assert set(lines["first widths, shared bases"].get_ydata()[:2]) == {64}
    # Four layers, the first alone and then two each: a border before layers 1 and 3.
    borders = [line.get_xdata()[0] + 0.25 for line in axis.lines[len(names) :]]
    assert borders == [1, 3]


def test_the_figure_is_a_waterfall_per_size_and_text(study):
    """Each bar goes from the rung before to its own, the last one ends at the last rung."""
    table = equal_size.ladder_table(study)
    axes, texts = equal_size.ladder_figure(table).axes, study.profile.eval_texts
    where = [(sp, text) for sp in SIZES for text in texts]
    wanted = [f"size of SP {percent(sp)}, {text}" for sp, text in where]
    assert [axis.get_title(loc="left") for axis in axes] == wanted
    for axis, (sp, text) in zip(axes, where, strict=True):
        here = table[(table["SP"] == sp) & (table["text"] == text)]
        levels = [*here[here["network"] != "dense"]["perplexity"]]
        ends = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in axis.patches]
        assert ends == [pytest.approx(pair) for pair in pairwise(levels)]
        assert axis.lines[0].get_xdata()[0] == study.perplexity(DENSE, text)
        assert axis.get_xscale() == "log"
    labels = [label.get_text() for label in axes[0].get_yticklabels()]
    assert labels == [*LEVERS, LORA]


def test_steps_are_said_with_their_changes_and_what_they_show(study):
    rungs, text = rungs_of(study), study.profile.calibration_text
    sp, _ = equal_size.last_ladder(study)
    said = equal_size.steps(study, sp)
    for before, name in pairwise([SLICEGPT, LR, SHARED, BEST_RECIPE]):
        change = statistics.perplexity_change(study, rungs[name], rungs[before], text)
        unseen = change.low <= 0 <= change.high
        assert said[name] == change
        told = f"{name} {change.format('%')}{' (no difference shown)' if unseen else ''}"
        assert told in equal_size.steps_prose(study, sp)


def test_the_choice_is_that_of_validation_windows_without_fine_tuning(study):
    table = variants.variant_table(study)
    assert len(table) == 6 + 16
    plain = table[table["network"] != LORA]
    best = plain.sort_values("validation perplexity").iloc[0]["network"]
    said = variants.choice_prose(study, table)
    assert f"Of {len(plain)} networks" in said
    assert f"**{best}** has the lowest" in said
    assert re.search(r"Of 16 variants \d+ have a higher perplexity", said)
    assert re.search(r"Of 2 random orders .* on shared bases, \d have a higher", said)
    low = table.assign(**{"validation perplexity": 0.0})
    is_lora = low["network"] == LORA
    won = table.where(~is_lora, low)  # however good, it is not what is chosen
    assert variants.choice_prose(study, won) == said


# Draws of the calibration windows


def test_an_interval_over_draws_is_that_of_resampling_draws_and_then_windows():
    rng = np.random.default_rng(5)
    draws, windows = 3, 12
    samples = rng.normal(0, 1, windows) + rng.normal(0, 0.5, (draws, 1))
    samples = samples + 0.2 * rng.normal(size=samples.shape)
    direct = []
    for _ in range(8000):
        taken, read = rng.integers(draws, size=draws), rng.integers(windows, size=windows)
        direct.append(np.mean([np.mean([samples[d, w] for w in read]) for d in taken]))
    found = statistics.mean_over_draws(samples)
    assert found.estimate == pytest.approx(samples.mean())
    width = found.high - found.low
    assert np.quantile(direct, [0.025, 0.975]) == pytest.approx(found[1:], abs=0.05 * width)


def test_draws_that_differ_widen_an_interval_and_draws_that_agree_do_not():
    """Where windows say the same the interval is that of two draws; where draws do, of windows."""
    apart = np.repeat([[-0.3], [0.1]], 20, axis=1)
    assert statistics.mean_over_draws(apart) == pytest.approx((-0.1, -0.3, 0.1))
    windows = np.random.default_rng(6).normal(size=400)
    alike = statistics.mean_over_draws(np.tile(windows, (3, 1)))
    normal = 2 * stats.norm.ppf(0.975) * windows.std() / np.sqrt(len(windows))
    assert alike.high - alike.low == pytest.approx(normal, rel=0.05)


def test_the_draws_of_a_size_stand_above_all_of_them(study):
    table, text = equal_size.draws_table(study), study.profile.eval_texts[0]
    here = table[table["SP"] == 0.5]
    assert [*here["draw"]] == ["42", "1", "all"]
    pairs = study.beyond.draws(0.5)
    changes = [statistics.perplexity_change(study, *pair, text) for pair in pairs]
    assert [*here["perplexity (%)"]][:2] == [change.estimate for change in changes]
    losses = [np.log1p(change.estimate / 100) for change in changes]
    over_all = statistics.change_over_draws(study, pairs, text)
    assert over_all.estimate == pytest.approx(100 * np.expm1(np.mean(losses)))
    assert tuple(here.iloc[-1][["perplexity (%)", "low", "high"]]) == over_all
    said = equal_size.draws_prose(table)
    assert said.startswith("Over 2 draws")
    assert f"at SP 50% on {text} {over_all.format('%')}" in said
    assert "over all draws the draws of calibration windows too" in style.interval_note(table)


def test_a_profile_that_asks_for_nothing_shows_nothing(study):
    bare = Study.open("smoke", **{**WANTED, "beyond_slice_percentages": []})
    assert bare.beyond.requests() == []
    for table in (
        equal_size.ladder_table(bare),
        equal_size.accuracy_table(bare),
        equal_size.cost_table(bare),
        equal_size.speed_table(bare),
        equal_size.draws_table(bare),
        variants.variant_table(bare),
    ):
        assert table.empty
    assert equal_size.draws_prose(equal_size.draws_table(bare)) == style.NONE
    assert variants.choice_prose(bare, variants.variant_table(bare)) == style.NONE


def test_one_draw_has_no_table(study):
    one = Study.open("smoke", device="cpu", **{**WANTED, "beyond_calibration_seeds": []})
    assert equal_size.draws_table(one).empty


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"beyond_basis_layers_tried": [2]}, "names 2, which is compared anyway"),
        ({"beyond_candidates": ["lr"]}, "names lr, which is compared anyway"),
        ({"beyond_slice_bases": [0.0]}, "names 0.0, which is compared anyway"),
        ({"beyond_calibration_seeds": [42]}, "names 42, which is compared anyway"),
        ({"beyond_calibration_windows": [8]}, "names 8, which is compared anyway"),
        ({"beyond_slice_percentages": [1.0]}, "slice share 1.0 is outside 0 to 1"),
        ({"beyond_candidates": ["best"]}, "beyond_candidates"),
        ({"beyond_basis_layers": 0}, "beyond_basis_layers"),
        ({"beyond_ridges": [0.0]}, "beyond_ridges"),
    ],
)
def test_settings_that_do_not_fit_are_refused(setting, sentence):
    with pytest.raises(RequestError, match=sentence):
        load("smoke", {**WANTED, **setting})


def test_without_validation_windows_nothing_else_is_tried():
    study = Study.open("smoke", **{**WANTED, "selection_windows": None})
    assert study.beyond.variants(0.5) == []
    assert len(study.beyond.contest(0.5)) == 6


def test_slicegpt_is_the_constant_network_of_the_main_comparison(study):
    """Its results are measured once."""
    main = next(p for p in study.points() if p.schedule == "constant")
    slicegpt = rungs_of(study, 0.25)[SLICEGPT]
    assert study.slice_request(slicegpt).key == study.slice_request(main).key
