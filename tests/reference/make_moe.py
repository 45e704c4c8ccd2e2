"""Regenerates the tiny random checkpoints of the families with experts, in the format described in make_families.py.

python tests/reference/make_moe.py [FAMILY ...]        # needs torch and transformers; the tests need neither
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from make_families import LLAMA_LIKE, LONGROPE, PROMPT_LENGTH, TRAINED, compute, randomise, rope, without
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

MIXTRAL = {**LLAMA_LIKE, "num_local_experts": 4, "num_experts_per_tok": 2}
QWEN = {**LLAMA_LIKE, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
OLMOE = {**LLAMA_LIKE, "num_experts": 6, "num_experts_per_tok": 3}
QWEN2 = QWEN | {"shared_expert_intermediate_size": 20}
GPT_OSS = {
    **MIXTRAL,
    "head_dim": 12,
    "sliding_window": 16,
    "num_hidden_layers": 3,
    "swiglu_limit": 1.5,
    **rope(rope_type="yarn", factor=4.0, beta_fast=32.0, beta_slow=1.0, truncate=False, original_max_position_embeddings=32),
}
DEEPSEEK = without(
    "num_key_value_heads",
    num_hidden_layers=3,
    first_k_dense_replace=1,
    n_routed_experts=8,
    num_experts_per_tok=3,
    moe_intermediate_size=12,
    n_shared_experts=2,
    kv_lora_rank=12,
    q_lora_rank=None,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=10,
    num_key_value_heads=4,
)
DEEPSEEK_YARN = rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=32, beta_fast=32.0, beta_slow=1.0)
GLM = {
    **LLAMA_LIKE,
    "head_dim": 8,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 12,
    "n_shared_experts": 1,
    "routed_scaling_factor": 1.5,
    **rope(rope_type="default", partial_rotary_factor=0.5),
}
ERNIE = {
    **LLAMA_LIKE,
    "num_hidden_layers": 3,
    "moe_k": 3,
    "moe_num_experts": 8,
    "moe_num_shared_experts": 2,
    "moe_intermediate_size": 12,
}
GROUPS = {"n_group": 4, "topk_group": 2}
LLAMA4 = {
    **LLAMA_LIKE,
    "head_dim": 12,
    "num_hidden_layers": 4,
    "intermediate_size": 24,
    "intermediate_size_mlp": 40,
    "num_local_experts": 4,
    "attention_chunk_size": 16,
    "floor_scale": 8,
    "attn_scale": 0.5,
}
INDEXED = {"q_lora_rank": 14, "index_topk": 96, "index_head_dim": 8, "index_n_heads": 2}
# With fewer heads, several keys have a score of 0, and torch breaks ties in no stated order.
CHOOSING = INDEXED | {"index_topk": 16, "index_n_heads": 16}
PHIMOE = MIXTRAL | {"attention_bias": True, "lm_head_bias": True, "router_jitter_noise": 0.3}

# family -> (model_type of transformers, variant -> fields of its config)
FAMILIES: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "mixtral": (
        "mixtral",
        {
            "default": MIXTRAL,
            "window": {**MIXTRAL, "sliding_window": 16, "head_dim": 12},
            "relu2": {**MIXTRAL, "hidden_act": "relu2"},
        },
    ),
    "qwen2_moe": (
        "qwen2_moe",
        {
            "default": QWEN2,
            "dense_first": QWEN2 | {"num_hidden_layers": 3, "mlp_only_layers": [0], "norm_topk_prob": True},
            "every_second": QWEN2 | {"num_hidden_layers": 4, "decoder_sparse_step": 2, "qkv_bias": False},
            "window": QWEN2
            | {
                "num_hidden_layers": 4,
                "use_sliding_window": True,
                "sliding_window": 16,
                "max_window_layers": 3,
                "mlp_only_layers": [3],
                "hidden_act": "gelu",
            },
        },
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {
            "default": QWEN | {"head_dim": 12, "norm_topk_prob": True},
            "dense_last": QWEN | {"num_hidden_layers": 3, "mlp_only_layers": [2], "tie_word_embeddings": True},
            "window": QWEN | {"use_sliding_window": True, "sliding_window": 16, "hidden_act": "tanh"},
        },
    ),
    "gpt_oss": ("gpt_oss", {"default": GPT_OSS, "tied_no_bias": GPT_OSS | {"attention_bias": False}}),
    "olmoe": (
        "olmoe",
        {
            "default": OLMOE,
            "normalized": OLMOE | {"norm_topk_prob": True},
            "clipped": OLMOE | {"clip_qkv": 1.0, "attention_bias": True},
        },
    ),
    "granitemoe": (
        "granitemoe",
        {
            "default": {
                **MIXTRAL,
                "embedding_multiplier": 3.0,
                "logits_scaling": 2.0,
                "residual_multiplier": 0.5,
                "attention_multiplier": 0.2,
                "tie_word_embeddings": True,
            },
        },
    ),
    "glm4_moe": (
        "glm4_moe",
        {
            "default": GLM,
            "groups": GLM
            | GROUPS
            | {
                "use_qk_norm": True,
                "attention_bias": True,
                "norm_topk_prob": False,
                "tie_word_embeddings": True,
                "n_shared_experts": 2,
            },
        },
    ),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        {
            "default": ERNIE,
            "every_second": ERNIE
            | {
                "num_hidden_layers": 4,
                "moe_layer_interval": 2,
                "moe_layer_start_index": 0,
                "moe_num_shared_experts": 0,
                "tie_word_embeddings": True,
                "hidden_act": "gelu",
            },
        },
    ),
    "llama4": (
        "llama4_text",
        {
            "default": LLAMA4
            | {"interleave_moe_layer_step": 2}
            | rope(
                rope_type="llama3",
                factor=4.0,
                low_freq_factor=1.0,
                high_freq_factor=1.0,
                original_max_position_embeddings=32,
            ),
            "two_experts": LLAMA4
            | {
                "num_hidden_layers": 2,
                "num_experts_per_tok": 2,
                "no_rope_layers": [0, 1],
                "use_qk_norm": False,
                "attn_temperature_tuning": False,
                "attention_bias": True,
                "hidden_act": "gelu",
            },
        },
    ),
    "glm4_moe_lite": (
        "glm4_moe_lite",
        {
            "default": DEEPSEEK | {"q_lora_rank": 14, "n_shared_experts": 1},
            "groups": DEEPSEEK
            | GROUPS
            | {
                "mlp_layer_types": ["sparse", "dense", "sparse"],
                "rope_interleave": False,
                "norm_topk_prob": False,
                "attention_bias": True,
            },
        },
    ),
    "minimax_m2": (
        "minimax_m2",
        {
            "default": {**MIXTRAL, "head_dim": 8, **rope(rope_type="default", partial_rotary_factor=0.5)},
            "whole_tied": MIXTRAL | {"head_dim": 12, "tie_word_embeddings": True, "hidden_act": "gelu"},
        },
    ),
    "phimoe": (
        "phimoe",
        {
            "default": PHIMOE,
            "longrope": MIXTRAL
            | {"sliding_window": 16}
            | rope(**LONGROPE, **TRAINED, short_mscale=1.2, long_mscale=1.2, factor=4.0),
        },
    ),
    "deepseek_v32": (
        "deepseek_v32",
        {
            "default": DEEPSEEK | GROUPS | INDEXED,
            "glm5": DEEPSEEK | INDEXED | {"model_type": "glm_moe_dsa", "mlp_layer_types": ["dense", "sparse", "sparse"]},
            "sparse": DEEPSEEK | GROUPS | CHOOSING | {"index_head_dim": 10} | DEEPSEEK_YARN,
            "glm5_sparse": DEEPSEEK
            | CHOOSING
            | {"model_type": "glm_moe_dsa", "index_topk": 22, "indexer_types": ["full", "shared", "full"]},
        },
    ),
    "deepseek_v2": (
        "deepseek_v2",
        {
            "lite": DEEPSEEK | {"topk_method": "greedy", "routed_scaling_factor": 1.5},
            "not_normalized": DEEPSEEK | {"norm_topk_prob": True, "hidden_act": "quick_gelu"},
            "groups": DEEPSEEK
            | GROUPS
            | {"topk_method": "group_limited_greedy", "q_lora_rank": 14, "norm_topk_prob": False}
            | DEEPSEEK_YARN,
        },
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {
            "default": DEEPSEEK | GROUPS | {"q_lora_rank": 14, "routed_scaling_factor": 2.5},
            "yarn": DEEPSEEK
            | GROUPS
            | {
                "norm_topk_prob": False,
                "rope_interleave": False,
                "first_k_dense_replace": 0,
                "num_hidden_layers": 2,
                "attention_bias": True,
            }
            | rope(
                rope_type="yarn",
                factor=4.0,
                original_max_position_embeddings=32,
                beta_fast=32.0,
                beta_slow=1.0,
                mscale=0.7,
                mscale_all_dim=1.0,
            ),
        },
    ),
}


def longrope(rotary: Any) -> None:
    """Gives Phi-MoE the factors for long sequences, as in its published code; transformers never uses them."""
    rotary.rope_init_fn = lambda config: ROPE_INIT_FUNCTIONS["longrope"](config, None, seq_len=PROMPT_LENGTH)


def main() -> None:
    """Writes the variants of the families named on the command line, or of all families."""
    home = Path(__file__).parent / "families"
    for family in sys.argv[1:] or FAMILIES:
        model_type, variants = FAMILIES[family]
        for variant, fields in variants.items():
            if (home / family / variant).exists():
                continue
            torch.manual_seed(0)
            config = AutoConfig.for_model(**{"model_type": model_type, **fields})
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
            randomise(model)
            if model_type == "phimoe" and "rope_parameters" in fields:
                longrope(model.model.rotary_emb)
            for name, buffer in model.named_buffers():
                if name.endswith("e_score_correction_bias"):
                    buffer.copy_((torch.randn_like(buffer) * 0.2).bfloat16().float())
            expected = compute(model, torch.randint(3, config.vocab_size, (PROMPT_LENGTH,)))
            folder = home / family / variant
            model.to(torch.bfloat16).save_pretrained(folder)
            (folder / "generation_config.json").unlink(missing_ok=True)
            np.savez_compressed(folder / "expected.npz", **expected)
            size = sum(file.stat().st_size for file in folder.iterdir()) / 1024
            logits = expected["logits"]
            print(f"{family}/{variant}: {size:.0f} KiB, logits in [{logits.min():.1f}, {logits.max():.1f}]", flush=True)


if __name__ == "__main__":
    main()
