"""`dynslice slice`: a model, a calibration text and widths, to a saved slice."""

from dataclasses import asdict, replace
from typing import Any

from dynslice.cli import common
from dynslice.cli.alternatives import drop_neurons
from dynslice.cli.plans import AMOUNTS, apply_recipe, is_given, measures_lr, plan_of, refuse_next_to
from dynslice.core.errors import RequestError

# What is about slicing alone, besides the options that make a plan.
OF_SLICING = ("compensate", "ridge", "recovery_steps", "host_memory", "device_memory")


def slice_command(options) -> tuple[dict, list[str]]:
    """Slice a model and save it where transformers can load it."""
    from dynslice.cli.card import model_card
    from dynslice.core.tensors import peak_memory_bytes
    from dynslice.inputs import models, texts
    from dynslice.inputs.checkpoints import saving, write

    if options.mlp_neurons is not None:
        others = ("plan", "stream", "lr")
        refuse_next_to(options, "--mlp-neurons", *others, said="changes the model first")
        asked = any(is_given(options, name) for name in (*AMOUNTS, *OF_SLICING))
        if not asked and options.recipe == "published":
            return drop_neurons(options)
    apply_recipe(options)
    start, recovery = _compensation(options), _recovery(options)
    out = common.new_directory(options)
    split = texts.checked_split(options.calibration, None, "train")
    plan = _plan(options)
    device, dtype = common.placed(options)
    save_dtype = common.saved_dtype(options)
    budget = _budget(options, device)
    tokenizer = models.load_tokenizer(options.model, options.revision)
    windows = common.windows_of(options, options.calibration, split, tokenizer)
    with saving(out, is_new=True) as folder:
        if options.stream:
            source = (options.model, windows, plan, device, dtype, options.revision)
            sliced = models.slice_saved(folder, *source, save_dtype, budget=budget, start=start)
        else:
            sliced = _sliced(options, windows, plan, start, recovery, (dtype, save_dtype))
            write(sliced.model, tokenizer, folder)
        result = {
            **_facts(options, sliced),
            "windows": len(windows),
            "dtype": str(save_dtype).removeprefix("torch."),
            "computed_in": str(dtype).removeprefix("torch."),
            "recipe": options.recipe,
            "measured_lr": plan is None,
            "compensation": start and asdict(start),
            "recovery": recovery and asdict(recovery),
            "peak_memory_bytes": peak_memory_bytes(device),
        }
        common.write_json(folder / "plan.json", sliced.plan.to_dict())
        recipe = common.recipe_of(options, result) | {"sliced_sha256": common.hashes(options)}
        common.write_json(folder / "slice.json", recipe)
        card = model_card(recipe, sliced.plan.widths[-1], options.model, options.revision)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return result, _lines(options, result, sliced, start)


def _lines(options, result: dict, sliced, start) -> list[str]:
    """What was done, in sentences."""
    how = "sampled" if result["sampled"] else "consecutive"
    line = (
        f"wrote {options.out}: {result['parameters']:,} stored parameters in {result['dtype']} "
        f"(dense {result['parameters_dense']:,}), sliced in {result['computed_in']} in "
        f"{result['seconds']:.1f} s on {result['windows']} {how} windows of {options.window} tokens"
    )
    also = ", on which layer redundancy was measured too" if result["measured_lr"] else ""
    lines = [line + also]
    if sliced.plan.layout.plain:
        lines.append(
            f"an ordinary checkpoint of hidden size {sliced.plan.widths[0]}, which transformers "
            "loads without remote code"
        )
    if start:
        lines.append(_corrections(start))
    if sliced.arbitrary_places:
        lines.append(
            "warning: bases that keep directions that the calibration text does not have, and are "
            f"arbitrary there: {sliced.arbitrary_places}; calibrate on more or more varied text"
        )
    return lines


def _corrections(start) -> str:
    """What the compensation chose, in a sentence."""
    used = [ridge for ridge in start.chosen if ridge is not None]
    told = f"compensated {len(used)} of {len(start.chosen)} blocks"
    if not used:
        return f"{told}: held-out calibration windows showed no gain"
    return f"{told}, with ridges from {min(used):g} to {max(used):g}"


def _plan(options) -> Any:
    """The plan; None where LR of the calibration windows decides it, once they are there."""
    from dynslice.method.architectures import check_plan
    from dynslice.method.plan import SlicePlan

    if options.plan:
        refuse_next_to(options, "--plan", *AMOUNTS)
    elif measures_lr(options):
        return None
    plan = SlicePlan.read(options.plan) if options.plan else plan_of(options)
    check_plan(common.config_of(options), plan)
    return plan


def _sliced(options, windows, plan, start, recovery, dtypes) -> Any:
    """The slice in the second of the dtypes; fine-tuning, in the first, comes before rounding."""
    from dynslice.method.redundancy import layer_redundancy
    from dynslice.method.slicing import slice_model

    model, _ = common.loaded(options, dense_for="slicing")
    if options.mlp_neurons is not None:
        from dynslice.extensions.neurons import drop_neurons

        model = drop_neurons(model, windows, options.mlp_neurons)
    plan = plan or plan_of(options, layer_redundancy(model, windows).lr)
    sliced = slice_model(model, windows, plan, start, dtypes[0 if recovery else 1])
    if not recovery:
        return sliced
    from dynslice.extensions.finetuning import finetune

    model, spent = finetune(sliced.model, windows, recovery, options.seed or 0)
    return replace(sliced, model=model.to(dtypes[1]), recovery_seconds=spent)


def _facts(options, sliced) -> dict:
    """What the slice holds, how exact it is, and what was asked of it."""
    plan = sliced.plan
    return {
        "out": options.out,
        "parameters": plan.parameters,
        "parameters_untied": plan.untied.parameters,
        "parameters_dense": common.dims(options, whole=True).dense_parameters,
        "mlp_neurons_dropped": options.mlp_neurons or 0.0,
        "layout": asdict(plan.layout),
        "mean_slice": plan.mean_slice,
        "window": options.window,
        "sampled": common.is_sampled(options),
        "streamed": options.stream,
        "schedule": plan.schedule,
        **common.given(sliced, "rotation_error", "basis_error", "arbitrary_places"),
        "seconds": round(sliced.seconds, 3),
        "recovery_seconds": round(sliced.recovery_seconds, 3),
    }


def _budget(options, device) -> Any:
    """The memory that streamed slicing may take, as given in GiB."""
    from dynslice.method.streaming import Budget

    memory = {"--host-memory": options.host_memory, "--device-memory": options.device_memory}
    for flag, gib in memory.items():
        if gib is not None and not options.stream:
            raise RequestError(f"{flag} {gib} is a budget of streamed slicing; add --stream")
        if gib is not None and not 0 < gib < 2**30:
            raise RequestError(f"{flag} {gib} is no memory; give GiB, such as 8")
    if options.device_memory is not None and device.type == "cpu":
        raise RequestError("--device-memory is that of a GPU; on a CPU give --host-memory")
    host, on_device = (None if gib is None else int(gib * 2**30) for gib in memory.values())
    return Budget(device=on_device, host=host)


def _compensation(options) -> Any:
    from dynslice.extensions.compensation import Compensation

    if options.ridge is not None and not options.compensate:
        raise RequestError(f"--ridge {options.ridge} is that of --compensate; add it")
    return Compensation(options.ridge) if options.compensate else None


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
