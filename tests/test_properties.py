"""Plans for any shape, scores and request: what holds for all of them, drawn by hypothesis."""

import json
import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dynslice.core.errors import RequestError
from dynslice.method.controls import matched, shuffled, single, with_embedding
from dynslice.method.layout import Layout
from dynslice.method.plan import ModelDims, SlicePlan, constant, dynamic

EPS = 1e-9
SMALLEST = 5e-324  # the smallest number above zero, a denormal
NOT_FINITE = [math.nan, math.inf, -math.inf]

# The same examples in every run.
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
repeatable = settings(settings.get_profile("repeatable"), max_examples=100)


def divisors(number):
    return [unit for unit in range(1, number + 1) if number % unit == 0]


@st.composite
def shapes(draw):
    """(shape, rounding): one or two blocks a layer, any divisor of the hidden size."""
    d = draw(st.one_of(st.integers(1, 128), st.sampled_from([576, 768, 4096])))
    blocks = draw(st.integers(1, 2))
    sizes = st.lists(st.integers(1, 4 * d), min_size=blocks, max_size=blocks).map(tuple)
    shape = ModelDims(
        hidden_size=d,
        layers=draw(st.integers(1, 20)),
        vocab_size=draw(st.integers(1, 50_000)),
        reads=draw(sizes),
        writes=draw(sizes),
        fixed=draw(st.integers(0, 10**7)),
        dense_parameters=draw(st.integers(1, 10**9)),
        position_rows=draw(st.sampled_from([0, 512])),
    )
    return shape, draw(st.sampled_from(divisors(d)))


def scores(count):
    """LR of every kind: cosines, all equal, skewed, one far out, apart by next to nothing."""

    def many(values):
        return st.lists(values, min_size=count, max_size=count)

    cosines = many(st.floats(-1, 1))
    last = st.floats(-1e300, 1e300)
    return st.one_of(
        cosines,
        st.floats(-1, 1).map(lambda score: [score] * count),
        cosines.map(lambda lr: [abs(score) ** 30 for score in lr]),
        st.tuples(cosines, last).map(lambda drawn: [*drawn[0][1:], drawn[1]]),
        many(st.integers(0, 4).map(lambda steps: steps * SMALLEST)),
        many(st.sampled_from([0.0, SMALLEST, 1e-300, 1.0])),
        many(st.integers(0, 4).map(lambda steps: 0.5 + steps * 2**-53)),
    )


@st.composite
def requests(draw):
    """(shape, LR, SP, SB, rounding), SP in [0, limit] and SB in [0, SP], both ends among them."""
    shape, round_to = draw(shapes())
    parts = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1))
    sp = draw(parts) * (1 - round_to / shape.hidden_size)
    return shape, draw(scores(shape.layers)), sp, draw(parts) * sp, round_to


@st.composite
def free_plans(draw):
    """Plans of every schedule."""
    shape, lr, sp, sb, round_to = draw(requests())
    plan = dynamic(shape, lr, sp, sb, round_to)
    layer = draw(st.integers(0, shape.layers - 1))
    others = {
        "dynamic": lambda: plan,
        "constant": lambda: constant(shape, sp, round_to),
        "single": lambda: single(shape, layer, sp, round_to),
        "shuffled": lambda: shuffled(plan, layer),
        "embedding": lambda: with_embedding(plan, sb),
        "matched": lambda: matched(plan),
    }
    return others[draw(st.sampled_from(sorted(others)))]()


def exact_widths(plan):
    return [plan.shape.hidden_size * (1 - share) for share in plan.final_slice]


def refused(request, *said):
    """A request must be refused in one line that says these things."""
    with pytest.raises(RequestError) as refusal:
        request()
    message = str(refusal.value)
    assert "\n" not in message
    assert all(str(part) in message for part in said), message


@repeatable
@given(free_plans())
def test_widths_are_multiples_between_one_unit_and_the_hidden_size(plan):
    d, unit = plan.shape.hidden_size, plan.round_to
    for width in plan.place_widths:
        assert isinstance(width, int)
        assert width % unit == 0
        assert unit <= width <= d
    assert plan.place_widths[-1] == d
    places = plan.place_widths[:-1]
    assert plan.mean_slice == pytest.approx(1 - sum(places) / (d * len(places)))


@settings(repeatable, max_examples=300)
@given(requests())
def test_final_slice_keeps_its_mean_and_stays_between_base_and_limit(request):
    shape, _lr, sp, sb, round_to = request
    slices = dynamic(*request).final_slice
    assert abs(math.fsum(slices) / shape.layers - sp) <= EPS
    assert max(slices) <= 1 - round_to / shape.hidden_size
    assert min(slices) >= sb - EPS


