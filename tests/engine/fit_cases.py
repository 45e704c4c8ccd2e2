"""What `fit` chooses for known models on known devices: `python -m tests.engine.fit_cases` prints it for docs/memory.md."""

from __future__ import annotations

import jax.numpy as jnp

from fastgen_jax.engine import footprint
from fastgen_jax.engine.config import EngineConfig
from fastgen_jax.engine.fit import choose_formats, tokens_that_fit
from fastgen_jax.engine.machine import Machine
from fastgen_jax.engine.memory import Memory, round_down
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import family_of

GIB = 2**30
# What JAX reports as `bytes_limit`: by default three quarters of a GPU.
MACHINES = {
    "v5e, 1 chip": Machine(platform="tpu", kind="TPU v5 lite", memory=Memory(limit=int(15.75 * GIB)), num_devices=1),
    "T4": Machine(platform="gpu", kind="Tesla T4", memory=Memory(limit=int(0.75 * 14.7 * GIB)), bfloat16=False),
    "H100 80 GB": Machine(platform="gpu", kind="NVIDIA H100 80GB HBM3", memory=Memory(limit=int(0.75 * 79.1 * GIB))),
    "CPU, 16 GiB free": Machine(platform="cpu", kind="cpu", memory=Memory(limit=16 * GIB, is_host=True), packs=True),
    "CPU, 2 GiB control group": Machine(  # of which the process takes 0.3 GiB before it loads a model
        platform="cpu", kind="cpu", memory=Memory(limit=int(1.7 * GIB), is_host=True), packs=True
    ),
}
_LLAMA = {"architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "rms_norm_eps": 1e-5}
_GEMMA_3 = {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "vocab_size": 262_144, "head_dim": 256}
# The fields of the released config.json files that determine sizes.
CONFIGS = {
    "SmolLM2-135M": _LLAMA
    | {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49_152,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "Qwen2.5-0.5B": {
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
        "max_position_embeddings": 32_768,
        "tie_word_embeddings": True,
    },
    "Llama-3.2-1B": _LLAMA
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128_256,
        "max_position_embeddings": 131_072,
        "tie_word_embeddings": True,
    },
    "Gemma-3-1B": _GEMMA_3
    | {
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "num_hidden_layers": 26,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "sliding_window": 512,
        "max_position_embeddings": 32_768,
    },
    "Llama-3-8B": _LLAMA
    | {
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
        "max_position_embeddings": 8192,
    },
    "Gemma-3-27B": _GEMMA_3
    | {
        "head_dim": 128,
        "hidden_size": 5376,
        "intermediate_size": 21_504,
        "num_hidden_layers": 62,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "query_pre_attn_scalar": 168,
        "sliding_window": 1024,
        "max_position_embeddings": 131_072,
    },
}


def model(name: str) -> ModelConfig:
    """The architecture of a model of the table."""
    return family_of(CONFIGS[name]["architectures"][0]).config_from_hf(CONFIGS[name])


def table() -> str:
    """The choices as a table in Markdown."""
    config = EngineConfig()
    lines = ["| model | " + " | ".join(MACHINES) + " |", "|---" * (len(MACHINES) + 1) + "|"]
    for name in CONFIGS:
        cells = [_cell(config, model(name), machine) for machine in MACHINES.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(config: EngineConfig, which: ModelConfig, machine: Machine) -> str:
    try:
        formats = choose_formats(config, which, machine)
    except ValueError:
        return "does not fit"
    tokens = tokens_that_fit(formats, config, which, machine)
    tokens = round_down(tokens // 32, machine.memory.room().digits) * 32
    cache = "" if formats.kv_dtype == formats.dtype else f", {formats.kv_dtype} cache"
    context = min(tokens, which.max_context_len)
    of = "" if context == which.max_context_len else f" of {which.max_context_len:,}"
    weights = footprint.size(
        footprint.weight_bytes(which, 1, jnp.dtype(formats.dtype).itemsize, quantize=formats.quantize, packed=machine.packs)
    )
    return f"{formats.quantize or formats.dtype} ({weights}){cache}; context {context:,}{of}; {tokens:,} cached"


if __name__ == "__main__":
    print(table())
