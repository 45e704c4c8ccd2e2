"""Checkpoints that MaxText itself has written: its logits are ours. `make maxtext-check` runs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip(
    "maxtext", reason="MaxText is not installed; make maxtext-check runs these tests in an environment with it"
)

import flax.linen as nn
import maxtext
from flax import nnx
from maxtext.common import checkpointing
from maxtext.configs import pyconfig
from maxtext.utils import maxtext_utils, model_creation_utils

from fastgen_jax.checkpoint import load_params, open_maxtext
from tests.models.parity import Runs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),  # of MaxText and what it imports
]

VOCAB, EMBED, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, LAYERS, TOKENS = 64, 32, 48, 4, 2, 8, 2, 32
# What a family of MaxText has beyond the sizes above, and the same for transformers.
FAMILIES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "llama": (
        ["decoder_block=llama2", "rope_max_timescale=10000", "logits_via_embedding=false"],
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False},
    ),
    "qwen3": (
        [
            "decoder_block=qwen3",
            "rope_max_timescale=10000",
            "use_qk_norm=true",
            "logits_via_embedding=true",
            "normalize_embedding_logits=false",
        ],
        {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True},
    ),
}


def config_of(family: str, out: Path, *, scan: bool) -> Any:
    base = Path(maxtext.__file__).parent / "configs" / "base.yml"
    fields = [
        "run_name=tiny",
        f"base_output_directory={out}",
        "enable_checkpointing=false",
        "skip_jax_distributed_system=true",
        "hardware=cpu",
        f"base_emb_dim={EMBED}",
        f"base_num_query_heads={HEADS}",
        f"base_num_kv_heads={KV_HEADS}",
        f"base_num_decoder_layers={LAYERS}",
        f"base_mlp_dim={HIDDEN}",
        f"head_dim={HEAD_DIM}",
        f"vocab_size={VOCAB}",
        "mlp_activations=['silu','linear']",
        "enable_dropout=false",
        "normalization_layer_epsilon=1e-6",
        f"scan_layers={scan}",
        "dtype=float32",
        "weight_dtype=float32",
        "matmul_precision=highest",
        "attention=dot_product",
        f"max_target_length={TOKENS}",
        "per_device_batch_size=1",
    ]
    return pyconfig.initialize(["", str(base), *fields, *FAMILIES[family][0]])


def base_of(family: str, out: Path) -> Path:
    """The directory of a config.json of the same model."""
    config = {
        "vocab_size": VOCAB,
        "hidden_size": EMBED,
        "intermediate_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "num_hidden_layers": LAYERS,
        "hidden_act": "silu",
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
    }
    out.mkdir()
    (out / "config.json").write_text(json.dumps(config | FAMILIES[family][1]))
    return out


def rounded(params: Any) -> Any:
    """Weights as if they were stored in bfloat16: MaxText's head multiplies with a tied embedding in that format."""
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(x.dtype), params)


@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unscanned"])
@pytest.mark.parametrize("modules", ["linen", "nnx"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_maxtext(family, modules, scan, tmp_path) -> None:
    tokens = np.random.default_rng(0).integers(3, VOCAB, TOKENS)
    inputs = [jnp.asarray(tokens[None], jnp.int32), jnp.arange(TOKENS, dtype=jnp.int32)[None]]
    options = {"decoder_segment_ids": jnp.ones((1, TOKENS), jnp.int32), "enable_dropout": False}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        config = config_of(family, tmp_path / "run", scan=scan)
        mesh = maxtext_utils.get_mesh_from_config(config)
        with mesh:
            if modules == "linen":
                model = model_creation_utils.from_config(config, mesh=mesh)
                keys = dict(zip(("params", "dropout", "aqt"), jax.random.split(jax.random.key(0), 3), strict=True))
                variables = rounded(nn.unbox(model.init(keys, *inputs, **options)))
                logits = model.apply(variables, *inputs, **options)
                params = {"params": variables["params"]}
            else:
                model = model_creation_utils.from_config(config, mesh=mesh, rngs=nnx.Rngs(params=0, dropout=1))
                nnx.update(model, rounded(nnx.state(model, nnx.Param)))
                logits = model(*inputs, **options)
                params = nnx.state(model, nnx.Param).to_pure_dict()
        checkpointing.save_params_to_path(str(tmp_path / "saved"), params)
    expected = np.asarray(logits[0] if isinstance(logits, tuple) else logits)[0]
    checkpoint = open_maxtext(tmp_path / "saved", base_of(family, tmp_path / "base"))
    runs = Runs(load_params(checkpoint, dtype="float32"), checkpoint.config, TOKENS)
    got = runs.logits(tokens, [TOKENS], prompt_length=TOKENS)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
