"""Slice plans: how wide the residual stream stays at each layer, and what that stores."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from dynslice.errors import RequestError, in_one_line
from dynslice.models import family_of, require_dense
from dynslice.scores import normalise
from dynslice.sliced import has_bias, subtracts_mean

SCHEDULES = ("constant", "dynamic")


@dataclass(frozen=True)
class Shape:
    """What a plan must know of a model to count the parameters of its slice.

    `reads` and `writes` are for the blocks of a layer (attention and MLP, or the two in parallel):
    parameters per dimension of the stream that a block reads and writes (the summed output
    features of its reading maps; the summed input features of its writing maps, plus one for each
    bias). `fixed` is what slicing leaves alone, `position_rows` the rows of learned positions.
    """

    hidden_size: int
    layers: int
    vocab_size: int
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    fixed: int
    dense_parameters: int
    position_rows: int = 0

    @classmethod
    def of(cls, config) -> "Shape":
        """Read the shape off a dense config, through a model without storage."""
        require_dense(config, "a plan")
        family = family_of(config)
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)
        except Exception as error:  # of each part that a config describes
            raise RequestError(
                f"the config.json of the model describes no network ({in_one_line(error)}); save "
                "the model anew with transformers"
            ) from error
        layers = model.get_submodule(family.layers)
        head = model.get_submodule(family.head)
        get = layers[0].get_submodule
        d = config.hidden_size
        reads, writes, fixed = [], [], 0
        for block in family.blocks:
            norm, readers = get(block.norm), [get(name) for name in block.reads]
            writers = [get(name) for name in block.writes]
            reads.append(sum(map_.out_features for map_ in readers))
            writes.append(sum(map_.in_features + (map_.bias is not None) for map_ in writers))
            # A norm's scale goes into the maps that read, and its bias into a bias of theirs.
            fixed -= sum(p.numel() for p in norm.parameters())
            fixed += sum(m.out_features for m in readers if has_bias(norm) and m.bias is None)
        in_layer = sum(p.numel() for p in layers[0].parameters())
        fixed = len(layers) * (fixed + in_layer - d * (sum(reads) + sum(writes)))
        fixed += sum(p.numel() for p in head.parameters())  # it reads the full stream
        final_norm = model.get_submodule(family.final_norm)
        if subtracts_mean(final_norm):
            fixed += sum(p.numel() for p in final_norm.parameters())
        positions = family.positions and model.get_submodule(family.positions).num_embeddings
        return cls(
            hidden_size=d,
            layers=len(layers),
            vocab_size=model.get_submodule(family.embedding).num_embeddings,
            reads=tuple(reads),
            writes=tuple(writes),
            fixed=fixed,
            dense_parameters=sum(p.numel() for p in model.parameters()),
            position_rows=positions or 0,
        )

    @classmethod
    def from_dict(cls, values: dict) -> "Shape":
        """From the JSON form. Raises RequestError naming what is missing."""
        values = values if isinstance(values, dict) else {}
        needed = [name for name in cls.__dataclass_fields__ if name != "position_rows"]
        missing = [name for name in needed if name not in values]
        if missing:
            raise RequestError(
                f"the shape of the model is incomplete (no {missing[0]}); make the file anew with "
                "`dynslice lr` or `dynslice plan`"
            )
        given = {name: _tuples(values[name]) for name in needed}
        given["position_rows"] = values.get("position_rows", 0)
        blocks = [given[name] for name in ("reads", "writes")]
        numbers = [value for name, value in given.items() if name not in ("reads", "writes")]
        counts = [*numbers, *(x for block in blocks for x in _listed(block))]
        if not all(type(x) is int and x >= 0 for x in counts) or not (
            len(_listed(blocks[0])) == len(_listed(blocks[1])) > 0
            and min(given["hidden_size"], given["layers"], given["dense_parameters"]) > 0
        ):
            raise RequestError(
                f"the shape of the model {given} is not one of whole numbers; make the file anew "
                "with `dynslice lr` or `dynslice plan`"
            )
        return cls(**given)


@dataclass(frozen=True)
class SlicePlan:
    """Width w_i of the stream at each layer, with the target that it came from.

    At layer i the attention input, the attention output and the MLP input have width w_i (where
    the two run in parallel there is one input, of width w_i, and both write in w_{i+1}); the
    embedding has w_0, and the output of the last layer keeps the hidden size (METHOD 1.6).
    `final_slice` is FS_i, the share to be removed at layer i, before rounding. `own_attention`
    gives the stream before attention widths of its own, the first of which is the embedding's.
    """

    schedule: str
    slice_percentage: float
    slice_base: float
    round_to: int
    final_slice: tuple[float, ...]
    widths: tuple[int, ...]
    shape: Shape
    own_attention: tuple[int, ...] | None = None

    def __post_init__(self):
        d, layers = self.shape.hidden_size, self.shape.layers
        if len(self.widths) != layers:
            raise RequestError(
                f"plan has {len(self.widths)} widths, the model {layers} layers; make the plan "
                "from the same model"
            )
        if len(self.attention_widths) != layers:
            raise RequestError(
                f"plan has {len(self.attention_widths)} widths before attention, the model "
                f"{layers} layers; make the plan from the same model"
            )
        every = [*self.attention_widths, *self.mlp_widths]
        for width in every:
            if not isinstance(width, int):
                raise RequestError(f"plan width {width!r} is no whole number; mend the plan")
        if not all(1 <= width <= d for width in every):
            raise RequestError(
                f"plan has widths from {min(every)} to {max(every)}, the hidden size "
                f"is {d}; widths must lie between 1 and {d}"
            )

    def _check_settings(self) -> None:
        """Raise RequestError for settings that no schedule could have had."""
        d, slices = self.shape.hidden_size, self.final_slice
        sound = {
            "schedule": isinstance(self.schedule, str),
            "round_to": type(self.round_to) is int and self.round_to > 0 and d % self.round_to == 0,
            "slice_base": 0 <= self.slice_base <= 1,
            "final_slice": len(slices) == len(self.widths) and all(0 <= x <= 1 for x in slices),
        }
        for name, is_sound in sound.items():
            if not is_sound:
                raise RequestError(
                    f"the plan has {name} {getattr(self, name)!r}, which fits no plan; make it "
                    "anew with `dynslice plan`"
                )

    @property
    def attention_widths(self) -> tuple[int, ...]:
        """a_i: the stream before attention in layer i."""
        return self.widths if self.own_attention is None else self.own_attention

    @property
    def mlp_widths(self) -> tuple[int, ...]:
        """m_i: the stream before the MLP in layer i."""
        return self.widths

    @property
    def place_widths(self) -> tuple[int, ...]:
        """Widths of the stream before each block in turn, and the full one that the head reads."""
        shape = self.shape
        rows = zip(self.attention_widths, self.mlp_widths, strict=True)
        widths = [width for row in rows for width in row[: len(shape.reads)]]
        return (*widths, shape.hidden_size)

    @property
    def mean_slice(self) -> float:
        """The share of the width that is removed, averaged over places, after rounding."""
        widths = self.place_widths[:-1]
        return 1 - sum(widths) / (self.shape.hidden_size * len(widths))

    @property
    def parameters(self) -> int:
        """Stored parameters of the sliced network: maps, shortcuts, embedding and untied head."""
        shape, widths = self.shape, self.place_widths
        total = shape.fixed + (shape.vocab_size + shape.position_rows) * widths[0]
        for place in range(len(widths) - 1):
            block = place % len(shape.reads)
            total += widths[place] * shape.reads[block] + widths[place + 1] * shape.writes[block]
        return total + self.shortcut_parameters

    @property
    def shortcut_parameters(self) -> int:
        """How many of the stored parameters are shortcut matrices."""
        return sum(before * after for before, after in pairwise(self.place_widths))

    def to_dict(self) -> dict:
        """The JSON form (DESIGN: CLI, `plan`)."""
        return {
            **asdict(self),
            "mean_slice": self.mean_slice,
            "parameters": self.parameters,
            "parameters_dense": self.shape.dense_parameters,
        }

    @classmethod
    def from_dict(cls, values: dict) -> "SlicePlan":
        """Inverse of `to_dict`. Raises RequestError naming what is missing."""
        shape = Shape.from_dict(values.get("shape"))
        optional = {"own_attention": _tuples(values.get("own_attention"))}
        names = [name for name in cls.__dataclass_fields__ if name not in ("shape", *optional)]
        try:
            plan = cls(**{name: _tuples(values[name]) for name in names}, shape=shape, **optional)
            plan._check_settings()
            computed = {name: getattr(plan, name) for name in ("mean_slice", "parameters")}
            computed["parameters_dense"] = shape.dense_parameters
            computed["slice_percentage"] = math.fsum(plan.final_slice) / shape.layers
            told = [(name, values[name], computed[name]) for name in computed if name in values]
            altered = [
                row for row in told if not math.isclose(*row[1:], rel_tol=1e-9, abs_tol=1e-9)
            ]
        except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
            raise RequestError(
                f"the plan is incomplete ({error}); make it anew with `dynslice plan`"
            ) from error
        for name, said, found in altered:
            raise RequestError(
                f"the plan says {name} {said}, its layers give {found}: it was altered; make it "
                "anew with `dynslice plan`"
            )
        return plan

    @classmethod
    def read(cls, path: str | Path) -> "SlicePlan":
        """Read a plan from a JSON file. Raises RequestError when that is not one."""
        return cls.from_dict(read_json(path, "plan"))


def constant(
    shape: Shape, slice_percentage: float, round_to: int = 8, phase: float = 0.0
) -> SlicePlan:
    """The same slice at every layer (SliceGPT).

    phase: where the width is no multiple, which layers get the wider neighbour: towards 0.5 the
    first layer does, towards -0.5 the last.
    """
    _check_request(shape, slice_percentage, slice_percentage, round_to)
    slices = (slice_percentage,) * shape.layers
    target = (slice_percentage, slice_percentage)
    return _rounded("constant", shape, *target, slices, round_to, phase)


def dynamic(
    shape: Shape,
    lr: Sequence[float],
    slice_percentage: float,
    slice_base: float = 0.0,
    round_to: int = 8,
) -> SlicePlan:
    """Slices in proportion to layer redundancy (paper, section 3.2).

    SLR_i = (SP - SB) n_i / mean(n) and FS_i = SB + SLR_i, so that mean(FS) = SP. Where FS_i
    would leave less than one rounding unit of the width, it is capped there and the excess goes
    to the other layers in proportion to their n_i. Raises RequestError for LR of another number
    of layers, or that is not finite.
    """
    _check_request(shape, slice_percentage, slice_base, round_to)
    _check_scores(shape, lr)
    limit = 1 - round_to / shape.hidden_size
    slices = _share_out(normalise(tuple(lr)), slice_percentage, slice_base, limit)
    return _rounded("dynamic", shape, slice_percentage, slice_base, slices, round_to)


def matched(plan: SlicePlan) -> SlicePlan:
    """The constant plan of equal stored parameters, as near as the rounding allows.

    The mean width moves in steps of one rounding unit in one layer, neighbouring widths mixed
    evenly over the layers. The first layer also sets the width of the embedding; where its step
    is too coarse to come within 0.05 %, that layer alone is rounded the other way.
    """
    _check_request(plan.shape, 0.0, 0.0, plan.round_to)

    def miss(candidate: SlicePlan) -> int:
        return abs(candidate.parameters - plan.parameters)

    even = _nearest(plan, 0.0)
    if miss(even) <= 5e-4 * plan.parameters:
        return even
    return min(even, _nearest(plan, 0.49), _nearest(plan, -0.49), key=miss)


def single(shape: Shape, layer: int, slice_percentage: float, round_to: int = 8) -> SlicePlan:
    """One layer cut by a share, all others whole: what that layer alone is sensitive to.

    The embedding, and with it the attention input of layer 0, stays whole: layer 0 is cut before
    its MLP only, every other layer at both of its places. Raises RequestError for no such layer.
    """
    _check_request(shape, slice_percentage, slice_percentage, round_to)
    if layer not in range(shape.layers):
        raise RequestError(f"layer {layer} is outside 0 to {shape.layers - 1}; count from 0")
    cut = constant(shape, slice_percentage, round_to).widths[0]
    d = shape.hidden_size
    return SlicePlan(
        schedule="single",
        slice_percentage=slice_percentage / shape.layers,
        slice_base=0.0,
        round_to=round_to,
        final_slice=tuple(slice_percentage * (i == layer) for i in range(shape.layers)),
        widths=tuple(cut if i == layer else d for i in range(shape.layers)),
        shape=shape,
        own_attention=tuple(cut if i == layer > 0 else d for i in range(shape.layers)),
    )


def shuffled(plan: SlicePlan, seed: int) -> SlicePlan:
    """The widths of a plan in a random order of layers; the embedding keeps its own.

    The control of a schedule: equal widths, hence nearly equal stored parameters, handed out
    without regard to the layer (by chance, or because widths are alike, some layers keep theirs).
    """
    order = np.random.default_rng(seed).permutation(plan.shape.layers)
    return replace(
        plan,
        schedule="shuffled",
        final_slice=tuple(plan.final_slice[i] for i in order),
        widths=(widths := tuple(plan.widths[i] for i in order)),
        own_attention=(plan.attention_widths[0], *widths[1:]),
    )


def with_embedding(plan: SlicePlan, embedding_slice: float) -> SlicePlan:
    """The plan with an embedding of its own width, d (1 - embedding_slice) rounded."""
    shape, round_to = plan.shape, plan.round_to
    _check_request(shape, embedding_slice, embedding_slice, round_to)
    width = round(shape.hidden_size * (1 - embedding_slice) / round_to) * round_to
    return replace(plan, own_attention=(width, *plan.attention_widths[1:]))


def of_places(
    schedule: str, shape: Shape, place_widths: Sequence[int], round_to: int = 8
) -> SlicePlan:
    """The plan with these widths of the stream, one for each place where a block reads it.

    Its final slices are those of the layers, averaged over their places.
    """
    blocks, d = len(shape.reads), shape.hidden_size
    layers = [tuple(place_widths[i : i + blocks]) for i in range(0, len(place_widths), blocks)]
    slices = tuple(1 - sum(widths) / (blocks * d) for widths in layers)
    return SlicePlan(
        schedule=schedule,
        slice_percentage=math.fsum(slices) / shape.layers,
        slice_base=0.0,
        round_to=round_to,
        final_slice=slices,
        widths=tuple(widths[-1] for widths in layers),
        shape=shape,
        own_attention=tuple(widths[0] for widths in layers),
    )


def read_json(path: str | Path, what: str) -> dict:
    """Parse a JSON file that a user named. Raises RequestError when it is none."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(f"{what} file {str(path)!r} cannot be read; check the path") from error
    except (ValueError, RecursionError) as error:
        raise RequestError(
            f"{what} file {str(path)!r} is not JSON ({error}); make it anew with `dynslice`"
        ) from error
    if not isinstance(values, dict):
        raise RequestError(f"{what} file {str(path)!r} holds no JSON object; make it anew")
    return values


