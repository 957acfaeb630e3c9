"""A profile -> the networks that it compares and the measurements that each notebook needs."""

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from dynslice.core.files import sha256
from dynslice.experiment.profile import Profile, percent
from dynslice.experiment.store import Request, unique


@dataclass(frozen=True)
class Point:
    """One network of the comparison: dense, or sliced.

    network: {"plan": how wide, "calibration": on which windows}, None for the dense model.
    variant: what an ablation changed, empty for the networks of the main comparison.
    """

    schedule: str  # dense, constant, dynamic, matched, shuffled
    slice_percentage: float
    slice_base: float
    network: dict | None
    variant: str = ""

    @property
    def label(self) -> str:
        """Short name for tables and figures."""
        at = f"SP {percent(self.slice_percentage)}"
        under = f"{at}, SB {percent(self.slice_base)}"
        return (
            self.variant
            or {
                "dense": "dense",
                "constant": f"constant, {at}",
                "dynamic": f"dynamic, {under}",
                "matched": f"constant, size of dynamic {under}",
            }[self.schedule]
        )


@dataclass(frozen=True)
class Ablation:
    """One thing changed in one network, everything else as in the main comparison."""

    question: str  # what is varied; equal for the variants of one thing
    point: Point
    texts: tuple[str, ...]