@repeatable
@given(requests())
def test_a_layer_of_higher_redundancy_gets_no_smaller_slice(request):
    shape, lr, _sp, _sb, round_to = request
    plan = dynamic(*request)
    order = sorted(range(shape.layers), key=lambda i: lr[i])
    for low, high in pairwise(order):
        assert plan.final_slice[low] <= plan.final_slice[high] + 1e-12
        # The running sum is rounded, so that one unit can go to either of two equal layers.
        assert plan.widths[high] <= plan.widths[low] + round_to


@repeatable
@given(requests())
def test_layers_of_equal_redundancy_get_equal_slices(request):
    plan = dynamic(*request)
    slices = {}
    for score, share in zip(request[1], plan.final_slice, strict=True):
        assert slices.setdefault(score, share) == share


@settings(repeatable, max_examples=300)
@given(requests())
def test_rounding_errors_never_add_up(request):
    """Of every first few layers, the widths sum to the exact ones within half a unit."""
    shape, _lr, sp, _sb, unit = request
    for plan in (dynamic(*request), constant(shape, sp, unit)):
        sums = (0, 0.0)
        for width, exact in zip(plan.widths, exact_widths(plan), strict=True):
            assert abs(width - exact) <= unit * (1 + EPS)
            sums = sums[0] + width, sums[1] + exact
            assert abs(sums[0] - sums[1]) <= unit * (0.5 + EPS)
        # So the mean slice is the one asked for within half a unit of a single layer's width.
        half_a_unit = unit / (2 * shape.hidden_size * shape.layers)
        assert abs(plan.mean_slice - sp) <= half_a_unit + EPS


@repeatable
@given(requests())
def test_base_equal_to_percentage_is_constant_slicing(request):
    shape, lr, sp, _sb, round_to = request
    plan, expected = dynamic(shape, lr, sp, sp, round_to), constant(shape, sp, round_to)
    assert plan.final_slice == pytest.approx(expected.final_slice, abs=1e-15)
    assert plan.widths == expected.widths


@repeatable
@given(requests(), st.data())
def test_only_differences_of_redundancy_count(request, data):
    """LR -> a LR + b in whole numbers, where floats are exact, gives the same plan."""
    shape, _lr, *rest = request
    lr = data.draw(
        st.lists(st.integers(0, 2**20), min_size=shape.layers, max_size=shape.layers), label="LR"
    )
    a = data.draw(st.integers(1, 2**20), label="a")
    b = data.draw(st.integers(-(2**40), 2**40), label="b")
    moved = [float(a * score + b) for score in lr]
    assert dynamic(shape, moved, *rest) == dynamic(shape, lr, *rest)


@repeatable
@given(requests(), st.floats(1e-3, 1e3), st.floats(-10, 10), st.data())
def test_only_differences_of_redundancy_count_within_float_error(request, a, b, data):
    shape, _lr, *rest = request
    lr = data.draw(
        st.lists(st.integers(-50, 50), min_size=shape.layers, max_size=shape.layers), label="LR"
    )
    assume(len(set(lr)) > 1 or len(lr) == 1)  # equal scores stay equal only in exact arithmetic
    moved = [a * score / 50 + b for score in lr]
    expected = dynamic(shape, lr, *rest).final_slice
    assert dynamic(shape, moved, *rest).final_slice == pytest.approx(expected, abs=1e-6)


@repeatable
@given(free_plans())
def test_matched_is_the_nearest_of_all_constant_plans(plan):
    """Against every constant plan that a search in small steps could find."""
    shape, unit = plan.shape, plan.round_to
    match = matched(plan)
    total = shape.layers * shape.hidden_size // unit
    assume(total <= 2000)
    sizes = [
        constant(shape, 1 - n / total, unit).parameters for n in range(shape.layers, total + 1)
    ]
    nearest = min(abs(size - plan.parameters) for size in sizes)
    assert abs(match.parameters - plan.parameters) <= nearest
    assert match.schedule == "constant"
    assert max(match.widths) - min(match.widths) in (0, unit)


@repeatable
@given(shapes(), st.data())
def test_matched_of_a_constant_plan_is_as_large(drawn, data):
    """Where the widths sum to whole units of SP; a fraction of one only moves which is wider."""
    shape, unit = drawn
    total = shape.layers * shape.hidden_size // unit
    units = data.draw(st.integers(shape.layers, total), label="units")
    plan = constant(shape, 1 - units / total, unit)
    assert matched(plan).parameters == plan.parameters


@repeatable
@given(requests(), st.integers(0, 2**32))
def test_shuffled_hands_out_the_same_widths(request, seed):
    plan = dynamic(*request)
    other = shuffled(plan, seed)
    pairs = [sorted(zip(p.widths, p.final_slice, strict=True)) for p in (plan, other)]
    assert pairs[0] == pairs[1]
    assert other.attention_widths[0] == plan.attention_widths[0]
    assert shuffled(plan, seed) == other


