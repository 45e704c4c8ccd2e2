"""The models that the gates compile: shapes of real checkpoints, no weights."""

from __future__ import annotations

import functools
from typing import Any

_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 8192,
    "num_key_value_heads": 8,
}
LLAMA_3_8B: dict[str, Any] = _LLAMA | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
}
LLAMA_3_70B: dict[str, Any] = _LLAMA | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
}
MIXTRAL_8X7B: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_act": "silu",
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "sliding_window": None,
}
MODELS = {"Llama-3-8B": LLAMA_3_8B, "Llama-3-70B": LLAMA_3_70B, "Mixtral-8x7B": MIXTRAL_8X7B}
GEMMA_3_27B: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "hidden_activation": "gelu_pytorch_tanh",
    "vocab_size": 262208,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    "max_position_embeddings": 131072,
    "query_pre_attn_scalar": 168,
    "head_dim": 128,
    "num_key_value_heads": 16,
    "num_attention_heads": 32,
    "hidden_size": 5376,
    "intermediate_size": 21504,
    "num_hidden_layers": 62,
    "sliding_window": 1024,
    "sliding_window_pattern": 6,
    "tie_word_embeddings": True,
}
QWEN3_30B_A3B: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_act": "silu",
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 40960,
    "head_dim": 128,
    "num_key_value_heads": 4,
    "num_attention_heads": 32,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
