"""What notebook 07 compares: networks of equal size, with and without compensation."""

from typing import Any

from dynslice.experiment.profile import percent
from dynslice.experiment.requests import Design, Point
from dynslice.experiment.store import Request, unique


class Beyond(Design):
    """The part of a profile that goes beyond the paper, as requests.

    A size is what constant slicing stores at a slice percentage. Whatever is chosen there (ridge,
    schedule) is chosen on validation windows, before test windows are read.
    """

    def contest(self, slice_percentage: float) -> list[Point]:
        """The networks of one size: each schedule without, then each with compensation."""
        schedules = ["constant", *self.profile.beyond_schedules]
        ours = {"ridge": self.profile.beyond_ridge}
        pairs = [(name, extra) for extra in (None, ours) for name in schedules]
        return [self._at_size(name, slice_percentage, extra) for name, extra in pairs]

    def variants(self, slice_percentage: float) -> list[Point]:
        """Networks of that size that only validation windows see: other ridges, schedules, ...

        None in a profile without such windows.
        """
        p = self.profile
        if p.selection_windows is None:
            return []
        ours = {"ridge": p.beyond_ridge}
        found = [
            self._at_size("constant", slice_percentage, {"ridge": ridge}, f"ridge {ridge:g}")
            for ridge in p.beyond_ridges
        ]
        if p.beyond_ridges:
            alone = {**ours, "shortcut": False}
            found.append(self._at_size("constant", slice_percentage, alone, "writing maps alone"))
        for name in p.beyond_candidates:
            found += [self._at_size(name, slice_percentage, extra) for extra in (None, ours)]
        for count in p.beyond_calibration_windows:
            for extra in (None, ours):
                note = f"{count} calibration windows"
                found.append(
                    self._at_size("constant", slice_percentage, extra, note, windows=count)
                )
        return found

    def recovered(self, slice_percentage: float) -> list[Point]:
        """Constant slicing with recovery fine-tuning, without and with compensation before it."""
        p = self.profile
        if not p.recovery_steps:
            return []
        recovery = {
            "steps": p.recovery_steps,
            "windows": p.recovery_windows,
            "window": p.recovery_window,
        }
        note = f"{p.recovery_steps} steps of LoRA"
        return [
            self._at_size("constant", slice_percentage, extra, note, recovery=recovery)
            for extra in (None, {"ridge": p.beyond_ridge})
        ]

    def places_request(self, slice_percentage: float) -> Request:
        """The loss with one place cut more or less than all others, on validation windows."""
        p = self.profile
        reach = p.sensitivity_reach * slice_percentage
        config = {
            **self._model,
            "plan": self._constant(slice_percentage),
            "shares": [slice_percentage - reach, slice_percentage + reach],
            "calibration": self._calibration(windows=p.sensitivity_calibration_windows),
            **self._validation(p.sensitivity_eval_windows),
        }
        return Request("places", config)

    def search_request(self, slice_percentage: float) -> Request:
        """The plan of a search on validation windows."""
        p = self.profile
        config = {
            **self._model,
            "budget": self._constant(slice_percentage),
            "evaluations": p.search_evaluations,
            "calibration": self._calibration(windows=p.sensitivity_calibration_windows),
            **self._validation(p.sensitivity_eval_windows),
        }
        return Request("search", config)

    def evidence_requests(self) -> list[Request]:
        """What the schedules rest on."""
        p = self.profile
        found = []
        for sp in p.beyond_slice_percentages:
            points = self.contest(sp)
            if sp == p.beyond_slice_percentages[-1]:
                points += self.variants(sp)
            plans = [point.network["plan"] for point in points]
            found += [Request(**plan["evidence"]) for plan in plans if "evidence" in plan]
        return unique(found)

    def beyond_requests(self) -> list[Request]:
        """All that the notebook needs."""
        p = self.profile
        requests = self.evidence_requests()
        for sp in p.beyond_slice_percentages:
            for point in self.contest(sp):
                requests += [self.slice_request(point), *self._selection(point)]
                requests += [self.perplexity_request(point, text) for text in p.eval_texts]
                requests += [self.task_request(point, task) for task in p.tasks]
        if p.beyond_slice_percentages:
            sp = p.beyond_slice_percentages[-1]
            for point in self.variants(sp):
                requests += [self.slice_request(point), *self._selection(point)]
            for point in self.recovered(sp):
                requests += [self.slice_request(point)]
                requests += [self.perplexity_request(point, text) for text in p.eval_texts]
            dense = self.points()[0]
            requests += [self.perplexity_request(dense, text) for text in p.eval_texts]
            requests += [self.task_request(dense, task) for task in p.tasks]
        return unique(requests)

    def requests(self) -> list[Request]:
        """Everything, each once."""
        return unique([*super().requests(), *self.beyond_requests()])

    def _selection(self, point: Point) -> list[Request]:
        return [] if self.profile.selection_windows is None else [self.selection_request(point)]

    def _at_size(
        self,
        schedule: str,
        slice_percentage: float,
        compensation: dict | None = None,
        note: str = "",
        recovery: dict | None = None,
        **calibration: Any,
    ) -> Point:
        network = {
            "plan": self._within(schedule, slice_percentage),
            "calibration": self._calibration(**calibration),
        }
        if compensation:
            network["compensation"] = compensation
        if recovery:
            network["recovery"] = recovery
        words = [schedule, f"size of SP {percent(slice_percentage)}"]
        words += ["compensated"] if compensation else []
        words += [note] if note else []
        share = slice_percentage
        return Point(schedule, share, share, network, ", ".join(words))

    def _within(self, schedule: str, slice_percentage: float) -> dict:
        """The plan of a schedule that stores no more than constant slicing."""
        budget = self._constant(slice_percentage)
        evidence = {
            "lr": lambda: self.lr_request(),
            "sensitivity": lambda: self.places_request(slice_percentage),
            "search": lambda: self.search_request(slice_percentage),
        }
        if schedule == "constant":
            return budget
        plan = {"schedule": schedule, "budget": budget}
        if schedule in evidence:
            found = evidence[schedule]()
            plan["evidence"] = {"kind": found.kind, "config": found.config}
        return plan

    def _validation(self, windows: int) -> dict:
        """Validation windows of the first text, other ones than those that choose."""
        p = self.profile
        text = self._text(p.eval_texts[0], "validation")
        amounts = {"windows": windows, "window": p.eval_window, "seed": p.seed}
        return {**text, **amounts, "skip": p.selection_windows or 0}
