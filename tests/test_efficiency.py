"""Counts against their definitions, and the benchmark on a tiny model."""

import json

import pandas as pd
import pytest
import torch
from conftest import CPU, TINY, projector_oracle

from dynslice.cli import bench, bench_rows
from dynslice.core import paths
from dynslice.evaluate import speed
from dynslice.experiment.requests import Point
from dynslice.inputs import embedded_models
from dynslice.method.architectures import dims_of
from dynslice.method.footprint import decode_bytes, extra_memory, flops, stored_bytes
from dynslice.method.plan import constant
from dynslice.method.slicing import slice_model
from dynslice.report import efficiency, style


def sliced(model, tokens, share=0.5):
    return slice_model(model, tokens, constant(dims_of(model.config), share, 1)).model


def linear_flops(model, batch, length):
    """2 per weight and token; the embedding is a look-up, the head runs on the last position."""
    head = model.get_output_embeddings().weight.numel()
    weights = sum(
        p.numel() for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n
    )
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        weights -= head
    return 2 * batch * (weights * length + head)


@pytest.mark.parametrize("name", ["llama", "llama-biases", "mistral"])
def test_flops_are_those_of_the_matrix_products(name, tokens):
    for model in (TINY[name](), sliced(TINY[name](), tokens)):
        config, batch, length = model.config, 3, 20
        attention = 4 * batch * config.num_hidden_layers * length**2
        attention *= config.num_attention_heads * model.model.layers[0].self_attn.head_dim
        counted = flops(config, batch, length)
        assert counted == linear_flops(model, batch, length) + attention
        without = flops(config, batch, length, head=False)
        head = 2 * batch * config.hidden_size * config.vocab_size
        assert counted - without == head


def test_bytes_are_those_of_the_stored_weights(tokens):
    dense = TINY["llama"]()  # its head is tied
    assert decode_bytes(dense) == stored_bytes(dense)
    network = sliced(dense, tokens)
    embedding = network.get_input_embeddings().weight.nbytes
    assert stored_bytes(network) == 4 * sum(t.numel() for t in network.parameters())
    assert decode_bytes(network) == stored_bytes(network) - embedding


def test_memory_is_that_of_the_tensors_held_at_once():
    def step():
        a = torch.zeros(100, 100)
        b = a + 1
        del a
        c = b * 2
        return b.add_(1).view(-1), c

    assert extra_memory(step, CPU) == 2 * 100 * 100 * 4
    assert extra_memory(lambda: None, CPU) == 0


def test_steps_take_turns():
    order = []
    steps = {name: lambda name=name: order.append(name) for name in "ab"}
    times = speed.alternate(steps, CPU, repeats=3)
    assert order == ["a", "b"] + ["a", "b"] * 3
    assert [len(values) for values in times.values()] == [3, 3]


def test_decoding_generates_what_was_asked():
    model, calls = TINY["llama"](), []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: calls.append(args[0].shape[1]))
    speed.decode(model, torch.randint(2, 97, (1, 8)), 5)
    assert calls == [8, 1, 1, 1, 1]


def test_speed_puts_a_network_next_to_its_dense_model(tokens):
    dense = TINY["llama"]()
    value = speed.speed(dense, sliced(dense, tokens), torch.randint(2, 97, (2, 40)), 3, 2)
    for name in ("prefill_seconds", "decode_seconds"):
        assert {which: len(times) for which, times in value[name].items()} == {
            "dense": 2,
            "sliced": 2,
        }
    assert value["prefill_flops"]["sliced"] < value["prefill_flops"]["dense"]
    assert value["prefill_tokens"] == 80


def test_the_benchmarks_oracle_is_the_definition(tokens):
    model = TINY["llama-biases"]()
    plan = constant(dims_of(model.config), 0.4, 1)
    unseen = torch.randint(2, 97, (1, 24), generator=torch.Generator().manual_seed(9))
    wanted = projector_oracle(model, tokens, unseen, plan.place_widths)
    got = bench_rows.oracle_logits(model, tokens, unseen, plan)
    torch.testing.assert_close(got, wanted, atol=1e-3 * float(wanted.abs().max()), rtol=0)


