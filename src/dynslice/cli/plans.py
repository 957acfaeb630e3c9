"""From the options of `plan` and `slice` to a plan."""

import math
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from os.path import realpath

from dynslice.cli.common import dims, saved_dtype
from dynslice.core.errors import RequestError
from dynslice.core.files import read_json
from dynslice.extensions.schedules import BEST, Evidence, budget_of, size_range, within
from dynslice.method.controls import matched
from dynslice.method.layout import Layout, basis_groups
from dynslice.method.plan import ModelDims, SlicePlan, check_request, constant, dynamic
from dynslice.method.scores import lr_of

# What each schedule takes next to --slice-percentage or --size.
TAKES = dict.fromkeys(("constant", "first", "embedding"), ())
TAKES |= {"dynamic": ("slice_base", "lr"), "entropic": ("slice_base", "lr")}
TAKES |= {"lr": ("lr",)}
LAYOUT = ("untie", "basis_layers", "plain")
# What makes a plan.
AMOUNTS = ("slice_percentage", "size", "slice_base", "lr", "round_to", "schedule", *LAYOUT)

RECIPES = {"published": {}, "best": BEST}  # what is set where the options leave it open


def apply_recipe(options) -> None:
    """Set what the recipe of `slice` says and the options leave open.

    A plain checkpoint has one width and one basis, so that a recipe decides nothing about those.
    """
    recipe = RECIPES[options.recipe]
    if options.plan and recipe:
        raise RequestError(
            f"--plan decides the widths by itself; leave --recipe {options.recipe} out, or give "
            "--size instead of --plan"
        )
    for name, value in recipe.items():
        has_one = options.plain and name in ("schedule", "basis_layers")
        if not (has_one or is_given(options, name)):
            setattr(options, name, value)


def is_given(options, name: str) -> bool:
    """Whether an option was given; a number can be zero."""
    value = getattr(options, name)
    return value is not None and value is not False


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
    shape = _shape(options, schedule, lr)
    if lr is not None:
        _check_owner(options, lr, shape)
    if "lr" in TAKES[schedule] and measured_lr is None:
        if lr is None:
            raise RequestError(
                f"a plan of schedule {schedule} needs LR scores: run `dynslice lr --out lr.json` "
                "and give --lr lr.json"
            )
        measured_lr = lr_of(lr)
    layout, round_to = _layout(options, shape, measured_lr), _round_to(options, shape)
    share, base = options.slice_percentage, options.slice_base or 0.0
    if options.size is None and schedule == "constant":
        return constant(shape, share, round_to, layout=layout)
    if options.size is None and schedule == "dynamic":
        return dynamic(shape, measured_lr, share, base, round_to, layout)
    budget = _budget(options, shape, round_to, layout)
    plan = within(schedule, Evidence(shape, round_to, measured_lr, layout, base), budget)
    if schedule == "dynamic" and plan.slice_percentage <= base > 0:
        raise RequestError(
            f"--slice-base {base} alone stores {plan.parameters:,} parameters, less than --size "
            f"{options.size}; give a smaller base"
        )
    return plan


def _check_owner(options, lr: dict, shape: ModelDims) -> None:
    """Refuse LR of a model of another shape; say so where it is of another one of this shape."""
    told = lr.get("shape", {})  # a file of an earlier version says less of the shape
    if not isinstance(told, dict) or ModelDims.from_dict({**asdict(shape), **told}) != shape:
        raise RequestError(
            f"the LR scores of {options.lr} are of another model; measure them on this one"
        )
    owner = str(lr.get("model", options.model))
    if options.model and realpath(owner) != realpath(options.model):  # a path has spellings
        note = f"note: the LR scores of {options.lr} were measured on {owner}"
        print(f"{note}, this plan is for {options.model}", file=sys.stderr)


def _layout(options, shape: ModelDims, lr: Sequence[float] | None) -> Layout:
    """As SliceGPT has it, with the embedding tied where it is in the dense model."""
    if options.plain:
        refuse_next_to(options, "--plain", *LAYOUT[:2], said="has one basis, and is untied")
        return Layout(plain=True)
    if options.untie and not shape.tied:
        raise RequestError(
            "--untie means nothing for a model whose head is apart from its embedding; leave it out"
        )
    layers = options.basis_layers
    groups = layers and basis_groups(len(shape.reads), shape.layers, layers, lr)
    return Layout(tied=shape.tied and not options.untie, basis_groups=groups)


