"""What stands in the way of slicing a model exactly."""

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from dynslice.sliced import FAMILIES


def obstacle(config: PretrainedConfig) -> str | None:
    """Why a dense or sliced config can't be sliced exactly; None where it can.

    Slicing is exact where each block reads the stream through one norm and linear maps, and writes
    it by linear maps whose outputs are added as they are.
    """
    if getattr(config, "num_hidden_layers", 1) < 1:
        return "it has no layers"
    if getattr(config, "quantization_config", None):
        return "its weights are quantised, and folding and rotating needs plain ones"
    model_type = config.model_type.removeprefix("sliced_")
    if model_type == "opt":
        return _obstacle_in_opt(config)
    if model_type in FAMILIES:
        return None
    return _obstacle_in_layers(config) or "its layout is no row of the family table"


def _obstacle_in_opt(config: PretrainedConfig) -> str | None:
    if not config.do_layer_norm_before:
        return "its norms stand behind the residual sums (do_layer_norm_before is false)"
    if config._remove_final_layer_norm:
        return "it has no norm before the head (_remove_final_layer_norm is true)"
    if config.word_embed_proj_dim != config.hidden_size:
        return (
            "its embedding is projected into the stream (word_embed_proj_dim "
            f"{config.word_embed_proj_dim}, hidden_size {config.hidden_size})"
        )
    return None


def _obstacle_in_layers(config: PretrainedConfig) -> str | None:
    """What the first layer of a model that is no row of the table shows."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception:  # whatever the library says of a config that is no causal LM
        return "transformers has no causal language model of this type"
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        return "it has no list of layers"
    parts = dict(max(lists, key=len)[0].named_modules())

    def named(*fragments: str) -> str | None:
        return next((name for name in parts if any(f in name for f in fragments)), None)

    if name := named(
        "post_feedforward_layernorm", "post_mlp_layernorm", "post_self_attn_layernorm"
    ):
        return f"its layers norm what a block writes ({name}), and cutting changes that norm"
    if name := named("experts", "router"):
        return f"its layers send tokens to experts ({name})"
    if name := named("mixer", "mamba", "ssm", "conv1d"):
        return f"its layers are no attention blocks ({name})"
    if name := next((n for n, part in parts.items() if type(part).__name__ == "Conv1D"), None):
        return f"it keeps its maps as Conv1D, transposed ({name})"
    return None
