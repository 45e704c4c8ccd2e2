"""Regenerates the tiny random checkpoints of families that transformers lacks, in the format described in make_families.py.

    python tests/reference/make_renamed.py [FAMILY ...]        # needs torch and transformers; the tests need neither

The published code of each of these families computes what another family of transformers computes with suitable settings.
That one makes the weights and the logits; they are saved with the tensor names and the config.json of the family.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from make_families import LLAMA_LIKE, NUM_GREEDY, PROMPT_LENGTH, compute, randomise, rope
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

Tensors = dict[str, torch.Tensor]
MINICPM = {"scale_emb": 3.0, "scale_depth": 1.4, "dim_model_base": 16}
DYNAMIC = {"max_position_embeddings": 32, "rope_theta": 10000.0, "rope_scaling": {"type": "dynamic", "factor": 2.0}}


def internlm2(tensors: Tensors) -> Tensors:
    """Queries, keys and values of each key-value head are adjacent."""
    group, head_dim = LLAMA_LIKE["num_attention_heads"] // LLAMA_LIKE["num_key_value_heads"], 8
    renamed = {
        "model.tok_embeddings.weight": tensors["model.embed_tokens.weight"],
        "model.norm.weight": tensors["model.norm.weight"],
        "output.weight": tensors["lm_head.weight"],
    }
    for i in range(LLAMA_LIKE["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        for theirs, ours in {
            "self_attn.o_proj": "attention.wo",
            "mlp.gate_proj": "feed_forward.w1",
            "mlp.up_proj": "feed_forward.w3",
            "mlp.down_proj": "feed_forward.w2",
            "input_layernorm": "attention_norm",
            "post_attention_layernorm": "ffn_norm",
        }.items():
            for kind in ("weight", "bias"):
                if f"{layer}{theirs}.{kind}" in tensors:
                    renamed[f"{layer}{ours}.{kind}"] = tensors[f"{layer}{theirs}.{kind}"]
        for kind in ("weight", "bias"):
            if f"{layer}self_attn.q_proj.{kind}" in tensors:
                q, k, v = (tensors[f"{layer}self_attn.{x}_proj.{kind}"] for x in "qkv")
                heads = [x.reshape(-1, n * head_dim, *x.shape[1:]) for x, n in ((q, group), (k, 1), (v, 1))]
                renamed[f"{layer}attention.wqkv.{kind}"] = torch.cat(heads, dim=1).flatten(0, 1)
    return renamed


def baichuan(tensors: Tensors) -> Tensors:
    """Queries, keys and values are one matrix."""
    renamed = {name: value for name, value in tensors.items() if not name.endswith(tuple(f"{x}_proj.weight" for x in "qkv"))}
    for i in range(LLAMA_LIKE["num_hidden_layers"]):
        attention = f"model.layers.{i}.self_attn."
        renamed[f"{attention}W_pack.weight"] = torch.cat([tensors[f"{attention}{x}_proj.weight"] for x in "qkv"])
    return renamed


def compute_alibi(model: Any, prompt: torch.Tensor) -> dict[str, np.ndarray]:
    """As `compute`, with ALiBi instead of the rotary embedding: every token is at position 0. Nothing is cached."""
    heads = model.config.num_attention_heads
    slopes = torch.tensor([2.0 ** (-8.0 * (i + 1) / heads) for i in range(heads)])[:, None, None]  # for powers of two
    tokens = prompt
    for _ in range(NUM_GREEDY + 1):
        places = torch.arange(len(tokens))
        distance = (places[None, :] - places[:, None]).float()  # [query, key]
        mask = torch.where(distance <= 0.0, slopes * distance, torch.finfo(torch.float32).min)
        with torch.no_grad():
            out = model(
                tokens[None], attention_mask=mask[None], position_ids=torch.zeros_like(tokens)[None], use_cache=False
            )
        logits = out.logits[0]
        tokens = torch.cat([tokens, logits[-1:].argmax(-1)])
    return {"token_ids": tokens[:-1].numpy(), "logits": logits.numpy()}


def unchanged(tensors: Tensors) -> Tensors:
    return tensors


# family -> variant -> (model_type of transformers, fields of its config, fields of the family's config, its tensors)
Variant = tuple[str, dict[str, Any], dict[str, Any], Callable[[Tensors], Tensors]]
FAMILIES: dict[str, dict[str, Variant]] = {
    "baichuan": {
        "7b": (
            "llama",
            {**LLAMA_LIKE, "num_key_value_heads": 4},
            {"num_key_value_heads": None, "model_max_length": 128},
            baichuan,
        ),
        "13b": (
            "llama",
            {**LLAMA_LIKE, "num_key_value_heads": 4},
            {"num_key_value_heads": None, "model_max_length": 128, "max_position_embeddings": None},
            baichuan,
        ),
    },
    "internlm2": {
        "default": ("llama", LLAMA_LIKE, {"bias": False, "rope_theta": 10000.0}, internlm2),
        "bias_dynamic": (
            "llama",
            LLAMA_LIKE | rope(rope_type="dynamic", factor=2.0) | {"max_position_embeddings": 32, "attention_bias": True},
            {"bias": True, **DYNAMIC},
            internlm2,
        ),
    },
    "internlm3": {
        "default": (
            "seed_oss",
            {**LLAMA_LIKE, "head_dim": 12, "attention_bias": True, **rope(rope_type="default")},
            {"qkv_bias": True, "bias": False, "head_dim": 12, "rope_theta": 10000.0},
            unchanged,
        ),
        "bias_dynamic": (
            "llama",
            LLAMA_LIKE
            | rope(rope_type="dynamic", factor=2.0)
            | {"max_position_embeddings": 32, "attention_bias": True, "mlp_bias": True},
            {"qkv_bias": True, "bias": True, "head_dim": 8}
            | DYNAMIC
            | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            unchanged,
        ),
    },
    "minicpm": {
        "default": (
            "granite",
            {
                **LLAMA_LIKE,
                "tie_word_embeddings": True,
                "embedding_multiplier": MINICPM["scale_emb"],
                "residual_multiplier": MINICPM["scale_depth"] / math.sqrt(LLAMA_LIKE["num_hidden_layers"]),
                "logits_scaling": LLAMA_LIKE["hidden_size"] / MINICPM["dim_model_base"],
                "attention_multiplier": 8**-0.5,
                "rms_norm_eps": 1e-5,
            },
            {**MINICPM, "tie_word_embeddings": True, "rms_norm_eps": 1e-5},
            unchanged,
        ),
    },
}
NAMES = {
    "baichuan": {"architectures": ["BaichuanForCausalLM"], "model_type": "baichuan", "rms_norm_eps": 1e-6},
    "internlm2": {"architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2", "rms_norm_eps": 1e-6},
    "internlm3": {"architectures": ["InternLM3ForCausalLM"], "model_type": "internlm3", "rms_norm_eps": 1e-6},
    "minicpm": {"architectures": ["MiniCPMForCausalLM"], "model_type": "minicpm"},
}


def main() -> None:
    """Writes the variants of the families named on the command line, or of all families."""
    home = Path(__file__).parent / "families"
    for family in sys.argv[1:] or FAMILIES:
        for variant, (model_type, fields, own_fields, renamed) in FAMILIES[family].items():
            folder = home / family / variant
            if folder.exists():
                continue
            folder.mkdir(parents=True)
            torch.manual_seed(0)
            config = AutoConfig.for_model(model_type, **fields)
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
            randomise(model)
            has_alibi = own_fields.get("max_position_embeddings", True) is None
            run = compute_alibi if has_alibi else compute
            expected = run(model, torch.randint(3, config.vocab_size, (PROMPT_LENGTH,)))
            np.savez_compressed(folder / "expected.npz", **expected)
            tensors = {name: value.bfloat16().contiguous() for name, value in renamed(model.state_dict()).items()}
            if fields["tie_word_embeddings"]:
                tensors.pop("lm_head.weight")
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
            said = {"hidden_act": "silu", **LLAMA_LIKE, **NAMES[family], **own_fields}
            said = {name: value for name, value in said.items() if value is not None}
            (folder / "config.json").write_text(json.dumps(said, indent=2, sort_keys=True) + "\n")
            logits = expected["logits"]
            print(f"{family}/{variant}: logits in [{logits.min():.1f}, {logits.max():.1f}]", flush=True)


if __name__ == "__main__":
    main()
