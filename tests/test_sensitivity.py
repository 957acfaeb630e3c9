"""What one place is worth, beside projectors in the library's own layers."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, projector_oracle
from test_slicing import logits_of

from dynslice.core.errors import RequestError
from dynslice.evaluate.perplexity import perplexity
from dynslice.evaluate.place_losses import place_losses
from dynslice.method.architectures import dims_of
from dynslice.method.plan import constant


def nll_of(logits, windows):
    losses = F.cross_entropy(
        logits[:, :-1].flatten(0, 1).double(), windows[:, 1:].flatten(), reduction="none"
    )
    return losses.view(len(windows), -1).mean(1)


@pytest.fixture
def unseen():
    return torch.randint(2, 97, (3, 24), generator=torch.Generator().manual_seed(9))


def test_cutting_one_place_of_the_dense_model_is_one_projector_in_it(tiny, tokens, unseen):
    shape = dims_of(tiny.config)
    value = place_losses(tiny, tokens, unseen, constant(shape, 0.0, 1), [0.25, 0.5])
    assert value["plan"] == pytest.approx(perplexity(tiny, unseen)["nll"], abs=1e-5)
    assert value["shares"] == [0.25, 0.5]
    count = len(shape.reads) * shape.layers
    assert len(value["places"]) == count
    for place in (0, count // 2, count - 1):
        for share, losses in zip((0.25, 0.5), value["places"][place]["losses"], strict=True):
            widths = [48] * (count + 1)
            widths[place] = round(48 * (1 - share))
            expected = nll_of(projector_oracle(tiny, tokens, unseen, widths), unseen)
            assert losses == pytest.approx(expected.tolist(), abs=2e-3)


def test_around_a_plan_all_other_places_are_cut_as_it_says(tokens, unseen):
    model = TINY["llama"]()
    shape = dims_of(model.config)
    plan = constant(shape, 0.25, 1)
    value = place_losses(model, tokens, unseen, plan, [0.25, 0.5])
    expected = nll_of(projector_oracle(model, tokens, unseen, plan.place_widths), unseen)
    assert value["plan"] == pytest.approx(expected.tolist(), abs=2e-3)
    for place in value["places"]:
        assert place["share"] == 0.25
        assert place["losses"][0] == value["plan"]  # as the plan says
        assert place["losses"][1] != value["plan"]
    last = [*plan.place_widths[:-2], 24, 48]
    expected = nll_of(projector_oracle(model, tokens, unseen, last), unseen)
    assert value["places"][-1]["losses"][1] == pytest.approx(expected.tolist(), abs=2e-3)


def test_calibration_windows_may_be_longer(tokens, unseen):
    model = TINY["mistral"]()
    plan = constant(dims_of(model.config), 0.25, 1)
    value = place_losses(model, tokens, unseen[:, :15], plan, [0.5])
    expected = projector_oracle(model, tokens, unseen[:, :15], plan.place_widths)
    assert value["plan"] == pytest.approx(nll_of(expected, unseen[:, :15]).tolist(), abs=2e-3)


def test_places_are_named_in_the_order_of_the_stream(tokens, unseen):
    model = TINY["llama"]()
    value = place_losses(model, tokens, unseen, constant(dims_of(model.config), 0.25, 1), [0.5])
    names = [(place["layer"], place["block"]) for place in value["places"]]
    assert names == [(i, block) for i in range(3) for block in ("attention", "mlp")]


@pytest.mark.parametrize("share", [0.0, 1.0, -0.2])
def test_a_share_that_is_none_is_refused(share, tokens, unseen):
    model = TINY["llama"]()
    with pytest.raises(RequestError, match=f"share {share} is outside 0 to 1"):
        place_losses(model, tokens, unseen, constant(dims_of(model.config), 0.25, 1), [share])


def test_a_plan_of_another_model_is_refused(tokens, unseen):
    model = TINY["llama"]()
    other = replace(dims_of(model.config), vocab_size=50)
    with pytest.raises(RequestError, match="made for another model"):
        place_losses(model, tokens, unseen, constant(other, 0.25, 1), [0.5])


def test_the_model_is_left_alone(tokens, unseen):
    model = TINY["llama"]()
    before = logits_of(model, unseen)
    place_losses(model, tokens, unseen, constant(dims_of(model.config), 0.25, 1), [0.5])
    assert torch.equal(logits_of(model, unseen), before)
