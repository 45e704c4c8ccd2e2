"""The TPU kernel equals the reference in the Pallas TPU interpreter, and compiles if the TPU compiler is installed.

Copies run in two modes: "eager", in which the race detector sees every access, and "on_wait", in which data arrives only
when the kernel waits for it.
"""

from __future__ import annotations

import importlib.util
import os
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.grouped_matmul import grouped_matmul, prepare
from pallas_kernels.grouped_matmul.reference import grouped_matmul_reference
from pallas_kernels.grouped_matmul.tpu import grouped_matmul_tpu
from pallas_kernels.matmul import tpu_support
from tests.pallas_kernels.races import races_found

_SIZES = [[3, 0, 20, 1], [0, 0, 0, 0], [0, 40, 0, 0], [10, 6, 16, 8]]


def _normal(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@pytest.mark.parametrize(
    ("storage", "mode", "tile_rows"),
    [
        ("float32", "eager", 16),
        ("int8", "on_wait", None),
        pytest.param("bfloat16", "eager", 32, marks=pytest.mark.slow),
        pytest.param("int8", "eager", 16, marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("fast_compilation")
def test_the_kernel_equals_the_reference_in_the_interpreter(storage: str, mode: str, tile_rows: int | None):
    # Numbers of rows, of inputs and of columns that are no multiples of a tile.
    dtype = jnp.bfloat16 if storage == "bfloat16" else jnp.float32
    x = jnp.asarray(_normal(40, 96, seed=0), dtype)
    weights = jnp.asarray(_normal(12, 96, 160, seed=1), dtype)
    w = prepare(weights, quantize="int8" if storage == "int8" else None, platform="tpu")
    interpret = pltpu.InterpretParams(detect_races=True, dma_execution_mode=mode)
    run = jax.jit(partial(grouped_matmul_tpu, tile_rows=tile_rows, interpret=interpret))
    reference = jax.jit(grouped_matmul_reference)
    for sizes in _SIZES:
        group_sizes, first_group = jnp.asarray(sizes, jnp.int32), jnp.int32(8)  # the last of a stack of three layers
        garbage = jnp.where(jnp.arange(40)[:, None] < sum(sizes), x, jnp.nan)  # rows of no group
        got, want = run(garbage, w, group_sizes, first_group), reference(x, w, group_sizes, first_group)
        # sums of 96 products of size one, in another order
        np.testing.assert_allclose(got, want, atol=1e-4)
    if mode == "eager":
        assert races_found() is False


@pytest.mark.usefixtures("fast_compilation")
def test_a_weight_that_is_wider_than_a_tile_is_multiplied_in_parts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tpu_support, "_WEIGHT_TILE_BYTES", 128 * 256 * 4)
    x, w = jnp.asarray(_normal(24, 384, seed=0)), jnp.asarray(_normal(2, 384, 256, seed=1))
    tiles = tpu_support.modeled((2, 384, 256), 4, num_rows=24, num_groups=2)
    assert (tiles.depth, tiles.columns) == (128, 256)
    sizes, first = jnp.asarray([11, 9], jnp.int32), jnp.int32(0)
    got = jax.jit(partial(grouped_matmul_tpu, interpret=pltpu.InterpretParams()))(x, w, sizes, first)
    np.testing.assert_allclose(got, jax.jit(grouped_matmul_reference)(x, w, sizes, first), atol=2e-4)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="no TPU compiler")
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2", "tpu7x:2x2x1"])
@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_a_scan_over_layers_does_not_copy_the_experts(topology: str, quantize: str | None):
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    mesh = Mesh([topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]], ("one",))
    place = NamedSharding(mesh, PartitionSpec())
    layers, experts, width, hidden, tokens = 4, 8, 2048, 4096, 128  # 512 MiB of experts in bfloat16
    weights = jax.eval_shape(lambda: prepare_abstractly(layers * experts, width, hidden, quantize))

    def layer(x: jax.Array, w: object, sizes: jax.Array) -> jax.Array:
        def body(x: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
            return x + grouped_matmul(x, w, sizes, first_group=i * experts)[:, :width], None

        return jax.lax.scan(body, x, jnp.arange(layers))[0]

    arguments = (jax.ShapeDtypeStruct((tokens, width), jnp.bfloat16), weights, jax.ShapeDtypeStruct((experts,), jnp.int32))
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), arguments)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = jax.jit(layer).lower(*abstract).compile()
    assert "grouped_matmul" in compiled.as_text()
    memory = compiled.memory_analysis()
    assert memory.argument_size_in_bytes > 256 * 2**20 * {None: 2, "int8": 1, "int4": 0.5}[quantize]
    assert memory.temp_size_in_bytes < 8 * 2**20


def prepare_abstractly(groups: int, depth: int, columns: int, quantize: str | None) -> object:
    """The weights of `prepare`, traced instead of computed."""
    from pallas_kernels.matmul import Int4Weight, Int8Weight

    if quantize is None:
        return jnp.zeros((groups, depth, columns), jnp.bfloat16)
    if quantize == "int4":
        values, scales = (groups, depth // 2, columns), (groups, depth // 32, columns)
        return Int4Weight(values=jnp.zeros(values, jnp.uint8), scales=jnp.zeros(scales))
    return Int8Weight(values=jnp.zeros((groups, depth, columns), jnp.int8), scales=jnp.zeros((groups, columns)))
