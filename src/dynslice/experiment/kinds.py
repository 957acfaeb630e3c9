"""The kinds of measurements: how each is taken, how long it takes, what a reader would quote.

What measures is imported where it runs: reports read the kinds too and need no torch.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from importlib import metadata
from math import exp
from statistics import fmean
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from dynslice.evaluate.task_table import TASKS
from dynslice.experiment.plan_specs import facts_of
from dynslice.method.controls import single

if TYPE_CHECKING:
    from torch import Tensor

    from dynslice.experiment.estimate import Estimator
    from dynslice.experiment.runner import Runner


class Kind(ABC):
    """One kind of measurement; `config` is what its request asks, `value` what `run` gave."""

    needs_memory = True
    slices_itself = False  # networks of its own, one after the other

    @abstractmethod
    def run(self, runner: Runner, config: dict) -> dict:
        """Measure. A value of `seconds` stands for the time that the whole of it took."""

    def seconds(self, estimator: Estimator, config: dict) -> float | None:
        """About how long it takes without slicing; None where nobody knows how much is read."""
        return 0.0

    def quoted(self, value: dict) -> dict[str, float]:
        """The numbers that a reader would quote, by which runs are compared."""
        return {"stored parameters": value["parameters"]}


class LayerRedundancy(Kind):
    """LR of each layer."""

    def run(self, runner: Runner, config: dict) -> dict:
        from dynslice.inputs.windows import sliding_windows
        from dynslice.method import redundancy

        stream = runner.stream(config)[: config["max_tokens"]]
        stride, last = config["stride"], config["last_layer"]
        windows = sliding_windows(stream, config["window"], stride, runner.first_token(config))
        start = time.perf_counter()
        lr = redundancy.layer_redundancy(runner.networks.dense, windows, stride, last)
        return {**lr.to_dict(), "seconds": time.perf_counter() - start}

    def seconds(self, estimator: Estimator, config: dict) -> float | None:
        tokens = config["max_tokens"] or estimator.tokens_of_text(config)
        if tokens is None:
            return None
        windows = max(1, 1 + (tokens - config["window"]) // config["stride"])
        return estimator.one_pass(windows * min(tokens, config["window"]), config["window"])

    def quoted(self, value: dict) -> dict[str, float]:
        return {f"LR of layer {layer['index']}": layer["lr"] for layer in value["layers"]}


class PlannedWidths(Kind):
    """The widths of a plan and what they store; no network is sliced."""

    needs_memory = False

    def run(self, runner: Runner, config: dict) -> dict:
        return facts_of(runner.plan(config["plan"]))


class StoredSize(Kind):
    """What a network that was made, or the dense one, stores, and how it was made."""

    def run(self, runner: Runner, config: dict) -> dict:
        stored = sum(p.numel() for p in runner.network(config).parameters())
        if config["slice"] is None:
            return {"parameters": stored, "parameters_dense": stored, "mean_slice": 0.0}
        made = runner.made_for(config["slice"])
        sizes = {"parameters": stored, "parameters_dense": runner.dims.dense_parameters}
        return {**made.facts, **sizes, "seconds": made.seconds}


class Perplexity(Kind):
    """Perplexity of a network on windows of a text."""

    def run(self, runner: Runner, config: dict) -> dict:
        return _perplexity(runner.network(config), runner.windows(config))

    def seconds(self, estimator: Estimator, config: dict) -> float | None:
        return estimator.reading(config)

    def quoted(self, value: dict) -> dict[str, float]:
        return {"perplexity": value["perplexity"]}


class CentredPerplexity(Perplexity):
    """Perplexity of the dense model with the mean over d taken from every embedding."""

    def run(self, runner: Runner, config: dict) -> dict:
        def centre(_module, _args, output: Tensor) -> Tensor:
            return output - output.mean(dim=-1, keepdim=True)

        dense = runner.networks.dense
        handle = dense.get_input_embeddings().register_forward_hook(centre)
        try:
            return _perplexity(dense, runner.windows(config))
        finally:
            handle.remove()


class SingleLayerCuts(Kind):
    """NLL per window of the dense model, and with each layer cut alone."""

    slices_itself = True

    def run(self, runner: Runner, config: dict) -> dict:
        windows, calibration = runner.windows(config), runner.windows(config["calibration"])
        dense, layers = _perplexity(runner.networks.dense, windows)["nll"], []
        for layer in tqdm(range(runner.dims.layers), "single layers", unit="layer", leave=False):
            cut = single(runner.dims, layer, config["slice_percentage"], config["round_to"])
            nll = _perplexity(runner.networks.slice(calibration, cut).model, windows)["nll"]
            layers.append({"index": layer, "width": cut.widths[layer], "nll": nll})
        return {"dense": dense, "layers": layers}

    def seconds(self, estimator: Estimator, config: dict) -> float:
        return estimator.dims.layers * estimator.slicing_and_reading(config)

    def quoted(self, value: dict) -> dict[str, float]:
        losses = {f"layer {layer['index']} cut": layer["nll"] for layer in value["layers"]}
        return _perplexities({**losses, "no layer cut": value["dense"]})


class Speed(Kind):
    """Prefill and decoding of a sliced network and of the dense model, in turn."""

    def run(self, runner: Runner, config: dict) -> dict:
        import torch

        from dynslice.evaluate import speed

        dense, size = runner.networks.dense, (config["windows"], config["window"])
        generator = torch.Generator().manual_seed(config["seed"])  # any tokens will do
        ids = torch.randint(dense.config.vocab_size, size, generator=generator)
        network = runner.network(config)
        return speed.speed(dense, network, ids, config["new_tokens"], config["repeats"])

    def seconds(self, estimator: Estimator, config: dict) -> float:
        from dynslice.evaluate.speed import WARM_UP

        prefill = estimator.one_pass(config["windows"] * config["window"], config["window"])
        decoding = config["new_tokens"] * estimator.dense_bytes / estimator.machine.copies
        return 2 * (config["repeats"] + WARM_UP) * (prefill + decoding)

    def quoted(self, value: dict) -> dict[str, float]:
        counts = ("stored_bytes", "prefill_flops", "decode_bytes")
        return {f"{name} ({which})": x for name in counts for which, x in value[name].items()}


class Continuation(Kind):
    """What a network writes after the beginning of a window, the likeliest token each time."""

    def run(self, runner: Runner, config: dict) -> dict:
        import torch

        network, prompt = runner.network(config), runner.windows(config)[:1]
        with torch.inference_mode():
            ids = network.generate(
                prompt.to(network.device),
                attention_mask=torch.ones_like(prompt, device=network.device),
                max_new_tokens=config["new_tokens"],
                do_sample=False,
            )
        said = runner.networks.tokenizer.batch_decode([prompt[0], ids[0, prompt.shape[1] :]])
        return dict(zip(("prompt", "continuation"), said, strict=True))

    def seconds(self, estimator: Estimator, config: dict) -> float:
        return config["new_tokens"] * estimator.dense_bytes / estimator.machine.copies

    def quoted(self, value: dict) -> dict[str, float]:
        return {}  # no numbers


class TaskAccuracy(Kind):
    """Accuracy of a network on a task."""

    def run(self, runner: Runner, config: dict) -> dict:
        from dynslice.evaluate import harness

        name, given = config["task"], (runner.network(config), runner.networks.tokenizer)
        sample = {"subset": config.get("subset", "first"), "seed": config.get("draw_seed", 0)}
        value = harness.tasks(*given, [name], config["limit"], **sample)[name]
        return {**value, "lm_eval_version": metadata.version("lm-eval")}

    def seconds(self, estimator: Estimator, config: dict) -> float | None:
        tokens = task_tokens(config["task"], config["limit"], config.get("subset"))
        return estimator.one_pass(tokens, 128, head=True)  # about as long as an item is

    def quoted(self, value: dict) -> dict[str, float]:
        accuracies = {name: value[name] for name in ("acc", "acc_norm") if value[name] is not None}
        return {**accuracies, **value.get("metrics", {})}


KINDS: dict[str, Kind] = {  # by names that are part of the keys of requests
    "lr": LayerRedundancy(),
    "plan": PlannedWidths(),
    "slice": StoredSize(),
    "ppl": Perplexity(),
    "centred": CentredPerplexity(),
    "sensitivity": SingleLayerCuts(),
    "speed": Speed(),
    "continuation": Continuation(),
    "task": TaskAccuracy(),
}


def task_tokens(name: str, limit: int | None, subset: str | None) -> int | None:
    """Tokens of the items of a task, its contexts shared; None where that is not known."""
    row = TASKS[name]
    if row.tokens is None:
        return None
    if limit is not None and name == "mmlu" and subset != "stratified":
        limit *= 57  # subjects, each of which is limited
    return round(min(limit or row.items, row.items) * row.tokens)


def _perplexity(network, windows: Tensor) -> dict:
    from dynslice.evaluate import perplexity

    return perplexity.perplexity(network, windows)


def _perplexities(losses: dict[str, list[float]]) -> dict[str, float]:
    return {f"perplexity, {what}": exp(fmean(nll)) for what, nll in losses.items()}
