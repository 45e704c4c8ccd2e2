"""Cohere's Command R7B and Command A: Cohere with sliding windows, and no position encoding in the other layers."""

from __future__ import annotations

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import cohere, common
from fastgen_jax.models.families.common import Source
from fastgen_jax.models.families.fields import Fields, reads_every_field
from fastgen_jax.models.families.rope import rotary

ARCHITECTURES = ("Cohere2ForCausalLM",)
FEATURES = "windows in three of four layers, no positions in the fourth; biases"


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`."""
    common.refuse_unsupported(
        hf,
        {
            "rotary_pct": (1.0,),
            "position_embedding_type": ("rope_gptj",),
            "use_gated_activation": (True,),
            "use_parallel_block": (True,),
            "use_embedding_sharing": (True,),
            "use_parallel_embedding": (True, False),
            "order_of_interleaved_layers": ("local_attn_first",),
        },
    )
    bias = hf.get("attention_bias", False)
    period = hf.first("sliding_window_pattern", "_sliding_window_pattern", "layer_switch", default=4)
    windows = common.windows(hf, hf.get("sliding_window", 4096), lambda layer: (layer + 1) % period != 0)
    positions = rotary(hf, max_context_len=8192)
    return ModelConfig(
        family="cohere2",
        **common.sizes(hf),
        **positions,
        layer_windows=windows,
        layer_ropes=tuple(None if window is None else positions["rope"] for window in windows),
        norm="layer",
        norm_eps=hf.get("layer_norm_eps", 1e-5),
        parallel_residual=True,
        shared_norm=True,
        tie_embeddings=hf.get("tie_word_embeddings", True),
        logits_multiplier=hf.get("logit_scale", 0.0625),
        qkv_bias=bias,
        o_bias=bias,
        activation=common.activation(hf, default="silu"),
    )


def sources(config: ModelConfig) -> dict[str, Source]:
    """The checkpoint tensors of each weight of `param_specs`."""
    return cohere.sources(config)
