"""Widths from scores: the formulas of the paper, the cap, the rounding, the counts."""

import json
import random
from dataclasses import replace

import pytest

from dynslice.core.errors import RequestError
from dynslice.method.controls import matched, shuffled, single, with_embedding
from dynslice.method.plan import ModelDims, SlicePlan, constant, dynamic
from dynslice.method.scores import lr_of, normalise

SMOLLM2 = ModelDims(
    hidden_size=576,
    layers=30,
    vocab_size=49152,
    reads=(960, 3072),
    writes=(576, 1536),
    fixed=28311552,
    dense_parameters=134515008,
)
SMALL = ModelDims(
    hidden_size=64,
    layers=4,
    vocab_size=97,
    reads=(128, 256),
    writes=(64, 128),
    fixed=6208,
    dense_parameters=100000,
)


def random_requests(count):
    """(LR, SP, SB) with every kind of LR: smooth, skewed, negative, nearly flat."""
    rng = random.Random(5)
    for _ in range(count):
        power, scale = rng.choice([0.2, 1, 8]), rng.choice([1e-6, 1, 50])
        lr = [scale * (rng.random() ** power - 0.3) for _ in range(SMOLLM2.layers)]
        sp = rng.uniform(0, 1 - 8 / SMOLLM2.hidden_size)
        yield lr, sp, sp * rng.choice([0, rng.random(), 1])


def mean(values):
    return sum(values) / len(values)


def exact_widths(plan):
    return [plan.shape.hidden_size * (1 - share) for share in plan.final_slice]


def test_mean_final_slice_is_the_slice_percentage():
    for lr, sp, sb in random_requests(300):
        assert abs(mean(dynamic(SMOLLM2, lr, sp, sb).final_slice) - sp) <= 1e-12


def test_every_final_slice_lies_between_base_and_limit():
    for lr, sp, sb in random_requests(300):
        slices = dynamic(SMOLLM2, lr, sp, sb).final_slice
        assert sb - 1e-12 <= min(slices) <= max(slices) <= 1 - 8 / SMOLLM2.hidden_size


def test_final_slice_follows_the_papers_formula_where_nothing_is_capped():
    lr, sp, sb = [0.2 + 0.02 * i for i in range(30)], 0.3, 0.1
    n = normalise(tuple(lr))
    expected = [sb + (sp - sb) * value / mean(n) for value in n]
    assert max(expected) < 1 - 8 / 576  # nothing is capped
    assert dynamic(SMOLLM2, lr, sp, sb).final_slice == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.25, 0.333, 0.9])
def test_base_equal_to_percentage_is_constant_slicing(share):
    rng = random.Random(1)
    plan = dynamic(SMOLLM2, [rng.random() for _ in range(30)], share, share)
    assert plan.final_slice == pytest.approx([share] * 30, abs=1e-15)
    assert plan.widths == constant(SMOLLM2, share).widths


def test_equal_scores_are_sliced_alike():
    assert dynamic(SMOLLM2, [0.7] * 30, 0.25).widths == constant(SMOLLM2, 0.25).widths


def test_no_slicing_keeps_every_width():
    assert constant(SMOLLM2, 0.0).widths == dynamic(SMOLLM2, range(30), 0.0).widths == (576,) * 30


def test_excess_of_a_capped_layer_goes_to_the_others():
    plan = dynamic(SMALL, [1.0, 0.0, 0.0, 0.0], 0.3)  # the formula alone says FS_0 = 1.2
    limit = 1 - 8 / 64
    assert plan.final_slice == pytest.approx([limit, *[(4 * 0.3 - limit) / 3] * 3], abs=1e-15)
    assert plan.widths[0] == 8
    assert min(plan.widths) >= 8


def test_excess_is_shared_in_proportion_to_the_scores():
    plan = dynamic(SMALL, [1.0, 0.2, 0.1, 0.0], 0.35, 0.05)
    _, second, third, last = (share - 0.05 for share in plan.final_slice)
    assert plan.final_slice[0] == 1 - 8 / 64
    assert second == pytest.approx(2 * third, rel=1e-12)
    assert last == pytest.approx(0, abs=1e-12)


