"""Slicing a model that is never in memory as a whole."""

import errno
import json
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from conftest import CPU, TIED, TINY
from safetensors.torch import load_file, save_file

from dynslice.core.errors import RequestError
from dynslice.core.tensors import tokens_per_batch
from dynslice.extensions import bits
from dynslice.extensions.compensation import Compensation
from dynslice.inputs import models
from dynslice.method import streaming
from dynslice.method.activations import Activations
from dynslice.method.architectures import dims_of
from dynslice.method.footprint import (
    activation_bytes,
    extra_memory,
    largest_weight,
    layers_workspace,
    slicing_workspace,
    stored_bytes,
)
from dynslice.method.layout import Layout, basis_groups
from dynslice.method.numerics import RoundingAudit
from dynslice.method.plan import SlicePlan, constant
from dynslice.method.slicing import slice_model, sliced_weights

MIB = 2**20


def saved(model, folder):
    """A model directory with the byte tokenizer and shards of 50 kB."""
    model.save_pretrained(folder, max_shard_size="50KB")
    models.load_tokenizer("embedded:tiny-random").save_pretrained(folder)
    return str(folder)


def in_layout(layout, model):
    """A plan of uneven widths in a layout, of one width for a plain checkpoint."""
    shape = dims_of(model.config)
    if layout == "plain":
        return constant(shape, 0.25, 4, layout=Layout(plain=True))
    plan = SlicePlan("test", 0.0, 0.0, 1, (0.0,) * 3, (40, 17, 31), shape)
    blocks = len(shape.reads)
    groups = (blocks, 2 * blocks) if layout.endswith("grouped") else None
    return replace(plan, layout=Layout(layout.startswith("tied"), groups))


STREAMED = [(name, "published") for name in TINY]
STREAMED += [(name, "grouped") for name in ("llama", "mistral-sliding", "phi3", "opt", "phi")]
STREAMED += [(name, "plain") for name in ("llama", "mistral", "qwen2", "qwen3", "phi3")]
STREAMED += [(name, layout) for name in TIED for layout in ("tied", "tied-grouped")]


@pytest.mark.parametrize(("name", "layout"), STREAMED)
def test_streamed_slice_equals_the_one_in_memory(name, layout, tokens, tmp_path):
    model = (TIED if layout.startswith("tied") else TINY)[name]()
    plan = in_layout(layout, model)
    source, out = saved(model, tmp_path / "dense"), tmp_path / "sliced"
    budget = streaming.Budget(host=memory_needed(model.config, plan, tokens) + 1000)
    models.slice_saved(out, source, tokens, plan, CPU, torch.float32, budget=budget)

    wanted = slice_model(model, tokens, plan).model
    got, tokenizer = models.load(str(out), CPU, torch.float32)
    assert type(got) is type(wanted)
    settings = [loaded.config.to_dict() for loaded in (got, wanted)]
    for one in settings:  # which the files of a model do not tell
        for key in ("architectures", "_name_or_path", "auto_map"):
            one.pop(key, None)
    assert settings[0] == settings[1]
    assert got.generation_config.eos_token_id == wanted.generation_config.eos_token_id
    assert tokenizer("abc")["input_ids"]
    weights, expected = got.state_dict(), wanted.state_dict()
    assert weights.keys() == expected.keys()
    for key, weight in expected.items():
        assert torch.equal(weights[key], weight), key
    assert got.num_parameters() == plan.parameters
    has_code = any(path.suffix == ".py" for path in out.iterdir())
    assert has_code == (layout != "plain")
    assert list(tmp_path.glob(".*")) == []  # neither activations nor unfinished models


def memory_needed(config, plan, windows):
    """The least budget, in which all signals go to disk."""
    workspace = slicing_workspace(config, plan, windows.shape[1], CPU, torch.float32)
    largest = largest_weight(config, torch.float32)
    return max(int(workspace / 0.8), workspace + 2 * largest)


def test_budget_below_one_layer_is_refused_with_what_it_takes(tokens, tmp_path):
    model = TINY["llama"]()
    plan = constant(dims_of(model.config), 0.25)
    slice_to = partial(
        models.slice_saved, tmp_path / "out", saved(model, tmp_path / "dense"), tokens, plan
    )
    with pytest.raises(RequestError, match=r"host memory of 1000 B is less than the 1\.7 MiB"):
        slice_to(CPU, torch.float32, budget=streaming.Budget(host=1000))
    assert not (tmp_path / "out").exists()


def test_model_without_safetensors_is_refused(tokens, tmp_path):
    model = TINY["llama"]()
    plan = constant(dims_of(model.config), 0.25)
    source = saved(model, tmp_path / "dense")
    for file in (tmp_path / "dense").glob("*.safetensors*"):
        file.unlink()
    with pytest.raises(RequestError, match="has no safetensors"):
        models.slice_saved(tmp_path / "out", source, tokens, plan, CPU, torch.float32)