def lr_of(values: dict) -> list[float]:
    """The LR per layer in the JSON of `dynslice lr`. Raises RequestError when it is none."""
    try:
        layers = values["layers"]
        scores = [float(layer["lr"]) for layer in layers]
        told = [float(layer["normalised"]) for layer in layers if "normalised" in layer]
    except (KeyError, TypeError, ValueError) as error:
        raise RequestError("the LR file lists no layers; make it with `dynslice lr`") from error
    if [layer.get("index", i) for i, layer in enumerate(layers)] != list(range(len(scores))):
        raise RequestError("the LR file lists its layers out of order; make it with `dynslice lr`")
    if not scores or not all(map(math.isfinite, scores)):
        raise RequestError("the LR file holds no finite scores; make it with `dynslice lr`")
    if max(map(abs, scores)) > 1 + 1e-6:
        raise RequestError(
            f"the LR file holds scores from {min(scores)} to {max(scores)}, and LR is a cosine; "
            "make it with `dynslice lr`"
        )
    pairs = zip(told, normalise(tuple(scores)), strict=bool(told))
    if not all(math.isclose(*pair, rel_tol=1e-9, abs_tol=1e-9) for pair in pairs):
        raise RequestError(
            "the scores of the LR file and their normalised values do not fit together: it was "
            "altered; make it anew with `dynslice lr`"
        )
    return scores


