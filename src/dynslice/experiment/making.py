"""Networks as requests name them, made one step after the other.

A request's network says what is left of the dense model: `method` (fewer layers or neurons) or
`plan` (slicing, after fewer neurons where the plan says so), then `recovery` (LoRA), then `bits`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from torch import Tensor
from transformers import PreTrainedModel

from dynslice.core.errors import RunError
from dynslice.experiment.plan_specs import facts_of, plan_spec
from dynslice.extensions import alternatives, neurons
from dynslice.extensions.compensation import Compensation
from dynslice.method import slicing
from dynslice.method.plan import SlicePlan

if TYPE_CHECKING:
    from dynslice.experiment.runner import Networks


@dataclass(frozen=True)
class Made:
    """A network, the seconds that it took, and what the store keeps of it besides its size."""

    model: PreTrainedModel
    seconds: float
    facts: dict = field(default_factory=dict)


def make(
    network: dict,
    networks: Networks,
    plan_of: Callable[[dict], SlicePlan],
    windows_of: Callable[[dict], Tensor],
) -> Made:
    """The network of a request. Raises RequestError where a step can't be done.

    plan_of, windows_of: what a plan and a choice of windows in a request are.
    """
    windows = windows_of(network["calibration"])
    if "method" in network:
        made = _instead(network, networks, plan_of, windows)
    elif "plan" in network:
        made = _sliced(network, networks, plan_of(network["plan"]), windows)
    else:
        made = Made(networks.dense, 0.0)
        if "recovery" in network:  # merges in place
            raise RunError("the dense model is not fine-tuned; this is a bug, please report it")
    if recovery := network.get("recovery"):
        made = _recovered(made, recovery, network["calibration"], windows_of)
    if bits := network.get("bits"):
        made = _rounded(made, bits, networks.dense, windows)
    return made


def _instead(network: dict, networks: Networks, plan_of: Callable, windows: Tensor) -> Made:
    start, budget = time.perf_counter(), plan_of(network["budget"]).parameters
    found = alternatives.smaller(networks.dense, windows, budget, **network["method"])
    facts = {"dropped_layers": [*found.dropped_layers], "dropped_neurons": found.dropped_neurons}
    return Made(found.model, time.perf_counter() - start, facts)


def _sliced(network: dict, networks: Networks, plan: SlicePlan, windows: Tensor) -> Made:
    asked = network.get("compensation")
    start = None if asked is None else Compensation(**asked)
    if share := plan_spec(network["plan"]).neurons:
        began = time.perf_counter()
        narrower = neurons.drop_neurons(networks.dense, windows, share)
        outcome = slicing.slice_model(narrower, windows, plan, start)
        outcome = replace(outcome, seconds=time.perf_counter() - began)
    else:
        outcome = networks.slice(windows, plan, start)
    stored = sum(p.numel() for p in outcome.model.parameters())
    if stored != plan.parameters:
        raise RunError(
            f"the sliced model stores {stored} parameters, its plan says {plan.parameters}; this "
            "is a bug, please report it"
        )
    facts = facts_of(plan) | {n: getattr(outcome, n) for n in ("rotation_error", "basis_error")}
    if outcome.arbitrary_places:
        facts["arbitrary_places"] = outcome.arbitrary_places
    if start and start.chosen:
        facts["ridges"] = [*start.chosen]
    return Made(outcome.model, outcome.seconds, facts)


def _recovered(made: Made, recovery: dict, calibration: dict, windows_of: Callable) -> Made:
    from dynslice.extensions.finetuning import FineTuning, finetune  # loads peft

    settings = {name: recovery[name] for name in ("steps", "learning_rate") if name in recovery}
    windows = windows_of({**calibration, **recovery})
    model, seconds = finetune(made.model, windows, FineTuning(**settings), calibration["seed"])
    return replace(made, model=model, seconds=made.seconds + seconds)


def _rounded(made: Made, asked: dict, dense: PreTrainedModel, windows: Tensor) -> Made:
    """asked: {"uniform": bits}, or {"by": a score of the layers, "share": of them at 4 bits}."""
    from dynslice.extensions import bits  # loads compressed-tensors

    start, layers = time.perf_counter(), dense.config.num_hidden_layers
    if uniform := asked.get("uniform"):
        chosen = [uniform] * layers
    else:
        chosen = bits.bits_by(asked["by"], dense, windows, asked["share"])
    packed = bits.quantize(made.model, chosen)
    facts = {**made.facts, "bits": chosen, "bytes": packed.bytes}
    model = packed.unpacked(made.model)
    return Made(model, made.seconds + time.perf_counter() - start, facts)
