"""Compensation: plain slicing without it, the dense output where that can be had, and its size."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import CPU, TINY
from transformers import LlamaConfig, LlamaForCausalLM

from dynslice.core.errors import RequestError, RunError
from dynslice.extensions.compensation import RIDGES, Compensation, Regression
from dynslice.inputs import models
from dynslice.inputs.windows import token_windows
from dynslice.method import activations, bases
from dynslice.method.activations import Activations
from dynslice.method.architectures import dims_of, empty_sliced, family_of
from dynslice.method.layout import Layout
from dynslice.method.numerics import RoundingAudit
from dynslice.method.plan import constant, of_places
from dynslice.method.slicing import slice_model, sliced_weights

OURS = Compensation(0.1)


def uneven(model):
    """A plan with another width at every place."""
    shape = dims_of(model.config)
    places = len(shape.reads) * shape.layers
    return of_places("uneven", shape, [20 + (7 * place) % 24 for place in range(places)], 1)


def final_stream(model, windows):
    """What enters the final norm of a dense or sliced model."""
    seen = []
    norm = model.get_submodule(family_of(model.config).final_norm)
    handle = norm.register_forward_hook(lambda _module, given, _output: seen.append(given[0]))
    with torch.inference_mode():
        model(windows, use_cache=False)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("shortcut", [True, False])
def test_with_an_endless_ridge_it_is_plain_slicing(tiny, tokens, shortcut):
    plan = uneven(tiny)
    plain = slice_model(tiny, tokens, plan).model.state_dict()
    ours = slice_model(tiny, tokens, plan, Compensation(1e12, shortcut)).model.state_dict()
    assert ours.keys() == plain.keys()
    for name, weight in plain.items():
        torch.testing.assert_close(ours[name], weight, atol=1e-5, rtol=1e-4)


def test_the_sliced_model_computes_what_was_fitted(tiny, tokens):
    """The stream that slicing ends with is the one that enters the final norm afterwards."""
    plan, x = uneven(tiny), Activations(CPU)
    weights = dict(sliced_weights(tiny, tokens, plan, x, RoundingAudit(torch.float32), OURS))
    sliced = empty_sliced(tiny, plan)
    sliced.load_state_dict(weights, assign=True)
    fitted = torch.cat(list(x))
    got = final_stream(sliced.eval(), tokens)
    torch.testing.assert_close(got, fitted, atol=2e-4 * float(fitted.abs().max()), rtol=0)


def test_it_brings_the_stream_nearer_to_the_dense_one(tiny, tokens):
    plan, wanted = constant(dims_of(tiny.config), 0.5, 1), final_stream(tiny, tokens)
    if hasattr(tiny.get_submodule(family_of(tiny.config).final_norm), "normalized_shape"):
        wanted = wanted - wanted.mean(-1, keepdim=True)
    size = wanted.norm(dim=-1)

    def error(compensation):
        got = final_stream(slice_model(tiny, tokens, plan, compensation).model, tokens)
        return ((got - wanted).norm(dim=-1) / size).mean()

    assert error(OURS) < 0.8 * error(None)
    assert error(OURS) < error(Compensation(0.1, shortcut=False)) < error(None)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_lost_directions_that_follow_from_the_kept_ones_come_back(name, monkeypatch):
    """The last half of the stream is a linear function of the first, and slicing drops it.

    The basis is the given one (eigenvectors would find the half that matters and lose nothing).
    """
    model = TINY[name]()
    d = model.config.hidden_size
    generator = torch.Generator().manual_seed(1)
    follow = torch.randn(d // 2, d // 2, generator=generator)
    family = family_of(model.config)
    with torch.no_grad():
        for table in family.embeddings:
            weight = model.get_parameter(f"{table}.weight")
            if name == "opt":  # no mean, which the norms would take away
                weight[:, : d // 2] -= weight[:, : d // 2].mean(-1, keepdim=True)
                follow -= follow.mean(1, keepdim=True)
            weight[:, d // 2 :] = weight[:, : d // 2] @ follow
        for layer in model.get_submodule(family.layers):  # the blocks neither know nor add anything
            for block in family.blocks:
                for map_ in map(layer.get_submodule, (*block.reads, *block.writes)):
                    for parameter in map_.parameters():
                        parameter.zero_()
    eye = torch.eye(d).double()
    monkeypatch.setattr(bases, "spectrum", lambda x, centred: (eye.diagonal(), eye))
    draw = torch.Generator().manual_seed(2)
    windows, unseen = (torch.randint(2, 97, (8, 24), generator=draw) for _ in range(2))
    plan = constant(dims_of(model.config), 0.5, 1)
    with torch.inference_mode():
        wanted = model(unseen, use_cache=False).logits
        plain = slice_model(model, windows, plan).model(unseen, use_cache=False).logits
        compensation = Compensation(1e-6)
        ours = slice_model(model, windows, plan, compensation).model(unseen, use_cache=False).logits
    scale = wanted.std()
    assert (plain - wanted).std() > 0.1 * scale
    assert (ours - wanted).abs().max() < 0.01 * scale


def test_it_stores_what_the_plan_says_and_leaves_the_dense_model_alone(tiny, tokens):
    plan = uneven(tiny)
    before = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    sliced = slice_model(tiny, tokens, plan, OURS).model
    assert sum(p.numel() for p in sliced.parameters()) == plan.parameters
    for name, tensor in tiny.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert not any(module._forward_pre_hooks for module in tiny.modules())


def test_it_costs_two_passes(monkeypatch, tokens):
    """Each block runs once for the dense stream and once for the sliced one, batch by batch."""
    model, runs = TINY["llama"](), []
    block_output = activations.block_output

    def counted(layer, block, *given):
        runs.append((id(layer), block.name))
        return block_output(layer, block, *given)

    monkeypatch.setattr(activations, "block_output", counted)
    slice_model(model, tokens, constant(dims_of(model.config), 0.25), OURS)
    assert all(runs.count(run) == 2 for run in set(runs))
    assert len(set(runs)) == 2 * model.config.num_hidden_layers


def test_a_plan_that_cuts_nothing_is_corrected_by_nothing(tiny, tokens):
    plan = constant(dims_of(tiny.config), 0.0)
    plain, ours = (slice_model(tiny, tokens, plan, c).model for c in (None, OURS))
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], weight, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["llama", "opt", "phi"])
@pytest.mark.parametrize("host", [None, 0])
def test_where_its_signals_are_makes_no_difference(name, host, tokens, tmp_path):
    """In memory, or every one on disk."""
    model = TINY[name]()
    plan = uneven(model)
    wanted = slice_model(model, tokens, plan, OURS).model.state_dict()
    x, files = Activations(CPU, host, folder=tmp_path), []
    got = {}
    for weight_name, weight in sliced_weights(
        model, tokens, plan, x, RoundingAudit(torch.float32), OURS
    ):
        got[weight_name] = weight
        files += tmp_path.rglob("*.safetensors")
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[weight_name], weight) for weight_name, weight in wanted.items())
    assert bool(files) == (host == 0)


def test_slice_to_takes_a_compensation(tmp_path, tokens):
    path = models.resolve("embedded:tiny-random")
    model, _ = models.load(path, CPU, torch.float32)
    plan = constant(dims_of(model.config), 0.25)
    wanted = slice_model(model, tokens, plan, OURS).model.state_dict()
    models.slice_saved(tmp_path / "out", path, tokens, plan, CPU, torch.float32, start=OURS)
    got = models.load(str(tmp_path / "out"), CPU, torch.float32)[0].state_dict()
    assert all(torch.equal(got[name], weight) for name, weight in wanted.items())


# The regression


def made(sizes=(3, 5), d=4, tokens=200):
    generator = torch.Generator().manual_seed(5)
    z = torch.randn(tokens, sum(sizes), generator=generator)
    z[:, : sizes[0]] *= 30  # matrices of other sizes take ridges of other sizes
    D = torch.randn(sum(sizes), d, generator=generator)
    h = torch.randn(tokens, d, generator=generator) * torch.logspace(0, 3, tokens)[:, None]
    return z, D, h


def test_a_small_ridge_finds_the_linear_function():
    z, D, h = made()
    regression = Regression([3, 5], 4, CPU)
    for part in (slice(0, 90), slice(90, None)):
        regression.add(*(v[None, part] for v in (z, h - z @ D, h)))
    torch.testing.assert_close(regression.solve(1e-7), D.double(), atol=1e-3, rtol=1e-3)


def test_it_minimises_the_stated_objective():
    z, _, h = made()
    x = torch.zeros_like(h)
    regression, ridge = Regression([3, 5], 4, CPU), 0.3
    regression.add(z[None], x[None], h[None])
    got = regression.solve(ridge)
    weight = 1 / h.double().pow(2).mean(-1, keepdim=True)
    penalty = torch.empty(8, dtype=torch.float64)
    for part in (slice(0, 3), slice(3, 8)):
        penalty[part] = ridge * (weight * z[:, part].double() ** 2).sum(0).mean()

    def objective(D):
        missing = (h - x).double() - z.double() @ D
        return (weight * missing**2).sum() + (penalty[:, None] * D**2).sum()

    D = got.clone().requires_grad_()
    objective(D).backward()
    assert D.grad.abs().max() < 1e-4 * objective(torch.zeros_like(got))
    assert objective(got) < objective(1.01 * got)
    assert objective(got) < objective(0.99 * got)


def with_signal(strength, k=40, d=6, windows=6, tokens=20, seed=0):
    """Windows of inputs, and of what is missing: a linear function of them and noise of size 1."""
    draw = torch.Generator().manual_seed(seed)
    z = torch.randn(windows, tokens, k, generator=draw)
    D = torch.randn(k, d, generator=draw) * strength / k**0.5
    e = z @ D + torch.randn(windows, tokens, d, generator=draw)
    regression = Regression([k], d, CPU)
    # The size of the dense stream weights the tokens: here each has the size 1.
    h = torch.randn(windows, tokens, d, generator=draw)
    h /= h.pow(2).mean(-1, keepdim=True).sqrt()
    for first in range(0, windows, 4):  # batches of several windows, the last one shorter
        part = slice(first, first + 4)
        regression.add(z[part], h[part] - e[part], h[part])
    return regression, z.double(), e.double()


def held_out_errors(z, e):
    """By each ridge: fitted to every other window, and judged by those between."""
    (fit, test), (wanted, unseen) = ([v[i::2].flatten(0, 1) for i in (0, 1)] for v in (z, e))
    penalty = z.flatten(0, 1).pow(2).sum(0).mean()
    gram = fit.T @ fit
    errors = {}
    for ridge in RIDGES:
        D = torch.linalg.solve(gram + ridge * penalty * torch.eye(len(gram)), fit.T @ wanted)
        errors[ridge] = float((unseen - test @ D).pow(2).sum() - unseen.pow(2).sum())
    return errors


def test_the_ridge_is_the_one_with_the_least_held_out_error():
    chosen = []
    for seed in range(12):
        regression, z, e = with_signal([0.6, 1.0, 2.0][seed % 3], seed=seed)
        errors = held_out_errors(z, e)
        best = min(errors, key=errors.get)
        chosen.append(regression.choose())
        assert chosen[-1] == (best if errors[best] < 0 else None)
    assert len({*chosen} - {None, RIDGES[0], RIDGES[-1]}) >= 2  # not only the ends of the grid


def test_a_linear_signal_takes_a_small_ridge_and_noise_a_large_one_or_none():
    assert with_signal(100.0, windows=40)[0].choose() == min(RIDGES)
    of_noise = [with_signal(0.0, seed=seed)[0].choose() for seed in range(12)]
    assert {*of_noise} <= {None, 10.0, 30.0}
    assert None in of_noise


def test_more_tokens_take_smaller_ridges():
    ridges = [with_signal(0.7, windows=windows)[0].choose() for windows in (4, 16, 128)]
    assert ridges == sorted(ridges, reverse=True)
    assert ridges[0] > ridges[-1]


def test_a_single_window_corrects_nothing(tiny, tokens):
    plan, start = uneven(tiny), Compensation()
    plain = slice_model(tiny, tokens[:1], plan).model.state_dict()
    ours = slice_model(tiny, tokens[:1], plan, start).model.state_dict()
    assert start.chosen == [None] * (len(plan.place_widths) - 1)
    assert all(torch.equal(ours[name], weight) for name, weight in plain.items())


def test_the_ridges_of_the_last_slice_are_told(tokens):
    model, start = TINY["llama"](), Compensation()
    for _ in range(2):
        slice_model(model, tokens, uneven(model), start)
        assert len(start.chosen) == 6
    assert {*start.chosen} <= {None, *RIDGES}
    given = Compensation(0.3)
    slice_model(model, tokens, uneven(model), given)
    assert given.chosen == [0.3] * 6


def divergences(model, dense, windows):
    """What a slice's predictions lose of the dense model's, in nats per token, by window."""
    with torch.inference_mode():
        ours, wanted = (m(windows, use_cache=False).logits.log_softmax(-1) for m in (model, dense))
    return (wanted.exp() * (wanted - ours)).sum(-1).mean(-1).double()


def change_of(model, calibration, held_out, plan, start):
    """By how much a compensation changes the mean loss on held-out windows, and what is noise."""
    plain, ours = (
        divergences(slice_model(model, calibration, plan, made).model, model, held_out)
        for made in (None, start)
    )
    noise = 2 * (ours - plain).std() / len(plain) ** 0.5
    return float((ours - plain).mean() / plain.mean()), float(noise / plain.mean())


@pytest.mark.parametrize("layout", ["apart", "grouped"])
@pytest.mark.parametrize("name", ["llama", "opt", "phi"])
def test_it_never_harms_whatever_the_calibration(name, layout):
    """From 512 to 65,536 tokens of 32 a window."""
    model, draw = TINY[name](), torch.Generator().manual_seed(4)
    shape = dims_of(model.config)
    blocks = len(shape.reads)
    groups = (blocks, 2 * blocks) if layout == "grouped" else None
    plan = constant(shape, 0.5, 1, layout=Layout(basis_groups=groups))
    windows = torch.randint(2, 97, (2048 + 32, 32), generator=draw)
    held_out, windows = windows[:32], windows[32:]
    given = partial(change_of, model, held_out=held_out, plan=plan)
    changes = [given(windows[:count], start=Compensation()) for count in (16, 128, 2048)]
    assert all(change <= noise for change, noise in changes), changes
    assert changes[2][0] < changes[1][0] < -0.05  # and it gains where there is something to gain
    if name == "llama":  # the check can fail: a ridge that is too small for 512 tokens
        change, noise = given(windows[:16], start=Compensation(0.03))
        assert change > noise


def test_it_never_harms_a_real_model(smollm2):
    """Its first six layers, with their real weights: 512 and 2,048 tokens."""
    settings = {**smollm2[0].config.to_dict(), "num_hidden_layers": 6}
    model = LlamaForCausalLM(LlamaConfig(**settings)).eval()
    assert not model.load_state_dict(smollm2[0].state_dict(), strict=False)[0]
    plan = constant(dims_of(model.config), 0.3, layout=Layout(True, basis_groups=(2, 10)))
    windows = token_windows("sotu", "train", smollm2[1], 256, 8, seed=1)
    held_out = token_windows("sotu", "test", smollm2[1], 256, 4, seed=1)
    for count in (2, 8):
        change, noise = change_of(model, windows[:count], held_out, plan, Compensation())
        assert change <= noise


def test_inputs_that_are_zero_take_no_correction():
    z, _, h = made()
    z[:, :3] = 0
    regression = Regression([3, 5], 4, CPU)
    regression.add(z[None], torch.zeros_like(h)[None], h[None])
    D = regression.solve(0.3)
    assert torch.equal(D[:3], torch.zeros(3, 4, dtype=torch.float64))
    assert D.isfinite().all()


@pytest.mark.parametrize("ridge", [0.0, -1.0, float("nan"), float("inf")])
def test_a_ridge_that_is_none_is_refused(ridge):
    with pytest.raises(RequestError, match="is no positive number; give one such as"):
        Compensation(ridge)


def test_signals_that_are_not_finite_are_named():
    z, _, h = made()
    z[3, 3] = float("nan")
    regression = Regression([3, 5], 4, CPU)
    regression.add(z[None], torch.zeros_like(h)[None], h[None])
    with pytest.raises(RequestError, match="inputs of a map that writes the residual stream"):
        regression.check()


def test_a_ridge_that_rounding_defeats_is_said():
    regression = Regression([2], 1, CPU)
    regression._grams[0][:] = torch.tensor([[1.0, 1.1], [1.1, 1.0]])  # no sum of squares
    with pytest.raises(RunError, match="ridge 1e-06 is too small"):
        regression.solve(1e-6)


def test_a_store_next_to_another_shares_its_room(tmp_path):
    batch = torch.ones(1, 2, 4)
    x = Activations(CPU, 2 * batch.nbytes, folder=tmp_path)
    other = x.empty_store()
    for store in (x, other, other):
        store.append(batch.clone())
    assert [len(store) for store in (x, other)] == [1, 2]
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1
    other.clear()
    assert len(other) == 0
    assert not list(tmp_path.rglob("*.safetensors"))
    other.append(batch.clone())
    assert not list(tmp_path.rglob("*.safetensors"))


def test_compensation_is_a_value():
    assert Compensation(0.3) == replace(OURS, ridge=0.3)
