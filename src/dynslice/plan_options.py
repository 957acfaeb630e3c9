"""From the options of `plan` and `slice` to a plan."""

from collections.abc import Sequence
from typing import Any

from dynslice.errors import RequestError


def plan_of(options, measured_lr: Sequence[float] | None = None) -> Any:
    """The SlicePlan that the options ask for.

    measured_lr: LR of each layer, where `slice --schedule lr` measured it itself. Raises
    RequestError for options that are missing, contradict each other or mean nothing together, and
    for evidence of another model.
    """
    from dynslice import models, plan

    if getattr(options, "match_parameters", None):
        others = ("slice_percentage", "slice_base", "lr", "round_to", "schedule")
        others += ("model", "revision")
        refuse_beside(options, "--match-parameters", *others)
        return plan.matched(plan.SlicePlan.read(options.match_parameters))
    if options.slice_percentage is None:
        raise RequestError("--slice-percentage is missing; give a share such as 0.25")
    round_to = options.round_to or 8
    lr = plan.read_json(options.lr, "LR") if options.lr else None
    schedule = options.schedule or _default_schedule(options)
    if options.model:
        shape = plan.Shape.of(models.load_config(options.model, options.revision))
    elif options.revision is not None:
        raise RequestError(
            f"--revision {options.revision} is that of a model of the hub; give --model too, or "
            "leave it out"
        )
    elif lr:
        shape = plan.Shape.from_dict(lr.get("shape"))
    else:
        raise RequestError("a plan needs --model or --lr to know the widths of the model")
    if schedule not in plan.SCHEDULES:
        return _plan_of_size(options, schedule, shape, lr, measured_lr)
    if options.sensitivity:
        raise RequestError(
            f"--sensitivity {options.sensitivity} has no meaning in a {schedule} plan; leave it "
            "out, or use --schedule sensitivity"
        )
    if schedule == "constant":
        if options.slice_base not in (None, options.slice_percentage):
            raise RequestError(
                f"--slice-base {options.slice_base} has no meaning in a constant plan; leave it "
                "out, or use --schedule dynamic with --lr"
            )
        if lr and options.model:
            raise RequestError(
                f"--lr {options.lr} has no meaning in a constant plan; leave it out, or use "
                "--schedule dynamic"
            )
        return plan.constant(shape, options.slice_percentage, round_to)
    if lr is None:
        raise RequestError(
            "a dynamic plan needs LR scores: run `dynslice lr --out lr.json` and give --lr lr.json"
        )
    scores = plan.lr_of(lr)
    _check_same(lr, shape, f"the scores of --lr {options.lr}")
    base = options.slice_base or 0.0
    return plan.dynamic(shape, scores, options.slice_percentage, base, round_to)


def _plan_of_size(
    options, schedule: str, shape: Any, lr: dict | None, measured_lr: Sequence[float] | None
) -> Any:
    """A plan of a schedule that stores no more than constant slicing does."""
    from dynslice import plan
    from dynslice.schedules import Evidence, budget_of, within
    from dynslice.scores import read_rises

    needed = {"lr": "lr", "sensitivity": "sensitivity"}.get(schedule)
    for name in ("slice_base", "lr", "sensitivity"):
        value = getattr(options, name)
        if value is not None and name != needed:
            raise RequestError(
                f"--{name.replace('_', '-')} {value} has no meaning in schedule {schedule}; leave "
                "it out"
            )
    known = {}
    if schedule == "lr":
        if lr is None and measured_lr is None:
            raise RequestError(
                "schedule lr needs LR scores: run `dynslice lr --out lr.json` and give --lr lr.json"
            )
        known["lr"] = measured_lr or plan.lr_of(lr)
    if schedule == "sensitivity":
        if options.sensitivity is None:
            raise RequestError(
                "schedule sensitivity needs measured losses: run `dynslice sensitivity --out "
                "losses.json` and give --sensitivity losses.json"
            )
        values = plan.read_json(options.sensitivity, "sensitivity")
        _check_same(values, shape, f"the losses of --sensitivity {options.sensitivity}")
        known["rises"] = read_rises(values)
    if lr is not None:
        _check_same(lr, shape, f"the scores of --lr {options.lr}")
    round_to = options.round_to or 8
    budget = budget_of(shape, options.slice_percentage, round_to)
    return within(schedule, Evidence(shape, round_to, **known), budget)


def _check_same(values: dict, shape: Any, what: str) -> None:
    from dynslice.plan import Shape

    if "shape" in values and Shape.from_dict(values["shape"]) != shape:
        raise RequestError(f"{what} are of another model; measure them anew on this one")


def check_measuring_lr(options) -> None:
    """Whether `slice --schedule lr` can measure LR itself, before anything heavy starts."""
    from dynslice import models
    from dynslice.plan import Shape
    from dynslice.schedules import budget_of

    if options.stream:
        raise RequestError(
            "--stream has no whole model to measure LR on; run `dynslice lr --out lr.json` and "
            "give --lr lr.json"
        )
    if options.slice_percentage is None:
        raise RequestError("--slice-percentage is missing; give a share such as 0.25")
    shape = Shape.of(models.load_config(options.model, options.revision))
    budget_of(shape, options.slice_percentage, options.round_to or 8)


def refuse_beside(options, given: str, *others: str) -> None:
    """Raise RequestError when options are given that `given` leaves without a meaning."""
    for name in others:
        if getattr(options, name) is not None:
            flag = "--" + name.replace("_", "-")
            raise RequestError(f"{given} decides the widths by itself; leave {flag} out")


def _default_schedule(options) -> str:
    base = options.slice_base
    wants_dynamic = options.lr or (base is not None and base != options.slice_percentage)
    return "dynamic" if wants_dynamic else "constant"
