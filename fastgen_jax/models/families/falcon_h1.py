"""Falcon-H1: attention and Mamba 2 side by side in every layer, and multipliers almost everywhere."""

from __future__ import annotations

import math

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import common
from fastgen_jax.models.families.common import Source
from fastgen_jax.models.families.fields import Fields, reads_every_field
from fastgen_jax.models.families.rope import rotary
from fastgen_jax.models.families.state_layers import state_names
from fastgen_jax.models.state_config import Mamba2

ARCHITECTURES = ("FalconH1ForCausalLM",)
FEATURES = "attention and Mamba 2 in every layer; multipliers; with or without a norm after the state"


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`."""
    # One field for two biases: that of the output of the state here, that of its input in `mamba_proj_bias`.
    supported = {
        "attention_bias": (False,),
        "projectors_bias": (False,),
        "mamba_proj_bias": (False,),
        "mlp_bias": (False,),
        "mamba_use_mlp": (True,),
    }
    common.refuse_unsupported(hf, supported)
    hf.ignore(
        *supported, "num_logits_to_keep", "mamba_chunk_size", "mlp_expansion_factor", "attn_layer_indices", "time_step_limit"
    )
    sizes = common.sizes(hf)
    inner = hf.get("mamba_d_ssm", 1024) or hf.get("mamba_expand", 2) * hf["hidden_size"]
    hf.ignore("mamba_expand")
    num_heads, head_dim = hf.get("mamba_n_heads", 128), hf.get("mamba_d_head", "auto")
    groups, has_norm = hf.get("mamba_n_groups", 1), hf.get("mamba_rms_norm", False)
    norm_first = hf.get("mamba_norm_before_gate", True)
    attention_in, ssm_in = hf.get("attention_in_multiplier", 1.0), hf.get("ssm_in_multiplier", 1.0)
    activation = common.activation(hf, default="silu")
    gate, down = hf.get("mlp_multipliers") or (1.0, 1.0)
    parts = hf.get("ssm_multipliers") or (1.0,) * 5
    return ModelConfig(
        family="falcon_h1",
        **sizes,
        **rotary(hf, max_context_len=8192),
        norm_eps=hf.get("rms_norm_eps", 1e-5),
        tie_embeddings=hf.get("tie_word_embeddings", False),
        activation=activation,
        embed_multiplier=hf.get("embedding_multiplier", 1.0),
        logits_multiplier=hf.get("lm_head_multiplier", 1.0),
        # Queries, keys and values are all linear in the multiplied input, and scores in the keys.
        attention_scale=attention_in**2 * hf.get("key_multiplier", 1.0) / math.sqrt(sizes["head_dim"]),
        attention_multiplier=attention_in * hf.get("attention_out_multiplier", 1.0),
        mlp_multipliers=(gate, down),
        state=Mamba2(
            layers=tuple(range(hf["num_hidden_layers"])),
            num_heads=num_heads,
            head_dim=inner // num_heads if head_dim == "auto" else head_dim,
            num_groups=groups,
            state_dim=hf.get("mamba_d_state", 256),
            width=hf.get("mamba_d_conv", 4),
            activation=activation,
            conv_bias=hf.get("mamba_conv_bias", True),
            norm_groups=groups if has_norm else 0,
            norm_first=has_norm and norm_first,
            in_multipliers=tuple(ssm_in * part for part in parts),
            out_multiplier=hf.get("ssm_out_multiplier", 1.0),
        ),
    )


def sources(config: ModelConfig) -> dict[str, Source]:
    """The checkpoint tensors of each weight of `param_specs`."""
    layer = "model.layers.{layer}"
    return common.sources_from(
        config,
        {
            **common.LLAMA_NAMES,
            **state_names(f"{layer}.mamba"),
            "final_norm": "model.final_layernorm",
            "layers.mlp_norm": f"{layer}.pre_ff_layernorm",
            "layers.mix_in": f"{layer}.mamba.in_proj",
            "layers.gate_up": (f"{layer}.feed_forward.gate_proj", f"{layer}.feed_forward.up_proj"),
            "layers.down": f"{layer}.feed_forward.down_proj",
        },
    )
