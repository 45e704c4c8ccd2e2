"""Released configurations scaled down, and the random weights of such a model, the same wherever they are made.

`make_released_logits.py` gives them to transformers, `tests/checkpoint/released.py` to this package. Needs NumPy only.
"""

from __future__ import annotations

import re
import zlib
from typing import Any

import numpy as np

HEAD_DIM = 16
VOCAB_SIZE = 96
PROMPT_LENGTH = 60
ROWS = (14, 29, 44, 59)  # of the logits that are kept: before and after every threshold below
TRAINED = 32  # rotary threshold
WINDOW = 16
_LAYERS = ("num_hidden_layers", "n_layer")
_HEADS = ("num_attention_heads", "n_head", "num_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
_EMBED = ("hidden_size", "n_embd", "n_embed")
_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "head_dim": HEAD_DIM,
    "kv_channels": HEAD_DIM,
    "global_head_dim": 2 * HEAD_DIM,
    "num_global_key_value_heads": 1,
    "intermediate_size": 48,
    "intermediate_size_mlp": 40,
    "ffn_dim": 48,
    "moe_intermediate_size": 24,
    "num_local_experts": 8,
    "num_experts": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "experts_per_token": 2,
    "top_k_experts": 2,
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "moe_shared_expert_intermediate_size": 24,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "n_groups": 2,
    "ssm_state_size": 16,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "sliding_window": WINDOW,
    "attention_chunk_size": WINDOW,
    "initial_context_length": TRAINED,
    "original_max_position_embeddings": TRAINED,
    "seq_length": TRAINED,
    "n_positions": 96,
    "n_ctx": 96,
    "num_nextn_predict_layers": 0,
    "bos_token_id": 1,
    "pad_token_id": 0,
}
_TOKENS_OF_IMAGES = (
    *("image_token_index", "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"),
    *("vision_token_id", "boi_token_index", "eoi_token_index"),
)
_DROPPED = ("quantization_config", "quantization", "torch_dtype", "dtype", "auto_map")
_EYES = {
    "pixtral": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8},
    "siglip_vision_model": {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    },
    "clip_vision_model": {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
        "projection_dim": 16,
    },
    "mllama_vision_model": {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_global_layers": 1,
        "attention_heads": 2,
        "image_size": 28,
        "intermediate_layers_indices": [0],
        "vision_output_dim": 32,
    },
    "": {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "patch_size": 14,
        "fullatt_block_indexes": [0],
        "deepstack_visual_indexes": [0],
        "num_position_embeddings": 16,
    },
}