class Design:
    """What a profile asks for, as requests; nothing is measured here."""

    def __init__(self, settings: Profile):
        self.profile = settings

    def lr_request(
        self,
        text: str | None = None,
        last_layer: str | None = None,
        max_tokens: int | None = None,
    ) -> Request:
        """LR on one text; the profile's own text, last layer and length by default."""
        p = self.profile
        config = {
            **self._model,
            **self._text(text or p.lr_text, p.lr_split),
            "max_tokens": max_tokens or p.lr_max_tokens,
            "window": p.lr_window,
            "stride": p.lr_stride,
            "last_layer": last_layer or p.lr_last_layer,
        }
        return Request("lr", config)

    def lr_requests(self) -> list[Request]:
        """LR on the profile's text, then on those it is compared with."""
        return [self.lr_request(text) for text in [self.profile.lr_text, *self._other_lr_texts]]

    def points(self) -> list[Point]:
        """Dense; per SP constant, and per SB below it dynamic with its constant of equal size."""
        return self._points(self.profile.slice_percentages, self.profile.slice_bases)

    def task_points(self) -> list[Point]:
        """The points on which tasks are run."""
        return self._points(self.profile.task_slice_percentages, self.profile.task_slice_bases)

    def figure_request(self) -> Request:
        """The plan that the figure LR -> FS shows."""
        p = self.profile
        plan = self._dynamic(p.figure_slice_percentage, p.figure_slice_base)
        return Request("plan", {**self._model, "plan": plan})

    def lr_plan_requests(self) -> list[Request]:
        """The ablated dynamic plan as LR on each text makes it, in the order of lr_requests."""
        sp, sb = self.profile.ablation_slice_percentage, self.profile.ablation_slice_base
        return [
            Request("plan", {**self._model, "plan": self._dynamic(sp, sb, lr=lr.config)})
            for lr in self.lr_requests()
            if sp is not None
        ]

    def redundancy_requests(self) -> list[Request]:
        """All that the layer redundancy notebook needs."""
        return [*self.lr_requests(), self.figure_request()]

    def slice_request(self, point: Point) -> Request:
        """Plan, size and cost of slicing a point."""
        return Request("slice", {**self._model, "slice": point.network})

    def perplexity_request(self, point: Point, text: str) -> Request:
        """Perplexity of a point on the reported windows of a text."""
        return self._perplexity(point, text, self.profile.eval_split, self.profile.eval_windows)

    def selection_request(self, point: Point) -> Request:
        """Perplexity of a point on the validation windows that choose SB."""
        p = self.profile
        return self._perplexity(point, p.eval_texts[0], "validation", p.selection_windows)

    def calibration_request(self, point: Point) -> Request:
        """Perplexity of a sliced network on its own calibration windows."""
        calibration = point.network["calibration"]
        return Request("ppl", {**self._model, "slice": point.network, **calibration})

    def centred_request(self) -> Request:
        """Perplexity of the dense model with centred embeddings (METHOD, trap 3)."""
        request = self.perplexity_request(self.points()[0], self.profile.eval_texts[0])
        config = {k: v for k, v in request.config.items() if k != "slice"}
        return Request("centred", config)

    def task_request(self, point: Point, task: str) -> Request:
        """Accuracy of a point on a task."""
        p = self.profile
        asked = {"task": task, "limit": p.tasks[task]}
        if p.task_subset != "first":
            asked["subset"] = p.task_subset
            if p.draw_seed:
                asked["draw_seed"] = p.draw_seed
        return Request("task", {**self._model, "slice": point.network, **asked})

    def speed_points(self) -> list[Point]:
        """The networks whose speed is measured beside the dense model's."""
        points = self._points(self.profile.speed_slice_percentages, self.profile.speed_slice_bases)
        return [point for point in points if point.schedule in ("constant", "dynamic")]

    def speed_request(self, point: Point) -> Request:
        """Prefill and decoding of a sliced network."""
        p = self.profile
        config = {
            **self._model,
            "slice": point.network,
            "windows": p.speed_windows,
            "window": p.speed_window,
            "new_tokens": p.speed_new_tokens,
            "repeats": p.speed_repeats,
            "seed": p.seed,
        }
        return Request("speed", config)

    def efficiency_requests(self) -> list[Request]:
        """All that the efficiency notebook needs."""
        requests = [self.lr_request(), *(self.slice_request(point) for point in self.points())]
        for point in self.speed_points():
            requests += [self.slice_request(point), self.speed_request(point)]
        return unique(requests)

    def perplexity_requests(self) -> list[Request]:
        """All that the perplexity notebook needs."""
        requests = []
        for point in self.points():
            requests.append(self.slice_request(point))
            if self.profile.selection_windows is not None:
                requests.append(self.selection_request(point))
            requests += [self.perplexity_request(point, text) for text in self.profile.eval_texts]
        return requests

    def task_requests(self) -> list[Request]:
        """All that the tasks notebook needs."""
        return [
            request
            for point in self.task_points()
            for request in (
                self.slice_request(point),
                *(self.task_request(point, task) for task in self.profile.tasks),
            )
        ]

    def requests(self) -> list[Request]:
        """Everything, each once."""
        every = [*self.redundancy_requests(), *self.perplexity_requests(), *self.task_requests()]
        every += [*self.ablation_requests(), *self.efficiency_requests()]
        return unique(every)

    # The ablations

    def ablated(self) -> list[Point]:
        """Constant, dynamic and its constant of equal size: what the ablations vary."""
        sp, sb = self.profile.ablation_slice_percentage, self.profile.ablation_slice_base
        return [] if sp is None else self._points([sp], [sb])[1:]

    def ablations(self) -> list[Ablation]:
        """Every network that differs from the ablated ones in one thing."""
        if self.profile.ablation_slice_percentage is None:
            return []
        return [*self._plan_ablations(), *self._calibration_ablations()]

    def lr_by_tokens(self) -> list[Request]:
        """LR on growing beginnings of the profile's text, the profile's own length among them."""
        counts = {*self.profile.ablation_lr_tokens, self.profile.lr_max_tokens}
        ordered = sorted(counts, key=lambda count: count or float("inf"))
        return [self.lr_request(max_tokens=count) for count in ordered]

    def sensitivity_request(self) -> Request | None:
        """What cutting each layer alone does to the perplexity; None where nobody asks."""
        p = self.profile
        if p.single_layer_slice is None:
            return None
        config = {
            **self._model,
            "slice_percentage": p.single_layer_slice,
            "round_to": p.round_to,
            "calibration": self._calibration(windows=p.single_layer_calibration_windows),
            **self._text(p.eval_texts[0], "validation"),
            "windows": p.single_layer_eval_windows,
            "window": p.eval_window,
            "seed": p.seed,
        }
        return Request("sensitivity", config)

    def ablation_requests(self) -> list[Request]:
        """All that the ablations notebook needs."""
        requests = [self.lr_request(last_layer=end) for end in self.profile.ablation_last_layers]
        requests += [*self.lr_requests(), *self.lr_plan_requests()]
        requests += self.lr_by_tokens() if self.profile.ablation_lr_tokens else []
        requests += [self.sensitivity_request()] if self.sensitivity_request() else []
        ablations = self.ablations()
        text = self.profile.eval_texts[0]
        for point in self.ablated():
            requests += [self.slice_request(point), self.perplexity_request(point, text)]
        for ablation in ablations:
            requests.append(self.slice_request(ablation.point))
            requests += [self.perplexity_request(ablation.point, t) for t in ablation.texts]
            if ablation.question == "calibration size":
                requests.append(self.calibration_request(ablation.point))
        if ablations:
            requests += self._curve_requests()
            requests += [self.centred_request(), self.calibration_request(self.ablated()[0])]
        return unique(requests)

    def _curve_requests(self) -> list[Request]:
        """The constant networks, between which the constant curve is drawn."""
        constant = [p for p in self.points() if p.schedule in ("constant", "matched")]
        texts = self.profile.eval_texts
        sizes = [self.slice_request(point) for point in constant]
        return sizes + [self.perplexity_request(p, text) for p in constant for text in texts]

    @cached_property
    def _model(self) -> dict:
        p = self.profile
        config = {"model": p.model, "revision": p.model_revision, "dtype": p.dtype}
        if Path(p.model).is_dir():  # what a path holds can change, so its content counts
            config["model_sha256"] = _sha256_of(sorted(Path(p.model).iterdir()))
        return config

    def _text(self, text: str, split: str | None) -> dict:
        """A text as part of a request: a corpus split by name, files by what they hold."""
        from dynslice.inputs.texts import files_of

        source = self.profile.stand_ins.get(text, text)
        config = {"text": text, "split": split_for(source, split)}
        if files := files_of(source, config["split"]):
            config["text_sha256"] = _sha256_of(files)
        if source != text:
            config["stand_in"] = source
        if revision := self.profile.revisions.get(source):
            config["text_revision"] = revision
        return config

    @property
    def _other_lr_texts(self) -> list[str]:
        return [text for text in self.profile.lr_compare_texts if text != self.profile.lr_text]

    def _perplexity(
        self, point: Point, text: str, split: str | None, windows: int | None
    ) -> Request:
        p = self.profile
        config = {
            **self._model,
            "slice": point.network,
            **self._text(text, split),
            "windows": windows,
            "window": p.eval_window,
            "seed": p.seed,
        }
        return Request("ppl", config)

    def _calibration(self, **changes: Any) -> dict:
        p = self.profile
        given = {
            "text": p.calibration_text,
            "windows": p.calibration_windows,
            "window": p.calibration_window,
            "seed": p.seed,
            **changes,
        }
        return {**given, **self._text(given["text"], "train")}

    def _dynamic(self, slice_percentage: float, slice_base: float, **changes: Any) -> dict:
        return {
            "schedule": "dynamic",
            "slice_percentage": slice_percentage,
            "slice_base": slice_base,
            "round_to": self.profile.round_to,
            "lr": self.lr_request().config,
            **changes,
        }

    def _constant(self, slice_percentage: float) -> dict:
        amounts = {"slice_percentage": slice_percentage, "round_to": self.profile.round_to}
        return {"schedule": "constant", **amounts}

    def _points(self, percentages: list[float], bases: list[float]) -> list[Point]:
        calibration = self._calibration()
        points = [Point("dense", 0.0, 0.0, None)]

        def add(schedule: str, sp: float, sb: float, plan: dict) -> None:
            network = {"plan": plan, "calibration": calibration}
            points.append(Point(schedule, sp, sb, network))

        for sp in percentages:
            add("constant", sp, sp, self._constant(sp))
            for sb in (base for base in bases if base < sp):
                plan = self._dynamic(sp, sb)
                add("dynamic", sp, sb, plan)
                add("matched", sp, sb, {"schedule": "matched", "to": plan})
        return points

    def _plan_ablations(self) -> list[Ablation]:
        """The dynamic network with another way to its widths, on the same calibration."""
        p = self.profile
        sp, sb = p.ablation_slice_percentage, p.ablation_slice_base
        constant, dynamic = self._constant(sp), self._dynamic(sp, sb)
        found = []

        def add(question: str, variant: str, schedule: str, plan: dict) -> None:
            network = {"plan": plan, "calibration": self._calibration()}
            point = Point(schedule, sp, sb, network, variant)
            found.append(Ablation(question, point, (p.eval_texts[0],)))

        for end in p.ablation_last_layers:
            lr = self.lr_request(last_layer=end).config
            add("last layer", f"last layer {end}", "dynamic", self._dynamic(sp, sb, lr=lr))
        for score in p.ablation_scores:
            plan = self._dynamic(sp, sb, score=score)
            add("score", f"score {score}", "dynamic", plan)
        for unit in p.ablation_round_to:
            plan = self._dynamic(sp, sb, round_to=unit)
            add("rounding", f"widths rounded to {unit}", "dynamic", plan)
        if p.ablation_embedding:
            own = {"schedule": "embedding", "embedding_slice": sp, "of": dynamic}
            add("embedding", f"dynamic, embedding cut by {percent(sp)}", "dynamic", own)
            whole = {"schedule": "embedding", "embedding_slice": 0.0, "of": constant}
            add("embedding", "constant, embedding whole", "constant", whole)
        for seed in range(p.draw_seed, p.draw_seed + p.ablation_shuffles):
            plan = {"schedule": "shuffled", "of": dynamic, "seed": seed}
            add("shuffled", f"shuffled, draw {seed}", "shuffled", plan)
        return found

    def _calibration_ablations(self) -> list[Ablation]:
        """The same widths with bases from other calibration windows."""
        p = self.profile
        constant, dynamic, matched = self.ablated()
        first = (p.eval_texts[0],)

        def vary(point: Point, variant: str, **changes: Any) -> Point:
            network = {**point.network, "calibration": self._calibration(**changes)}
            return replace(point, network=network, variant=f"{point.label}, {variant}")

        sizes = [
            Ablation("calibration size", vary(constant, f"{count} windows", windows=count), first)
            for count in p.ablation_calibration_windows
        ]
        texts = [
            Ablation(
                "calibration text",
                vary(constant, f"calibrated on {text}", text=text),
                tuple(p.eval_texts),
            )
            for text in p.ablation_calibration_texts
        ]
        seeds = [
            Ablation("calibration seed", vary(point, f"seed {seed}", seed=seed), first)
            for seed in p.ablation_calibration_seeds
            for point in (dynamic, matched)
        ]
        return [*sizes, *texts, *seeds]


def _sha256_of(files: list[Path]) -> str:
    stats = [(path, path.stat()) for path in files if path.is_file()]
    digests = [_digest(path, stat.st_mtime_ns, stat.st_size) for path, stat in stats]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


@lru_cache(maxsize=256)
def _digest(path: Path, _mtime_ns: int, _size: int) -> str:
    """Every request names its texts, whose files may be large: each is read once."""
    return sha256(path)


def split_for(text: str, split: str | None) -> str | None:
    """The split of a corpus or directory; files have none."""
    from dynslice.inputs.texts import has_splits

    return split if has_splits(text) else None
