"""Regenerates the tiny random checkpoints under `families/` and the logits that transformers computes for them.

    python tests/reference/make_families.py [FAMILY ...]        # needs torch and transformers; the tests need neither

Each `families/FAMILY/VARIANT` has config.json and model.safetensors as written by `save_pretrained` (bfloat16, to keep
them small) and expected.npz, computed in float32 from the same rounded weights: `token_ids` i64[P + N], a random
prompt of P tokens and the N tokens that greedy decoding appends, and `logits` f32[P + N, V], the first P rows from the
whole prompt in one pass, the others from decoding token by token with transformers' cache. Norms and biases are random
too, so that a missing or swapped one is detected. A folder that exists is kept: another version of torch would make
other weights. The prompt is longer than every window and every rotary threshold.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

PROMPT_LENGTH = 60
NUM_GREEDY = 10
LLAMA_LIKE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}


def without(*names: str, **changes: Any) -> dict[str, Any]:
    """The Llama-like fields without `names` and with `changes`."""
    return {name: value for name, value in LLAMA_LIKE.items() if name not in names} | changes


def rope(**fields: Any) -> dict[str, Any]:
    """The field that holds the rotary settings."""
    return {"rope_parameters": {"rope_theta": 10000.0, **fields}}


TRAINED = {"original_max_position_embeddings": 32}
YARN = rope(rope_type="yarn", factor=4.0, **TRAINED)
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 1.5, 2.0, 4.0]}
GPT2 = {"vocab_size": 64, "n_positions": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
BLOOM = {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
MPT = {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 96, "bos_token_id": 1, "eos_token_id": 2}
FALCON = without("num_key_value_heads", "intermediate_size", ffn_hidden_size=48)
OPT = without("num_key_value_heads", "intermediate_size", ffn_dim=48, word_embed_proj_dim=32, tie_word_embeddings=True)
GEMMA = {**LLAMA_LIKE, "head_dim": 12, "tie_word_embeddings": True}
GEMMA3N = {
    **GEMMA,
    "num_hidden_layers": 7,
    "sliding_window": 16,
    "layer_types": [f"{kind}_attention" for kind in ["sliding", "sliding", "full", "sliding", "sliding", "full", "sliding"]],
    "num_kv_shared_layers": 3,
    "activation_sparsity_pattern": [0.9, 0.7, 0.0, 0.0, 0.5, 0.0, 0.0],
    "vocab_size_per_layer_input": 56,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 6,
    "final_logit_softcapping": 5.0,
}
GEMMA4 = {
    **GEMMA,
    "head_dim": 8,
    "global_head_dim": 16,
    "num_hidden_layers": 6,
    "sliding_window": 16,
    "layer_types": [f"{kind}_attention" for kind in ("sliding", "sliding", "full", "sliding", "sliding", "full")],
    "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True,
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 8,
    "final_logit_softcapping": 5.0,
}

# family -> (model_type of transformers, variant -> fields of its config)
FAMILIES: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "mistral": (
        "mistral",
        {
            "window": {**LLAMA_LIKE, "sliding_window": 16},
            "head_dim": {**LLAMA_LIKE, "sliding_window": None, "head_dim": 12},
            "ministral": {
                **LLAMA_LIKE,
                "model_type": "ministral",
                "head_dim": 8,
                "sliding_window": 16,
                "layer_types": ["full_attention", "sliding_attention"],
            },
            "ministral3": {
                **LLAMA_LIKE,
                "model_type": "ministral3",
                "head_dim": 12,
                **rope(
                    rope_type="yarn",
                    factor=8.0,
                    original_max_position_embeddings=16,
                    beta_fast=32.0,
                    beta_slow=1.0,
                    mscale=1.0,
                    mscale_all_dim=1.0,
                    llama_4_scaling_beta=0.3,
                ),
            },
        },
    ),
    "opt": (
        "opt",
        {
            "default": OPT,
            "post_norm": OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 16},
            "no_bias_untied": OPT | {"enable_bias": False, "tie_word_embeddings": False, "activation_function": "gelu"},
            "no_final_norm": OPT | {"_remove_final_layer_norm": True},
            "plain_norms": OPT | {"layer_norm_elementwise_affine": False, "activation_function": "relu2"},
        },
    ),
    "falcon": (
        "falcon",
        {
            "7b": FALCON | {"tie_word_embeddings": True},
            "40b": FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2},
            "11b": FALCON
            | {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1, "bias": True},
            "rw": FALCON | {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
        },
    ),
    "phi": (
        "phi",
        {
            "default": LLAMA_LIKE | rope(rope_type="default", partial_rotary_factor=0.5),
            "qk_norm": LLAMA_LIKE | rope(rope_type="default", partial_rotary_factor=0.5) | {"qk_layernorm": True},
        },
    ),
    "phi3": (
        "phi3",
        {
            "window": LLAMA_LIKE | {"sliding_window": 16},
            "longrope_long": LLAMA_LIKE | rope(**LONGROPE) | {"original_max_position_embeddings": 32},
            "longrope_short": LLAMA_LIKE | rope(**LONGROPE) | {"original_max_position_embeddings": 80},
            "partial_tied": {
                **LLAMA_LIKE,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "tie_word_embeddings": True,
                "original_max_position_embeddings": 32,
                **rope(**LONGROPE, partial_rotary_factor=0.5),
            },
        },
    ),
    "qwen2": (
        "qwen2",
        {
            "tied": {**LLAMA_LIKE, "tie_word_embeddings": True},
            "upper_window": {
                **LLAMA_LIKE,
                "num_hidden_layers": 3,
                "use_sliding_window": True,
                "sliding_window": 16,
                "max_window_layers": 1,
            },
            "yarn": LLAMA_LIKE | YARN,
            "multi_head": {**LLAMA_LIKE, "num_key_value_heads": 4},  # test_qwen.py renames it to Qwen 1
        },
    ),
    "qwen3": (
        "qwen3",
        {
            "default": {**LLAMA_LIKE, "head_dim": 12},
            "bias_window": {
                **LLAMA_LIKE,
                "head_dim": 8,
                "attention_bias": True,
                "num_hidden_layers": 3,
                "use_sliding_window": True,
                "sliding_window": 16,
                "max_window_layers": 2,
            },
        },
    ),
    "gemma": ("gemma", {"default": GEMMA}),
    "gemma2": (
        "gemma2",
        {
            "default": {
                **GEMMA,
                "num_hidden_layers": 3,
                "sliding_window": 16,
                "query_pre_attn_scalar": 20,
                "attn_logit_softcapping": 4.0,
                "final_logit_softcapping": 5.0,
            },
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            "default": {
                **GEMMA,
                "num_hidden_layers": 4,
                "sliding_window": 16,
                "query_pre_attn_scalar": 20,
                "sliding_window_pattern": 3,
            },
            "scaled": {
                **GEMMA,
                "num_hidden_layers": 3,
                "sliding_window": 16,
                "query_pre_attn_scalar": 12,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
                },
            },
        },
    ),
    "gemma3n": (
        "gemma3n_text",
        {
            "default": GEMMA3N,
            "dense": {
                **GEMMA3N,
                "num_hidden_layers": 3,
                "num_kv_shared_layers": 0,
                "altup_num_inputs": 2,
                "altup_active_idx": 1,
                "altup_correct_scale": False,
                "activation_sparsity_pattern": [0.0] * 3,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
                },
            },
        },
    ),
    "gemma4": (
        "gemma4_text",
        {
            "default": GEMMA4,
            "keys_as_values": {
                **GEMMA4,
                "hidden_size_per_layer_input": 0,
                "num_kv_shared_layers": 0,
                "use_double_wide_mlp": False,
                "attention_k_eq_v": True,
                "num_global_key_value_heads": 1,
            },
            "experts": {
                **GEMMA4,
                "num_hidden_layers": 4,
                "layer_types": [f"{kind}_attention" for kind in ("sliding", "full", "sliding", "full")],
                "hidden_size_per_layer_input": 0,
                "num_kv_shared_layers": 0,
                "use_double_wide_mlp": False,
                "attention_k_eq_v": True,
                "num_key_value_heads": 4,
                "num_global_key_value_heads": 1,
                "enable_moe_block": True,
                "num_experts": 6,
                "top_k_experts": 4,
                "moe_intermediate_size": 24,
            },
        },
    ),
    "gpt2": (
        "gpt2",
        {
            "default": GPT2,
            "unscaled_inner": GPT2
            | {"n_inner": 48, "scale_attn_weights": False, "activation_function": "relu", "tie_word_embeddings": False},
            "scaled_by_layer": GPT2
            | {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True, "n_layer": 3},
        },
    ),
    "gpt_neox": (
        "gpt_neox",
        {
            "default": without("num_key_value_heads") | rope(rope_type="default", partial_rotary_factor=0.25),
            "sequential": without(
                "num_key_value_heads",
                use_parallel_residual=False,
                attention_bias=False,
                hidden_act="gelu_new",
                tie_word_embeddings=True,
            )
            | rope(rope_type="linear", factor=2.0, partial_rotary_factor=1.0),
        },
    ),
    "bloom": (
        "bloom",
        {
            "default": BLOOM,
            "six_heads": BLOOM | {"hidden_size": 24, "n_head": 6},
        },
    ),
    "olmo": (
        "olmo",
        {
            "clipped": {**LLAMA_LIKE, "clip_qkv": 1.0},
            "bias_tied": LLAMA_LIKE | {"attention_bias": True, "tie_word_embeddings": True, "hidden_act": "mish"},
        },
    ),
    "olmo2": (
        "olmo2",
        {
            "default": LLAMA_LIKE,
            "bias_tied": LLAMA_LIKE | {"attention_bias": True, "tie_word_embeddings": True},
        },
    ),
    "smollm3": (
        "smollm3",
        {
            "default": {**LLAMA_LIKE, "num_hidden_layers": 3, "no_rope_layer_interval": 2, "tie_word_embeddings": True},
            "window_bias": {
                **LLAMA_LIKE,
                "num_hidden_layers": 3,
                "no_rope_layers": [1, 0, 1],
                "use_sliding_window": True,
                "sliding_window": 16,
                "attention_bias": True,
                "mlp_bias": True,
            },
        },
    ),
    "granite": (
        "granite",
        {
            "default": {
                **LLAMA_LIKE,
                "embedding_multiplier": 3.0,
                "logits_scaling": 2.0,
                "residual_multiplier": 0.5,
                "attention_multiplier": 0.2,
                "tie_word_embeddings": True,
            },
            "bias": {**LLAMA_LIKE, "attention_bias": True, "mlp_bias": True},
        },
    ),
    "starcoder2": (
        "starcoder2",
        {
            "default": {**LLAMA_LIKE, "sliding_window": 16, "tie_word_embeddings": True},
            "no_bias": {**LLAMA_LIKE, "use_bias": False},
        },
    ),
    "stablelm": (
        "stablelm",
        {
            "default": LLAMA_LIKE | rope(rope_type="default", partial_rotary_factor=0.25),
            "parallel_qk_norm": LLAMA_LIKE
            | {"use_parallel_residual": True, "qk_layernorm": True, "use_qkv_bias": True}
            | rope(rope_type="default", partial_rotary_factor=0.5),
        },
    ),
    "cohere": (
        "cohere",
        {
            "default": {**LLAMA_LIKE, "tie_word_embeddings": True},
            "qk_norm_bias": {**LLAMA_LIKE, "use_qk_norm": True, "attention_bias": True, "logit_scale": 0.25},
        },
    ),
    "olmo3": (
        "olmo3",
        {
            "default": {**LLAMA_LIKE, "num_hidden_layers": 4, "sliding_window": 16},
            "yarn": {
                **LLAMA_LIKE,
                "num_hidden_layers": 3,
                "sliding_window": 16,
                "attention_bias": True,
                "tie_word_embeddings": True,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
                "rope_parameters": {
                    "full_attention": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, **TRAINED},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                },
            },
        },
    ),
    "glm": ("glm", {"default": {**LLAMA_LIKE, "head_dim": 12, **rope(rope_type="default", partial_rotary_factor=0.5)}}),
    "glm4": (
        "glm4",
        {
            "default": {
                **LLAMA_LIKE,
                "head_dim": 12,
                "attention_bias": True,
                **rope(rope_type="default", partial_rotary_factor=0.5),
            },
            "no_bias_whole": {
                **LLAMA_LIKE,
                "head_dim": 8,
                "attention_bias": False,
                "tie_word_embeddings": True,
                **rope(rope_type="linear", factor=2.0, partial_rotary_factor=1.0),
            },
        },
    ),
    "exaone4": (
        "exaone4",
        {
            "default": {**LLAMA_LIKE, "num_hidden_layers": 4, "sliding_window": 16},
            "no_window": {
                **LLAMA_LIKE,
                "sliding_window": None,
                "tie_word_embeddings": True,
                "layer_types": ["full_attention"] * 2,
            },
        },
    ),
    "seed_oss": (
        "seed_oss",
        {
            "default": {**LLAMA_LIKE, "head_dim": 12, "attention_bias": True},
            "biases": {**LLAMA_LIKE, "head_dim": 8, "attention_bias": True, "attention_out_bias": True, "mlp_bias": True},
        },
    ),
    "ernie4_5": (
        "ernie4_5",
        {
            "default": {**LLAMA_LIKE, "head_dim": 12, "tie_word_embeddings": True},
            "bias": {**LLAMA_LIKE, "head_dim": 8, "use_bias": True},
        },
    ),
    "cohere2": (
        "cohere2",
        {
            "default": {
                **LLAMA_LIKE,
                "num_hidden_layers": 3,
                "sliding_window": 16,
                "tie_word_embeddings": True,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
        },
    ),
    "arcee": (
        "arcee",
        {
            "default": {**LLAMA_LIKE, "head_dim": 12, **YARN},
            "bias_tied": {**LLAMA_LIKE, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        },
    ),
    "apertus": (
        "apertus",
        {
            "default": LLAMA_LIKE
            | rope(rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, **TRAINED),
            "bias_tied": LLAMA_LIKE
            | {"attention_bias": True, "tie_word_embeddings": True, "hidden_act": "relu2", **rope(rope_type="default")},
        },
    ),
    "hunyuan_v1_dense": (
        "hunyuan_v1_dense",
        {
            "default": {**LLAMA_LIKE, "head_dim": 12, "tie_word_embeddings": True},
            "bias_alpha": {
                **LLAMA_LIKE,
                "head_dim": 8,
                "attention_bias": True,
                **rope(rope_type="dynamic", factor=1.0, alpha=100.0),
            },
        },
    ),
    "nemotron": (
        "nemotron",
        {
            "default": LLAMA_LIKE | rope(rope_type="default", partial_rotary_factor=0.5),
            "bias": {
                **LLAMA_LIKE,
                "head_dim": 12,
                "attention_bias": True,
                "mlp_bias": True,
                **rope(rope_type="default", partial_rotary_factor=1.0),
            },
        },
    ),
    "gptj": ("gptj", {"default": GPT2 | {"rotary_dim": 4, "tie_word_embeddings": False}}),
    "gpt_neo": (
        "gpt_neo",
        {
            "default": without(
                "num_key_value_heads",
                "num_hidden_layers",
                "num_attention_heads",
                "tie_word_embeddings",
                num_layers=3,
                num_heads=4,
                attention_types=[[["global", "local"], 1], [["local"], 1]],
                window_size=16,
            ),
        },
    ),
    "gpt_bigcode": (
        "gpt_bigcode",
        {
            "default": GPT2,
            "multi_head": GPT2 | {"multi_query": False, "n_inner": 48, "scale_attn_weights": False},
        },
    ),
    "mpt": (
        "mpt",
        {
            "default": MPT,
            "six_heads": MPT | {"d_model": 24, "n_heads": 6, "attn_config": {"clip_qkv": 1.0, "softmax_scale": 0.25}},
        },
    ),
}


def randomise(model: torch.nn.Module) -> None:
    """Sets random weights rounded to bfloat16, large enough for norms, biases and errors to affect the logits."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm_weight = name.endswith("weight") and any(word in name for word in ("norm", "ln_"))
            noise = torch.randn_like(parameter) * 0.3  # with the default 0.02, logits would be too flat to reveal errors
            if is_norm_weight and float(parameter.detach().mean()) != 0.0:  # Gemma's start at 0 and count from 1
                noise += 1.0
            parameter.copy_(noise.bfloat16().float())
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.copy_((1.0 + torch.randn_like(buffer) * 0.2).bfloat16().float())
            if name.endswith(("expert_bias", "mixer.gate.e_score_correction_bias")):
                buffer.copy_((torch.randn_like(buffer) * 0.2).bfloat16().float())


def compute(model: Any, prompt: torch.Tensor) -> dict[str, np.ndarray]:
    """The contents of `expected.npz`."""
    with torch.no_grad():
        rows = [model(prompt[None]).logits[0]]
        out = model(prompt[None], use_cache=True)
        tokens = prompt.tolist()
        for _ in range(NUM_GREEDY):
            token = out.logits[:, -1:].argmax(-1)
            tokens.append(int(token))
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
            rows.append(out.logits[0])
    return {"token_ids": np.array(tokens), "logits": torch.cat(rows).float().numpy()}


def main(families: dict[str, tuple[str, dict[str, dict[str, Any]]]] = FAMILIES) -> None:
    """Writes the variants of the families named on the command line, or of all families."""
    home = Path(__file__).parent / "families"
    for family in sys.argv[1:] or families:
        model_type, variants = families[family]
        for variant, fields in variants.items():
            if (home / family / variant).exists():
                continue
            torch.manual_seed(0)
            config = AutoConfig.for_model(**{"model_type": model_type, **fields})
            # transformers 5.23 adds Falcon's ALiBi twice in its eager attention; its others lack Gemma 2's soft cap.
            attention = "sdpa" if family == "falcon" else "eager"
            model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).float().eval()
            randomise(model)
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
