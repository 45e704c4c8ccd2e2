"""Qwen 1 (its own code on the hub): Qwen2 with other names up to seq_length; logn scaling and stepped NTK beyond it."""

from __future__ import annotations

from fastgen_jax.models.config import ModelConfig, RopeConfig
from fastgen_jax.models.families import common
from fastgen_jax.models.families.common import Source
from fastgen_jax.models.families.fields import Fields, reads_every_field

ARCHITECTURES = ("QWenLMHeadModel",)
FEATURES = "1.8B to 72B; beyond seq_length logn scaling of queries and dynamic NTK"

_LAYER = "transformer.h.{layer}."
NAMES = {
    "embed": "transformer.wte",
    "final_norm": "transformer.ln_f",
    "lm_head": "lm_head",
    "layers.attn_norm": f"{_LAYER}ln_1",
    "layers.mlp_norm": f"{_LAYER}ln_2",
    "layers.qkv": f"{_LAYER}attn.c_attn",
    "layers.o": f"{_LAYER}attn.c_proj",
    "layers.gate_up": (f"{_LAYER}mlp.w2", f"{_LAYER}mlp.w1"),  # w1(x) * silu(w2(x))
    "layers.down": f"{_LAYER}mlp.c_proj",
}
_OF_ITS_CODE = (
    "bf16",
    "fp16",
    "fp32",
    "onnx_safe",
    "use_flash_attn",
    "use_cache_kernel",
    "use_cache_quantization",
    "softmax_in_fp32",
    "attn_dropout_prob",
    "emb_dropout_prob",
    "bias_dropout_fusion",
    "padded_vocab_size",
    "params_dtype",
    "tokenizer_type",
)  # these affect how it runs, not its results


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`."""
    supported = {"no_bias": (True,), "rotary_pct": (1.0,), "scale_attn_weights": (True,)}
    # In the first releases, which also have other names for the sizes.
    supported |= {"activation": ("swiglu",), "pos_emb": ("rotary",)}
    common.refuse_unsupported(hf, supported)
    hf.ignore(*_OF_ITS_CODE, *supported)
    num_heads, embed_dim = hf.first("num_attention_heads", "n_head"), hf.first("hidden_size", "n_embd")
    trained = hf.get("seq_length", 2048)
    ntk, logn = hf.get("use_dynamic_ntk", True), hf.get("use_logn_attn", True)
    theta = float(hf.get("rotary_emb_base", 10_000))
    common.refuse_unsupported(hf, {"rope_theta": (theta,)})  # a copy that its code does not read
    hf.ignore("rope_theta")
    longest = hf.first("max_position_embeddings", "n_positions", default=trained)
    return ModelConfig(
        family="qwen",
        vocab_size=hf["vocab_size"],
        num_layers=hf.first("num_hidden_layers", "n_layer"),
        embed_dim=embed_dim,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=hf.get("kv_channels") or embed_dim // num_heads,
        mlp_dim=hf.first("intermediate_size", "ffn_hidden_size") // 2,
        max_context_len=max(longest, trained) if ntk else trained,
        norm_eps=hf.get("layer_norm_epsilon", 1e-6),
        rope=RopeConfig(kind="stepped_ntk", theta=theta, original_max_position=trained) if ntk else RopeConfig(theta=theta),
        logn_length=trained if logn else None,
        tie_embeddings=hf.get("tie_word_embeddings", False),
        qkv_bias=True,
        **common.special_tokens(hf),
    )


def sources(config: ModelConfig) -> dict[str, Source]:
    """The checkpoint tensors of each weight of `param_specs`."""
    return common.sources_from(config, NAMES)
