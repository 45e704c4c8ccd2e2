"""StarCoder2 (arXiv:2402.19173): LayerNorm, biases, a plain MLP, a sliding window, tied head."""

from __future__ import annotations

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import common
from fastgen_jax.models.families.common import Source
from fastgen_jax.models.families.fields import Fields, reads_every_field
from fastgen_jax.models.families.rope import rotary

ARCHITECTURES = ("Starcoder2ForCausalLM",)
FEATURES = "3B, 7B and 15B; sliding window; with or without biases"

NAMES = common.LLAMA_NAMES | {
    "layers.up": "model.layers.{layer}.mlp.c_fc",
    "layers.down": "model.layers.{layer}.mlp.c_proj",
}


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`."""
    common.refuse_unsupported(hf, {"norm_type": ("layer_norm",), "mlp_type": ("default",), "scale_attn_weights": (True,)})
    hf.ignore("attention_softmax_in_fp32", "scale_attention_softmax_in_fp32", "activation_function")
    bias = hf.get("use_bias", True)
    return ModelConfig(
        family="starcoder2",
        **common.sizes(hf, assumed={"num_key_value_heads": 2}),
        **rotary(hf, max_context_len=4096),
        layer_windows=common.windows(hf, hf.get("sliding_window"), lambda layer: True),
        norm="layer",
        norm_eps=hf.get("norm_epsilon", 1e-5),
        norm_bias=True,
        tie_embeddings=hf.get("tie_word_embeddings", True),
        qkv_bias=bias,
        o_bias=bias,
        activation=common.activation(hf, default="gelu_pytorch_tanh"),
        mlp_gated=False,
        mlp_bias=bias,
    )


def sources(config: ModelConfig) -> dict[str, Source]:
    """The checkpoint tensors of each weight of `param_specs`."""
    return common.sources_from(config, NAMES)
