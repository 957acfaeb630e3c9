"""What is known of a decoder family, and why a model cannot be sliced."""

import copy

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from dynslice.core.errors import RequestError, in_one_line
from dynslice.core.tensors import without_storage
from dynslice.method.modeling_sliced import (
    FAMILIES,
    SLICED_CLASSES,
    Family,
    has_bias,
    subtracts_mean,
)
from dynslice.method.plan import ModelDims, SlicePlan


def family_of(config) -> Family:
    """The row of the family table for a dense or sliced config."""
    return FAMILIES[config.model_type.removeprefix("sliced_")]


def is_sliced(config) -> bool:
    """Whether a config belongs to a sliced network."""
    return config.model_type.startswith("sliced_")


def is_packed(config) -> bool:
    """Whether a config belongs to weights that compressed-tensors packed, which can be run."""
    quantised = getattr(config, "quantization_config", None) or {}
    given = quantised if isinstance(quantised, dict) else quantised.to_dict()
    kind = given.get("quant_method"), given.get("format")
    return kind == ("compressed-tensors", "pack-quantized")


def check_family(config) -> None:
    """Raise RequestError with the reason when a config can't be sliced exactly."""
    if reason := obstacle(config):
        raise RequestError(
            f"a model of type {config.model_type!r} can't be sliced exactly: {reason}; the "
            f"families are {', '.join(FAMILIES)}"
        )


def require_dense(config, what: str) -> None:
    """Raise RequestError when `config` is that of a sliced network, or of packed weights."""
    if is_sliced(config):
        raise RequestError(f"{what} needs a dense model, and this one is sliced already")
    if is_packed(config):
        raise RequestError(f"{what} needs plain weights, and those of this model are quantised")


def dims_of(config) -> ModelDims:
    """Read the shape off a dense config, through a model without storage."""
    require_dense(config, "a plan")
    family = family_of(config)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # of each part that a config describes
        raise RequestError(
            f"the config.json of the model describes no network ({in_one_line(error)}); save "
            "the model anew with transformers"
        ) from error
    layers = model.get_submodule(family.layers)
    head = model.get_submodule(family.head)
    get = layers[0].get_submodule
    d = config.hidden_size
    reads, writes, fixed = [], [], 0
    for block in family.blocks:
        norm, readers = get(block.norm), [get(name) for name in block.reads]
        writers = [get(name) for name in block.writes]
        reads.append(sum(map_.out_features for map_ in readers))
        writes.append(sum(map_.in_features + (map_.bias is not None) for map_ in writers))
        # A norm's scale goes into the maps that read, and its bias into a bias of theirs.
        fixed -= sum(p.numel() for p in norm.parameters())
        fixed += sum(m.out_features for m in readers if has_bias(norm) and m.bias is None)
    in_layer = sum(p.numel() for p in layers[0].parameters())
    fixed = len(layers) * (fixed + in_layer - d * (sum(reads) + sum(writes)))
    fixed += sum(p.numel() for p in head.parameters())  # it reads the full stream
    embedding, final_norm = (
        model.get_submodule(family.embedding),
        model.get_submodule(family.final_norm),
    )
    final_scale = sum(p.numel() for p in final_norm.parameters())
    if subtracts_mean(final_norm):  # it stays as it is
        fixed, final_scale = fixed + final_scale, 0
    positions = family.positions and model.get_submodule(family.positions).num_embeddings
    return ModelDims(
        hidden_size=d,
        layers=len(layers),
        vocab_size=embedding.num_embeddings,
        reads=tuple(reads),
        writes=tuple(writes),
        fixed=fixed,
        dense_parameters=sum(p.numel() for p in model.parameters()),
        position_rows=positions or 0,
        tied=head.weight is embedding.weight,
        final_scale=final_scale,
        heads=0 if _obstacle_to_plain(config) else config.num_attention_heads,
    )


def check_plan(config, plan: SlicePlan) -> None:
    """Raise RequestError when a plan was made for a model of another shape."""
    require_dense(config, "slicing")
    shape = dims_of(config)
    for name, planned in vars(plan.shape).items():
        here = getattr(shape, name)
        is_new = name in ("tied", "final_scale", "heads")  # a file of an earlier version lacks it
        if here != planned and (planned or not is_new):
            raise RequestError(
                f"the plan was made for another model ({name} {planned}, here {here}); make it "
                "anew with `dynslice plan`"
            )


def empty_sliced(model: PreTrainedModel, plan: SlicePlan) -> PreTrainedModel:
    """The sliced network of a dense model, with parameters that have no storage yet."""
    settings = model.config.to_dict()
    for name in ("model_type", "architectures", "quantization_config"):
        settings.pop(name, None)
    settings |= {"tie_word_embeddings": plan.layout.tied, "dtype": model.dtype}
    if plan.layout.plain:
        model_class, config = type(model), type(model.config)(**settings | _narrower(model, plan))
    else:
        config_class, model_class = SLICED_CLASSES[model.config.model_type]
        config = config_class(
            **settings,
            attention_widths=list(plan.attention_widths),
            mlp_widths=list(plan.mlp_widths),
            shortcuts=None if all(plan.shortcuts) else list(plan.shortcuts),
            maps_embedding=plan.maps_embedding,
        )
    sliced = without_storage(lambda: model_class(config))  # the weights it takes are all there are
    sliced.generation_config = copy.deepcopy(model.generation_config)
    return sliced


def _narrower(model: PreTrainedModel, plan: SlicePlan) -> dict:
    """What the config of an ordinary checkpoint of the plan's one width says otherwise.

    Its norms divide by w instead of d, which a scale of sqrt(d/w) and the eps make good. The heads
    keep their size.
    """
    config, width = model.config, plan.widths[0]
    heads, d = config.num_attention_heads, config.hidden_size
    return {
        "hidden_size": width,
        "head_dim": getattr(config, "head_dim", None) or d // heads,
        "rms_norm_eps": config.rms_norm_eps * d / width,
    }


def check_plain(config) -> None:
    """Raise RequestError with the reason when no ordinary checkpoint of a family can be a slice."""
    if reason := _obstacle_to_plain(config):
        raise RequestError(
            f"a model of type {config.model_type!r} has no plain slice: {reason}; leave --plain out"
        )


def _obstacle_to_plain(config) -> str | None:
    if not hasattr(config, "rms_norm_eps"):
        return "its norms (LayerNorm) take away a mean over the full width"
    if family_of(config).norm_offset:
        return "its embedding is scaled by the hidden size"
    if (getattr(config, "rope_parameters", None) or {}).get("rope_type") == "longrope":
        return "its library class derives the rotary factors from the hidden size (longrope)"
    return None


def obstacle(config: PretrainedConfig) -> str | None:
    """Why a config can't be sliced exactly; None where it can.

    Each block must read the stream through one norm and linear maps, and write it by linear maps.
    """
    if getattr(config, "num_hidden_layers", 1) < 1:
        return "it has no layers"
    if getattr(config, "quantization_config", None) and not is_packed(config):
        return "its weights are quantised, and folding and rotating needs plain ones"
    model_type = config.model_type.removeprefix("sliced_")
    if model_type not in FAMILIES:
        return _obstacle_in_layers(config) or "its layout is no row of the family table"
    named = getattr(config, "architectures", None) or ["ForCausalLM"]
    if not any(str(name).endswith("ForCausalLM") for name in named):
        return f"its config.json names {named[0]}, which is no causal language model"
    return _obstacle_in_opt(config) if model_type == "opt" else None


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
