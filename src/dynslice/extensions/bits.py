"""Weights of fewer bits, by compressed-tensors: what most people do instead of slicing.

Each map of a layer is rounded to the nearest of 2^bits values, symmetric about zero. Embedding,
head, norms and shortcuts keep their dtype, as is usual. transformers loads the result.
"""

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from compressed_tensors.compressors import ModelCompressor, PackedQuantizationCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    apply_quantization_config,
)
from compressed_tensors.quantization.utils import calculate_qparams
from compressed_tensors.utils import get_direct_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dynslice.core.errors import RequestError
from dynslice.core.tensors import batches, check_tokens, evaluating
from dynslice.method.architectures import family_of, require_dense
from dynslice.method.redundancy import layer_redundancy

WHOLE = 16  # bits of a weight that is not rounded
BITS = (4, 8, WHOLE)
GROUPS = (64, 32, 16, 8)  # inputs that share a scale at 4 bits: the most that divides them
TOP_TOKENS = 10  # of a state, in `token_overlap`


class Packed:
    """A model whose weights are packed: to be saved, counted, or unpacked to run."""

    def __init__(self, model: PreTrainedModel, compressor: ModelCompressor):
        self.model, self.compressor = model, compressor

    @property
    def bytes(self) -> int:
        """What is stored, a tied table once, weights that are not rounded at 16 bits each."""
        kept = {t.data_ptr(): t for t in self.model.state_dict().values()}.values()
        return sum(t.numel() * (2 if t.is_floating_point() else t.itemsize) for t in kept)

    def save(self, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
        """Write weights, config and tokenizer into a folder that is there."""
        self.model.save_pretrained(folder)
        self.compressor.update_config(folder)
        tokenizer.save_pretrained(folder)

    def unpacked(self, model: PreTrainedModel) -> PreTrainedModel:
        """`model`, from which this was made, with the rounded weights in its own dtype."""
        made = copy.deepcopy(model)
        for name, module in self.model.named_modules():
            if scheme := getattr(module, "quantization_scheme", None):
                packed = get_direct_state_dict(module)
                weight = PackedQuantizationCompressor.decompress(packed, scheme)["weight"]
                made.get_submodule(name).weight.data.copy_(weight)
        return made


def quantize(model: PreTrainedModel, bits: Sequence[int]) -> Packed:
    """A dense or sliced model with the maps of each layer at so many bits: 4, 8 or 16 (as it is).

    At 8 bits each output has a scale, at 4 bits each group of GROUPS inputs of an output, or the
    output where none of GROUPS divides its inputs. The model is left as it was. Raises RequestError
    for other numbers of bits or of layers.
    """
    if getattr(model.config, "quantization_config", None):
        raise RequestError("the weights of this model are quantised already")
    layers = family_of(model.config).layers
    count = len(model.get_submodule(layers))
    if len(bits) != count or not {*bits} <= {*BITS}:
        raise RequestError(
            f"bits {[*bits]} are none of {count} layers; give {', '.join(map(str, BITS))} for each"
        )
    packed, groups = copy.deepcopy(model), {}
    for i, layer in enumerate(packed.get_submodule(layers)):
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear) and bits[i] != WHOLE:
                scheme = _arguments(bits[i], module.in_features)
                groups.setdefault(scheme.model_dump_json(), (scheme, []))[1].append(
                    f"{layers}.{i}.{name}"
                )
    schemes = {
        f"group_{n}": QuantizationScheme(targets=names, weights=scheme)
        for n, (scheme, names) in enumerate(groups.values())
    }
    config = QuantizationConfig(
        config_groups=schemes, format="pack-quantized", quantization_status="initialized"
    )
    maps = {name: scheme for scheme, names in groups.values() for name in names}
    for name in maps:  # in a lower precision the library would round twice
        packed.get_submodule(name).float()
    apply_quantization_config(packed, config, show_progress=False)
    for name, scheme in maps.items():
        _set_scales(packed.get_submodule(name), scheme, model.dtype)
    compressor = ModelCompressor.from_pretrained_model(packed)
    compressor.compress_model(packed)
    for name in maps:
        packed.get_submodule(name).to(model.dtype)
    return Packed(packed, compressor)


def _arguments(bits: int, inputs: int) -> QuantizationArgs:
    size = next((size for size in GROUPS if inputs % size == 0), None) if bits == 4 else None
    how = {"strategy": "group", "group_size": size} if size else {"strategy": "channel"}
    return QuantizationArgs(num_bits=bits, type="int", symmetric=True, **how)


@torch.no_grad()
def _set_scales(module: nn.Linear, scheme: QuantizationArgs, dtype: torch.dtype) -> None:
    """The scale of each group of weights, by its extremes as the library has it, as stored."""
    weight = module.weight.unflatten(1, (-1, scheme.group_size or module.in_features))
    scale, _ = calculate_qparams(weight.amin(-1), weight.amax(-1), scheme)
    module.weight_scale.copy_(scale.to(dtype))
    module.quantization_status = QuantizationStatus.FROZEN


def bits_by(score: str, model: PreTrainedModel, windows: Tensor, share: float) -> list[int]:
    """`bits_by_score` of a dense model by "lr" or "overlap", measured on token windows [n, T]."""
    measure = {"lr": lambda *given: layer_redundancy(*given).lr, "overlap": token_overlap}
    return bits_by_score(measure[score](model, windows), share)


def bits_by_score(score: Sequence[float], share: float) -> list[int]:
    """4 bits for that share of the layers, those of highest score, and 8 for the others."""
    few = sorted(range(len(score)), key=lambda i: -score[i])[: round(share * len(score))]
    return [4 if i in few else 8 for i in range(len(score))]


@torch.inference_mode()
def token_overlap(
    model: PreTrainedModel, windows: Tensor, count: int = TOP_TOKENS
) -> tuple[float, ...]:
    """How far the tokens that a layer's input and output say agree, by layer, from 0 to 1.

    Mean over tokens of windows [n, T] of the Jaccard index of the `count` tokens of highest logit,
    of the head after the final norm. High means redundant (LSAQ, arXiv 2412.18135). Raises
    RequestError for a sliced model and windows that it can't read.
    """
    require_dense(model.config, "token overlap")
    check_tokens(model.config, windows)
    family = family_of(model.config)
    layers = model.get_submodule(family.layers)
    norm, head = model.get_submodule(family.final_norm), model.get_submodule(family.head)
    overlap = torch.zeros(len(layers), dtype=torch.float64)
    before: list[Tensor] = []

    def top(state: Tensor) -> Tensor:
        return head(norm(state)).topk(count, dim=-1).indices

    def look(index: int):
        def hook(_layer, args, output):
            first = before.pop() if before else top(args[0])
            last = top(output)
            shared = (first.unsqueeze(-1) == last.unsqueeze(-2)).sum((-1, -2)).double()
            overlap[index] += (shared / (2 * count - shared)).sum().cpu()
            before[:] = [last] if index + 1 < len(layers) else []

        return hook

    handles = [layer.register_forward_hook(look(i)) for i, layer in enumerate(layers)]
    try:
        with evaluating(model):
            for batch in batches(windows, "token overlap", model.device, logits=True):
                model.base_model(batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return tuple((overlap / windows.numel()).tolist())