def test_excess_is_shared_by_scores_that_hardly_differ():
    plan = dynamic(SMALL, [1.0, 2e-320, 1e-320, 0.0], 0.3)
    limit = 1 - 8 / 64
    rest = 4 * 0.3 - limit
    assert plan.final_slice == pytest.approx([limit, 2 / 3 * rest, rest / 3, 0.0], abs=1e-3)
    assert mean(plan.final_slice) == pytest.approx(0.3, abs=1e-12)


def test_everything_at_the_limit_is_a_plan():
    limit = 1 - 8 / 64
    assert dynamic(SMALL, [0.9, 0.1, 0.5, 0.3], limit).widths == (8,) * 4


@pytest.mark.parametrize("round_to", [1, 8, 32])
def test_widths_are_multiples_that_keep_the_mean(round_to):
    for lr, share, base in random_requests(100):
        sp, sb = 0.94 * share, 0.94 * base  # one multiple of 32 remains
        for plan in (dynamic(SMOLLM2, lr, sp, sb, round_to), constant(SMOLLM2, sp, round_to)):
            exact = exact_widths(plan)
            assert all(width % round_to == 0 for width in plan.widths)
            assert min(plan.widths) >= round_to
            assert all(abs(w - e) < round_to for w, e in zip(plan.widths, exact, strict=True))
            assert abs(sum(plan.widths) - sum(exact)) <= round_to / 2 + 1e-6


def test_mean_slice_is_that_of_the_rounded_widths():
    plan = constant(SMALL, 0.3)
    assert plan.mean_slice == pytest.approx(1 - sum(plan.widths) / 256, abs=1e-15)
    assert abs(plan.mean_slice - 0.3) <= 4 / 256


def test_unsliced_plan_stores_the_dense_network_untied_with_shortcuts_and_without_norms():
    d, layers, vocabulary = 576, 30, 49152
    extra = d * vocabulary + 2 * layers * d * d - (2 * layers + 1) * d
    assert constant(SMOLLM2, 0.0).parameters == SMOLLM2.dense_parameters + extra


@pytest.mark.parametrize(("sp", "sb"), [(0.2, 0.0), (0.25, 0.1), (0.3, 0.0), (0.4, 0.2)])
def test_matched_plan_stores_as_much_within_a_thousandth(sp, sb):
    rng = random.Random(2)
    plan = dynamic(SMOLLM2, [0.0, *(rng.random() ** 3 for _ in range(29))], sp, sb)
    assert plan.parameters > 1.01 * constant(SMOLLM2, sp).parameters  # the embedding stays wide
    match = matched(plan)
    assert match.schedule == "constant"
    assert max(match.widths) - min(match.widths) <= 8
    assert match.parameters == pytest.approx(plan.parameters, rel=1e-3)


def test_matched_plan_meets_every_size_within_a_thousandth():
    lr = [0.0, 0.8, *[0.95] * 27, 0.8]
    for thousandths in range(100, 500, 3):
        plan = dynamic(SMOLLM2, lr, thousandths / 1000)
        match = matched(plan)
        assert abs(match.parameters / plan.parameters - 1) <= 1e-3
        assert max(match.widths) - min(match.widths) in (0, 8)


def test_matched_plan_of_a_constant_plan_is_that_plan():
    plan = constant(SMOLLM2, 0.25)
    assert matched(plan).widths == plan.widths


def test_shuffled_widths_depend_on_the_seed_and_the_embedding_keeps_its_own():
    plan = dynamic(SMOLLM2, [i / 30 for i in range(30)], 0.25)
    draws = [shuffled(plan, seed) for seed in range(3)]
    assert len({draw.widths for draw in [plan, *draws]}) == 4
    for draw in draws:
        assert sorted(draw.widths) == sorted(plan.widths)
        assert draw.attention_widths == (plan.widths[0], *draw.widths[1:])
        assert draw.parameters == pytest.approx(plan.parameters, rel=0.01)


@pytest.mark.parametrize(("share", "width"), [(0.0, 576), (0.25, 432), (0.3, 400), (0.9, 56)])
def test_embedding_has_its_own_width_where_it_is_given_one(share, width):
    plan = with_embedding(constant(SMOLLM2, 0.25), share)
    assert plan.attention_widths == (width, *[432] * 29)
    assert plan.mlp_widths == (432,) * 30


