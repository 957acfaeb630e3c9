"""What notebook 07 compares: sizes that are equal, choices that read no test window, its tables."""

from math import exp
from statistics import fmean

import pytest

from dynslice.core import assets, paths
from dynslice.core.errors import RequestError
from dynslice.experiment.agenda import describe, needs
from dynslice.experiment.kinds import KINDS
from dynslice.experiment.profile import load
from dynslice.experiment.requests import Point
from dynslice.experiment.study import Study
from dynslice.experiment.validate import check_settings
from dynslice.report import equal_size, statistics, style

WANTED = {
    "tasks": {"piqa": 4},
    "task_slice_percentages": [],
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
    "beyond_schedules": ["lr", "sensitivity"],
    "beyond_candidates": ["first", "embedding", "search"],
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


def every(study):
    return [p for sp in (0.25, 0.5) for p in study.beyond.contest(sp)] + study.beyond.variants(0.5)


def test_no_network_stores_more_than_the_constant_one(study):
    for point in [*every(study), *study.beyond.recovered(0.5)]:
        budget = study.get(
            study.slice_request(study.beyond.contest(point.slice_percentage)[0])
        ).value
        stored = study.get(study.slice_request(point)).value
        assert stored["parameters"] <= budget["parameters"]
        if point.schedule == "constant":
            assert stored["parameters"] == budget["parameters"]


def test_choices_read_no_test_window():
    """Test windows are asked of the networks that are compared, and of nothing else."""
    study = Study.open("smoke", **WANTED)
    compared = [p.network for sp in (0.25, 0.5) for p in study.beyond.contest(sp)]
    compared += [p.network for p in study.beyond.recovered(0.5)] + [None]
    evidence = [n for r in study.beyond.requests() for n in needs(r)]
    assert {request.kind for request in evidence} == {"lr", "places", "search"}
    for request in [*study.beyond.requests(), *evidence]:
        if request.config.get("split") == "test" or request.kind == "task":
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


def test_what_schedules_rest_on_is_not_what_ranks_them():
    study = Study.open("smoke", **{**WANTED, "selection_windows": 5})
    kinds = {"places", "search"}
    skips = [r.config["skip"] for r in study.beyond.evidence_requests() if r.kind in kinds]
    assert skips == [5] * 3


def test_evidence_is_compared_with_the_record(study):
    places, search = study.beyond.places_request(0.5), study.beyond.search_request(0.5)
    values = KINDS["places"].quoted(study.get(places).value)
    assert len(values) == 1 + 2 * len(study.get(places).value["places"])
    losses = study.get(places).value["places"][1]["losses"][0]
    assert values["perplexity, mlp of layer 0 cut by 0.3"] == pytest.approx(exp(fmean(losses)))
    tried = [step["loss"] for step in study.get(search).value["tried"]]
    best = {"perplexity, best plan tried": exp(min(tried))}
    assert KINDS["search"].quoted(study.get(search).value) == best


def test_labels_and_descriptions_differ(study):
    points = [*every(study), *study.beyond.recovered(0.5)]
    assert len({point.label for point in points}) == len(points)
    names = [equal_size.name(p) for p in [*study.beyond.contest(0.5), *study.beyond.variants(0.5)]]
    assert len(set(names)) == len(names)
    said = describe(study.slice_request(study.beyond.recovered(0.5)[1]))
    assert said == "slice constant SP 0.5 with compensation with recovery"
    assert describe(study.beyond.search_request(0.5)).endswith("constant SP 0.5")


def test_the_table_compares_with_plain_constant_slicing(study):
    table = equal_size.contest_table(study)
    assert len(table) == 2 * 6 * len(study.profile.eval_texts)
    plain = table[table["network"] == "constant"]
    assert (plain[["perplexity (%)", "low", "high"]] == 0).all(axis=None)
    row = table[(table["network"] == "lr, compensated") & (table["SP"] == 0.5)].iloc[0]
    by_name = {equal_size.name(point): point for point in study.beyond.contest(0.5)}
    text = study.profile.eval_texts[0]
    ours, reference = by_name["lr, compensated"], by_name["constant"]
    expected = statistics.perplexity_change(study, ours, reference, text)
    assert row["perplexity (%)"] == expected.estimate
    ratio = row["perplexity"] / table.iloc[6]["perplexity"]
    assert 100 * (ratio - 1) == pytest.approx(expected.estimate)


def test_what_it_costs(study):
    costs = equal_size.cost_table(study)
    compensated = costs["network"].str.contains("compensated")
    assert set(costs["calibration passes"][compensated]) == {2}
    assert set(costs["calibration passes"][~compensated]) == {1}
    assert costs["evidence (s)"][costs["network"] == "constant"].isna().all()
    assert (costs["evidence (s)"][costs["network"] == "sensitivity"] > 0).all()


def test_each_schedule_has_one_line_of_widths(study):
    (axis,) = equal_size.widths_figure(study).axes
    names = [text.get_text() for text in axis.get_legend().get_texts()]
    assert names == ["constant", "lr", "sensitivity", "first", "embedding", "search"]
    by_name = dict(zip(names, axis.lines, strict=True))
    d = study.get(study.slice_request(study.beyond.contest(0.5)[0])).value["widths"][-1]
    assert set(by_name["first"].get_ydata()[:2]) == {64}
    assert set(by_name["constant"].get_ydata()) == {d} == {32}
    assert len(equal_size.places_figure(study).axes) == 1


def test_sentences_say_the_direction_that_the_interval_shows(study):
    prose = equal_size.question_prose(study)
    by_name = {equal_size.name(point): point for point in study.beyond.contest(0.5)}
    pair = by_name["lr, compensated"], by_name["constant, compensated"]
    change = statistics.perplexity_change(study, *pair, study.profile.eval_texts[0])
    assert f"{change.format('%')} (**{change.direction}**)" in prose
    variants = equal_size.variant_table(study)
    assert len(variants) == 6 + 2 + 6 + 2
    best = variants.sort_values("validation perplexity").iloc[0]["network"]
    assert f"**{best}** has the lowest" in equal_size.choice_prose(study, variants)
    recovery = equal_size.recovery_table(study)
    assert len(recovery) == 4 * len(study.profile.eval_texts)


def test_a_profile_that_asks_for_nothing_shows_nothing(study, monkeypatch):
    bare = Study.open("smoke", **{**WANTED, "beyond_slice_percentages": []})
    assert bare.beyond.requests() == []
    for table in (
        equal_size.contest_table(bare),
        equal_size.accuracy_table(bare),
        equal_size.cost_table(bare),
        equal_size.variant_table(bare),
        equal_size.recovery_table(bare),
    ):
        assert table.empty
    assert equal_size.question_prose(bare) == style.NONE
    assert equal_size.choice_prose(bare, equal_size.variant_table(bare)) == style.NONE
    assert equal_size.places_figure(bare) is None
    assert equal_size.readme_prose(bare) == ""


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"beyond_ridges": [0.1]}, "names 0.1, which is compared anyway"),
        ({"beyond_candidates": ["lr"]}, "names lr, which is compared anyway"),
        ({"beyond_calibration_windows": [8]}, "names 8, which is compared anyway"),
        ({"beyond_slice_percentages": [1.0]}, "slice share 1.0 is outside 0 to 1"),
        ({"beyond_schedules": ["best"]}, "beyond_schedules"),
        ({"beyond_ridge": 0.0}, "beyond_ridge"),
        ({"sensitivity_reach": 1.0}, "sensitivity_reach"),
    ],
)
def test_settings_that_do_not_fit_are_refused(setting, sentence):
    with pytest.raises(RequestError, match=sentence):
        load("smoke", {**WANTED, **setting})


def test_without_validation_windows_nothing_else_is_tried():
    study = Study.open("smoke", **{**WANTED, "selection_windows": None})
    assert study.beyond.variants(0.5) == []
    assert len(study.beyond.contest(0.5)) == 6


def test_a_text_without_validation_split_measures_no_schedule(tmp_path):
    """It would be the text that is reported."""
    text = tmp_path / "own.txt"
    text.write_text("Words that are evaluated. " * 400)
    own = {**WANTED, "eval_texts": [str(text)], "eval_split": None, "selection_windows": None}
    with pytest.raises(RequestError, match="is what schedules of notebook 07 are measured on"):
        check_settings(Study.open("smoke", **own).profile)
    check_settings(Study.open("smoke", **{**own, "beyond_slice_percentages": []}).profile)


def test_requests_of_networks_without_extras_are_as_they_were(study):
    """Their results are those of the main comparison."""
    plain = study.beyond.contest(0.25)[0]
    main = next(p for p in study.points() if p.schedule == "constant")
    assert isinstance(plain, Point)
    assert study.slice_request(plain).key == study.slice_request(main).key
