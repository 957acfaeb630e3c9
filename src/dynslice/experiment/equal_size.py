"""What notebook 07 compares: networks of equal size, with and without compensation."""

from dataclasses import replace
from typing import Any

from dynslice.experiment.plan_specs import PlanSpec, WithinBudget, plan_spec
from dynslice.experiment.profile import percent
from dynslice.experiment.requests import DENSE, Design, Point
from dynslice.experiment.store import Request, unique


class EqualSize:
    """The part of a profile that goes beyond the paper, as requests.

    A size is what constant slicing stores at a slice percentage. Whatever is chosen there (ridge,
    schedule) is chosen on validation windows, before test windows are read.
    """

    def __init__(self, design: Design):
        self.design, self.profile = design, design.profile
        self._compensations = (None, {"ridge": self.profile.beyond_ridge})  # without, then with it

    def contest(self, slice_percentage: float) -> list[Point]:
        """The networks of one size: each schedule without, then each with compensation."""
        names = ["constant", *self.profile.beyond_schedules]
        pairs = [(name, extra) for extra in self._compensations for name in names]
        return [self._at_size(name, slice_percentage, extra) for name, extra in pairs]

    def variants(self, slice_percentage: float) -> list[Point]:
        """Networks of that size that only validation windows see, if the profile has such."""
        p, sp = self.profile, slice_percentage
        if p.selection_windows is None:
            return []
        ridges = [({"ridge": ridge}, f"ridge {ridge:g}") for ridge in p.beyond_ridges]
        if ridges:
            ridges.append(({"ridge": p.beyond_ridge, "shortcut": False}, "writing maps alone"))
        found = [self._at_size("constant", sp, extra, note) for extra, note in ridges]
        for name in p.beyond_candidates:
            found += [self._at_size(name, sp, extra) for extra in self._compensations]
        for count in p.beyond_calibration_windows:
            found += self._constant(sp, f"{count} calibration windows", windows=count)
        return found

    def recovered(self, slice_percentage: float) -> list[Point]:
        """Constant slicing with recovery fine-tuning, without and with compensation before it."""
        p = self.profile
        if not p.recovery_steps:
            return []
        names = ("steps", "windows", "window")
        recovery = {name: getattr(p, f"recovery_{name}") for name in names}
        plain = self._constant(slice_percentage, f"{p.recovery_steps} steps of LoRA")
        return [replace(p, network={**p.network, "recovery": recovery}) for p in plain]

    def places_request(self, slice_percentage: float) -> Request:
        """The loss with one place cut more or less than all others, on validation windows."""
        reach = self.profile.sensitivity_reach * slice_percentage
        shares = [slice_percentage - reach, slice_percentage + reach]
        plan = self.design.constant(slice_percentage).to_dict()
        return self.design.request("places", plan=plan, shares=shares, **self._validation())

    def search_request(self, slice_percentage: float) -> Request:
        """The plan of a search on validation windows."""
        budget = self.design.constant(slice_percentage).to_dict()
        asked = {"budget": budget, "evaluations": self.profile.search_evaluations}
        return self.design.request("search", **asked, **self._validation())

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
            requests += design.accuracy_requests(point)
        for sp in sizes[-1:]:
            for point in self.variants(sp):
                requests += design.candidate_requests(point)
            for point in self.recovered(sp):
                requests += [design.slice_request(point), *design.reported_requests(point)]
            requests += [*design.reported_requests(DENSE), *design.accuracy_requests(DENSE)]
        return unique(requests)

    def _constant(self, slice_percentage: float, note: str, **calibration: Any) -> list[Point]:
        given = ("constant", slice_percentage)
        return [self._at_size(*given, extra, note, **calibration) for extra in self._compensations]

    def _at_size(
        self,
        schedule: str,
        slice_percentage: float,
        compensation: dict | None = None,
        note: str = "",
        **calibration: Any,
    ) -> Point:
        compensated = "compensated" if compensation else ""
        words = [schedule, f"size of SP {percent(slice_percentage)}", compensated, note]
        plan = self._plan(schedule, slice_percentage)
        point = self.design.point(plan, ", ".join(filter(None, words)), **calibration)
        extra = {"compensation": compensation} if compensation else {}
        return replace(point, network={**point.network, **extra})

    def _plan(self, schedule: str, slice_percentage: float) -> PlanSpec:
        """The plan of a schedule that stores no more than constant slicing."""
        budget = self.design.constant(slice_percentage)
        if schedule == "constant":
            return budget
        evidence = {
            "lr": self.design.lr_request,
            "sensitivity": lambda: self.places_request(slice_percentage),
            "search": lambda: self.search_request(slice_percentage),
        }
        found = vars(evidence[schedule]()) if schedule in evidence else None
        return WithinBudget(schedule, budget, found)

    def _validation(self) -> dict:
        """Calibration, and validation windows other than those that choose."""
        p, design = self.profile, self.design
        read = design.windows(p.eval_texts[0], "validation", p.sensitivity_eval_windows)
        calibration = design.calibration(windows=p.sensitivity_calibration_windows)
        return {**read, "calibration": calibration, "skip": p.selection_windows or 0}
