"""Llama 1, 2 and 3, and the checkpoints that share their architecture (SmolLM2, TinyLlama, Vicuna, ...)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families.common import Source, eos_ids, refuse_unsupported, rope_from_hf

ARCHITECTURES = ("LlamaForCausalLM",)


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """The `ModelConfig` of a Hugging Face `config.json`, written by transformers 4 or 5."""
    refuse_unsupported(hf, {"hidden_act": ("silu", "swish")})
    num_heads = hf["num_attention_heads"]
    max_context_len = hf.get("max_position_embeddings", 2048)
    rope = rope_from_hf(hf, max_context_len=max_context_len)
    if rope.kind == "dynamic":  # its whole point is to read on beyond the trained length, up to `factor` times as far
        max_context_len = int(max_context_len * rope.factor)
    return ModelConfig(
        family="llama",
        vocab_size=hf["vocab_size"],
        num_layers=hf["num_hidden_layers"],
        embed_dim=hf["hidden_size"],
        num_heads=num_heads,
        num_kv_heads=hf.get("num_key_value_heads") or num_heads,
        head_dim=hf.get("head_dim") or hf["hidden_size"] // num_heads,
        mlp_dim=hf["intermediate_size"],
        max_context_len=max_context_len,
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        rope=rope,
        tie_embeddings=hf.get("tie_word_embeddings", False),
        attention_bias=hf.get("attention_bias", False),
        mlp_bias=hf.get("mlp_bias", False),
        bos_token_id=hf.get("bos_token_id"),
        eos_token_ids=eos_ids(hf),
    )


def sources(config: ModelConfig) -> dict[str, Source]:
    """Where each weight of `param_specs` lies in the checkpoint; `{layer}` stands for the layer's number."""
    attn, mlp = "model.layers.{layer}.self_attn.", "model.layers.{layer}.mlp."
    named = {
        "embed": Source("model.embed_tokens.weight"),
        "final_norm": Source("model.norm.weight"),
        "layers.attn_norm": Source("model.layers.{layer}.input_layernorm.weight"),
        "layers.mlp_norm": Source("model.layers.{layer}.post_attention_layernorm.weight"),
        "layers.qkv": Source(*(f"{attn}{x}_proj.weight" for x in "qkv"), transpose=True),
        "layers.o": Source(f"{attn}o_proj.weight", transpose=True),
        "layers.gate_up": Source(f"{mlp}gate_proj.weight", f"{mlp}up_proj.weight", transpose=True),
        "layers.down": Source(f"{mlp}down_proj.weight", transpose=True),
    }
    if not config.tie_embeddings:
        named["lm_head"] = Source("lm_head.weight", transpose=True)
    if config.attention_bias:
        named["layers.qkv_bias"] = Source(*(f"{attn}{x}_proj.bias" for x in "qkv"))
        named["layers.o_bias"] = Source(f"{attn}o_proj.bias")
    if config.mlp_bias:
        named["layers.gate_up_bias"] = Source(f"{mlp}gate_proj.bias", f"{mlp}up_proj.bias")
        named["layers.down_bias"] = Source(f"{mlp}down_proj.bias")
    return named