@repeatable
@given(requests(), st.data())
def test_single_cuts_one_layer_and_not_the_embedding(request, data):
    shape, _lr, sp, _sb, round_to = request
    layer = data.draw(st.integers(0, shape.layers - 1), label="layer")
    plan = single(shape, layer, sp, round_to)
    cut = constant(shape, sp, round_to).widths[0]
    expected = [cut if i == layer else shape.hidden_size for i in range(shape.layers)]
    assert list(plan.mlp_widths) == expected
    assert plan.attention_widths[0] == shape.hidden_size
    assert math.fsum(plan.final_slice) == sp


@repeatable
@given(requests())
def test_with_embedding_changes_the_first_width_alone(request):
    shape, _lr, _sp, share, round_to = request
    plan = dynamic(*request)
    other = with_embedding(plan, share)
    exact = shape.hidden_size * (1 - share)
    assert abs(other.attention_widths[0] - exact) <= round_to * (0.5 + EPS)
    assert (other.attention_widths[1:], other.widths) == (plan.attention_widths[1:], plan.widths)


@repeatable
@given(free_plans(), st.data())
def test_a_wider_layer_stores_more(plan, data):
    d = plan.shape.hidden_size
    layer = data.draw(st.integers(0, plan.shape.layers - 1), label="layer")
    wider = list(plan.widths)
    wider[layer] = data.draw(st.integers(wider[layer], d), label="width")
    other = replace(plan, widths=tuple(wider))
    # In parallel blocks an embedding of its own width takes the place of layer 0.
    grows = other.place_widths != plan.place_widths
    assert (other.parameters > plan.parameters) == grows
    assert other.parameters >= plan.parameters


@repeatable
@given(requests())
def test_stored_parameters_are_counted_place_by_place(request):
    """The sum by its definition: maps, shortcuts, embeddings, and what is left alone."""
    plan = dynamic(*request)
    shape, widths = plan.shape, plan.place_widths
    blocks = len(shape.reads)
    maps = sum(
        before * shape.reads[place % blocks] + after * shape.writes[place % blocks]
        for place, (before, after) in enumerate(pairwise(widths))
    )
    shortcuts = sum(b * a for b, a in pairwise(widths))
    tables = (shape.vocab_size + shape.position_rows) * widths[0]
    assert plan.parameters == shape.fixed + maps + shortcuts + tables
    assert plan.shortcut_parameters == shortcuts


@repeatable
@given(free_plans())
def test_plan_survives_json(plan):
    values = json.loads(json.dumps(plan.to_dict(), allow_nan=False))
    assert SlicePlan.from_dict(values) == plan
    assert SlicePlan.from_dict(values).to_dict() == plan.to_dict()


@st.composite
def laid_out(draw):
    """A plan of tied tables and groups of places, drawn freely."""
    shape, lr, sp, sb, round_to = draw(requests())
    shape = replace(shape, tied=True, final_scale=draw(st.sampled_from([0, shape.hidden_size])))
    places = len(shape.reads) * shape.layers
    borders = sorted({0, places, *draw(st.lists(st.integers(1, places), max_size=places))})
    groups = draw(st.sampled_from([None, tuple(b - a for a, b in pairwise(borders))]))
    layout = Layout(tied=draw(st.booleans()), basis_groups=groups)
    return dynamic(shape, lr, sp, sb, round_to, layout)


@repeatable
@given(laid_out())
def test_a_layout_is_counted_by_what_it_leaves_out(plan):
    """Of the published layout: the second table, and shortcuts where the basis stays."""
    shape, widths = plan.shape, plan.place_widths
    published = replace(plan, layout=Layout())
    stays = [a == b for a, b in pairwise(plan.bases)]
    left_out = 0
    if plan.layout.basis_groups:
        left_out = sum(a * b * same for (a, b), same in zip(pairwise(widths), stays, strict=True))
    if plan.layout.tied:
        left_out += shape.vocab_size * widths[0] - shape.final_scale
        left_out -= shape.hidden_size * widths[0] * (plan.bases[0] >= 0)
    assert plan.parameters == published.parameters - left_out
    assert matched(plan).layout == plan.layout


@repeatable
@given(laid_out())
def test_places_share_a_basis_group_by_group(plan):
    """Places of a group that is cut have its number, every other one the dense coordinates."""
    d, bases, widths = plan.shape.hidden_size, plan.bases, plan.place_widths
    groups = plan.layout.basis_groups or (1,) * (len(widths) - 1)
    first = 0
    for number, count in enumerate(groups):
        places = range(first, first + count)
        expected = number if min(widths[p] for p in places) < d else -1
        assert {bases[p] for p in places} == {expected}
        first += count
    assert (bases[-1], len(bases)) == (-1, len(widths))


