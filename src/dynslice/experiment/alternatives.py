"""What notebook 09 compares: slicing with what a user would pick instead, at equal stored bytes."""

from dataclasses import replace

from dynslice.experiment.equal_size import SLICEGPT, EqualSize
from dynslice.experiment.plan_specs import plan_spec
from dynslice.experiment.profile import percent
from dynslice.experiment.requests import DENSE, Design, Point
from dynslice.experiment.store import Request, unique

RECIPE, NEURONS, INT8, INT4 = "best recipe", "fewer neurons", "int8", "int4"
SLICEGPT_RATE = 3e-4  # of LoRA there, and by default here


class Alternatives:
    """The part of a profile that asks what slicing is worth, as requests.

    A size is what constant slicing stores at a slice percentage, as in notebook 07; fewer bits have
    sizes of their own, and a slice at 8 bits is made as small as the dense model at 4.
    """

    def __init__(self, design: Design, beyond: EqualSize):
        self.design, self.beyond, self.profile = design, beyond, design.profile

    @property
    def sizes(self) -> list[float]:
        """The slice percentages whose sizes are compared."""
        return self.profile.instead_slice_percentages

    def at_size(self, slice_percentage: float) -> list[Point]:
        """SliceGPT, the best recipe, and what else stores no more, before any fine-tuning."""
        sp = slice_percentage
        recipe = self.beyond.recipe(sp)
        found = [self.beyond.slicegpt(sp), self._named(recipe, RECIPE)]
        for how in self.profile.instead_layers:
            settings = {"one_by_one": True} if "one by one" in how else {}
            settings |= {"mapped": True} if "mapped" in how else {}
            found.append(self._instead(sp, f"fewer layers, {how}", method="layers", **settings))
        found.append(self._instead(sp, NEURONS, method="neurons"))
        return found + [self._both(recipe, share) for share in self.profile.instead_neurons]

    def recovered(self, slice_percentage: float) -> list[list[Point]]:
        """The contenders of the last size after LoRA: one network for each learning rate."""
        if not self.profile.recovery_steps:
            return []
        rates, points = self.profile.instead_learning_rates, self.finalists(slice_percentage)
        return [[self._with_lora(point, rate) for rate in rates] for point in points if rates]

    def rounded(self) -> list[Point]:
        """The dense model at 8 and 4 bits, and with both, by what layers get which."""
        if not self.profile.instead_bits:
            return []
        found = [self._at_bits(said, {"uniform": int(said[3:])}) for said in (INT8, INT4)]
        for by, said in (("lr", "by LR"), ("overlap", "by token overlap")):
            asked = {"by": by, "share": 0.5}
            found.append(self._at_bits(f"half of the layers at int4, {said}", asked))
        return found

    def sliced_and_rounded(self) -> list[Point]:
        """The best recipe at 8 bits, of the sizes that the profile names."""
        if not self.profile.instead_bits:
            return []
        return [
            self._named(self.beyond.recipe(sp), said, {"bits": {"uniform": 8}})
            for sp in self.profile.instead_int8_slice_percentages
            for said in [f"{RECIPE}, int8, SP {percent(sp)}"]
        ]

    def finalists(self, slice_percentage: float) -> list[Point]:
        """At the last size, those that run tasks, are timed and fine-tuned; elsewhere none."""
        if slice_percentage != self.sizes[-1]:
            return []
        layers = [f"fewer layers, {how}" for how in self.profile.instead_layers[-1:]]
        wanted = (SLICEGPT, RECIPE, *layers, NEURONS)
        return [point for point in self.at_size(slice_percentage) if point.name in wanted]

    def every(self) -> list[Point]:
        """All networks."""
        found = [DENSE] * bool(self.sizes)
        for sp in self.sizes:
            found += [*self.at_size(sp), *(p for rates in self.recovered(sp) for p in rates)]
        return found + ([*self.rounded(), *self.sliced_and_rounded()] if self.sizes else [])

    def requests(self) -> list[Request]:
        """All that the notebook needs."""
        design, requests = self.design, []
        for point in self.every():
            if point.network and "plan" in point.network:
                requests += plan_spec(point.network["plan"]).needs()
            requests += [*design.candidate_requests(point), *design.reported_requests(point)]
        for point in self.tasked():
            requests += design.accuracy_requests(point)
        for point in (p for sp in self.sizes for p in self.finalists(sp)):
            requests += self.beyond.speed_requests(point)
        return unique(requests)

    def tasked(self) -> list[Point]:
        """The networks that run tasks, if the profile runs tasks on any here."""
        if not (self.sizes and self.profile.instead_tasks):
            return []
        return [DENSE, *self.finalists(self.sizes[-1]), *self.rounded()[:2]]

    def _instead(self, sp: float, said: str, **method: str | bool) -> Point:
        budget = self.beyond.budget(sp).to_dict()
        network = {"method": method, "budget": budget, "calibration": self.design.calibration()}
        return self._named(Point("instead", sp, sp, network), said)

    def _both(self, recipe: Point, share: float) -> Point:
        """The best recipe after a share of the neurons has gone, within the same size."""
        plan = replace(plan_spec(recipe.network["plan"]), neurons=share)
        network = {**recipe.network, "plan": plan.to_dict()}
        said = f"{RECIPE} and {percent(share)} fewer neurons"
        return self._named(replace(recipe, network=network), said)

    def _with_lora(self, point: Point, rate: float) -> Point:
        """The rate of SliceGPT is part of no request, as in notebook 07."""
        note = f"{point.name}, LoRA at {rate:g}"
        return self.beyond.with_lora(point, note, None if rate == SLICEGPT_RATE else rate)

    def _at_bits(self, said: str, bits: dict) -> Point:
        network = {"bits": bits, "calibration": self.design.calibration()}
        return Point("instead", 0.0, 0.0, network, said)

    def _named(self, point: Point, said: str, more: dict | None = None) -> Point:
        where = f"size of SP {percent(point.slice_percentage)}"
        network = {**point.network, **(more or {})}
        return replace(point, network=network, variant=f"{said}, {where}")
