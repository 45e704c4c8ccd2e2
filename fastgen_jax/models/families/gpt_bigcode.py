"""GPT-BigCode (SantaCoder, StarCoder 1): GPT-2 with one key-value head, and matrices stored [out, in]."""

from __future__ import annotations

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import common
from fastgen_jax.models.families.common import Source
from fastgen_jax.models.families.fields import Fields, reads_every_field
from fastgen_jax.models.families.gpt2 import NAMES

ARCHITECTURES = ("GPTBigCodeForCausalLM",)
FEATURES = "SantaCoder, StarCoder, StarCoderBase, StarChat; multi-query or multi-head; n_inner"

_OF_ITS_CODE = (
    "n_ctx",
    "num_key_value_heads",
    "attention_softmax_in_fp32",
    "scale_attention_softmax_in_fp32",
    "inference_runner",
    "max_batch_size",
    "max_sequence_length",
    "pad_key_length",
    "pre_allocate_kv_cache",
    "validate_runner_input",
)  # these affect how it runs, or follow from other fields


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`."""
    common.refuse_unsupported(hf, {"add_cross_attention": (False,)})
    hf.ignore(*_OF_ITS_CODE)
    num_heads, embed_dim = hf["n_head"], hf["n_embd"]
    context = hf.get("n_positions", 1024)
    return ModelConfig(
        family="gpt_bigcode",
        vocab_size=hf["vocab_size"],
        num_layers=hf["n_layer"],
        embed_dim=embed_dim,
        num_heads=num_heads,
        num_kv_heads=1 if hf.get("multi_query", True) else num_heads,
        head_dim=embed_dim // num_heads,
        mlp_dim=hf.get("n_inner") or 4 * embed_dim,
        max_context_len=context,
        norm="layer",
        norm_eps=hf.get("layer_norm_epsilon", 1e-5),
        norm_bias=True,
        learned_positions=context,
        rope=None,
        tie_embeddings=hf.get("tie_word_embeddings", True),
        qkv_bias=True,
        o_bias=True,
        attention_scale=None if hf.get("scale_attn_weights", True) else 1.0,
        activation=common.activation(hf, "activation_function", default="gelu_pytorch_tanh"),
        mlp_gated=False,
        mlp_bias=True,
        **common.special_tokens(hf),
    )


def sources(config: ModelConfig) -> dict[str, Source]:
    """The checkpoint tensors of each weight of `param_specs`."""
    return common.sources_from(config, NAMES, rearrange={"layers.qkv": common.split_kv_groups(config)})
