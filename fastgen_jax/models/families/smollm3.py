"""SmolLM3: Llama with no rotary embedding in every fourth layer."""

from __future__ import annotations

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import common
from fastgen_jax.models.families.common import Source
from fastgen_jax.models.families.fields import Fields, reads_every_field
from fastgen_jax.models.families.rope import rotary

ARCHITECTURES = ("SmolLM3ForCausalLM",)
FEATURES = "layers without positions; windows; biases; YaRN"


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`."""
    count, bias = hf["num_hidden_layers"], hf.get("attention_bias", False)
    positions = rotary(hf, max_context_len=32_768, theta=2_000_000.0)
    interval = hf.get("no_rope_layer_interval", 4)
    turns = hf.get("no_rope_layers") or [
        (layer + 1) % interval != 0 for layer in range(count)
    ]  # true: with rotary embedding
    window = hf.get("sliding_window")
    if not hf.get("use_sliding_window", False):
        window = None
    hf.ignore("max_window_layers")  # unused: windows are in the layers without rotary embedding
    return ModelConfig(
        family="smollm3",
        **common.sizes(hf, assumed={"num_key_value_heads": 4}),
        **positions,
        layer_ropes=tuple(positions["rope"] if turn else None for turn in turns),
        layer_windows=common.windows(hf, window, lambda layer: not turns[layer]),
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        tie_embeddings=hf.get("tie_word_embeddings", True),
        qkv_bias=bias,
        o_bias=bias,
        activation=common.activation(hf, default="silu"),
        mlp_bias=hf.get("mlp_bias", False),
    )


def sources(config: ModelConfig) -> dict[str, Source]:
    """The checkpoint tensors of each weight of `param_specs`."""
    return common.sources_from(config, common.LLAMA_NAMES)
