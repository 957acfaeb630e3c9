"""The command line: `dynslice ...` or `python -m dynslice ...`.

Exit status 0; 2 for a request that cannot be served (one sentence on stderr); 1 for a failure
while running. Results go to stdout, as one JSON object with --json; progress goes to stderr.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib import metadata
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

from dynslice.cli import common
from dynslice.cli.alternatives import drop_layers_command, quantize_command
from dynslice.cli.common import check_output, dims, given, is_sampled, loaded, placed, windows_of
from dynslice.cli.parser import parser
from dynslice.cli.plans import plan_of
from dynslice.cli.slice import slice_command
from dynslice.core import assets, files, interrupt, paths
from dynslice.core.errors import RequestError, RunError, disk_trouble, in_one_line, without_secrets
from dynslice.core.paths import shown_path


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # an encoding that lacks a letter of a name
            stream.reconfigure(errors="backslashreplace")
    options = options_of(arguments)
    try:
        with interrupt.handled(), _bars_on_terminals_only():
            result, lines = options.run(options)
            with files.explained(Path("standard output")):
                print(json.dumps(result) if options.json else "\n".join(lines), flush=True)
    except BrokenPipeError:  # whoever read the output wants no more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt as stop:
        print(interrupt.SENTENCE, file=sys.stderr)
        return interrupt.status(stop)
    except Exception as error:
        said = disk_trouble(error)
        if said or isinstance(error, (RequestError, RunError, OSError)):
            print(f"dynslice: {said or in_one_line(error)}", file=sys.stderr)
        else:  # a bug
            print(without_secrets(traceback.format_exc()), end="", file=sys.stderr)
        return 2 if isinstance(error, RequestError) and not said else 1
    return 0


@contextmanager
def _bars_on_terminals_only() -> Iterator[None]:
    """For a while no library draws bars into a file, even where it asks tqdm for them."""
    if getattr(sys.stderr, "isatty", bool)():  # there may be no stderr
        yield
        return
    before = os.environ.get("TQDM_DISABLE", "")
    os.environ["TQDM_DISABLE"] = "1"  # of processes that this one starts
    from tqdm import tqdm

    make = tqdm.__init__
    tqdm.__init__ = lambda bar, *given, **how: make(bar, *given, **{**how, "disable": True})
    try:
        yield
    finally:
        tqdm.__init__ = make
        os.environ["TQDM_DISABLE"] = before


def options_of(arguments: list[str] | None = None):
    """What was typed, understood; exits with status 2 where it can't be."""
    made = parser(COMMANDS, (__doc__ or "").partition("\n")[0])
    if __doc__ is None:
        made.error("transformers needs the docstrings that python -OO leaves out; use python -O")
    return made.parse_args(arguments)


def assets_command(options) -> tuple[dict, list[str]]:
    """fetch, verify or list the embedded assets."""
    options.names = common.listed(*options.names)
    if options.names and options.action != "fetch":
        raise RequestError(f"`assets {options.action}` takes no names; leave them out")
    if options.action == "fetch":
        fetched, names = assets.fetch(*options.names), options.names or assets.manifest()
        if "smollm2-135m" in names and not files.is_sound(paths.embedded_model("smollm2-135m")):
            from dynslice.inputs import models

            models.resolve("embedded:smollm2-135m")
        result = {"fetched": fetched}
        lines = [f"fetched {', '.join(fetched)}" if fetched else "all of it is there already"]
        if "benchmarks" in names:
            result["task_files"] = str(tasks := _task_files())
            lines.append(f"task files for lm-eval's --include_path: {shown_path(tasks)}")
        return result, lines
    if options.action == "verify":
        problems = assets.verify()
        if bad := [*chain(*problems.values())]:
            raise RunError(bad[0])
        return {"verified": list(problems)}, [f"{name}: verified" for name in problems]
    rows = {
        name: {
            "package": f"{asset.package}=={asset.version}",
            "wheel_sha256": [asset.wheel_sha256],
            **given(asset, "holds", "licence"),
            "fetched": asset.folder.is_dir(),
        }
        for name, asset in assets.manifest().items()
    }
    for name, whole in assets.in_parts().items():
        first, last = whole.parts[0], whole.parts[-1]
        rows[name] = {
            "package": f"{first.package} to {last.package}, =={first.version}",
            "wheel_sha256": [part.wheel_sha256 for part in whole.parts],
            **given(whole, "holds", "licence", "bytes", "sha256"),
            "fetched": whole.is_there,
        }
    lines = [
        f"{name:18} {'fetched' if row['fetched'] else 'missing'}  {row['package']}: "
        f"{row['holds']} [{row['licence']}]"
        + (f", {row['bytes'] / 1e6:,.0f} MB, SHA-256 {row['sha256']}" if "sha256" in row else "")
        for name, row in rows.items()
    ]
    return {"assets": rows}, lines


