"""What notebook 07 compares: networks of equal size, one lever after the other."""

from dataclasses import replace
from typing import Any

from dynslice.experiment.plan_specs import AS_DENSE, PlanSpec, Shuffled, WithinBudget, plan_spec
from dynslice.experiment.profile import percent
from dynslice.experiment.requests import DENSE, Design, Point
from dynslice.experiment.store import Request, unique
from dynslice.extensions.schedules import BY_LR

UNTIED, SLICEGPT, LR, SHARED, BEST_RECIPE = LEVERS = (
    "SliceGPT, embedding untied",
    "SliceGPT",
    "LR widths",
    "shared bases",
    "compensation",
)
PLAIN = "ordinary checkpoint"


class EqualSize:
    """The part of a profile that goes beyond the paper, as requests.

    A size is what constant slicing stores at a slice percentage, with the embedding tied where the
    dense model ties it. Whatever is chosen there is chosen on validation windows, before test
    windows are read.
    """

    def __init__(self, design: Design):
        self.design, self.profile = design, design.profile
        self._shared = {**AS_DENSE, "basis_layers": self.profile.beyond_basis_layers}

    def contest(self, slice_percentage: float) -> list[Point]:
        """The ladder of one size: each network has one lever more than the one before it."""
        sp, shared = slice_percentage, self._shared
        rungs = [
            self._at_size(sp, UNTIED, "constant", None),
            self.slicegpt(sp),
            self._at_size(sp, LR, "lr", AS_DENSE),
            self._at_size(sp, SHARED, "lr", shared),
            self.recipe(sp),
        ]
        return rungs + self.recovered(sp)

    def slicegpt(self, slice_percentage: float, **calibration: Any) -> Point:
        """Constant slicing; calibration: what differs from the profile's."""
        return self._at_size(slice_percentage, SLICEGPT, "constant", AS_DENSE, **calibration)

    def recipe(self, slice_percentage: float, **calibration: Any) -> Point:
        """All levers but fine-tuning."""
        at = slice_percentage, BEST_RECIPE, "lr", self._shared, {}
        return self._at_size(*at, **calibration)

    def recovered(self, slice_percentage: float) -> list[Point]:
        """The last lever, if the profile asks for it: fine-tuning of the recipe's slice."""
        p = self.profile
        if not p.recovery_steps:
            return []
        return [self.with_lora(self.recipe(slice_percentage), f"{p.recovery_steps} steps of LoRA")]

    def with_lora(self, point: Point, note: str, learning_rate: float | None = None) -> Point:
        """A network fine-tuned as the profile says; learning_rate: other than SliceGPT's."""
        names = ("steps", "windows", "window")
        recovery = {name: getattr(self.profile, f"recovery_{name}") for name in names}
        recovery |= {"learning_rate": learning_rate} if learning_rate else {}
        where = f"size of SP {percent(point.slice_percentage)}"
        network = {**point.network, "recovery": recovery}
        return replace(point, network=network, variant=f"{note}, {where}")

    def plain(self, slice_percentage: float) -> list[Point]:
        """The published layout at its own size, and ordinary checkpoints that store no more.

        At the last of the sizes, where the profile asks for them. A family without such checkpoints
        fails there.
        """
        is_last = slice_percentage == self.profile.beyond_slice_percentages[-1]
        if not (is_last and self.profile.beyond_plain):
            return []
        budget = replace(self.design.constant(slice_percentage), layout=None)
        ordinary = WithinBudget("constant", budget, layout={"plain": True})
        return [
            self._point(budget, slice_percentage, f"{UNTIED}, as published", None),
            self._point(ordinary, slice_percentage, PLAIN, None),
            self._point(ordinary, slice_percentage, f"{PLAIN}, compensation", {}),
        ]

    def draws(self, slice_percentage: float) -> list[tuple[Point, Point]]:
        """(recipe, SliceGPT) of one size, for each draw of the calibration windows there."""
        p, pairs = self.profile, []
        others = p.beyond_calibration_seeds if self.is_headline(slice_percentage) else []
        for seed in (p.seed, *others):
            made = (make(slice_percentage, seed=seed) for make in (self.recipe, self.slicegpt))
            pairs.append(tuple(made))
        return pairs

    def variants(self, slice_percentage: float) -> list[Point]:
        """Networks of that size that only validation windows see, if the profile has such."""
        p, sp, shared = self.profile, slice_percentage, self._shared
        if p.selection_windows is None:
            return []
        found = []
        for layers in p.beyond_basis_layers_tried:
            said = f"a basis for {layers if layers == 'all' else f'each {layers}'} layers"
            layout = {**AS_DENSE, "basis_layers": layers}
            found += [self._at_size(sp, said, "lr", layout)]
            found += [self._at_size(sp, f"{said}, compensation", "lr", layout, {})]
        for name in p.beyond_candidates:
            found += [self._at_size(sp, f"{name} widths, shared bases", name, shared)]
            found += [self._at_size(sp, f"{name} widths, compensation", name, shared, {})]
        for base in p.beyond_slice_bases:
            at = {"slice_base": base}
            found.append(self._at_size(sp, f"SB {percent(base)}, shared bases", "lr", shared, **at))
            if "entropic" in p.beyond_candidates:
                said = f"entropic widths, SB {percent(base)}, shared bases"
                found.append(self._at_size(sp, said, "entropic", shared, **at))
        for seed in range(p.draw_seed, p.draw_seed + p.beyond_shuffles):
            found.append(self._in_random_order(sp, seed))
        for ridge in p.beyond_ridges:
            note, fixed = f"compensation, ridge {ridge:g}", {"ridge": ridge}
            found.append(self._at_size(sp, note, "lr", shared, fixed))
        for count in p.beyond_calibration_windows:
            said, amount = f"{count} calibration windows", {"windows": count}
            found += [self._at_size(sp, f"{SLICEGPT}, {said}", "constant", AS_DENSE, **amount)]
            found += [self._at_size(sp, f"compensation, {said}", "lr", shared, {}, **amount)]
        return found

    def is_headline(self, slice_percentage: float) -> bool:
        """Whether a size is one of those at which tasks and other draws are measured."""
        return slice_percentage in self.profile.task_slice_percentages

    def has_tasks(self, slice_percentage: float) -> bool:
        """Whether the networks of a size run the tasks."""
        return self.profile.beyond_tasks and self.is_headline(slice_percentage)

    def task_requests(self, point: Point) -> list[Request]:
        """Accuracy on every task, where the profile runs tasks on such networks at this size."""
        has_tasks = self.has_tasks(point.slice_percentage) or point is DENSE
        return self.design.accuracy_requests(point) if has_tasks else []

    def speed_requests(self, point: Point) -> list[Request]:
        """Prefill and decoding, where dense and sliced network are in memory at once.

        Fine-tuning leaves every shape, and so the speed, as it was.
        """
        has_both = self.profile.placement == "resident" and "recovery" not in point.network
        return [self.design.speed_request(point)] if has_both else []

    def heard(self) -> list[Point]:
        """Dense, SliceGPT, LR widths and the recipe at the headline size, if they are to write."""
        p = self.profile
        sizes = [sp for sp in p.beyond_slice_percentages if self.is_headline(sp)]
        if not (p.sound_tokens and sizes):
            return []
        wanted = (SLICEGPT, LR, BEST_RECIPE)
        return [DENSE, *(point for point in self.contest(min(sizes)) if point.name in wanted)]

    def continuation_request(self, point: Point, text: str) -> Request:
        """What a network writes after the beginning of a reported window of a text."""
        p, read = self.profile, self.design.windows(text, self.profile.eval_split, 1)
        asked = {**read, "window": p.sound_prompt, "new_tokens": p.sound_tokens}
        return self.design.request("continuation", slice=point.network, **asked)

    def evidence_requests(self) -> list[Request]:
        """What the schedules rest on."""
        sizes = self.profile.beyond_slice_percentages
        points = [point for sp in sizes for point in self.contest(sp)]
        points += [point for sp in sizes[-1:] for point in self.variants(sp)]
        plans = [plan_spec(point.network["plan"]) for point in points]
        return unique([request for plan in plans for request in plan.needs()])

    def requests(self) -> list[Request]:
        """All that the notebook needs."""
        design, sizes = self.design, self.profile.beyond_slice_percentages
        requests = self.evidence_requests()
        for point in (point for sp in sizes for point in self.contest(sp)):
            requests += [*design.candidate_requests(point), *design.reported_requests(point)]
            requests += [*self.task_requests(point), *self.speed_requests(point)]
        for point in (point for sp in sizes for pair in self.draws(sp) for point in pair):
            requests += [design.slice_request(point), *design.reported_requests(point)]
        for point in self.heard():
            requests += [self.continuation_request(point, text) for text in self.profile.eval_texts]
        for point in (point for sp in sizes for point in self.plain(sp)):
            requests += [design.slice_request(point), *design.reported_requests(point)]
        for sp in sizes[-1:]:
            for point in self.variants(sp):
                requests += design.candidate_requests(point)
            requests += [*design.reported_requests(DENSE), *self.task_requests(DENSE)]
        return unique(requests)

    def _at_size(
        self,
        slice_percentage: float,
        note: str,
        schedule: str,
        layout: dict | None,
        compensation: dict | None = None,
        slice_base: float | None = None,
        **calibration: Any,
    ) -> Point:
        """The network of a schedule and layout that stores no more than constant slicing."""
        plan = self._plan(schedule, slice_percentage, layout, slice_base)
        return self._point(plan, slice_percentage, note, compensation, **calibration)

    def _in_random_order(self, slice_percentage: float, seed: int) -> Point:
        """The widths of LR on shared bases in random order, but for those of the first layer."""
        plan = Shuffled(self._plan("lr", slice_percentage, self._shared), seed, keep_first=True)
        return self._point(plan, slice_percentage, f"LR widths in random order {seed}", None)

    def _point(
        self,
        plan: PlanSpec,
        slice_percentage: float,
        note: str,
        compensation: dict | None,
        **calibration: Any,
    ) -> Point:
        where = f"size of SP {percent(slice_percentage)}"
        point = self.design.point(plan, f"{note}, {where}", **calibration)
        extra = {} if compensation is None else {"compensation": compensation}
        return replace(point, network={**point.network, **extra})

    def budget(self, slice_percentage: float) -> PlanSpec:
        """Constant slicing with the embedding as the dense model has it, which says the size."""
        return replace(self.design.constant(slice_percentage), layout=AS_DENSE)

    def _plan(
        self,
        schedule: str,
        slice_percentage: float,
        layout: dict | None,
        slice_base: float | None = None,
    ) -> PlanSpec:
        """The plan of a schedule that stores no more than constant slicing."""
        budget = self.budget(slice_percentage)
        if schedule == "constant" and layout == AS_DENSE:
            return budget
        found = vars(self.design.lr_request()) if schedule in BY_LR else None
        return WithinBudget(schedule, budget, found, slice_base, layout)
