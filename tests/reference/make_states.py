"""Regenerates the tiny random checkpoints of the families with states, in the format described in make_families.py.

    python tests/reference/make_states.py [FAMILY ...]        # needs torch and transformers; the tests need neither

The prompt is longer than several pieces of `models.state_scan` on a CPU. The experts of a layer of Qwen3.5 are in one
tensor, as they are published.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from make_families import LLAMA_LIKE, main, rope, without
from safetensors.torch import load_file, save_file

LFM2 = {
    **LLAMA_LIKE,
    "num_hidden_layers": 5,
    "layer_types": ["conv", "conv", "full_attention", "conv", "full_attention"],
    "block_auto_adjust_ff_dim": False,
}
GRANITE = {
    **LLAMA_LIKE,
    "num_hidden_layers": 4,
    "layer_types": ["mamba", "mamba", "attention", "mamba"],
    "shared_intermediate_size": 40,
    "num_local_experts": 0,
    "mamba_n_heads": 8,
    "mamba_n_groups": 2,
    "mamba_d_state": 12,
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.25,
}
FALCON_H1 = {
    **LLAMA_LIKE,
    "mamba_d_ssm": 48,
    "mamba_n_heads": 6,
    "mamba_n_groups": 2,
    "mamba_d_state": 10,
    "embedding_multiplier": 1.5,
    "lm_head_multiplier": 0.5,
    "key_multiplier": 0.7,
    "attention_in_multiplier": 0.8,
    "attention_out_multiplier": 1.3,
    "ssm_in_multiplier": 0.9,
    "ssm_multipliers": [0.8, 1.2, 0.7, 1.1, 0.6],
    "ssm_out_multiplier": 0.75,
    "mlp_multipliers": [1.4, 0.6],
}
NEMOTRON_H = {
    **without("num_hidden_layers"),
    "hybrid_override_pattern": "MM-*-M-*-M",
    "head_dim": 12,
    "mamba_num_heads": 6,
    "mamba_head_dim": 8,
    "n_groups": 2,
    "ssm_state_size": 10,
    "time_step_min": 1e-12,  # transformers clamps the steps of prompts to it, but not those of generated tokens
}
NEMOTRON_H_EXPERTS = NEMOTRON_H | {
    "hybrid_override_pattern": "MEM*EM",
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 12,
    "moe_shared_expert_intermediate_size": 24,
    "routed_scaling_factor": 2.5,
}
DELTA_NET = {
    **LLAMA_LIKE,
    "num_hidden_layers": 5,
    "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention", "full_attention"],
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    **rope(rope_type="default", partial_rotary_factor=0.25),
}
QWEN = DELTA_NET | {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 20,
}

FAMILIES = {
    "lfm2": (
        "lfm2",
        {
            "default": LFM2,
            "bias": LFM2
            | {
                "conv_bias": True,
                "conv_L_cache": 5,
                "block_auto_adjust_ff_dim": True,
                "block_multiple_of": 8,
                "tie_word_embeddings": True,
            },
        },
    ),
    "lfm2_moe": (
        "lfm2_moe",
        {
            "default": LFM2
            | {"num_dense_layers": 1, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 12}
            | {"routed_scaling_factor": 1.5}
        },
    ),
    "granitemoehybrid": (
        "granitemoehybrid",
        {
            "default": GRANITE,
            "experts": GRANITE
            | {
                "num_local_experts": 4,
                "intermediate_size": 24,
                "position_embedding_type": "rope",
                "mamba_n_groups": 1,
                "mamba_proj_bias": True,
                "mamba_conv_bias": False,
            },
        },
    ),
    "qwen3_next": ("qwen3_next", {"default": QWEN, "dense_first": QWEN | {"mlp_only_layers": [0, 2]}}),
    "qwen3_5_moe": ("qwen3_5_moe_text", {"default": {**QWEN, "num_experts": 6, "num_experts_per_tok": 3}}),
    "qwen3_5": ("qwen3_5_text", {"default": DELTA_NET, "one_share": DELTA_NET | {"linear_num_key_heads": 4}}),
    "falcon_h1": (
        "falcon_h1",
        {
            "default": FALCON_H1,
            "norm": FALCON_H1 | {"mamba_rms_norm": True, "mamba_norm_before_gate": False, "tie_word_embeddings": True},
            "norm_first": FALCON_H1 | {"mamba_rms_norm": True, "mamba_n_groups": 1},
        },
    ),
    "nemotron_h": (
        "nemotron_h",
        {
            "default": NEMOTRON_H,
            "experts": NEMOTRON_H_EXPERTS,
            "latent": NEMOTRON_H_EXPERTS
            | {"hybrid_override_pattern": "ME*E-", "moe_latent_size": 20, "n_group": 2, "topk_group": 1},
        },
    ),
}


def join_experts(file: Path) -> None:
    """Replaces the tensors of single experts, as transformers saves them, by those of all experts of a layer."""
    tensors = load_file(file)
    number = re.compile(r"(.*\.experts)\.(\d+)\.down_proj\.weight")
    found = [match.groups() for match in map(number.fullmatch, tensors) if match]
    for block in {block for block, _ in found}:
        experts = sorted(int(expert) for other, expert in found if other == block)
        gate, up, down = (
            torch.stack([tensors.pop(f"{block}.{expert}.{part}_proj.weight") for expert in experts])
            for part in ("gate", "up", "down")
        )
        tensors |= {f"{block}.gate_up_proj": torch.cat([gate, up], dim=1), f"{block}.down_proj": down}
    save_file(tensors, file, metadata={"format": "pt"})


if __name__ == "__main__":
    main(FAMILIES)
    for file in Path(__file__).parent.glob("families/qwen3_5_moe/*/model.safetensors"):
        join_experts(file)