@repeatable
@given(laid_out())
def test_a_layout_survives_json(plan):
    values = json.loads(json.dumps(plan.to_dict(), allow_nan=False))
    assert SlicePlan.from_dict(values) == plan


JUNK = st.sampled_from([None, "", "x", [], {}, [None], 5, -1, 0, 0.5, math.nan, math.inf])


@repeatable
@given(free_plans(), st.data())
def test_a_plan_with_a_broken_value_is_refused_or_is_a_plan(plan, data):
    values = plan.to_dict()
    broken = data.draw(st.sampled_from([values, values["shape"]]), label="part")
    broken[data.draw(st.sampled_from(sorted(broken)), label="key")] = data.draw(JUNK, label="junk")
    try:
        read = SlicePlan.from_dict(values)
    except RequestError as refusal:
        assert "\n" not in str(refusal)
    else:
        assert all(1 <= width <= read.shape.hidden_size for width in read.widths)


@repeatable
@given(requests())
def test_the_same_request_gives_the_same_plan(request):
    assert dynamic(*request) == dynamic(*request)
    assert matched(dynamic(*request)) == matched(dynamic(*request))


# What cannot be served is refused

OUTSIDE = st.one_of(
    st.floats(max_value=-SMALLEST), st.floats(min_value=1), st.sampled_from(NOT_FINITE)
)


@repeatable
@given(requests(), OUTSIDE)
def test_a_slice_percentage_out_of_range_is_refused(request, share):
    shape, lr, _sp, sb, round_to = request
    for ask in (
        lambda: constant(shape, share, round_to),
        lambda: dynamic(shape, lr, share, sb, round_to),
        lambda: single(shape, 0, share, round_to),
        lambda: with_embedding(constant(shape, 0.0, round_to), share),
    ):
        refused(ask, f"slice percentage {share} is outside 0 to")


@repeatable
@given(requests())
def test_a_slice_percentage_that_leaves_less_than_a_unit_is_refused(request):
    shape, _lr, *_, round_to = request
    above = math.nextafter(1 - round_to / shape.hidden_size, 2)
    refused(lambda: constant(shape, above, round_to), f"slice percentage {above} is outside")


@repeatable
@given(requests(), OUTSIDE)
def test_a_slice_base_out_of_range_is_refused(request, base):
    shape, lr, sp, _sb, round_to = request
    for outside in (base, math.nextafter(sp, 2)):
        refused(
            lambda outside=outside: dynamic(shape, lr, sp, outside, round_to),
            f"slice base {outside} is outside 0 to the slice percentage {sp}",
        )


@repeatable
@given(requests(), st.one_of(st.integers(-100, 10_000), st.just(0.5), st.just(math.nan)))
def test_a_rounding_that_does_not_divide_is_refused(request, round_to):
    shape, lr, *_ = request
    assume(round_to not in divisors(shape.hidden_size))
    plan = replace(constant(shape, 0.0, 1), round_to=round_to)
    for ask in (
        lambda: constant(shape, 0.0, round_to),
        lambda: dynamic(shape, lr, 0.0, 0.0, round_to),
        lambda: single(shape, 0, 0.0, round_to),
        lambda: with_embedding(plan, 0.0),
        lambda: matched(plan),
    ):
        refused(ask, f"round_to {round_to} does not divide the hidden size {shape.hidden_size}")


@repeatable
@given(requests(), st.lists(st.floats(-1, 1), max_size=30))
def test_redundancy_of_another_number_of_layers_is_refused(request, lr):
    shape, _lr, *rest = request
    assume(len(lr) != shape.layers)
    refused(lambda: dynamic(shape, lr, *rest), f"LR has {len(lr)} layers, the model {shape.layers}")


@repeatable
@given(requests(), st.sampled_from(NOT_FINITE), st.data())
def test_redundancy_that_is_not_finite_is_refused(request, score, data):
    shape, lr, *rest = request
    layer = data.draw(st.integers(0, shape.layers - 1), label="layer")
    lr[layer] = score
    refused(lambda: dynamic(shape, lr, *rest), f"LR of layer {layer} is {score}")


@repeatable
@given(requests())
def test_redundancy_with_differences_beyond_a_float_is_refused(request):
    shape, lr, *rest = request
    assume(shape.layers > 1)
    lr[0], lr[-1] = -1.5e308, 1.5e308
    refused(lambda: dynamic(shape, lr, *rest), "LR from -1.5e+308 to 1.5e+308")


@repeatable
@given(shapes(), st.integers(-50, 50))
def test_a_layer_that_the_model_lacks_is_refused(drawn, layer):
    shape, round_to = drawn
    assume(layer not in range(shape.layers))
    refused(lambda: single(shape, layer, 0.0, round_to), f"layer {layer} is outside 0 to")