# Sizes of the text model that a config.json leaves out.
_OMITTED = {
    "llava": {"hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32, "num_attention_heads": 32},
}


def shrunk(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of a config.json with small sizes. Ratios, scalings, patterns of layers and all other values are kept."""
    hf = {name: value for name, value in config.items() if name not in _DROPPED}
    if "vision_config" in hf:
        eyes = hf["vision_config"]
        small = _EYES[eyes.get("model_type", "") if eyes.get("model_type") in _EYES else ""]
        hf["vision_config"] = {**eyes, **{name: value for name, value in small.items() if name in eyes}}
    if "text_config" in hf:
        hf["text_config"] = shrunk(_OMITTED.get(hf["model_type"], {}) | hf["text_config"])
    embed = _field(config, _EMBED)
    if embed is not None:
        hf |= _small(config, embed)
        if "out_hidden_size" in hf.get("vision_config", {}):
            hf["vision_config"] |= {"out_hidden_size": _field(hf, _EMBED)}
    if "out_hidden_size" in hf.get("vision_config", {}) and "text_config" in hf:
        hf["vision_config"] |= {"out_hidden_size": hf["text_config"]["hidden_size"]}
    hf |= {name: VOCAB_SIZE - 1 - i for i, name in enumerate(_TOKENS_OF_IMAGES) if name in hf}
    if hf.get("eos_token_id") is not None:
        hf["eos_token_id"] = 2
    return hf


def _field(hf: dict[str, Any], names: tuple[str, ...]) -> Any:
    return next((hf[name] for name in names if hf.get(name) is not None), None)


def _small(config: dict[str, Any], embed: int) -> dict[str, Any]:
    heads, count = _field(config, _HEADS), _field(config, _LAYERS)
    kv_heads = _field(config, _KV_HEADS) or heads
    power_of_two = heads & (heads - 1) == 0  # ALiBi's slopes depend on it
    few_kv = 2 if kv_heads < heads else 4 if power_of_two else 6
    few = few_kv * min(heads // kv_heads, 4) if kv_heads < heads else few_kv
    wide = "kv_lora_rank" not in config and config.get("head_dim") not in (None, embed // heads)
    width = 48 if wide and few * HEAD_DIM != 48 else 64 if wide or "kv_lora_rank" in config else few * HEAD_DIM
    deep = config["model_type"].startswith(("gemma3", "gemma4")) or "hybrid_override_pattern" in config
    layers = min(count, 6 if deep else 4)
    small = {name: size for name, size in _SIZES.items() if config.get(name) is not None}
    small |= {
        name: min(config[name], small[name]) for name in ("n_group", "topk_group", "num_experts_per_tok") if name in small
    }
    small |= dict.fromkeys(_LAYERS, layers) | dict.fromkeys(_HEADS, few) | dict.fromkeys(_KV_HEADS, few_kv)
    small |= dict.fromkeys(_EMBED, width)
    rotated = config["rotary_dim"] / config["head_dim"] if {"rotary_dim", "head_dim"} <= config.keys() else 1.0
    small |= {"word_embed_proj_dim": width, "rotary_dim": int(HEAD_DIM * config.get("partial_rotary_factor", rotated))}
    for name in ("layer_types", "no_rope_layers", "hybrid_override_pattern"):
        small[name] = (config.get(name) or [])[:layers]
    for name in ("mlp_only_layers", "cross_attention_layers"):
        small[name] = [layer for layer in config.get(name) or () if layer < layers]
    small["max_window_layers"] = round(layers * min(config.get("max_window_layers", 0) / count, 1.0))
    scaling = {name: _rope(config[name]) for name in ("rope_scaling", "rope_parameters") if config.get(name)}
    factor = next((rope.get("factor", 4.0) for rope in scaling.values() if "original_max_position_embeddings" in rope), 4.0)
    small["max_position_embeddings"] = int(TRAINED * factor) if "ffn_dim" not in config else 96
    small = {name: value for name, value in small.items() if config.get(name) is not None}
    return {**small, **scaling, "model_type": config["model_type"]}


def _rope(fields: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings for the small head: the trained length, and as many factors and sections as it has pairs."""
    small = dict(fields)
    if "original_max_position_embeddings" in small:
        small["original_max_position_embeddings"] = TRAINED
    if sections := small.get("mrope_section"):
        smaller = [size * HEAD_DIM // 2 // sum(sections) for size in sections]
        small["mrope_section"] = [smaller[0] + HEAD_DIM // 2 - sum(smaller), *smaller[1:]]
    for name in ("short_factor", "long_factor"):
        if name in small:
            small[name] = small[name][:: len(small[name]) // (HEAD_DIM // 2)][: HEAD_DIM // 2]
    return small


def random_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """f32: the weights of a tensor, determined by its name; large enough for norms and biases to affect the logits."""
    name = re.sub(r"^(model\.)?language_model\.(model\.)?", "model.", name).replace("model.lm_head", "lm_head")
    noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, np.float32)
    if len(shape) > 1:
        return noise * np.float32(1.5 / np.sqrt(shape[-1]))
    is_norm_weight = name.endswith("weight") and re.search(r"norm|ln_|\.ln", name)
    return np.float32(1.0 if is_norm_weight or name.endswith("layer_scalar") else 0.0) + np.float32(0.3) * noise


def prompt() -> np.ndarray:
    """i64[PROMPT_LENGTH]: random tokens, none of them special."""
    return np.random.default_rng(0).integers(3, VOCAB_SIZE - len(_TOKENS_OF_IMAGES), PROMPT_LENGTH)
