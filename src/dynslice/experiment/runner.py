"""Taking measurements: with the networks at hand, the current slice, and tokenised texts."""

import time
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dynslice.core import files, paths, tensors
from dynslice.core.errors import RunError, in_one_line
from dynslice.experiment.agenda import name_of
from dynslice.experiment.kinds import KINDS
from dynslice.experiment.making import Made, make
from dynslice.experiment.plan_specs import plan_spec
from dynslice.experiment.profile import Profile
from dynslice.experiment.requests import texts_of
from dynslice.experiment.store import Request, Result, Store, provenance
from dynslice.extensions import neurons
from dynslice.extensions.compensation import Compensation
from dynslice.inputs import models, texts
from dynslice.inputs.windows import first_token, sample_windows, token_stream
from dynslice.method import slicing, streaming
from dynslice.method.architectures import dims_of
from dynslice.method.plan import SlicePlan
from dynslice.method.slicing import Sliced


class Networks:
    """Dense and sliced network by the placement of a profile.

    resident: both are on the device. streamed and spread: one at a time is in memory, and slicing
    reads the dense one from its checkpoint layer by layer; spread lets accelerate place the one
    over all GPUs. Raises RequestError where there is no such model.
    """

    def __init__(self, settings: Profile, device: torch.device):
        self.settings, self.device = settings, device
        self.dtype = tensors.pick_dtype(settings.dtype, device)
        self.resident = settings.placement == "resident"
        self.commit = models.commit_of(settings.model, settings.model_revision)
        self.revision = self.commit or settings.model_revision  # the same to the end of a run
        self.tokenizer = models.load_tokenizer(settings.model, self.revision)
        self.config = models.load_config(settings.model, self.revision)
        self._dense: PreTrainedModel | None = None
        self._files = ExitStack()

    @property
    def dense(self) -> PreTrainedModel:
        """The dense model, loaded when it is not there."""
        if self._dense is None:
            self._dense = self._load(self.settings.model, self.revision)
        return self._dense

    def slice(
        self, windows: Tensor, plan: SlicePlan, compensation: Compensation | None = None
    ) -> Sliced:
        """A slice of the dense model, calibrated on token windows [n, T]."""
        if self.resident:
            return slicing.slice_model(self.dense, windows, plan, compensation)
        self._dense = None
        tensors.free_memory()
        # Its files stay until the next slice: accelerate may read weights from them.
        self._files.close()
        folder = self._files.enter_context(files.scratch(files.room(paths.CACHE / "sliced")))
        budget = streaming.Budget(*self.settings.memory_budgets)
        source = (self.settings.model, windows, plan, self.device, self.dtype, self.revision)
        outcome = models.slice_saved(folder, *source, budget=budget, start=compensation)
        return replace(outcome, model=self._load(str(folder)))

    def _load(self, name: str, revision: str | None = None) -> PreTrainedModel:
        spread = self.settings.placement == "spread"
        return models.load(name, self.device, self.dtype, revision, spread)[0]


class Runner:
    """Takes the measurements of one study, one after the other."""

    def __init__(self, settings: Profile, store: Store, device: str):
        self.store = store
        self.device = tensors.pick_device(device)
        self.networks = Networks(settings, self.device)
        self.dims = dims_of(self.networks.config)
        self._made: dict[str, Made] = {}  # the current one, or none
        self._broken: dict[str, str] = {}  # networks that could not be made, and why
        self._streams: dict[tuple, Tensor] = {}
        self._commits: dict[tuple, str | None] = {}
        self._load_dense()

    def measure(self, request: Request, network: dict | None) -> Result:
        """Take one measurement; `network` is its sliced network, None for the dense model."""
        if self._made and name_of(network) not in self._made:
            self._drop()  # or its memory would count as this measurement's
        self._load_dense(network is None)  # loading is not part of a measurement's time
        if network is not None and request.kind != "slice":
            self.made_for(network)
        tensors.reset_peak_memory(self.device)
        start = time.perf_counter()
        value = KINDS[request.kind].run(self, request.config)
        seconds = round(value.pop("seconds", time.perf_counter() - start), 3)
        peak = tensors.peak_memory_bytes(self.device)
        origin = {**provenance(self.device), **self._hub_commits(request.config)}
        return Result(request.kind, request.config, value, seconds, peak, origin)

    def network(self, config: dict) -> PreTrainedModel:
        """The network of a request: the dense model, or what is made of it."""
        network = config["slice"]
        return self.networks.dense if network is None else self.made_for(network).model

    def made_for(self, network: dict) -> Made:
        """The network that a request names, made unless it is the current one."""
        key = name_of(network)
        if key in self._broken:
            raise RunError(self._broken[key])
        if key not in self._made:
            self._drop()
            try:
                self._made[key] = make(network, self.networks, self.plan, self.windows)
            except Exception as error:  # whatever it is, it would be the same again
                self._broken[key] = in_one_line(error)
                raise
        return self._made[key]

    def plan(self, spec: dict) -> SlicePlan:
        """The plan that a request names; what it rests on is measured unless it is stored."""
        asked = plan_spec(spec)
        if not asked.neurons:
            return asked.make(self.dims, self._value_of)
        left = neurons.narrower(self.networks.config, asked.neurons)
        return asked.make(self.dims, self._value_of, dims_of(left))

    def stream(self, config: dict) -> Tensor:
        """The tokens [n] of the whole text of a request, made once."""
        source = text, split, revision = texts.source_of(config)
        if source not in self._streams:
            tokenizer = self.networks.tokenizer
            self._streams[source] = token_stream(text, split, tokenizer, revision=revision)
        return self._streams[source]

    def windows(self, config: dict) -> Tensor:
        """The token windows [n, T] of a request, or of its calibration."""
        asked = (config[name] for name in ("window", "windows", "seed", "text"))
        return sample_windows(self.stream(config), *asked, first=self.first_token(config))

    def first_token(self, config: dict) -> int | None:
        """What each window of a request starts with."""
        return first_token(self.networks.tokenizer, config.get("bos", "auto"))

    def _load_dense(self, needed: bool = False) -> None:
        if needed or self.networks.resident:
            self.networks.dense  # noqa: B018

    def _drop(self) -> None:
        self._made.clear()
        tensors.free_memory()

    def _value_of(self, request: Request) -> dict:
        if (result := self.store.get(request)) is None:
            result = self.measure(request, None)
            self.store.put(result)
        return result.value

    def _hub_commits(self, config: dict) -> dict:
        """At which commit of the hub the model and the texts of a request were read."""
        commits = {config["model"]: self.networks.commit}
        for text, _, revision in map(texts.source_of, texts_of(config)):
            if (text, revision) not in self._commits:
                self._commits[text, revision] = texts.commit_of(text, revision)
            commits[text] = self._commits[text, revision]
        known = {name: commit for name, commit in commits.items() if commit}
        return {"hub_commits": known} if known else {}
