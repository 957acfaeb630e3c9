"""Loading causal language models: embedded, from a directory, or from the hub."""

import hashlib
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers import PreTrainedModel as Model
from transformers import PreTrainedTokenizerBase as Tokenizer

from dynslice.core import assets, files, hub, paths
from dynslice.core.errors import RequestError, in_one_line
from dynslice.core.tensors import check_weight
from dynslice.inputs import gguf
from dynslice.inputs.checkpoints import (
    SAFE,
    Checkpoint,
    check_described,
    check_shape,
    no_model,
    no_weights,
    quiet,
    save,
    ties_head,
    weight_files,
    why_no_tokenizer,
)
from dynslice.inputs.embedded_models import EMBEDDED
from dynslice.method.architectures import check_family, is_packed, is_sliced
from dynslice.method.modeling_sliced import SLICED_CLASSES
from dynslice.method.plan import SlicePlan
from dynslice.method.slicing import Sliced
from dynslice.method.streaming import slice_to

for _config, _model in SLICED_CLASSES.values():
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModelForCausalLM.register(_config, _model, exist_ok=True)


def load(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    revision: str | None = None,
    spread: bool = False,
) -> tuple[Model, Tokenizer]:
    """Load a dense or sliced causal LM in evaluation mode, with its tokenizer.

    name: `embedded:...`, a directory, or a hub id. spread: let accelerate place the layers over
    all GPUs, then host memory, then disk, instead of everything on `device`. Raises RequestError
    when there is no such model or it can't be sliced exactly.
    """
    config = load_config(name, revision)
    tokenizer = load_tokenizer(name, revision)
    if spread and torch.cuda.is_available() and (device.type == "cpu" or device.index is not None):
        raise RequestError(
            f"device {str(device)!r} names one place, and a spread network takes all GPUs; leave "
            "--device out, or do not spread it"
        )
    check_weights(name, revision)
    options = {}
    if spread:  # what fits into no memory is kept in the cache
        unique = hashlib.sha256(name.encode()).hexdigest()[:16]
        options = {"device_map": "auto", "offload_folder": str(paths.CACHE / "offloaded" / unique)}
    with quiet():
        try:
            model, told = AutoModelForCausalLM.from_pretrained(
                resolve(name, revision),
                config=config,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                **options,
                **SAFE,
            )
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:  # of safetensors and of each part that a config describes
            raise RequestError(
                f"the weights of model {name!r} cannot be loaded from safetensors "
                f"({in_one_line(error)}); save the model anew with transformers"
            ) from error
    _check_keys(told, name)
    if is_packed(config):
        _unpack(model)
    model = model if spread else model.to(device)
    if model.device.type == "meta":
        raise RequestError(
            f"no memory has room for the embedding of model {name!r}; use a machine with more"
        )
    for key, weight in model.named_parameters():
        check_weight(weight, key, name)
    tables = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    model.config.tie_word_embeddings = tables[0] is tables[1]  # a config can be wrong
    return model.eval(), tokenizer


def _unpack(model: Model) -> None:
    """Give a model its rounded weights in its own dtype; the library waits for a first pass."""
    from compressed_tensors.compressors import PackedQuantizationCompressor  # for these only

    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            PackedQuantizationCompressor.decompress_module(module, leave_decompressed=False)
    model.hf_quantizer.compressor.remove_decompression_hook(model)


def _check_keys(told: dict, name: str) -> None:
    for key, found, wanted in sorted(told["mismatched_keys"]):
        check_shape(found, wanted, key, name)
    if lacking := sorted(told["missing_keys"]):  # transformers makes them up
        raise RequestError(
            f"the checkpoint of model {name!r} lacks {len(lacking)} weights (first {lacking[0]}); "
            "save the model anew with transformers"
        )
    check_described(told["unexpected_keys"], name)


def slice_saved(
    folder: Path,
    name: str,
    windows: torch.Tensor,
    plan: SlicePlan,
    device: torch.device,
    dtype: torch.dtype,
    revision: str | None = None,
    save_dtype: torch.dtype | None = None,
    **how,
) -> Sliced:
    """Slice a saved model into `folder` layer by layer, with the options `how` of `slice_to`.

    dtype: of computing, and of what is written unless `save_dtype` says otherwise.

    Raises RequestError as `load` and `slice_to`, and for a checkpoint that lacks a weight.
    """
    source = resolve(name, revision)
    stored = weight_files(Path(source), name)
    checkpoint = Checkpoint(name, load_config(name, revision), stored, device, dtype)
    with suppress(Exception):  # it is optional
        checkpoint.model.generation_config = GenerationConfig.from_pretrained(source)
    tokenizer = load_tokenizer(name, revision)
    return slice_to(folder, checkpoint, tokenizer, windows, plan, dtype=save_dtype, **how)


def check_weights(name: str, revision: str | None = None) -> None:
    """Raise RequestError as `weight_files` unless the weights of a model can be read."""
    weight_files(Path(resolve(name, revision)), name)


