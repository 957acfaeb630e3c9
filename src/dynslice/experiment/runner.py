"""Taking one measurement: the loaded model, the current slice of it, the tokenised texts."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from importlib import metadata

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from dynslice.core import files, paths
from dynslice.core.errors import RequestError, RunError, in_one_line
from dynslice.core.tensors import (
    free_memory,
    peak_memory_bytes,
    pick_device,
    pick_dtype,
    reset_peak_memory,
)
from dynslice.evaluate import harness, perplexity, place_losses, speed
from dynslice.experiment.profile import Profile
from dynslice.experiment.store import Request, Result, Store, provenance
from dynslice.extensions import schedules
from dynslice.extensions.compensation import Compensation
from dynslice.inputs import models, texts
from dynslice.inputs.windows import sample_windows, sliding_windows, token_stream
from dynslice.method import redundancy, slicing, streaming
from dynslice.method.architectures import dims_of
from dynslice.method.controls import matched, shuffled, single, with_embedding
from dynslice.method.plan import ModelDims, SlicePlan, constant, dynamic, of_places
from dynslice.method.scores import rises, scores_of
from dynslice.method.slicing import Sliced


class Runner:
    """The loaded model, the current slice of it, and the texts already tokenised."""

    def __init__(self, settings: Profile, store: Store, device: str):
        self.settings = settings
        self.store = store
        self.device = pick_device(device)
        self.networks = Networks(settings, self.device)
        self.sliced: tuple[str, Sliced] | None = None
        self._broken: dict[str, str] = {}  # networks that could not be sliced, and why
        self._streams: dict[tuple, Tensor] = {}
        self._commits: dict[tuple, str | None] = {}

    def prepare(self) -> None:
        """Load what every measurement needs. Raises RequestError where there is no such model."""
        self.networks.tokenizer  # noqa: B018
        self.networks.dense if self.networks.resident else self.networks.config  # noqa: B018

    def measure(self, request: Request, network: dict | None) -> Result:
        """Run one measurement; `network` is its slice request, None for the dense model."""
        measure: Callable = getattr(self, f"_measure_{request.kind}")
        if self.sliced is not None and self.sliced[0] != _key(network):
            self.drop_sliced()  # or its memory would count as this measurement's
        if network is None or self.networks.resident:
            self.networks.dense  # noqa: B018  loading is not part of a measurement's time
        if network is not None and request.kind != "slice":
            self._sliced_for(network)
        reset_peak_memory(self.device)
        start = time.perf_counter()
        value = measure(request.config)
        return self._result(request, value, value.pop("seconds", time.perf_counter() - start))

    def drop_sliced(self) -> None:
        """Let go of the current sliced network."""
        self.sliced = None
        free_memory()

    def _result(self, request: Request, value: dict, seconds: float) -> Result:
        return Result(
            kind=request.kind,
            config=request.config,
            value=value,
            seconds=round(seconds, 3),
            peak_memory_bytes=peak_memory_bytes(self.device),
            provenance={**provenance(self.device), **self._hub_commits(request.config)},
        )

    def _hub_commits(self, config: dict) -> dict:
        """At which commit of the hub the model and the texts of a request were read."""
        commits = {config["model"]: self.networks.commit}
        calibration = (config.get("slice") or config).get("calibration", {})
        for part in (config, calibration):
            if "text" in part:
                text, _, revision = texts.source_of(part)
                if (text, revision) not in self._commits:
                    self._commits[text, revision] = texts.commit_of(text, revision)
                commits[text] = self._commits[text, revision]
        known = {name: commit for name, commit in commits.items() if commit}
        return {"hub_commits": known} if known else {}

    def _network(self, config: dict) -> PreTrainedModel:
        network = config["slice"]
        return self.networks.dense if network is None else self._sliced_for(network).model

    def _sliced_for(self, network: dict) -> Sliced:
        key = _key(network)
        if key in self._broken:
            raise RunError(self._broken[key])
        if self.sliced is None or self.sliced[0] != key:
            self.drop_sliced()
            try:
                self.sliced = (key, self._slice(network))
            except Exception as error:  # whatever it is, it would be the same again
                self._broken[key] = in_one_line(error)
                raise
        return self.sliced[1]

    def _slice(self, network: dict) -> Sliced:
        calibration = network["calibration"]
        compensation = network.get("compensation")
        outcome = self.networks.slice(
            self._windows_of(calibration),
            self._plan(network["plan"]),
            compensation and Compensation(**compensation),
        )
        if recovery := network.get("recovery"):
            from dynslice.extensions.finetuning import FineTuning, finetune  # loads peft

            windows = self._windows_of({**calibration, **recovery})
            amounts = (FineTuning(recovery["steps"]), calibration["seed"])
            model, seconds = finetune(outcome.model, windows, *amounts)
            outcome = replace(outcome, model=model, recovery_seconds=seconds)
        return outcome

    def _plan(self, request: dict) -> SlicePlan:
        shape = dims_of(self.networks.config)
        if "budget" in request:
            return self._plan_within(request, shape)
        amounts = {k: v for k, v in request.items() if k not in ("schedule", "lr", "score")}
        match request["schedule"]:
            case "constant":
                return constant(shape, **amounts)
            case "dynamic":
                layers = self._stored(Request("lr", request["lr"])).value["layers"]
                lr = scores_of(layers, request.get("score", "cosine"))
                return dynamic(shape, lr, **amounts)
            case "matched":
                return matched(self._plan(request["to"]))
            case "shuffled":
                return shuffled(self._plan(request["of"]), request["seed"])
            case "embedding":
                return with_embedding(self._plan(request["of"]), request["embedding_slice"])
        raise RequestError(f"schedule {request['schedule']!r} is unknown")

    def _plan_within(self, request: dict, shape: ModelDims) -> SlicePlan:
        """The plan of a schedule that stores no more than the plan of its budget."""
        largest = self._plan(request["budget"])
        known = {}
        if given := request.get("evidence"):
            value = self._stored(Request(**given)).value
            if given["kind"] == "search":
                widths = value["place_widths"]
                return of_places("search", shape, widths, largest.round_to)
            if given["kind"] == "lr":
                known["lr"] = scores_of(value["layers"], "cosine")
            else:
                known["rises"] = rises(value)
        evidence = schedules.Evidence(shape, largest.round_to, **known)
        return schedules.within(request["schedule"], evidence, largest.parameters)

    def _stored(self, request: Request) -> Result:
        if (result := self.store.get(request)) is None:
            result = self.measure(request, None)
            self.store.put(result)
        return result

    def _stream(self, config: dict) -> Tensor:
        """The tokens [n] of the whole text of a request, made once."""
        source = text, split, revision = texts.source_of(config)
        if source not in self._streams:
            tokenizer = self.networks.tokenizer
            self._streams[source] = token_stream(text, split, tokenizer, revision=revision)
        return self._streams[source]

    def _windows_of(self, config: dict) -> Tensor:
        asked = (config[name] for name in ("window", "windows", "seed", "text"))
        return sample_windows(self._stream(config), *asked, skip=config.get("skip", 0))

    def _measure_lr(self, config: dict) -> dict:
        stream = self._stream(config)[: config["max_tokens"]]
        windows = sliding_windows(stream, config["window"], config["stride"])
        amounts = (windows, config["stride"], config["last_layer"])
        start = time.perf_counter()
        lr = redundancy.layer_redundancy(self.networks.dense, *amounts)
        return {**lr.to_dict(), "seconds": time.perf_counter() - start}

    def _measure_plan(self, config: dict) -> dict:
        return _facts(self._plan(config["plan"]))

    def _measure_slice(self, config: dict) -> dict:
        if config["slice"] is None:
            count = sum(p.numel() for p in self.networks.dense.parameters())
            return {"parameters": count, "parameters_dense": count, "mean_slice": 0.0}
        outcome = self._sliced_for(config["slice"])
        facts = _facts(self._plan(config["slice"]["plan"]))
        stored = sum(p.numel() for p in outcome.model.parameters())
        if stored != facts["parameters"]:
            raise RunError(
                f"the sliced model stores {stored} parameters, its plan says "
                f"{facts['parameters']}; this is a bug, please report it"
            )
        errors = {name: getattr(outcome, name) for name in ("rotation_error", "basis_error")}
        return {**facts, **errors, "seconds": outcome.seconds + outcome.recovery_seconds}

    def _measure_ppl(self, config: dict) -> dict:
        windows = self._windows_of(config)
        return perplexity.perplexity(self._network(config), windows)

    def _measure_sensitivity(self, config: dict) -> dict:
        """NLL per window of the dense model, and with each layer alone cut."""
        windows = self._windows_of(config)
        calibration = self._windows_of(config["calibration"])
        shape = dims_of(self.networks.config)
        dense, layers = perplexity.perplexity(self.networks.dense, windows)["nll"], []
        for layer in tqdm(range(shape.layers), desc="sensitivity", unit="layer", leave=False):
            cut = single(shape, layer, config["slice_percentage"], config["round_to"])
            network = self.networks.slice(calibration, cut).model
            nll = perplexity.perplexity(network, windows)["nll"]
            del network  # before the next one is made
            layers.append({"index": layer, "width": cut.widths[layer], "nll": nll})
        return {"dense": dense, "layers": layers}

    def _measure_places(self, config: dict) -> dict:
        """NLL per window with all places cut by a plan, and with one cut more or less."""
        calibration, windows = self._windows_of(config["calibration"]), self._windows_of(config)
        widths, shares = self._plan(config["plan"]), config["shares"]
        dense = self.networks.dense
        return place_losses.place_losses(dense, calibration, windows, widths, shares)

    def _measure_search(self, config: dict) -> dict:
        """The plan of least loss on validation windows that a coordinate search finds."""
        calibration, windows = self._windows_of(config["calibration"]), self._windows_of(config)
        largest = self._plan(config["budget"])

        def loss(candidate: SlicePlan) -> float:
            network = self.networks.slice(calibration, candidate).model
            return perplexity.perplexity(network, windows)["nll_mean"]

        evidence = schedules.Evidence(largest.shape, largest.round_to)
        best, tried = schedules.search(evidence, largest.parameters, loss, config["evaluations"])
        return {"place_widths": list(best.place_widths[:-1]), "tried": tried}

    def _measure_centred(self, config: dict) -> dict:
        """Perplexity of the dense model with the mean over d taken from every embedding."""

        def centre(_module, _args, output: Tensor) -> Tensor:
            return output - output.mean(dim=-1, keepdim=True)

        dense = self.networks.dense
        handle = dense.get_input_embeddings().register_forward_hook(centre)
        try:
            return perplexity.perplexity(dense, self._windows_of(config))
        finally:
            handle.remove()

    def _measure_speed(self, config: dict) -> dict:
        """Prefill and decoding of the sliced network beside the dense model, in turn."""
        dense, size = self.networks.dense, (config["windows"], config["window"])
        draw = torch.Generator().manual_seed(config["seed"])  # which tokens does not matter
        ids = torch.randint(dense.config.vocab_size, size, generator=draw)
        network, amounts = self._network(config), (config["new_tokens"], config["repeats"])
        return speed.speed(dense, network, ids, *amounts)

    def _measure_task(self, config: dict) -> dict:
        name = config["task"]
        network, tokenizer = self._network(config), self.networks.tokenizer
        drawn = {"subset": config.get("subset", "first"), "seed": config.get("draw_seed", 0)}
        value = harness.tasks(network, tokenizer, [name], config["limit"], **drawn)[name]
        return {**value, "lm_eval_version": metadata.version("lm-eval")}


def _key(network: dict | None) -> str:
    return Request("slice", network).key


def _facts(widths: SlicePlan) -> dict:
    values = widths.to_dict()
    names = ("widths", "final_slice", "mean_slice", "parameters", "parameters_dense")
    facts = {name: values[name] for name in names}
    if widths.own_attention:
        facts["attention_widths"] = list(widths.attention_widths)
    return {**facts, "shortcut_parameters": widths.shortcut_parameters}


GIB = 2**30


class Networks:
    """Dense and sliced network by the placement of a profile.

    resident: both are on the device. streamed and spread: one at a time is in memory, and slicing
    reads the dense one from its checkpoint layer by layer; spread lets accelerate place the one
    over all GPUs.
    """

    def __init__(self, settings: Profile, device: torch.device):
        self.settings = settings
        self.device = device
        self.dtype = pick_dtype(settings.dtype, device)
        self._dense: PreTrainedModel | None = None
        self._files = ExitStack()

    @property
    def resident(self) -> bool:
        """Whether dense and sliced network are in memory together."""
        return self.settings.placement == "resident"

    @cached_property
    def commit(self) -> str | None:
        """The commit that a hub model is read at."""
        return models.commit_of(self.settings.model, self.settings.model_revision)

    @property
    def revision(self) -> str | None:
        """What to load, now and later in a run alike: the commit, where there is one."""
        return self.commit or self.settings.model_revision

    @cached_property
    def config(self) -> PretrainedConfig:
        """The config of the dense model."""
        return models.load_config(self.settings.model, self.revision)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, which the slices share."""
        return models.load_tokenizer(self.settings.model, self.revision)

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
        free_memory()
        # Its files stay until the next slice: accelerate may read weights from them.
        self._files.close()
        folder = self._files.enter_context(files.scratch(paths.CACHE / "sliced"))
        source = (self.settings.model, windows, plan, self.device, self.dtype, self.revision)
        outcome = models.slice_saved(folder, *source, budget=self._budget(), start=compensation)
        return replace(outcome, model=self._load(str(folder)))

    def _budget(self) -> streaming.Budget:
        given = self.settings.device_memory_gib, self.settings.host_memory_gib
        return streaming.Budget(*(None if gib is None else int(gib * GIB) for gib in given))

    def _load(self, name: str, revision: str | None = None) -> PreTrainedModel:
        spread = self.settings.placement == "spread"
        return models.load(name, self.device, self.dtype, revision, spread)[0]
