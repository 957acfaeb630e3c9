"""Slice plans: how wide the residual stream stays at each layer, and what that stores."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from dynslice.core.errors import RequestError
from dynslice.core.files import read_json, validated
from dynslice.method.layout import PUBLISHED, Layout
from dynslice.method.scores import normalise

_Count = Annotated[int, Field(ge=0)]
_Positive = Annotated[int, Field(gt=0)]
_Share = Annotated[float, Field(ge=0, le=1)]
_Schedule = Literal["constant", "dynamic", "lr", "entropic", "first", "embedding"]

ORIGINAL = -1  # in `SlicePlan.bases`: the stream keeps the coordinates of the dense model


@dataclass(frozen=True)
class ModelDims:
    """What a plan must know of a model to count the parameters of its slice.

    `reads` and `writes` are for the blocks of a layer (attention and MLP, or the two in parallel):
    parameters per dimension of the stream that a block reads and writes (the summed output
    features of its reading maps; the summed input features of its writing maps, plus one for each
    bias). `fixed` is what slicing leaves alone, `position_rows` the rows of learned positions.
    `tied`: whether embedding and head are one table; `final_scale` is the scale of the last norm,
    which only a head of its own takes up. `heads`: of attention, whose number
    divides the width of an ordinary checkpoint; 0 where none can be a slice.
    """

    hidden_size: _Positive
    layers: _Positive
    vocab_size: _Count
    reads: Annotated[tuple[_Count, ...], Field(min_length=1)]
    writes: tuple[_Count, ...]
    fixed: _Count
    dense_parameters: _Positive
    position_rows: _Count = 0
    tied: bool = False
    final_scale: _Count = 0
    heads: _Count = 0

    def __post_init__(self):
        if len(self.reads) != len(self.writes):
            raise RequestError(
                f"the shape of the model has {len(self.reads)} blocks that read and "
                f"{len(self.writes)} that write; make the file anew with `dynslice lr`"
            )

    @classmethod
    def from_dict(cls, values: dict | None) -> "ModelDims":
        """From the JSON form. Raises RequestError naming what is missing or fits no model."""
        return validated(cls, values or {}, "shape of the model", "`dynslice lr`")


@dataclass(frozen=True)
class SlicePlan:
    """Width w_i of the stream at each layer, with the target that it came from.

    At layer i the attention input, the attention output and the MLP input have width w_i (where
    the two run in parallel there is one input, of width w_i, and both write in w_{i+1}); the
    embedding has w_0, and the output of the last layer keeps the hidden size (docs/method.md).
    `final_slice` is FS_i, the share to be removed at layer i, before rounding. `own_attention`
    gives the stream before attention widths of its own, the first of which is the embedding's.
    """

    schedule: Literal[_Schedule, "single", "shuffled"]
    slice_percentage: float
    slice_base: _Share
    round_to: _Positive
    final_slice: tuple[_Share, ...]
    widths: tuple[int, ...]
    shape: ModelDims
    own_attention: tuple[int, ...] | None = None
    layout: Layout = PUBLISHED

    def __post_init__(self):
        d, layers = self.shape.hidden_size, self.shape.layers
        for what, count in (
            ("widths", len(self.widths)),
            ("widths before attention", len(self.attention_widths)),
            ("final slices", len(self.final_slice)),
        ):
            if count != layers:
                raise RequestError(
                    f"plan has {count} {what}, the model {layers} layers; make the plan from the "
                    "same model"
                )
        every = [*self.attention_widths, *self.mlp_widths]
        if not all(1 <= width <= d for width in every):
            raise RequestError(
                f"plan has widths from {min(every)} to {max(every)}, the hidden size "
                f"is {d}; widths must lie between 1 and {d}"
            )
        self._check_layout()

    def _check_layout(self) -> None:
        layout, places = self.layout, len(self.shape.reads) * self.shape.layers
        if layout.tied and not self.shape.tied:
            raise RequestError(
                "the model has a head apart from its embedding, so a slice has no table for both; "
                "make the plan with --untie"
            )
        if layout.basis_groups and sum(layout.basis_groups) != places:
            raise RequestError(
                f"the groups of places that share a basis count {sum(layout.basis_groups)} places, "
                f"the model has {places}; make the plan from the same model"
            )
        if layout.plain and len({*self.attention_widths, *self.mlp_widths}) > 1:
            raise RequestError("a plain checkpoint has one hidden size; slice all layers equally")
        if layout.plain and not self.shape.heads:
            raise RequestError("no slice of this model is a plain checkpoint; leave plain out")
        if layout.plain and self.widths[0] % self.shape.heads:
            raise RequestError(
                f"a plain checkpoint of width {self.widths[0]} is none that transformers takes; "
                f"the width must be a multiple of the {self.shape.heads} heads"
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
        """Widths of the stream before each block in turn, and the one that the head reads."""
        shape = self.shape
        rows = zip(self.attention_widths, self.mlp_widths, strict=True)
        widths = [width for row in rows for width in row[: len(shape.reads)]]
        return (*widths, widths[-1] if self.layout.plain else shape.hidden_size)

    @property
    def bases(self) -> tuple[int, ...]:
        """The number of the basis of the stream before each block in turn, and before the head.

        Where nothing in a group is cut, and before a head that is not, it is ORIGINAL.
        """
        widths, bases = self.place_widths, []
        places = len(widths) - 1
        if self.layout.plain:
            return (0,) * (places + 1)
        for number, count in enumerate(self.layout.basis_groups or (1,) * places):
            group = widths[len(bases) : len(bases) + count]
            is_cut = min(group) < self.shape.hidden_size
            bases += [number if is_cut else ORIGINAL] * count
        return (*bases, ORIGINAL)

    @property
    def shortcuts(self) -> tuple[bool, ...]:
        """Whether a matrix takes the residual connection past each block in turn.

        With a basis for each place always, as SliceGPT has it; else where the basis changes.
        """
        if not self.layout.shares_bases:
            return (True,) * (len(self.place_widths) - 1)
        return tuple(before != after for before, after in pairwise(self.bases))

    @property
    def maps_embedding(self) -> bool:
        """Whether a map takes the rows of a tied table into the first basis."""
        return self.layout.tied and self.bases[0] != ORIGINAL

    @property
    def mean_slice(self) -> float:
        """The share of the width that is removed, averaged over places, after rounding."""
        widths = self.place_widths[:-1]
        return 1 - sum(widths) / (self.shape.hidden_size * len(widths))

    @property
    def parameters(self) -> int:
        """Stored parameters of the sliced network, shortcuts and the vocabulary's table included.

        `fixed` counts a head of full width; a tied one is the embedding too.
        """
        shape, widths = self.shape, self.place_widths
        total = shape.fixed + shape.position_rows * widths[0]
        if self.layout.tied:
            total += shape.final_scale + self.maps_embedding * shape.hidden_size * widths[0]
        else:
            total += shape.vocab_size * widths[0]
        if self.layout.plain:  # a narrower head, and scales of norms that are all one number
            total += shape.vocab_size * (widths[-1] - shape.hidden_size) + sum(widths)
        for place in range(len(widths) - 1):
            block = place % len(shape.reads)
            total += widths[place] * shape.reads[block] + widths[place + 1] * shape.writes[block]
        return total + self.shortcut_parameters

    @property
    def untied(self) -> "SlicePlan":
        """The same widths in the published layout of the vocabulary's tables."""
        return replace(self, layout=replace(self.layout, tied=False))

    @property
    def shortcut_parameters(self) -> int:
        """How many of the stored parameters are shortcut matrices."""
        steps = zip(self.shortcuts, pairwise(self.place_widths), strict=True)
        return sum(before * after for has_one, (before, after) in steps if has_one)

    def to_dict(self) -> dict:
        """The JSON form, as `dynslice plan` writes it."""
        return {
            **asdict(self),
            "mean_slice": self.mean_slice,
            "parameters": self.parameters,
            "parameters_untied": self.untied.parameters,
            "parameters_dense": self.shape.dense_parameters,
        }

    @classmethod
    def from_dict(cls, values: dict) -> "SlicePlan":
        """Inverse of `to_dict`. Raises RequestError naming what is missing, wrong or altered."""
        plan = validated(cls, values, "plan", "`dynslice plan`")
        check_request(plan.shape, 0.0, 0.0, plan.round_to)
        computed = plan.to_dict()
        computed["slice_percentage"] = math.fsum(plan.final_slice) / plan.shape.layers
        for name in ("mean_slice", "parameters", "parameters_dense", "slice_percentage"):
            said, found = values.get(name, computed[name]), computed[name]
            if not (isinstance(said, int | float) and math.isclose(said, found, abs_tol=1e-9)):
                raise RequestError(
                    f"the plan says {name} {said}, its layers give {found}: it was altered; make "
                    "it anew with `dynslice plan`"
                )
        return plan

    @classmethod
    def read(cls, path: str | Path) -> "SlicePlan":
        """Read a plan from a JSON file. Raises RequestError when that is not one."""
        return cls.from_dict(read_json(path, "plan"))


