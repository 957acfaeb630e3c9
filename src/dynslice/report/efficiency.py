"""Notebook 05: what slicing costs and saves."""

import json
from statistics import median

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from dynslice.core import paths
from dynslice.experiment.requests import Point
from dynslice.experiment.study import Study
from dynslice.report import statistics, style
from dynslice.report.statistics import SIZE, UNTIED

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
STEPS = {"prefill": "prefill_flops", "decode": "decode_bytes"}  # and what bounds each

# The benchmark of each machine: its file, and the command that measures it there.
_SMALL = "dynslice bench --device cuda --windows 128 --window 2048"
_LARGE = (
    "dynslice bench --device cuda --shape {} --layers 4 --windows 128 --window 2048 --repeats 1"
)
BENCHES = {
    "SmolLM2-135M on a CPU": ("smollm2-135m-cpu", "dynslice bench --device cpu --repeats 5"),
    "SmolLM2-135M on a GPU": ("smollm2-135m-cuda", _SMALL),
    "four layers of the shape of Llama-3-8B on a GPU": (
        "llama-3-8b-cuda",
        _LARGE.format("llama-3-8b"),
    ),
    "four layers of the shape of Mistral-7B on a GPU": (
        "mistral-7b-cuda",
        _LARGE.format("mistral-7b"),
    ),
}


def size_table(study: Study) -> pd.DataFrame:
    """One row per network: what it stores, and how long slicing took."""
    study.ensure(study.design.efficiency_requests())
    dtype = study.profile.dtype
    points = [*study.points(), *study.design.speed_points()]
    results = {point.label: (point, study.get(study.slice_request(point))) for point in points}
    return pd.DataFrame(
        {
            "network": label,
            "SP": point.slice_percentage,
            "SB": point.slice_base,
            **statistics.sizes(study, point),
            f"stored (MB, {dtype})": study.size(point) * _BYTES[dtype] / 1e6,
            "against dense (%)": 100 * (study.size(point) / sliced.value["parameters_dense"] - 1),
            "slicing (s)": None if point.network is None else sliced.seconds,
        }
        for label, (point, sliced) in results.items()
    )


def time_prose(study: Study, table: pd.DataFrame) -> str:
    """How long LR and slicing took."""
    p, lr, slicing = study.profile, study.get(study.lr_request()), table["slicing (s)"].describe()
    tokens = lr.value["windows"] * lr.value["window"]
    calibration = p.calibration_windows * p.calibration_window
    counts, rates = (tokens, calibration), (tokens / lr.seconds, calibration / slicing["50%"])
    return style.say("slicing_time", lr=lr, slicing=slicing, tokens=counts, rates=rates)


def speed_table(study: Study) -> pd.DataFrame:
    """Per sliced network, prefill and decoding: the gain over the dense model, and its limit.

    The gain is the ratio of the medians over repeats; its range is that of the repeats, in each
    of which dense and sliced ran one after the other. What bounds prefill is the FLOP count,
    what bounds decoding at batch 1 the bytes of weights that are read.
    """
    return pd.DataFrame(
        _speed_row(point, study.get(study.design.speed_request(point)).value, step)
        for point in study.design.speed_points()
        for step in STEPS
    )


def _speed_row(point: Point, value: dict, step: str) -> dict:
    dense, sliced = (value[f"{step}_seconds"][name] for name in ("dense", "sliced"))
    (gain, counted), tokens = gains(value, step), value[f"{step}_tokens"]
    least, most = _reach(value, step)
    prefill = step == "prefill"
    return {
        "network": point.label,
        "schedule": point.schedule,
        "step": step,
        "needs per token": _flops(value, "sliced") if prefill else _read(value, "sliced"),
        "dense (ms/token)": 1e3 * median(dense) / tokens,
        "sliced (ms/token)": 1e3 * median(sliced) / tokens,
        "gain (x)": gain,
        "least (x)": least,
        "most (x)": most,
        "counted (x)": counted,
        "gain / counted": gain / counted,
        "peak memory (MB)": _peak(value, "sliced") if prefill else None,
    }


def gains(value: dict, step: str) -> tuple[float, float]:
    """How many times as fast as dense a network is at a step of STEPS: measured, and counted."""
    seconds, count = value[f"{step}_seconds"], value[STEPS[step]]
    measured = median(seconds["dense"]) / median(seconds["sliced"])
    return measured, count["dense"] / count["sliced"]


def _reach(value: dict, step: str) -> tuple[float, float]:
    """The least and the most of the gain over the repeats."""
    seconds = value[f"{step}_seconds"]
    of_repeats = np.divide(seconds["dense"], seconds["sliced"])
    return of_repeats.min(), of_repeats.max()


def gain_columns(value: dict, step: str) -> dict[str, float]:
    """The gain at a step with its least and its most over the repeats, and the counted one."""
    (measured, counted), (least, most) = gains(value, step), _reach(value, step)
    found = {f"{step} (x)": measured, f"{step}, least (x)": least, f"{step}, most (x)": most}
    return {**found, f"{step}, counted (x)": counted}


