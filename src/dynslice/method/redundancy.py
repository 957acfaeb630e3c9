"""Layer Redundancy (LR): how much a layer leaves its input as it was.

LR_i = mean over tokens of cos(x_i, x_{i+1}), where x_i is the residual stream that enters layer i
and x_{i+1} the stream that leaves it. High means redundant (paper, section 3.1).
"""

import math
from contextlib import ExitStack
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from dynslice.core.errors import RequestError
from dynslice.core.tensors import batches, check_finite, check_tokens, evaluating
from dynslice.method.architectures import family_of, require_dense
from dynslice.method.scores import normalise

LAST_LAYER = ("raw", "normed")


@dataclass(frozen=True)
class LayerRedundancy:
    """LR per layer with two other measures of change, and what they were measured on.

    angular_distance: mean of arccos(cos(x_i, x_{i+1})) / pi. update_norm: mean of
    ||x_{i+1} - x_i|| / ||x_i||.
    """

    lr: tuple[float, ...]
    angular_distance: tuple[float, ...]
    update_norm: tuple[float, ...]
    tokens: int
    windows: int
    window: int
    stride: int
    last_layer: str

    @property
    def normalised(self) -> tuple[float, ...]:
        """n_i = (LR_i - min LR) / (max LR - min LR)."""
        return normalise(self.lr)

    def to_dict(self) -> dict:
        """The JSON form: layers [{index, lr, normalised, ..}], tokens, windows, window, stride."""
        facts = asdict(self)
        measures = ("lr", "angular_distance", "update_norm")
        columns = {name: facts.pop(name) for name in measures}
        columns = {"index": range(len(self.lr)), **columns, "normalised": self.normalised}
        rows = zip(*columns.values(), strict=True)
        return {"layers": [dict(zip(columns, row, strict=True)) for row in rows], **facts}


@torch.inference_mode()
def layer_redundancy(
    model: PreTrainedModel,
    windows: torch.Tensor,
    stride: int | None = None,
    last_layer: str = "raw",
) -> LayerRedundancy:
    """LR of every layer over token windows [n, T], in one pass without the head.

    A hook on each layer adds up its measures as the stream goes by, so memory is O(layers). A token
    that several windows cover counts once in each, as in the published protocol. A zero vector
    has cosine 0 with everything and an update of 0.

    stride: distance of the windows in tokens, recorded with the result; None: their length.
    last_layer: `raw` compares with the output of the last layer, the definition; `normed` with
    that output after the final norm, as the published code does (docs/method.md).
    Raises RequestError for an unknown `last_layer`, a sliced model (its stream changes width), and
    activations that are not finite.
    """
    if last_layer not in LAST_LAYER:
        raise RequestError(f"last_layer {last_layer!r} is unknown; use {' or '.join(LAST_LAYER)}")
    require_dense(model.config, "layer redundancy")
    check_tokens(model.config, windows)
    family = family_of(model.config)
    layers = list(model.get_submodule(family.layers))
    after = [nn.Identity()] * len(layers)
    if last_layer == "normed":
        after[-1] = model.get_submodule(family.final_norm)
    sums = torch.zeros(3, len(layers), dtype=torch.float64, device=model.device)

    def hook(index: int):
        def add_up(_layer, args, _kwargs, output):
            x_out = after[index](output).float()
            x_in = args[0].to(x_out.device).float()  # it may come from the GPU of the layer before
            for measure, values in enumerate(_changes(x_in, x_out)):
                sums[measure, index] += values.sum(dtype=torch.float64).to(sums.device)

        return add_up

    with ExitStack() as hooks:
        for i, layer in enumerate(layers):
            handle = layer.register_forward_hook(hook(i), with_kwargs=True)
            hooks.callback(handle.remove)
        hooks.enter_context(evaluating(model))
        for batch in batches(windows, "layer redundancy", model.device):
            model.base_model(batch, use_cache=False)
    for i, totals in enumerate(sums.T):
        check_finite(totals, f"layer redundancy of layer {i}", model.dtype)
    count, window = windows.shape
    stride = stride or window
    lr, angular_distance, update_norm = map(tuple, (sums / windows.numel()).tolist())
    return LayerRedundancy(
        lr=lr,
        angular_distance=angular_distance,
        update_norm=update_norm,
        tokens=(count - 1) * min(stride, window) + window,
        windows=count,
        window=window,
        stride=stride,
        last_layer=last_layer,
    )


def _changes(x_in: torch.Tensor, x_out: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Cosine, angular distance and update norm between streams [b, T, d], each [b, T]."""
    cosine = F.cosine_similarity(x_in, x_out, dim=-1)
    angle = cosine.clamp(-1, 1).arccos() / math.pi
    length = x_in.norm(dim=-1)
    update = torch.where(length > 0, (x_out - x_in).norm(dim=-1) / length, 0.0)
    return cosine, angle, update
