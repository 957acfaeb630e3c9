"""Shapes of published models, for random weights and for plans without the hub."""

from transformers import AutoConfig, PretrainedConfig

# As their configurations on the hub say.
_SEVEN_BILLION = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
SHAPES = {
    "llama-3-8b": {"model_type": "llama", "vocab_size": 128256, **_SEVEN_BILLION},
    "mistral-7b": {"model_type": "mistral", "vocab_size": 32000, **_SEVEN_BILLION},
}
OF_HUB = {
    "meta-llama/Meta-Llama-3-8B": "llama-3-8b",
    "mistralai/Mistral-7B-v0.1": "mistral-7b",
}


def config_of(shape: str, layers: int | None = None) -> PretrainedConfig:
    """The configuration of a published shape; `layers` makes it shallower."""
    settings = dict(SHAPES[shape])
    if layers is not None:
        settings["num_hidden_layers"] = layers
    return AutoConfig.for_model(settings.pop("model_type"), **settings)
