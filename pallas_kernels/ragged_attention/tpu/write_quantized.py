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
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.pallas_types import Ref
from pallas_kernels.ragged_attention.quantized import QuantizedCache, scaled
from pallas_kernels.ragged_attention.tpu.support import granule_rows
from pallas_kernels.ragged_attention.tpu.write import (
    CLASH,
    COUNT,
    FIRST_BLOCK,
    FIRST_TOKEN,
    NUM_GRANULES,
    RING,
    SLOT,
    Granules,
    pipeline_granules,
)

UNIT_BITS = 5
UNIT = 1 << UNIT_BITS
BUFFER_BYTES = 6 * 2**20  # of VMEM, for all granules in flight

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


def write_kv_quantized_tpu(
    new: Sequence[Float[Array, "T K D"]],
    caches: Sequence[QuantizedCache],
    scalars: Int[Array, " numbers"],
    *,
    granules: Granules,
    interpret: bool | pltpu.InterpretParams = False,
) -> list[QuantizedCache]:
    """`caches` with the rows of each of `new` at the slots of a layer for which `granules_of` made `granules`.

    `scalars` begins with the layer's first block and the number of granules. The caches, of keys and of values or a packed
    one, have one shape and are updated in place. B is a power of two of at least 128.
    """
    cache, count = caches[0], len(caches)
    num_tokens, (_, num_kv_heads, block_size, width) = new[0].shape[0], cache.shape
    num_scales = cache.scales.shape[1]
    assert granule_rows(cache.dtype) == UNIT
    # Whole units are copied, including rows before and after this step's tokens.
    pad = ((block_size, block_size), (0, 0), (0, 0))
    wide = jnp.dtype(jnp.bfloat16 if new[0].dtype == jnp.bfloat16 else jnp.float32)
    new = [jnp.pad(x.astype(wide), pad) for x in new]
    bytes_per_granule = count * block_size * (num_kv_heads * width * (1 + wide.itemsize) + 4 * num_scales)
    ring = RING
    while ring > 2 and ring * bytes_per_granule > BUFFER_BYTES:
        ring //= 2
    new_buffer = pltpu.VMEM((ring, block_size, num_kv_heads, width), wide)
    values = pltpu.VMEM((ring, num_kv_heads, block_size, width), cache.dtype)
    scales = pltpu.VMEM((ring, num_scales, block_size), jnp.float32)
    semaphores = pltpu.SemaphoreType.DMA((ring,))
    hbm = pl.BlockSpec(memory_space=pl.ANY)
    parts = [part for cache in caches for part in (cache.values, cache.scales)]
    row_bytes = num_kv_heads * width + 4 * num_scales
    written = pl.pallas_call(
        functools.partial(_write, block_size=block_size, ring=ring, num_caches=count),
        out_shape=[jax.ShapeDtypeStruct(part.shape, part.dtype) for part in parts],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(1,),
            in_specs=[hbm] * (3 * count),
            out_specs=[hbm] * (2 * count),
            scratch_shapes=[new_buffer, values, scales] * count + [semaphores] * 2,
        ),
        input_output_aliases={2 + count + n: n for n in range(2 * count)},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), disable_bounds_checks=True),
        cost_estimate=pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=4 * count * num_tokens * row_bytes),
        interpret=interpret,
        name="write_kv_quantized",
    )(scalars, granules.runs, *new, *parts)
    return [QuantizedCache(values=written[2 * n], scales=written[2 * n + 1]) for n in range(count)]


@dataclasses.dataclass(frozen=True)
class _Stream:
    """Everything that belongs to one cache, of K, of V, or of both."""

    new: Ref  # HBM [B + T + B, K, D]
    values: Ref  # HBM [L*N, K, B, D]
    scales: Ref  # HBM f32[L*N, K, B], or 2K
    new_buffer: Ref  # VMEM [ring, B, K, D]
    value_buffer: Ref  # VMEM [ring, K, B, D]
    scale_buffer: Ref  # VMEM f32[ring, K, B], or 2K


def _write(
    scalars,
    runs,
    *refs,
    block_size: int,
    ring: int,
    num_caches: int,
) -> None:
    first_token, slot, count, clash = (runs.at[row] for row in (FIRST_TOKEN, SLOT, COUNT, CLASH))
    *of_caches, read_sem, write_sem = refs
    new, caches, buffers = of_caches[:num_caches], of_caches[3 * num_caches : 5 * num_caches], of_caches[5 * num_caches :]
    streams = [_Stream(new[n], *caches[2 * n : 2 * n + 2], *buffers[3 * n : 3 * n + 3]) for n in range(num_caches)]
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
        num_heads, num_scales = new.shape[0], stream.scale_buffer.shape[1]
        if num_scales == num_heads:
            values, scales = scaled(new, stream.value_buffer.dtype)
        else:  # each half of a row has its scale
            is_key = lax.broadcasted_iota(jnp.int32, new.shape, 2) < new.shape[2] // 2
            halves = jnp.stack([jnp.where(is_key, new, 0.0), jnp.where(is_key, 0.0, new)], axis=1)  # [K, 2, UNIT, 2D]
            values, scales = scaled(halves.reshape(num_scales, *new.shape[1:]), stream.value_buffer.dtype)
            values = values.reshape(halves.shape)
            values = jnp.where(is_key, values[:, 0], values[:, 1])
        row = first + lax.broadcasted_iota(jnp.int32, values.shape, 1)
        old = stream.value_buffer[b, :, rows].astype(jnp.float32)
        merged = jnp.where((row >= begin) & (row < end), values, old)
        stream.value_buffer[b, :, rows] = merged.astype(stream.value_buffer.dtype)
        # Scales are computed one per row and stored one per lane: the diagonal of UNIT x B copies transposes them.
        square = (num_scales, UNIT, block_size)
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
