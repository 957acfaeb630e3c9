"""Sliced networks as transformers models, and the table of families.

This file is self-contained on purpose: `save_pretrained` copies it next to the weights, so that
`AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)` works where dynslice is not
installed. It therefore also holds the table of families: which parts of a decoder read the
residual stream, which write it, and which norms stand between.

A layer is one block after another, each x + f(norm(x)); the stream has a width of its own at the
place before each block. With residual width d, a_i dimensions before attention and m_i before the
MLP of layer i (SliceGPT section 3.3, docs/method.md; in a plan attention and MLP share w_i, and the
MLP writes in the width of the next layer):

    tokens -> embedding [a_0] -> attention -> [m_0] -> MLP -> [a_1] -> ... -> [d] -> norm -> head

Where the basis changes, the residual connection is multiplied by a small matrix, the *shortcut*;
where it stays, the stream is cut, or padded with zeros. A table that embedding and head share keeps
the coordinates of the dense model, and a map [d, a_0] follows the embedding.
"""

import sys
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

if int(transformers.__version__.partition(".")[0]) < 5:
    raise ImportError("a slice needs transformers 5 or newer: older ones misread its rope theta")


@dataclass(frozen=True)
class Branch:
    """A path from the normed stream back into it, by attribute names inside a layer.

    modules run one after the other; attention is also given the layer's arguments (masks,
    positions, cache). reads and write are its linear maps from and into the stream.
    """

    modules: tuple[str, ...]
    reads: tuple[str, ...]
    write: str
    attention: bool = False


@dataclass(frozen=True)
class Block:
    """One residual block: x + the sum of its branches, each reading norm(x)."""

    name: str
    norm: str
    branches: tuple[Branch, ...]

    @property
    def reads(self) -> tuple[str, ...]:
        """The maps that read the stream."""
        return tuple(name for branch in self.branches for name in branch.reads)

    @property
    def writes(self) -> tuple[str, ...]:
        """The maps that write it."""
        return tuple(branch.write for branch in self.branches)


