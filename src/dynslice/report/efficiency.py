"""What slicing costs and saves: tables and figures of notebook 05, from result files."""

import json
from statistics import median

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from dynslice.core import paths
from dynslice.experiment.requests import Point
from dynslice.experiment.study import Study
from dynslice.report import style

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

_STEPS = {"prefill": "prefill_flops", "decode": "decode_bytes"}  # and what bounds each

# The benchmark of each machine: its file, and the command that measures it there.
BENCHES = {
    "SmolLM2-135M on a CPU": (
        "smollm2-135m-cpu",
        "dynslice bench --device cpu --repeats 5",
    ),
    "SmolLM2-135M on a GPU": (
        "smollm2-135m-cuda",
        "dynslice bench --device cuda --windows 128 --window 2048",
    ),
    "the shape of Llama-3-8B on a GPU": (
        "llama-3-8b-cuda",
        "dynslice bench --device cuda --shape llama-3-8b --windows 128 --window 2048 --repeats 1",
    ),
    "the shape of Mistral-7B on a GPU": (
        "mistral-7b-cuda",
        "dynslice bench --device cuda --shape mistral-7b --windows 128 --window 2048 --repeats 1",
    ),
}


def size_table(study: Study) -> pd.DataFrame:
    """One row per network: what it stores, and how long slicing took."""
    study.ensure(study.efficiency_requests())
    rows = []
    points = [*study.points(), *study.speed_points()]
    for point in {point.label: point for point in points}.values():
        result = study.get(study.slice_request(point))
        stored = result.value["parameters"] * _BYTES[study.profile.dtype]
        rows.append(
            {
                "network": point.label,
                "SP": point.slice_percentage,
                "SB": point.slice_base,
                "parameters (M)": result.value["parameters"] / 1e6,
                "stored (MB)": stored / 1e6,
                "against dense (%)": 100
                * (result.value["parameters"] / result.value["parameters_dense"] - 1),
                "slicing (s)": None if point.network is None else result.seconds,
            }
        )
    return pd.DataFrame(rows)


def time_prose(study: Study, table: pd.DataFrame) -> str:
    """How long LR and slicing took, beside each other."""
    p, lr = study.profile, study.get(study.lr_request())
    tokens = lr.value["windows"] * lr.value["window"]
    slicing = table["slicing (s)"].dropna()
    return (
        f"LR took **{lr.seconds:.1f} s** for {tokens:,} window tokens ({tokens / lr.seconds:,.0f} "
        f"tokens/s), once for all dynamic networks. Slicing took **{slicing.median():.1f} s** "
        f"({slicing.min():.1f} to {slicing.max():.1f} s) a network for "
        f"{p.calibration_windows * p.calibration_window:,} calibration tokens "
        f"({p.calibration_windows * p.calibration_window / slicing.median():,.0f} tokens/s)."
    )


def speed_table(study: Study) -> pd.DataFrame:
    """Per sliced network, prefill and decoding: the gain over the dense model, and its limit.

    The gain is the ratio of the medians over repeats; its range is that of the repeats, in each
    of which dense and sliced ran one after the other. What bounds prefill is the FLOP count,
    what bounds decoding at batch 1 the bytes of weights that are read.
    """
    rows = []
    for point in study.speed_points():
        value = study.get(study.speed_request(point)).value
        rows += [_speed_row(point, value, step) for step in _STEPS]
    return pd.DataFrame(rows)


