"""What a network costs: FLOPs and bytes counted; throughput, latency and memory measured."""

import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dynslice.core.tensors import synchronise
from dynslice.method.footprint import decode_bytes, extra_memory, flops, stored_bytes

WARM_UP = 1  # calls of each step before any is timed


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """FLOP/s of the library's product of two square matrices: the machine's own yardstick.

    The best of 10 products: what the machine can do, not what it did on average.
    """
    size = size or (2048 if device.type == "cpu" else 8192)
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
    """Seconds of each step by repeat, the steps taken in turn so that drifts hit all of them."""
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


def speed(
    dense: PreTrainedModel, sliced: PreTrainedModel, ids: Tensor, new_tokens: int, repeats: int
) -> dict:
    """What a sliced network saves, counted and measured, next to its dense model.

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