def load_tokenizer(name: str, revision: str | None = None) -> Tokenizer:
    """The tokenizer of a model. Raises RequestError when it has none."""
    source = resolve(name, revision)
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(source, **SAFE)
    except Exception as error:  # whatever the library says of files that are none
        raise RequestError(f"model {name!r} {why_no_tokenizer(Path(source))}") from error


def load_config(name: str, revision: str | None = None, weights: bool = True):
    """The transformers config of a model. Raises RequestError as `load`.

    Its weights say whether head and embedding are one table; weights: see `resolve`.
    """
    if revision is not None and not is_remote(name):
        raise RequestError(
            f"model {name!r} has no revisions, only models of the hub do; leave revision "
            f"{revision!r} out"
        )
    source = resolve(name, revision, weights)
    try:
        config = AutoConfig.from_pretrained(source, **SAFE)
    except Exception as error:  # of the library's own checks, a dozen types
        if "custom code" in str(error):
            raise RequestError(
                f"model {name!r} comes with code of its own (auto_map in its config.json), which "
                "is never run; name a model of a family that transformers has"
            ) from error
        raise RequestError(
            f"model {name!r} has a config.json that transformers cannot read "
            f"({in_one_line(error)}); save the model anew"
        ) from error
    check_family(config)
    with suppress(RequestError):  # of weights that are not there, or cannot be read
        if not is_sliced(config):
            config.tie_word_embeddings = ties_head(Path(source), name, config)
    return config


def resolve(name: str, revision: str | None = None, weights: bool = True) -> str:
    """The directory of a model, into which one of the hub is downloaded first.

    weights: with the weights, which a forecast does without. Raises RequestError when `name` is
    neither an embedded model, the directory of a sound one, a GGUF file, nor something that the hub
    (or its local cache) holds.
    """
    if name.startswith("embedded:"):
        return str(_embedded(name.removeprefix("embedded:")))
    if is_gguf(name):
        return str(_converted(Path(name)))
    if (folder := Path(name)).is_dir():
        reason = no_model(folder, [path.name for path in folder.iterdir()])
    elif not (reason := _no_saved_model(name)):
        folder, names = hub.model(name, revision, weights)
        here = names or [path.name for path in folder.iterdir()]
        reason = no_model(folder, here) or (no_weights(names) if names else None)
    if reason:
        raise RequestError(f"model {name!r} {reason}")
    return str(folder)


def _no_saved_model(name: str) -> str | None:
    """What a name that no directory has is instead, and what to do; None for one of the hub."""
    path = Path(name)
    if path.suffix.lower() == ".safetensors":
        return "is a file of weights; name the directory that holds it and its config.json"
    if path.is_file():
        return "is a file, and no GGUF; name the directory of a saved model"
    is_path = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if is_path and "://" not in name:
        return "is a path where nothing is; check it"
    return None


def is_remote(name: str) -> bool:
    """Whether a model is one of the hub."""
    return not (name.startswith("embedded:") or Path(name).is_dir() or is_gguf(name))


def is_gguf(name: str) -> bool:
    """Whether a model is a GGUF file."""
    return name.lower().endswith(gguf.SUFFIX) and Path(name).is_file()


def in_cache(name: str, revision: str | None = None) -> bool:
    """Whether the weights of a hub model are here. Raises RequestError as `resolve`."""
    folder = Path(resolve(name, revision, weights=False))
    with suppress(RequestError):
        return bool(weight_files(folder, name))
    return False


def unfetched(name: str) -> assets.InParts | None:
    """The file in parts that an embedded model is yet to be made of; None where nothing lacks."""
    kind, _, of = name.partition(":")
    whole = assets.in_parts().get(of) if kind == "embedded" else None
    if whole is None or whole.is_there or files.is_sound(paths.embedded_model(of)):
        return None
    return whole


def commit_of(name: str, revision: str | None = None) -> str | None:
    """The commit at which a hub model is read, by the name of its folder; None for others."""
    return Path(resolve(name, revision)).name if is_remote(name) else None


def _embedded(name: str) -> Path:
    if name not in EMBEDDED:
        raise RequestError(f"embedded model {name!r} is unknown; there are {', '.join(EMBEDDED)}")
    shard = "200KB" if name.startswith("tiny") else "5GB"
    return _kept(paths.embedded_model(name), f"embedded model {name!r}", EMBEDDED[name], shard)


def _converted(file: Path) -> Path:
    """A GGUF file as a saved model in the cache, by what the file holds."""
    folder = paths.embedded_model(f"gguf-{files.content_sha256(file)[:16]}")
    return _kept(folder, f"the model of {file.name!r}", partial(gguf.convert, file))


def _kept(folder: Path, what: str, make: Callable, shard: str = "5GB") -> Path:
    """A saved model in the cache, made unless it is there and sound."""
    if files.is_sound(folder):
        return folder
    making = folder.with_name(f".making-{folder.name}")
    with files.claim(making):  # one process makes it, others wait
        if reason := files.damage(folder):
            print(f"{what} is made anew: {reason}", file=sys.stderr)
        if not files.is_sound(folder):
            save(*make(), folder, shard=shard)
    return folder
