"""Signals and weights that strain the arithmetic: bases stay bases, and slices stay finite."""

import pytest
import torch
from conftest import TINY, decoder

from dynslice.core.errors import RequestError
from dynslice.method.architectures import dims_of
from dynslice.method.numerics import covariance, principal_basis
from dynslice.method.plan import constant
from dynslice.method.slicing import slice_model

D = 48
NOT_FINITE = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}
# How far logits of an unsliced plan may be from the dense ones, relative to the largest.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.02}


def normal(*size):
    return torch.randn(size, generator=torch.Generator().manual_seed(7))


def channel(factor):
    """Signals [80, d] with one channel that is larger than the others."""
    signals = normal(80, D)
    signals[:, 7] *= factor
    return signals


# Signals, their rank (None: full)
SIGNALS = {
    "every direction alike": (torch.eye(D).repeat(3, 1), None),
    "two levels": (torch.eye(D) * torch.tensor([1.0, 3.0]).repeat(D // 2), None),
    "fewer tokens than dimensions": (normal(12, D), 12),
    "repeated tokens": (normal(5, D).repeat(20, 1), 5),
    "all tokens alike": (normal(1, D).repeat(80, 1), 1),
    "one token": (normal(1, D), 1),
    "all zero": (torch.zeros(80, D), 0),
    "zero but for one number": (torch.zeros(80, D).index_fill(1, torch.tensor([3]), 2.0), 1),
    "channel of 1e4": (channel(1e4), None),
    "channel of 1e6": (channel(1e6), None),
    "massive first token": (normal(80, D) * torch.tensor([1e4, *[1.0] * 79])[:, None], None),
    "near the largest float": (normal(80, D) / 10 * torch.finfo(torch.float32).max, None),
    "near the smallest float": (normal(80, D) * torch.finfo(torch.float32).tiny, None),
    "below the smallest normal float": (normal(80, D) * 1e-42, None),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("name", SIGNALS)
def test_basis_is_orthonormal_ordered_and_the_same_every_time(name, centred, dtype):
    signals, _ = SIGNALS[name]
    x = signals.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)
    if centred:
        x = (x.double() - x.double().mean(dim=-1, keepdim=True)).float()
    V = principal_basis(covariance([x[:30], x[30:]]), centred=centred)
    assert V.dtype == torch.float64
    torch.testing.assert_close(V.T @ V, torch.eye(D, dtype=torch.float64), atol=1e-10, rtol=0)
    energy = (x.double() @ V).pow(2).sum(dim=0)
    assert (energy.diff() <= 1e-10 * energy.sum()).all()
    assert torch.equal(principal_basis(covariance([x[:30], x[30:]]), centred=centred), V)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("name", [name for name, (_, rank) in SIGNALS.items() if rank is not None])
def test_directions_beyond_the_rank_hold_nothing(name, centred):
    x, rank = SIGNALS[name]
    x = x.double() - x.double().mean(dim=-1, keepdim=True) if centred else x.double()
    Q = principal_basis(covariance([x]), centred=centred)[:, :rank]
    torch.testing.assert_close(x @ Q @ Q.T, x, atol=1e-7 * float(x.abs().max()), rtol=0)
    if rank:
        fewer = Q[:, :-1]
        assert (x @ fewer @ fewer.T - x).abs().max() > 1e-2 * x.abs().max()


@pytest.mark.parametrize("name", [name for name, (x, _) in SIGNALS.items() if x.any()])
def test_direction_of_the_mean_comes_last(name):
    x = SIGNALS[name][0].double()
    V = principal_basis(covariance([x - x.mean(dim=-1, keepdim=True)]), centred=True)
    mean = torch.full((D,), D**-0.5, dtype=torch.float64)
    assert abs(V[:, -1] @ mean) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("value", NOT_FINITE)
def test_signals_that_are_not_finite_have_no_basis(value):
    x = normal(80, D)
    x[40, 3] = NOT_FINITE[value]
    with pytest.raises(RequestError, match="not finite"):
        principal_basis(covariance([x]))


# Networks


def embedding(model):
    return decoder(model).embed_tokens.weight.data


def one_hot(model):
    """Each token has a channel of its own, so that every direction is alike."""
    channels = torch.arange(97) % D
    embedding(model).zero_()[torch.arange(97), channels] = 2.0


def outlier(factor):
    return lambda model: embedding(model)[:, 7].mul_(factor)


def massive_token(model):
    embedding(model)[2] *= 1e3


def scaled(factor):
    return lambda model: embedding(model).mul_(factor)


def draw(count, length):
    return torch.randint(2, 97, (count, length), generator=torch.Generator().manual_seed(3))


FIRST = torch.cat([torch.full((6, 1), 2), draw(6, 23)], dim=1)
# What is done to a tiny model, and the calibration windows
CASES = {
    "every direction alike": (one_hot, torch.arange(1, 97).view(4, 24)),
    "fewer tokens than dimensions": (lambda _: None, draw(1, 12)),
    "all tokens alike": (lambda _: None, torch.full((2, 24), 5)),
    "one token": (lambda _: None, draw(1, 1)),
    "all zero": (lambda model: embedding(model).zero_(), draw(6, 24)),
    "channel of 1e4": (outlier(1e4), draw(6, 24)),
    "channel of 1e6": (outlier(1e6), draw(6, 24)),
    "massive first token": (massive_token, FIRST),
    "near the largest float": (scaled(1e18), draw(6, 24)),  # its squares are floats
    "near the smallest float": (scaled(1e-30), draw(6, 24)),
}
TOO_LARGE = {"channel of 1e6", "near the largest float"}  # for float16
FAMILIES = ("mistral", "gemma", "opt", "phi")
HALF = (torch.bfloat16, torch.float16)
NETWORKS = [(case, family, torch.float32) for case in CASES for family in FAMILIES]
NETWORKS += [(case, family, dtype) for case in CASES for family in FAMILIES[::2] for dtype in HALF]
OVERFLOWS = [(case, f, t) for case, f, t in NETWORKS if t == torch.float16 and case in TOO_LARGE]
NETWORKS = [drawn for drawn in NETWORKS if drawn not in OVERFLOWS]


def build(family, case, dtype=torch.float32):
    """(model, calibration windows)."""
    model = TINY[family]()
    strain, windows = CASES[case]
    strain(model)
    return model.to(dtype), windows


@torch.inference_mode()
def logits_of(model, tokens):
    return model(tokens, use_cache=False).logits.float()


@pytest.mark.parametrize(("case", "family", "dtype"), NETWORKS, ids=str)
def test_slices_are_finite_and_the_same_every_time(case, family, dtype, tokens):
    model, windows = build(family, case, dtype)
    plan = constant(dims_of(model.config), 0.5)
    sliced, again = (slice_model(model, windows, plan).model for _ in range(2))
    weights = sliced.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in again.state_dict().items())
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert logits_of(sliced, tokens).isfinite().all()


@pytest.mark.parametrize(("case", "family", "dtype"), NETWORKS, ids=str)
def test_full_widths_leave_logits_unchanged(case, family, dtype, tokens):
    model, windows = build(family, case, dtype)
    sliced = slice_model(model, windows, constant(dims_of(model.config), 0.0)).model
    expected = logits_of(model, tokens)
    assert expected.isfinite().all()
    atol = TOLERANCE[dtype] * float(expected.abs().max())
    torch.testing.assert_close(logits_of(sliced, tokens), expected, atol=atol, rtol=0)


@pytest.mark.parametrize(
    ("case", "family", "rank"),
    [
        *(("fewer tokens than dimensions", family, 12) for family in FAMILIES),
        *(("one token", family, 1) for family in FAMILIES),
        ("all tokens alike", "mistral", 1),  # at every place, since only attention sees positions
        ("all tokens alike", "gemma", 1),
        ("all zero", "mistral", 1),
    ],
)
def test_a_network_as_wide_as_the_calibration_rank_keeps_those_logits(case, family, rank):
    model, windows = build(family, case)
    shape = dims_of(model.config)
    expected = logits_of(model, windows)

    def difference(width):
        plan = constant(shape, 1 - width / D, round_to=1)
        assert set(plan.widths) == {width}
        sliced = slice_model(model, windows, plan).model
        return (logits_of(sliced, windows) - expected).abs().max()

    scale = expected.abs().max()
    assert difference(rank) <= 1e-4 * scale
    if rank > 1:
        assert difference(rank // 2) > 0.05 * scale  # the check can fail


def test_a_channel_of_1e6_is_kept(tokens):
    """A basis without it would lose nearly all of the stream."""
    model, windows = build("phi", "channel of 1e6")
    sliced = slice_model(model, windows, constant(dims_of(model.config), 0.5)).model
    expected = logits_of(model, tokens)
    atol = 1e-2 * float(expected.abs().max())
    torch.testing.assert_close(logits_of(sliced, tokens), expected, atol=atol, rtol=0)


# What is not finite is refused


def number_of(model, name):
    """One weight in a parameter, as a view: of the token 5 in an embedding."""
    return model.get_parameter(f"{name}.weight").data.view(-1)[5 * D : 5 * D + 1]


BROKEN = {
    "mistral": [
        "model.embed_tokens",
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.down_proj",
        "model.layers.2.self_attn.o_proj",
    ],
    "opt": [
        "model.decoder.embed_positions",
        "model.decoder.layers.1.fc1",
        "model.decoder.layers.2.self_attn.out_proj",
    ],
}


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize(
    ("family", "name"), [(family, name) for family in BROKEN for name in BROKEN[family]]
)
def test_weights_that_are_not_finite_are_refused(family, name, value):
    model = TINY[family]()
    number_of(model, name).fill_(NOT_FINITE[value])
    windows = torch.arange(2, 98).view(4, 24) % 97
    with pytest.raises(RequestError, match="not finite"):
        slice_model(model, windows, constant(dims_of(model.config), 0.25))


@pytest.mark.parametrize(("case", "family", "dtype"), OVERFLOWS, ids=str)
def test_weights_beyond_float16_are_refused(case, family, dtype):
    model, windows = build(family, case, dtype)
    with pytest.raises(RequestError, match="not finite"):
        slice_model(model, windows, constant(dims_of(model.config), 0.5))


@pytest.mark.parametrize("family", ["opt", "phi"])
def test_activations_that_overflow_are_refused(family, tokens):
    """Finite weights, but the squares in a LayerNorm are beyond float32."""
    model = TINY[family]()
    scaled(1e37)(model)
    with pytest.raises(RequestError, match="not finite"):
        slice_model(model, tokens, constant(dims_of(model.config), 0.25))


@pytest.mark.parametrize(
    ("name", "slice_percentage"),
    [
        ("model.layers.2.mlp.down_proj", 0.25),  # runs for no place
        ("model.norm", 0.25),
        ("lm_head", 0.25),
        ("model.layers.0.mlp.down_proj", 0.0),  # a full width needs no basis
    ],
)
def test_weights_that_no_calibration_signal_meets_are_refused(name, slice_percentage, tokens):
    model = TINY["mistral"]()
    model.get_parameter(f"{name}.weight").data.view(-1)[7] = float("nan")
    with pytest.raises(RequestError, match="not finite"):
        slice_model(model, tokens, constant(dims_of(model.config), slice_percentage))
