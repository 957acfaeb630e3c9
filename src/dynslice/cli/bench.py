"""`dynslice bench`: how long each step takes, on what, and whether its result is right."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial

from tabulate import tabulate

from dynslice.cli import bench_rows
from dynslice.cli.bench_rows import Row, Slice, Subject
from dynslice.core.tensors import free_memory
from dynslice.evaluate import speed
from dynslice.experiment.profile import percent
from dynslice.experiment.store import provenance
from dynslice.extensions import schedules
from dynslice.extensions.alternatives import METHODS, smaller
from dynslice.extensions.compensation import Compensation
from dynslice.method import slicing
from dynslice.method.architectures import dims_of
from dynslice.method.layout import Layout, basis_groups
from dynslice.method.plan import ModelDims, SlicePlan, constant, dynamic
from dynslice.method.redundancy import layer_redundancy


def run(
    subject: Subject, text: str, count: int, window: int, slice_percentage: float, repeats: int
) -> dict:
    """What was measured on what, and `rows` in the order in which a reader wants them.

    Slicing and LR work on `count` windows of `window` tokens of a corpus or file `text`, or on
    random tokens where the weights are random.
    """
    device, tokenizer = subject.device, subject.tokenizer()
    dtype = str(subject.dtype).removeprefix("torch.")
    rate, copy = speed.matrix_rate(device, subject.dtype), speed.copy_rate(device)
    rows = [
        Row("matrix product", None, f"{rate / 1e12:.3g} TFLOP/s", None, f"{dtype}, best of 10"),
        Row("memory copy", None, f"{copy / 1e9:,.0f} GB/s", None, "read and written, best of 10"),
    ]
    dense = subject.load()
    windows = subject.windows(dense, text, count, window)
    few = windows[: max(1, count // 4)]
    slices = _slices(dims_of(dense.config), layer_redundancy(dense, few).lr, slice_percentage)
    plan = slices[0].plan
    rows += bench_rows.calibration_rows(dense, windows, slices, repeats, rate)
    rows.append(bench_rows.memory_row(subject, dense, windows, plan))
    for label, make in _networks(slices, slice_percentage).items():
        how = label, repeats, subject.seed
        rows += bench_rows.throughput_rows(dense, make(dense, few).model, *how)
    del dense
    free_memory()
    if device.type == "cuda":
        rows += bench_rows.streamed_rows(subject, windows, plan)
    if tokenizer is not None:
        rows.append(bench_rows.sweep_row(subject))
        rows += bench_rows.task_rows(subject, tokenizer, repeats)
        rows.append(bench_rows.oracle_row(subject, text, slice_percentage))
    return {
        "model": subject.model or _random(subject),
        "shape": subject.shape,
        "layers": subject.layers,
        "dtype": dtype,
        "text": text if tokenizer else "random tokens",
        "windows": count,
        "window": window,
        "repeats": repeats,
        "rows": [{**asdict(row), "limit": row.limit, "met": row.met} for row in rows],
        "provenance": provenance(device),
    }


def _random(subject: Subject) -> str:
    layers = f", {subject.layers} layers" if subject.layers else ""
    return f"random weights of the shape of {subject.shape}{layers}"


def _networks(slices: list[Slice], slice_percentage: float) -> dict[str, Callable]:
    """What makes each network whose speed is measured, of the dense model and token windows."""
    found = {x.label: partial(slicing.slice_model, plan=x.plan) for x in slices if not x.start}
    budget = slices[0].plan.parameters
    for method in METHODS:
        label = f"fewer {method}, size of SP {percent(slice_percentage)}"
        found[label] = partial(smaller, budget=budget, method=method)
    return found


def _slices(shape: ModelDims, lr: Sequence[float], slice_percentage: float) -> list[Slice]:
    """What is sliced: constant and dynamic, and at the size of constant with shared bases."""
    at, tied = f"SP {percent(slice_percentage)}", Layout(tied=shape.tied)
    plan = constant(shape, slice_percentage, layout=tied)

    def shared(layers: int | str) -> SlicePlan:
        groups = basis_groups(len(shape.reads), shape.layers, layers, lr)
        layout = replace(tied, basis_groups=groups)
        known = schedules.Evidence(shape, lr=lr, layout=layout)
        return schedules.within("lr", known, plan.parameters)

    layers = schedules.BEST["basis_layers"]
    best = shared(layers)
    several = []  # where that is not one basis for all
    if shape.layers > layers:
        several.append(Slice(f"a basis for {layers} layers, size of {at}", best, 2.6))
    ordinary = []  # the library's own class, whose speed ours can be held against
    if shape.heads:
        known = schedules.Evidence(shape, shape.heads, layout=Layout(plain=True))
        narrow = schedules.within("constant", known, plan.parameters)
        ordinary.append(Slice(f"ordinary checkpoint, size of {at}", narrow, 2.6))
    return [
        Slice(f"constant, {at}", plan, 1.5),
        Slice(f"dynamic, {at}, SB 0%", dynamic(shape, lr, slice_percentage, layout=tied), 1.5),
        *several,
        Slice(f"one basis, size of {at}", shared("all"), 2.6),
        *ordinary,
        Slice(f"recipe best, size of {at}", best, 5.0, Compensation()),
    ]


def lines(result: dict) -> list[str]:
    """What `run` returned, as a reader wants it."""
    where = result["provenance"]
    names = ("step", "seconds", "rate", "ratio", "limit", "met", "yardstick")
    cells = [[_shown(row[name]) for name in names] for row in result["rows"]]
    return [
        f"{result['model']} in {result['dtype']} on {where['device']} ({where['threads']} threads)",
        f"{result['windows']} windows of {result['window']} tokens; times are medians, of "
        f"{result['repeats']} after a warm-up that is not timed",
        tabulate(cells, [*names[:-1], "ratio is"], disable_numparse=True),
    ]


def _shown(value: str | float | bool | None) -> str | None:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return f"{value:.3g}" if isinstance(value, float) else value
