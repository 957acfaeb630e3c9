"""Plans as requests name them: what each rests on, and how it is made.

Their JSON is part of the key of a request: no field or schedule gets another name without a new
record.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from dynslice.core.errors import RequestError
from dynslice.experiment.store import Request
from dynslice.extensions import schedules
from dynslice.method import plan
from dynslice.method.controls import matched, shuffled, with_embedding
from dynslice.method.layout import PUBLISHED, Layout, basis_groups
from dynslice.method.plan import ModelDims, SlicePlan
from dynslice.method.scores import scores_of

ValueOf = Callable[[Request], dict]  # what a measurement of the dense model gave

AS_DENSE = {"keep_tied": True}  # a layout: embedding and head are one table where they are in dense


def layout_of(asked: dict | None, dims: ModelDims, lr: Sequence[float] | None = None) -> Layout:
    """The layout that a request names: the published one, or parts of it changed.

    asked: `keep_tied`, `basis_layers` (a number or "all"), `plain`. lr: see `basis_groups`.
    """
    if asked is None:
        return PUBLISHED
    layers = asked.get("basis_layers")
    groups = layers and basis_groups(len(dims.reads), dims.layers, layers, lr)
    return Layout(asked.get("keep_tied", False) and dims.tied, groups, asked.get("plain", False))


@dataclass(frozen=True)
class PlanSpec(ABC):
    """A plan that is asked for and not yet made."""

    schedule: ClassVar[str]
    neurons = None  # the share of each MLP's neurons that goes before the plan is made

    @property
    def target(self) -> Constant | Dynamic:
        """The plan whose slice percentage this one keeps to: itself, or what it is made from."""
        made_from = [value for value in vars(self).values() if isinstance(value, PlanSpec)]
        return made_from[0].target if made_from else self

    @property
    def own_layout(self) -> dict | None:
        """The layout that the plan will have: its own, or that of the plan it is made from."""
        made_from = [value for value in vars(self).values() if isinstance(value, PlanSpec)]
        return self.layout if "layout" in vars(self) else made_from[0].own_layout

    def needs(self) -> list[Request]:
        """The measurements of the dense model that decide the widths."""
        return [] if self.target is self else self.target.needs()

    @abstractmethod
    def make(self, dims: ModelDims, value_of: ValueOf) -> SlicePlan:
        """The plan of a model. Raises RequestError where the model has none like it."""

    def describe(self) -> str:
        """Schedule, SP, SB and layout in a few words."""
        base = f" SB {self.target.slice_base}" if isinstance(self.target, Dynamic) else ""
        layout = self.own_layout or {"untied": True}
        words = [name for name in ("untied", "plain") if layout.get(name)]
        words += [f"{n} layers a basis" for n in [layout.get("basis_layers")] if n]
        return " ".join([f"{self.schedule} SP {self.target.slice_percentage}{base}", *words])

    def to_dict(self) -> dict:
        """The JSON form, without what is left at None."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        parts = {name: v.to_dict() for name, v in given.items() if isinstance(v, PlanSpec)}
        return {"schedule": self.schedule, **given, **parts}


@dataclass(frozen=True)
class Constant(PlanSpec):
    """The same slice at every layer."""

    slice_percentage: float
    round_to: int
    layout: dict | None = None
    schedule = "constant"

    def make(self, dims: ModelDims, value_of: ValueOf) -> SlicePlan:
        layout = layout_of(self.layout, dims)
        return plan.constant(dims, self.slice_percentage, self.round_to, layout=layout)


