"""A step divided over devices of this process against the same step on one; prints "equal" at the end.

Its arguments are names of models in `test_sharding.MODELS`; each is divided over the number of devices given there.

The number of devices is fixed when JAX starts: XLA_FLAGS=--xla_force_host_platform_device_count=4
"""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np

from fastgen_jax.core import KVCache, RaggedBatch
from fastgen_jax.models.cache import empty_cache
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.decoder import Execution, forward
from fastgen_jax.models.division import divided, divided_heads
from fastgen_jax.models.params import init_params, param_specs
from fastgen_jax.models.sharding import TENSOR, divide_leaf, partition_kv_cache, partition_params, shardings, tensor_mesh
from fastgen_jax.plan.hlo import count_in_loops, sums_of_floats
from pallas_kernels.ragged_attention import RaggedIndex
from tests.models.test_sharding import MODELS
from tests.tiny import random_params


def zeros(config: ModelConfig) -> KVCache:
    return empty_cache(
        config,
        num_rows=len(config.kv_layers),
        num_blocks=8,
        block_size=4,
        num_slots=3,
        dtype=jnp.float32,
        platform="cpu",
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
    slots=i32(2, 0),
)


def check(config: ModelConfig, num_devices: int, attention: str | None) -> None:
    mesh = tensor_mesh(jax.devices()[:num_devices])
    wide = divided(config, num_devices)
    params = random_params(config)  # not `init_params`: its biases are zeros, which could be added any number of times

    def step(params, cache, mesh=None, sums_in_order=False):
        execution = Execution(attention=attention, mesh=mesh, sums_in_order=sums_in_order)
        return forward(params, cache, BATCH, config=config, execution=execution)

    whole, cache_whole = jax.jit(step)(params, zeros(config))
    shares = jax.tree.map(lambda spec, leaf: divide_leaf(spec, leaf, mesh, config), param_specs(config), params)
    assert jax.tree.map(lambda x: x.sharding, shares) == shardings(mesh, partition_params(config, params))
    shapes = jax.eval_shape(lambda: init_params(wide, jax.random.key(0)))
    assert jax.tree.map(lambda x: x.shape, shares) == jax.tree.map(lambda x: x.shape, shapes)
    cache = jax.device_put(zeros(wide), shardings(mesh, partition_kv_cache(zeros(wide))))
    o = shares["layers"]["o"]
    assert o.addressable_shards[0].data.size * num_devices == o.size
    program = jax.jit(lambda params, cache: step(params, cache, mesh)).lower(shares, cache).compile()
    if (
        config.qk_norm is None and config.state is None
    ):  # a norm over all heads needs sums of its own, and native kernels are not divided
        assert count_in_loops(program.as_text() or "") == 2, "a sum behind attention and one behind the MLP or the experts"
    logits, cache = program(shares, cache)
    assert cache.k.sharding.spec[1] == TENSOR
    np.testing.assert_allclose(logits, whole, atol=2e-5)
    heads = divided_heads(config.num_heads, config.num_kv_heads, num_devices).kv
    for place, head in enumerate(heads):
        kept = 0 if head is None else cache_whole.k[:, head]
        np.testing.assert_allclose(cache.k[:, place], kept, atol=2e-5)
    cache = jax.device_put(zeros(wide), shardings(mesh, partition_kv_cache(zeros(wide))))
    ordered = jax.jit(lambda params, cache: step(params, cache, mesh, sums_in_order=True)).lower(shares, cache).compile()
    np.testing.assert_allclose(ordered(shares, cache)[0], whole, atol=2e-5)
    assert sums_of_floats(program.as_text() or ""), "the check cannot fail"
    assert not (found := sums_of_floats(ordered.as_text() or "")), found


assert jax.device_count() == 4
for model in sys.argv[1:]:
    check(*MODELS[model])
print("equal")