GPT_OSS_20B: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "hidden_act": "silu",
    "vocab_size": 201088,
    "rms_norm_eps": 1e-5,
    "rope_theta": 150000.0,
    "max_position_embeddings": 131072,
    "head_dim": 64,
    "num_key_value_heads": 8,
    "num_attention_heads": 64,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 24,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "attention_bias": True,
    "swiglu_limit": 7.0,
}
QWEN2_5_0_5B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 2,
    "num_attention_heads": 14,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "tie_word_embeddings": True,
}
QWEN2_5_1_5B: dict[str, Any] = QWEN2_5_0_5B | {
    "num_attention_heads": 12,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
}
GEMMA_3_1B: dict[str, Any] = GEMMA_3_27B | {
    "vocab_size": 262144,
    "rope_scaling": None,
    "query_pre_attn_scalar": 256,
    "head_dim": 256,
    "num_key_value_heads": 1,
    "num_attention_heads": 4,
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "num_hidden_layers": 26,
    "sliding_window": 512,
    "max_position_embeddings": 32768,
}
# Experts whose widths, whole or divided, are not whole tiles of a kernel.
QWEN1_5_MOE: dict[str, Any] = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "hidden_act": "silu",
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 8192,
    "num_key_value_heads": 16,
    "num_attention_heads": 16,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_experts": 60,
    "num_experts_per_tok": 4,
}
GRANITE_3_3B_A800M: dict[str, Any] = {
    "architectures": ["GraniteMoeForCausalLM"],
    "model_type": "granitemoe",
    "hidden_act": "silu",
    "vocab_size": 49155,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 8192,
    "num_key_value_heads": 8,
    "num_attention_heads": 24,
    "hidden_size": 1536,
    "intermediate_size": 512,
    "num_hidden_layers": 32,
    "num_local_experts": 40,
    "num_experts_per_tok": 8,
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.015625,
    "residual_multiplier": 0.22,
    "logits_scaling": 6.0,
    "tie_word_embeddings": True,
}
GLM_4_5_AIR: dict[str, Any] = {
    "architectures": ["Glm4MoeForCausalLM"],
    "model_type": "glm4_moe",
    "hidden_act": "silu",
    "vocab_size": 151552,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "partial_rotary_factor": 0.5,
    "max_position_embeddings": 131072,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "num_attention_heads": 96,
    "hidden_size": 4096,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 46,
    "first_k_dense_replace": 1,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
    "attention_bias": True,
    "use_qk_norm": False,
}
PHI_3_5_MOE: dict[str, Any] = {
    "architectures": ["PhimoeForCausalLM"],
    "model_type": "phimoe",
    "hidden_act": "silu",
    "vocab_size": 32064,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "num_attention_heads": 32,
    "hidden_size": 4096,
    "intermediate_size": 6400,
    "num_hidden_layers": 32,
    "num_local_experts": 16,
    "num_experts_per_tok": 2,
    "attention_bias": True,
    "lm_head_bias": True,
}
GRANITE_4_H_TINY: dict[str, Any] = {
    "architectures": ["GraniteMoeHybridForCausalLM"],
    "model_type": "granitemoehybrid",
    "hidden_act": "silu",
    "vocab_size": 100352,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "position_embedding_type": "nope",
    "num_key_value_heads": 4,
    "num_attention_heads": 12,
    "hidden_size": 1536,
    "intermediate_size": 512,
    "shared_intermediate_size": 1024,
    "num_local_experts": 64,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 40,
    "layer_types": [*["mamba"] * 5, *["attention", *["mamba"] * 9] * 3, "attention", *["mamba"] * 4],
    "mamba_n_heads": 48,
    "mamba_d_head": 64,
    "mamba_d_state": 128,
    "mamba_n_groups": 1,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "attention_multiplier": 0.0078125,
    "embedding_multiplier": 12.0,
    "logits_scaling": 6.0,
    "residual_multiplier": 0.22,
    "tie_word_embeddings": True,
}
# Dense: the MLP of each layer is the shared one.
GRANITE_4_H_MICRO: dict[str, Any] = GRANITE_4_H_TINY | {
    "num_key_value_heads": 8,
    "num_attention_heads": 32,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "shared_intermediate_size": 8192,
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
    "mamba_n_heads": 64,
    "attention_multiplier": 0.015625,
    "logits_scaling": 8.0,
}
# The first 8 of 48 layers, 26 GB: all of them need several devices.
QWEN3_NEXT_8_LAYERS: dict[str, Any] = {
    "architectures": ["Qwen3NextForCausalLM"],
    "model_type": "qwen3_next",
    "hidden_act": "silu",
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000000.0,
    "partial_rotary_factor": 0.25,
    "max_position_embeddings": 262144,
    "head_dim": 256,
    "num_key_value_heads": 2,
    "num_attention_heads": 16,
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "full_attention_interval": 4,
    "linear_num_value_heads": 32,
    "linear_num_key_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}
LFM2_1_2B: dict[str, Any] = {
    "architectures": ["Lfm2ForCausalLM"],
    "model_type": "lfm2",
    "vocab_size": 65536,
    "norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 128000,
    "num_key_value_heads": 8,
    "num_attention_heads": 32,
    "hidden_size": 2048,
    "block_ff_dim": 12288,
    "num_hidden_layers": 16,
    "full_attn_idxs": [2, 5, 8, 10, 12, 14],
    "conv_L_cache": 3,
}
# The first 20 of 52 layers: two periods of Mamba, experts and attention.
NEMOTRON_3_NANO_20_LAYERS: dict[str, Any] = {
    "architectures": ["NemotronHForCausalLM"],
    "model_type": "nemotron_h",
    "vocab_size": 131072,
    "norm_eps": 1e-5,
    "max_position_embeddings": 262144,
    "head_dim": 128,
    "num_key_value_heads": 2,
    "num_attention_heads": 32,
    "hidden_size": 2688,
    "intermediate_size": 1856,
    "moe_intermediate_size": 1856,
    "moe_shared_expert_intermediate_size": 3712,
    "num_hidden_layers": 20,
    "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*",
    "mlp_hidden_act": "relu2",
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "num_experts_per_tok": 6,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "n_groups": 8,
    "conv_kernel": 4,
    "mamba_num_heads": 64,
    "mamba_head_dim": 64,
    "ssm_state_size": 128,
}
# The first 5 of 61 layers: three dense ones and two with experts.
DEEPSEEK_V3_5_LAYERS: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_act": "silu",
    "vocab_size": 129280,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 163840,
    "num_key_value_heads": 128,
    "num_attention_heads": 128,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 5,
    "first_k_dense_replace": 3,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}