def _speed_row(point: Point, value: dict, step: str) -> dict:
    dense, sliced = (np.array(value[f"{step}_seconds"][name]) for name in ("dense", "sliced"))
    counted = value[_STEPS[step]]["dense"] / value[_STEPS[step]]["sliced"]
    gain = median(dense) / median(sliced)
    peak = value["stored_bytes"]["sliced"] + value["prefill_extra_bytes"]["sliced"]
    flops = value["prefill_flops"]["sliced"] / value["prefill_tokens"]
    needs = {
        "prefill": _flop(flops),
        "decode": f"{value['decode_bytes']['sliced'] / 1e6:.0f} MB",
    }
    return {
        "network": point.label,
        "schedule": point.schedule,
        "step": step,
        "needs per token": needs[step],
        "dense (ms/token)": 1e3 * median(dense) / value[f"{step}_tokens"],
        "sliced (ms/token)": 1e3 * median(sliced) / value[f"{step}_tokens"],
        "gain (x)": gain,
        "least (x)": min(dense / sliced),
        "most (x)": max(dense / sliced),
        "counted (x)": counted,
        "gain / counted": gain / counted,
        "peak memory (MB)": peak / 1e6 if step == "prefill" else None,
    }


def _flop(count: float) -> str:
    """Operations with three decimals, in the unit that shows them."""
    return f"{count / 1e9:.3f} GFLOP" if count >= 1e8 else f"{count / 1e6:.3f} MFLOP"


def dense_prose(study: Study) -> str:
    """The dense model's own figures, and what was run."""
    if not study.speed_points():
        return (
            f"The profile `{study.profile.name}` times no network (`speed_slice_percentages` is "
            "empty); the rendered notebook of `quick` shows the measured speeds."
        )
    p, point = study.profile, study.speed_points()[0]
    value = study.get(study.speed_request(point)).value
    flops = value["prefill_flops"]["dense"] / value["prefill_tokens"]
    peak = value["stored_bytes"]["dense"] + value["prefill_extra_bytes"]["dense"]
    return (
        f"Prefill is one pass over {p.speed_windows} windows of {p.speed_window} tokens, decoding "
        f"generates {p.speed_new_tokens} tokens at batch 1; medians of {p.speed_repeats} repeats "
        f"after one that is not timed. The dense model needs {_flop(flops)} a token of "
        f"prefill, reads {value['decode_bytes']['dense'] / 1e6:.0f} MB for each decoded one, and "
        f"holds {peak / 1e6:.0f} MB at the peak of prefill."
    )


def speed_prose(table: pd.DataFrame) -> str:
    """Where the measured gain is what was counted, and where it falls short."""
    if table.empty:
        return ""
    ratio = table["gain / counted"]
    close = int(ratio.between(0.9, 1.1).sum())
    worst = table.loc[ratio.idxmin()]
    return (
        f"In **{close} of {len(table)}** rows the measured gain lies within 10 % of the counted "
        f"one. It falls furthest short in {worst['step']} of {worst['network']}: "
        f"{worst['gain (x)']:.2f} x where {worst['counted (x)']:.2f} x was counted."
    )


def work_prose(speeds: pd.DataFrame, sizes: pd.DataFrame) -> str:
    """How constant and dynamic networks of equal mean slice compare in work and in size."""
    stored = sizes.set_index("network")[["SP", "parameters (M)"]]
    both = speeds.join(stored, on="network") if len(speeds) else speeds
    work, size = [], []
    for _, rows in both.groupby(["SP", "step"]) if len(both) else []:
        for _, dynamic in rows[rows["schedule"] == "dynamic"].iterrows():
            constant = rows[rows["schedule"] == "constant"].iloc[0]
            work.append(constant["counted (x)"] / dynamic["counted (x)"] - 1)
            size.append(dynamic["parameters (M)"] / constant["parameters (M)"] - 1)
    if not work:
        return ""
    return (
        f"At equal mean slice a dynamic network differs from the constant one by "
        f"{100 * min(work):+.1f} to {100 * max(work):+.1f} % in what it needs for a token "
        f"(operations, bytes read), and by {100 * min(size):+.1f} to {100 * max(size):+.1f} % in "
        "what it stores: the embedding, of which a token reads one row, is as wide as layer 0."
    )


