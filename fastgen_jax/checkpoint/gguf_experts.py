"""Translates the metadata of GGUF architectures with experts to config.json fields; see gguf_architectures.py."""

from __future__ import annotations

from fastgen_jax.checkpoint.gguf_metadata import Metadata, longrope, partial_rope, rope_parameters
from fastgen_jax.json_types import JsonObject

_SOFTMAX, SIGMOID = 1, 2  # of expert_gating_func
_MAVERICK_EXPERTS = 128
_PHIMOE_MSCALE = 1.243163121016122
# (groups, groups that a token may choose from) by the number of experts; files from before autumn 2025 leave them out.
_DEEPSEEK_GROUPS = {64: (1, 1), 160: (8, 3), 256: (8, 4)}


def experts(m: Metadata, count: str) -> JsonObject:
    return {count: m.get("expert_count"), "num_experts_per_tok": m.get("expert_used_count")}


def qwen2moe(m: Metadata) -> JsonObject:
    # In every release the weights of chosen experts are not normalized, and no layer is dense.
    return experts(m, "num_experts") | {
        "norm_topk_prob": False,
        "use_sliding_window": False,
        "moe_intermediate_size": m.get("expert_feed_forward_length"),
        "shared_expert_intermediate_size": m.get("expert_shared_feed_forward_length"),
    }


def qwen3moe(m: Metadata) -> JsonObject:
    # In every release the weights of chosen experts are normalized, and no layer is dense.
    return experts(m, "num_experts") | {
        "norm_topk_prob": True,
        "use_sliding_window": False,
        "attention_bias": False,
        "moe_intermediate_size": m.get("expert_feed_forward_length"),
    }


def gpt_oss(m: Metadata) -> JsonObject:
    # Windows in every other layer, and no rounding of YaRN's ramp: not recorded, the same in both releases.
    rope = rope_parameters(m)
    return experts(m, "num_local_experts") | {
        "intermediate_size": m.get("expert_feed_forward_length"),
        "sliding_window": m.get("attention.sliding_window"),
        "attention_bias": m.has("blk.0.attn_q.bias"),
        "rope_parameters": rope | ({"truncate": False} if rope["rope_type"] == "yarn" else {}),
    }


def deepseek2(m: Metadata) -> JsonObject:
    gating = m.get("expert_gating_func", _SOFTMAX)  # early files of V2 lack it
    if gating not in (_SOFTMAX, SIGMOID):
        raise m.refusal(f"deepseek2.expert_gating_func is {gating}; supported: {_SOFTMAX} (softmax), {SIGMOID} (sigmoid)")
    v3 = gating == SIGMOID
    rope_dim, kv_rank = m.get("rope.dimension_count"), m.get("attention.kv_lora_rank")
    # Files with latent projections in two parts have other names for the sizes of a head.
    split = m.has("blk.0.attn_k_b.weight")
    key_dim = m.get("attention.key_length_mla" if split else "attention.key_length")
    if split:
        m.only("attention.head_count_kv", 1)
        m.only("attention.key_length", kv_rank + rope_dim)
        m.only("attention.value_length", kv_rank)
    else:
        m.only("attention.head_count_kv", m.get("attention.head_count"))
    rope = rope_parameters(m, further=("scaling.yarn_log_multiplier",))
    if rope["rope_type"] == "yarn":  # mscale is not recorded; in every release it equals mscale_all_dim
        mscale = round(10 * m.get("rope.scaling.yarn_log_multiplier"), 6)
        rope |= {"mscale": mscale, "mscale_all_dim": mscale}
    groups, groups_per_token = _deepseek_groups(m)
    return {
        "architectures": ["DeepseekV3ForCausalLM"] if v3 else ["DeepseekV2ForCausalLM"],
        "vocab_size": m.file.tensors["token_embd.weight"].shape[0],
        "hidden_size": m.get("embedding_length"),
        "num_hidden_layers": m.get("block_count") - m.get("nextn_predict_layers", 0),
        "num_attention_heads": m.get("attention.head_count"),
        "intermediate_size": m.get("feed_forward_length"),
        "max_position_embeddings": m.get("context_length"),
        "rms_norm_eps": m.get("attention.layer_norm_rms_epsilon"),
        "rope_parameters": rope,
        "kv_lora_rank": kv_rank,
        "q_lora_rank": m.get("attention.q_lora_rank", 0),  # an absent one would be the default
        "qk_rope_head_dim": rope_dim,
        "qk_nope_head_dim": key_dim - rope_dim,
        "v_head_dim": m.get("attention.value_length_mla" if split else "attention.value_length"),
        "n_routed_experts": m.get("expert_count"),
        "num_experts_per_tok": m.get("expert_used_count"),
        "moe_intermediate_size": m.get("expert_feed_forward_length"),
        "n_shared_experts": m.get("expert_shared_count"),
        "first_k_dense_replace": m.get("leading_dense_block_count"),
        "routed_scaling_factor": m.get("expert_weights_scale", 1.0),
        "norm_topk_prob": m.get("expert_weights_norm", False),
        "n_group": groups,
        "topk_group": groups_per_token,
        "topk_method": None if v3 else "group_limited_greedy" if groups > 1 else "greedy",
        "tie_word_embeddings": not m.has("output.weight"),
    }


