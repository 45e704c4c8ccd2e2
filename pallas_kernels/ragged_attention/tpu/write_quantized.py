"""Writes a step's keys, values and scales into an 8-bit cache on a TPU, in place.

As in `write.py`, but a granule is a whole block, because a block's scales form one memory tile. Only units that hold a
token of this step are copied; a unit has 32 rows, the height of a tile of 8-bit numbers. A generating sequence reads and
writes one unit of K and of V, and one tile of scales for each.

    tokens          [ a37 | b0 ... b130 ]       blocks of 128, units of 32
    granules          a:0 unit 1, b:0 units 0-3, b:1 unit 0
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.pallas_types import Ref
from pallas_kernels.ragged_attention.arguments import CacheLayer
from pallas_kernels.ragged_attention.quantized import QuantizedCache, scaled
from pallas_kernels.ragged_attention.tpu.support import granule_rows
from pallas_kernels.ragged_attention.tpu.write import (
    FIRST_BLOCK,
    NUM_GRANULES,
    RING,
    Granules,
    pipeline_granules,
)

UNIT_BITS = 5
UNIT = 1 << UNIT_BITS
BUFFER_BYTES = 6 * 2**20  # of VMEM, for all granules in flight

if TYPE_CHECKING:
    from jaxtyping import Array, Float


def write_kv_quantized_tpu(
    k: Float[Array, "T K D"],
    v: Float[Array, "T K D"],
    k_cache: QuantizedCache,
    v_cache: QuantizedCache,
    *,
    granules: Granules,
    layer: CacheLayer,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[QuantizedCache, QuantizedCache]:
    """The caches with `k[t]`, `v[t]` at the slots of `layer` for which `granules_of` made `granules`.

    Shapes as in `ragged_attention`; B is a power of two of at least 128. The caches are updated in place.
    """
    num_tokens, (_, num_kv_heads, block_size, head_dim) = k.shape[0], k_cache.shape
    assert granule_rows(k_cache.dtype) == UNIT
    # Whole units are copied, including rows before and after this step's tokens.
    pad = ((block_size, block_size), (0, 0), (0, 0))
    wide = jnp.bfloat16 if k.dtype == jnp.bfloat16 else jnp.float32
    k, v = (jnp.pad(x.astype(wide), pad) for x in (k, v))
    bytes_per_granule = 2 * num_kv_heads * block_size * (head_dim * (1 + k.dtype.itemsize) + 4)
    ring = RING
    while ring > 2 and ring * bytes_per_granule > BUFFER_BYTES:
        ring //= 2
    new = pltpu.VMEM((ring, block_size, num_kv_heads, head_dim), k.dtype)
    values = pltpu.VMEM((ring, num_kv_heads, block_size, head_dim), k_cache.dtype)
    scales = pltpu.VMEM((ring, num_kv_heads, block_size), jnp.float32)
    semaphores = pltpu.SemaphoreType.DMA((ring,))
    hbm = pl.BlockSpec(memory_space=pl.ANY)
    caches = (k_cache.values, k_cache.scales, v_cache.values, v_cache.scales)
    scalars = jnp.stack([layer.first_block, granules.number])
    row_bytes = num_kv_heads * (head_dim + 4)
    written = pl.pallas_call(
        functools.partial(_write, block_size=block_size, ring=ring),
        out_shape=[jax.ShapeDtypeStruct(cache.shape, cache.dtype) for cache in caches],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(1,),
            in_specs=[hbm] * 6,
            out_specs=[hbm] * 4,
            scratch_shapes=[new, values, scales, new, values, scales, semaphores, semaphores],
        ),
        input_output_aliases={7: 0, 8: 1, 9: 2, 10: 3},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), disable_bounds_checks=True),
        cost_estimate=pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=8 * num_tokens * row_bytes),
        interpret=interpret,
        name="write_kv_quantized",
    )(scalars, granules.first_token, granules.slot, granules.count, granules.clash, k, v, *caches)
    return (QuantizedCache(values=written[0], scales=written[1]), QuantizedCache(values=written[2], scales=written[3]))


@dataclasses.dataclass(frozen=True)
class _Stream:
    """K or V: everything that belongs to one of the two caches."""

    new: Ref  # HBM [B + T + B, K, D]
    values: Ref  # HBM [L*N, K, B, D]
    scales: Ref  # HBM f32[L*N, K, B]
    new_buffer: Ref  # VMEM [ring, B, K, D]
    value_buffer: Ref  # VMEM [ring, K, B, D]
    scale_buffer: Ref  # VMEM f32[ring, K, B]


def _write(
    scalars,
    first_token,
    slot,
    count,
    clash,
    k,
    v,
    _k_in,
    _ks_in,
    _v_in,
    _vs_in,
    k_values,
    k_scales,
    v_values,
    v_scales,
    k_new,
    k_buffer,
    k_scale_buffer,
    v_new,
    v_buffer,
    v_scale_buffer,
    read_sem,
    write_sem,
    *,
    block_size: int,
    ring: int,
) -> None:
    streams = (
        _Stream(k, k_values, k_scales, k_new, k_buffer, k_scale_buffer),
        _Stream(v, v_values, v_scales, v_new, v_buffer, v_scale_buffer),
    )
    block_bits = block_size.bit_length() - 1

    def block(i: jax.Array) -> jax.Array:
        return scalars[FIRST_BLOCK] + (slot[i] >> block_bits)

    def offset(i: jax.Array) -> jax.Array:
        return slot[i] & (block_size - 1)

    def for_units(i: jax.Array, do: Callable[[jax.Array], None]) -> None:
        """Calls `do` with the first row of each unit that holds a new token."""
        end = (offset(i) + count[i] + UNIT - 1) >> UNIT_BITS
        lax.fori_loop(offset(i) >> UNIT_BITS, end, lambda u, _: do(pl.multiple_of(u * UNIT, UNIT)), None)

    def copy(source: Ref, target: Ref, semaphore: Ref, do: str) -> None:
        getattr(pltpu.make_async_copy(source, target, semaphore), do)()

    def read(i: jax.Array, do: str) -> None:
        b = i & (ring - 1)
        for stream in streams:

            def new(row: jax.Array, stream: _Stream = stream) -> None:
                first = first_token[i] - offset(i) + block_size + row
                copy(stream.new.at[pl.ds(first, UNIT)], stream.new_buffer.at[b, pl.ds(row, UNIT)], read_sem.at[b], do)

            def old(row: jax.Array, stream: _Stream = stream) -> None:
                rows = pl.ds(row, UNIT)
                copy(stream.values.at[block(i), :, rows], stream.value_buffer.at[b, :, rows], read_sem.at[b], do)

            for_units(i, new)

            @pl.when(count[i] < block_size)
            def _(stream: _Stream = stream, old: Callable[[jax.Array], None] = old) -> None:
                for_units(i, old)
                copy(stream.scales.at[block(i)], stream.scale_buffer.at[b], read_sem.at[b], do)

    def write(i: jax.Array, do: str) -> None:
        b = i & (ring - 1)
        for stream in streams:

            def values(row: jax.Array, stream: _Stream = stream) -> None:
                rows = pl.ds(row, UNIT)
                copy(stream.value_buffer.at[b, :, rows], stream.values.at[block(i), :, rows], write_sem.at[b], do)

            for_units(i, values)
            copy(stream.scale_buffer.at[b], stream.scales.at[block(i)], write_sem.at[b], do)

    def merge(i: jax.Array, stream: _Stream, first: jax.Array) -> None:
        """Quantizes the new rows of the unit that starts at `first`, and merges them into the buffers."""
        b, rows = i & (ring - 1), pl.ds(first, UNIT)
        begin, end = offset(i), offset(i) + count[i]
        new = jnp.swapaxes(stream.new_buffer[b, rows].astype(jnp.float32), 0, 1)  # [K, UNIT, D]
        values, scales = scaled(new, stream.value_buffer.dtype)
        row = first + lax.broadcasted_iota(jnp.int32, values.shape, 1)
        old = stream.value_buffer[b, :, rows].astype(jnp.float32)
        merged = jnp.where((row >= begin) & (row < end), values, old)
        stream.value_buffer[b, :, rows] = merged.astype(stream.value_buffer.dtype)
        # Scales are computed one per row and stored one per lane: the diagonal of UNIT x B copies transposes them.
        square = (values.shape[0], UNIT, block_size)
        lane = lax.broadcasted_iota(jnp.int32, square, 2)
        on_diagonal = first + lax.broadcasted_iota(jnp.int32, square, 1) == lane
        across = jnp.sum(jnp.where(on_diagonal, jnp.broadcast_to(scales, square), 0.0), axis=1)  # [K, B]
        lane = lax.broadcasted_iota(jnp.int32, across.shape, 1)
        is_new = (lane >= jnp.maximum(begin, first)) & (lane < jnp.minimum(end, first + UNIT))
        stream.scale_buffer[b] = jnp.where(is_new, across, stream.scale_buffer[b])

    def merge_all(i: jax.Array) -> None:
        for stream in streams:
            for_units(i, functools.partial(merge, i, stream))

    pipeline_granules(scalars[NUM_GRANULES], clash, read=read, merge=merge_all, write=write, ring=ring, lead=ring // 2)
