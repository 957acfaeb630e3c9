"""Saved models on disk: found, read weight by weight, checked and written."""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from importlib import metadata
from pathlib import Path

import torch
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from dynslice.core import files
from dynslice.core.errors import RequestError, in_one_line
from dynslice.core.tensors import check_weight, opened, without_storage
from dynslice.method.architectures import family_of, require_dense
from dynslice.method.numerics import ROWS

SAFE = {"trust_remote_code": False}  # code that comes with a model is never run
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# What old checkpoints hold besides weights, and a network computes by itself.
_COMPUTED = r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$|masked_bias$|causal_mask$"

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")

# What a model may have in place of those, and what to do then.
_INSTEAD = {
    r".*\.gguf": "has only GGUF files ({}); give the path of one, of a model of the hub after `hf "
    "download`",
    r"consolidated.*": "has only weights in its maker's own format ({}); take the repository of "
    "that model for transformers, or convert it with the script that transformers has for it",
    r".*\.safetensors": "has only weights that transformers does not load by themselves ({}); save "
    "the ones that you mean as model.safetensors, next to config.json",
    r".*\.(bin|pth?|h5|msgpack)": "has no safetensors, and other files of weights are not read "
    "({}); save it anew with transformers",
}


def no_weights(names: list[str]) -> str | None:
    """What a model of these files has in place of safetensors; None where it has them."""
    if {*_WEIGHTS} & {*names}:
        return None
    return next(_others(names), "has no safetensors; save it anew with transformers")


def _others(names: list[str]) -> Iterator[str]:
    """Sentences about the other kinds of weights that are among some files."""
    for pattern, sentence in _INSTEAD.items():
        if found := sorted(name for name in names if re.fullmatch(pattern, name)):
            yield sentence.format(", ".join(found[:3]))


def no_model(folder: Path, names: list[str]) -> str | None:
    """Why a folder with these files is no sound model, and what to do; None where it is one."""
    if "adapter_config.json" in names and "config.json" in names:
        return (
            "holds an adapter (adapter_config.json) and a model (config.json); merge them with "
            "peft (merge_and_unload) and save the result, or name a copy without the adapter"
        )
    if "adapter_config.json" in names:
        base = files.read_json(folder / "adapter_config.json", "adapter")
        return (
            f"is a LoRA adapter of {base.get('base_model_name_or_path') or 'another model'}; merge "
            "it with peft (merge_and_unload), save the result with transformers, and name that"
        )
    if "config.json" not in names:
        none = "is a directory without config.json; name that of a saved model"
        return next(_others(names), none)
    if pointers := [name for name in names if files.is_pointer(folder / name)]:
        return (
            f"has a git-LFS pointer in place of {pointers[0]}; run `git lfs pull` there, or "
            "download the model with `hf download`"
        )
    if reason := files.damage(folder):
        return (
            f"is damaged: {reason}; slice or save it anew (or delete {files.CHECKSUMS} there, if "
            "you changed it yourself)"
        )
    return _not_json(folder, "generation_config.json")


def _not_json(folder: Path, pattern: str) -> str | None:
    """Which of some files, if any, is broken."""
    for path in sorted(folder.glob(pattern)):
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            return f"has a {path.name} that is not JSON ({error}); replace it"
    return None


def why_no_tokenizer(folder: Path) -> str:
    """What is in the way of the tokenizer of a model, and what to do."""
    if reason := _not_json(folder, "*token*.json"):
        return reason
    slow = [*folder.glob("*.model"), *folder.glob("*.tiktoken")]
    if slow and not (folder / "tokenizer.json").is_file():
        is_protobuf = slow[0].read_bytes()[:1] == b"\n"  # the other kind is lines of text
        needed = ("sentencepiece", "protobuf") if is_protobuf else ("tiktoken",)
        if lacking := " ".join(name for name in needed if not _is_installed(name)):
            return (
                f"has its tokenizer in {slow[0].name}, and what reads that is not installed; run "
                f"`pip install {lacking}`"
            )
    return "has no tokenizer that transformers can load; save one with the model"


def _is_installed(package: str) -> bool:
    with suppress(metadata.PackageNotFoundError):
        return bool(metadata.version(package))
    return False


def weight_files(folder: Path, name: str) -> dict[str, Path]:
    """The safetensors file of each tensor that a folder of model `name` holds.

    Raises RequestError for a folder without any, and for files that are broken or lead out of it.
    """
    if reason := no_weights([path.name for path in folder.iterdir() if path.is_file()]):
        raise RequestError(f"model {name!r} {reason}")
    path = next(path for file in _WEIGHTS if (path := folder / file).is_file())
    if path.suffix == ".safetensors":
        return dict.fromkeys(_header(path, name), path)
    try:
        parts = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if any(Path(file).name != file for file in parts.values()):
            raise ValueError("it names files in other folders")
        if lost := sorted(file for file in {*parts.values()} if not (folder / file).is_file()):
            raise ValueError(f"{lost[0]} is missing")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise RequestError(
            f"the weights of model {name!r} cannot be read from {path.name} "
            f"({in_one_line(error)}); save the model anew with transformers"
        ) from error
    shards = [folder / file for file in sorted({*parts.values()})]
    return {tensor: shard for shard in shards for tensor in _header(shard, name)}


def _header(path: Path, name: str) -> dict:
    """The tensors of a safetensors file of model `name`, of which kind and shape can be read."""
    with opened(path, f"the weights of model {name!r}") as file:
        return {tensor: file.get_slice(tensor) for tensor in file.keys()}  # noqa: SIM118


