"""Profiles: everything that a run can be told, as flat keys that --set and papermill override."""

import difflib
import hashlib
import json
import re
import shlex
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    model_validator,
)

from dynslice.core import paths
from dynslice.core.errors import RequestError, removed
from dynslice.evaluate import task_table
from dynslice.extensions.schedules import BEST
from dynslice.inputs.corpora import HUB


def _share(value: float) -> float:
    if not 0 <= value < 1:
        raise ValueError(f"slice share {value} is outside 0 to 1")
    return value


_Count = Annotated[int, Field(ge=1)]
_Tokens = Annotated[int, Field(ge=2)]  # one predicts the other
_Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what every random generator takes
_Share = Annotated[float, AfterValidator(_share)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Split = Literal["train", "validation", "test"]
_End = Literal["raw", "normed"]

# Schedules of equal size (see `extensions.schedules`), and how many layers share a basis.
_AtSize = Literal["constant", "lr", "entropic", "first", "embedding"]
_Layers = _Count | Literal["all"]
_Dropped = Literal["at once", "at once, mapped", "one by one", "one by one, mapped"]


class Profile(BaseModel):
    """The parameters of a study. Shares are of the hidden size, windows and strides in tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str
    description: str
    model: str  # embedded:NAME, a directory, or a hub id
    revision: str | None = None  # of a hub model
    model_hint: str = ""  # what to do where the hub does not give the model
    models: list[str] = []  # run the profile once for each, in folders of their own
    next_to: list[str] = []  # other profiles, whose records notebook 08 shows too
    revisions: dict[str, str] = {}  # hub model or corpus: branch, tag or commit
    stand_ins: dict[str, str] = {}  # corpus: file, directory or corpus that is read in its place
    # Dense and sliced network on the device at once; or one network at a time, sliced layer by
    # layer from its checkpoint; or this, spread over all GPUs.
    placement: Literal["resident", "streamed", "spread"] = "resident"
    device_memory_gib: _Positive | None = None  # of streamed slicing
    host_memory_gib: _Positive | None = None  # of streamed slicing
    dtype: Literal["float32", "bfloat16", "float16"]
    seed: _Seed  # samples the calibration and evaluation windows
    draw_seed: _Seed = 0  # samples the items of a stratified subset, and the shuffles

    # Whether each window starts with the start-of-sequence token: `auto` where the tokenizer puts
    # one before a text.
    bos: Literal["auto", "always", "never"] = "auto"

    slice_percentages: list[_Share] = Field(min_length=1)  # SP: constant and dynamic
    slice_bases: list[_Share]  # SB of the dynamic plans, where below SP
    untie: bool = False  # a table for each of embedding and head, as published, where dense has one
    round_to: _Count  # widths are multiples of this

    lr_text: str  # whose LR makes the dynamic plans
    lr_split: _Split | None
    lr_max_tokens: _Tokens | None
    lr_window: _Tokens
    lr_stride: _Count
    lr_last_layer: _End
    lr_compare_texts: list[str]  # further texts for LR by corpus

    calibration_text: str
    calibration_windows: _Count
    calibration_window: _Tokens

    eval_texts: list[str] = Field(min_length=1)
    eval_split: _Split | None
    eval_windows: _Count | None  # null takes the whole split
    eval_window: _Tokens
    selection_windows: _Count | None  # of validation, first text, choose SB; null: no choice

    tasks: dict[str, _Count | None]  # task: limit of items (for MMLU per subject), null: all
    # Which items a limit takes; stratified: a limit of mmlu is for all subjects.
    task_subset: Literal["first", "stratified"]
    task_slice_percentages: list[_Share]
    task_slice_bases: list[_Share]

    speed_slice_percentages: list[_Share]  # SP of notebook 05's throughput
    speed_slice_bases: list[_Share]  # SB of its dynamic networks
    speed_windows: _Count  # of one prefill
    speed_window: int = Field(ge=32)  # tokens of each, the first 32 are the prompt
    speed_new_tokens: _Count  # decoded at batch 1
    speed_repeats: _Count  # timed, after one that is not

    figure_slice_percentage: float = Field(ge=0, lt=1)  # SP of the LR -> FS figure
    figure_slice_base: float = Field(ge=0, lt=1)  # SB of the LR -> FS figure

    ablation_slice_percentage: _Share | None  # SP of notebook 04; null: none
    ablation_slice_base: _Share  # SB of notebook 04's dynamic network
    ablation_last_layers: list[_End]  # LR of other ends
    ablation_scores: list[Literal["cosine", "angular", "update"]]  # other than the cosine
    ablation_round_to: list[_Count]  # other roundings of the widths
    ablation_embedding: bool  # embedding width apart from layer 0's
    ablation_shuffles: int = Field(ge=0, le=1000)  # random orders of the same widths
    ablation_calibration_windows: list[_Count]  # other calibration sizes
    ablation_calibration_texts: list[str]  # other calibration texts
    ablation_calibration_seeds: list[_Seed]  # other than the profile's
    ablation_lr_tokens: list[_Tokens]  # other lengths of the LR text
    single_layer_slice: _Share | None  # cut from one layer; null: none
    single_layer_calibration_windows: _Count
    single_layer_eval_windows: _Count

    # Notebook 07: at the sizes of constant slicing at these, one lever after the other.
    beyond_slice_percentages: list[_Share] = []
    beyond_basis_layers: _Layers = BEST["basis_layers"]  # layers that share a basis
    beyond_tasks: bool = True  # at the sizes of task_slice_percentages; not at others
    beyond_plain: bool = False  # also ordinary checkpoints, at the last size as published
    beyond_calibration_seeds: list[_Seed] = []  # other draws of its ends, at the same sizes
    # By validation windows only, at the last of the sizes:
    beyond_basis_layers_tried: list[_Layers] = []
    beyond_candidates: list[_AtSize] = []  # schedules, on shared bases
    beyond_slice_bases: list[_Share] = []  # SB above 0
    beyond_shuffles: int = Field(default=0, ge=0, le=1000)  # orders of widths after layer 0
    beyond_ridges: list[_Positive] = []  # fixed ones
    beyond_calibration_windows: list[_Count] = []
    recovery_steps: int = Field(default=0, ge=0)  # of LoRA, one calibration window each; 0: none
    recovery_windows: _Count = 16  # that are sampled again and again
    recovery_window: _Tokens = 1024

    sound_tokens: int = Field(default=0, ge=0)  # that networks write after a beginning; 0: none
    sound_prompt: _Tokens = 32  # tokens of the beginning

    # Notebook 09: what else stores as little as constant slicing at these; [] asks for none of it.
    instead_slice_percentages: list[_Share] = []
    instead_layers: list[_Dropped] = [*get_args(_Dropped)]  # how layers go; tasks: the last
    instead_neurons: list[_Share] = []  # shares of the neurons that go before the recipe
    instead_bits: bool = False  # the dense model at 8 and 4 bits
    instead_int8_slice_percentages: list[_Share] = []  # sizes of the recipe, where instead_bits
    # At the last of the sizes:
    instead_tasks: bool = True
    instead_learning_rates: list[_Positive] = []  # of LoRA, where recovery_steps asks for it

    @model_validator(mode="after")
    def _fits_together(self) -> "Profile":
        task_table.check_names(self.tasks)
        parts = self.name.split("/")
        if not all(re.fullmatch(r"[\w.,=+-]+", part) and part.strip(".") for part in parts):
            raise ValueError(
                f"name {self.name!r} becomes a folder: use letters, digits and any of . , = + _ -"
            )
        for key, values in self:
            if isinstance(values, list) and len(set(values)) < len(values):
                raise ValueError(f"{key} {values} names something twice: leave one of them")
            if key not in ("description", "model_hint") and '""' in json.dumps(
                values
            ):  # however deep it lies
                raise ValueError(f"{key} {values!r} has an empty name: give one, or leave it out")
        self._check_names()
        if self.placement != "resident" and self.speed_slice_percentages:
            raise ValueError(
                f"placement {self.placement} holds one network at a time, and "
                "speed_slice_percentages asks for two: use placement resident, or []"
            )
        if self.placement == "resident" and (self.device_memory_gib or self.host_memory_gib):
            raise ValueError(
                "device_memory_gib and host_memory_gib are budgets of placement streamed or spread"
            )
        for key, known in (  # what only validation windows are to see is not compared anyway
            ("beyond_candidates", {BEST["schedule"]}),
            ("beyond_basis_layers_tried", {self.beyond_basis_layers}),
            ("beyond_slice_bases", {0.0}),
            ("beyond_calibration_seeds", {self.seed}),
            ("beyond_calibration_windows", {self.calibration_windows}),
        ):
            values = getattr(self, key)
            if both := known & set(values):
                raise ValueError(f"{key} {values} names {both.pop()}, which is compared anyway")
        if self.placement != "resident" and self.instead_slice_percentages:
            raise ValueError(
                f"placement {self.placement} has no dense model in memory, which "
                "instead_slice_percentages needs: use placement resident, or []"
            )
        if self.figure_slice_base > self.figure_slice_percentage:
            raise ValueError("figure_slice_base exceeds figure_slice_percentage")
        if self.ablation_slice_base >= (self.ablation_slice_percentage or 1):
            raise ValueError("ablation_slice_base is not below ablation_slice_percentage")
        return self

    def _check_names(self) -> None:
        """What stands in for or has a revision must be something that the profile can read."""
        texts = {self.lr_text, *self.lr_compare_texts, self.calibration_text, *self.eval_texts}
        texts |= {*self.ablation_calibration_texts, *HUB}
        known = {"stand_ins": texts, "revisions": {*HUB, *self.models, self.model}}
        for key, names in known.items():
            for name in (name for name in getattr(self, key) if name not in names):
                near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
                raise ValueError(f"{key} of {name!r}, which is not read; did you mean {near!r}")
        if len(set(map(_folder_of, self.models))) < len(self.models):
            raise ValueError(f"models {self.models} would share a folder: rename one of them")

    # Set by `load`. A changed profile has pages of its own, and the results of the one it changes.
    _changes: dict[str, Any] = PrivateAttr(default_factory=dict)
    _source: str = PrivateAttr(default="")  # what --profile names
    _stored_as: str = PrivateAttr(default="")

    @property
    def stored_as(self) -> str:
        """What the folders of its results and of its record are called."""
        return self._stored_as or self.name

    @property
    def command(self) -> str:
        """What reproduces it."""
        words = ["./run_all.sh", "--profile", self._source or self.folder]
        for key, value in sorted(self._changes.items()):
            words += ["--set", f"{key}={_as_yaml(value)}"]
        return shlex.join(words)

    @property
    def folder(self) -> str:
        """Where what is written about all of its models goes; `name` is one model's."""
        return self.name.partition("/")[0]

    @property
    def model_revision(self) -> str | None:
        """The revision that is asked of the model."""
        return self.revision or self.revisions.get(self.model)

    @property
    def memory_budgets(self) -> tuple[int | None, int | None]:
        """Bytes that streamed slicing may take of the device and of the host; None: no limit."""
        given = self.device_memory_gib, self.host_memory_gib
        return tuple(None if gib is None else int(gib * 2**30) for gib in given)


def load(name: str, overrides: dict[str, Any] | None = None) -> Profile:
    """A profile by name or file, some keys replaced. Raises RequestError naming the mistake."""
    is_file = name.lower().endswith((".yaml", ".yml"))
    path = Path(name) if is_file else paths.PROFILES / f"{name}.yaml"
    if not path.is_file():
        have = ", ".join(sorted(p.stem for p in paths.PROFILES.glob("*.yaml")))
        raise RequestError(f"profile {name!r} is unknown; there are {have}, or give a YAML file")
    if path.parent != paths.PROFILES and (paths.PROFILES / f"{path.stem}.yaml").is_file():
        raise RequestError(
            f"profile file {name!r} has the name of a built-in profile, whose results it would "
            "mix with; rename it"
        )
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RequestError(f"profile {name!r} is not YAML ({error}); fix the file") from error
    if not isinstance(values, dict):
        raise RequestError(f"profile {name!r} holds no keys; start from a copy of quick.yaml")
    written = {"name": path.stem, **values}
    values = {**written, **(overrides or {})}
    for key in values:
        _check_key(key)
    models = values["models"] if isinstance(values.get("models"), list) else []
    changes = _changed(written, values, models)
    others = {other.stem for other in paths.PROFILES.glob("*.yaml") if other != path}
    taken = {*others, written["name"]} if changes and "name" in (overrides or {}) else others
    stored_as = str(values["name"])
    if stored_as.partition("/")[0] in taken:
        raise RequestError(
            f"name {stored_as!r} is that of a profile without these changes; leave name out, or "
            "give another one"
        )
    if changes and "name" not in changes:
        values["name"] = f"{stored_as}+{_short(changes)}"
    if models:
        one = _folder_of(str(values.setdefault("model", models[0])))
        values["name"], stored_as = f"{values['name']}/{one}", f"{stored_as}/{one}"
    try:
        profile = Profile(**values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "profile"
        if first["type"] == "missing":
            raise RequestError(f"profile {name!r} has no {where}; add it") from error
        reason = first["msg"].removeprefix("Value error, ")
        value = f", {where} = {first['input']!r}" if first["loc"] else ""
        raise RequestError(f"profile {name!r}{value}: {reason}{removed(value)}") from error
    profile._changes, profile._source, profile._stored_as = changes, name, stored_as
    return profile


def _changed(written: dict, values: dict, models: list) -> dict[str, Any]:
    """The values that a profile file does not say; each of its models has a folder anyway."""
    plain = {key: field.default for key, field in Profile.model_fields.items()} | written
    changes = {key: value for key, value in values.items() if value != plain[key]}
    if changes.get("model") in models:
        del changes["model"]
    return changes


def _as_yaml(value: Any) -> str:
    """A value in one line, as --set reads it."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n").strip()


def _short(changes: dict[str, Any]) -> str:
    """Changes as a part of a folder's name: `seed=1+slice_bases=0.0,0.1`."""
    said = "+".join(f"{key}={_as_yaml(value)}" for key, value in sorted(changes.items()))
    short = re.sub(r"[^\w.,=+-]+", "-", re.sub(r"[][{}' ]", "", said)).strip("-")
    if len(short) > 80 or "-" in short:  # cut, or two changes could read alike
        short = f"{short[:70]}-{hashlib.sha256(said.encode()).hexdigest()[:6]}"
    return short


def _folder_of(model: str) -> str:
    return model.rstrip("/").rpartition("/")[2].removeprefix("embedded:")


def parse_overrides(pairs: list[str]) -> dict[str, Any]:
    """`key=value` strings -> overrides; values are YAML. Raises RequestError for a bad pair."""
    overrides = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise RequestError(f"--set {pair!r} is not of the form key=value")
        _check_key(key)
        overrides[key] = parse_value(text, key)
    return overrides


def parse_value(text: str, key: str) -> Any:
    """A value given as text, read as YAML; where a key takes text, 7 and true are text too."""
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # of dates and long numbers too
        if not is_text(key):
            raise RequestError(f"value {text!r} of {key} is not YAML; quote it") from error
        value = text
    return text if is_text(key) and not isinstance(value, str | None) else value


def is_text(key: str) -> bool:
    """Whether a parameter of a notebook, or a profile key, takes text."""
    field = Profile.model_fields.get(key)
    return key in ("profile", "device") or getattr(field, "annotation", None) in (str, str | None)


def _check_key(key: Any) -> None:  # YAML has keys of other types too
    if key not in Profile.model_fields:
        near = difflib.get_close_matches(str(key), Profile.model_fields, n=1, cutoff=0.0)[0]
        instead = removed(str(key)) or f"; the nearest valid name is {near!r}"
        raise RequestError(f"profile key {key!r} is unknown{instead}")


def percent(share: float) -> str:
    """A share that a profile asks for as text: 25%, 12.5%; two that differ read differently."""
    return f"{100 * share:.4g}%"


def by_model(profile: str, overrides: dict[str, Any]) -> list[dict[str, Any]]:
    """The overrides of each run that a profile asks for: one for each of its models."""
    models = load(profile, overrides).models
    if "model" in overrides or not models:
        return [overrides]
    return [{**overrides, "model": model} for model in models]
