"""Translates GGUF files of models with states: their metadata to config.json fields, and their tensors back.

llama.cpp's converter stores -exp(A_log), kernels and vectors with other axes, and the projections of delta nets in another
order of heads. What it multiplies into the weights of Falcon-H1 stays there: the multipliers of the config are then 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from fastgen_jax.checkpoint.gguf_experts import SIGMOID, experts
from fastgen_jax.checkpoint.gguf_metadata import Metadata, partial_rope
from fastgen_jax.json_types import JsonObject
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.state_config import DeltaNet

# Files of Granite 4 and Nemotron-H say 1,048,576 for every model; this many tokens is what most of them are made for.
_CONTEXT = 131_072


@dataclass(frozen=True, kw_only=True)
class Restored:
    """How a tensor of a file becomes that of Hugging Face."""

    rows: Callable[[np.ndarray], np.ndarray] | None = None  # puts its rows in order
    values: Callable[[np.ndarray], np.ndarray] | None = None  # computes other values, or puts its columns in order
    is_flat: bool = False  # a vector, which the file stores with more axes
    is_conv: bool = False  # a kernel [n, 1, tokens], which the file stores as [n, tokens]


_KERNEL = Restored(is_conv=True)
_A_LOG = Restored(values=lambda a: np.log(-a), is_flat=True)
_VECTOR = Restored(is_flat=True)


def short_conv(config: ModelConfig) -> Mapping[str, Restored]:
    """LFM2."""
    return {".conv.conv.weight": _KERNEL}


def mamba(config: ModelConfig) -> Mapping[str, Restored]:
    """Mamba 2, by the names of all its families."""
    norms = {f".{module}.norm.weight": _VECTOR for module in ("mamba", "mixer")}
    return {".conv1d.weight": _KERNEL, ".A_log": _A_LOG, ".D": _VECTOR, **norms}


def delta_net(config: ModelConfig) -> Mapping[str, Restored]:
    """Qwen3-Next: queries, keys, values and gates of all heads become those of each key head."""
    state = config.state
    assert isinstance(state, DeltaNet)
    share = state.num_heads // state.num_key_heads
    widths = (state.key_dim, state.key_dim, share * state.value_dim, share * state.value_dim)

    def by_head(rows: np.ndarray) -> np.ndarray:
        parts = np.split(rows, np.cumsum([state.num_key_heads * width for width in widths])[:-1])
        heads = [part.reshape(state.num_key_heads, -1, *rows.shape[1:]) for part in parts]
        return np.concatenate(heads, axis=1).reshape(rows.shape)

    return {".conv1d.weight": _KERNEL, ".A_log": _A_LOG, ".in_proj_qkvz.weight": Restored(rows=by_head)}


def tiled_delta_net(config: ModelConfig) -> Mapping[str, Restored]:
    """Qwen3.5: the value heads of a key head become adjacent; in the file, the first ones of all key heads come first."""
    state = config.state
    assert isinstance(state, DeltaNet)
    keys = 2 * state.num_key_heads * state.key_dim

    def adjacent(x: np.ndarray, width: int) -> np.ndarray:
        heads = x.reshape(-1, state.num_key_heads, width, *x.shape[1:])
        return np.ascontiguousarray(heads.swapaxes(0, 1)).reshape(x.shape)

    def of_values(x: np.ndarray) -> np.ndarray:
        return adjacent(x, state.value_dim)

    def of_heads(x: np.ndarray) -> np.ndarray:
        return adjacent(x, 1)

    def after_keys(x: np.ndarray) -> np.ndarray:
        return np.concatenate([x[:keys], of_values(x[keys:])])

    return {
        ".in_proj_qkv.weight": Restored(rows=after_keys),
        ".in_proj_z.weight": Restored(rows=of_values),
        ".in_proj_b.weight": Restored(rows=of_heads),
        ".in_proj_a.weight": Restored(rows=of_heads),
        ".linear_attn.out_proj.weight": Restored(values=lambda x: of_values(x.T).T),
        ".conv1d.weight": Restored(rows=after_keys, is_conv=True),
        ".A_log": Restored(rows=of_heads, values=_A_LOG.values, is_flat=True),
        ".dt_bias": Restored(rows=of_heads),
    }


def lfm2(m: Metadata) -> JsonObject:
    """LFM2 and LFM2-MoE; the width of the MLP is recorded as it is used."""
    m.only("attention.sliding_window", 0)
    heads = m.get("attention.head_count_kv")
    fields = {
        "num_key_value_heads": max(heads),
        "layer_types": ["full_attention" if count else "conv" for count in heads],
        "conv_L_cache": m.get("shortconv.l_cache"),
        "conv_bias": m.has(f"blk.{heads.index(0)}.shortconv.conv.bias"),
        "norm_eps": m.get("attention.layer_norm_rms_epsilon"),
        "rms_norm_eps": None,
    }
    if m.kind == "lfm2":
        return fields | {"block_auto_adjust_ff_dim": False}
    m.only("expert_gating_func", SIGMOID)
    return fields | {  # the weights of the chosen experts are normalized, and not scaled, in every release
        **experts(m, "num_experts"),
        "moe_intermediate_size": m.get("expert_feed_forward_length"),
        "num_dense_layers": m.get("leading_dense_block_count"),
        "use_expert_bias": any(name.endswith("exp_probs_b.bias") for name in m.file.tensors),
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
    }


def granitehybrid(m: Metadata) -> JsonObject:
    """Granite 4, with experts or none."""
    heads = m.get("attention.head_count_kv")
    state = f"blk.{heads.index(0)}"
    count = m.get("expert_count", 0)
    return {
        "num_key_value_heads": max(heads),
        "layer_types": ["attention" if count else "mamba" for count in heads],
        "position_embedding_type": "rope" if m.get("rope.scaling.finetuned", True) else "nope",
        "max_position_embeddings": min(m.get("context_length"), _CONTEXT),
        "attention_bias": any(name.endswith("attn_output.bias") for name in m.file.tensors),
        "attention_multiplier": m.get("attention.scale"),
        "embedding_multiplier": m.get("embedding_scale"),
        "residual_multiplier": m.get("residual_scale"),
        "logits_scaling": m.get("logit_scale"),
        "num_local_experts": count,
        "num_experts_per_tok": m.get("expert_used_count", 0) or None,
        "intermediate_size": m.get("feed_forward_length"),
        "shared_intermediate_size": m.get("expert_shared_feed_forward_length", m.get("feed_forward_length")),
        "mamba_n_heads": m.get("ssm.time_step_rank"),
        "mamba_d_head": m.get("ssm.inner_size") // m.get("ssm.time_step_rank"),
        "mamba_n_groups": m.get("ssm.group_count"),
        "mamba_d_state": m.get("ssm.state_size"),
        "mamba_d_conv": m.get("ssm.conv_kernel"),
        "mamba_conv_bias": m.has(f"{state}.ssm_conv1d.bias"),
        "mamba_proj_bias": m.has(f"{state}.ssm_in.bias"),
    }


def falcon_h1(m: Metadata) -> JsonObject:
    """Falcon-H1: llama.cpp gates before the norm, as all releases with a norm do."""
    return {
        "mamba_d_ssm": m.get("ssm.inner_size"),
        "mamba_n_heads": m.get("ssm.time_step_rank"),
        "mamba_d_head": m.get("ssm.inner_size") // m.get("ssm.time_step_rank"),
        "mamba_n_groups": m.get("ssm.group_count"),
        "mamba_d_state": m.get("ssm.state_size"),
        "mamba_d_conv": m.get("ssm.conv_kernel"),
        "mamba_conv_bias": m.has("blk.0.ssm_conv1d.bias"),
        "mamba_rms_norm": m.has("blk.0.ssm_norm.weight"),
        "mamba_norm_before_gate": False,
    }


def nemotron_h(m: Metadata) -> JsonObject:
    """Nemotron-H and Nemotron 3: a layer is what it has heads or hidden units for, and otherwise Mamba 2."""
    kv_heads, widths = m.get("attention.head_count_kv"), m.get("feed_forward_length")
    layers = m.get("block_count") - m.get("nextn_predict_layers", 0)
    feed_forward = "moe" if m.kind == "nemotron_h_moe" else "mlp"
    types = [
        "attention" if kv else feed_forward if width else "mamba"
        for kv, width in list(zip(kv_heads, widths, strict=True))[:layers]
    ]
    m.only("attention.value_length", m.get("attention.key_length"))
    m.get("attention.layer_norm_epsilon", 0.0)  # a copy
    for name in ("rope.dimension_count", "rope.freq_base", "rope.scaling.finetuned"):
        m.get(name, 0)  # there are no positions
    state = f"blk.{types.index('mamba')}"
    fields = {
        "vocab_size": m.file.tensors["token_embd.weight"].shape[0],
        "hidden_size": m.get("embedding_length"),
        "layers_block_type": types,
        "num_attention_heads": m.get("attention.head_count"),
        "num_key_value_heads": max(kv_heads),
        "head_dim": m.get("attention.key_length"),
        "intermediate_size": max(widths),
        "max_position_embeddings": min(m.get("context_length"), _CONTEXT),
        "layer_norm_epsilon": m.get("attention.layer_norm_rms_epsilon", m.fields.get("attention.layer_norm_epsilon")),
        "tie_word_embeddings": not m.has("output.weight"),
        "mlp_bias": any(name.endswith("ffn_down.bias") for name in m.file.tensors),
        "attention_bias": any(name.endswith("attn_output.bias") for name in m.file.tensors),
        "mamba_num_heads": m.get("ssm.time_step_rank"),
        "mamba_head_dim": m.get("ssm.inner_size") // m.get("ssm.time_step_rank"),
        "n_groups": m.get("ssm.group_count"),
        "ssm_state_size": m.get("ssm.state_size"),
        "conv_kernel": m.get("ssm.conv_kernel"),
        "use_conv_bias": m.has(f"{state}.ssm_conv1d.bias"),
        "use_bias": m.has(f"{state}.ssm_in.bias"),
    }
    if m.kind == "nemotron_h":
        return fields
    return fields | {
        **experts(m, "n_routed_experts"),
        "n_shared_experts": m.get("expert_shared_count"),
        "moe_intermediate_size": m.get("expert_feed_forward_length"),
        "moe_shared_expert_intermediate_size": m.get("expert_shared_feed_forward_length"),
        "moe_latent_size": m.get("moe_latent_size", 0) or None,
        "routed_scaling_factor": m.get("expert_weights_scale", 1.0),
        "norm_topk_prob": m.get("expert_weights_norm", True),
        "n_group": m.get("expert_group_count", 1),
        "topk_group": m.get("expert_group_used_count", 1),
    }


def qwen3next(m: Metadata) -> JsonObject:
    """Qwen3-Next and Qwen3.5, with experts or an MLP."""
    layers = m.get("block_count") - m.get("nextn_predict_layers", 0)
    interval = m.get("full_attention_interval", 4)
    recurrent = m.get("attention.recurrent_layers", [bool((i + 1) % interval) for i in range(layers)])
    rope = partial_rope(m)
    if sections := m.get("rope.dimension_sections", ()):  # of time, row and column, and a fourth one that is unused
        rope |= {"mrope_section": [int(size) for size in sections[:3]], "mrope_interleaved": True}
    heads = m.get("ssm.time_step_rank")
    fields = {
        "num_hidden_layers": layers,
        "layer_types": ["linear_attention" if state else "full_attention" for state in recurrent[:layers]],
        "rope_parameters": rope,
        "linear_num_value_heads": heads,
        "linear_num_key_heads": m.get("ssm.group_count"),
        "linear_key_head_dim": m.get("ssm.state_size"),
        "linear_value_head_dim": m.get("ssm.inner_size") // heads,
        "linear_conv_kernel_dim": m.get("ssm.conv_kernel"),
        "attention_bias": any(name.endswith("attn_output.bias") for name in m.file.tensors),
    }
    if m.kind == "qwen35":
        return fields
    return fields | {  # the weights of chosen experts are normalized in every release, and no layer is dense
        **experts(m, "num_experts"),
        "moe_intermediate_size": m.get("expert_feed_forward_length"),
        "shared_expert_intermediate_size": m.get("expert_shared_feed_forward_length"),
        "norm_topk_prob": True if m.kind == "qwen3next" else None,
        "intermediate_size": None if m.kind == "qwen35moe" else m.get("feed_forward_length"),
    }
