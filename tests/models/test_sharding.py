"""A step divided over devices gives the logits of a step on one."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.moe_config import MoEConfig
from fastgen_jax.models.sharding import check_divisible

TINY = ModelConfig(
    family="llama",
    vocab_size=64,
    num_layers=2,
    embed_dim=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=48,
    max_context_len=64,
)
EXPERTS = dataclasses.replace(
    TINY,
    moe=MoEConfig(
        num_experts=4,
        experts_per_token=2,
        expert_dim=24,
        layers=(0, 1),
        shared_dim=16,
        shared_gate=True,
        expert_bias=True,
        swiglu_limit=3.0,
    ),
)

PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, Mesh
from fastgen_jax.core import KVCache, RaggedBatch
from fastgen_jax.models.decoder import forward
from fastgen_jax.models.params import init_params
from fastgen_jax.models.params import param_specs
from fastgen_jax.models.sharding import (TENSOR, divide_leaf, partition_kv_cache, partition_params,
                                         shardings)
from fastgen_jax.plan.program import count_in_loops
from pallas_kernels.ragged_attention import RaggedIndex
from tests.models.test_sharding import EXPERTS, TINY

def cache():
    return KVCache.zeros(num_layers=TINY.num_layers, num_blocks=8, num_kv_heads=TINY.num_kv_heads, block_size=4,
                         head_dim=TINY.head_dim, dtype=jnp.float32)
def i32(*values): return jnp.asarray(values, jnp.int32)
batch = RaggedBatch(
    token_ids=i32(5, 6, 7, 8, 9, 10, 0, 0), token_slots=i32(*[9] * 8), positions=i32(0, 1, 2, 3, 4, 0, 0, 0),
    rope_lengths=i32(5, 5, 5, 5, 5, 1, 0, 0), sample_rows=i32(4, 5),
    num_sample_rows=jnp.int32(2),
    index=RaggedIndex(kv_slots=i32(4, 5, 6, 7, 12, 20, 99, 99), query_starts=i32(0, 5, 6), context_lens=i32(5, 1),
                      block_tables=i32(1, 3, 5, 0).reshape(2, 2)))
mesh = Mesh(np.array(jax.devices()), (TENSOR,), axis_types=(AxisType.Auto,))
for config, name in ((TINY, "xla"), (EXPERTS, None)):
    params = init_params(config, jax.random.key(0))
    # Biases start as zeros, which could be added any number of times.
    params = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(1), leaf.shape), params)
    whole, cache_whole = jax.jit(lambda p, c: forward(p, c, batch, config=config, attention=name))(params, cache())
    p = jax.tree.map(lambda spec, leaf: divide_leaf(spec, leaf, mesh), param_specs(config), params)
    assert jax.tree.map(lambda x: x.sharding, p) == shardings(mesh, partition_params(config, params))
    c = jax.device_put(cache(), shardings(mesh, partition_kv_cache(cache())))
    assert p["layers"]["qkv"].addressable_shards[0].data.size * 2 == p["layers"]["qkv"].size
    step = jax.jit(lambda p, c: forward(p, c, batch, config=config, attention=name, mesh=mesh)).lower(p, c).compile()
    assert count_in_loops(step.as_text()) == 2, "a sum behind attention and one behind the MLP or the experts"
    divided, cache_divided = step(p, c)
    assert cache_divided.k.sharding.spec[1] == TENSOR
    np.testing.assert_allclose(divided, whole, atol=2e-5)
    np.testing.assert_allclose(cache_divided.k, cache_whole.k, atol=2e-5)
print("equal")
"""


def test_a_step_divided_over_two_devices_gives_the_same_logits() -> None:
    # A process of its own: the number of devices is fixed when JAX starts.
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.stdout.strip().endswith("equal"), done.stderr


def test_a_model_that_cannot_be_divided_is_refused_with_what_works() -> None:
    with pytest.raises(ValueError, match=r"num_kv_heads=2 cannot be divided over 4 devices; choose .* among 1, 2"):
        check_divisible(TINY, 4)
