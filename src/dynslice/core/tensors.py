"""Devices, dtypes, memory and finite values: what every part that holds tensors needs."""

import copy
import ctypes
import gc
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import torch
from safetensors import SafetensorError, safe_open
from torch.overrides import TorchFunctionMode
from tqdm.auto import tqdm
from transformers import PretrainedConfig, PreTrainedModel

from dynslice.core.errors import RequestError, in_one_line

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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


@contextmanager
def opened(path: Path, what: str) -> Iterator[safe_open]:
    """An open safetensors file that holds `what`. Raises RequestError where it cannot be read."""
    remedy = "save the model anew with transformers, or fetch that file again"
    try:
        path.open("rb").close()  # safetensors says of a forbidden file that there is none
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        remedy = "let it be read" if isinstance(error, PermissionError) else remedy
        cause = getattr(error, "strerror", None) or in_one_line(error)
        raise RequestError(f"{what} cannot be read from {path.name} ({cause}); {remedy}") from error


def free_memory() -> None:
    """Give the memory of dropped weights back, so that the next ones find room."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with suppress(OSError, AttributeError):  # glibc keeps what was freed until it is told
        ctypes.CDLL(None).malloc_trim(0)


def memory_of_machine(root: Path = Path("/")) -> int:
    """Bytes that this process may have: the machine's, or less by its limits or control groups.

    root: of the file system, where the groups (version 1 or 2) are read, with all above them.
    """
    limits = [psutil.virtual_memory().total, resource.getrlimit(resource.RLIMIT_AS)[0]]
    listed, mount = root / "proc/self/cgroup", root / "sys/fs/cgroup"
    for line in listed.read_text().splitlines() if listed.is_file() else []:
        _, controllers, group = line.split(":", 2)
        top = mount / "memory" if "memory" in controllers.split(",") else mount
        own = top / group.lstrip("/")
        for place in (own, *own.parents):
            for name in ("memory.max", "memory.limit_in_bytes"):
                with suppress(OSError, ValueError):  # none there, or "max"
                    limits.append(int((place / name).read_text()))
    return min(limit for limit in limits if limit != resource.RLIM_INFINITY)


def synchronise(device: torch.device) -> None:
    """Wait for the work that was queued on a GPU, so that clocks tell its time."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _are_finite(values: torch.Tensor) -> bool:
    """By the extremes, NaN among them: a mask would take as much memory as a table."""
    return not values.numel() or bool(torch.isfinite(torch.stack(values.aminmax())).all())


def check_finite(values: torch.Tensor, where: str, dtype: torch.dtype | None = None) -> None:
    """Raise RequestError naming `where` and the network's dtype when a tensor holds NaN or Inf."""
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
    if windows.numel():
        check_token(config, int(windows.max()))


def check_token(config, largest: int) -> None:
    """Raise RequestError for a token id that the model has no embedding of."""
    if largest >= config.vocab_size:
        raise RequestError(
            f"the tokenizer gives token {largest}, and the vocabulary of the model has "
            f"{config.vocab_size}; save the tokenizer with the model that it belongs to"
        )


class _OnMeta(TorchFunctionMode):
    """What parameters are made of has no storage, in this thread alone."""

    def __torch_function__(self, function, types, arguments=(), options=None):
        options = dict(options or {})
        if function is torch.empty:
            options["device"] = "meta"
        return function(*arguments, **options)


def without_storage(make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """The model that `make` makes, with every parameter on the meta device and real buffers."""
    with _OnMeta():
        model = make()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            empty = torch.nn.Parameter(parameter.to("meta"), parameter.requires_grad)
            setattr(module, name, empty)
    model.tie_weights()  # taken apart by that
    return model


def of_config(
    model: PreTrainedModel, config: PretrainedConfig, weights: dict[str, torch.Tensor]
) -> PreTrainedModel:
    """A model of the same class and another config, of these weights, which it does not copy."""
    made = without_storage(lambda: type(model)(config))
    made.load_state_dict(weights, assign=True)
    made.tie_weights()
    made.generation_config = copy.deepcopy(model.generation_config)
    return made.to(model.device).eval()


def with_own_weights(model: PreTrainedModel) -> PreTrainedModel:
    """The model, with copies of weights that it shares with another; a tied table stays one."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Without dropout and its like for a while, whatever mode the model is in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def check_weight(weight: torch.Tensor, key: str, model: str) -> None:
    """Raise RequestError when a weight holds NaN or Inf; what is on disk only is let through."""
    if weight.device.type != "meta" and not _are_finite(weight):
        dtype = str(weight.dtype).removeprefix("torch.")
        raise RequestError(
            f"weight {key} of model {model!r} is not finite in {dtype}; take a sound checkpoint, "
            "or --dtype float32 or bfloat16 if it overflows float16"
        )


def tokens_per_batch(device: torch.device, logits: bool = False) -> int:
    """Larger batches only cost memory on a CPU, as logits over the vocabulary do on a GPU."""
    return 1024 if device.type == "cpu" else 2048 if logits else 16384


def batches(
    token_windows: torch.Tensor, desc: str, device: torch.device, logits: bool = False
) -> Iterator[torch.Tensor]:
    """Windows [n, T] in batches [b, T] of about `tokens_per_batch`, with a progress bar."""
    size = max(1, tokens_per_batch(device, logits) // token_windows.shape[1])
    with tqdm(total=len(token_windows), desc=desc, unit="window", leave=False) as bar:
        for part in token_windows.split(size):
            yield part.to(device)
            bar.update(len(part))


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory_bytes` start here, where the system can do that."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif (peak := Path("/proc/self/clear_refs")).exists():  # of Linux
        peak.write_text("5")


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of this process: of the GPU where the work is on one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if (status := Path("/proc/self/status")).exists():  # getrusage's peak outlives a reset
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
