"""Schedules at equal size: none exceeds its budget, and each follows the evidence it is given."""

import math
from dataclasses import replace

import pytest
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st

from dynslice.core.errors import RequestError
from dynslice.extensions.schedules import SCHEDULES, Evidence, budget_of, size_range, within
from dynslice.method.architectures import dims_of
from dynslice.method.layout import Layout, basis_groups
from dynslice.method.plan import ModelDims, SlicePlan, constant

SHAPES = {name: dims_of(TINY[name]().config) for name in ("llama", "mistral", "opt", "phi")}
SMOLLM2 = ModelDims(576, 30, 49152, (960, 3072), (576, 1536), 28311552, 134515008)
SMOLLM2_TIED = replace(SMOLLM2, tied=True, final_scale=576, heads=9)


def places_of(shape):
    return len(shape.reads) * shape.layers


def layouts(shape):
    """Every kind of layout that plans of a shape can have."""
    groups = [None, (1,) * places_of(shape)]
    groups += [basis_groups(len(shape.reads), shape.layers, n) for n in (1, 2, "all")]
    made = [Layout(tied, given) for tied in {False, shape.tied} for given in groups]
    return [*made, Layout(plain=True)] if shape.heads else made


@st.composite
def evidence(draw):
    shape = draw(st.sampled_from([*SHAPES.values(), SMOLLM2, SMOLLM2_TIED]))
    share = draw(st.floats(0.1, 0.5))
    lr = draw(st.lists(st.floats(0.0, 1.0), min_size=shape.layers, max_size=shape.layers))
    round_to, layout = draw(st.sampled_from([1, 4, 8])), draw(st.sampled_from(layouts(shape)))
    if layout.plain:
        round_to = math.lcm(round_to, shape.heads)
    return share, Evidence(shape, round_to, lr, layout)


def check_plan(plan, evidence, budget):
    assert plan.parameters <= budget
    assert all(width % evidence.round_to == 0 for width in plan.place_widths[:-1])
    assert plan.layout == evidence.layout
    assert SlicePlan.from_dict(plan.to_dict()) == plan  # it can be saved and read


def check_refusal(error, name, layout):
    if layout.plain and name != "constant":
        assert "a plain checkpoint has one hidden size" in str(error)
        return
    assert "is below the" in str(error)
    # Of the embedding alone, in the tiny shapes; of one width, where a unit is all of it.
    assert name in ("embedding", "first") or layout.plain


@settings(max_examples=60, deadline=None, derandomize=True)
@given(evidence(), st.sampled_from(sorted(SCHEDULES)))
def test_no_schedule_exceeds_its_budget(known, name):
    share, evidence = known
    layout = evidence.layout
    budget = budget_of(evidence.shape, share, evidence.round_to, layout)
    try:
        plan = within(name, evidence, budget)
    except RequestError as error:
        check_refusal(error, name, layout)
    else:
        check_plan(plan, evidence, budget)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(evidence(), st.sampled_from(sorted(SCHEDULES)), st.floats(0, 1))
def test_no_plan_of_a_size_exceeds_it(known, name, part):
    """Any size between the narrowest plan and the widest, for every schedule and layout."""
    evidence = known[1]
    shape, unit = evidence.shape, evidence.round_to
    least, most = size_range(shape, unit, evidence.layout)
    size = int(least + part * (most - 1 - least))
    try:
        plan = within(name, evidence, size)
    except RequestError as error:
        check_refusal(error, name, evidence.layout)
        assert name != "constant"
        return
    check_plan(plan, evidence, size)
    if name == "constant":  # one unit more, in one layer or in all of a plain one, is too large
        more = unit / (shape.hidden_size * (1 if plan.layout.plain else shape.layers))
        share = max(0.0, plan.slice_percentage - more)
        wider = constant(shape, share, unit, layout=plan.layout)
        assert wider.parameters > size


@pytest.mark.parametrize("name", sorted(SCHEDULES))
@pytest.mark.parametrize("share", [0.2, 0.3])
def test_a_schedule_uses_its_budget(name, share):
    """At most one unit at the widest place, the embedding, is left over."""
    lr = [0.2, *[0.9 + 0.002 * i for i in range(29)]]
    budget = budget_of(SMOLLM2, share, 8)
    plan = within(name, Evidence(SMOLLM2, 8, lr), budget)
    assert budget - plan.parameters < 0.005 * budget
    if name == "constant":
        assert plan.parameters == budget


@pytest.mark.parametrize("groups", [None, basis_groups(2, 30, 4), basis_groups(2, 30, "all")])
def test_what_a_layout_saves_goes_into_the_widths(groups):
    """At the size of SliceGPT with one table, SmolLM2 at 30 %: 112.96 M (docs/method.md)."""
    budget = budget_of(SMOLLM2_TIED, 0.3, 8, Layout(tied=True))
    assert budget == pytest.approx(112.96e6, rel=1e-4)
    plan = within("constant", Evidence(SMOLLM2_TIED, layout=Layout(True, groups)), budget)
    assert budget - plan.parameters < 0.001 * budget
    [low, high] = min(plan.widths), max(plan.widths)
    wanted = (400, 408) if groups is None else (440, 448) if len(groups) > 2 else (448, 456)
    assert wanted[0] <= low <= high <= wanted[1], (low, high)


def test_lr_keeps_the_layers_that_change_most():
    lr = [0.1, *[0.99] * 29]
    plan = within("lr", Evidence(SMOLLM2, 8, lr), budget_of(SMOLLM2, 0.3, 8))
    assert plan.widths[0] == 576
    assert max(plan.widths[1:]) < 410


def test_embedding_keeps_the_embedding_whole():
    plan = within("embedding", Evidence(SMOLLM2), budget_of(SMOLLM2, 0.2, 8))
    assert plan.attention_widths[0] == 576
    assert max(plan.widths) - min(plan.widths) <= 8


def test_first_keeps_the_first_layer_whole():
    widths = within("first", Evidence(SMOLLM2), budget_of(SMOLLM2, 0.2, 8)).place_widths
    assert widths[:2] == (576, 576)
    assert max(widths[2:-1]) - min(widths[2:-1]) <= 8


@pytest.mark.parametrize(
    ("name", "known", "sentence"),
    [
        (
            "best",
            {},
            "schedule 'best' is unknown; there are constant, dynamic, lr, embedding, first",
        ),
        ("lr", {}, "schedule 'lr' needs LR, which was not measured"),
        ("lr", {"lr": [0.5] * 29}, "LR has 29 layers, the model 30"),
    ],
)
def test_evidence_that_does_not_do_is_refused(name, known, sentence):
    with pytest.raises(RequestError, match=sentence):
        within(name, Evidence(SMOLLM2, 8, **known), budget_of(SMOLLM2, 0.3, 8))


def test_a_budget_that_no_plan_keeps_is_refused():
    with pytest.raises(RequestError, match="a budget of 1000 parameters is below the"):
        within("constant", Evidence(SMOLLM2, 8), 1000)
