"""Recovery fine-tuning: lower loss, the same format, the same again by seed."""

import pytest
import torch
from conftest import TINY
from test_slicing import logits_of

from dynslice.core.errors import RequestError
from dynslice.extensions.finetuning import FineTuning, finetune
from dynslice.inputs import models
from dynslice.inputs.checkpoints import save
from dynslice.method.architectures import dims_of, family_of
from dynslice.method.plan import constant
from dynslice.method.slicing import slice_model


def sliced(model, tokens):
    return slice_model(model, tokens, constant(dims_of(model.config), 0.25, 1)).model


def loss_of(model, tokens):
    with torch.inference_mode():
        return float(model(tokens, labels=tokens).loss)


@pytest.mark.parametrize("name", ["llama", "opt", "phi", "phi3", "qwen3"])
def test_the_loss_falls_and_the_network_stores_what_it_stored(name, tokens):
    model = TINY[name]()
    network = sliced(model, tokens)
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    first = loss_of(network, tokens)
    merged, seconds = finetune(network, tokens, FineTuning(40, learning_rate=3e-2))
    assert loss_of(merged, tokens) < 0.95 * first
    assert seconds > 0
    after = merged.state_dict()
    assert {k: t.shape for k, t in after.items()} == {k: t.shape for k, t in before.items()}
    family = family_of(model.config)
    trained = {n for block in family.blocks for n in (*block.reads, *block.writes)}
    for key, tensor in after.items():
        in_block = any(key.endswith(f".{name}.weight") for name in trained)
        assert torch.equal(tensor, before[key]) != in_block, key
    assert type(merged) is type(network)
    assert not any(parameter.requires_grad for parameter in merged.parameters())


def test_it_is_the_same_again_and_the_seed_reaches_it(tokens):
    state = torch.get_rng_state()
    results = [
        logits_of(finetune(sliced(TINY["llama"](), tokens), tokens, FineTuning(3), seed)[0], tokens)
        for seed in (1, 1, 2)
    ]
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    torch.manual_seed(0)  # TINY seeds the generator; recovery left it as it found it
    torch.set_rng_state(state)


def test_windows_come_again_when_there_are_more_steps(tokens):
    network = sliced(TINY["llama"](), tokens)
    merged, _ = finetune(network, tokens[:2], FineTuning(5))
    assert logits_of(merged, tokens).isfinite().all()


def test_it_is_saved_and_loaded_as_any_slice(tokens, tmp_path):
    _, tokenizer = models.load("embedded:tiny-random", torch.device("cpu"), torch.float32)
    merged, _ = finetune(sliced(TINY["llama"](), tokens), tokens, FineTuning(2))
    save(merged, tokenizer, tmp_path / "out")
    loaded, _ = models.load(str(tmp_path / "out"), torch.device("cpu"), torch.float32)
    assert torch.equal(logits_of(loaded, tokens), logits_of(merged, tokens))


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"steps": 1, "learning_rate": 0.0}])
def test_numbers_that_make_no_training_are_refused(wrong):
    with pytest.raises(RequestError, match="makes no training"):
        FineTuning(**wrong)


def test_tokens_outside_the_vocabulary_are_refused(tokens):
    with pytest.raises(RequestError, match="vocabulary"):
        finetune(sliced(TINY["llama"](), tokens), tokens + 1000, FineTuning(1))