def _nearest(plan: SlicePlan, phase: float) -> SlicePlan:
    shape = plan.shape
    total_units = shape.layers * shape.hidden_size // plan.round_to

    def with_units(units: int) -> SlicePlan:
        return constant(shape, 1 - units / total_units, plan.round_to, phase)

    low, high = shape.layers, total_units  # parameters grow with the units: bisect
    while high - low > 1:
        middle = (low + high) // 2
        if with_units(middle).parameters <= plan.parameters:
            low = middle
        else:
            high = middle
    return min(map(with_units, (low, high)), key=lambda p: abs(p.parameters - plan.parameters))


def _share_out(
    n: tuple[float, ...], slice_percentage: float, slice_base: float, limit: float
) -> tuple[float, ...]:
    """FS_i = SB + SLR_i with mean SP and no FS_i above `limit`."""
    capped: set[int] = set()
    while True:
        free = [i for i in range(len(n)) if i not in capped]
        budget = len(n) * slice_percentage - len(capped) * limit - len(free) * slice_base
        weight = {i: n[i] for i in free}
        if not sum(weight.values()):  # only layers with n = 0 are left to take the excess
            weight = dict.fromkeys(free, 1.0)
        total = sum(weight.values())
        # The quotient first: a product with scores of 1e-320 would be lost.
        slices = {i: slice_base + budget * (weight[i] / total) for i in free}
        over = {i for i in free if slices[i] > limit}
        if not over:
            return tuple(slices.get(i, limit) for i in range(len(n)))
        capped |= over