@dataclass(frozen=True)
class Dynamic(PlanSpec):
    """Slices by layer redundancy; lr: the configuration of the request that measures it."""

    slice_percentage: float
    slice_base: float
    round_to: int
    lr: dict
    score: str | None = None
    layout: dict | None = None
    schedule = "dynamic"

    def needs(self) -> list[Request]:
        return [Request("lr", self.lr)]

    def make(self, dims: ModelDims, value_of: ValueOf) -> SlicePlan:
        layers = value_of(Request("lr", self.lr))["layers"]
        target = self.slice_percentage, self.slice_base, self.round_to
        layout = layout_of(self.layout, dims, scores_of(layers))
        return plan.dynamic(dims, scores_of(layers, self.score or "cosine"), *target, layout)


@dataclass(frozen=True)
class Matched(PlanSpec):
    """The constant plan that stores as much as another one."""

    to: PlanSpec
    schedule = "matched"

    def make(self, dims: ModelDims, value_of: ValueOf) -> SlicePlan:
        return matched(self.to.make(dims, value_of))


@dataclass(frozen=True)
class Shuffled(PlanSpec):
    """The widths of another plan in random order; keep_first: but for those of the first layer."""

    of: PlanSpec
    seed: int
    keep_first: bool | None = None
    schedule = "shuffled"

    def make(self, dims: ModelDims, value_of: ValueOf) -> SlicePlan:
        return shuffled(self.of.make(dims, value_of), self.seed, bool(self.keep_first))


@dataclass(frozen=True)
class OwnEmbedding(PlanSpec):
    """Another plan with an embedding of its own width."""

    of: PlanSpec
    embedding_slice: float
    schedule = "embedding"

    def make(self, dims: ModelDims, value_of: ValueOf) -> SlicePlan:
        return with_embedding(self.of.make(dims, value_of), self.embedding_slice)


@dataclass(frozen=True)
class WithinBudget(PlanSpec):
    """A schedule that stores no more than a constant plan; evidence: {"kind", "config"}.

    layout: its own, which may differ from that of the budget. neurons: the share of each MLP's
    neurons that goes first, so that the budget is shared with them.
    """

    schedule: str
    budget: Constant
    evidence: dict | None = None
    slice_base: float | None = None
    layout: dict | None = None
    neurons: float | None = None

    def needs(self) -> list[Request]:
        return [Request(**self.evidence)] if self.evidence else []

    def make(
        self, dims: ModelDims, value_of: ValueOf, narrower: ModelDims | None = None
    ) -> SlicePlan:
        """narrower: the shape of the model without those neurons, where some go."""
        budget, known = self.budget.make(dims, value_of), {}
        dims = narrower or dims
        for request in self.needs():  # of LR, or none
            known = {"lr": scores_of(value_of(request)["layers"])}
        layout = layout_of(self.layout, dims, known.get("lr"))
        known |= {"layout": layout, "slice_base": self.slice_base or 0.0}
        round_to = dims.heads or 1 if layout.plain else budget.round_to
        evidence = schedules.Evidence(dims, round_to, **known)
        return schedules.within(self.schedule, evidence, budget.parameters)


_SPECS = {spec.schedule: spec for spec in (Constant, Dynamic, Matched, Shuffled, OwnEmbedding)}


def plan_spec(values: dict) -> PlanSpec:
    """The spec of its JSON form. Raises RequestError for an unknown schedule."""
    specs = {name: plan_spec(values[name]) for name in ("to", "of", "budget") if name in values}
    given = {**values, **specs}
    if "budget" in given:
        return WithinBudget(**given)
    schedule = given.pop("schedule")
    if schedule not in _SPECS:
        raise RequestError(f"schedule {schedule!r} is unknown; there are {', '.join(_SPECS)}")
    return _SPECS[schedule](**given)


def facts_of(plan: SlicePlan) -> dict:
    """What the store keeps of a plan."""
    names = ["widths", "final_slice", "mean_slice", "parameters", "shortcut_parameters"]
    names += ["attention_widths"] if plan.own_attention else []
    facts = {name: getattr(plan, name) for name in names}
    facts["parameters_untied"] = plan.untied.parameters
    return {**facts, "parameters_dense": plan.shape.dense_parameters}
