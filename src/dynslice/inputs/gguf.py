"""GGUF files as transformers models: dequantised to float32 once, since that takes minutes."""

import tempfile
from pathlib import Path

import torch
from gguf import MODEL_ARCH, GGUFReader, get_tensor_name_map
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers import PreTrainedModel as Model
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.integrations import GGUF_CONFIG_MAPPING

from dynslice.core.errors import RequestError, in_one_line
from dynslice.core.files import check_no_pointer
from dynslice.core.tensors import without_storage
from dynslice.inputs.checkpoints import quiet
from dynslice.method.architectures import check_family, family_of

SUFFIX = ".gguf"
_TABLES = ("output.weight", "token_embd.weight")  # head and embedding, as GGUF names them
# Settings that transformers does not read, with the value that leaves a network as it is.
_NEUTRAL = {"rope.scaling.type": "none", "attention.sliding_window": 0, "attention.causal": True}
_NEUTRAL |= {"expert_count": 0, "expert_used_count": 0}
_NEUTRAL |= {"tensor_data_layout": "Meta AI original pth"}
_HEAD_SIZES = ("rope.dimension_count", "attention.key_length", "attention.value_length")


def convert(path: Path, is_tied: bool = False) -> tuple[Model, Tokenizer]:
    """Model and tokenizer of a GGUF file.

    is_tied: the model is known to have one table for embedding and head. Where the file holds it
    twice, quantised in two ways, the finer one is kept. Raises RequestError for a file that
    transformers cannot read, one without a tokenizer, a family that can't be sliced, and a tensor
    or a setting that transformers leaves out.
    """
    check_no_pointer(path)
    with tempfile.TemporaryDirectory() as folder:  # other files beside it would be read too
        (Path(folder) / path.name).symlink_to(path.resolve())
        source = {"pretrained_model_name_or_path": folder, "gguf_file": path.name}
        config = _read(path, "a model", AutoConfig, source)
        check_family(config)
        _check_read(path, config)
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


def _check_read(path: Path, config) -> None:
    """Raise RequestError for a tensor or a setting that transformers leaves out of a network."""
    reader = GGUFReader(path)
    architecture = reader.fields["general.architecture"].contents()
    kind = getattr(MODEL_ARCH, architecture.upper(), MODEL_ARCH.LLAMA)  # or refused later
    names = get_tensor_name_map(kind, config.num_hidden_layers)
    model = without_storage(lambda: AutoModelForCausalLM.from_config(config))
    taken = {names.get_name(key, (".weight", ".bias")) for key in model.state_dict()}
    left = [f"tensor {tensor.name}" for tensor in reader.tensors if tensor.name not in taken]
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    neutral = _NEUTRAL | dict.fromkeys(_HEAD_SIZES, size)
    neutral["rope.scaling.original_context_length"] = config.max_position_embeddings
    read = {key for key, name in GGUF_CONFIG_MAPPING[config.model_type].items() if name}
    for field, value in reader.fields.items():
        key, value = field.removeprefix(f"{architecture}."), value.contents()
        if key != field and key not in read and neutral.get(key) != value:
            left.append(f"setting {field} = {value}")
    if left:
        raise RequestError(
            f"GGUF file {path.name!r} holds {left[0]}, which nothing reads; use its safetensors"
        )


def _with_one_table(path: Path, model: Model, weights: dict) -> dict:
    """The weights with the finer one of head and embedding for both."""
    tables = [tensor for tensor in GGUFReader(path).tensors if tensor.name in _TABLES]
    bits = {table.name: 8 * table.n_bytes / table.n_elements for table in tables}
    family = family_of(model.config)
    head, embedding = f"{family.head}.weight", f"{family.embedding}.weight"
    finer = head if bits.get(_TABLES[0], 0) > bits[_TABLES[1]] else embedding
    return {**weights, head: weights[finer], embedding: weights[finer]}
