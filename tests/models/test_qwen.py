"""Qwen 1, which transformers lacks: equal to Qwen2 up to seq_length, and to its published code beyond."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from safetensors.numpy import save_file

from fastgen_jax.checkpoint import load_params, open_checkpoint
from fastgen_jax.models.families import FAMILIES
from tests.models.parity import Runs, error, expected, folder, random_cut

HEADS, HEAD_DIM, LAYERS, EPS, THETA = 4, 8, 2, 1e-6, 10000.0
CONFIG = {
    "architectures": ["QWenLMHeadModel"],
    "attn_dropout_prob": 0.0,
    "bf16": True,
    "emb_dropout_prob": 0.0,
    "fp16": False,
    "fp32": False,
    "hidden_size": 32,
    "intermediate_size": 80,
    "initializer_range": 0.02,
    "kv_channels": HEAD_DIM,
    "layer_norm_epsilon": EPS,
    "max_position_embeddings": 256,
    "model_type": "qwen",
    "no_bias": True,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "onnx_safe": None,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "seq_length": 128,
    "tie_word_embeddings": False,
    "tokenizer_class": "QWenTokenizer",
    "use_cache": True,
    "use_dynamic_ntk": True,
    "use_flash_attn": "auto",
    "use_logn_attn": True,
    "vocab_size": 64,
}


def renamed() -> dict[str, np.ndarray]:
    """The tensors of the multi-head Qwen2 under the names of Qwen 1, in float32."""
    checkpoint = open_checkpoint(folder("qwen2", "multi_head"))
    made = {}
    for name in checkpoint.tensor_names:
        made[name] = np.asarray(checkpoint.read(name)).astype(np.float32)
    tensors = {
        "transformer.wte.weight": made["model.embed_tokens.weight"],
        "lm_head.weight": made["lm_head.weight"],
        "transformer.ln_f.weight": made["model.norm.weight"],
    }
    for i in range(LAYERS):
        old, new = f"model.layers.{i}", f"transformer.h.{i}"
        for kind in ("weight", "bias"):
            parts = [made[f"{old}.self_attn.{x}_proj.{kind}"] for x in "qkv"]
            tensors[f"{new}.attn.c_attn.{kind}"] = np.concatenate(parts)
        for theirs, ours in {
            "self_attn.o_proj": "attn.c_proj",
            "mlp.up_proj": "mlp.w1",
            "mlp.gate_proj": "mlp.w2",
            "mlp.down_proj": "mlp.c_proj",
            "input_layernorm": "ln_1",
            "post_attention_layernorm": "ln_2",
        }.items():
            tensors[f"{new}.{ours}.weight"] = made[f"{old}.{theirs}.weight"]
    return tensors


def run(path, tensors, tokens, sizes, **changes) -> np.ndarray:
    (path / "config.json").write_text(json.dumps(CONFIG | changes))
    save_file(tensors, path / "model.safetensors")
    checkpoint = open_checkpoint(path)
    params = load_params(checkpoint, dtype="float32", stack_layers=False)
    return Runs(params, checkpoint.config, len(tokens)).logits(tokens, sizes, prompt_length=len(tokens))


def oracle(tensors, tokens, *, seq_length) -> np.ndarray:
    """Logits in float64 of a whole prompt, after the formulas of the published modeling_qwen.py."""
    w = {name.removeprefix("transformer."): value.astype(np.float64) for name, value in tensors.items()}
    length = len(tokens)
    alpha = max(2 ** math.ceil(math.log2(length / seq_length) + 1) - 1, 1)
    base = THETA * alpha ** (HEAD_DIM / (HEAD_DIM - 2))
    angle = np.outer(np.arange(length), base ** -(np.arange(0, HEAD_DIM, 2) / HEAD_DIM))[:, None, :]  # [P, 1, D/2]
    growth = np.array([math.log(i, seq_length) if i > seq_length else 1.0 for i in range(1, length + 1)])

    def rms(x, weight):
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + EPS) * weight

    def turn(x):
        first, second = np.split(x, 2, axis=-1)
        return np.concatenate(
            [first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)], axis=-1
        )

    x = w["wte.weight"][tokens]
    for i in range(LAYERS):
        h = rms(x, w[f"h.{i}.ln_1.weight"])
        qkv = h @ w[f"h.{i}.attn.c_attn.weight"].T + w[f"h.{i}.attn.c_attn.bias"]
        q, k, v = (part.reshape(length, HEADS, HEAD_DIM) for part in np.split(qkv, 3, axis=-1))
        q, k = turn(q) * growth[:, None, None], turn(k)
        scores = np.einsum("qhd,khd->hqk", q, k) / math.sqrt(HEAD_DIM)
        scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        x = x + np.einsum("hqk,khd->qhd", weights, v).reshape(length, -1) @ w[f"h.{i}.attn.c_proj.weight"].T
        h = rms(x, w[f"h.{i}.ln_2.weight"])
        gate = h @ w[f"h.{i}.mlp.w2.weight"].T
        x = x + (h @ w[f"h.{i}.mlp.w1.weight"].T * (gate / (1 + np.exp(-gate)))) @ w[f"h.{i}.mlp.c_proj.weight"].T
    return rms(x, w["ln_f.weight"]) @ w["lm_head.weight"].T


def test_within_its_trained_length_it_is_a_renamed_qwen2(tmp_path):
    tokens, want, _ = expected("qwen2", "multi_head")
    for sizes in ([len(tokens)], random_cut(len(tokens), seed=0)):
        assert error(run(tmp_path, renamed(), tokens, sizes), want) < 1e-4


@pytest.mark.parametrize("seq_length", [16, 30, 35, 60])  # of 70 tokens: 4.4, 2.3, exactly 2 and 1.2 times as long
def test_beyond_its_trained_length_queries_and_rotary_base_grow(tmp_path, seq_length):
    tokens, without, _ = expected("qwen2", "multi_head")
    want = oracle(renamed(), tokens, seq_length=seq_length)
    assert error(want, without) > 1e-2, "the scaling must matter for the test to mean anything"
    got = run(tmp_path, renamed(), tokens, random_cut(len(tokens), seed=seq_length), seq_length=seq_length)
    assert error(got, want) < 1e-4


def test_the_oracle_is_qwen2_where_nothing_is_scaled():
    tokens, want, _ = expected("qwen2", "multi_head")
    assert error(oracle(renamed(), tokens, seq_length=128), want) < 1e-4


def test_its_config_is_read_and_refused_like_the_others():
    read = FAMILIES["qwen"].config_from_hf
    assert read(CONFIG).max_context_len == 256
    assert read(CONFIG | {"use_dynamic_ntk": False}).max_context_len == 128
    assert read(CONFIG | {"use_logn_attn": False}).logn_length is None
    with pytest.raises(ValueError, match="no_bias=False"):
        read(CONFIG | {"no_bias": False})