def _forbidden(path, monkeypatch):
    """Whoever runs the tests may be allowed to read everything."""
    usual = Path.open

    def open_(self, *how, **named):
        if self == path:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return usual(self, *how, **named)

    monkeypatch.setattr(Path, "open", open_)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
DAMAGE = {
    "cut": (lambda path, _: path.write_bytes(path.read_bytes()[:-40]), "save the model anew"),
    "header": (lambda path, _: path.write_bytes(path.read_bytes()[:20]), "save the model anew"),
    "empty": (lambda path, _: path.write_bytes(b""), "save the model anew"),
    "pointer": (lambda path, _: path.write_bytes(POINTER), "run `git lfs pull` there"),
    "forbidden": (_forbidden, "Permission denied.; let it be read"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("table", ["model.embed_tokens.weight", "lm_head.weight"])
def test_damaged_weights_are_named(table, damage, tokens, tmp_path, monkeypatch):
    model = TINY["llama-biases"]()
    plan = constant(dims_of(model.config), 0.25)
    source = saved(model, tmp_path / "dense")
    index = json.loads((tmp_path / "dense/model.safetensors.index.json").read_text())
    shard = tmp_path / "dense" / index["weight_map"][table]
    make, remedy = DAMAGE[damage]
    make(shard, monkeypatch)
    said = f"(cannot be read from|pointer in place of) {shard.name}.*{remedy}"
    with pytest.raises(RequestError, match=said):
        models.slice_saved(tmp_path / "out", source, tokens, plan, CPU, torch.float32)
    with pytest.raises(RequestError, match=said):
        models.load(source, CPU, torch.float32)


def _as_it_is(model, _, folder):
    return saved(model, folder)


def _cut(model, tokens, folder):
    return saved(slice_model(model, tokens, constant(dims_of(model.config), 0.25)).model, folder)


def _packed(model, _, folder):
    folder.mkdir()
    tokenizer = models.load_tokenizer("embedded:tiny-random")
    bits.quantize(model, [8, 8, 8]).save(tokenizer, folder)
    return str(folder)


@pytest.mark.parametrize("make", [_as_it_is, _cut, _packed])
def test_a_tensor_that_nothing_reads_is_refused_and_what_is_computed_is_not(make, tokens, tmp_path):
    model = TINY["llama"]()
    source, plan = make(model, tokens, tmp_path / "it"), constant(dims_of(model.config), 0.25)

    def load():
        if make is _as_it_is:
            models.slice_saved(tmp_path / "out", source, tokens, plan, CPU, torch.float32)
        return models.load(source, CPU, torch.float32)[0]

    wanted = load().state_dict()
    shard = sorted((tmp_path / "it").glob("*.safetensors"))[0]
    weights = load_file(shard)
    computed = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(6) for i in range(3)}
    save_file({**weights, **computed}, shard, metadata={"format": "pt"})
    found = load().state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    save_file({**weights, "score.weight": torch.ones(2, 48)}, shard, metadata={"format": "pt"})
    with pytest.raises(RequestError, match=r"not describe \(first score.weight\)"):
        load()


@pytest.mark.parametrize("room", [None, 0, 2 * 24 * 48 * 4])
def test_signals_are_the_same_wherever_they_are_kept(room, tmp_path):
    draw = torch.Generator().manual_seed(0)
    batches = [torch.randn(2, 24, 48, generator=draw) for _ in range(3)]
    x = Activations(CPU, room, folder=tmp_path)
    for batch in batches:
        x.append(batch.clone())
    on_disk = {None: 0, 0: 3}.get(room, 2)
    assert len(list(tmp_path.rglob("*.safetensors"))) == on_disk
    x.update(lambda batch: batch.mul_(2))
    x.update(lambda batch: batch + 1)
    for kept, batch in zip(x, batches, strict=True):
        assert torch.equal(kept, batch * 2 + 1)
    del x
    assert list(tmp_path.iterdir()) == []


GROUPED = {"head_dim": 32, "num_key_value_heads": 2}
SHAPES = [
    ("Llama", {"hidden_size": 256, "intermediate_size": 1024}, 1000, 128),  # a block peaks
    ("Llama", {"hidden_size": 512, "intermediate_size": 512}, 40000, 128),  # the embedding
    ("Llama", {"hidden_size": 1024, "intermediate_size": 512}, 1000, 64),  # eigenvectors
    ("Qwen3", {"hidden_size": 256, "intermediate_size": 1024, **GROUPED}, 1000, 128),
    ("Phi", {"hidden_size": 256, "intermediate_size": 1024}, 1000, 128),
    ("OPT", {"hidden_size": 256, "ffn_dim": 1024, "word_embed_proj_dim": 256}, 1000, 128),
]


@pytest.mark.parametrize("layers", [None, 2], ids=["apart", "grouped"])
@pytest.mark.parametrize("compensation", [None, Compensation()], ids=["plain", "compensated"])
@pytest.mark.parametrize(("base", "sizes", "vocabulary", "window"), SHAPES)
def test_predicted_memory_is_within_a_fifth_of_what_tensors_take(
    base, sizes, vocabulary, window, compensation, layers
):
    """layers: how many share a basis."""
    count = 3 if layers else 2  # layer 0 has one of its own
    sizes = {**sizes, "vocab_size": vocabulary, "num_hidden_layers": count}
    sizes["num_attention_heads"] = 8
    config = getattr(transformers, f"{base}Config")(**sizes)
    weights = getattr(transformers, f"{base}ForCausalLM")(config).state_dict()
    with init_empty_weights(include_buffers=False):
        model = transformers.AutoModelForCausalLM.from_config(config).eval()

    @contextmanager
    def use(path):
        module = model.get_submodule(path)
        names = [name for name, _ in module.named_parameters()]
        for name in names:
            weight = weights[f"{path}.{name}"].clone()
            set_module_tensor_to_device(module, name, CPU, weight)
        yield module
        for name in names:
            set_module_tensor_to_device(module, name, "meta")

    shape = dims_of(config)
    groups = layers and basis_groups(len(shape.reads), shape.layers, layers)
    plan = constant(shape, 0.25, layout=Layout(basis_groups=groups))
    windows = torch.randint(5, vocabulary, (tokens_per_batch(CPU) // window, window))

    def slice_all():
        given = (
            model,
            windows,
            plan,
            Activations(CPU),
            RoundingAudit(torch.float32),
            compensation,
            use,
        )
        for _ in sliced_weights(*given):
            pass

    asked = compensation is not None
    predicted = slicing_workspace(config, plan, window, CPU, torch.float32, asked)
    predicted += activation_bytes(plan, windows.numel(), torch.float32, asked)
    taken = extra_memory(slice_all, CPU)
    assert predicted == pytest.approx(taken, rel=0.2)


# In a process of its own, whose resident set nothing else adds to.
SLICE_WITHIN = """
import json, sys
from pathlib import Path
import torch
from dynslice.core.tensors import peak_memory_bytes, reset_peak_memory
from dynslice.inputs import models
from dynslice.method import streaming
from dynslice.method.architectures import dims_of
from dynslice.method.plan import constant

source, out, budget = sys.argv[1:]
device = torch.device("cpu")

def run(model, folder, window, **options):
    plan = constant(dims_of(models.load_config(model)), 0.25)
    windows = torch.randint(257, (4, window), generator=torch.Generator().manual_seed(0))
    models.slice_saved(Path(folder), model, windows, plan, device, torch.float32, **options)

run("embedded:tiny-random", out + "-warm-up", 32)  # loads the libraries
reset_peak_memory(device)
before = peak_memory_bytes(device)
run(source, out, 128, budget=streaming.Budget(host=int(budget)))
print(json.dumps(peak_memory_bytes(device) - before))
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_workspace_of_a_pass_is_what_one_takes(dtype):
    config = TINY["llama"]().config
    config.hidden_size, config.intermediate_size, config.head_dim = 256, 896, 64
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    ids = torch.zeros(1, 1024, dtype=torch.long)
    stream = ids.numel() * config.hidden_size * dtype.itemsize

    @torch.inference_mode()
    def one_pass():
        model.base_model(ids, use_cache=False)

    predicted = layers_workspace(config, dtype, ids.numel()) + stream
    assert extra_memory(one_pass, CPU) == pytest.approx(predicted, rel=0.1)


def test_model_of_four_times_the_budget_is_sliced_within_it(tmp_path):
    budget = 112 * MIB
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=257,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=38,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    assert stored_bytes(model) >= 4 * budget
    model.save_pretrained(tmp_path / "dense", max_shard_size="100MB")
    models.load_tokenizer("embedded:tiny-random").save_pretrained(tmp_path / "dense")

    arguments = [str(tmp_path / "dense"), str(tmp_path / "sliced"), str(budget)]
    finished = subprocess.run(
        [sys.executable, "-c", SLICE_WITHIN, *arguments], capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    assert json.loads(finished.stdout) <= budget

    plan = constant(dims_of(config), 0.25)
    windows = torch.randint(257, (4, 128), generator=torch.Generator().manual_seed(0))
    wanted = slice_model(model, windows, plan).model.state_dict()
    got = models.load(str(tmp_path / "sliced"), CPU, torch.float32)[0].state_dict()
    assert wanted.keys() == got.keys()
    assert all(torch.equal(got[name], weight) for name, weight in wanted.items())
