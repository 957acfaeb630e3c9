"""What a network costs: FLOPs and bytes counted; throughput, latency and memory measured."""

import gc
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from dynslice.models import synchronise

WARM_UP = 1  # calls of each step before any is timed


def flops(config: PretrainedConfig, batch: int, length: int, head: bool = True) -> int:
    """Floating-point operations of one pass over token ids [batch, length].

    Counted by torch on a model without storage: matrix products and attention over all pairs of
    positions, a multiplication and an addition each one. head: with the logits of the last
    position of each row.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        ids = torch.zeros(batch, length, dtype=torch.long)
        mask = torch.zeros(batch, 1, length, length)  # given, because making one reads values
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        if head:
            model(ids, attention_mask=mask, use_cache=False, logits_to_keep=1)
        else:
            model.base_model(ids, attention_mask=mask, use_cache=False)
    return counter.get_total_flops()


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
    steps: dict[str, Callable], device: torch.device, repeats: int
) -> dict[str, list[float]]:
    """Seconds of each step by repeat, the steps taken in turn so that drifts hit them alike."""
    for step in steps.values():
        for _ in range(WARM_UP):
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


def extra_memory(step: Callable, device: torch.device) -> int | None:
    """Bytes that a call needs at its peak beyond what is held when it starts.

    On a GPU by torch's allocator, elsewhere by the resident set of the process; None where the
    system does not tell that.
    """
    gc.collect()
    if device.type == "cuda":
        held = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device) - held
    if not Path("/proc/self/clear_refs").exists():
        return None
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew here
    held = _resident("VmRSS")
    step()
    return _resident("VmHWM") - held


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status names no {field}")


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