def _round_to(options, shape: ModelDims) -> int:
    """The multiple for widths; those of a plain checkpoint are ones that transformers takes."""
    if not options.plain:
        return options.round_to or 8
    from dynslice.inputs import models
    from dynslice.method.architectures import check_plain

    if options.model:
        check_plain(models.load_config(options.model, options.revision))
    return math.lcm(shape.heads or 1, options.round_to or 1)


def asked_parameters(options, shape: ModelDims) -> float:
    """What --size means in stored parameters, of a dense model of that shape."""
    number, unit = _SIZE.fullmatch(options.size.upper()).groups()
    size = float(number) * (10 ** _UNITS[unit] if unit else shape.dense_parameters)
    return size / saved_dtype(options).itemsize if len(unit) == 2 else size


_SIZE = re.compile(r"([0-9.]+)\s*([A-Z]*)")
_UNITS = {"K": 3, "M": 6, "B": 9, "KB": 3, "MB": 6, "GB": 9}  # powers of ten


def _budget(options, shape: ModelDims, round_to: int, layout: Layout) -> int:
    """Stored parameters that the plan may have: --size, or those of constant slicing at SP.

    Raises RequestError for a size that no plan has, with the range of those that there are.
    """
    base = options.slice_base or 0.0 if options.size is None else 0.0
    check_request(shape, options.slice_percentage or 0.0, base, round_to)
    flag = "slice_percentage" if options.size is None else "size"
    if options.size is None:
        size = budget_of(shape, options.slice_percentage, round_to, layout)
    else:
        size = asked_parameters(options, dims(options, whole=True) if options.model else shape)
    least, most = size_range(shape, round_to, layout)
    if not least <= size < most:
        raise RequestError(
            f"{_flag(flag)} {getattr(options, flag)} allows {size:,.0f} parameters, and slices of "
            f"this model in this layout store at least {least:,} and less than {most:,}; give a "
            "--size between"
        )
    return int(size)


def measures_lr(options) -> bool:
    """Whether `slice` measures LR itself. Raises RequestError for amounts that no plan has."""
    if "lr" not in TAKES[_schedule(options)] or options.lr:
        return False
    if options.stream:
        raise RequestError(
            "--stream has no whole model to measure LR on; run `dynslice lr --out lr.json` and "
            "give --lr lr.json"
        )
    shape, base = dims(options), options.slice_base or 0.0
    round_to = _round_to(options, shape)
    if options.size is None:
        check_request(shape, options.slice_percentage, base, round_to)
    if options.size is not None or _schedule(options) != "dynamic":
        _budget(options, shape, round_to, _layout(options, shape, None))
    return True


def refuse_next_to(
    options, given: str, *others: str, said: str = "decides the widths by itself"
) -> None:
    """Raise RequestError when options are given that `given` leaves without a meaning."""
    for name in others:
        if is_given(options, name):
            raise RequestError(f"{given} {said}; leave {_flag(name)} out")


def _schedule(options) -> str:
    """The schedule that is asked for, with nothing next to it that means nothing to it."""
    base, share = options.slice_base, options.slice_percentage
    if share is None and options.size is None:
        raise RequestError("--slice-percentage is missing; give a share such as 0.25, or a --size")
    if None not in (share, options.size):
        raise RequestError(
            f"--size {options.size} decides the slice percentage; leave --slice-percentage out"
        )
    wants_dynamic = options.lr or base not in (None, share)
    schedule = options.schedule or ("dynamic" if wants_dynamic else "constant")
    if options.plain and schedule != "constant":
        raise RequestError(
            f"--plain has one width, and schedule {schedule} has many; leave one of them out"
        )
    hints = {
        "slice_base": "--schedule dynamic and --lr",
        "lr": "--schedule dynamic or lr",
    }
    for name, instead in hints.items():
        value = getattr(options, name)
        says_model = name == "lr" and not options.model
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
