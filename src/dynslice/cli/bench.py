"""`dynslice bench`: each step beside its physical yardstick, and its result beside a slow oracle.

The steps of a ratio are taken in turn within one run, and their medians compared: times of two
runs, or of two machines, are not.
"""

import multiprocessing
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from dynslice.core import paths
from dynslice.core.errors import RequestError
from dynslice.core.tensors import batches, free_memory, peak_memory_bytes, reset_peak_memory
from dynslice.evaluate import harness, speed
from dynslice.evaluate.speed import alternate, seconds_of
from dynslice.experiment.profile import load, percent
from dynslice.experiment.store import provenance, unique
from dynslice.experiment.study import Store, Study
from dynslice.inputs import models, texts
from dynslice.inputs.checkpoints import save
from dynslice.inputs.embedded_models import SHAPES, config_of
from dynslice.inputs.windows import token_windows
from dynslice.method import slicing, streaming
from dynslice.method.activations import Activations, residual_stream
from dynslice.method.architectures import dims_of, family_of
from dynslice.method.footprint import (
    extra_memory,
    flops,
    shown_bytes,
    signal_bytes,
    slicing_workspace,
    stored_bytes,
)
from dynslice.method.modeling_sliced import block_output
from dynslice.method.numerics import principal_basis
from dynslice.method.plan import SlicePlan, constant, dynamic
from dynslice.method.redundancy import layer_redundancy

SWEEP = (0.2, 0.25, 0.3)  # SP of the points of the sweep

PREFILL = (2, 512)  # windows and tokens on a CPU; a GPU needs more to be busy

PREFILL_GPU = (8, 2048)

NEW_TOKENS = 32

SMALL_GPU = 24 * 2**30  # the memory within which a model of eight billion parameters is sliced

ANY_TOKENIZER = "embedded:tiny-random"  # random weights have none of their own

WARM_UP_WINDOWS = 2  # of slicing and LR, which take minutes where models are large

TASK_ITEMS = 16


@dataclass(frozen=True)
class Row:
    """One step: its time, its rate, and how far it is from what it is measured by.

    seconds: median over repeats. ratio: what `yardstick` says. low, high: what the ratio should
    lie between, None where nothing is asked.
    """

    step: str
    seconds: float | None
    rate: str
    ratio: float | None
    yardstick: str
    low: float | None = None
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
        if self.low is not None and self.high is not None:
            return f"{self.low:g} to {self.high:g}"
        if self.low is not None:
            return f"at least {self.low:g}"
        return "" if self.high is None else f"at most {self.high:g}"