GEMMA_4_31B: dict[str, Any] = {
    "architectures": ["Gemma4ForCausalLM"],
    "model_type": "gemma4_text",
    "hidden_activation": "gelu_pytorch_tanh",
    "vocab_size": 262144,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {
        "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional"},
        "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
    },
    "max_position_embeddings": 262144,
    "head_dim": 256,
    "global_head_dim": 512,
    "num_key_value_heads": 16,
    "num_global_key_value_heads": 4,
    "num_attention_heads": 32,
    "attention_k_eq_v": True,
    "hidden_size": 5376,
    "intermediate_size": 21504,
    "num_hidden_layers": 60,
    "layer_types": [*["sliding_attention"] * 5, "full_attention"] * 10,
    "sliding_window": 1024,
    "final_logit_softcapping": 30.0,
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "tie_word_embeddings": True,
}
# Experts of awkward widths, and the number of devices that divide them.
EXPERT_MODELS = {
    "gpt-oss-20b": (GPT_OSS_20B, 8),  # 360 columns a device, and rows of 2880
    "Qwen3-30B-A3B": (QWEN3_30B_A3B, 4),  # 192
    "Phi-3.5-MoE": (PHI_3_5_MOE, 8),  # 800
    "Qwen1.5-MoE-A2.7B": (QWEN1_5_MOE, 8),  # 176
    "Granite-3.0-3B-A800M": (GRANITE_3_3B_A800M, 8),  # 64, and heads of 64
}
GPU_MODELS = {
    "Llama-3-8B": LLAMA_3_8B,
    "Mixtral-8x7B": MIXTRAL_8X7B,
    "Gemma-3-27B": GEMMA_3_27B,
    "Qwen3-30B-A3B": QWEN3_30B_A3B,
    "gpt-oss-20b": GPT_OSS_20B,
    "Qwen2.5-0.5B": QWEN2_5_0_5B,
    "Qwen1.5-MoE-A2.7B": QWEN1_5_MOE,
    "Granite-3.0-3B-A800M": GRANITE_3_3B_A800M,
    "GLM-4.5-Air": GLM_4_5_AIR,
    "Phi-3.5-MoE": PHI_3_5_MOE,
    "Granite-4.0-H-Tiny": GRANITE_4_H_TINY,
    "Granite-4.0-H-Micro": GRANITE_4_H_MICRO,
    "Qwen3-Next, 8 layers": QWEN3_NEXT_8_LAYERS,
    "LFM2-1.2B": LFM2_1_2B,
    "Nemotron-3-Nano, 20 layers": NEMOTRON_3_NANO_20_LAYERS,
    "DeepSeek-V3, 5 layers": DEEPSEEK_V3_5_LAYERS,
    "Gemma-4-31B": GEMMA_4_31B,
}
SMALL_GPU_MODELS = {"Qwen2.5-0.5B": QWEN2_5_0_5B, "Qwen2.5-1.5B": QWEN2_5_1_5B, "Gemma-3-1B": GEMMA_3_1B}
"""Those that fit on a T4."""


# Models with a state in some layers, and the number of devices that hold them.
STATE_MODELS = {
    "Granite-4.0-H-Micro": (GRANITE_4_H_MICRO, 1),
    "Qwen3-Next, 8 layers": (QWEN3_NEXT_8_LAYERS, 1),
    "Granite-4.0-H-Tiny": (GRANITE_4_H_TINY, 1),
    "LFM2-1.2B": (LFM2_1_2B, 1),
    "Nemotron-3-Nano, 20 layers": (NEMOTRON_3_NANO_20_LAYERS, 1),
}
# Released checkpoints whose attention is sparse, what of them is changed, and the number of devices.
SPARSE_MODELS: dict[str, tuple[str, dict[str, Any], int]] = {
    "DeepSeek-V3.2, 2 layers": ("deepseek-ai/DeepSeek-V3.2", {"num_hidden_layers": 2, "first_k_dense_replace": 0}, 8),
}
# Models with heads wider than 256 numbers, and the number of devices that hold them.
WIDE_MODELS = {"DeepSeek-V3, 5 layers": (DEEPSEEK_V3_5_LAYERS, 8), "Gemma-4-31B": (GEMMA_4_31B, 1)}
# Released checkpoints that read images, and the number of devices.
IMAGE_MODELS = {
    "Gemma-3-27B": ("google/medgemma-27b-it", 8),
    "Qwen2.5-VL-7B": ("Qwen/Qwen2.5-VL-7B-Instruct", 1),
    "Qwen3-VL-8B": ("Qwen/Qwen3-VL-8B-Instruct", 1),
}
IMAGE_TOKENS = 4000  # of the largest image; not 4,096, which is also the width of a weight


@functools.cache
def released(name: str) -> dict[str, Any]:
    """The config.json of a released checkpoint in the table of docs/models.md."""
    from tests.checkpoint.released import releases

    (found,) = (release.config for release in releases() if release.model == name)
    return dict(found)


def tower_of(name: str) -> Any:
    """How one of `IMAGE_MODELS` reads images, the largest with `IMAGE_TOKENS` where it reads several sizes."""
    from fastgen_jax.models.vision.read import images_from_hf, largest

    images = images_from_hf(released(IMAGE_MODELS[name][0]), {})
    assert images is not None
    return largest(images, IMAGE_TOKENS)
