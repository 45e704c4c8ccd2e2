"""The TPU kernel equals the reference in the Pallas TPU interpreter, and compiles if the TPU compiler is installed.

Copies run in two modes: "eager", in which the race detector sees every access, and "on_wait", in which data arrives only
when the kernel waits for it.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.grouped_matmul import GroupedWeight, grouped_matmul, prepare
from pallas_kernels.grouped_matmul.reference import grouped_matmul_reference
from pallas_kernels.grouped_matmul.tpu import grouped_matmul_tpu
from pallas_kernels.matmul import Float8Weight, Int4Weight, Int8Weight, quantize_float8, tpu_support
from pallas_kernels.matmul.narrow import float8_rows, int8_rows
from tests.pallas_kernels.races import races_found

_SIZES = [[3, 0, 20, 1], [0, 0, 0, 0], [0, 40, 0, 0], [10, 6, 16, 8]]


def _normal(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def _stored(weights: np.ndarray, storage: str) -> GroupedWeight:
    if storage == "fp8":
        values, scales = quantize_float8(weights)
        return Float8Weight(values=jnp.asarray(values), scales=jnp.asarray(scales))
    dtype = jnp.bfloat16 if storage == "bfloat16" else jnp.float32
    w = prepare(jnp.asarray(weights, dtype), quantize="int8" if storage in ("int8", "w8a8") else None, platform="tpu")
    return replace(w, rounds_rows=True) if storage == "w8a8" and isinstance(w, Int8Weight) else w


@jax.jit
def _rounded(x: jax.Array, w: GroupedWeight) -> jax.Array:
    """The rows that the kernel multiplies: those of some weights are rounded to 8 bits."""
    if isinstance(w, Float8Weight):
        rows, factors = float8_rows(x)
    elif isinstance(w, Int8Weight) and w.rounds_rows:
        rows, factors = int8_rows(x)
    else:
        return x
    return rows.astype(jnp.float32) * factors


@pytest.mark.parametrize(
    ("storage", "mode", "tile_rows"),
    [
        ("float32", "eager", 16),
        ("int8", "on_wait", None),
        ("fp8", "eager", None),
        pytest.param("fp8", "on_wait", 32, marks=pytest.mark.slow),
        pytest.param("w8a8", "eager", 32, marks=pytest.mark.slow),
        pytest.param("w8a8", "on_wait", None, marks=pytest.mark.slow),
        pytest.param("bfloat16", "eager", 32, marks=pytest.mark.slow),
        pytest.param("int8", "eager", 16, marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("fast_compilation")
def test_the_kernel_equals_the_reference_in_the_interpreter(storage: str, mode: str, tile_rows: int | None):
    # Numbers of rows, of inputs and of columns that are no multiples of a tile.
    dtype = jnp.bfloat16 if storage == "bfloat16" else jnp.float32
    x = jnp.asarray(_normal(40, 96, seed=0), dtype)
    w = _stored(_normal(12, 96, 160, seed=1), storage)
    interpret = pltpu.InterpretParams(detect_races=True, dma_execution_mode=mode)
    run = jax.jit(partial(grouped_matmul_tpu, tile_rows=tile_rows, interpret=interpret))
    reference = jax.jit(grouped_matmul_reference)
    for sizes in _SIZES:
        group_sizes, first_group = jnp.asarray(sizes, jnp.int32), jnp.int32(8)  # the last of a stack of three layers
        garbage = jnp.where(jnp.arange(40)[:, None] < sum(sizes), x, jnp.nan)  # rows of no group
        got, want = run(garbage, w, group_sizes, first_group), reference(_rounded(x, w), w, group_sizes, first_group)
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
@pytest.mark.usefixtures("fast_compilation")
@pytest.mark.parametrize("depth", [256, 192])
def test_8_bit_floats_are_read_with_their_inputs_adjacent_or_not(depth: int, monkeypatch: pytest.MonkeyPatch):
    """Whole rows of 128 inputs are the last axis of the operand; others are stored, and multiplied, the other way round."""
    monkeypatch.setattr(tpu_support, "_WEIGHT_TILE_BYTES", 128 * 256)  # 256 inputs are two parts
    x, w = jnp.asarray(_normal(40, depth, seed=0)), _stored(_normal(3, depth, 256, seed=1), "fp8")
    sizes, first = jnp.asarray([11, 0, 9], jnp.int32), jnp.int32(0)
    run = jax.jit(partial(grouped_matmul_tpu, interpret=pltpu.InterpretParams(detect_races=True)))
    np.testing.assert_allclose(run(x, w, sizes, first), grouped_matmul_reference(_rounded(x, w), w, sizes, first), atol=2e-4)
    assert races_found() is False


def test_scales_of_blocks_are_refused():
    w = Float8Weight(values=jnp.zeros((2, 64, 256), jnp.float8_e4m3fn), scales=jnp.ones((2, 2, 64)))
    with pytest.raises(ValueError, match="one scale per output, but w has scales of blocks; pass implementation='tiles'"):
        grouped_matmul(jnp.ones((8, 256)), w, jnp.asarray([4, 4], jnp.int32), implementation="tpu")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="no TPU compiler")
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2", "tpu7x:2x2x1"])
@pytest.mark.parametrize("quantize", [None, "int8", "int4", "w8a8", "fp8"])
def test_a_scan_over_layers_does_not_copy_the_experts(topology: str, quantize: str | None):
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    if quantize in ("fp8", "w8a8") and (quantize == "fp8") != topology.startswith("tpu7x"):
        pytest.skip("not multiplied by this TPU")
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
    assert memory.argument_size_in_bytes > 256 * 2**20 * {None: 2, "int4": 0.5}.get(quantize, 1)
    assert memory.temp_size_in_bytes < 8 * 2**20


def prepare_abstractly(groups: int, depth: int, columns: int, quantize: str | None) -> object:
    """The weights of `prepare`, traced instead of computed."""
    if quantize is None:
        return jnp.zeros((groups, depth, columns), jnp.bfloat16)
    if quantize == "int4":
        values, scales = (groups, depth // 2, columns), (groups, depth // 32, columns)
        return Int4Weight(values=jnp.zeros(values, jnp.uint8), scales=jnp.zeros(scales))
    scales = jnp.zeros((groups, columns))
    if quantize == "fp8":
        return Float8Weight(values=jnp.zeros((groups, columns, depth), jnp.float8_e4m3fn), scales=scales)
    values = jnp.zeros((groups, depth, columns), jnp.int8)
    return Int8Weight(values=values, scales=scales, rounds_rows=quantize == "w8a8")
