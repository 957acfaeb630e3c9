"""A profile -> the measurements it needs -> their results; only what is missing is computed."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from dynslice import paths, profile
from dynslice.assets import sha256
from dynslice.errors import RequestError, RunError
from dynslice.profile import Profile
from dynslice.results import Measurement, Result, Store


@dataclass(frozen=True)
class Point:
    """One network of the comparison: dense, or sliced as `plan` (a plan request) says."""

    schedule: str  # dense, constant, dynamic, matched
    slice_percentage: float
    slice_base: float
    plan: dict | None

    @property
    def label(self) -> str:
        """Short name for tables and figures."""
        at = f"SP {self.slice_percentage:.0%}"
        return {
            "dense": "dense",
            "constant": f"constant, {at}",
            "dynamic": f"dynamic, {at}, SB {self.slice_base:.0%}",
            "matched": f"constant, size of dynamic {at}, SB {self.slice_base:.0%}",
        }[self.schedule]


class Study:
    """The measurements of one profile and where their results are kept."""

    def __init__(self, settings: Profile, store: Store, device: str, from_record: bool = False):
        self.profile = settings
        self.store = store
        self.device = device
        self.from_record = from_record

    @classmethod
    def open(
        cls, name: str = "quick", from_record: bool = False, device: str = "auto", **overrides: Any
    ) -> "Study":
        """The study of a profile, measuring for itself or reading the committed record.

        Raises RequestError for an unknown profile, key or value.
        """
        settings = profile.load(name, overrides)
        folder = paths.record if from_record else paths.results
        return cls(settings, Store(folder(settings.name)), device, from_record)

    @classmethod
    def from_notebook(cls, variables: dict[str, Any]) -> "Study":
        """The study that a notebook's parameters ask for.

        variables: the notebook's `globals()` after its parameters cell. Profile keys that are
        None keep the profile's value; text (from `papermill -p`) is read as YAML where the key
        is no string. Raises RequestError for a name that is no parameter.
        """
        plain = (str, int, float, list, dict, type(None))
        given = {
            name: value
            for name, value in variables.items()
            if isinstance(value, plain) and not name.startswith("_") and name not in ("In", "Out")
        }
        fixed = {name: given.pop(name) for name in ("from_record", "device") if name in given}
        chosen = given.pop("profile", "quick")
        overrides = {name: _from_text(name, v) for name, v in given.items() if v is not None}
        return cls.open(chosen, **fixed, **overrides)

    # What the profile asks for

    def lr_request(self, text: str | None = None, last_layer: str | None = None) -> Measurement:
        """LR on one text; the profile's own text by default."""
        p = self.profile
        text = text or p.lr_text
        config = {
            **self._model,
            **_text(text, p.lr_split),
            "max_tokens": p.lr_max_tokens,
            "window": p.lr_window,
            "stride": p.lr_stride,
            "last_layer": last_layer or p.lr_last_layer,
        }
        return Measurement("lr", config)

    def lr_requests(self) -> list[Measurement]:
        """LR on the profile's text, then on those it is compared with."""
        return [self.lr_request(text) for text in [self.profile.lr_text, *self._other_lr_texts]]

    def points(self) -> list[Point]:
        """Dense; per SP constant, and per SB below it dynamic with its constant of equal size."""
        return self._points(self.profile.slice_percentages, self.profile.slice_bases)

    def task_points(self) -> list[Point]:
        """The points on which tasks are run."""
        return self._points(self.profile.task_slice_percentages, self.profile.task_slice_bases)

    def figure_request(self) -> Measurement:
        """The plan that the figure LR -> FS shows."""
        p = self.profile
        plan = self._dynamic(p.figure_slice_percentage, p.figure_slice_base)
        return Measurement("plan", {**self._model, "plan": plan})

    def redundancy_requests(self) -> list[Measurement]:
        """All that the layer redundancy notebook needs."""
        return [*self.lr_requests(), self.figure_request()]

    def slice_request(self, point: Point) -> Measurement:
        """Plan, size and cost of slicing a point."""
        return Measurement("slice", {**self._model, "slice": self._slice(point)})

    def perplexity_request(self, point: Point, text: str) -> Measurement:
        """Perplexity of a point on a text."""
        p = self.profile
        config = {
            **self._model,
            "slice": self._slice(point),
            **_text(text, p.eval_split),
            "windows": p.eval_windows,
            "window": p.eval_window,
            "seed": p.seed,
        }
        return Measurement("ppl", config)

    def task_request(self, point: Point, task: str) -> Measurement:
        """Accuracy of a point on a task."""
        config = {**self._model, "slice": self._slice(point)}
        return Measurement("task", {**config, "task": task, "limit": self.profile.tasks[task]})

    def perplexity_requests(self) -> list[Measurement]:
        """All that the perplexity notebook needs."""
        return [
            request
            for point in self.points()
            for request in (
                self.slice_request(point),
                *(self.perplexity_request(point, text) for text in self.profile.eval_texts),
            )
        ]

    def task_requests(self) -> list[Measurement]:
        """All that the tasks notebook needs."""
        return [
            request
            for point in self.task_points()
            for request in (
                self.slice_request(point),
                *(self.task_request(point, task) for task in self.profile.tasks),
            )
        ]

    def requests(self) -> list[Measurement]:
        """Everything, each once."""
        every = [*self.redundancy_requests(), *self.perplexity_requests(), *self.task_requests()]
        return list({request.key: request for request in every}.values())

    # Getting it

    def missing(self, requests: Iterable[Measurement]) -> list[Measurement]:
        """Those without a usable result."""
        return [request for request in requests if self.store.get(request) is None]

    def ensure(self, requests: list[Measurement]) -> int:
        """Compute what is missing, sliced networks one after the other; how many that were.

        Raises RunError when reading from a record that lacks some.
        """
        missing = self.missing(requests)
        if not missing:
            return 0
        if self.from_record:
            raise RunError(
                f"the record of {self.profile.name!r} lacks {len(missing)} of {len(requests)} "
                "measurements; run without --from-record to measure them"
            )
        from dynslice.measure import Bench  # loads torch, which a rendered report does not need

        bench = Bench(self.profile, self.store, self.device)
        done = 0
        with tqdm(total=len(missing), desc="measurements", unit="measurement") as bar:
            for network, group in _by_network(missing):
                for request in group:
                    bar.set_postfix_str(_describe(request))
                    if self.store.get(request) is None:  # may have come as a prerequisite
                        self.store.put(bench.measure(request, network))
                        done += 1
                    bar.update()
                bench.drop_sliced()
        return done

    def get(self, request: Measurement) -> Result:
        """A result, measured now if need be."""
        self.ensure([request])
        return self.store.get(request)

    @cached_property
    def _model(self) -> dict:
        p = self.profile
        config = {"model": p.model, "revision": p.revision, "dtype": p.dtype}
        if Path(p.model).is_dir():  # what a path holds can change, so its content counts
            config["model_sha256"] = _sha256_of(sorted(Path(p.model).iterdir()))
        return config

    @property
    def _other_lr_texts(self) -> list[str]:
        return [text for text in self.profile.lr_compare_texts if text != self.profile.lr_text]

    def _slice(self, point: Point) -> dict | None:
        if point.plan is None:
            return None
        p = self.profile
        calibration = {
            **_text(p.calibration_text, "train"),
            "windows": p.calibration_windows,
            "window": p.calibration_window,
            "seed": p.seed,
        }
        return {"plan": point.plan, "calibration": calibration}

    def _dynamic(self, slice_percentage: float, slice_base: float) -> dict:
        return {
            "schedule": "dynamic",
            "slice_percentage": slice_percentage,
            "slice_base": slice_base,
            "round_to": self.profile.round_to,
            "lr": self.lr_request().config,
        }

    def _points(self, percentages: list[float], bases: list[float]) -> list[Point]:
        round_to = self.profile.round_to
        points = [Point("dense", 0.0, 0.0, None)]
        for sp in percentages:
            plan = {"schedule": "constant", "slice_percentage": sp, "round_to": round_to}
            points.append(Point("constant", sp, sp, plan))
            for sb in (base for base in bases if base < sp):
                plan = self._dynamic(sp, sb)
                points.append(Point("dynamic", sp, sb, plan))
                points.append(Point("matched", sp, sb, {"schedule": "matched", "to": plan}))
        return points