@dataclass(frozen=True)
class Subject:
    """What is measured: a model by name, or random weights of a published shape."""

    model: str | None
    shape: str | None
    device: torch.device
    dtype: torch.dtype
    revision: str | None = None
    seed: int = 0  # of random weights and of random tokens

    def load(self, layers: int | None = None) -> PreTrainedModel:
        """The model; `layers` makes one of a shape shallower."""
        if self.model:
            return models.load(self.model, self.device, self.dtype, self.revision)[0]
        config = config_of(self.shape, layers)
        with torch.device(self.device):
            torch.manual_seed(self.seed)
            return AutoModelForCausalLM.from_config(config, dtype=self.dtype).eval()

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer; None for random weights."""
        return models.load_tokenizer(self.model, self.revision) if self.model else None


def check_shape(name: str) -> None:
    """Raise RequestError when `name` is no published shape."""
    if name not in SHAPES:
        raise RequestError(f"shape {name!r} is unknown; there are {', '.join(SHAPES)}")


def run(
    subject: Subject, text: str, count: int, window: int, slice_percentage: float, repeats: int
) -> dict:
    """Measure all rows; `count` windows of `window` tokens are what slicing and LR work on.

    text: corpus or file of the windows; models of random weights take random tokens.
    Returns what was measured on what, and `rows`, in the order in which a reader wants them.
    """
    device, dtype = subject.device, subject.dtype
    rate = speed.matrix_rate(device, dtype)
    copy = speed.copy_rate(device)
    name = str(dtype).removeprefix("torch.")
    rows = [
        Row("matrix product", None, f"{rate / 1e12:.3g} TFLOP/s", None, f"{name}, best of 10"),
        Row("memory copy", None, f"{copy / 1e9:.3g} GB/s", None, "read and written, best of 10"),
    ]
    dense, tokenizer = subject.load(), subject.tokenizer()
    windows = _windows(dense, tokenizer, text, count, window, subject.seed)
    shape = dims_of(dense.config)
    lr = layer_redundancy(dense, windows[: max(1, count // 4)], window).lr
    at = f"SP {percent(slice_percentage)}"
    plans = {
        f"constant, {at}": constant(shape, slice_percentage),
        f"dynamic, {at}, SB 0%": dynamic(shape, lr, slice_percentage),
    }
    rows += _calibration_rows(dense, windows, plans, repeats, rate)
    rows.append(_memory_row(subject, dense, windows, next(iter(plans.values()))))
    for label, widths in plans.items():
        sliced = slicing.slice_model(dense, windows[: max(1, count // 4)], widths).model
        rows += _throughput_rows(dense, sliced, label, repeats)
        del sliced
    del dense
    free_memory()
    if device.type == "cuda":
        rows += _streamed_rows(subject, windows, next(iter(plans.values())))
    if tokenizer is not None:
        rows.append(_sweep_row(subject))
        rows += _task_rows(subject, tokenizer, repeats)
    rows.append(_oracle_row(subject, tokenizer, text, slice_percentage))
    return {
        "model": subject.model or f"random weights of the shape of {subject.shape}",
        "shape": subject.shape,
        "dtype": name,
        "text": text if tokenizer else "random tokens",
        "windows": count,
        "window": window,
        "repeats": repeats,
        "rows": [{**asdict(row), "limit": row.limit, "met": row.met} for row in rows],
        "provenance": provenance(device),
    }


def lines(result: dict) -> list[str]:
    """What `run` returned, as a reader wants it."""
    where = result["provenance"]
    cells = [
        (
            row["step"],
            "" if row["seconds"] is None else f"{row['seconds']:.3g}",
            row["rate"],
            "" if row["ratio"] is None else f"{row['ratio']:.3g}",
            row["limit"],
            {None: "", True: "yes", False: "NO"}[row["met"]],
            row["yardstick"],
        )
        for row in result["rows"]
    ]
    names = ("step", "seconds", "rate", "ratio", "limit", "met", "ratio is")
    return [
        f"{result['model']} in {result['dtype']} on {where['device']} ({where['threads']} threads)",
        f"{result['windows']} windows of {result['window']} tokens; medians of "
        f"{result['repeats']} repeats, after a warm-up that is not timed",
        tabulate(cells, names, disable_numparse=True),
    ]


def _windows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    text: str,
    count: int,
    window: int,
    seed: int,
) -> Tensor:
    if tokenizer is not None:
        split = texts.default_split(text, None, "train")
        return token_windows(text, split, tokenizer, window, count)
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (count, window), generator=draw)


@torch.inference_mode()
def _pass(model: PreTrainedModel, windows: Tensor) -> None:
    for batch in batches(windows, "layers", model.device):
        model.base_model(batch, use_cache=False)


def _calibration_rows(
    model: PreTrainedModel, windows: Tensor, plans: dict[str, SlicePlan], repeats: int, rate: float
) -> list[Row]:
    """One pass through the layers; LR and slicing beside it, on the same windows [n, T]."""
    count, window = windows.shape

    def steps(on: Tensor) -> dict[str, Callable]:
        slices = {
            f"slice, {label}": lambda w=widths: slicing.slice_model(model, on, w)
            for label, widths in plans.items()
        }
        return {
            "one pass through the layers": lambda: _pass(model, on),
            "layer redundancy": lambda: layer_redundancy(model, on, window),
            **slices,
        }

    for step in steps(windows[:WARM_UP_WINDOWS]).values():
        step()
    every = alternate(steps(windows), model.device, repeats, warm_up=0)
    times = {name: median(seconds) for name, seconds in every.items()}
    base = times.pop("one pass through the layers")
    work = flops(model.config, 1, window, head=False) * count

    def tokens(seconds: float) -> str:
        return f"{windows.numel() / seconds:,.0f} tokens/s"

    share = work / base / rate
    first = Row("one pass through the layers", base, tokens(base), share, "of the matrix product")
    return [first] + [
        Row(
            name,
            seconds,
            tokens(seconds),
            seconds / base,
            "time over one pass",
            high=1.1 if name == "layer redundancy" else 1.5,
        )
        for name, seconds in times.items()
    ]


def _memory_row(
    subject: Subject, dense: PreTrainedModel, windows: Tensor, widths: SlicePlan
) -> Row:
    """The peak while slicing, beside weights, signals of one place and one layer's workspace.

    On a CPU in a process of its own, where nothing else adds to the resident set.
    """
    size = dense.dtype.itemsize
    weights = stored_bytes(dense) + widths.parameters * size
    signals = windows.numel() * widths.shape.hidden_size * size
    one = next(iter(batches(windows[:1], "workspace", subject.device)))
    stream = [torch.zeros(*one.shape, widths.shape.hidden_size, device=one.device)]
    workspace = sum(
        extra_memory(step, subject.device)
        for step in (lambda: _pass(dense, one), lambda: principal_basis(stream))
    )
    if subject.device.type == "cuda":
        extra = extra_memory(lambda: slicing.slice_model(dense, windows, widths), subject.device)
        peak = stored_bytes(dense) + extra
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            peak = pool.submit(_slicing_peak, subject, windows, widths).result()
    return Row(
        "memory while slicing",
        None,
        f"{peak / 2**20:,.0f} MiB",
        peak / (weights + signals + workspace),
        "peak over weights read and written, signals of one place, one layer's workspace",
        high=1.3,
    )


def _slicing_peak(subject: Subject, windows: Tensor, widths: SlicePlan) -> int:
    """Bytes by which loading and slicing raise the resident set of this fresh process."""
    torch.linalg.eigh(torch.eye(8))  # the libraries' own buffers are not slicing's
    reset_peak_memory(subject.device)
    before = peak_memory_bytes(subject.device)
    slicing.slice_model(subject.load(), windows, widths)
    return peak_memory_bytes(subject.device) - before


def _streamed_rows(subject: Subject, windows: Tensor, widths: SlicePlan) -> list[Row]:
    """Slicing layer by layer from a checkpoint: its peak beside the prediction and a small GPU's.

    On a GPU, whose allocator tells the peak; the resident set of a CPU's process tells less.
    """
    device, dtype, window = subject.device, subject.dtype, windows.shape[1]
    paths.CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=paths.CACHE, prefix="bench-") as scratch:
        source, out = Path(scratch) / "dense", Path(scratch) / "sliced"
        model = subject.load()
        config = model.config
        save(model, subject.tokenizer() or models.load_tokenizer(ANY_TOKENIZER), source)
        del model
        free_memory()
        reset_peak_memory(device)
        before = peak_memory_bytes(device)
        budget = streaming.Budget(device=SMALL_GPU)
        given = (str(source), windows, widths, device, dtype)
        seconds = models.slice_saved(out, *given, budget=budget).seconds
        peak = peak_memory_bytes(device) - before
    workspace = slicing_workspace(config, widths, window, device, dtype)
    signals = signal_bytes(widths, windows.numel(), dtype)
    predicted = workspace + min(signals, max(0, SMALL_GPU - workspace))
    label = f"{windows.numel() / seconds:,.0f} tokens/s, {shown_bytes(peak)}"
    return [
        Row("streamed slicing", seconds, label, peak / predicted, "peak over prediction", 0.8, 1.2),
        Row(
            f"streamed slicing within {shown_bytes(SMALL_GPU)}",
            None,
            shown_bytes(peak),
            peak / SMALL_GPU,
            "of that memory",
            high=1.0,
        ),
    ]


def _throughput_rows(
    dense: PreTrainedModel, sliced: PreTrainedModel, label: str, repeats: int
) -> list[Row]:
    """Prefill and decoding of a sliced network: the gain measured, over the gain counted."""
    size = PREFILL if dense.device.type == "cpu" else PREFILL_GPU
    longest = dense.config.max_position_embeddings
    ids = _windows(dense, None, "", size[0], min(size[1], longest - NEW_TOKENS), seed=0)
    value = speed.speed(dense, sliced, ids, NEW_TOKENS, repeats)
    rows = []
    for step, counted, what in (
        ("prefill", "prefill_flops", "FLOP"),
        ("decode", "decode_bytes", "bytes of weights"),
    ):
        times = {name: median(t) for name, t in value[f"{step}_seconds"].items()}
        expected = value[counted]["dense"] / value[counted]["sliced"]
        gain = times["dense"] / times["sliced"]
        rate = value[f"{step}_tokens"] / times["sliced"]
        rows.append(
            Row(
                f"{step}, {label}",
                times["sliced"],
                f"{rate:,.0f} tokens/s, {gain:.2f} x dense",
                gain / expected,
                f"gain over that of {what} ({expected:.2f} x)",
                low=0.9,
                high=1.1,
            )
        )
    return rows


def _sweep_row(subject: Subject) -> Row:
    """A small study of constant points: what it takes beside slicing and evaluating them."""
    small = {"calibration_windows": 4, "calibration_window": 256, "eval_windows": 4}
    settings = load(
        "quick",
        {
            **small,
            "model": subject.model,
            "revision": subject.revision,
            "dtype": str(subject.dtype).removeprefix("torch."),
            "slice_percentages": list(SWEEP),
            "slice_bases": [],
            "eval_window": 256,
            "tasks": {"piqa": 8},
            "task_slice_percentages": list(SWEEP),
            "task_slice_bases": [],
        },
    )
    with tempfile.TemporaryDirectory() as folder:
        study = Study(settings, Store(Path(folder)), str(subject.device))
        requests = unique([*study.perplexity_requests(), *study.task_requests()])
        wall = seconds_of(lambda: study.ensure(requests), subject.device)
        spent = sum(study.store.get(request).seconds for request in requests)
    points = len(study.points())
    return Row(
        f"sweep of {points} points, dense one included",
        wall,
        f"{points / wall:.2f} points/s",
        (wall - spent) / points,
        "seconds per point beside slicing and evaluating it, loading the model included",
        high=2.0,
    )


def _task_rows(subject: Subject, tokenizer: PreTrainedTokenizerBase, repeats: int) -> list[Row]:
    """HellaSwag with contexts computed once, beside lm-eval's own model."""
    dense, scores = subject.load(), {}

    def score(shared: bool) -> Callable:
        def step() -> None:
            scores[shared] = harness.tasks(
                dense, tokenizer, ["hellaswag"], TASK_ITEMS, share_contexts=shared
            )["hellaswag"]

        return step

    steps = {"shared": score(True), "lm-eval": score(False)}
    times = {name: median(t) for name, t in alternate(steps, subject.device, repeats).items()}
    ours, theirs = scores[True], scores[False]
    alike = sum(a == b for a, b in zip(ours["correct"], theirs["correct"], strict=True))
    margins = zip(ours["margin"], theirs["margin"], strict=True)
    exact = subject.dtype == torch.float32
    return [
        Row(
            "HellaSwag, contexts shared",
            times["shared"],
            f"{TASK_ITEMS / times['shared']:.2f} items/s",
            times["lm-eval"] / times["shared"],
            "times the speed of lm-eval's HFLM",
            low=1.5,
        ),
        Row(
            "check: HellaSwag margins beside HFLM's",
            None,
            f"{alike} of {TASK_ITEMS} items judged alike",
            max(abs(a - b) for a, b in margins),
            "largest difference (nats)",
            high=1e-3 if exact else None,
        ),
    ]


