"""The networks that a profile compares, and the measurements that notebooks need of them."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dynslice.core.files import content_sha256
from dynslice.experiment.plan_specs import AS_DENSE, Constant, Dynamic, Matched, PlanSpec
from dynslice.experiment.profile import Profile, percent
from dynslice.experiment.store import Request, unique
from dynslice.inputs.texts import files_of, has_splits


@dataclass(frozen=True)
class Point:
    """One network of the comparison: dense, or sliced."""

    schedule: str  # dense, constant, dynamic, matched, shuffled
    slice_percentage: float
    slice_base: float
    network: dict | None  # {"plan": how wide, "calibration": on which windows}; None for dense
    variant: str = ""  # what an ablation changed, empty in the main comparison

    @property
    def label(self) -> str:
        """Short name for tables and figures."""
        at = f"SP {percent(self.slice_percentage)}"
        under = f"{at}, SB {percent(self.slice_base)}"
        names = {
            "dense": "dense",
            "constant": f"constant, {at}",
            "dynamic": f"dynamic, {under}",
            "matched": f"constant, size of dynamic {under}",
        }
        return self.variant or names[self.schedule]

    @property
    def name(self) -> str:
        """The label without the size that several networks share."""
        return ", ".join(x for x in self.label.split(", ") if not x.startswith("size of SP"))


DENSE = Point("dense", 0.0, 0.0, None)


class Design:
    """The main comparison of a profile, as requests; nothing is measured here."""

    def __init__(self, settings: Profile):
        self.profile = settings
        self.layout = None if settings.untie else AS_DENSE

    def points(self) -> list[Point]:
        """The networks of the comparison."""
        return self.points_at(self.profile.slice_percentages, self.profile.slice_bases)

    def task_points(self) -> list[Point]:
        """The networks on which tasks are run."""
        return self.points_at(self.profile.task_slice_percentages, self.profile.task_slice_bases)

    def speed_points(self) -> list[Point]:
        """The networks whose speed is measured, each next to the dense model."""
        p = self.profile
        points = self.points_at(p.speed_slice_percentages, p.speed_slice_bases)
        return [point for point in points if point.schedule in ("constant", "dynamic")]

    def points_at(self, percentages: list[float], bases: list[float]) -> list[Point]:
        """Dense; per SP constant, and per SB below it dynamic with its constant of equal size."""
        plans: list[PlanSpec] = []
        for sp in percentages:
            plans.append(self.constant(sp))
            for sb in (base for base in bases if base < sp):
                plans += [dynamic := self.dynamic(sp, sb), Matched(dynamic)]
        return [DENSE, *map(self.point, plans)]

    def point(
        self, plan: PlanSpec, variant: str = "", schedule: str | None = None, **calibration: Any
    ) -> Point:
        """The network of a plan; calibration: what differs from the profile's."""
        sp = plan.target.slice_percentage
        base = getattr(plan.target, "slice_base", sp)
        network = {"plan": plan.to_dict(), "calibration": self.calibration(**calibration)}
        return Point(schedule or plan.schedule, sp, base, network, variant)

    def constant(self, slice_percentage: float) -> Constant:
        """The constant plan of a slice percentage."""
        return Constant(slice_percentage, self.profile.round_to, self.layout)

    def dynamic(self, slice_percentage: float, slice_base: float, **changes: Any) -> Dynamic:
        """The dynamic plan by the profile's own LR, unless `changes` says otherwise."""
        given = {"round_to": self.profile.round_to, "lr": self.lr_request().config}
        return Dynamic(slice_percentage, slice_base, **given | {"layout": self.layout} | changes)

    def calibration(self, **changes: Any) -> dict:
        """The calibration windows of the profile, some of it changed."""
        p = self.profile
        given = {name: getattr(p, f"calibration_{name}") for name in ("text", "windows", "window")}
        given = {**given, "seed": p.seed, **changes}
        return {**given, **self.text(given["text"], "train")}

    def windows(self, text: str, split: str | None, count: int | None) -> dict:
        """Windows of a text on which a network is evaluated."""
        amounts = {"windows": count, "window": self.profile.eval_window, "seed": self.profile.seed}
        return {**self.text(text, split), **amounts}

    def text(self, text: str, split: str | None) -> dict:
        """A text as part of a request: a corpus split by name, files by what they hold."""
        source = self.profile.stand_ins.get(text, text)
        config = {"text": text, "split": split_for(source, split)}
        if files := files_of(source, config["split"]):
            config["text_sha256"] = _sha256_of(files)
        if source != text:
            config["stand_in"] = source
        if revision := self.profile.revisions.get(source):
            config["text_revision"] = revision
        if self.profile.bos != "auto":
            config["bos"] = self.profile.bos
        return config

    def request(self, kind: str, **config: Any) -> Request:
        """A request of a kind, of the profile's model."""
        return Request(kind, {**self._model, **config})

    @cached_property
    def _model(self) -> dict:
        p = self.profile
        config = {"model": p.model, "revision": p.model_revision, "dtype": p.dtype}
        path = Path(p.model)  # what a path holds can change, so its content counts
        if path.is_dir() or path.is_file():
            holds = sorted(path.iterdir()) if path.is_dir() else [path]
            config["model_sha256"] = _sha256_of(holds)
        return config

    def lr_request(
        self, text: str | None = None, last_layer: str | None = None, max_tokens: int | None = None
    ) -> Request:
        """LR on one text; the profile's own text, last layer and length by default."""
        p = self.profile
        return self.request(
            "lr",
            **self.text(text or p.lr_text, p.lr_split),
            max_tokens=max_tokens or p.lr_max_tokens,
            window=p.lr_window,
            stride=p.lr_stride,
            last_layer=last_layer or p.lr_last_layer,
        )

    def lr_requests(self) -> list[Request]:
        """LR on the profile's text, then on those it is compared with."""
        texts = (self.profile.lr_text, *self.profile.lr_compare_texts)
        return [self.lr_request(text) for text in dict.fromkeys(texts)]

    def plan_request(self, plan: PlanSpec) -> Request:
        """The widths of a plan, without a network."""
        return self.request("plan", plan=plan.to_dict())

    def figure_request(self) -> Request:
        """The plan that the figure LR -> FS shows."""
        p = self.profile
        return self.plan_request(self.dynamic(p.figure_slice_percentage, p.figure_slice_base))

    def slice_request(self, point: Point) -> Request:
        """Plan, size and cost of slicing a point."""
        return self.request("slice", slice=point.network)

    def perplexity_request(self, point: Point, text: str) -> Request:
        """Perplexity of a point on the reported windows of a text."""
        p = self.profile
        read = self.windows(text, p.eval_split, p.eval_windows)
        return self.request("ppl", slice=point.network, **read)

    def selection_request(self, point: Point) -> Request:
        """Perplexity of a point on the validation windows that choose SB."""
        p = self.profile
        read = self.windows(p.eval_texts[0], "validation", p.selection_windows)
        return self.request("ppl", slice=point.network, **read)

    def task_request(self, point: Point, task: str) -> Request:
        """Accuracy of a point on a task."""
        p, asked = self.profile, {"task": task, "limit": self.profile.tasks[task]}
        if p.task_subset != "first":
            asked |= {"subset": p.task_subset} | ({"draw_seed": p.draw_seed} if p.draw_seed else {})
        return self.request("task", slice=point.network, **asked)

    def speed_request(self, point: Point) -> Request:
        """Prefill and decoding of a sliced network."""
        names = ("windows", "window", "new_tokens", "repeats")
        amounts = {name: getattr(self.profile, f"speed_{name}") for name in names}
        return self.request("speed", slice=point.network, seed=self.profile.seed, **amounts)

    def redundancy_requests(self) -> list[Request]:
        """All that the layer redundancy notebook needs."""
        return [*self.lr_requests(), self.figure_request()]

    def perplexity_requests(self) -> list[Request]:
        """All that the perplexity notebook needs."""
        asked = (self.candidate_requests, self.reported_requests)
        return [r for point in self.points() for ask in asked for r in ask(point)]

    def task_requests(self) -> list[Request]:
        """All that the tasks notebook needs."""
        points = [(self.slice_request(p), *self.accuracy_requests(p)) for p in self.task_points()]
        return [request for requests in points for request in requests]

    def efficiency_requests(self) -> list[Request]:
        """All that the efficiency notebook needs."""
        requests = [self.lr_request(), *map(self.slice_request, self.points())]
        for point in self.speed_points():
            requests += [self.slice_request(point), self.speed_request(point)]
        return unique(requests)

    def reported_requests(self, point: Point) -> list[Request]:
        """Perplexity of a point on every text that is reported."""
        return [self.perplexity_request(point, text) for text in self.profile.eval_texts]

    def accuracy_requests(self, point: Point) -> list[Request]:
        """Accuracy of a point on every task."""
        return [self.task_request(point, task) for task in self.profile.tasks]

    def candidate_requests(self, point: Point) -> list[Request]:
        """Size of a point, and its perplexity on the windows that choose if there are such."""
        chosen = self.profile.selection_windows is not None
        return [self.slice_request(point), *([self.selection_request(point)] if chosen else [])]


def texts_of(config: dict) -> list[dict]:
    """Whatever a request reads, as configurations that name a text and its windows."""
    network = config.get("slice") or {}
    calibration = network.get("calibration", {})
    read = [config, config.get("calibration", {}), calibration]
    read += [{**calibration, **network["recovery"]}] if "recovery" in network else []
    return [part for part in read if "text" in part]


def _sha256_of(files: list[Path]) -> str:
    digests = [content_sha256(path) for path in files if path.is_file()]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def split_for(text: str, split: str | None) -> str | None:
    """The split of a corpus or directory; files have none."""
    return split if has_splits(text) else None
