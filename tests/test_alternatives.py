"""What a user would pick instead of slicing: fewer layers, fewer neurons."""

import pytest
import torch
from conftest import TIED, TINY, decoder, write_of_the_last_block
from transformers import AutoModelForCausalLM

from dynslice.core.errors import RequestError
from dynslice.extensions import layers, neurons
from dynslice.extensions.compensation import Compensation
from dynslice.inputs.checkpoints import write
from dynslice.inputs import models
from dynslice.method.redundancy import layer_redundancy


def logits(model, tokens):
    with torch.inference_mode():
        return model(tokens, use_cache=False).logits


@pytest.mark.parametrize("name", TINY)
def test_dropping_nothing_changes_nothing(name, tokens):
    model = TINY[name]()
    wanted = logits(model, tokens)
    whole = layers.drop_layers(model, [], tokens, Compensation())
    assert torch.equal(logits(whole, tokens), wanted)
    assert torch.equal(logits(neurons.drop_neurons(model, tokens, 0.0), tokens), wanted)


@pytest.mark.parametrize("name", TINY)
def test_a_dropped_layer_is_one_that_does_not_run(name, tokens):
    model = TINY[name]()
    fewer = layers.drop_layers(model, [1])
    del decoder(model).layers[1]
    for index, layer in enumerate(decoder(model).layers):
        layer.self_attn.layer_idx = index
    if types := getattr(model.config, "layer_types", None):
        model.config.layer_types = [types[0], types[2]]
    model.config.num_hidden_layers = 2
    assert torch.equal(logits(fewer, tokens), logits(model, tokens))


@pytest.mark.parametrize("name", ["llama", "qwen2", "opt", "phi"])
def test_a_span_that_is_linear_in_what_is_written_is_given_back(name, tokens):
    """A layer whose blocks add a multiple of what the layer before wrote is no loss."""
    torch.manual_seed(0)
    model = TINY[name]()
    first = decoder(model).layers[0]
    more = torch.randn(6, 64) * 0.1
    wanted = {}

    def doubled(_layer, args, output):
        x = args[0] if args else None
        wanted["x"] = output
        return output

    handle = first.register_forward_hook(doubled)
    logits(model, tokens)
    handle.remove()
    del more
    # Layer 1 writes nothing, so that it is the identity: dropping it loses nothing to give back.
    for parameter_name, parameter in decoder(model).layers[1].named_parameters():
        if any(parameter_name.startswith(w) for w in ("self_attn.o", "self_attn.dense")) or (
            parameter is write_of_the_last_block(decoder(model).layers[1]).weight
        ):
            parameter.data.zero_()
        if parameter_name.endswith(("out_proj.bias", "fc2.bias", "dense.bias")):
            parameter.data.zero_()
    for compensation in (None, Compensation(ridge=1e-3)):
        fewer = layers.drop_layers(model, [1], tokens, compensation)
        torch.testing.assert_close(
            logits(fewer, tokens), logits(model, tokens), atol=1e-3, rtol=1e-3
        )


def test_the_map_brings_the_stream_nearer_to_the_dense_one(smollm2):
    model, tokenizer = smollm2
    from dynslice.evaluate.perplexity import perplexity
    from dynslice.inputs.windows import token_windows

    calibration = token_windows("sotu", "train", tokenizer, 256, 8, seed=1)
    held_out = token_windows("sotu", "test", tokenizer, 256, 4, seed=1)
    dropped = layers.highest(layer_redundancy(model, calibration).lr, 3)
    plain = layers.drop_layers(model, dropped)
    mapped = layers.drop_layers(model, dropped, calibration, Compensation())
    before, after = (perplexity(m, held_out)["nll_mean"] for m in (plain, mapped))
    assert after < before - 0.02


def test_the_layers_of_highest_lr_go():
    assert layers.highest([0.1, 0.9, 0.5, 0.8], 2) == [1, 3]
    assert layers.highest([0.1, 0.9], 0) == []
    with pytest.raises(RequestError, match="leave at least one"):
        layers.highest([0.1, 0.9], 2)


def test_layers_go_one_by_one_by_lr_of_what_is_left(tokens):
    model = TINY["llama"]()
    [first] = layers.one_by_one(model, tokens, 1)
    lr = layer_redundancy(model, tokens).lr
    assert first == lr.index(max(lr))
    both = layers.one_by_one(model, tokens, 2)
    left = [i for i in range(3) if i != first]
    again = layer_redundancy(layers.of_layers(model, left), tokens).lr
    assert {*both} == {first, left[again.index(max(again))]}


def test_a_size_says_how_many_layers_go():
    model = TINY["llama"]()
    stored = sum(p.numel() for p in model.parameters())
    each = sum(p.numel() for p in decoder(model).layers[0].parameters())
    assert layers.within(model, stored) == 0
    assert layers.within(model, stored - 1) == 1
    assert layers.within(model, stored - each - 1) == 2
    with pytest.raises(RequestError, match="of a single layer"):
        layers.within(model, stored - 3 * each)


@pytest.mark.parametrize("name", ["llama", "phi3", "opt", "phi", "gemma"])
def test_neurons_that_say_nothing_go_first(name, tokens):
    """Half of the neurons are dead, anywhere: without them nothing changes."""
    model = TINY[name]()
    for layer in decoder(model).layers:
        m = write_of_the_last_block(layer).in_features
        dead = torch.randperm(m, generator=torch.Generator().manual_seed(1))[: m // 2]
        for read in ("mlp.gate_proj", "mlp.up_proj", "mlp.gate_up_proj", "fc1", "mlp.fc1"):
            if hasattr(layer, read.partition(".")[0]) and read in dict(layer.named_modules()):
                for parameter in layer.get_submodule(read).parameters():
                    parameter.data.unflatten(0, (-1, m))[:, dead] = 0.0
    narrower = neurons.drop_neurons(model, tokens, 0.5, ridge=1e-9)
    size = getattr(narrower.config, "ffn_dim", None) or narrower.config.intermediate_size
    assert size == m // 2
    torch.testing.assert_close(
        logits(narrower, tokens), logits(model, tokens), atol=1e-4, rtol=1e-4
    )


def test_leverage_keeps_the_neurons_that_matter():
    torch.manual_seed(0)
    z = torch.randn(1000, 8, dtype=torch.float64)
    z[:, [1, 4, 6]] *= 1e-3
    kept, back = neurons.kept_neurons(z.T @ z, 5)
    assert kept.tolist() == [0, 2, 3, 5, 7]
    assert back.shape == (8, 5)
    torch.testing.assert_close(back[kept], torch.eye(5, dtype=torch.float64), atol=0.02, rtol=0)


@pytest.mark.parametrize("name", TIED)
def test_what_is_left_is_an_ordinary_checkpoint(name, tokens, tmp_path):
    model = TIED[name]()
    tokenizer = models.load_tokenizer("embedded:tiny-random")
    made = {
        "layers": layers.drop_layers(model, [1], tokens, Compensation(ridge=1.0)),
        "neurons": neurons.drop_neurons(model, tokens, 0.25),
    }
    for what, network in made.items():
        folder = tmp_path / what
        folder.mkdir()
        write(network, tokenizer, folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert type(loaded) is type(model)
        torch.testing.assert_close(logits(loaded, tokens), logits(network, tokens))
