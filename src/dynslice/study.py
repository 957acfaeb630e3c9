"""A study: the measurements of one profile, and their results; only what is missing is computed."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dynslice import paths, profile
from dynslice.beyond import Beyond
from dynslice.design import split_for
from dynslice.errors import RequestError, RunError
from dynslice.executor import work_off
from dynslice.profile import Profile
from dynslice.results import Measurement, Result, Store


class Study(Beyond):
    """The measurements of one profile and where their results are kept."""

    def __init__(self, settings: Profile, store: Store, device: str, from_record: bool = False):
        super().__init__(settings)
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
        store = Store(folder(settings.name), of_record=from_record)
        return cls(settings, store, device, from_record)

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

    def missing(self, requests: Iterable[Measurement]) -> list[Measurement]:
        """Those without a usable result."""
        return [request for request in requests if self.store.get(request) is None]

    def ensure(
        self, requests: list[Measurement], executor: str = "local", address: str | None = None
    ) -> int:
        """Compute what is missing, here or by Ray; how many measurements that were.

        Raises RunError when reading from a record that lacks some, and at the end when some
        failed; RequestError where Ray is asked for and cannot start.
        """
        missing = self.missing(requests)
        if not missing:
            return 0
        if self.from_record:
            raise RunError(
                f"the record of {self.profile.name!r} lacks {len(missing)} of {len(requests)} "
                "measurements; run without --from-record to measure them"
            )
        return work_off(missing, self.profile, self.store, self.device, executor, address)

    def get(self, request: Measurement) -> Result:
        """A result, measured now if need be."""
        self.ensure([request])
        return self.store.get(request)


def _from_text(name: str, value: Any) -> Any:
    field = Profile.model_fields.get(name)
    is_text = field is not None and field.annotation in (str, str | None) and value != "null"
    return profile.parse_value(value, name) if isinstance(value, str) and not is_text else value


def check(settings: Profile) -> None:
    """Refuse a study that cannot run before anything heavy starts. Raises RequestError."""
    check_settings(settings)
    check_inputs(settings)


def check_settings(settings: Profile) -> None:
    """The part of `check` that takes no time: what the settings say of model, plans and texts."""
    from dynslice import models, plan

    _check_texts(settings)
    config = models.load_config(settings.model, settings.model_revision)
    models.require_dense(config, "a study")
    shape = plan.Shape.of(config)
    shares = [*settings.slice_percentages, *settings.task_slice_percentages]
    shares += [*settings.speed_slice_percentages, settings.figure_slice_percentage]
    shares += [settings.ablation_slice_percentage or 0.0, settings.single_layer_slice or 0.0]
    for share in shares:
        plan.constant(shape, share, settings.round_to)
    models.check_weights(settings.model, settings.model_revision)
    for window in ("lr_window", "calibration_window", "eval_window", "speed_window"):
        models.check_window(config, getattr(settings, window))
    if settings.recovery_steps:
        models.check_window(config, settings.recovery_window)
    for round_to in settings.ablation_round_to:
        plan.constant(shape, settings.ablation_slice_percentage or 0.0, round_to)


def check_inputs(settings: Profile) -> None:
    """The rest of `check`: tasks must be there, and texts hold the windows asked of them."""
    from dynslice import corpora, evaluation, models

    evaluation.check_data(list(settings.tasks))
    longest: dict[tuple, tuple] = {}
    for request in Beyond(settings).requests():
        for config in _texts_of(request.config):
            if "text" in config and "windows" in config:
                count, window = config["windows"], config["window"]
                count = count and count + config.get("skip", 0)
                asked = ((count or 1) * window, window, count)
                text = corpora.source_of(config)
                longest[text] = max(longest.get(text, asked), asked, key=lambda a: a[0])
    tokenizer = models.load_tokenizer(settings.model, settings.model_revision)
    for (text, split, revision), (tokens, window, count) in longest.items():
        stream = corpora.tokens(text, split, tokenizer, tokens, revision=revision)
        corpora.blocks(stream, window, count, text)


def _texts_of(config: dict) -> list[dict]:
    """Whatever a request reads, as configurations that name a text and its windows."""
    network = config.get("slice") or {}
    calibration = network.get("calibration", {})
    recovery = {**calibration, **network["recovery"]} if "recovery" in network else {}
    return [config, config.get("calibration", {}), calibration, recovery]


def _check_texts(settings: Profile) -> None:
    """What is calibrated on, what chooses and what is reported must not share a document."""
    from dynslice import corpora

    def source(text: str, split: str | None) -> tuple[str, str | None]:
        text = settings.stand_ins.get(text, text)
        split = split_for(text, split)
        corpora.check(text, split)
        of_files = bool(corpora.files_of(text, split))
        name = str(Path(text).resolve()) if of_files else text
        return name, corpora.default_split(text, split)

    read = {
        source(text, "train"): "calibrated on"
        for text in (settings.calibration_text, *settings.ablation_calibration_texts)
    }
    for text in (settings.lr_text, *settings.lr_compare_texts):
        read.setdefault(source(text, settings.lr_split), "what LR is measured on")
    if settings.selection_windows is not None:
        chooser = source(settings.eval_texts[0], "validation")
        read.setdefault(
            chooser, f"what selection_windows {settings.selection_windows} choose SB on"
        )
    measured = {"sensitivity", "search"} & set(settings.beyond_schedules)
    if settings.beyond_slice_percentages and measured:
        chooser = source(settings.eval_texts[0], "validation")
        read.setdefault(chooser, "what schedules of notebook 07 are measured on")
    for setting in ("calibration_text", "lr_text"):
        text = getattr(settings, setting)
        if settings.stand_ins.get(text, text) == "wikipedia" and "boolq" in settings.tasks:
            raise RequestError(
                f"{setting} 'wikipedia' holds the passages of task boolq; give {setting} another "
                "text, or leave boolq out of tasks"
            )
    for text in settings.eval_texts:
        if use := read.get(source(text, settings.eval_split)):
            raise RequestError(
                f"text {text!r} with eval_split {settings.eval_split} would be reported, but is "
                f"{use}; give eval_texts a text of its own, or a corpus the eval_split test"
            )
