"""StableLM 3B, 2-1.6B and 2-12B: Llama with LayerNorm and part of each head rotated; the 12B is parallel."""

from __future__ import annotations

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import common
from fastgen_jax.models.families.common import Source
from fastgen_jax.models.families.fields import Fields, reads_every_field
from fastgen_jax.models.families.rope import rotary

ARCHITECTURES = ("StableLmForCausalLM", "StableLMEpochForCausalLM")
FEATURES = "sequential or parallel; per-head norms on queries and keys; biases on queries, keys and values"


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`."""
    sizes, parallel = common.sizes(hf), hf.get("use_parallel_residual", False)
    common.refuse_unsupported(hf, {"rotary_scaling_factor": (1.0,), "num_heads": (sizes["num_heads"],)})
    hf.ignore("rotary_scaling_factor", "num_heads")  # of the releases before transformers had the family
    return ModelConfig(
        family="stablelm",
        **sizes,
        **rotary(hf, max_context_len=4096, head_dim=sizes["head_dim"], partial=hf.get("rope_pct", 0.25)),
        norm="layer",
        norm_eps=hf.first("layer_norm_eps", "norm_eps", default=1e-5),
        norm_bias=True,
        parallel_residual=parallel,
        shared_norm=parallel,
        tie_embeddings=hf.get("tie_word_embeddings", False),
        qkv_bias=hf.get("use_qkv_bias", False),
        qk_norm="per_head" if hf.get("qk_layernorm", False) else None,
        activation=common.activation(hf, default="silu"),
    )


def sources(config: ModelConfig) -> dict[str, Source]:
    """The checkpoint tensors of each weight of `param_specs`."""
    attn = "model.layers.{layer}.self_attn."
    return common.sources_from(
        config,
        common.LLAMA_NAMES
        | {
            "layers.q_norm": [f"{attn}q_layernorm.norms.{head}" for head in range(config.num_heads)],
            "layers.k_norm": [f"{attn}k_layernorm.norms.{head}" for head in range(config.num_kv_heads)],
        },
    )
