"""MLP neurons dropped by ridge leverage, and what they wrote given back by the others.

z [n, m] are the inputs of the map that writes, C = Z^T Z their second moments. Neurons of highest
diag(C (C + lambda I)^-1) are kept, K, and the map becomes W C[:, K] (C[K, K] + lambda I)^-1, the
least squares of what all of them write (a Nystroem approximation, as in MoDeGPT, arXiv 2408.09632).
"""

import copy

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from dynslice.core.errors import RequestError
from dynslice.core.tensors import (
    check_finite,
    check_tokens,
    evaluating,
    of_config,
    with_own_weights,
)
from dynslice.extensions.compensation import inputs_of
from dynslice.method.activations import (
    Activations,
    BlockInPlace,
    centring,
    residual_stream,
    run_block,
)
from dynslice.method.architectures import family_of, require_dense
from dynslice.method.modeling_sliced import Family
from dynslice.method.numerics import TINY, add_gram

RIDGE = 0.01  # of the mean square of the inputs
UNIT = 8  # a budget leaves a multiple of it, as widths are


def kept_neurons(C: Tensor, count: int, ridge: float = RIDGE) -> tuple[Tensor, Tensor]:
    """The neurons of highest ridge leverage, in order [k], and the map from theirs to all [m, k].

    C [m, m]: second moments in float64, symmetric.
    """
    penalty = ridge * C.diagonal().mean().clamp(min=TINY)
    leverage = 1 - penalty * torch.linalg.inv(_ridged(C, penalty)).diagonal()
    kept = leverage.topk(count).indices.sort().values
    return kept, torch.linalg.solve(_ridged(C[kept][:, kept], penalty), C[kept]).T


def _ridged(C: Tensor, penalty: Tensor) -> Tensor:
    ridged = C.clone()
    ridged.diagonal().add_(penalty)
    return ridged


@torch.no_grad()
def drop_neurons(
    model: PreTrainedModel, windows: Tensor, share: float, ridge: float = RIDGE
) -> PreTrainedModel:
    """The model with a share of the neurons of each MLP dropped: an ordinary, narrower checkpoint.

    windows: token windows [n, T]; each layer sees what the layers before it make once they are
    narrower. The dense model is left as it was. Raises RequestError for a share that leaves none, a
    sliced model, windows that it can't read, and activations that are not finite.
    """
    require_dense(model.config, "dropping neurons")
    check_tokens(model.config, windows)
    family, m = family_of(model.config), getattr(model.config, _size_name(model.config))
    count = _kept_count(m, share)
    weights, x = {**model.state_dict()}, Activations(model.device)
    layers, centred = model.get_submodule(family.layers), centring(model, family)
    with evaluating(model):
        for i, arguments in enumerate(residual_stream(model, windows, x)):
            for block in family.blocks:
                here = BlockInPlace(layers[i], block, arguments, centred)
                [*branches] = [b for b in block.branches if not b.attention]
                if not branches or count == m:
                    run_block(x, None, here)
                    continue
                [branch] = branches
                fewer = _narrower_mlp(x, here, branch, count, ridge)
                prefix = f"{family.layers}.{i}."
                weights |= {f"{prefix}{name}": weight for name, weight in fewer.items()}
    config = narrower(model.config, share)
    return with_own_weights(of_config(model, config, weights))


def _narrower_mlp(
    x: Activations, here: BlockInPlace, branch, count: int, ridge: float
) -> dict[str, Tensor]:
    """The weights of the MLP of a block with fewer neurons; x is taken past it."""
    write = here.layer.get_submodule(branch.write)
    m, W = write.in_features, write.weight
    C = torch.zeros(m, m, dtype=torch.float64, device=x.device)
    for stream in x:
        with inputs_of([write]) as inputs:
            here(stream)
        add_gram(C, inputs[0].flatten(0, -2).float())
    C = C.triu() + C.triu(1).T
    check_finite(C, "the inputs of a map that writes the residual stream")
    kept, back = kept_neurons(C, count, ridge)
    refit = (W.double() @ back).to(W.dtype)

    def past(stream: Tensor) -> Tensor:
        with inputs_of([write]) as inputs:
            output = here(stream)
        z = inputs[0]
        change = z[..., kept] @ refit.T - z @ W.T
        return stream + output + here.centred(change)

    x.update(past)
    found = {f"{branch.write}.weight": refit}
    for name in branch.reads:
        read = here.layer.get_submodule(name)
        found |= {f"{name}.{key}": _rows(p, m, kept) for key, p in read.named_parameters()}
    return found


def _rows(table: Tensor, m: int, kept: Tensor) -> Tensor:
    """The rows of the kept neurons, of a map that may hold several of m rows each (fused)."""
    return table.unflatten(0, (-1, m))[:, kept].flatten(0, 1).contiguous()


def narrower(config: PretrainedConfig, share: float) -> PretrainedConfig:
    """The config of a model without that share of the neurons of each MLP."""
    fewer, size = copy.deepcopy(config), _size_name(config)
    setattr(fewer, size, _kept_count(getattr(config, size), share))
    return fewer


def _kept_count(m: int, share: float) -> int:
    if not 0 <= share < 1:
        raise RequestError(f"share {share} of the neurons is outside 0 to 1; give one such as 0.2")
    if not round(m * (1 - share)):
        raise RequestError(f"share {share} of {m} neurons leaves none; give one such as 0.2")
    return round(m * (1 - share))


def share_within(model: PreTrainedModel, budget: int) -> float:
    """The least share of the neurons that has to go for a model to store so many parameters.

    Raises RequestError where the model without its MLPs is more.
    """
    config, family = model.config, family_of(model.config)
    m, stored = getattr(config, _size_name(config)), sum(p.numel() for p in model.parameters())
    layer = model.get_submodule(family.layers)[0]
    each = config.num_hidden_layers * _stored_per_neuron(layer, family)
    count = min(m, m - -(-(stored - budget) // each))
    if count < 1:
        raise RequestError(
            f"{budget} parameters are fewer than the {stored - (m - 1) * each} of a model with one "
            "neuron a layer; give a larger size"
        )
    return 1 - (count - count % UNIT if count > UNIT else count) / m


def _stored_per_neuron(layer: nn.Module, family: Family) -> int:
    """Parameters of a layer that go with one neuron: its columns and rows, biases included."""
    [branch] = [b for block in family.blocks for b in block.branches if not b.attention]
    m = layer.get_submodule(branch.write).in_features
    read = [p for name in branch.reads for p in layer.get_submodule(name).parameters()]
    return sum(p.numel() for p in read) // m + layer.get_submodule(branch.write).out_features


def _size_name(config) -> str:
    return "ffn_dim" if hasattr(config, "ffn_dim") else "intermediate_size"