def speed_figure(table: pd.DataFrame) -> plt.Figure:
    """Measured gain against the counted one; the band is 10 % to either side."""
    style.style()
    if table.empty:
        return style.nothing()
    figure, axes = plt.subplots(1, 2, figsize=(2 * style.COLUMN_WIDTH, 2.5), sharey=True)
    looks = {"constant": ("o", "w"), "dynamic": ("^", "C1")}
    names = {"prefill": "prefill, FLOP counted (x)", "decode": "decoding, bytes counted (x)"}
    for axis, (step, name) in zip(axes, names.items(), strict=True):
        rows = table[table["step"] == step]
        ends = np.array([min(1.0, rows["counted (x)"].min()), rows["counted (x)"].max()])
        ends = ends + np.array([-0.02, 0.02])
        axis.plot(ends, ends, color="0.5", linestyle="--", linewidth=1, label="as counted")
        axis.fill_between(ends, 0.9 * ends, 1.1 * ends, color="0.9", linewidth=0)
        for schedule, (marker, face) in looks.items():
            here = rows[rows["schedule"] == schedule]
            gain, x = here["gain (x)"], here["counted (x)"]
            reach = [(gain - here["least (x)"]).clip(0), (here["most (x)"] - gain).clip(0)]
            axis.errorbar(
                x,
                gain,
                yerr=reach,
                fmt=marker,
                color="C0" if schedule == "constant" else "C1",
                markerfacecolor=face,
                capsize=2,
                linewidth=1,
                label=schedule,
            )
        axis.set(xlabel=name)
    axes[0].set(ylabel="measured gain over dense (x)")
    axes[0].legend(frameon=False)
    figure.tight_layout()
    return figure


def benches() -> dict[str, dict]:
    """The committed benchmarks, by what was measured."""
    files = {name: paths.BENCH / f"{stem}.json" for name, (stem, _) in BENCHES.items()}
    return {name: json.loads(f.read_text()) for name, f in files.items() if f.is_file()}


def bench_table(bench: dict) -> pd.DataFrame:
    """The rows of one benchmark."""
    met = {None: "-", True: "yes", False: "no"}
    return pd.DataFrame(
        {
            "step": row["step"],
            "seconds": row["seconds"],
            "rate": row["rate"],
            "ratio": row["ratio"],
            "limit": row["limit"] or "-",
            "met": met[row["met"]],
            "ratio is": row["yardstick"],
        }
        for row in bench["rows"]
    )


def bench_prose(name: str, bench: dict) -> str:
    """What a benchmark ran on, and which of its limits it met."""
    where, rows = bench["provenance"], [row for row in bench["rows"] if row["met"] is not None]
    met = sum(row["met"] for row in rows)
    return (
        f"**{name[0].upper()}{name[1:]}**: {bench['model']} in {bench['dtype']} on "
        f"{where['device']} ({where['threads']} threads), {bench['windows']} windows of "
        f"{bench['window']} tokens, medians of {bench['repeats']} repeats after a warm-up, code at "
        f"commit {where['commit'][:10]}. **{met} of {len(rows)}** limits are met."
    )


def unmeasured_prose() -> str:
    """The benchmarks that nobody has run yet, with the command for each."""
    missing = [name for name in BENCHES if name not in benches()]
    if not missing:
        return "Every benchmark has been measured."
    lines = [f"**Not measured yet** ({len(missing)} of {len(BENCHES)}):", ""]
    for name in missing:
        stem, command = BENCHES[name]
        lines.append(f"- {name}: `{command} --out data/bench/{stem}.json`")
    lines += ["", "All of them, the tests on CUDA and the profile `full`: `tools/measure_gpu.sh`"]
    return "\n".join(lines)


def bench_block(name: str = "SmolLM2-135M on a CPU") -> str:
    """What a benchmark ran on, and its rows that have a limit, for the README."""
    bench = benches()[name]
    table = bench_table(bench)
    table = table[table["met"] != "-"][["step", "ratio", "limit", "met", "ratio is"]]
    rows = style.rounded(table).to_markdown(index=False, disable_numparse=True)
    return f"{bench_prose(name, bench)}\n\n{rows}\n\n{unmeasured_prose()}"
