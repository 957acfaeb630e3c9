"""The rows of `dynslice bench`: each step with its physical yardstick, and oracles for a model.

The steps of a ratio take turns in one run; times of two runs or machines are never compared.
"""

import multiprocessing
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from dynslice.core import files, paths
from dynslice.core.tensors import batches, free_memory, peak_memory_bytes, reset_peak_memory
from dynslice.evaluate import harness, speed
from dynslice.experiment.profile import load
from dynslice.experiment.store import unique
from dynslice.experiment.study import Store, Study
from dynslice.inputs import models, texts
from dynslice.inputs.checkpoints import save
from dynslice.inputs.embedded_models import config_of
from dynslice.inputs.windows import token_windows
from dynslice.method import footprint, slicing, streaming
from dynslice.method.activations import Activations, residual_stream
from dynslice.method.architectures import dims_of, family_of
from dynslice.method.modeling_sliced import block_output
from dynslice.method.numerics import covariance, principal_basis
from dynslice.method.plan import SlicePlan, constant
from dynslice.method.redundancy import layer_redundancy

SMALL_GPU = 24 * 2**30  # the memory within which a model of eight billion parameters is sliced


@dataclass(frozen=True)
class Row:
    """One step: its time, its rate, and how far it is from what it is measured by."""

    step: str
    seconds: float | None  # median over repeats
    rate: str
    ratio: float | None
    yardstick: str  # what the ratio is
    low: float | None = None  # what the ratio should lie between; None where nothing is asked
    high: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the ratio lies within its limits; None where there are none."""
        if self.low is None and self.high is None:
            return None
        return (self.low or 0.0) <= self.ratio <= (self.high or float("inf"))

    @property
    def limit(self) -> str:
        """The limits as a reader would say them."""
        if self.low is None:
            return "" if self.high is None else f"at most {self.high:g}"
        return f"at least {self.low:g}" if self.high is None else f"{self.low:g} to {self.high:g}"


@dataclass(frozen=True)
class Slice:
    """One way of slicing, and how many passes of its calibration tokens it may take."""

    label: str
    plan: SlicePlan
    most: float
    start: Callable | None = None  # see `slicing.sliced_weights`


@dataclass(frozen=True)
class Subject:
    """What is measured: a model by name, or random weights of a published shape."""

    model: str | None
    shape: str | None
    device: torch.device
    dtype: torch.dtype
    revision: str | None = None
    seed: int = 0  # of random weights and of random tokens
    layers: int | None = None  # of a shape; None: all

    def load(self) -> PreTrainedModel:
        """The model, or random weights of the shape."""
        if self.model:
            return models.load(self.model, self.device, self.dtype, self.revision)[0]
        config = config_of(self.shape, self.layers)
        with torch.device(self.device):
            torch.manual_seed(self.seed)
            return AutoModelForCausalLM.from_config(config, dtype=self.dtype).eval()

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer; None for random weights."""
        return models.load_tokenizer(self.model, self.revision) if self.model else None

    def windows(self, model: PreTrainedModel, text: str, count: int, window: int) -> Tensor:
        """Token windows [count, window] of a text, for random weights random ones."""
        if not self.model:
            return random_tokens(model, count, window, self.seed)
        split = texts.default_split(text, None, "train")
        return token_windows(text, split, self.tokenizer(), window, count)