@pytest.mark.parametrize(
    ("ratio", "low", "high", "met", "limit"),
    [
        (1.2, None, 1.5, True, "at most 1.5"),
        (1.6, None, 1.5, False, "at most 1.5"),
        (1.0, 0.9, 1.1, True, "0.9 to 1.1"),
        (0.8, 0.9, 1.1, False, "0.9 to 1.1"),
        (1.4, 1.5, None, False, "at least 1.5"),
        (0.3, None, None, None, ""),
    ],
)
def test_limits(ratio, low, high, met, limit):
    row = bench_rows.Row("step", 1.0, "", ratio, "", low, high)
    assert (row.met, row.limit) == (met, limit)


@pytest.mark.parametrize(("name", "billions"), [("llama-3-8b", 8.03), ("mistral-7b", 7.24)])
def test_shapes_have_the_published_number_of_parameters(name, billions):
    model = bench_rows.Subject(None, name, torch.device("meta"), torch.bfloat16).load()
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(billions * 1e9, rel=1e-3)


@pytest.fixture(scope="module")
def tiny_bench(tmp_path_factory):
    """The benchmark of the tiny model, from the command line."""
    out = tmp_path_factory.mktemp("bench") / "bench.json"
    from dynslice.cli.commands import main

    rate = speed.matrix_rate
    with pytest.MonkeyPatch.context() as patch:  # a smaller product: nothing here rests on it
        patch.setattr(speed, "matrix_rate", lambda device, dtype: rate(device, dtype, 256))
        asked = ["bench", "--model", "embedded:tiny-random", "--device", "cpu", "--windows", "4"]
        assert main([*asked, "--window", "64", "--repeats", "2", "--out", str(out)]) == 0
    return json.loads(out.read_text())


def test_the_benchmark_checks_its_own_results(tiny_bench):
    rows = {row["step"]: row for row in tiny_bench["rows"]}
    checks = [row for step, row in rows.items() if step.startswith("check")]
    assert len(checks) == 2
    assert all(row["met"] for row in checks)
    for step in ("layer redundancy", "slice, constant, SP 25%", "slice, dynamic, SP 25%, SB 0%"):
        assert rows[step]["ratio"] > 0
        assert rows[step]["seconds"] > 0
    assert tiny_bench["provenance"]["device_class"] == "cpu"


def test_random_weights_of_a_shape_are_measured_without_a_tokenizer(monkeypatch):
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 500}
    monkeypatch.setitem(embedded_models.SHAPES, "small", {"model_type": "mistral", **small})
    subject = bench_rows.Subject(None, "small", CPU, torch.float32, layers=2)
    monkeypatch.setattr(bench_rows, "ProcessPoolExecutor", _Here)
    result = bench.run(subject, "sotu", 4, 64, 0.25, 1)
    steps = [row["step"] for row in result["rows"]]
    assert result["text"] == "random tokens"
    assert not any("HellaSwag" in step or "sweep" in step for step in steps)
    assert result["model"] == "random weights of the shape of small, 2 layers"
    assert subject.load().config.num_hidden_layers == 2


class _Here:
    """An executor that runs in this process, where the shape of the test is known."""

    def __init__(self, *_args, **_options):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def submit(self, function, *arguments):
        value = function(*arguments)
        return type("Done", (), {"result": lambda _self: value})()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--shape", "llama-9"), "shape 'llama-9' is unknown; there are llama-3-8b, mistral-7b"),
        (
            ("--shape", "llama-3-8b", "--model", "x"),
            "--shape means random weights and random tokens; leave --model out",
        ),
        (("--shape", "llama-3-8b", "--layers", "33"), "shape 'llama-3-8b' has 32 layers, not 33"),
        (("--layers", "4"), "--layers is about random weights; give --shape with it"),
        (("--slice-percentage", "1.5"), "1.5"),
        (("--calibration", "nowhere"), "text 'nowhere' is neither a corpus"),
    ],
)
def test_bad_requests_are_refused(options, message, ask):
    status, out, err = ask("bench", *options)
    assert (status, out) == (2, "")
    assert message in err
    assert len(err.strip().splitlines()) == 1


# Notebook 05


