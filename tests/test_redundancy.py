"""LR against its definition on kept hidden states."""

import math

import pytest
import torch
from conftest import TINY, decoder, write_of_the_last_block

from dynslice.core.errors import RequestError
from dynslice.inputs.windows import sliding_windows
from dynslice.method.architectures import dims_of
from dynslice.method.plan import constant
from dynslice.method.redundancy import layer_redundancy
from dynslice.method.scores import SCORES, normalise, scores_of
from dynslice.method.slicing import slice_model

LAYERS = 3


@torch.inference_mode()
def kept_states(model, tokens):
    """x_0 to x_L [n, T, d] in float64: what enters each layer, and what leaves the last."""
    states = []
    layers = decoder(model).layers
    handles = [
        layer.register_forward_pre_hook(lambda _, x: states.append(x[0])) for layer in layers
    ]
    handles.append(layers[-1].register_forward_hook(lambda _layer, _x, out: states.append(out)))
    model(tokens)
    for handle in handles:
        handle.remove()
    return [state.double() for state in states]


def cosines(x, y):
    return (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))


def hooks_of(model):
    return [len(layer._forward_hooks) for layer in decoder(model).layers]


def test_lr_is_the_mean_cosine_of_input_and_output(tiny, tokens):
    x = kept_states(tiny, tokens)
    expected = [cosines(x[i], x[i + 1]).mean().item() for i in range(LAYERS)]
    assert layer_redundancy(tiny, tokens, 24).lr == pytest.approx(expected, abs=1e-6)


def test_angular_distance_and_update_norm_are_those_of_their_definitions(tiny, tokens):
    x = kept_states(tiny, tokens)
    got = layer_redundancy(tiny, tokens, 24)
    angles = [cosines(x[i], x[i + 1]).arccos().mean().item() / math.pi for i in range(LAYERS)]
    updates = [
        ((x[i + 1] - x[i]).norm(dim=-1) / x[i].norm(dim=-1)).mean().item() for i in range(LAYERS)
    ]
    assert got.angular_distance == pytest.approx(angles, abs=1e-6)
    assert got.update_norm == pytest.approx(updates, rel=1e-5)


def test_scores_are_high_where_a_layer_changes_little():
    little = {"lr": 0.9, "angular_distance": 0.1, "update_norm": 0.3}
    much = {"lr": 0.2, "angular_distance": 0.4, "update_norm": 1.5}
    expected = {"cosine": [0.9, 0.2], "angular": [0.9, 0.6], "update": [-0.3, -1.5]}
    for score in SCORES:
        assert scores_of([little, much], score) == expected[score]


@torch.inference_mode()
def test_normed_compares_the_last_layer_with_the_normed_state(tiny, tokens):
    x = kept_states(tiny, tokens)
    raw, normed = (layer_redundancy(tiny, tokens, 24, kind).lr for kind in ("raw", "normed"))
    parts = decoder(tiny)
    names = ("norm", "final_layer_norm", "final_layernorm")
    final_norm = next(getattr(parts, name) for name in names if hasattr(parts, name))
    expected = cosines(x[-2], final_norm(x[-1].float()).double()).mean().item()
    assert normed[-1] == pytest.approx(expected, abs=1e-6)
    assert normed[:-1] == raw[:-1]
    assert abs(normed[-1] - raw[-1]) > 1e-3  # the definitions differ here


def test_windows_weigh_alike_however_they_are_batched(tokens, monkeypatch):
    model = TINY["llama"]()
    whole = layer_redundancy(model, tokens, 24).lr
    monkeypatch.setattr(
        "dynslice.method.redundancy.batches", lambda windows, _desc, _device: iter(windows.split(4))
    )
    assert layer_redundancy(model, tokens, 24).lr == pytest.approx(whole, abs=1e-6)


def test_result_says_what_it_was_measured_on(tokens):
    windows = sliding_windows(tokens.flatten(), 24, 10)
    result = layer_redundancy(TINY["llama"](), windows, 10, "normed").to_dict()
    asked = {"tokens": 144, "windows": 13, "window": 24, "stride": 10, "last_layer": "normed"}
    assert {key: result[key] for key in asked} == asked
    assert [layer["index"] for layer in result["layers"]] == list(range(LAYERS))
    scores = [layer["normalised"] for layer in result["layers"]]
    assert (min(scores), max(scores)) == (0.0, 1.0)


@pytest.mark.parametrize(("length", "window", "stride"), [(100, 40, 20), (99, 40, 7), (40, 40, 9)])
def test_sliding_windows_start_at_every_stride(length, window, stride):
    stream = torch.arange(length)
    expected = [stream[i : i + window] for i in range(0, length - window + 1, stride)]
    assert torch.equal(sliding_windows(stream, window, stride), torch.stack(expected))


def test_text_shorter_than_a_window_is_one_short_window(tokens):
    windows = sliding_windows(tokens[0], 1024, 256)
    assert torch.equal(windows, tokens[:1])
    result = layer_redundancy(TINY["llama"](), windows, 256)
    assert (result.tokens, result.windows, result.window) == (24, 1, 24)


@pytest.mark.parametrize("length", [0, 1])
def test_stream_without_a_pair_of_tokens_is_refused(length):
    with pytest.raises(RequestError, match=f"holds {length} token.*at least 2"):
        sliding_windows(torch.zeros(length, dtype=torch.long), 8, 4)


def test_non_finite_activations_are_an_error_that_names_the_layer(tiny, tokens):
    write_of_the_last_block(decoder(tiny).layers[1]).weight.data[0, 0] = float("nan")
    with pytest.raises(RequestError, match="layer 1 is not finite"):
        layer_redundancy(tiny, tokens, 24)


def test_zero_vector_has_cosine_zero(tiny, tokens):
    for table in ("embed_tokens", "embed_positions"):
        if hasattr(decoder(tiny), table):
            getattr(decoder(tiny), table).weight.data.zero_()
    lr = layer_redundancy(tiny, tokens, 24).lr
    assert lr[0] == 0
    assert all(-1 <= score <= 1 for score in lr)  # false for NaN


def test_equally_redundant_layers_are_all_normalised_to_one():
    assert normalise((0.4, 0.4, 0.4)) == (1.0, 1.0, 1.0)


def test_normalised_scores_span_zero_to_one():
    assert normalise((0.25, 0.75, 0.5)) == (0.0, 1.0, 0.5)


def test_sliced_model_is_refused(tokens):
    model = TINY["llama"]()
    sliced = slice_model(model, tokens, constant(dims_of(model.config), 0.25)).model
    with pytest.raises(RequestError, match="sliced already"):
        layer_redundancy(sliced, tokens, 24)


def test_unknown_definition_is_refused(tokens):
    with pytest.raises(RequestError, match="last_layer 'final' is unknown; use raw or normed"):
        layer_redundancy(TINY["llama"](), tokens, 24, "final")


def test_hooks_are_removed(tiny, tokens):
    layer_redundancy(tiny, tokens, 24)
    assert hooks_of(tiny) == [0] * LAYERS


def test_hooks_are_removed_after_an_error(tiny, tokens, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr(decoder(tiny).layers[1], "forward", broken)
    with pytest.raises(ZeroDivisionError):
        layer_redundancy(tiny, tokens, 24)
    assert hooks_of(tiny) == [0] * LAYERS