def _oracle_row(
    subject: Subject, tokenizer: PreTrainedTokenizerBase | None, text: str, share: float
) -> Row:
    """A sliced network beside projectors in the dense one."""
    model = subject.load(layers=2)
    shape = dims_of(model.config)
    window = min(512, model.config.max_position_embeddings)
    count = max(8, -(-8 * shape.hidden_size // window))  # 8 tokens a dimension: bases are definite
    calibration = _windows(model, tokenizer, text, count + 1, window, subject.seed)
    calibration, unseen = calibration[:-1], calibration[-1:]
    widths = constant(shape, share)
    sliced = slicing.slice_model(model, calibration, widths).model
    with torch.inference_mode():
        got = sliced(unseen.to(model.device), use_cache=False).logits.float()
    wanted = oracle_logits(model, calibration, unseen, widths).float()
    deviation = ((got - wanted).pow(2).mean().sqrt() / wanted.std()).item()
    perplexities = [_perplexity(logits, unseen) for logits in (got, wanted)]
    return Row(
        f"check: perplexity beside the oracle's, {shape.layers} layers",
        None,
        f"{perplexities[0]:.4f} beside {perplexities[1]:.4f}, logits differ by {deviation:.1e} sd",
        abs(perplexities[0] / perplexities[1] - 1),
        f"relative difference on {unseen.numel()} tokens",
        high=1e-3 if subject.dtype == torch.float32 else 3e-2,
    )


def _perplexity(logits: Tensor, ids: Tensor) -> float:
    targets = ids[:, 1:].flatten().to(logits.device)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), targets).exp().item()


@torch.inference_mode()
def oracle_logits(
    model: PreTrainedModel, calibration: Tensor, tokens: Tensor, widths: SlicePlan
) -> Tensor:
    """What a sliced network should say on tokens [b, T], computed slowly and plainly.

    The dense model with projectors in its stream: at each place the calibration signals and the
    stream of `tokens` are projected on the leading right singular vectors of the former, and go
    on through the dense block. No weight is folded, rotated or cut.
    """
    family = family_of(model.config)
    stream = Activations(model.device)
    arguments = residual_stream(model, torch.cat([calibration, tokens]), stream)
    x, count, place_widths = torch.cat(list(stream)), len(calibration), iter(widths.place_widths)
    for i, layer in enumerate(model.get_submodule(family.layers)):
        for block in family.blocks:
            signals = x[:count].flatten(0, 1).double()
            V = torch.linalg.svd(signals, full_matrices=False).Vh[: next(place_widths)].T
            x = (x.double() @ V @ V.T).to(x.dtype)
            x = x + torch.cat([block_output(layer, block, part[None], arguments[i]) for part in x])
    return model.get_output_embeddings()(model.get_submodule(family.final_norm)(x[count:]))
