"""What a network costs: FLOPs and bytes counted; throughput, latency and memory measured."""

import math
import time
import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from dynslice.models import synchronise

META = torch.device("meta")
WARM_UP = 1  # calls of each step before any is timed


def flops(config: PretrainedConfig, batch: int, length: int, head: bool = True) -> int:
    """Floating-point operations of one pass over token ids [batch, length].

    Counted by torch on a model without storage: matrix products and attention over all pairs of
    positions, a multiplication and an addition each one. head: with the logits of the last
    position of each row.
    """
    step = _imagined(config, torch.float32, batch, length, head)
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def layers_workspace(config: PretrainedConfig, dtype: torch.dtype, tokens: int) -> int:
    """Bytes that one pass of that many tokens through the layers takes at its peak.

    Beside the weights and the stream that goes in; counted on a model without storage, in rows of
    16 tokens, as attention that never holds its scores takes them.
    """
    rows = math.ceil(tokens / 16)
    stream = rows * 16 * config.hidden_size * dtype.itemsize
    return extra_memory(_imagined(config, dtype, rows, 16, head=False), META) - stream


def _imagined(
    config: PretrainedConfig, dtype: torch.dtype, batch: int, length: int, head: bool
) -> Callable[[], None]:
    """A pass over token ids [batch, length] through a model without storage."""
    with META:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        ids = torch.zeros(batch, length, dtype=torch.long)
        # Given, because making one reads values; OPT reads its positions off the mask.
        mask = torch.zeros(batch, 1, length, length, dtype=dtype)
        given = {"attention_mask": mask, "position_ids": ids, "use_cache": False}

    @torch.no_grad()
    def step() -> None:
        if head:
            model(ids, logits_to_keep=1, **given)
        else:
            model.base_model(ids, **given)

    return step


def stored_bytes(model: PreTrainedModel) -> int:
    """Bytes of the weights, a tied matrix once."""
    return sum(parameter.nbytes for parameter in model.parameters())


def decode_bytes(model: PreTrainedModel) -> int:
    """Bytes of weights that generating one token at batch 1 reads.

    Every stored weight but the embedding, of which one row is read; a tied head is read whole.
    """
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return stored_bytes(model) - (0 if embedding is head else embedding.nbytes)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the library's product of two square matrices: the machine's own yardstick.

    The best of 10 products: what the machine can do, not what it did on average.
    """
    size = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / min(alternate({"product": lambda: a @ b}, device, 10)["product"])


def copy_rate(device: torch.device) -> float:
    """Bytes/s of copying memory, read and written bytes counted; the best of 10 copies."""
    size = 2**28 if device.type == "cpu" else 2**31
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / min(alternate({"copy": lambda: target.copy_(source)}, device, 10)["copy"])


def alternate(
    steps: dict[str, Callable], device: torch.device, repeats: int, warm_up: int = WARM_UP
) -> dict[str, list[float]]:
    """Seconds of each step by repeat, the steps taken in turn so that drifts hit them alike."""
    for step in steps.values():
        for _ in range(warm_up):
            step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            times[name].append(seconds_of(step, device))
    return times


def seconds_of(step: Callable, device: torch.device) -> float:
    """Seconds of one call, both ends synchronised on a GPU."""
    synchronise(device)
    start = time.perf_counter()
    step()
    synchronise(device)
    return time.perf_counter() - start


def extra_memory(step: Callable, device: torch.device) -> int:
    """Bytes of tensors that a call makes and holds at its peak, beside what was there before.

    On a GPU by torch's allocator; elsewhere counted, since the resident set of a process hides
    what its allocator reuses. On the meta device it is what a call would take.
    """
    if device.type == "cuda":
        held = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device) - held
    with _TensorCount(device.type) as count:
        step()
    return count.peak


class _TensorCount(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, as long as they live."""

    def __init__(self, device_type: str):
        super().__init__()
        self.device_type = device_type
        self.alive = self.peak = 0
        self.known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        known_before = tree_leaves((args, kwargs))
        result = operation(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in known_before if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage.device.type == self.device_type and storage not in self.known:
            self.known[storage] = True
            weakref.finalize(storage, self._drop, storage.nbytes())
            self.alive += storage.nbytes()
            self.peak = max(self.peak, self.alive)

    def _drop(self, size: int) -> None:
        self.alive -= size


def speed(
    dense: PreTrainedModel, sliced: PreTrainedModel, ids: Tensor, new_tokens: int, repeats: int
) -> dict:
    """What a sliced network saves, counted and measured beside its dense model.

    Prefill is one pass over token ids [b, T]; decoding generates `new_tokens` at batch 1 after
    the first 32 tokens of ids. Times are lists over repeats, dense and sliced in turn.
    """
    networks = {"dense": dense, "sliced": sliced}
    device, prompt = dense.device, ids[:1, :32].to(dense.device)
    ids = ids.to(device)
    prefills = {name: lambda m=m: prefill(m, ids) for name, m in networks.items()}
    decodes = {name: lambda m=m: decode(m, prompt, new_tokens) for name, m in networks.items()}
    return {
        "stored_bytes": {name: stored_bytes(m) for name, m in networks.items()},
        "prefill_flops": {name: flops(m.config, *ids.shape) for name, m in networks.items()},
        "decode_bytes": {name: decode_bytes(m) for name, m in networks.items()},
        "prefill_extra_bytes": {name: extra_memory(p, device) for name, p in prefills.items()},
        "prefill_tokens": ids.numel(),
        "prefill_seconds": alternate(prefills, device, repeats),
        "decode_tokens": new_tokens,
        "decode_seconds": alternate(decodes, device, repeats),
    }


@torch.inference_mode()
def prefill(model: PreTrainedModel, ids: Tensor) -> None:
    """One pass over token ids [b, T], with the logits of the last position of each row."""
    model(ids, use_cache=False, logits_to_keep=1)


@torch.inference_mode()
def decode(model: PreTrainedModel, prompt: Tensor, new_tokens: int) -> None:
    """Generate exactly `new_tokens` greedily after a prompt [1, T], with the cache."""
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
    )
