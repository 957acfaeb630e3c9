"""Small real models of each family, the embedded model, and the plain oracles."""

import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from dynslice import assets, models
from dynslice.models import family_of

CPU = torch.device("cpu")


def _tiny(config_class, model_class, **extra):
    torch.manual_seed(1)
    config = config_class(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        **extra,
    )
    model = model_class(config).eval()
    for name, parameter in model.named_parameters():  # scales and biases that matter
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


TINY = {
    "llama": lambda: _tiny(LlamaConfig, LlamaForCausalLM, tie_word_embeddings=True),
    "llama-biases": lambda: _tiny(
        LlamaConfig, LlamaForCausalLM, attention_bias=True, mlp_bias=True
    ),
    "mistral": lambda: _tiny(MistralConfig, MistralForCausalLM, sliding_window=None),
    "mistral-sliding": lambda: _tiny(
        MistralConfig, MistralForCausalLM, sliding_window=8, head_dim=16
    ),
}


@pytest.fixture(params=TINY)
def tiny(request):
    """A tiny random model of a real class, in float32."""
    return TINY[request.param]()


@pytest.fixture
def tokens():
    """Token windows [6, 24], longer than the sliding window of the tiny Mistral."""
    return torch.randint(2, 97, (6, 24), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="session")
def smollm2():
    """The embedded model and its tokenizer, float32 on CPU."""
    assets.fetch()
    return models.load("embedded:smollm2-135m", CPU, torch.float32)


@pytest.fixture
def dynslice():
    """Run the command line in a process of its own: (exit status, stdout, stderr)."""

    def run(*arguments, **options):
        finished = subprocess.run(
            [sys.executable, "-m", "dynslice", *map(str, arguments)],
            capture_output=True,
            text=True,
            **options,
        )
        return finished.returncode, finished.stdout, finished.stderr

    return run


@torch.inference_mode()
def projector_oracle(model, calibration, evaluation, attention_widths, mlp_widths):
    """Logits of the dense model with projectors in its residual stream, by its definition.

    Follows METHOD section 1 with none of the package's code: whole forward passes of the dense
    decoder layers with hooks that replace x by x Q Q^T before attention and, through the MLP's
    norm, before the MLP; each Q from the calibration signals that reach its place.
    """
    family = family_of(model.config)
    layers = model.get_submodule(family.layers)
    places = [(i, kind) for i in range(len(layers)) for kind in ("attention", "mlp")]
    projectors = {}

    def widths(i, kind):
        return (attention_widths if kind == "attention" else mlp_widths)[i]

    def run(tokens, watch=None):
        seen = {}

        def enter_layer(i):
            def hook(_module, args):
                x = args[0].double()
                if watch == (i, "attention"):
                    seen["x"] = x
                if (i, "attention") in projectors:
                    x = x @ projectors[i, "attention"]
                return (x.to(args[0].dtype), *args[1:])

            return hook

        def enter_mlp(i, layer):
            # The MLP's residual is what enters its norm, so the layer is taken apart here.
            def forward(hidden_states, **kwargs):
                residual = hidden_states
                h, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **kwargs)
                x = (residual + h).double()
                if watch == (i, "mlp"):
                    seen["x"] = x
                if (i, "mlp") in projectors:
                    x = x @ projectors[i, "mlp"]
                x = x.to(hidden_states.dtype)
                return x + layer.mlp(layer.post_attention_layernorm(x))

            return forward

        handles, originals = [], []
        for i, layer in enumerate(layers):
            handles.append(layer.register_forward_pre_hook(enter_layer(i)))
            originals.append(layer.forward)
            layer.forward = enter_mlp(i, layer)
        try:
            logits = model(tokens, use_cache=False).logits
        finally:
            for handle in handles:
                handle.remove()
            for layer, original in zip(layers, originals, strict=True):
                layer.forward = original
        return seen.get("x"), logits

    for place in places:
        x, _ = run(calibration, watch=place)
        rows = x.reshape(-1, x.shape[-1])
        _, vectors = torch.linalg.eigh(rows.T @ rows)
        Q = vectors[:, vectors.shape[1] - widths(*place) :]
        projectors[place] = Q @ Q.T
    return run(evaluation)[1]
