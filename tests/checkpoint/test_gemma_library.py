"""Checkpoints that the gemma library itself has written: its logits are ours. `make gemma-check` runs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip(
    "gemma", reason="the gemma library is not installed; make gemma-check runs these tests in an environment with it"
)

import optax
from gemma import gm
from gemma.gm.ckpts import _checkpoint as layouts
from kauldron import kd

from fastgen_jax.checkpoint import load_params, open_gemma
from tests.models.parity import Runs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),  # of the library and what it imports
]

VOCAB, EMBED, HIDDEN, HEADS, HEAD_DIM, WINDOW, SOFTCAP = 64, 32, 48, 4, 16, 8, 5.0
LOCAL, GLOBAL = gm.nn.AttentionType.LOCAL_SLIDING, gm.nn.AttentionType.GLOBAL
# What a model of the library has beyond the sizes above, and the same for transformers.
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gemma": (
        {"attention_types": (GLOBAL,) * 3, "use_post_attn_norm": False, "use_post_ffw_norm": False},
        {"model_type": "gemma", "architectures": ["GemmaForCausalLM"]},
    ),
    "gemma2": (
        {
            "attention_types": (LOCAL, GLOBAL) * 2,
            "final_logit_softcap": SOFTCAP,
            "attn_logits_soft_cap": SOFTCAP,
            "sliding_window_size": WINDOW,
        },
        {
            "model_type": "gemma2",
            "architectures": ["Gemma2ForCausalLM"],
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "final_logit_softcapping": SOFTCAP,
            "attn_logit_softcapping": SOFTCAP,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": HEAD_DIM,
        },
    ),
    "gemma3": (
        {
            "attention_types": ((LOCAL,) * 5 + (GLOBAL,)) * 2,
            "use_qk_norm": True,
            "sliding_window_size": WINDOW,
            "transpose_gating_einsum": True,
            "global_base_frequency": 1_000_000,
        },
        {
            "model_type": "gemma3_text",
            "architectures": ["Gemma3ForCausalLM"],
            "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 2,
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": HEAD_DIM,
        },
    ),
}


def model_of(family: str, kv_heads: int) -> gm.nn.Transformer:
    defaults = {"final_logit_softcap": None, "use_post_attn_norm": True, "use_post_ffw_norm": True}
    config = gm.nn.config.TransformerConfig(
        num_embed=VOCAB,
        embed_dim=EMBED,
        hidden_dim=HIDDEN,
        num_heads=HEADS,
        head_dim=HEAD_DIM,
        num_kv_heads=kv_heads,
        **(defaults | MODELS[family][0]),
    )
    return gm.nn.Transformer(config=config, dtype=jnp.float32, tokens="batch.tokens")


def base_of(family: str, kv_heads: int, out: Path) -> Path:
    """The directory of a config.json of the same model."""
    fields = MODELS[family][1]
    config = {
        "vocab_size": VOCAB,
        "hidden_size": EMBED,
        "intermediate_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": kv_heads,
        "head_dim": HEAD_DIM,
        "num_hidden_layers": len(MODELS[family][0]["attention_types"]),
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": True,
    }
    out.mkdir()
    (out / "config.json").write_text(json.dumps(config | fields))
    return out


def save(params: Any, layout: str, pattern: int, out: Path) -> None:
    """Writes a checkpoint as the library and its trainer do."""
    if layout == "kauldron":
        state = kd.train.TrainState(
            step=np.asarray(3),
            params=params,
            collections={},
            opt_state=optax.adam(1e-3).init(params),
        )
        checkpointer = kd.ckpts.Checkpointer(workdir=out, save_interval_steps=1)
        checkpointer.save(state, step=3)
        checkpointer.wait_until_finished()
        return
    if layout == "flat":
        params = layouts._nested_to_flat(params)
    if layout == "stacked":
        params = layouts._nested_to_stacked(params, pattern)
    gm.ckpts.save_params(params, out, wait_until_finished=True)


@pytest.mark.parametrize("layout", ["nested", "flat", "stacked", "kauldron"])
@pytest.mark.parametrize(("family", "kv_heads"), [("gemma", 4), ("gemma2", 2), ("gemma3", 2)])
def test_logits_are_those_of_the_library(family, kv_heads, layout, tmp_path):
    model = model_of(family, kv_heads)
    tokens = np.random.default_rng(0).integers(3, VOCAB, 30)
    with jax.numpy_dtype_promotion("standard"):
        params = model.init(jax.random.key(0), jnp.asarray(tokens))["params"]
        # Norms begin with zeros, which would hide their offset.
        noise = np.random.default_rng(1)
        params = jax.tree.map(lambda x: x + 0.1 * jnp.asarray(noise.standard_normal(x.shape), x.dtype), params)
        expected = np.asarray(model.apply({"params": params}, jnp.asarray(tokens)).logits)
        save(params, layout, model.config.attention_types.index(GLOBAL) + 1, tmp_path / "saved")
    checkpoint = open_gemma(tmp_path / "saved", base_of(family, kv_heads, tmp_path / "base"))
    runs = Runs(load_params(checkpoint, dtype="float32"), checkpoint.config, len(tokens))
    logits = runs.logits(tokens, [len(tokens)], prompt_length=len(tokens))
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
