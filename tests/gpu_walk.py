"""A walk on a GPU that is not there; `test_walk` runs it in a process of its own."""

from collections import Counter
from math import prod

import pytest
import torch
from conftest import TIED, TINY
from gpu_device import CPU, GPU, Walk

from dynslice.core import tensors
from dynslice.evaluate.perplexity import perplexity
from dynslice.evaluate.shared_context import SharedContextLM
from dynslice.extensions.compensation import Compensation
from dynslice.extensions.finetuning import FineTuning, finetune
from dynslice.inputs import models
from dynslice.method.activations import Activations
from dynslice.method.architectures import dims_of
from dynslice.method.footprint import slicing_workspace
from dynslice.method.layout import Layout
from dynslice.method.numerics import CHECKED
from dynslice.method.plan import constant, dynamic
from dynslice.method.redundancy import layer_redundancy
from dynslice.method.slicing import slice_model
from dynslice.method.streaming import Budget


@pytest.fixture
def walk(monkeypatch):
    """The mode in which there is a GPU; a batch is two windows there, and not many."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)
    monkeypatch.setattr(tensors, "tokens_per_batch", lambda *_: 48)
    return Walk()


def on_gpu(walk, model):
    """The model on the GPU. Tied weights stay one."""
    with walk:
        model.to(GPU).tie_weights()
    return model


def check(walk, work, tokens, d=48):
    """Twice the batches wait no more often, and no product larger than d x d is in float64.

    What transformers waits for, once in a pass for its mask, is left out. The audit computes
    CHECKED rows of a map again, which may be more than d.
    """
    counts, notes = [], walk.notes
    for windows in (tokens, torch.cat([tokens, tokens])):
        notes.waits.clear()
        with walk:
            made = work(windows)
        counts.append(Counter(names for names in notes.waits if names[0] != "transformers"))
    assert counts[1] - counts[0] == Counter()
    assert [x for x in notes.large if prod(x[0]) > d * max(d, CHECKED)] == []
    return made


@pytest.mark.parametrize("name", [n for n in TINY if n != "opt-plain"])
def test_lr_slicing_and_perplexity(walk, tokens, name):
    model, here = on_gpu(walk, TINY[name]()), TINY[name]()
    lr = check(walk, lambda windows: layer_redundancy(model, windows).lr, tokens)
    twice = torch.cat([tokens, tokens])
    assert lr == pytest.approx(layer_redundancy(here, twice).lr, abs=1e-6)
    plan = dynamic(dims_of(model.config), [0.1, 0.5, 0.9], 0.3, round_to=1)
    sliced = check(walk, lambda windows: slice_model(model, windows, plan).model, tokens)
    assert {p.device for p in sliced.parameters()} == {GPU}
    found = check(walk, lambda windows: perplexity(sliced, windows)["nll"], tokens)
    wanted = perplexity(slice_model(here, twice, plan).model, twice)["nll"]
    assert found == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize("is_compensated", [False, True])
@pytest.mark.parametrize(
    "layout", [Layout(tied=True), Layout(tied=True, basis_groups=(2, 4)), Layout(plain=True)]
)
def test_every_recipe(walk, tokens, layout, is_compensated):
    model, here = on_gpu(walk, TIED["llama"]()), TIED["llama"]()
    plan = constant(dims_of(model.config), 0.25, 4 if layout.plain else 1, layout=layout)

    def sliced(network, windows):
        step = Compensation(ridge=0.1) if is_compensated else None
        return slice_model(network, windows, plan, *([step] if step else [])).model

    made = check(walk, lambda windows: sliced(model, windows), tokens)
    assert {p.device for p in made.parameters()} == {GPU}
    wanted = perplexity(sliced(here, torch.cat([tokens, tokens])), tokens)["nll"]
    with walk:
        found = perplexity(made, tokens)["nll"]
    assert found == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize("host", [None, 20_000])
def test_streaming(walk, tokens, tmp_path, host):
    model = TINY["llama"]()
    model.save_pretrained(tmp_path / "dense", max_shard_size="50KB")
    models.load_tokenizer("embedded:tiny-random").save_pretrained(tmp_path / "dense")
    plan = constant(dims_of(model.config), 0.25, 1)
    source, out = str(tmp_path / "dense"), tmp_path / "sliced"
    needed = slicing_workspace(model.config, plan, tokens.shape[1], GPU, torch.float32)
    budget = Budget(device=needed + 1000, host=host)  # the stream is in host memory, or on disk
    with walk:
        models.slice_saved(out, source, tokens, plan, GPU, torch.float32, budget=budget)
    made, _ = models.load(str(out), CPU, torch.float32)
    wanted = perplexity(slice_model(model, tokens, plan).model, tokens)["nll"]
    assert perplexity(made, tokens)["nll"] == pytest.approx(wanted, abs=1e-3)


def test_tasks(walk, tokens):
    scores, tokenizer = {}, models.load_tokenizer("embedded:tiny-random")
    for model in (on_gpu(walk, TINY["llama"](vocab_size=257)), TINY["llama"](vocab_size=257)):
        lm = SharedContextLM(pretrained=model, tokenizer=tokenizer)
        lm._device = model.device
        pairs = [(("a", "b"), [5, 6, 7], [8, n]) for n in range(9)]
        with walk:
            scores[model.device.type] = [p for p, _ in lm._loglikelihood_tokens(pairs, True)]
    assert scores["gpu"] == pytest.approx(scores["cpu"], abs=1e-4)


def test_recovery(walk, tokens):
    losses = []
    for model in (on_gpu(walk, TINY["llama"]()), TINY["llama"]()):
        plan = constant(dims_of(model.config), 0.25, 1)
        with walk:
            sliced = slice_model(model, tokens, plan).model
            walk.notes.waits.clear()
            tuned, _ = finetune(sliced, tokens, FineTuning(steps=20, rank=4))
            losses.append(perplexity(tuned, tokens)["nll_mean"])
        ours = [names for names in walk.notes.waits if names[0] != "transformers"]
        assert len([names for names in ours if "finetune" in names]) <= 4  # two looks at the loss
    assert losses[0] == pytest.approx(losses[1], abs=1e-2)


def test_a_wait_for_each_batch_is_found(walk, tokens, monkeypatch):
    model, update = on_gpu(walk, TINY["llama"]()), Activations.update

    def waiting(self, change):
        def watched(batch):
            assert batch.abs().max() >= 0
            return change(batch)

        update(self, watched)

    monkeypatch.setattr(Activations, "update", waiting)
    plan = constant(dims_of(model.config), 0.25, 1)
    with pytest.raises(AssertionError):
        check(walk, lambda windows: slice_model(model, windows, plan), tokens)


def test_mixed_devices_are_found(walk, tokens):
    model = on_gpu(walk, TINY["llama"]())
    for work in (
        lambda: model.get_input_embeddings()(tokens),
        lambda: model.model.norm.weight + torch.ones(48),
    ):
        with walk, pytest.raises(RuntimeError, match="all tensors must be on one device"):
            work()
