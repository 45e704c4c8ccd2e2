"""OLMo 3: OLMo 2 with a sliding window in three of four layers; rotary scaling applies only to the others."""

from __future__ import annotations

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import common, olmo2
from fastgen_jax.models.families.common import Source
from fastgen_jax.models.families.fields import Fields, reads_every_field
from fastgen_jax.models.families.rope import ropes_by_layer_type

ARCHITECTURES = ("Olmo3ForCausalLM",)
FEATURES = "7B and 32B; windows; YaRN in the layers without; biases"


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`."""
    bias, context = hf.get("attention_bias", False), hf.get("max_position_embeddings", 2048)
    windows = common.windows(hf, hf.get("sliding_window", 4096), lambda layer: (layer + 1) % 4 != 0)
    theta = hf.get("rope_theta") or 500_000.0
    everywhere, windowed = ropes_by_layer_type(hf, max_context_len=context, theta=theta, windowed_theta=theta)
    return ModelConfig(
        family="olmo3",
        **common.sizes(hf),
        max_context_len=context,
        rope=everywhere,
        layer_ropes=tuple(everywhere if window is None else windowed for window in windows),
        layer_windows=windows,
        norm_eps=hf.get("rms_norm_eps", 1e-5),
        norm_placement="output",
        tie_embeddings=hf.get("tie_word_embeddings", False),
        qkv_bias=bias,
        o_bias=bias,
        qk_norm="row",
        activation=common.activation(hf, default="silu"),
    )


def sources(config: ModelConfig) -> dict[str, Source]:
    """The checkpoint tensors of each weight of `param_specs`."""
    return olmo2.sources(config)