def _by_network(requests: list[Measurement]) -> list[tuple[dict | None, list[Measurement]]]:
    """Group by sliced network, so that each is made once; the dense model's come first."""
    groups: dict[str, tuple[dict | None, list[Measurement]]] = {}
    for request in sorted(requests, key=lambda r: r.config.get("slice") is not None):
        network = request.config.get("slice")
        key = Measurement("network", {"slice": network}).key
        groups.setdefault(key, (network, []))[1].append(request)
    return list(groups.values())


def _describe(request: Measurement) -> str:
    network = request.config.get("slice")
    plan = (network or request.config).get("plan", {"schedule": "dense"})
    target = plan.get("to", plan)
    amounts = [f"SP {target['slice_percentage']}"] if "slice_percentage" in target else []
    amounts += [f"SB {target['slice_base']}"] if "slice_base" in target else []
    what = request.config.get("task") or request.config.get("text") or ""
    return " ".join([request.kind, what, plan["schedule"], *amounts])


def _text(text: str, split: str | None) -> dict:
    """A text as part of a request: a corpus split by name, a file by its content."""
    config = {"text": text, "split": _split_for(text, split)}
    if Path(text).is_file():
        config["text_sha256"] = _sha256_of([Path(text)])
    return config


def _sha256_of(files: list[Path]) -> str:
    digests = [sha256(path) for path in files if path.is_file()]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _split_for(text: str, split: str | None) -> str | None:
    from dynslice.corpora import CORPORA

    return split if text in CORPORA else None


def _from_text(name: str, value: Any) -> Any:
    field = Profile.model_fields.get(name)
    is_text = field is not None and field.annotation in (str, str | None)
    return profile.parse_value(value, name) if isinstance(value, str) and not is_text else value


def check(settings: Profile) -> None:
    """Refuse a study that cannot run before anything heavy starts. Raises RequestError."""
    from dynslice import corpora, evaluation, models, plan

    for text in {settings.lr_text, *settings.lr_compare_texts}:
        corpora.check(text, _split_for(text, settings.lr_split))
    corpora.check(settings.calibration_text, _split_for(settings.calibration_text, "train"))
    for text in settings.eval_texts:
        corpora.check(text, _split_for(text, settings.eval_split))
        if text == settings.calibration_text and _split_for(text, settings.eval_split) is None:
            raise RequestError(
                f"text {text!r} is a file and would be calibrated on and evaluated on; give "
                "eval_texts a text of its own"
            )
    evaluation.check_tasks(list(settings.tasks))
    config = models.load_config(settings.model, settings.revision)
    models.require_dense(config, "a study")
    shape = plan.Shape.of(config)
    for share in [*settings.slice_percentages, *settings.task_slice_percentages]:
        plan.constant(shape, share, settings.round_to)


__all__ = ["Point", "RequestError", "Study", "check"]