def _flops(value: dict, network: str) -> str:
    """Operations for a token with three decimals, in the unit that shows them."""
    count = value["prefill_flops"][network] / value["prefill_tokens"]
    return f"{count / 1e9:.3f} GFLOP" if count >= 1e8 else f"{count / 1e6:.3f} MFLOP"


def _read(value: dict, network: str) -> str:
    return f"{value['decode_bytes'][network] / 1e6:.0f} MB"


def _peak(value: dict, network: str) -> float:
    return (value["stored_bytes"][network] + value["prefill_extra_bytes"][network]) / 1e6


def dense_prose(study: Study) -> str:
    """The dense model's own figures, and what was run."""
    p, points = study.profile, study.design.speed_points()
    if not points:
        return style.NONE
    value = study.get(study.design.speed_request(points[0])).value
    flops, read, peak = (of(value, "dense") for of in (_flops, _read, _peak))
    return style.say("dense_speed", p=p, flops=flops, read=read, peak=peak)


def work_prose(speeds: pd.DataFrame, sizes: pd.DataFrame) -> str:
    """How constant and dynamic networks of equal mean slice compare in work and in size."""
    if speeds.empty:
        return style.NONE
    both = speeds.merge(sizes[["network", "SP", SIZE, UNTIED]], on="network")
    of = {schedule: both[both["schedule"] == schedule] for schedule in ("dynamic", "constant")}
    pairs = of["dynamic"].merge(of["constant"], on=["SP", "step"], suffixes=("", ", constant"))
    if pairs.empty:
        return style.NONE
    work = pairs["counted (x), constant"] / pairs["counted (x)"] - 1
    size, untied = (pairs[count] / pairs[f"{count}, constant"] - 1 for count in (SIZE, UNTIED))
    changes = {"work": work, "size": size, "untied": untied}
    return style.say("work", **{name: (100 * x).describe() for name, x in changes.items()})


def speed_figure(table: pd.DataFrame) -> plt.Figure | None:
    """Measured gain against the counted one; the band is 10 % to either side."""
    if table.empty:
        return None
    figure, axes = style.panels(1, 2, sharey=True)
    names = {"prefill": "prefill, FLOP counted (x)", "decode": "decoding, bytes counted (x)"}
    for axis, (step, name) in zip(axes, names.items(), strict=True):
        rows = table[table["step"] == step].rename(columns={"least (x)": "low", "most (x)": "high"})
        counted = rows["counted (x)"]
        ends = np.array([min(1.0, counted.min()) - 0.02, counted.max() + 0.02])
        axis.plot(ends, ends, color="0.5", linestyle="--", linewidth=1, label="as counted")
        axis.fill_between(ends, 0.9 * ends, 1.1 * ends, color="0.9", linewidth=0)
        for *look, schedule in (("o", "C0", "constant"), ("^", "C1", "dynamic")):
            here = rows[rows["schedule"] == schedule]
            style.points_with_intervals(
                axis, here["counted (x)"], here, "gain (x)", *look, schedule
            )
        axis.set(xlabel=name)
    axes[0].set(ylabel="measured gain over dense (x)")
    axes[0].legend()
    return figure


def benches() -> dict[str, dict]:
    """The committed benchmarks, by what was measured."""
    files = {name: paths.BENCH / f"{stem}.json" for name, (stem, _) in BENCHES.items()}
    return {name: json.loads(f.read_text()) for name, f in files.items() if f.is_file()}


def bench_table(bench: dict) -> pd.DataFrame:
    """The rows of one benchmark."""
    table = pd.DataFrame(bench["rows"]).rename(columns={"yardstick": "ratio is"})
    table["limit"] = table["limit"].replace("", "-")
    table["met"] = [{None: "-", True: "yes", False: "no"}[row["met"]] for row in bench["rows"]]
    return table[["step", "seconds", "rate", "ratio", "limit", "met", "ratio is"]]


def bench_prose(name: str, bench: dict) -> str:
    """What a benchmark ran on, and which of its limits it met."""
    met = [row["met"] for row in bench["rows"] if row["met"] is not None]
    where = bench["provenance"]
    told = {"where": where, "commit": style.commit_of(where), "met": sum(met), "count": len(met)}
    return style.say("bench", name=name[0].upper() + name[1:], bench=bench, **told)


def unmeasured_prose() -> str:
    """The benchmarks that nobody has run yet, with the command for each."""
    lines = [
        f"- {name}: `{command} --out data/bench/{stem}.json`"
        for name, (stem, command) in BENCHES.items()
        if name not in benches()
    ]
    if not lines:
        return "Every benchmark has been measured."
    counts = {"missing": len(lines), "every": len(BENCHES)}
    return style.say("unmeasured", commands="\n".join(lines), **counts)


def bench_block() -> str:
    """What each benchmark ran on, and its rows that have a limit, for docs/costs.md."""
    parts = []
    for name, bench in benches().items():
        table = bench_table(bench).query("met != '-'")
        rows = style.markdown(table.drop(columns="seconds"), digits=3)
        parts += [bench_prose(name, bench), rows]
    return "\n\n".join([*parts, unmeasured_prose()])