def _deepseek_groups(m: Metadata) -> tuple[int, int]:
    """The number of groups of experts, and the number of groups that a token may choose from."""
    experts = m.get("expert_count")
    if "expert_group_count" not in m.fields and experts not in _DEEPSEEK_GROUPS:
        raise m.refusal(
            f"the number of groups of its {experts} experts is not recorded; convert it again with a newer "
            "llama.cpp, or use the Hugging Face checkpoint"
        )
    groups, chosen = _DEEPSEEK_GROUPS.get(experts, (1, 1))
    return m.get("expert_group_count", groups), m.get("expert_group_used_count", chosen)


def glm4moe(m: Metadata) -> JsonObject:
    """GLM-4.5 and later. By default the experts are in one group, as in every release."""
    m.only("expert_gating_func", SIGMOID)
    return experts(m, "n_routed_experts") | {
        "num_hidden_layers": m.get("block_count") - m.get("nextn_predict_layers", 0),
        "attention_bias": m.has("blk.0.attn_q.bias"),
        "use_qk_norm": m.has("blk.0.attn_q_norm.weight"),
        "rope_parameters": partial_rope(m),
        "moe_intermediate_size": m.get("expert_feed_forward_length"),
        "n_shared_experts": m.get("expert_shared_count"),
        "first_k_dense_replace": m.get("leading_dense_block_count"),
        "routed_scaling_factor": m.get("expert_weights_scale", 1.0),
        "norm_topk_prob": m.get("expert_weights_norm", True),
        "n_group": m.get("expert_group_count", 1),
        "topk_group": m.get("expert_group_used_count", 1),
    }


def ernie4_5_moe(m: Metadata) -> JsonObject:
    m.get("expert_shared_feed_forward_length", 0)  # the converter's guess; the tensors have the size
    return {
        "use_bias": m.has("blk.0.attn_output.bias"),
        "moe_num_experts": m.get("expert_count"),
        "moe_k": m.get("expert_used_count"),
        "moe_intermediate_size": m.get("expert_feed_forward_length"),
        "moe_num_shared_experts": m.get("expert_shared_count"),
        "moe_layer_start_index": m.get("leading_dense_block_count"),
        "moe_layer_interval": m.get("interleave_moe_layer_step"),
    }


def llama4(m: Metadata) -> JsonObject:
    # Chunks, scaled queries and the layers without positions are not recorded, and the same in both releases. Maverick,
    # which has 128 experts, has no norms on queries and keys.
    m.only("attention.sliding_window", 8192)
    return experts(m, "num_local_experts") | {
        "intermediate_size": m.get("expert_feed_forward_length"),
        "intermediate_size_mlp": m.get("feed_forward_length"),
        "interleave_moe_layer_step": m.get("interleave_moe_layer_step"),
        "use_qk_norm": m.get("expert_count") != _MAVERICK_EXPERTS,
        "attention_bias": m.has("blk.0.attn_output.bias"),
    }


def minimax_m2(m: Metadata) -> JsonObject:
    m.only("expert_gating_func", SIGMOID)
    return experts(m, "num_local_experts") | {
        "intermediate_size": m.get("expert_feed_forward_length"),
        "rope_parameters": partial_rope(m),
    }


def phimoe(m: Metadata) -> JsonObject:
    # The tolerance of the choice of experts is not recorded, and the default in the release. The scale of cosines and sines
    # that the converter records follows from the lengths, and is not that of the release.
    head_dim = m.get("embedding_length") // m.get("attention.head_count")
    m.only("rope.dimension_count", head_dim)
    positions = longrope(m)
    if positions["rope_parameters"]["rope_type"] == "longrope":
        positions["rope_parameters"]["attention_factor"] = _PHIMOE_MSCALE
    return (
        positions
        | experts(m, "num_local_experts")
        | {
            "sliding_window": m.get("attention.sliding_window", 0) or None,
            "attention_bias": m.has("blk.0.attn_output.bias"),
            "lm_head_bias": m.has("output.bias"),
        }
    )
