"""A walk on a GPU that nobody has: tensors that are on one by their type alone.

Fake tensors have shape, dtype and device, and no values. Whatever mixes devices fails, and what
waits for a value or takes a large product in float64 is noted with where it was asked.
"""

import sys

import pytest
import torch
from conftest import TINY, TIED
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dynslice.core import tensors
from dynslice.evaluate import perplexity as perplexities
from dynslice.evaluate.place_losses import place_losses
from dynslice.extensions.compensation import Compensation
from dynslice.method import slicing, streaming
from dynslice.method.architectures import dims_of
from dynslice.method.layout import Layout
from dynslice.method.plan import constant, dynamic
from dynslice.method.redundancy import layer_redundancy

CUDA = torch.device("cuda", 0)
# Functions that run once for each batch: nothing there may wait for the GPU.
FOR_EACH_BATCH = {"past", "add", "add_up", "add_gram", "covariance", "block_output", "head_losses"}


class Walk(TorchDispatchMode):
    """Answers what asks for a value, and notes it: (what, whether inside a loop over batches)."""

    def __init__(self):
        super().__init__()
        self.waits, self.large = [], []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            [x] = arguments
            if x.device.type == "cuda":
                self.waits.append(_asked_for())
            # Finite, sound and worth a correction: what lets the walk go on.
            return True if x.dtype == torch.bool else -1.0 if x.is_floating_point() else 0
        made = function(*arguments, **(options or {}))
        products = ("mm", "addmm", "bmm", "baddbmm")
        name = function._schema.name.removeprefix("aten::").rstrip("_")
        if name in products and made.dtype == torch.float64 and made.device.type == "cuda":
            self.large.append((tuple(made.shape), _asked_for()))
        return made


def _asked_for():
    """The functions of dynslice that are running, innermost first."""
    names, frame = [], sys._getframe(2)
    while frame is not None:
        if "dynslice" in frame.f_code.co_filename:
            names.append(frame.f_code.co_name)
        frame = frame.f_back
    return names


@pytest.fixture
def walk(monkeypatch):
    """A function that makes a tiny model of a family on the GPU, and the notes of the walk."""
    for module in (slicing, streaming):
        monkeypatch.setattr(module, "synchronise", lambda _device: None)
    notes = Walk()
    with FakeTensorMode(allow_non_fake_inputs=True), notes:

        def make(name, models=TINY, dtype=torch.bfloat16):
            with torch.device(CUDA):
                return models[name]().to(dtype).eval()

        yield make, notes


def check(notes, d):
    """Nothing waited inside a loop over batches, and no large product was in float64."""
    assert [names for names in notes.waits if FOR_EACH_BATCH & set(names)] == []
    assert [shape for shape, _ in notes.large if shape[-1] * shape[-2] > d * d] == []


@pytest.mark.parametrize("name", [n for n in TINY if n != "opt-plain"])
def test_lr_slicing_and_perplexity_stay_on_the_device(walk, tokens, name):
    make, notes = walk
    model = make(name)
    lr = layer_redundancy(model, tokens)
    assert len(lr.lr) == 3
    plan = dynamic(dims_of(model.config), [0.1, 0.5, 0.9], 0.3, round_to=1)
    sliced = slicing.slice_model(model, tokens, plan).model
    assert {p.device for p in sliced.parameters()} == {CUDA}
    perplexities.perplexity(sliced, tokens)
    check(notes, 48)


@pytest.mark.parametrize(
    "layout", [Layout(tied=True), Layout(tied=True, basis_groups=(2, 4)), Layout(plain=True)]
)
def test_every_recipe_stays_on_the_device(walk, tokens, layout):
    make, notes = walk
    model = make("llama", TIED)
    round_to = 4 if layout.plain else 1
    plan = constant(dims_of(model.config), 0.25, round_to, layout=layout)
    sliced = slicing.slice_model(model, tokens, plan, Compensation()).model
    assert {p.device for p in sliced.parameters()} == {CUDA}
    perplexities.perplexity(sliced, tokens)
    check(notes, 48)


def test_losses_by_place_stay_on_the_device(walk, tokens):
    make, notes = walk
    model = make("llama")
    plan = constant(dims_of(model.config), 0.25, 1)
    place_losses(model, tokens, tokens, plan, [0.1, 0.4])
    check(notes, 48)


def test_a_wait_inside_a_loop_is_found(walk, tokens, monkeypatch):
    make, notes = walk
    model = make("llama")
    run = slicing.run_block

    def waiting(x, R, block):
        def watched(stream):
            assert stream.abs().max() >= -1.0
            return block(stream)

        run(x, R, watched)

    monkeypatch.setattr(slicing, "run_block", waiting)
    slicing.slice_model(model, tokens, constant(dims_of(model.config), 0.25, 1))
    with pytest.raises(AssertionError):
        check(notes, 48)


def test_mixed_devices_are_found(walk, tokens):
    make, _ = walk
    model = make("llama")
    with pytest.raises(Exception, match=r"device|cuda"):
        model.get_input_embeddings()(tokens.to(CUDA)) + torch.ones(48)
