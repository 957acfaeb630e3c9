"""Layer Redundancy (LR): how much a layer leaves its input as it was.

LR_i = mean over tokens of cos(x_i, x_{i+1}), where x_i is the residual stream that enters layer i
and x_{i+1} the stream that leaves it. High means redundant (paper, section 3.1).
"""

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from dynslice.corpora import batches
from dynslice.errors import RequestError
from dynslice.models import check_finite, family_of, require_dense

LAST_LAYER = ("raw", "normed")


@dataclass(frozen=True)
class LayerRedundancy:
    """LR per layer, and what it was measured on."""

    lr: tuple[float, ...]
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
        """The JSON form: layers [{index, lr, normalised}], tokens, windows, window, stride."""
        layers = [
            {"index": i, "lr": lr, "normalised": n}
            for i, (lr, n) in enumerate(zip(self.lr, self.normalised, strict=True))
        ]
        return {"layers": layers, **{k: v for k, v in asdict(self).items() if k != "lr"}}


def normalise(lr: tuple[float, ...]) -> tuple[float, ...]:
    """Scale LR to [0, 1]; where all layers are equally redundant, every score is 1."""
    low, high = min(lr), max(lr)
    if high == low:
        return (1.0,) * len(lr)
    return tuple((value - low) / (high - low) for value in lr)


@torch.inference_mode()
def layer_redundancy(
    model: PreTrainedModel, windows: torch.Tensor, stride: int, last_layer: str = "raw"
) -> LayerRedundancy:
    """LR of every layer over token windows [n, T], in one pass without the head.

    A hook on each layer adds up cosines as the stream goes by, so memory is O(layers). A token
    that several windows cover counts once in each, as in the published protocol. A zero vector
    has cosine 0 with everything.

    stride: distance of the windows in tokens, recorded with the result.
    last_layer: `raw` compares with the output of the last layer, the definition; `normed` with
    that output after the final norm, as the published code does (METHOD, trap 1).
    Raises RequestError for an unknown `last_layer` or a sliced model (its stream changes width),
    RunError for non-finite activations.
    """
    if last_layer not in LAST_LAYER:
        raise RequestError(f"last_layer {last_layer!r} is unknown; use {' or '.join(LAST_LAYER)}")
    require_dense(model.config, "layer redundancy")
    family = family_of(model.config)
    layers = list(model.get_submodule(family.layers))
    after = [nn.Identity()] * len(layers)
    if last_layer == "normed":
        after[-1] = model.get_submodule(family.final_norm)
    sums = torch.zeros(len(layers), dtype=torch.float64, device=model.device)

    def hook(index: int):
        def add_cosines(_layer, args, _kwargs, output):
            x_out = after[index](output)
            cosine = F.cosine_similarity(args[0].float(), x_out.float(), dim=-1)
            sums[index] += cosine.sum(dtype=torch.float64)

        return add_cosines

    handles = [
        layer.register_forward_hook(hook(i), with_kwargs=True) for i, layer in enumerate(layers)
    ]
    try:
        for batch in batches(windows, "layer redundancy", model.device):
            model.base_model(batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    for i, total in enumerate(sums):
        check_finite(total, f"layer redundancy of layer {i}")
    count, window = windows.shape
    return LayerRedundancy(
        lr=tuple((sums / windows.numel()).tolist()),
        tokens=(count - 1) * min(stride, window) + window,
        windows=count,
        window=window,
        stride=stride,
        last_layer=last_layer,
    )
