"""InternLM 2 and 2.5: Llama with other names, and queries, keys and values interleaved by key-value head."""

from __future__ import annotations

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import common
from fastgen_jax.models.families.common import Source
from fastgen_jax.models.families.fields import Fields, reads_every_field
from fastgen_jax.models.families.rope import rotary

ARCHITECTURES = ("InternLM2ForCausalLM",)
FEATURES = "1.8B, 7B and 20B; linear and dynamic rotary scaling; biases"

_LAYER = "model.layers.{layer}."
NAMES = {
    "embed": "model.tok_embeddings",
    "final_norm": "model.norm",
    "lm_head": "output",
    "layers.attn_norm": f"{_LAYER}attention_norm",
    "layers.mlp_norm": f"{_LAYER}ffn_norm",
    "layers.qkv": f"{_LAYER}attention.wqkv",
    "layers.o": f"{_LAYER}attention.wo",
    "layers.gate_up": (f"{_LAYER}feed_forward.w1", f"{_LAYER}feed_forward.w3"),
    "layers.down": f"{_LAYER}feed_forward.w2",
}


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`."""
    bias = hf.get("bias", True)
    return ModelConfig(
        family="internlm2",
        **common.sizes(hf),
        **rotary(hf, max_context_len=2048),
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        tie_embeddings=hf.get("tie_word_embeddings", False),
        qkv_bias=bias,
        o_bias=bias,
        activation=common.activation(hf, default="silu"),
    )


def sources(config: ModelConfig) -> dict[str, Source]:
    """The checkpoint tensors of each weight of `param_specs`."""
    return common.sources_from(config, NAMES, rearrange={"layers.qkv": common.split_kv_groups(config)})
