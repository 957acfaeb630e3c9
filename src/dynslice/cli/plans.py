"""From the options of `plan` and `slice` to a plan."""

from collections.abc import Sequence

from dynslice.cli.common import dims
from dynslice.core.errors import RequestError
from dynslice.core.files import read_json
from dynslice.extensions.schedules import Evidence, budget_of, within
from dynslice.method.controls import matched
from dynslice.method.plan import ModelDims, SlicePlan, check_request, constant, dynamic
from dynslice.method.scores import lr_of, read_rises

# What each schedule takes next to --slice-percentage.
TAKES = dict.fromkeys(("constant", "first", "embedding"), ())
TAKES |= {"dynamic": ("slice_base", "lr"), "lr": ("lr",), "sensitivity": ("sensitivity",)}
FILES = ("lr", "sensitivity")  # measured values, which name the shape of their model too
AMOUNTS = ("slice_percentage", "slice_base", *FILES, "round_to", "schedule")  # what makes a plan


def plan_of(options, measured_lr: Sequence[float] | None = None) -> SlicePlan:
    """The plan that the options ask for.

    measured_lr: LR of each layer, where `slice` measured it itself. Raises RequestError for options
    that are missing, contradict each other or mean nothing together, and values of another model.
    """
    if getattr(options, "match_parameters", None):
        refuse_next_to(options, "--match-parameters", *AMOUNTS, "model", "revision")
        return matched(SlicePlan.read(options.match_parameters))
    schedule = _schedule(options)
    lr = read_json(options.lr, "LR") if options.lr else None
    losses = read_json(options.sensitivity, "sensitivity") if options.sensitivity else None
    shape = _shape(options, schedule, lr or losses)
    for values, what in ((lr, "scores of --lr"), (losses, "losses of --sensitivity")):
        if values and "shape" in values and ModelDims.from_dict(values["shape"]) != shape:
            raise RequestError(f"the {what} are of another model; measure them anew on this one")
    share, round_to = options.slice_percentage, options.round_to or 8
    if schedule == "constant":
        return constant(shape, share, round_to)
    if "lr" in TAKES[schedule] and measured_lr is None:
        if lr is None:
            raise RequestError(
                f"a plan of schedule {schedule} needs LR scores: run `dynslice lr --out lr.json` "
                "and give --lr lr.json"
            )
        measured_lr = lr_of(lr)
    if schedule == "dynamic":
        return dynamic(shape, measured_lr, share, options.slice_base or 0.0, round_to)
    rises = None
    if schedule == "sensitivity":
        if losses is None:
            raise RequestError(
                "a plan of schedule sensitivity needs measured losses: run `dynslice sensitivity "
                "--out losses.json` and give --sensitivity losses.json"
            )
        measured = losses.get("slice_percentage", share)
        if measured != share:
            raise RequestError(
                f"the losses of --sensitivity {options.sensitivity} were measured at slice "
                f"percentage {measured}, and the plan is for {share}; measure them anew"
            )
        rises = read_rises(losses)
    known = Evidence(shape, round_to, measured_lr, rises)
    return within(schedule, known, budget_of(shape, share, round_to))


def measures_lr(options) -> bool:
    """Whether `slice` measures LR itself. Raises RequestError for amounts that no plan has."""
    if "lr" not in TAKES[_schedule(options)] or options.lr:
        return False
    if options.stream:
        raise RequestError(
            "--stream has no whole model to measure LR on; run `dynslice lr --out lr.json` and "
            "give --lr lr.json"
        )
    share, base = options.slice_percentage, options.slice_base or 0.0
    check_request(dims(options), share, base, options.round_to or 8)
    return True


def refuse_next_to(options, given: str, *others: str) -> None:
    """Raise RequestError when options are given that `given` leaves without a meaning."""
    for name in others:
        if getattr(options, name) is not None:
            raise RequestError(f"{given} decides the widths by itself; leave {_flag(name)} out")


def _schedule(options) -> str:
    """The schedule that is asked for, with nothing next to it that means nothing to it."""
    base, share = options.slice_base, options.slice_percentage
    if share is None:
        raise RequestError("--slice-percentage is missing; give a share such as 0.25")
    wants_dynamic = options.lr or base not in (None, share)
    schedule = options.schedule or ("dynamic" if wants_dynamic else "constant")
    hints = {
        "slice_base": "--schedule dynamic and --lr",
        "lr": "--schedule dynamic or lr",
        "sensitivity": "--schedule sensitivity",
    }
    for name, instead in hints.items():
        value = getattr(options, name)
        says_model = name in FILES and not options.model
        says_constant = name == "slice_base" and schedule == "constant" and base == share
        if not (value is None or name in TAKES[schedule] or says_model or says_constant):
            raise RequestError(
                f"{_flag(name)} {value} has no meaning in a plan of schedule {schedule}; leave it "
                f"out, or use {instead}"
            )
    return schedule


def _shape(options, schedule: str, values: dict | None) -> ModelDims:
    """The shape of the model, or of the one that the values were measured on."""
    if options.model:
        return dims(options)
    if options.revision is not None:
        raise RequestError(
            f"--revision {options.revision} is that of a model of the hub; give --model too, or "
            "leave it out"
        )
    if values:
        return ModelDims.from_dict(values.get("shape"))
    file = f" or {_flag(TAKES[schedule][-1])}" if TAKES[schedule] else ""
    raise RequestError(f"a plan needs --model{file} to know the widths of the model")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
