"""Sliced networks as transformers models: saved, loaded, generating, without dynslice."""

import json
import os
import subprocess
import sys

import pytest
import torch
from prose import paragraphs
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dynslice.inputs import models
from dynslice.method.architectures import dims_of
from dynslice.method.plan import SlicePlan
from dynslice.method.slicing import slice_model

WIDTHS = (40, 17, 31)


@pytest.fixture
def sliced(tiny, tokens):
    shape = dims_of(tiny.config)
    return slice_model(
        tiny, tokens, SlicePlan("test", 0.0, 0.0, 1, (0.0,) * 3, WIDTHS, shape)
    ).model


@torch.inference_mode()
def logits_of(model, tokens):
    return model(tokens, use_cache=False).logits


def test_saved_and_loaded_model_gives_the_same_logits(sliced, tokens, tmp_path):
    sliced.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(sliced)
    assert torch.equal(logits_of(loaded, tokens), logits_of(sliced, tokens))


def test_weights_are_saved_as_safetensors_only(sliced, tmp_path):
    sliced.save_pretrained(tmp_path)
    kinds = {path.suffix for path in tmp_path.iterdir()}
    assert kinds == {".safetensors", ".json", ".py"}


def test_config_holds_the_widths(sliced, tmp_path):
    sliced.save_pretrained(tmp_path)
    config = models.load_config(str(tmp_path))
    assert tuple(config.attention_widths) == tuple(config.mlp_widths) == WIDTHS
    assert (config.hidden_size, config.tie_word_embeddings) == (48, False)


def test_generation_with_the_cache_equals_generation_without(sliced, tokens):
    cached, plain = (
        sliced.generate(tokens, max_new_tokens=8, min_new_tokens=8, do_sample=False, use_cache=use)
        for use in (True, False)
    )
    assert cached.shape == (6, 32)
    assert torch.equal(cached, plain)


def test_cached_steps_give_the_logits_of_the_whole(sliced, tokens):
    with torch.inference_mode():
        past = sliced(tokens[:, :-1], use_cache=True).past_key_values
        last = sliced(tokens[:, -1:], past_key_values=past).logits
    torch.testing.assert_close(last[:, 0], logits_of(sliced, tokens)[:, -1], atol=2e-5, rtol=0)


def test_hidden_states_are_the_embedding_and_every_layer(sliced, tokens):
    with torch.inference_mode():
        states = sliced(tokens, output_hidden_states=True).hidden_states
    assert [state.shape[-1] for state in states] == [*WIDTHS, 48]


LOAD_ELSEWHERE = """
import sys

class Blocker:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "dynslice":
            raise ImportError("dynslice is not installed here")

sys.meta_path.insert(0, Blocker())
try:
    import dynslice
except ImportError:
    pass
else:
    sys.exit("dynslice could be imported")

from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

for folder, out in zip(sys.argv[1::2], sys.argv[2::2]):
    trusted = {"trust_remote_code": any(Path(folder).glob("*.py"))}
    model = AutoModelForCausalLM.from_pretrained(folder, **trusted).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, **trusted)
    ids = torch.tensor([tokenizer("A fixed sentence.")["input_ids"]])
    with torch.inference_mode():
        torch.save({"ids": ids, "logits": model(ids, use_cache=False).logits}, out)
"""


# Layouts, and the names of the classes of which their slices are.
LAYOUTS = {
    "untied": (["--untie"], "SlicedLlamaForCausalLM"),
    "grouped": (["--basis-layers", "all", "--compensate"], "SlicedLlamaForCausalLM"),
    "plain": (["--plain"], "LlamaForCausalLM"),
}


def test_sliced_directory_loads_where_dynslice_is_not_installed(dynslice, ask, tmp_path):
    text, folder, out = tmp_path / "text.txt", tmp_path / "sliced", tmp_path / "logits.pt"
    text.write_text(paragraphs(4), encoding="utf-8")
    request = ["--model", "embedded:tiny-random", "--slice-percentage", "0.25", "--json"]
    request += ["--calibration", text, "--windows", "4", "--window", "64", "--out"]
    status, stdout, stderr = dynslice("slice", *request, folder)
    assert (status, json.loads(stdout)["out"]) == (0, str(folder)), stderr

    plan = SlicePlan.read(folder / "plan.json")
    assert plan.widths == (48, 48, 48, 48)
    assert plan.layout.tied
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    assert (folder / "tokenizer.json").is_file()

    folders = {folder: out}
    for layout, (options, _) in LAYOUTS.items():
        assert ask("slice", *request, tmp_path / layout, *options)[0] == 0
        folders[tmp_path / layout] = tmp_path / f"{layout}.pt"
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    finished = subprocess.run(
        [sys.executable, "-c", LOAD_ELSEWHERE, *(x for pair in folders.items() for x in pair)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == "", "transformers asks whether to run custom code"
    for saved, logits in folders.items():
        there = torch.load(logits)
        model, tokenizer = models.load(str(saved), torch.device("cpu"), torch.float32)
        assert there["ids"].tolist() == [tokenizer("A fixed sentence.")["input_ids"]]
        stored = load_file(saved / "model.safetensors").values()
        plan = SlicePlan.read(saved / "plan.json")
        assert sum(weight.numel() for weight in stored) == plan.parameters
        assert torch.equal(there["logits"], logits_of(model, there["ids"]))
    for layout, (_, kind) in LAYOUTS.items():
        settings = json.loads((tmp_path / layout / "config.json").read_text())
        assert settings["architectures"] == [kind]
        assert ("auto_map" in settings) == (layout != "plain")
