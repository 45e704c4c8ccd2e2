"""What tunix writes when it saves a model with merged adapters: safetensors, read like any other checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip(
    "tunix", reason="google-tunix is not installed; make tunix-check runs these tests in an environment with it"
)

import qwix
from flax import nnx
from safetensors.numpy import load_file, save_file
from tunix.models.gemma3 import model as gemma3
from tunix.models.gemma3 import params as gemma3_params
from tunix.models.gemma3 import params_safetensors as gemma3_safetensors
from tunix.models.qwen3 import model as qwen3
from tunix.models.qwen3 import params as qwen3_params

from fastgen_jax.checkpoint import load_params, open_checkpoint
from tests.models.parity import Runs, folder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),  # of tunix and its libraries
]

RANK, ALPHA = 4, 8.0
# What tunix assumes of every checkpoint of these families, whatever its config says.
CHANGES = {
    "qwen3": {"rope_parameters": {"rope_theta": 1_000_000.0, "rope_type": "default"}},
    "gemma3": {"query_pre_attn_scalar": 12, "layer_types": ["sliding_attention"] * 4},
}
TARGETS = {
    "qwen3": ".*q_proj|.*k_proj|.*v_proj|.*o_proj|.*gate_proj|.*up_proj|.*down_proj",
    "gemma3": ".*q_einsum|.*kv_einsum|.*attn_vec_einsum|.*gate_proj|.*up_proj|.*down_proj",
}


def base_of(family: str, out: Path) -> dict:
    """Writes a tiny checkpoint of transformers in float32, as tunix will read it; returns its config."""
    source = folder(family, "default")
    config = json.loads((source / "config.json").read_text()) | CHANGES[family] | {"dtype": "float32"}
    out.mkdir()
    (out / "config.json").write_text(json.dumps(config))
    tensors = load_file(source / "model.safetensors")
    save_file({name: x.astype(np.float32) for name, x in tensors.items()}, out / "model.safetensors")
    return config


def model_of(family: str, place: Path, config: dict) -> nnx.Module:
    sizes = {
        "num_layers": config["num_hidden_layers"],
        "embed_dim": config["hidden_size"],
        "hidden_dim": config["intermediate_size"],
        "num_heads": config["num_attention_heads"],
        "num_kv_heads": config["num_key_value_heads"],
        "head_dim": config["head_dim"],
    }
    if family == "qwen3":
        sizes |= {"vocab_size": config["vocab_size"], "rope_theta": 1_000_000, "norm_eps": config["rms_norm_eps"]}
        own = qwen3.ModelConfig(**sizes)
        return qwen3_params.create_model_from_safe_tensors(str(place), own, dtype=jnp.float32)
    own = gemma3.ModelConfig(
        **sizes,
        num_embed=config["vocab_size"],
        sliding_window_size=config["sliding_window"],
        global_base_frequency=1_000_000,
        param_dtype=jnp.float32,
    )
    return gemma3_safetensors.create_model_from_safe_tensors(str(place), own, dtype=jnp.float32)


def logits_of(model: nnx.Module, tokens: np.ndarray) -> np.ndarray:
    count = len(tokens)
    mask = jnp.tril(jnp.ones((1, count, count), bool))
    found, _ = model(jnp.asarray(tokens[None]), jnp.arange(count)[None], None, mask)
    return np.asarray(found)[0]


@pytest.mark.parametrize("family", TARGETS)
def test_logits_of_merged_adapters_are_those_of_tunix(family, tmp_path) -> None:
    config = base_of(family, tmp_path / "base")
    tokens = np.random.default_rng(0).integers(3, config["vocab_size"], 24)  # more than a window
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        base = model_of(family, tmp_path / "base", config)
        unchanged = logits_of(base, tokens)
        inputs = (jnp.zeros((1, 8), jnp.int32), jnp.arange(8)[None], None, jnp.ones((1, 8, 8), bool))
        provider = qwix.LoraProvider(module_path=TARGETS[family], rank=RANK, alpha=ALPHA)
        model = qwix.apply_lora_to_model(base, provider, *inputs, rngs=nnx.Rngs(0))
        rng = np.random.default_rng(1)
        adapters = nnx.state(model, nnx.LoRAParam)
        nnx.update(model, jax.tree.map(lambda x: jnp.asarray(0.1 * rng.standard_normal(x.shape), x.dtype), adapters))
        expected = logits_of(model, tokens)
        save = qwen3_params if family == "qwen3" else gemma3_params
        save.save_lora_merged_model_as_safetensors(
            str(tmp_path / "base"), str(tmp_path / "merged"), model, rank=RANK, alpha=ALPHA
        )
    assert np.abs(expected - unchanged).max() > 0.1
    checkpoint = open_checkpoint(tmp_path / "merged")
    runs = Runs(load_params(checkpoint, dtype="float32"), checkpoint.config, len(tokens))
    logits = runs.logits(tokens, [len(tokens)], prompt_length=len(tokens))
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=3e-4)