def random_tokens(model: PreTrainedModel, count: int, window: int, seed: int) -> Tensor:
    """Token windows [count, window] that mean nothing."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (count, window), generator=generator)


def medians(steps: dict[str, Callable], device: torch.device, *how: int) -> dict[str, float]:
    """Median seconds of steps that take turns; how: see `alternate`."""
    return {name: median(seconds) for name, seconds in speed.alternate(steps, device, *how).items()}


@torch.inference_mode()
def _pass(model: PreTrainedModel, windows: Tensor) -> None:
    for batch in batches(windows, "layers", model.device):
        model.base_model(batch, use_cache=False)


def calibration_rows(
    model: PreTrainedModel, windows: Tensor, slices: list[Slice], repeats: int, rate: float
) -> list[Row]:
    """One pass through the layers, then LR and slicing against it, on the same windows [n, T]."""
    one_pass, redundancy = "one pass through the layers", "layer redundancy"
    steps = {one_pass: _pass, redundancy: layer_redundancy} | {
        f"slice, {each.label}": lambda m, on, x=each: slicing.slice_model(m, on, x.plan, x.start)
        for each in slices
    }
    limits = {redundancy: 1.1} | {f"slice, {each.label}": each.most for each in slices}
    for step in steps.values():
        step(model, windows[:2])  # the warm-up: all windows take minutes where models are large
    timed = {name: partial(step, model, windows) for name, step in steps.items()}
    times = medians(timed, model.device, repeats, 0)
    flops = footprint.flops(model.config, 1, windows.shape[1], head=False) * len(windows)
    rows = []
    for name, seconds in times.items():
        ratio = (seconds / times[one_pass], "time over one pass", None, limits.get(name))
        if name == one_pass:
            ratio = (flops / seconds / rate, "of the matrix product")
        rows.append(Row(name, seconds, f"{windows.numel() / seconds:,.0f} tokens/s", *ratio))
    return rows


def memory_row(subject: Subject, dense: PreTrainedModel, windows: Tensor, widths: SlicePlan) -> Row:
    """The peak while slicing, over weights, activations of one place and one layer's workspace.

    On a CPU in a process of its own, where nothing else adds to the resident set.
    """
    size, d = dense.dtype.itemsize, widths.shape.hidden_size
    held = footprint.stored_bytes(dense) + widths.parameters * size + windows.numel() * d * size
    one = next(iter(batches(windows[:1], "workspace", subject.device)))
    stream = [torch.zeros(*one.shape, d, device=one.device)]
    for step in (lambda: _pass(dense, one), lambda: principal_basis(covariance(stream))):
        held += footprint.extra_memory(step, subject.device)
    if subject.device.type == "cuda":
        step = partial(slicing.slice_model, dense, windows, widths)
        peak = footprint.stored_bytes(dense) + footprint.extra_memory(step, subject.device)
    else:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            peak = pool.submit(_slicing_peak, subject, windows, widths).result()
    what = "peak over weights read and written, activations of one place, one layer's workspace"
    rate = f"{peak / 2**20:,.0f} MiB"
    return Row("memory while slicing", None, rate, peak / held, what, high=1.3)


def _slicing_peak(subject: Subject, windows: Tensor, widths: SlicePlan) -> int:
    """Bytes by which loading and slicing raise the resident set of this fresh process."""
    torch.linalg.eigh(torch.eye(8))  # the libraries' own buffers are not slicing's
    reset_peak_memory(subject.device)
    before = peak_memory_bytes(subject.device)
    slicing.slice_model(subject.load(), windows, widths)
    return peak_memory_bytes(subject.device) - before


def streamed_rows(subject: Subject, windows: Tensor, widths: SlicePlan) -> list[Row]:
    """Slicing layer by layer from a checkpoint: its peak over the prediction and a small GPU's.

    On a GPU, whose allocator tells the peak; the resident set of a CPU's process tells less.
    """
    device, dtype, window = subject.device, subject.dtype, windows.shape[1]
    with files.scratch(files.room(paths.CACHE)) as scratch:
        source, out = scratch / "dense", scratch / "sliced"
        model = subject.load()
        config = model.config
        # Random weights have no tokenizer of their own.
        save(model, subject.tokenizer() or models.load_tokenizer("embedded:tiny-random"), source)
        del model
        free_memory()
        reset_peak_memory(device)
        before = peak_memory_bytes(device)
        how = (windows, widths, device, dtype)
        budget = streaming.Budget(device=SMALL_GPU)
        seconds = models.slice_saved(out, str(source), *how, budget=budget).seconds
        peak = peak_memory_bytes(device) - before
    workspace = footprint.slicing_workspace(config, widths, window, device, dtype)
    activations = footprint.activation_bytes(widths, windows.numel(), dtype)
    predicted = workspace + min(activations, max(0, SMALL_GPU - workspace))
    label = f"{windows.numel() / seconds:,.0f} tokens/s, {footprint.shown_bytes(peak)}"
    small = f"streamed slicing within {footprint.shown_bytes(SMALL_GPU)}"
    return [
        Row("streamed slicing", seconds, label, peak / predicted, "peak over prediction", 0.8, 1.2),
        Row(small, None, footprint.shown_bytes(peak), peak / SMALL_GPU, "of that memory", high=1.0),
    ]


def throughput_rows(
    dense: PreTrainedModel, sliced: PreTrainedModel, label: str, repeats: int, seed: int
) -> list[Row]:
    """Prefill and decoding of a sliced network: the gain measured, over the gain counted."""
    new_tokens = 32
    count, length = (2, 512) if dense.device.type == "cpu" else (8, 2048)  # a GPU needs more work
    length = min(length, dense.config.max_position_embeddings - new_tokens)
    ids = random_tokens(dense, count, length, seed)
    value, rows = speed.speed(dense, sliced, ids, new_tokens, repeats), []
    for unit, what in {"prefill_flops": "FLOP", "decode_bytes": "bytes of weights"}.items():
        step, counted = unit.partition("_")[0], value[unit]
        times = value[f"{step}_seconds"]
        seconds = median(times["sliced"])
        gain, expected = median(times["dense"]) / seconds, counted["dense"] / counted["sliced"]
        rate = f"{value[f'{step}_tokens'] / seconds:,.0f} tokens/s, {gain:.2f} x dense"
        yardstick = f"gain over that of {what} ({expected:.2f} x)"
        rows.append(Row(f"{step}, {label}", seconds, rate, gain / expected, yardstick, 0.9, 1.1))
    return rows


def sweep_row(subject: Subject) -> Row:
    """A small study of constant points: what it takes beyond slicing and evaluating them."""
    shares = [0.2, 0.25, 0.3]
    dtype = str(subject.dtype).removeprefix("torch.")
    asked = {"model": subject.model, "revision": subject.revision, "dtype": dtype}
    asked |= dict.fromkeys(("calibration_windows", "eval_windows"), 4)
    asked |= dict.fromkeys(("calibration_window", "eval_window"), 256)
    asked |= dict.fromkeys(("slice_percentages", "task_slice_percentages"), shares)
    asked |= {"slice_bases": [], "task_slice_bases": [], "tasks": {"piqa": 8}}
    with tempfile.TemporaryDirectory() as folder:
        study = Study(load("quick", asked), Store(Path(folder)), str(subject.device))
        requests = unique([*study.design.perplexity_requests(), *study.design.task_requests()])
        wall = speed.seconds_of(lambda: study.ensure(requests), subject.device)
        spent = sum(study.store.get(request).seconds for request in requests)
    points = len(study.points())
    step, rate = f"sweep of {points} points, dense one included", f"{points / wall:.2f} points/s"
    what = "seconds per point beyond slicing and evaluating it, loading the model included"
    return Row(step, wall, rate, (wall - spent) / points, what, high=2.0)


def task_rows(subject: Subject, tokenizer: PreTrainedTokenizerBase, repeats: int) -> list[Row]:
    """HellaSwag with contexts computed once, against lm-eval's own model."""
    dense, scores, items = subject.load(), {}, 16

    def score(by: str) -> None:
        value = harness.tasks(dense, tokenizer, ["hellaswag"], items, share_contexts=by == "ours")
        scores[by] = value["hellaswag"]

    times = medians({by: partial(score, by) for by in ("ours", "lm-eval")}, subject.device, repeats)
    judged, margins = (
        list(zip(scores["ours"][name], scores["lm-eval"][name], strict=True))
        for name in ("correct", "margin")
    )
    rate, gain = f"{items / times['ours']:.2f} items/s", times["lm-eval"] / times["ours"]
    said = f"{sum(a == b for a, b in judged)} of {items} items judged equally"
    apart = (max(abs(a - b) for a, b in margins), "largest difference (nats)")
    most = 1e-3 if subject.dtype == torch.float32 else None
    name, yardstick = "HellaSwag, contexts shared", "times the speed of lm-eval's HFLM"
    return [
        Row(name, times["ours"], rate, gain, yardstick, low=1.5),
        Row("check: HellaSwag margins against HFLM's", None, said, *apart, high=most),
    ]


