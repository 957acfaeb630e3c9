"""Several models next to each other: which they are, and what is said of each of them."""

from dataclasses import replace

import pytest

from dynslice.core import assets, paths
from dynslice.experiment.across import Across
from dynslice.experiment.requests import DENSE
from dynslice.experiment.study import Study
from dynslice.report import across as report
from dynslice.report import answer, claims, equal_size
from dynslice.report.statistics import Estimate

MODELS = ["embedded:tiny-random", "embedded:tiny-llama-3"]
SMALL = {
    "instead_slice_percentages": [],
    "slice_bases": [0.0],
    "tasks": {},
    "speed_slice_percentages": [],
    "recovery_steps": 0,
}
SMALL |= {"ablation_slice_percentage": None, "single_layer_slice": None, "beyond_plain": False}
SMALL |= {"beyond_candidates": [], "beyond_basis_layers_tried": [], "beyond_shuffles": 0}
SMALL |= {"beyond_ridges": [], "beyond_calibration_seeds": [], "eval_windows": 4}


@pytest.fixture(scope="module")
def two_models(tmp_path_factory):
    """Two tiny models by the smoke profile, little of it, measured."""
    assets.fetch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "OUTPUT", tmp_path_factory.mktemp("across"))
        across = Across.open("smoke", device="cpu", models=MODELS, name="small", **SMALL)
        across.ensure()
        yield across


def test_a_profile_of_two_models_has_a_study_and_a_column_of_claims_for_each(two_models):
    names = ["tiny-random", "tiny-llama-3"]
    assert two_models.name == "small"
    assert [study.name for study in two_models.studies] == [f"small/{name}" for name in names]
    table = report.claims_table(two_models)
    assert list(table.columns[-2:]) == names
    assert set(report.lr_table(two_models)["model"]) == set(names)
    assert set(report.change_table(two_models)["network"]) == {report.DYNAMIC, report.RECIPE}


def test_the_table_holds_the_numbers_of_each_study(two_models):
    table = report.model_table(two_models).set_index(["model", "measured"])
    for study in two_models.studies:
        constant = study.design.point(study.design.constant(0.25))
        row = table.loc[(report.name(study), "perplexity, wikipedia")]
        assert row["SliceGPT"] == study.perplexity(constant, "wikipedia")
        assert table.loc[(report.name(study), "parameters (M)"), "dense"] == pytest.approx(
            study.get(study.slice_request(constant)).value["parameters_dense"] / 1e6
        )
    figure = report.model_figure(report.model_table(two_models))
    assert len(figure.axes) == len(MODELS)


def test_the_answer_has_a_column_for_each_model_and_says_how_little_it_rests_on(two_models):
    told, names = answer.answer(two_models), ["tiny-random", "tiny-llama-3"]
    rises, table = [], answer.change_table(two_models).set_index("change at equal stored size")
    for study in two_models.studies:
        constant = study.design.point(study.design.constant(answer.headline(study)))
        text = study.profile.eval_texts[0]
        ratio = study.perplexity(constant, text) / study.perplexity(DENSE, text)
        rises.append(100 * (ratio - 1))
        for step, change in equal_size.steps(study, 0.25).items():
            said = f"SP 25%: {change.told('%')}"
            assert table.loc[f"step: {step}", report.name(study)] == said
    assert list(table.columns) == names
    assert "With 25% of the stream cut" in told
    low, high = (f"{rise:.0f}" for rise in sorted(rises))
    span = low if low == high else f"{low} to {high}"
    assert f"higher by {span} % on {text}" in told
    sizes = [f"{study.size(DENSE) / 1e9:.2g}" for study in two_models.studies]
    assert f"2 models of {' and '.join(sizes)} billion parameters" in told
    alone = answer.answer(Across(two_models.name, two_models.studies[:1], []))
    assert f"higher by {rises[0]:.0f} % on {text}" in alone and "**Limits**: one model of" in alone


def test_the_answer_in_short_changes_with_a_doctored_result():
    study = Study.open("standard", from_record=True)
    assert "on 1 of 1 models that were rounded" in answer._lead([study])
    victim = study.perplexity_request(answer._others(study)["int8"], "wikipedia").key
    original = study.store.get

    def get(request):
        result = original(request)
        if request.key == victim:
            result.value["perplexity"] *= 100
        return result

    study.store.get = get
    assert "on 0 of 1 models that were rounded" in answer._lead([study])
    assert "lower perplexity than SliceGPT's on 1 of 1 models" in answer._lead([study])


def test_the_answer_is_given_at_one_slice_percentage_or_not_at_all(two_models):
    assert answer.applies(two_models)
    assert not answer.applies(Across("both", [*two_models.studies, other_share()], []))


def other_share():
    return Study.open("smoke", device="cpu", **SMALL, slice_percentages=[0.5])


def test_doctored_results_of_one_model_change_its_verdicts_and_no_others(two_models):
    before = report.claims_table(two_models)
    study = two_models.studies[1]
    dynamic = report.networks(study, 0.25)[report.DYNAMIC]
    result = study.get(study.perplexity_request(dynamic, "wikipedia"))
    lower = [nll - 1.0 for nll in result.value["nll"]]
    study.store.put(replace(result, value={**result.value, "nll": lower}))
    try:
        after = report.claims_table(two_models)
    finally:
        study.store.put(result)
    changed = (before != after).any()
    assert list(changed[changed].index) == ["tiny-llama-3"]
    lower = after[after["measured on"] == "wikipedia"]["tiny-llama-3"]
    assert all(said.startswith(claims.SUPPORTED + ":") for said in lower)
    assert report.claims_table(two_models).equals(before)


def test_without_validation_windows_the_dynamic_network_is_fixed_beforehand():
    study = Study.open("quick", from_record=True)
    assert study.profile.selection_windows is None
    larger = [p for p in study.points() if p.schedule == "dynamic" and p.slice_base > 0]
    favoured = {study.perplexity_request(point, "sotu").key for point in larger}
    original = study.store.get

    def get(request):
        result = original(request)
        if request.key in favoured:  # the best in hindsight
            result.value["perplexity"] /= 2
            result.value["nll"] = [nll - 1.0 for nll in result.value["nll"]]
        return result

    study.store.get = get
    bases = [report.networks(study, sp)[report.DYNAMIC].slice_base for sp in (0.2, 0.3)]
    assert bases == [min(study.profile.slice_bases)] * 2


def test_recorded_profiles_stand_next_to_it_and_absent_ones_are_named():
    across = Across.open("smoke", device="cpu", next_to=["quick", "full"])
    assert [study.name for study in across.studies] == ["smoke+next_to=quick,full", "quick"]
    assert across.studies[1].from_record
    assert "`full`" in report.absent_prose(across)


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ((-9.0, -12.0, -6.0), claims.SUPPORTED),
        ((-3.0, -5.0, -1.0), claims.DIRECTION),
        ((-1.0, -3.0, 1.0), claims.NOT_SUPPORTED),  # the published 7 % would have been seen
        ((-1.0, -9.0, 7.0), claims.UNSEEN),
        ((4.0, 1.0, 7.0), claims.NOT_SUPPORTED),
    ],
)
def test_what_the_interval_cannot_exclude_could_not_have_been_seen(change, verdict):
    assert claims.verdict(Estimate(*change), -7) == verdict
    assert claims.verdict(Estimate(-change[0], -change[2], -change[1]), 7) == verdict