def constant(
    shape: ModelDims,
    slice_percentage: float,
    round_to: int = 8,
    phase: float = 0.0,
    layout: Layout = PUBLISHED,
) -> SlicePlan:
    """The same slice at every layer (SliceGPT).

    phase: where the width is no multiple, which layers get the wider neighbour: towards 0.5 the
    first layer does, towards -0.5 the last. A plain checkpoint has one width, the nearest multiple.
    """
    check_request(shape, slice_percentage, slice_percentage, round_to)
    if layout.plain:
        units = max(1, round(shape.hidden_size * (1 - slice_percentage) / round_to))
        slice_percentage = 1 - units * round_to / shape.hidden_size
    slices = (slice_percentage,) * shape.layers
    widths = rounded_widths(slices, shape.hidden_size, round_to, phase)
    target = (slice_percentage, slice_percentage, round_to)
    return SlicePlan("constant", *target, slices, widths, shape, layout=layout)


def dynamic(
    shape: ModelDims,
    lr: Sequence[float],
    slice_percentage: float,
    slice_base: float = 0.0,
    round_to: int = 8,
    layout: Layout = PUBLISHED,
) -> SlicePlan:
    """Slices in proportion to layer redundancy, as `dynamic_slicing` makes them (section 3.2).

    At least one rounding unit of the width remains in each layer. Raises RequestError for LR of
    another number of layers, or that is not finite.
    """
    check_request(shape, slice_percentage, slice_base, round_to)
    _check_scores(shape, lr)
    limit = 1 - round_to / shape.hidden_size
    slices = final_slices(normalise(lr), slice_percentage, slice_base, limit)
    widths = rounded_widths(slices, shape.hidden_size, round_to)
    target = (slice_percentage, slice_base, round_to)
    return SlicePlan("dynamic", *target, slices, widths, shape, layout=layout)


