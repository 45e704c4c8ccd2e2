"""Translates the metadata of Gemma 3n and Gemma 4 in GGUF; see gguf_architectures.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

from fastgen_jax.checkpoint.gguf_metadata import Metadata, factors
from fastgen_jax.json_types import JsonObject

_UNROTATED = 1e20  # factors of frequencies from which on a pair is not rotated; 1e30 in files


def gemma3n(m: Metadata) -> JsonObject:
    scales = m.get("activation_sparsity_scale")  # standard deviations, in float32
    return _gemma(m) | {
        "intermediate_size": m.get("feed_forward_length"),
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": float(m.get("rope.freq_base"))},
            "sliding_attention": {"rope_type": "default", "rope_theta": float(m.get("rope.freq_base_swa", 10_000.0))},
        },
        "activation_sparsity_pattern": [
            round(NormalDist().cdf(scale), 6) if math.isfinite(scale) else 0.0 for scale in scales
        ],
        "laurel_rank": m.file.tensors["blk.0.laurel_l.weight"].shape[0],
        "altup_num_inputs": m.get("altup.num_inputs"),
        "altup_active_idx": m.get("altup.active_idx"),
        "altup_correct_scale": m.has("blk.0.altup_correct_scale.weight"),
    }


def gemma4(m: Metadata) -> JsonObject:
    windowed = m.get("attention.sliding_window_pattern")
    full, full_dim, dim = windowed.index(False), m.get("attention.key_length"), m.get("attention.key_length_swa")
    heads = _by_layer(m.get("attention.head_count_kv"), len(windowed))
    widths = _by_layer(m.get("feed_forward_length"), len(windowed))
    m.only("attention.value_length_swa", dim)
    m.only("rope.dimension_count", full_dim)
    m.only("rope.dimension_count_swa", dim)
    if set(widths) - {widths[0], 2 * widths[0]}:
        raise m.refusal(
            f"gemma4.feed_forward_length is {widths}; supported: one width, and twice as much in the last layers"
        )
    stored = factors(m, "rope_freqs.weight") if m.has("rope_freqs.weight") else [1.0]
    if any(1.0 != factor < _UNROTATED for factor in stored):
        raise m.refusal("the rotary factors in 'rope_freqs.weight' are not those of Gemma 4: 1 for the pairs that rotate")
    experts: JsonObject = {}
    if m.get("expert_count", 0):
        experts = {
            "enable_moe_block": True,
            "num_experts": m.get("expert_count"),
            "top_k_experts": m.get("expert_used_count"),
            "moe_intermediate_size": m.get("expert_feed_forward_length"),
        }
    shape: JsonObject = {"head_dim": full_dim, "num_key_value_heads": heads[full]}
    return (
        _gemma(m)
        | experts
        | {
            "head_dim": dim,
            "num_key_value_heads": next((count for count, is_windowed in zip(heads, windowed, strict=True) if is_windowed)),
            "per_layer_config": {str(layer): shape for layer, is_windowed in enumerate(windowed) if not is_windowed},
            "attention_k_eq_v": not m.has(f"blk.{full}.attn_v.weight"),
            "intermediate_size": widths[0],
            "use_double_wide_mlp": len(set(widths)) > 1,
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "proportional",
                    "rope_theta": float(m.get("rope.freq_base")),
                    "partial_rotary_factor": stored.count(1.0) / len(stored),
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": float(m.get("rope.freq_base_swa", 10_000.0))},
            },
        }
    )


def _gemma(m: Metadata) -> JsonObject:
    inputs = m.get("embedding_length_per_layer_input", 0)
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "final_logit_softcapping": m.get("final_logit_softcapping"),
        "sliding_window": m.get("attention.sliding_window"),
        "layer_types": [
            "sliding_attention" if windowed else "full_attention" for windowed in m.get("attention.sliding_window_pattern")
        ],
        "num_kv_shared_layers": m.get("attention.shared_kv_layers", 0),
        "hidden_size_per_layer_input": inputs,
        "vocab_size_per_layer_input": m.file.tensors["per_layer_token_embd.weight"].shape[0] if inputs else None,
    }


def _by_layer(value: Any, num_layers: int) -> Sequence[int]:
    """A field that is one number for all layers, or a list with one for each."""
    return value if isinstance(value, list) else [value] * num_layers