def oracle_row(subject: Subject, text: str, share: float) -> Row:
    """A sliced network against projectors in the dense one."""
    model = subject.load()
    shape = dims_of(model.config)
    window = min(512, model.config.max_position_embeddings)
    count = max(8, -(-8 * shape.hidden_size // window))  # 8 tokens a dimension: bases are definite
    windows = subject.windows(model, text, count + 1, window)
    calibration, unseen = windows[:-1], windows[-1:]
    widths = constant(shape, share)
    sliced = slicing.slice_model(model, calibration, widths).model
    with torch.inference_mode():
        got = sliced(unseen.to(model.device), use_cache=False).logits.float()
    wanted = oracle_logits(model, calibration, unseen, widths).float()
    deviation = ((got - wanted).pow(2).mean().sqrt() / wanted.std()).item()
    targets = unseen[:, 1:].flatten().to(model.device)
    ours, oracles = (
        F.cross_entropy(logits[:, :-1].flatten(0, 1), targets).exp().item()
        for logits in (got, wanted)
    )
    step = f"check: perplexity against the oracle's, {shape.layers} layers"
    said = f"{ours:.4f} against {oracles:.4f}, logits differ by {deviation:.1e} sd"
    apart = (abs(ours / oracles - 1), f"relative difference on {unseen.numel()} tokens")
    most = 1e-3 if subject.dtype == torch.float32 else 3e-2
    return Row(step, None, said, *apart, high=most)


@torch.inference_mode()
def oracle_logits(
    model: PreTrainedModel, calibration: Tensor, tokens: Tensor, widths: SlicePlan
) -> Tensor:
    """What a sliced network should say on tokens [b, T], computed slowly and plainly.

    The dense model with projectors in its stream: at each place the calibration activations and
    the stream of `tokens` are projected on the leading right singular vectors of the former, and go
    on through the dense block. No weight is folded, rotated or cut.
    """
    family = family_of(model.config)
    stream = Activations(model.device)
    arguments = residual_stream(model, torch.cat([calibration, tokens]), stream)
    x, count, place_widths = torch.cat(list(stream)), len(calibration), iter(widths.place_widths)
    for i, layer in enumerate(model.get_submodule(family.layers)):
        for block in family.blocks:
            calibrated = x[:count].flatten(0, 1).double()
            V = torch.linalg.svd(calibrated, full_matrices=False).Vh[: next(place_widths)].T
            x = (x.double() @ V @ V.T).to(x.dtype)
            x = x + torch.cat([block_output(layer, block, part[None], arguments[i]) for part in x])
    return model.get_output_embeddings()(model.get_submodule(family.final_norm)(x[count:]))