BAD_REQUESTS = {
    "multiple does not divide": (lambda: constant(SMALL, 0.25, 7), "round_to 7 does not divide"),
    "multiple of zero": (lambda: constant(SMALL, 0.25, 0), "round_to 0 does not divide"),
    "negative percentage": (lambda: constant(SMALL, -0.1), "percentage -0.1 is outside 0 to"),
    "percentage of one": (lambda: constant(SMALL, 1.0), "percentage 1.0 is outside 0 to 0.875"),
    "percentage in percent": (lambda: dynamic(SMALL, [1, 2, 3, 4], 25.0), "percentage 25.0 is"),
    "percentage not a number": (lambda: constant(SMALL, float("nan")), "percentage nan is outside"),
    "base above percentage": (
        lambda: dynamic(SMALL, [1, 2, 3, 4], 0.2, 0.3),
        "base 0.3 is outside 0 to the slice percentage 0.2",
    ),
    "negative base": (lambda: dynamic(SMALL, [1, 2, 3, 4], 0.2, -0.1), "base -0.1 is outside"),
    "LR of another model": (lambda: dynamic(SMALL, [1, 2, 3], 0.2), "LR has 3 layers, the model 4"),
    "LR that is no number": (
        lambda: dynamic(SMALL, [1, 2, float("nan"), 4], 0.2),
        "LR of layer 2 is nan",
    ),
    "LR without bound": (
        lambda: dynamic(SMALL, [1, 2, 3, float("inf")], 0.2),
        "LR of layer 3 is inf",
    ),
    "LR beyond a float": (lambda: dynamic(SMALL, [-1e308, 1e308, 0, 0], 0.2), "LR from -1e.308"),
    "layer that is not there": (lambda: single(SMALL, 4, 0.25), "layer 4 is outside 0 to 3"),
    "layer from the end": (lambda: single(SMALL, -1, 0.25), "layer -1 is outside 0 to 3"),
    "match in multiples of zero": (
        lambda: matched(replace(constant(SMALL, 0.25), round_to=0)),
        "round_to 0 does not divide",
    ),
    "too few widths": (lambda: with_widths([64] * 3), "3 widths, the model 4 layers"),
    "width above d": (lambda: with_widths([64, 72, 64, 64]), "from 64 to 72, the hidden size is"),
    "width of zero": (lambda: with_widths([64, 0, 64, 64]), "from 0 to 64, the hidden size is 64"),
    "width that is no integer": (lambda: with_widths([64, 40.5, 64, 64]), "40.5"),
}


def with_widths(widths):
    return SlicePlan.from_dict({**constant(SMALL, 0.25).to_dict(), "widths": widths})


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_bad_request_is_refused(name):
    request, message = BAD_REQUESTS[name]
    with pytest.raises(RequestError, match=message):
        request()


@pytest.mark.parametrize("make", [constant, lambda s, sp: dynamic(s, range(30), sp, 0.1)])
def test_plan_survives_json(make):
    plan = make(SMOLLM2, 0.3)
    assert SlicePlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


@pytest.mark.parametrize("missing", ["widths", "schedule", "round_to", "final_slice", "shape"])
def test_incomplete_plan_is_refused(missing):
    values = constant(SMALL, 0.25).to_dict()
    del values[missing]
    with pytest.raises(RequestError, match="incomplete"):
        SlicePlan.from_dict(values)


def test_plan_without_a_part_of_its_shape_is_refused():
    values = constant(SMALL, 0.25).to_dict()
    del values["shape"]["vocab_size"]
    with pytest.raises(RequestError, match=r"incomplete.*vocab_size"):
        SlicePlan.from_dict(values)


@pytest.mark.parametrize("shape", [None, 5, "wide", []])
def test_plan_with_something_else_for_a_shape_is_refused(shape):
    with pytest.raises(RequestError, match=r"the plan has shape .*, which fits no plan"):
        SlicePlan.from_dict({**constant(SMALL, 0.25).to_dict(), "shape": shape})


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"layers": []},
        {"layers": [0.5, 0.6]},
        {"layers": [{"lr": "high"}]},
        {"layers": [{"lr": float("nan")}]},
    ],
)
def test_scores_that_are_none_are_refused(values):
    with pytest.raises(RequestError, match="LR file"):
        lr_of(values)
