"""GGUF files as transformers models: dequantised to float32 once, since that takes minutes."""

import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers import PreTrainedModel as Model
from transformers import PreTrainedTokenizerBase as Tokenizer

from dynslice.core.errors import RequestError, in_one_line
from dynslice.inputs.checkpoints import quiet
from dynslice.method.architectures import check_family

SUFFIX = ".gguf"
_TABLES = ("output.weight", "token_embd.weight")  # head and embedding, as GGUF names them


def convert(path: Path, is_tied: bool = False) -> tuple[Model, Tokenizer]:
    """Model and tokenizer of a GGUF file.

    is_tied: the model is known to have one table for embedding and head. Where the file holds it
    twice, quantised in two ways, the finer one is kept. Raises RequestError for a file that
    transformers cannot read, one without a tokenizer, and a family that can't be sliced.
    """
    with tempfile.TemporaryDirectory() as folder:  # other files beside it would be read too
        (Path(folder) / path.name).symlink_to(path.resolve())
        source = {"pretrained_model_name_or_path": folder, "gguf_file": path.name}
        config = _read(path, "a model", AutoConfig, source)
        check_family(config)
        tokenizer = _read(path, "a tokenizer", AutoTokenizer, source)
        quantised = _whole(path, AutoModelForCausalLM, source)
    settings = quantised.config.to_dict()
    settings.pop("quantization_config", None)  # or transformers refuses to save the model
    weights = quantised.state_dict()
    if is_tied:
        weights = _with_one_table(path, quantised, weights)
        settings["tie_word_embeddings"] = True
    config = type(quantised.config).from_dict(settings)
    given = {"pretrained_model_name_or_path": None, "config": config, "state_dict": weights}
    model = _whole(path, type(quantised), given)  # with the weights themselves, not a copy
    tokenizer.model_max_length = settings["max_position_embeddings"]
    return model, tokenizer


def _whole(path: Path, kind: type, source: dict) -> Model:
    """A model in float32 all of whose weights come from `source`: none is left random."""
    asked = {**source, "dtype": torch.float32, "output_loading_info": True}
    model, found = _read(path, "weights", kind, asked)
    if missing := sorted(found["missing_keys"]):
        raise RequestError(
            f"GGUF file {path.name!r} lacks weight {missing[0]!r}; use a complete file"
        )
    return model


def _read(path: Path, what: str, kind: type, source: dict):
    try:
        with quiet():
            return kind.from_pretrained(**source)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # of the reader, the library's own checks, and missing fields
        raise RequestError(
            f"GGUF file {path.name!r} holds no {what.split()[-1]} that transformers can read "
            f"({in_one_line(error)}); use a complete file of a family that it knows"
        ) from error


def _with_one_table(path: Path, model: Model, weights: dict) -> dict:
    """The weights with the finer one of head and embedding for both."""
    from gguf import GGML_QUANT_SIZES, GGUFReader

    bits = {}
    for tensor in GGUFReader(path).tensors:
        if tensor.name in _TABLES:
            weights_in_block, bytes_of_block = GGML_QUANT_SIZES[tensor.tensor_type]
            bits[tensor.name] = 8 * bytes_of_block / weights_in_block
    names = {
        module: next(name for name, x in model.named_modules(remove_duplicate=False) if x is module)
        for module in (model.get_output_embeddings(), model.get_input_embeddings())
    }
    head, embedding = (f"{name}.weight" for name in names.values())
    finer = head if bits.get(_TABLES[0], 0) > bits[_TABLES[1]] else embedding
    return {**weights, head: weights[finer], embedding: weights[finer]}