def speeds():
    """Two networks that need the same for a token; the dynamic one stores a tenth more."""
    value = {
        "stored_bytes": {"dense": 100, "sliced": 90},
        "prefill_extra_bytes": {"dense": 10, "sliced": 8},
        "prefill_flops": {"dense": 3000, "sliced": 2000},
        "decode_bytes": {"dense": 80, "sliced": 64},
        "prefill_tokens": 10,
        "prefill_seconds": {"dense": [3.0, 3.2, 9.0], "sliced": [2.0, 2.0, 2.0]},
        "decode_tokens": 4,
        "decode_seconds": {"dense": [1.0, 1.0, 1.0], "sliced": [1.0, 2.0, 0.5]},
    }
    points = [Point(schedule, 0.3, 0.0, {}) for schedule in ("constant", "dynamic")]
    rows = [efficiency._speed_row(p, value, step) for p in points for step in ("prefill", "decode")]
    sizes = {"network": [p.label for p in points], "SP": 0.3, "parameters (M)": [50.0, 55.0]}
    sizes["parameters, untied (M)"] = [60.0, 75.0]
    return pd.DataFrame(rows), pd.DataFrame(sizes)


def test_a_gain_is_the_ratio_of_medians_and_stands_next_to_what_was_counted():
    prefill, decode = speeds()[0].to_dict("records")[:2]
    assert prefill["gain (x)"] == pytest.approx(1.6)
    assert prefill["counted (x)"] == pytest.approx(1.5)
    assert (prefill["least (x)"], prefill["most (x)"]) == (1.5, 4.5)
    assert prefill["peak memory (MB)"] == pytest.approx(98e-6)
    assert (decode["gain (x)"], decode["counted (x)"]) == (1.0, 1.25)
    assert (decode["least (x)"], decode["most (x)"]) == (0.5, 2.0)


def test_tiny_ratios_and_counts_keep_their_digits():
    table = pd.DataFrame({"step": ["a check", "a gain"], "ratio": [3.2e-5, 0.9876]})
    assert style.rounded(table)["ratio"].tolist() == ["3.2e-05", "0.99"]
    counts = [{"prefill_flops": {"dense": n}, "prefill_tokens": 1} for n in (2.69e8, 4.76e5)]
    said = [efficiency._flops(value, "dense") for value in counts]
    assert said == ["0.269 GFLOP", "0.476 MFLOP"]


def test_equal_work_is_told_from_equal_size():
    text = efficiency.work_prose(*speeds())
    assert "by +0.0 to +0.0 % in what it needs" in text
    assert "by +10.0 to +10.0 % in what it stores" in text
    assert "that would be +25.0 to +25.0 %" in text
    assert efficiency.work_prose(pd.DataFrame(), speeds()[1]) == style.NONE


def test_benchmarks_that_nobody_ran_are_listed_with_their_command(tmp_path, monkeypatch):
    text = efficiency.unmeasured_prose()
    for name, (stem, command) in efficiency.BENCHES.items():
        have = (paths.BENCH / f"{stem}.json").is_file()
        assert (f"- {name}: `{command}" in text) == (not have)
    monkeypatch.setattr(paths, "BENCH", tmp_path)
    assert efficiency.unmeasured_prose().count("dynslice bench") == len(efficiency.BENCHES)
    for stem, _ in efficiency.BENCHES.values():
        (tmp_path / f"{stem}.json").write_text("{}")
    assert efficiency.unmeasured_prose() == "Every benchmark has been measured."


def test_commands_of_benchmarks_can_be_given():
    from dynslice.cli.commands import options_of

    for _, command in efficiency.BENCHES.values():
        options_of([*command.split()[1:], "--out", "x.json"])


def test_committed_benchmarks_are_of_clean_commits_and_their_checks_hold():
    assert efficiency.benches()
    for found in efficiency.benches().values():
        assert found["provenance"]["dirty"] is False
        checks = [row["met"] for row in found["rows"] if row["step"].startswith("check")]
        assert False not in checks
        assert (True in checks) == (found.get("shape") is None)


def test_the_readme_shows_the_committed_benchmark():
    page = (paths.ROOT / "docs" / "costs.md").read_text()
    assert efficiency.bench_block() in page


def test_streamed_slicing_is_a_row_with_its_prediction():
    """On a GPU only in a benchmark; here the row, whose peak means little on a CPU."""
    subject = bench_rows.Subject("embedded:tiny-random", None, CPU, torch.float32)
    windows = torch.randint(257, (2, 64), generator=torch.Generator().manual_seed(0))
    shape = dims_of(subject.load().config)
    peak, small = bench_rows.streamed_rows(subject, windows, constant(shape, 0.25))
    assert (peak.low, peak.high, small.high) == (0.8, 1.2, 1.0)
    assert peak.seconds > 0
    assert small.met
    assert small.step == "streamed slicing within 24 GiB"
