"""DeepSeek V2 and V3 (R1 included): latent attention, and experts that are chosen from the best groups of experts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from fastgen_jax.models.config import ModelConfig, RopeConfig
from fastgen_jax.models.families.common import (
    LLAMA_NAMES,
    Fields,
    Source,
    reads_every_field,
    refuse_unsupported,
    sources_from,
    special_tokens,
)
from fastgen_jax.models.families.experts import expert_names
from fastgen_jax.models.families.rope import rope_from_hf
from fastgen_jax.models.moe_config import MLAConfig, MoEConfig

ARCHITECTURES = ("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM")


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """The `ModelConfig` of a Hugging Face `config.json`, written by transformers 4 or 5."""
    is_v3 = hf["architectures"] == ["DeepseekV3ForCausalLM"]
    _refuse_what_we_lack(hf, is_v3=is_v3)
    max_context_len = hf.get("max_position_embeddings", 4096 if is_v3 else 2048)
    nope_dim, rope_dim, kv_rank = hf["qk_nope_head_dim"], hf["qk_rope_head_dim"], hf["kv_lora_rank"]
    rope = dataclasses.replace(rope_from_hf(hf, max_context_len=max_context_len), dim=rope_dim)
    bias = hf.get("attention_bias", False)
    return ModelConfig(
        family="deepseek",
        vocab_size=hf["vocab_size"],
        num_layers=hf["num_hidden_layers"],
        embed_dim=hf["hidden_size"],
        num_heads=hf["num_attention_heads"],
        num_kv_heads=1,
        head_dim=kv_rank + rope_dim,
        mlp_dim=hf["intermediate_size"],
        max_context_len=max_context_len,
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        rope=rope,
        attention_scale=_attention_scale(nope_dim + rope_dim, rope),
        o_bias=bias,
        mla=MLAConfig(
            kv_rank=kv_rank,
            rope_dim=rope_dim,
            nope_dim=nope_dim,
            v_dim=hf["v_head_dim"],
            q_rank=hf.get("q_lora_rank"),
            rope_interleaved=hf.get("rope_interleave", True),
            kv_bias=bias,
        ),
        moe=_moe_config(hf, is_v3=is_v3),
        tie_embeddings=hf.get("tie_word_embeddings", False),
        **special_tokens(hf),
    )


def _refuse_what_we_lack(hf: Fields, *, is_v3: bool) -> None:
    methods = ("noaux_tc",) if is_v3 else ("greedy", "group_limited_greedy")
    refuse_unsupported(hf, {
        "hidden_act": ("silu",), "mlp_bias": (False,), "moe_layer_freq": (1,), "topk_method": methods,
        "scoring_func": ("sigmoid",) if is_v3 else ("softmax",),
        # V2's weights are scaled, and transformers normalises them in no case; its checkpoints say False.
        **({} if is_v3 else {"norm_topk_prob": (False, None)}),
    })
    # What these say follows from the other sizes, or concerns training and the layer that predicts a second token.
    hf.first("hidden_act", "mlp_bias", "moe_layer_freq", "topk_method", "scoring_func", "norm_topk_prob", "head_dim",
             "qk_head_dim", "num_key_value_heads", "num_local_experts", "aux_loss_alpha", "seq_aux", "ep_size",
             "num_nextn_predict_layers", "num_mtp_layers")


def _moe_config(hf: Fields, *, is_v3: bool) -> MoEConfig:
    grouped = is_v3 or hf.get("topk_method") == "group_limited_greedy"
    num_groups, groups_per_token = hf.get("n_group") or 1, hf.get("topk_group") or 1
    return MoEConfig(
        num_experts=hf["n_routed_experts"],
        experts_per_token=hf["num_experts_per_tok"],
        expert_dim=hf["moe_intermediate_size"],
        layers=tuple(range(hf.get("first_k_dense_replace", 0), hf["num_hidden_layers"])),
        scores="sigmoid" if is_v3 else "softmax",
        normalize=is_v3 and hf.get("norm_topk_prob", True),
        scale=hf.get("routed_scaling_factor", 1.0),
        choice_bias=is_v3,
        num_groups=num_groups if grouped else 1,
        groups_per_token=groups_per_token if grouped else 1,
        group_score="two_best" if is_v3 else "max",
        shared_dim=hf["moe_intermediate_size"] * (hf.get("n_shared_experts") or 0),
    )


def _attention_scale(qk_dim: int, rope: RopeConfig) -> float:
    """1 / sqrt(D), sharpened where YaRN's `mscale_all_dim` says so."""
    scale = qk_dim**-0.5
    if rope.kind == "default" or not rope.mscale_all_dim or rope.factor <= 1.0:
        return scale
    return scale * (0.1 * rope.mscale_all_dim * math.log(rope.factor) + 1.0) ** 2


def sources(config: ModelConfig) -> dict[str, Source]:
    """Where each weight of `param_specs` lies in the checkpoint; `{layer}` stands for the layer's number."""
    attention = "model.layers.{layer}.self_attn"
    mla = config.mla
    assert mla is not None, "this family has latent attention"
    paired = {}
    if mla.rope_interleaved:
        per_head = mla.nope_dim + mla.rope_dim
        paired = {
            "layers.q": _pairs_apart(config.num_heads, per_head, mla.rope_dim),
            "layers.q_b": _pairs_apart(config.num_heads, per_head, mla.rope_dim),
            "layers.kv_a": _pairs_apart(1, mla.kv_rank + mla.rope_dim, mla.rope_dim),
        }
    return sources_from(config, {
        **LLAMA_NAMES,
        **expert_names(config, shared="shared_experts"),
        "layers.q": f"{attention}.q_proj",
        "layers.q_a": f"{attention}.q_a_proj",
        "layers.q_a_norm": f"{attention}.q_a_layernorm",
        "layers.q_b": f"{attention}.q_b_proj",
        "layers.kv_a": f"{attention}.kv_a_proj_with_mqa",
        "layers.kv_a_norm": f"{attention}.kv_a_layernorm",
        "layers.kv_b": f"{attention}.kv_b_proj",
        "layers.choice_bias": Source("model.layers.{layer}.mlp.gate.e_score_correction_bias"),
    }, rearrange=paired)


def _pairs_apart(heads: int, head_dim: int, rope_dim: int) -> Callable[[np.ndarray], np.ndarray]:
    """Reorders the last `rope_dim` outputs of each head from x0 y0 x1 y1 ... to x0 x1 ... y0 y1 ..., as `rotate` pairs."""

    def rearrange(x: np.ndarray) -> np.ndarray:
        per_head = x.reshape(*x.shape[:-1], heads, head_dim)
        still, turning = per_head[..., :-rope_dim], per_head[..., -rope_dim:]
        return np.concatenate([still, turning[..., ::2], turning[..., 1::2]], axis=-1).reshape(x.shape)

    return rearrange
