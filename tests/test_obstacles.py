"""A model that can't be sliced exactly is refused, naming what stands in the way."""

import pytest
import transformers

from dynslice.core.errors import RequestError
from dynslice.method.architectures import check_family, obstacle
from dynslice.method.modeling_sliced import FAMILIES

OPT = transformers.OPTConfig


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (transformers.Gemma2Config(), r"norm what a block writes \(post_feedforward_layernorm\)"),
        (transformers.Olmo2Config(), r"norm what a block writes \(post_feedforward_layernorm\)"),
        (transformers.MixtralConfig(), r"send tokens to experts \(mlp.experts\)"),
        (transformers.GPT2Config(), r"Conv1D, transposed \(attn.c_attn\)"),
        (transformers.MambaConfig(), r"no attention blocks \(mixer\)"),
        (transformers.T5Config(), "no causal language model"),
        (transformers.GPTNeoXConfig(), "no row of the family table"),
        (OPT(do_layer_norm_before=False), "norms stand behind the residual sums"),
        (OPT(word_embed_proj_dim=512, hidden_size=1024), "word_embed_proj_dim 512"),
        (transformers.LlamaConfig(quantization_config={"quant_method": "gptq"}), "quantised"),
    ],
    ids=lambda value: value.model_type if hasattr(value, "model_type") else "",
)
def test_what_cannot_be_sliced_exactly_is_refused(config, reason):
    with pytest.raises(RequestError, match=f"can't be sliced exactly: .*{reason}.*; the families"):
        check_family(config)


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_can_be_sliced(name):
    assert obstacle(transformers.AutoConfig.for_model(name)) is None