def of_places(
    schedule: str,
    shape: ModelDims,
    place_widths: Sequence[int],
    round_to: int = 8,
    layout: Layout = PUBLISHED,
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
        layout=layout,
    )


def final_slices(
    n: Sequence[float], slice_percentage: float, slice_base: float, limit: float
) -> tuple[float, ...]:
    """FS_i = SB + SLR_i with SLR_i = (SP - SB) n_i / mean(n), and no FS_i above `limit`.

    Where FS_i would exceed the limit it is capped there, and the excess goes to the other layers
    in proportion to their n_i, so that mean(FS) = SP. (The paper's section 3.2; the cap is ours.)
    """
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


def rounded_widths(
    slices: Sequence[float], hidden_size: int, round_to: int, phase: float = 0.0
) -> tuple[int, ...]:
    """w_i = d (1 - FS_i), rounded to multiples so that their sum stays as near as that allows.

    The running sum is rounded, not each width: each width is then one of the two multiples
    around its exact value, the error never adds up, and a constant slice that is no multiple
    mixes its two neighbours evenly over the layers. phase: see `constant`.
    """
    widths, exact, taken = [], phase, 0
    for share in slices:
        exact += hidden_size * (1 - share) / round_to
        units = math.floor(round(exact, 9) + 0.5) - taken
        units = min(max(units, 1), hidden_size // round_to)
        taken += units
        widths.append(units * round_to)
    return tuple(widths)


def check_request(
    shape: ModelDims, slice_percentage: float, slice_base: float, round_to: int
) -> None:
    """Raise RequestError for shares and a rounding that no plan of this model has."""
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


def _check_scores(shape: ModelDims, lr: Sequence[float]) -> None:
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