def _task_files() -> Path:
    """The folder of task files, written anew unless they are sound and of this version.

    What decides that does not load lm-eval, which would cost each start many seconds.
    """
    from dynslice.evaluate import task_table

    ours = [paths.PACKAGE / "evaluate" / name for name in ("harness.py", "task_table.py")]
    ours += [paths.ASSET_MANIFEST, *(p for p in sorted(task_table.OWN.iterdir()) if p.is_file())]
    facts = [metadata.version("lm-eval"), find_spec("lm_eval").origin, str(paths.TASK_FILES)]
    made_by = "\n".join(facts + [f"{path.name} {files.sha256(path)}" for path in ours])
    stamp = paths.TASK_FILES / "made-by"
    if not (files.is_sound(stamp.parent) and stamp.read_text(encoding="utf-8") == made_by):
        from dynslice.evaluate import harness

        harness.write_task_files()
        files.write(stamp, made_by)
        files.seal(stamp.parent)
    return stamp.parent


def lr_command(options) -> tuple[dict, list[str]]:
    """Layer redundancy of each layer on a text."""
    from dynslice.inputs import texts
    from dynslice.inputs.windows import first_token, sliding_windows, token_stream
    from dynslice.method.architectures import dims_of
    from dynslice.method.redundancy import layer_redundancy

    check_output(options)
    options.split = texts.checked_split(options.text, options.split)
    model, tokenizer = loaded(options, dense_for="layer redundancy")
    stream = token_stream(options.text, options.split, tokenizer, options.max_tokens, options.seed)
    first = first_token(tokenizer, options.bos)
    windows = sliding_windows(stream, options.window, options.stride, first)
    start = time.perf_counter()
    lr = layer_redundancy(model, windows, options.stride, options.last_layer)
    result = {
        **given(options, "model", "text", "split"),
        **lr.to_dict(),
        "seconds": round(time.perf_counter() - start, 3),
        "shape": asdict(dims_of(model.config)),
    }
    common.write_json(options.out, result)
    lines = ["layer      LR  normalised"]
    lines += [f"{x['index']:5} {x['lr']:7.4f} {x['normalised']:11.4f}" for x in result["layers"]]
    lines.append(
        f"{lr.tokens} tokens in {lr.windows} windows of {lr.window}, stride {lr.stride}; "
        "tokens after the last full window are dropped"
    )
    return result, lines


def plan_command(options) -> tuple[dict, list[str]]:
    """Widths per layer for a slice percentage."""
    check_output(options)
    plan = plan_of(options)
    common.write_json(options.out, plan.to_dict())
    lines = ["layer  width  final slice"]
    pairs = zip(plan.widths, plan.final_slice, strict=True)
    lines += [f"{i:5} {width:6} {share:12.4f}" for i, (width, share) in enumerate(pairs)]
    lines.append(
        f"mean slice {plan.mean_slice:.4f}, stored parameters {plan.parameters:,} "
        f"(dense {plan.shape.dense_parameters:,})"
    )
    if plan.layout.tied:
        lines.append(f"with embedding and head apart {plan.untied.parameters:,} parameters")
    return plan.to_dict(), lines


def ppl_command(options) -> tuple[dict, list[str]]:
    """Perplexity of a dense or sliced model on a text."""
    from dynslice.evaluate import perplexity
    from dynslice.inputs import texts

    options.split = texts.checked_split(options.text, options.split)
    model, tokenizer = loaded(options)
    windows = windows_of(options, options.text, options.split, tokenizer)
    result = {**given(options, "model", "text", "split"), "sampled": is_sampled(options)}
    result |= perplexity.perplexity(model, windows)
    sampled = "sampled" if result["sampled"] else "consecutive"
    line = (
        f"perplexity {result['perplexity']:.3f} (NLL {result['nll_mean']:.4f}, standard error "
        f"{_number(result['nll_stderr'])}) on {result['windows']} {sampled} windows of "
        f"{options.window} tokens; a last short block is dropped"
    )
    return result, [line]