@dataclass(frozen=True)
class Family:
    """Where a decoder family keeps its parts, by attribute paths from the causal LM.

    base: prefix of the library's class names. blocks: those of a layer, in order. positions:
    learned position embeddings, which write the stream too. norm_offset is added to the stored
    scale of an RMS norm.
    """

    base: str
    embedding: str
    layers: str
    blocks: tuple[Block, ...]
    final_norm: str
    head: str = "lm_head"
    positions: str | None = None
    norm_offset: float = 0.0

    @property
    def embeddings(self) -> tuple[str, ...]:
        """Every table whose rows make up the first stream."""
        return (self.embedding, self.positions) if self.positions else (self.embedding,)


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_ATTENTION = Branch(("self_attn",), _QKV, "self_attn.o_proj", attention=True)
_MLP = Branch(("mlp",), ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj")

_LLAMA = Family(
    base="Llama",
    embedding="model.embed_tokens",
    layers="model.layers",
    blocks=(
        Block("attention", "input_layernorm", (_ATTENTION,)),
        Block("mlp", "post_attention_layernorm", (_MLP,)),
    ),
    final_norm="model.norm",
)

FAMILIES = {
    "llama": _LLAMA,
    "mistral": replace(_LLAMA, base="Mistral"),
    "qwen2": replace(_LLAMA, base="Qwen2"),  # biases in q, k and v
    "qwen3": replace(_LLAMA, base="Qwen3"),  # norms of q and k, inside attention
    "gemma": replace(_LLAMA, base="Gemma", norm_offset=1.0),  # its embedding scales the rows
    "phi3": replace(  # fused maps
        _LLAMA,
        base="Phi3",
        blocks=(
            Block(
                "attention",
                "input_layernorm",
                (replace(_ATTENTION, reads=("self_attn.qkv_proj",)),),
            ),
            Block("mlp", "post_attention_layernorm", (replace(_MLP, reads=("mlp.gate_up_proj",)),)),
        ),
    ),
    "opt": Family(  # LayerNorm, learned positions
        base="OPT",
        embedding="model.decoder.embed_tokens",
        positions="model.decoder.embed_positions",
        layers="model.decoder.layers",
        blocks=(
            Block(
                "attention",
                "self_attn_layer_norm",
                (replace(_ATTENTION, write="self_attn.out_proj"),),
            ),
            Block(
                "mlp",
                "final_layer_norm",
                (Branch(("fc1", "activation_fn", "fc2"), ("fc1",), "fc2"),),
            ),
        ),
        final_norm="model.decoder.final_layer_norm",
    ),
    "phi": Family(  # Phi-2: LayerNorm, attention and MLP side by side behind one norm
        base="Phi",
        embedding="model.embed_tokens",
        layers="model.layers",
        blocks=(
            Block(
                "parallel",
                "input_layernorm",
                (
                    replace(_ATTENTION, write="self_attn.dense"),
                    Branch(("mlp",), ("mlp.fc1",), "mlp.fc2"),
                ),
            ),
        ),
        final_norm="model.final_layernorm",
    ),
}


def subtracts_mean(norm: nn.Module) -> bool:
    """Whether a norm is a LayerNorm, which takes the mean over d away and may add a bias."""
    return isinstance(norm, nn.LayerNorm)


def block_output(layer: nn.Module, block: Block, x: torch.Tensor, arguments: dict) -> torch.Tensor:
    """What a dense or sliced block adds to the stream: x [b, T, w] -> [b, T, w']."""
    normed = layer.get_submodule(block.norm)(x)
    outputs = [_branch_output(layer, branch, normed, arguments) for branch in block.branches]
    return sum(outputs[1:], start=outputs[0])


def _branch_output(layer: nn.Module, branch: Branch, x: torch.Tensor, arguments: dict):
    for name in branch.modules:
        module = layer.get_submodule(name)
        x = module(hidden_states=x, **arguments)[0] if branch.attention else module(x)
    return x


class RootMeanSquare(nn.Module):
    """RMS normalisation without a scale, divided by the *original* hidden size.

    The scale is folded into the maps that read the stream. A slice keeps the d of the dense
    network as the divisor, because the directions it dropped still counted there (docs/method.md).
    """

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.hidden_size = hidden_size
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., w] with w <= hidden_size -> [..., w], computed in float32."""
        x32 = x.float()
        mean_square = x32.pow(2).sum(-1, keepdim=True) / self.hidden_size
        return (x32 * torch.rsqrt(mean_square + self.eps)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"hidden_size={self.hidden_size}, eps={self.eps}"


class SlicedLayerMixin:
    """Forward of a decoder layer whose stream changes basis: [.., a_i] -> [.., a_{i+1}]."""

    def __reduce__(self):
        # Pickled by what its class is made of: no module has that class by its name.
        library_class = type(self).__mro__[2]
        return _unpickled, (_sliced_layer_class, (library_class, self.blocks)), self.__dict__

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        for block in self.blocks:
            output = block_output(self, block, hidden_states, kwargs)
            shortcut = getattr(self, f"{block.name}_shortcut")
            if shortcut is None:
                hidden_states = fitted(hidden_states, output.shape[-1]) + output
            else:
                hidden_states = hidden_states @ shortcut + output
        return hidden_states


def fitted(x: torch.Tensor, width: int) -> torch.Tensor:
    """x [.., w] -> [.., width] in the same basis: cut, or padded with zeros."""
    more = width - x.shape[-1]
    return F.pad(x, (0, more)) if more > 0 else x[..., :width]


class SlicedEmbeddingMixin:
    """A table [V, d] that the head shares, and what takes its rows to the first stream [.., a_0].

    is_centred: whether the mean over d is taken from the rows, for norms that would take it away.
    """

    def __reduce__(self):
        library_class = type(self).__mro__[2]
        return _unpickled, (_sliced_embedding_class, (library_class,)), self.__dict__

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = super().forward(input_ids)
        if self.is_centred:
            x = x - x.mean(dim=-1, keepdim=True)
        return x if self.map is None else x @ self.map


@cache
def _sliced_layer_class(base: type, blocks: tuple[Block, ...]) -> type:
    # A subclass of the library's own layer, so that what it does by class (recording hidden
    # states, gradient checkpointing) goes on working.
    assert issubclass(base, GradientCheckpointingLayer)
    return type("SlicedLayer", (SlicedLayerMixin, base), {"blocks": blocks})


@cache
def _sliced_embedding_class(base: type) -> type:
    return type("SlicedEmbedding", (SlicedEmbeddingMixin, base), {})


def _unpickled(class_of, parts: tuple) -> nn.Module:
    made = class_of(*parts)
    return made.__new__(made)


class SlicedMixin:
    """A causal LM of a family, with the widths that its config lists.

    Config fields: `attention_widths` [L] (a_i) and `mlp_widths` [L] (m_i); the stream after the
    last layer keeps the full hidden size. `shortcuts`: whether the basis changes past each block
    in turn, None for past each one. `maps_embedding`: whether a tied embedding has a map.
    """

    _no_split_modules = ["SlicedLayer"]

    def __init__(self, config):
        super().__init__(config)
        model_type = config.model_type.removeprefix("sliced_")
        family = FAMILIES[model_type]
        _tell_peft(config.model_type, model_type)
        d = config.hidden_size
        rows = zip(config.attention_widths, config.mlp_widths, strict=True)
        # A layer of one block, attention and MLP in parallel, has one place: a_i.
        widths = [width for row in rows for width in row[: len(family.blocks)]] + [d]

        has_shortcut = getattr(config, "shortcuts", None) or [True] * (len(widths) - 1)
        final_norm = self.get_submodule(family.final_norm)
        is_tied = config.tie_word_embeddings

        for name in family.embeddings:
            table = self.get_submodule(name)
            if is_tied and name == family.embedding:
                table.__class__ = _sliced_embedding_class(type(table))
                table.is_centred = subtracts_mean(final_norm)
                table.map = _matrix(config.maps_embedding, d, widths[0])
            else:
                table.embedding_dim = widths[0]
                table.weight = _matrix(True, table.num_embeddings, widths[0])
        steps = zip(pairwise(widths), has_shortcut, strict=True)
        for layer in self.get_submodule(family.layers):
            layer.__class__ = _sliced_layer_class(type(layer), family.blocks)
            for block in family.blocks:
                (width, next_width), changes_basis = next(steps)
                norm = layer.get_submodule(block.norm)
                for name in block.reads:
                    _resize(layer, name, in_features=width, bias=has_bias(norm))
                for name in block.writes:
                    _resize(layer, name, out_features=next_width)
                setattr(layer, block.norm, _scale_free(norm, d))
                shortcut = _matrix(changes_basis, width, next_width)
                layer.register_parameter(f"{block.name}_shortcut", shortcut)
        # A LayerNorm stays: the head reads the full stream. A table that the embedding shares has
        # no room for the scale of the norm before it.
        if not (subtracts_mean(final_norm) or is_tied):
            self.set_submodule(family.final_norm, _scale_free(final_norm, d))


def _tell_peft(model_type: str, dense: str) -> None:
    """Let peft, where it is in use, adapt by default what it adapts in the dense family."""
    if peft := sys.modules.get("peft"):
        targets = peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
        if dense in targets:
            targets.setdefault(model_type, targets[dense])


def _matrix(is_there: bool, rows: int, columns: int) -> nn.Parameter | None:
    return nn.Parameter(torch.empty(rows, columns)) if is_there else None


def has_bias(norm: nn.Module) -> bool:
    """Whether a norm adds a bias, which goes into the maps that read behind it."""
    return getattr(norm, "bias", None) is not None


def _scale_free(norm: nn.Module, hidden_size: int) -> RootMeanSquare:
    eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
    return RootMeanSquare(hidden_size, eps)


def _resize(layer: nn.Module, name: str, bias: bool = False, **features: int) -> None:
    old = layer.get_submodule(name)
    sizes = {"in_features": old.in_features, "out_features": old.out_features, **features}
    layer.set_submodule(name, nn.Linear(**sizes, bias=bias or old.bias is not None))


def _classes(model_type: str, base: str) -> tuple[type, type]:
    """The config and the model of a sliced family, under the library's auto classes."""
    config = getattr(transformers, f"{base}Config")
    config = type(f"Sliced{base}Config", (config,), {"model_type": f"sliced_{model_type}"})
    model = getattr(transformers, f"{base}ForCausalLM")
    model = type(f"Sliced{base}ForCausalLM", (SlicedMixin, model), {"config_class": config})
    config.register_for_auto_class()
    model.register_for_auto_class("AutoModelForCausalLM")
    return config, model


SLICED_CLASSES = {name: _classes(name, family.base) for name, family in FAMILIES.items()}

# A saved model names its classes, so each must be found in this module by its name.
globals().update({made.__name__: made for pair in SLICED_CLASSES.values() for made in pair})