def _rounded(
    schedule, shape, slice_percentage, slice_base, slices, round_to, phase=0.0
) -> SlicePlan:
    """Round d (1 - FS_i) to multiples so that the sum of widths is as near as a multiple allows.

    The running sum is rounded, not each width: each width is then one of the two multiples
    around its exact value, the error never adds up, and a constant slice that is no multiple
    mixes its two neighbours evenly over the layers.
    """
    most = shape.hidden_size // round_to
    widths, exact, taken = [], phase, 0
    for share in slices:
        exact += shape.hidden_size * (1 - share) / round_to
        units = math.floor(round(exact, 9) + 0.5) - taken
        units = min(max(units, 1), most)
        taken += units
        widths.append(units * round_to)
    return SlicePlan(
        schedule=schedule,
        slice_percentage=slice_percentage,
        slice_base=slice_base,
        round_to=round_to,
        final_slice=tuple(slices),
        widths=tuple(widths),
        shape=shape,
    )


def _check_request(shape: Shape, slice_percentage: float, slice_base: float, round_to: int) -> None:
    d = shape.hidden_size
    if round_to < 1 or d % round_to:
        raise RequestError(
            f"round_to {round_to} does not divide the hidden size {d}; use a divisor such as "
            f"{math.gcd(d, 8)}"
        )
    limit = 1 - round_to / d
    if not 0 <= slice_percentage <= limit:
        raise RequestError(
            f"slice percentage {slice_percentage} is outside 0 to {limit:.3f} (one multiple of "
            f"{round_to} must remain); give a share such as 0.25"
        )
    if not 0 <= slice_base <= slice_percentage:
        raise RequestError(
            f"slice base {slice_base} is outside 0 to the slice percentage {slice_percentage}; "
            "the base cannot exceed the average"
        )


def _check_scores(shape: Shape, lr: Sequence[float]) -> None:
    if len(lr) != shape.layers:
        raise RequestError(
            f"LR has {len(lr)} layers, the model {shape.layers}; measure LR on the same model"
        )
    for i, score in enumerate(lr):
        if not math.isfinite(score):
            raise RequestError(f"LR of layer {i} is {score}; measure LR anew with `dynslice lr`")
    if not math.isfinite(max(lr) - min(lr)):
        raise RequestError(
            f"LR from {min(lr)} to {max(lr)} is no redundancy; measure LR anew with `dynslice lr`"
        )


def _listed(value) -> tuple:
    return value if isinstance(value, tuple) else (value,)


def _tuples(value):
    return tuple(value) if isinstance(value, list) else value