def stored_dtype(folder: Path, name: str) -> torch.dtype:
    """The dtype of most weights of a saved model. Raises RequestError as `weight_files`."""
    counts = Counter()
    for path in {*weight_files(folder, name).values()}:
        for tensor in _header(path, name).values():
            counts[tensor.get_dtype()] += math.prod(tensor.get_shape())
    return _DTYPES[max(_DTYPES, key=lambda kind: counts[kind])]


def ties_head(folder: Path, name: str, config) -> bool:
    """Whether head and embedding of a saved model are one table, which its config may not say.

    As its config says, where the checkpoint lacks one of them. Raises RequestError as
    `weight_files`.
    """
    stored, family = weight_files(folder, name), family_of(config)
    tables = [_spelled(f"{part}.weight", stored) for part in (family.head, family.embedding)]
    if None in tables:
        return config.tie_word_embeddings
    with ExitStack() as files:
        what = f"the weights of model {name!r}"
        opens = (files.enter_context(opened(stored[table], what)) for table in tables)
        both = [file.get_slice(table) for file, table in zip(opens, tables, strict=True)]
        if both[0].get_shape() != both[1].get_shape():
            return False
        starts = range(0, both[0].get_shape()[0], ROWS)
        parts = [slice(0, 1), *(slice(start, start + ROWS) for start in starts)]  # a row says most
        return all(torch.equal(*(table[rows] for table in both)) for rows in parts)


def _spelled(name: str, stored: dict[str, Path]) -> str | None:
    """How a checkpoint names a weight, which it may without the prefix of the base model."""
    spellings = (name, name.partition(".")[2])
    return next((spelling for spelling in spellings if spelling in stored), None)


def save(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, shard: str = "5GB"
) -> None:
    """`write` to a folder that appears as in `saving`; shard: the largest file of weights."""
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
def saving(folder: Path, is_new: bool = False) -> Iterator[Path]:
    """An empty folder to fill, which then appears as `folder` with checksums. Raises DiskError.

    is_new: raise as `files.new` where something is there, instead of replacing it.
    """
    with (files.new if is_new else files.appearing)(folder) as unfinished:
        yield unfinished
        files.seal(unfinished)


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


def check_shape(found: torch.Size, wanted: torch.Size, key: str, model: str) -> None:
    """Raise RequestError for a weight whose shape is not that of the model's config."""
    if found != wanted:
        raise RequestError(
            f"weight {key} of model {model!r} is of shape {list(found)}, its config.json asks for "
            f"{list(wanted)}; save the model anew with transformers"
        )


def check_described(unexpected: Iterable[str], model: str, known: Iterable[str] = ()) -> None:
    """Raise RequestError for tensors that no network takes up, but for `known` patterns of them."""
    computed = re.compile("|".join([_COMPUTED, *known]))
    if more := sorted(key for key in unexpected if not computed.search(key)):
        raise RequestError(
            f"the checkpoint of model {model!r} has {len(more)} weights that its config.json does "
            f"not describe (first {more[0]}); merge or remove them, and save the model anew"
        )


class Checkpoint:
    """A model without weights, and its checkpoint from which they come when they are used."""

    def __init__(self, name: str, config, stored: dict[str, Path], device, dtype: torch.dtype):
        """stored: the safetensors file of each weight, as `weight_files` gives it."""
        require_dense(config, "slicing")
        self.name, self.device, self.dtype, self._files = name, device, dtype, stored
        with quiet():
            make = partial(AutoModelForCausalLM.from_config, config, dtype=dtype)
            self.model = without_storage(make).eval()
        for module in self.model.modules():
            for key, buffer in module.named_buffers(recurse=False):
                setattr(module, key, buffer.to(device))
        # Refuses a checkpoint that lacks a weight, or has others, before any work.
        keys = dict(self.model.named_parameters(remove_duplicate=False))
        known = self.model._keys_to_ignore_on_load_unexpected or ()
        check_described(set(stored) - {*map(self._stored_name, keys)}, name, known)

    @contextmanager
    def use(self, path: str) -> Iterator[nn.Module]:
        """A module by its name, with its weights on the device until the context ends."""
        module = self.model.get_submodule(path)
        if all(parameter.device.type != "meta" for parameter in module.parameters()):
            yield module  # it is in use already
            return
        names = [name for name, _ in module.named_parameters()]
        try:
            for name in names:
                weight = self._read(f"{path}.{name}")
                set_module_tensor_to_device(module, name, self.device, weight)
            yield module
        finally:
            for name in names:
                set_module_tensor_to_device(module, name, "meta")

    def _read(self, name: str) -> Tensor:
        stored = self._stored_name(name)
        with opened(self._files[stored], f"the weights of model {self.name!r}") as file:
            # A copy: products of memory that a file is mapped to round differently.
            weight = file.get_tensor(stored).to(self.device, self.dtype, copy=True)
        check_weight(weight, stored, self.name)
        check_shape(weight.shape, self.model.get_parameter(name).shape, stored, self.name)
        return weight

    def _stored_name(self, name: str) -> str:
        """The name of a weight in the checkpoint: a tied head is the embedding."""
        names, config = [name], self.model.config
        if config.tie_word_embeddings and name == "lm_head.weight":
            names.append(f"{family_of(config).embedding}.weight")
        for candidate in names:
            if spelling := _spelled(candidate, self._files):
                return spelling
        raise RequestError(
            f"the checkpoint holds no weight {name!r}; load the model with transformers and save "
            "it anew, or slice it without streaming"
        )
