"""Taking one measurement: the loaded model, the current slice of it, the tokenised texts."""

import time
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from dynslice import (
    corpora,
    efficiency,
    evaluation,
    models,
    plan,
    redundancy,
    schedules,
    scores,
    sensitivity,
)
from dynslice.compensation import Compensation
from dynslice.errors import RequestError, RunError, in_one_line
from dynslice.networks import Networks
from dynslice.plan import SlicePlan
from dynslice.profile import Profile
from dynslice.results import (
    Measurement,
    Result,
    Store,
    peak_memory_bytes,
    provenance,
    reset_peak_memory,
)
from dynslice.slicing import Sliced


class Workbench:
    """The loaded model, the current slice of it, and the texts already tokenised."""

    def __init__(self, settings: Profile, store: Store, device: str):
        self.settings = settings
        self.store = store
        self.device = models.pick_device(device)
        self.networks = Networks(settings, self.device)
        self.sliced: tuple[str, Sliced] | None = None
        self._broken: dict[str, str] = {}  # networks that could not be sliced, and why
        self._streams: dict[tuple, Tensor] = {}
        self._commits: dict[tuple, str | None] = {}

    def prepare(self) -> None:
        """Load what every measurement needs. Raises RequestError where there is no such model."""
        self.networks.tokenizer  # noqa: B018
        self.networks.dense if self.networks.resident else self.networks.config  # noqa: B018

    def measure(self, request: Measurement, network: dict | None) -> Result:
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
        models.free_memory()

    def _result(self, request: Measurement, value: dict, seconds: float) -> Result:
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
                text, _, revision = corpora.source_of(part)
                if (text, revision) not in self._commits:
                    self._commits[text, revision] = corpora.commit_of(text, revision)
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
            from dynslice.recovery import Recovery, recover  # loads peft

            windows = self._windows_of({**calibration, **recovery})
            amounts = (Recovery(recovery["steps"]), calibration["seed"])
            model, seconds = recover(outcome.model, windows, *amounts)
            outcome = replace(outcome, model=model, recovery_seconds=seconds)
        return outcome

    def _plan(self, request: dict) -> SlicePlan:
        shape = plan.Shape.of(self.networks.config)
        if "budget" in request:
            return self._plan_within(request, shape)
        amounts = {k: v for k, v in request.items() if k not in ("schedule", "lr", "score")}
        match request["schedule"]:
            case "constant":
                return plan.constant(shape, **amounts)
            case "dynamic":
                layers = self._stored(Measurement("lr", request["lr"])).value["layers"]
                lr = scores.scores_of(layers, request.get("score", "cosine"))
                return plan.dynamic(shape, lr, **amounts)
            case "matched":
                return plan.matched(self._plan(request["to"]))
            case "shuffled":
                return plan.shuffled(self._plan(request["of"]), request["seed"])
            case "embedding":
                return plan.with_embedding(self._plan(request["of"]), request["embedding_slice"])
        raise RequestError(f"schedule {request['schedule']!r} is unknown")

    def _plan_within(self, request: dict, shape: plan.Shape) -> SlicePlan:
        """The plan of a schedule that stores no more than the plan of its budget."""
        largest = self._plan(request["budget"])
        known = {}
        if given := request.get("evidence"):
            value = self._stored(Measurement(**given)).value
            if given["kind"] == "search":
                widths = value["place_widths"]
                return plan.of_places("search", shape, widths, largest.round_to)
            if given["kind"] == "lr":
                known["lr"] = scores.scores_of(value["layers"], "cosine")
            else:
                known["rises"] = scores.rises(value)
        evidence = schedules.Evidence(shape, largest.round_to, **known)
        return schedules.within(request["schedule"], evidence, largest.parameters)

    def _stored(self, request: Measurement) -> Result:
        if (result := self.store.get(request)) is None:
            result = self.measure(request, None)
            self.store.put(result)
        return result

    def _stream(self, config: dict) -> Tensor:
        """The tokens [n] of the whole text of a request, made once."""
        source = text, split, revision = corpora.source_of(config)
        if source not in self._streams:
            tokenizer = self.networks.tokenizer
            self._streams[source] = corpora.tokens(text, split, tokenizer, revision=revision)
        return self._streams[source]

    def _windows_of(self, config: dict) -> Tensor:
        asked = (config[name] for name in ("window", "windows", "seed", "text"))
        return corpora.drawn(self._stream(config), *asked, skip=config.get("skip", 0))

    def _measure_lr(self, config: dict) -> dict:
        stream = self._stream(config)[: config["max_tokens"]]
        windows = corpora.sliding(stream, config["window"], config["stride"])
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
        return evaluation.perplexity(self._network(config), windows)

    def _measure_sensitivity(self, config: dict) -> dict:
        """NLL per window of the dense model, and with each layer alone cut."""
        windows = self._windows_of(config)
        calibration = self._windows_of(config["calibration"])
        shape = plan.Shape.of(self.networks.config)
        dense, layers = evaluation.perplexity(self.networks.dense, windows)["nll"], []
        for layer in tqdm(range(shape.layers), desc="sensitivity", unit="layer", leave=False):
            cut = plan.single(shape, layer, config["slice_percentage"], config["round_to"])
            network = self.networks.slice(calibration, cut).model
            nll = evaluation.perplexity(network, windows)["nll"]
            del network  # before the next one is made
            layers.append({"index": layer, "width": cut.widths[layer], "nll": nll})
        return {"dense": dense, "layers": layers}

    def _measure_places(self, config: dict) -> dict:
        """NLL per window with all places cut by a plan, and with one cut more or less."""
        calibration, windows = self._windows_of(config["calibration"]), self._windows_of(config)
        widths, shares = self._plan(config["plan"]), config["shares"]
        dense = self.networks.dense
        return sensitivity.place_losses(dense, calibration, windows, widths, shares)

    def _measure_search(self, config: dict) -> dict:
        """The plan of least loss on validation windows that a coordinate search finds."""
        calibration, windows = self._windows_of(config["calibration"]), self._windows_of(config)
        largest = self._plan(config["budget"])

        def loss(candidate: SlicePlan) -> float:
            network = self.networks.slice(calibration, candidate).model
            return evaluation.perplexity(network, windows)["nll_mean"]

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
            return evaluation.perplexity(dense, self._windows_of(config))
        finally:
            handle.remove()

    def _measure_speed(self, config: dict) -> dict:
        """Prefill and decoding of the sliced network beside the dense model, in turn."""
        dense, size = self.networks.dense, (config["windows"], config["window"])
        draw = torch.Generator().manual_seed(config["seed"])  # which tokens does not matter
        ids = torch.randint(dense.config.vocab_size, size, generator=draw)
        network, amounts = self._network(config), (config["new_tokens"], config["repeats"])
        return efficiency.speed(dense, network, ids, *amounts)

    def _measure_task(self, config: dict) -> dict:
        name = config["task"]
        network, tokenizer = self._network(config), self.networks.tokenizer
        drawn = {"subset": config.get("subset", "first"), "seed": config.get("draw_seed", 0)}
        value = evaluation.tasks(network, tokenizer, [name], config["limit"], **drawn)[name]
        return {**value, "lm_eval_version": metadata.version("lm-eval")}


def _key(network: dict | None) -> str:
    return Measurement("slice", network).key


def _facts(widths: SlicePlan) -> dict:
    values = widths.to_dict()
    names = ("widths", "final_slice", "mean_slice", "parameters", "parameters_dense")
    facts = {name: values[name] for name in names}
    if widths.own_attention:
        facts["attention_widths"] = list(widths.attention_widths)
    return {**facts, "shortcut_parameters": widths.shortcut_parameters}
