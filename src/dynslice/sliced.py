"""Sliced networks as transformers models.

This file is self-contained on purpose: `save_pretrained` copies it beside the weights, so that
`AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)` works where dynslice is not
installed. It therefore also holds the table of families: which parts of a decoder read the
residual stream, which write it, and which norm scales stand between.

Around layer i of a network with residual width d, the stream has a_i dimensions before attention
and m_i before the MLP (SliceGPT section 3.3; METHOD: attention and MLP share w_i, and the MLP
writes in the width of the next layer):

    tokens -> embedding [a_0] -> attention -> [m_0] -> MLP -> [a_1] -> ... -> [d] -> norm -> head

Where the basis changes, the residual connection is multiplied by a small matrix, the *shortcut*.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer


@dataclass(frozen=True)
class Block:
    """One residual block `x + write(module(norm(x)))`, by attribute names inside a layer."""

    norm: str
    module: str
    reads: tuple[str, ...]
    write: str


@dataclass(frozen=True)
class Family:
    """Where a decoder family keeps its parts, by attribute paths from the causal LM."""

    embedding: str
    layers: str
    attention: Block
    mlp: Block
    final_norm: str
    head: str

    @property
    def blocks(self) -> tuple[Block, Block]:
        """The blocks of a layer in the order in which they run."""
        return self.attention, self.mlp


_LLAMA = Family(
    embedding="model.embed_tokens",
    layers="model.layers",
    attention=Block(
        norm="input_layernorm",
        module="self_attn",
        reads=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        write="self_attn.o_proj",
    ),
    mlp=Block(
        norm="post_attention_layernorm",
        module="mlp",
        reads=("mlp.gate_proj", "mlp.up_proj"),
        write="mlp.down_proj",
    ),
    final_norm="model.norm",
    head="lm_head",
)
FAMILIES = {"llama": _LLAMA, "mistral": _LLAMA}


class RootMeanSquare(nn.Module):
    """RMS normalisation without a scale, divided by the *original* hidden size.

    The scale is folded into the maps that read the stream. A slice keeps the d of the dense
    network as the divisor, because the directions it dropped still counted there (METHOD 1.5).
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

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        attention, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states @ self.attention_shortcut + attention
        mlp = self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states @ self.mlp_shortcut + mlp


@cache
def _sliced_layer_class(base: type) -> type:
    # A subclass of the library's own layer, so that what it does by class (recording hidden
    # states, gradient checkpointing) goes on working.
    assert issubclass(base, GradientCheckpointingLayer)
    return type("SlicedLayer", (SlicedLayerMixin, base), {})


class SlicedMixin:
    """A causal LM of a family, with the widths that its config lists.

    Config fields: `attention_widths` [L] (a_i) and `mlp_widths` [L] (m_i); the stream after the
    last layer keeps the full hidden size.
    """

    _no_split_modules = ["SlicedLayer"]
    _tied_weights_keys = None

    def __init__(self, config):
        super().__init__(config)
        family = FAMILIES[config.model_type.removeprefix("sliced_")]
        a = [*config.attention_widths, config.hidden_size]
        m = config.mlp_widths

        embedding = self.get_submodule(family.embedding)
        self.set_submodule(
            family.embedding, nn.Embedding(embedding.num_embeddings, a[0], embedding.padding_idx)
        )
        for i, layer in enumerate(self.get_submodule(family.layers)):
            layer.__class__ = _sliced_layer_class(type(layer))
            for block, width in zip(family.blocks, (a[i], m[i]), strict=True):
                for name in block.reads:
                    _resize(layer, name, in_features=width)
                setattr(layer, block.norm, _scale_free(getattr(layer, block.norm)))
            _resize(layer, family.attention.write, out_features=m[i])
            _resize(layer, family.mlp.write, out_features=a[i + 1])
            layer.attention_shortcut = nn.Parameter(torch.empty(a[i], m[i]))
            layer.mlp_shortcut = nn.Parameter(torch.empty(m[i], a[i + 1]))
        self.set_submodule(family.final_norm, _scale_free(self.get_submodule(family.final_norm)))


def _scale_free(norm: nn.Module) -> RootMeanSquare:
    return RootMeanSquare(norm.weight.numel(), norm.variance_epsilon)


def _resize(layer: nn.Module, name: str, **features: int) -> None:
    old = layer.get_submodule(name)
    sizes = {"in_features": old.in_features, "out_features": old.out_features, **features}
    layer.set_submodule(name, nn.Linear(**sizes, bias=old.bias is not None))


class SlicedLlamaConfig(LlamaConfig):
    model_type = "sliced_llama"


class SlicedLlamaForCausalLM(SlicedMixin, LlamaForCausalLM):
    config_class = SlicedLlamaConfig


class SlicedMistralConfig(MistralConfig):
    model_type = "sliced_mistral"


class SlicedMistralForCausalLM(SlicedMixin, MistralForCausalLM):
    config_class = SlicedMistralConfig


SLICED_CLASSES = {
    "llama": (SlicedLlamaConfig, SlicedLlamaForCausalLM),
    "mistral": (SlicedMistralConfig, SlicedMistralForCausalLM),
}
for _config, _model in SLICED_CLASSES.values():
    _config.register_for_auto_class()
    _model.register_for_auto_class("AutoModelForCausalLM")
