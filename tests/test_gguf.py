"""GGUF files as models: converted once, told apart by what they hold, refused in one sentence."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from gguf.quants import quantize

from dynslice.core import paths
from dynslice.core.errors import RequestError
from dynslice.inputs import gguf, models
from dynslice.method.architectures import dims_of

SIZES = {"hidden": 64, "layers": 2, "heads": 4, "mlp": 128, "vocabulary": 300}
Q8, Q5 = GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q5_0


def tensors_of(head=None, seed=0):
    """The weights of a small Llama by their GGUF names; head: its own, None for a tied one."""
    draw = np.random.default_rng(seed)
    d, mlp, vocabulary = SIZES["hidden"], SIZES["mlp"], SIZES["vocabulary"]

    def normal(*shape):
        return draw.normal(scale=0.1, size=shape).astype(np.float32)

    found = {"token_embd.weight": normal(vocabulary, d), "output_norm.weight": np.ones(d, "f4")}
    for i in range(SIZES["layers"]):
        shapes = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (d, d))
        shapes |= {"ffn_gate": (mlp, d), "ffn_up": (mlp, d), "ffn_down": (d, mlp)}
        found |= {f"blk.{i}.{name}.weight": normal(*shape) for name, shape in shapes.items()}
        norms = ("attn_norm", "ffn_norm")
        found |= {f"blk.{i}.{name}.weight": np.ones(d, np.float32) for name in norms}
    return found if head is None else {**found, "output.weight": head}


def write_gguf(path, tensors, architecture="llama", tokenizer=True, quantised=None, settings=()):
    """A GGUF file of tensors; quantised: {name: type} of those that are not float32.

    settings: more of the architecture, {name: value}.
    """
    writer = GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(SIZES["hidden"])
    writer.add_block_count(SIZES["layers"])
    writer.add_feed_forward_length(SIZES["mlp"])
    writer.add_head_count(SIZES["heads"])
    writer.add_head_count_kv(SIZES["heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(SIZES["hidden"] // SIZES["heads"])
    writer.add_vocab_size(SIZES["vocabulary"])
    writer.add_file_type(LlamaFileType.ALL_F32)
    if tokenizer:
        words = ["a", "b", "ab", "ba", *(f"w{i}" for i in range(SIZES["vocabulary"] - 7))]
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(["<unk>", "<s>", "</s>", *words])
        writer.add_token_types([3, 3, 3, *[1] * len(words)])
        writer.add_token_merges(["a b", "b a"])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    for name, value in dict(settings).items():
        adders.get(type(value), writer.add_string)(f"{architecture}.{name}", value)
    for name, tensor in tensors.items():
        kind = (quantised or {}).get(name)
        if kind is None:
            writer.add_tensor(name, tensor)
        else:
            writer.add_tensor(name, quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")
    return tmp_path


def test_an_ending_in_capitals_is_one(cache):
    path = write_gguf(cache / "SMALL.GGUF", tensors_of())
    assert models.is_gguf(str(path))
    assert Path(models.resolve(str(path)), "config.json").is_file()


def test_a_file_is_a_model(cache):
    tensors = tensors_of()
    path = write_gguf(cache / "small.gguf", tensors)
    model, tokenizer = models.load(str(path), CPU, torch.float32)
    embedding = torch.from_numpy(tensors["token_embd.weight"])
    torch.testing.assert_close(model.get_input_embeddings().weight.data, embedding)
    assert dims_of(model.config).tied
    assert model.config.max_position_embeddings == tokenizer.model_max_length == 128
    assert not models.is_remote(str(path))


def test_it_is_converted_once_and_known_by_its_content(cache, monkeypatch):
    path = write_gguf(cache / "small.gguf", tensors_of())
    calls, convert = [], gguf.convert
    monkeypatch.setattr(gguf, "convert", lambda file: calls.append(file) or convert(file))
    first = models.resolve(str(path))
    shutil.copy(path, cache / "copy.gguf")
    assert models.resolve(str(cache / "copy.gguf")) == models.resolve(str(path)) == first
    assert len(calls) == 1
    write_gguf(path, tensors_of(seed=1))
    assert models.resolve(str(path)) != first
    assert len(calls) == 2


@pytest.mark.parametrize(("head", "embedding", "kept"), [(Q8, Q5, "head"), (Q5, Q8, "embedding")])
def test_of_two_quantisations_of_one_table_the_finer_is_kept(cache, head, embedding, kept):
    tensors = tensors_of()
    tensors["output.weight"] = tensors["token_embd.weight"]
    kinds = {"output.weight": head, "token_embd.weight": embedding}
    path = write_gguf(cache / "two.gguf", tensors, quantised=kinds)
    apart, _ = gguf.convert(path)
    tables = {
        "head": apart.get_output_embeddings().weight,
        "embedding": apart.get_input_embeddings().weight,
    }
    assert not torch.equal(*tables.values())
    assert not dims_of(apart.config).tied
    tied, _ = gguf.convert(path, is_tied=True)
    assert tied.config.tie_word_embeddings
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
    torch.testing.assert_close(tied.get_input_embeddings().weight.data, tables[kept].data)


def truncated(folder):
    path = write_gguf(folder / "short.gguf", tensors_of())
    path.write_bytes(path.read_bytes()[:20_000])
    return path


def of_an_unknown_kind(folder):
    return write_gguf(folder / "odd.gguf", tensors_of(), architecture="nonsense")


def without_tokenizer(folder):
    return write_gguf(folder / "mute.gguf", tensors_of(), tokenizer=False)


def of_a_layer_too_few(folder):
    rest = {name: x for name, x in tensors_of().items() if not name.startswith("blk.1.")}
    return write_gguf(folder / "thin.gguf", rest)


def test_a_file_without_some_weights_is_refused_not_filled_with_random_ones(cache):
    with pytest.raises(RequestError, match=r"'thin.gguf' lacks weight 'model.layers.1\..*complete"):
        models.load(str(of_a_layer_too_few(cache)), CPU, torch.float32)
    assert not any((cache / "cache").rglob("*.safetensors"))


D = SIZES["hidden"]
UNREAD = {
    "rope_freqs.weight": {"rope_freqs.weight": np.linspace(1, 8, 8, dtype="f4")},
    "blk.0.attn_q.bias": {"blk.0.attn_q.bias": np.ones(D, "f4")},
    "output.bias": {"output.bias": np.ones(SIZES["vocabulary"], "f4")},
    "blk.2.attn_norm.weight": {"blk.2.attn_norm.weight": np.ones(D, "f4")},
}


@pytest.mark.parametrize("name", UNREAD)
def test_a_tensor_that_the_network_does_not_take_up_is_refused_by_name(name, cache):
    path = write_gguf(cache / "more.gguf", {**tensors_of(), **UNREAD[name]})
    with pytest.raises(RequestError, match=f"'more.gguf' holds tensor {name}, which .*safetensors"):
        models.load(str(path), CPU, torch.float32)
    assert not any((cache / "cache").rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rope.scaling.type", "linear"),
        ("rope.scaling.factor", 4.0),
        ("rope.scaling.yarn_log_multiplier", 0.5),
        ("attention.key_length", 8),
        ("attention.sliding_window", 16),
        ("attention.causal", False),
        ("attention.clamp_kqv", 8.0),
        ("logit_scale", 0.5),
        ("expert_count", 4),
    ],
)
def test_a_setting_that_transformers_does_not_read_is_refused_by_name(name, value, cache):
    path = write_gguf(cache / "set.gguf", tensors_of(), settings={name: value})
    said = f"'set.gguf' holds setting llama.{name} = {value}, which nothing reads"
    with pytest.raises(RequestError, match=said):
        models.load(str(path), CPU, torch.float32)


def test_settings_that_change_nothing_are_taken(cache):
    head = SIZES["hidden"] // SIZES["heads"]
    agreed = {"attention.key_length": head, "attention.value_length": head, "expert_count": 0}
    agreed |= {"attention.sliding_window": 0, "rope.scaling.original_context_length": 128}
    agreed |= {"attention.causal": True, "rope.scaling.type": "none", "rope.freq_base": 5e5}
    path = write_gguf(cache / "agreed.gguf", tensors_of(), settings=agreed)
    model, _ = models.load(str(path), CPU, torch.float32)
    assert model.config.rope_parameters == {"rope_type": "default", "rope_theta": 5e5}


def no_gguf(folder):
    (folder / "text.gguf").write_text("no model")
    return folder / "text.gguf"


@pytest.mark.parametrize("make", [truncated, of_an_unknown_kind, without_tokenizer, no_gguf])
def test_what_cannot_be_read_is_refused_in_one_sentence(cache, make):
    path = make(cache)
    with pytest.raises(RequestError, match=f"GGUF file '{path.name}' holds no .* can read") as told:
        models.load(str(path), CPU, torch.float32)
    assert "\n" not in str(told.value)
    assert not any((cache / "cache").rglob("*.safetensors"))