def tasks_command(options) -> tuple[dict, list[str]]:
    """Zero-shot scores of a dense or sliced model on tasks."""
    from dynslice.evaluate import harness, task_table

    names, options.seed = common.listed(options.tasks), options.seed or 0
    task_table.check_names(names)
    if not names:
        raise RequestError(f"--tasks names none; the tasks are {', '.join(task_table.TASKS)}")
    task_table.check_data(names)
    how = given(options, "limit", "batch_size", "subset", "seed")
    scores = harness.tasks(*loaded(options), names, **how)
    result = {
        **given(options, "model", "limit", "subset", "seed"),
        "tasks": scores,
        "lm_eval_version": metadata.version("lm-eval"),
    }
    lines = ["task             acc  stderr  acc_norm  stderr      n"]
    for name, s in scores.items():
        keys = ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")
        acc, err, norm, norm_err = (_number(s[key]) for key in keys)
        lines.append(f"{name:14} {acc:>6} {err:>7} {norm:>9} {norm_err:>7} {s['n']:>6}")
        lines += [f"  {metric} {_number(x)}" for metric, x in s.get("metrics", {}).items()]
        if cut := s.get("contexts_cut"):
            lines.append(f"  {cut} contexts were cut to the positions that the model has")
    return result, lines


def bench_command(options) -> tuple[dict, list[str]]:
    """Time every step with its physical yardstick, and check its result by an oracle."""
    from dynslice.cli import bench, bench_rows
    from dynslice.inputs import texts
    from dynslice.inputs.embedded_models import config_of
    from dynslice.method.architectures import dims_of
    from dynslice.method.plan import constant

    check_output(options)
    text = options.calibration or "sotu"
    if options.shape:
        shape = dims_of(config_of(options.shape, options.layers))
        for name, value in given(options, "model", "revision", "calibration").items():
            if value is not None:
                what = "--shape means random weights and random tokens"
                raise RequestError(f"{what}; leave --{name} out")
    else:
        if options.layers:
            raise RequestError("--layers is about random weights; give --shape with it")
        options.model = options.model or "embedded:smollm2-135m"
        texts.checked_split(text, None, "train")
        shape = dims(options, dense_for="the benchmark")
    constant(shape, options.slice_percentage)  # refuses a share that no plan has
    source = (options.model, options.shape, *placed(options), options.revision, options.seed or 0)
    amounts = (options.windows, options.window, options.slice_percentage, options.repeats)
    result = bench.run(bench_rows.Subject(*source, layers=options.layers), text, *amounts)
    common.write_json(options.out, result)
    return result, bench.lines(result)


def reproduce_command(options) -> tuple[dict, list[str]]:
    """Measure what a profile lacks, then run its notebooks."""
    from dynslice.cli import reproduce
    from dynslice.experiment.profile import parse_overrides

    overrides = parse_overrides(options.set)
    for name, value in given(options, "dtype", "seed").items():
        if value not in (None, "auto"):
            overrides.setdefault(name, value)
    how = given(options, "only", "dry_run", "from_record", "device", "executor", "address")
    how |= given(options, "verbose", "machine")
    how["only"] = options.only and common.listed(*options.only)
    for name in ("verbose", "machine"):
        if how[name] and not options.dry_run:
            raise RequestError(f"--{name} is about a plan; give --dry-run with it")
    return reproduce.run(options.profile, overrides, **how)


def record_command(options) -> tuple[dict, list[str]]:
    """Make a complete run of a clean tree the record."""
    from dynslice.cli import record

    return record.record(options.profile)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


_RUNS = (assets_command, lr_command, plan_command, slice_command, drop_layers_command)
_RUNS += (quantize_command, ppl_command, tasks_command, bench_command)
_RUNS += (reproduce_command, record_command)
COMMANDS = {run.__name__.removesuffix("_command").replace("_", "-"): run for run in _RUNS}

if __name__ == "__main__":
    sys.exit(main())
