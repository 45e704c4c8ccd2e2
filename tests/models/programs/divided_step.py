"""A step divided over the two devices of this process against the same step on one device; prints "equal" at the end.

Its argument is the model, "dense" or "experts".

The number of devices is fixed when JAX starts: XLA_FLAGS=--xla_force_host_platform_device_count=2
"""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np

from fastgen_jax.core import KVCache, RaggedBatch
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.decoder import Execution, forward
from fastgen_jax.models.params import param_specs
from fastgen_jax.models.sharding import TENSOR, divide_leaf, partition_kv_cache, partition_params, shardings, tensor_mesh
from fastgen_jax.plan.program import count_in_loops
from pallas_kernels.ragged_attention import RaggedIndex
from tests.models.test_sharding import EXPERTS, TINY
from tests.tiny import random_params


def zeros() -> KVCache:
    return KVCache.zeros(
        num_layers=TINY.num_layers,
        num_blocks=8,
        num_kv_heads=TINY.num_kv_heads,
        block_size=4,
        head_dim=TINY.head_dim,
        dtype=jnp.float32,
    )


def i32(*values: int) -> jax.Array:
    return jnp.asarray(values, jnp.int32)


BATCH = RaggedBatch(
    token_ids=i32(5, 6, 7, 8, 9, 10, 0, 0),
    token_slots=i32(*[9] * 8),
    positions=i32(0, 1, 2, 3, 4, 0, 0, 0),
    rope_lengths=i32(5, 5, 5, 5, 5, 1, 0, 0),
    index=RaggedIndex(
        kv_slots=i32(4, 5, 6, 7, 12, 20, 99, 99),
        query_starts=i32(0, 5, 6),
        context_lens=i32(5, 1),
        block_tables=i32(1, 3, 5, 0).reshape(2, 2),
    ),
    sample_rows=i32(4, 5),
    num_sample_rows=jnp.int32(2),
)


def check(config: ModelConfig, attention: str | None) -> None:
    mesh = tensor_mesh(jax.devices())
    params = random_params(config)  # not `init_params`: its biases are zeros, which could be added any number of times

    def step(params, cache, mesh=None):
        return forward(params, cache, BATCH, config=config, execution=Execution(attention=attention, mesh=mesh))

    whole, cache_whole = jax.jit(step)(params, zeros())
    divided = jax.tree.map(lambda spec, leaf: divide_leaf(spec, leaf, mesh), param_specs(config), params)
    assert jax.tree.map(lambda x: x.sharding, divided) == shardings(mesh, partition_params(config, params))
    cache = jax.device_put(zeros(), shardings(mesh, partition_kv_cache(zeros())))
    qkv = divided["layers"]["qkv"]
    assert qkv.addressable_shards[0].data.size * 2 == qkv.size
    program = jax.jit(lambda params, cache: step(params, cache, mesh)).lower(divided, cache).compile()
    assert count_in_loops(program.as_text()) == 2, "a sum behind attention and one behind the MLP or the experts"
    logits, cache = program(divided, cache)
    assert cache.k.sharding.spec[1] == TENSOR
    np.testing.assert_allclose(logits, whole, atol=2e-5)
    np.testing.assert_allclose(cache.k, cache_whole.k, atol=2e-5)


assert jax.device_count() == 2
check(*{"dense": (TINY, "xla"), "experts": (EXPERTS, None)}[sys.argv[1]])
print("equal")
