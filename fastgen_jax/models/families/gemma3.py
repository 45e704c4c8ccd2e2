"""Gemma 3: Gemma 2 with norms on queries and keys instead of soft caps; sliding windows in five of six layers, which have
their own rotary embedding. 4B and larger read images."""

from __future__ import annotations

import math

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import common
from fastgen_jax.models.families.common import Source
from fastgen_jax.models.families.fields import Fields, reads_every_field
from fastgen_jax.models.families.gemma2 import NAMES
from fastgen_jax.models.families.rope import ropes_by_layer_type

ARCHITECTURES = ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration")
FEATURES = "270M and 1B; 4B, 12B and 27B with images"
# The config.json of multimodal checkpoints leaves out these defaults.
_SIZES = {"vocab_size": 262_208, "num_attention_heads": 8, "num_key_value_heads": 4}


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`."""
    bias = hf.get("attention_bias", False)
    common.refuse_unsupported(
        hf,
        {
            "attn_logit_softcapping": (None,),
            "use_bidirectional_attention": (False, None),
            "hidden_act": (hf.get("hidden_activation") or "gelu_pytorch_tanh", None),
        },
    )
    period = hf.first("sliding_window_pattern", "_sliding_window_pattern", default=6)
    windows = common.windows(hf, hf.get("sliding_window", 4096), lambda layer: (layer + 1) % period != 0)
    context = hf.get("max_position_embeddings", 131_072)
    everywhere, windowed = ropes_by_layer_type(
        hf, max_context_len=context, theta=1_000_000.0, windowed_theta=hf.get("rope_local_base_freq") or 10_000.0
    )
    return ModelConfig(
        family="gemma3",
        exceeds_float16=True,
        **common.sizes(hf, head_dim=256, assumed=_SIZES),
        max_context_len=context,
        rope=everywhere,
        layer_ropes=tuple(everywhere if window is None else windowed for window in windows),
        layer_windows=windows,
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        norm_offset=1.0,
        norm_placement="both",
        embed_multiplier=math.sqrt(hf["hidden_size"]),
        tie_embeddings=hf.get("tie_word_embeddings", True),
        logits_soft_cap=hf.get("final_logit_softcapping"),
        qkv_bias=bias,
        o_bias=bias,
        qk_norm="head",
        attention_scale=hf.get("query_pre_attn_scalar", 256) ** -0.5,
        activation=common.activation(hf, "hidden_activation", default="gelu_pytorch_tanh"),
    )


def sources(config: ModelConfig) -> dict[str, Source]:
    """The checkpoint tensors of each weight of `param_specs`."""
    return common.sources_from(config, NAMES)
