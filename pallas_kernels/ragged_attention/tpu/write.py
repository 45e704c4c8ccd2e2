"""Writes a step's keys and values into the cache on a TPU, in place.

A row of one token and one head is half a word of a (16, 128) memory tile, so it cannot be copied on its own. The unit is
therefore a granule: the rows of one tile in all heads of a block. A granule that the step fills completely is only written;
one that it fills partly is read first. A generating sequence accesses one granule of K and one of V per step.

    tokens          [ a5 a6 a7 | b0 ... b19 | c9 ]      granules of 16
    granules          a:0-15     b:0-15 b:16-31  c:0-15
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
from pallas_kernels.pytree import pytree
from pallas_kernels.ragged_attention.quantized import Cache, QuantizedCache
from pallas_kernels.ragged_attention.tpu.support import granule_rows

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

FIRST_BLOCK, NUM_GRANULES = range(2)
FIRST_TOKEN, SLOT, COUNT, CLASH = range(4)
RING = 16  # granules in flight: a copy takes about a microsecond, regardless of its size
LEAD = 8  # of these, granules that are being read


def write_kv_tpu(
    new: Sequence[Float[Array, "T K D"]],
    caches: Sequence[Float[Array, "pool K B D"]],
    scalars: Int[Array, " numbers"],
    *,
    granules: Granules,
    interpret: bool | pltpu.InterpretParams = False,
) -> list[Float[Array, "pool K B D"]]:
    """`caches` with the rows of each of `new` at the slots of a layer for which `granules_of` made `granules`.

    `scalars` begins with the layer's first block and the number of granules. The caches, of keys and of values or one that
    holds both, have one shape and are updated in place. Any order of tokens is correct; it is fastest if tokens with
    adjacent slots are adjacent, as in a chunk.
    """
    cache, count = caches[0], len(caches)
    _, num_kv_heads, block_size, width = cache.shape
    rows = granule_rows(cache.dtype)
    # All rows of a granule are copied, even if its first tokens are from earlier steps.
    pad = ((rows, rows), (0, 0), (0, 0))
    new = [jnp.pad(x.astype(cache.dtype), pad) for x in new]
    buffer = pltpu.VMEM((RING, num_kv_heads, rows, width), cache.dtype)
    new_buffer = pltpu.VMEM((RING, rows, num_kv_heads, width), cache.dtype)
    semaphores = pltpu.SemaphoreType.DMA((RING,))
    hbm = pl.BlockSpec(memory_space=pl.ANY)
    row_bytes = num_kv_heads * width * cache.dtype.itemsize
    written = pl.pallas_call(
        functools.partial(_write, rows=rows, block_size=block_size, num_caches=count),
        out_shape=[jax.ShapeDtypeStruct(cache.shape, cache.dtype)] * count,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(1,),
            in_specs=[hbm] * (2 * count),
            out_specs=[hbm] * count,
            scratch_shapes=[new_buffer] * count + [buffer] * count + [semaphores] * 2,
        ),
        input_output_aliases={2 + count + n: n for n in range(count)},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), disable_bounds_checks=True),
        cost_estimate=pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=4 * count * new[0].shape[0] * row_bytes),
        interpret=interpret,
        name="write_kv",
    )(scalars, granules.runs, *new, *caches)
    return list(written)


@pytree
class Granules:
    """Runs of tokens that fill consecutive rows of one granule."""

    runs: Int[Array, "4 T"]
    """Of each run its first token, the slot of that token, the number of tokens, and whether one of the preceding runs fills
    the same granule. In one array, since XLA moves each one into place in every layer."""
    number: Int[Array, ""]
    """Of runs; the other columns are unused."""


def granules_of(kv_slots: Int[Array, " T"], cache: Cache, *, num_blocks: int) -> Granules:
    """How a step writes to these slots of a layer; slots outside [0, N*B) are dropped. Of `cache` only the shape is read."""
    block_size = cache.shape[2]
    # The scales of a block are one memory tile.
    rows = block_size if isinstance(cache, QuantizedCache) else granule_rows(cache.dtype)
    num_slots = num_blocks * block_size
    num_tokens = kv_slots.shape[0]
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    real = (kv_slots >= 0) & (kv_slots < num_slots)
    before = jnp.concatenate([jnp.full((1,), -2, jnp.int32), jnp.where(real, kv_slots, -2)[:-1]])
    begins = real & ((kv_slots != before + 1) | (kv_slots % rows == 0))
    ends = real & jnp.concatenate([(begins | ~real)[1:], jnp.ones((1,), bool)])
    # Sorting is a fast way to compact an array on a TPU.
    first = jnp.sort(jnp.where(begins, token, num_tokens))
    last = jnp.sort(jnp.where(ends, token, num_tokens))
    slot = kv_slots[jnp.minimum(first, num_tokens - 1)]
    granule = jnp.where(first < num_tokens, slot // rows, -1)
    clash = jnp.zeros((num_tokens,), bool)
    for back in range(1, min(RING, num_tokens)):
        clash |= jnp.concatenate([jnp.zeros((back,), bool), granule[back:] == granule[:-back]])
    return Granules(
        runs=jnp.stack([first, slot, last - first + 1, clash.astype(jnp.int32)]),
        number=jnp.sum(begins, dtype=jnp.int32),
    )


@dataclasses.dataclass(frozen=True)
class _Stream:
    """Everything that belongs to one cache, of K, of V, or of both."""

    new: Ref  # HBM [rows + T + rows, K, D]
    cache: Ref  # HBM [L*N, K, B, D]
    new_buffer: Ref  # VMEM [RING, rows, K, D]
    buffer: Ref  # VMEM [RING, K, rows, D]


def _write(
    scalars,
    runs,
    *refs,
    rows: int,
    block_size: int,
    num_caches: int,
) -> None:
    first_token, slot, count, clash = (runs.at[row] for row in (FIRST_TOKEN, SLOT, COUNT, CLASH))
    *of_caches, read_sem, write_sem = refs
    new, _, caches, new_buffers, buffers = (of_caches[n : n + num_caches] for n in range(0, 5 * num_caches, num_caches))
    streams = [_Stream(*parts) for parts in zip(new, caches, new_buffers, buffers, strict=True)]
    block_bits = block_size.bit_length() - 1  # sizes are powers of two: a shift is one scalar operation, a division ten

    def granule(stream: _Stream, i: jax.Array) -> Ref:
        block = scalars[FIRST_BLOCK] + (slot[i] >> block_bits)
        first_row = pl.multiple_of(slot[i] & (block_size - 1) & -rows, rows)
        return stream.cache.at[block, :, pl.ds(first_row, rows)]

    def read(i: jax.Array, do: str) -> None:
        buffer = i & (RING - 1)
        first = first_token[i] - (slot[i] & (rows - 1)) + rows
        for stream in streams:
            new = stream.new.at[pl.ds(first, rows)], stream.new_buffer.at[buffer]
            getattr(pltpu.make_async_copy(*new, read_sem.at[buffer]), do)()

            @pl.when(count[i] < rows)
            def _(stream: _Stream = stream) -> None:
                old = granule(stream, i), stream.buffer.at[buffer]
                getattr(pltpu.make_async_copy(*old, read_sem.at[buffer]), do)()

    def write(i: jax.Array, do: str) -> None:
        for stream in streams:
            copy = pltpu.make_async_copy(stream.buffer.at[i & (RING - 1)], granule(stream, i), write_sem.at[i & (RING - 1)])
            getattr(copy, do)()

    def merge(i: jax.Array) -> None:
        offset = slot[i] & (rows - 1)
        for stream in streams:
            row = lax.broadcasted_iota(jnp.int32, stream.buffer.shape[1:], 1)
            is_new = (row >= offset) & (row < offset + count[i])
            new = jnp.swapaxes(stream.new_buffer[i & (RING - 1)].astype(jnp.float32), 0, 1)
            old = stream.buffer[i & (RING - 1)].astype(jnp.float32)
            stream.buffer[i & (RING - 1)] = jnp.where(is_new, new, old).astype(stream.buffer.dtype)

    pipeline_granules(scalars[NUM_GRANULES], clash, read=read, merge=merge, write=write, ring=RING, lead=LEAD)


def pipeline_granules(
    num_granules: jax.Array,
    clash: Ref,
    *,
    read: Callable[[jax.Array, str], None],
    merge: Callable[[jax.Array], None],
    write: Callable[[jax.Array, str], None],
    ring: int,
    lead: int,
) -> None:
    """Reads, merges and writes every granule, with up to `ring` in flight, of which `lead` are being read.

    Args:
      clash: i32[T], nonzero for a run that fills the granule of one of the `ring` runs before it. It is read only after
        that run has been written.
      read: `read(i, "start")` starts the copies of run i into buffer i % ring; `read(i, "wait")` waits for them.
      merge: `merge(i)` puts the new rows of run i into its buffer.
      write: `write(i, "start")` starts the copies from buffer i % ring to the cache; `write(i, "wait")` waits for them.
    """

    def wait_for_writes(done: jax.Array, below: jax.Array) -> jax.Array:
        lax.fori_loop(done, below, lambda i, _: write(i, "wait"), None)
        return jnp.maximum(done, below)

    def read_ahead(i: jax.Array) -> None:
        @pl.when((i < num_granules) & (clash[jnp.minimum(i, num_granules - 1)] == 0))
        def _() -> None:
            read(i, "start")

    lax.fori_loop(0, lead, lambda i, _: read_ahead(i), None)

    def step(i: jax.Array, done: jax.Array) -> jax.Array:
        # Run i + lead reuses the buffer of run i + lead - ring. A run that clashes has not been read ahead.
        done = wait_for_writes(done, jnp.where(clash[i] > 0, i, i + lead - ring + 1))
        read_ahead(i + lead)

        @pl.when(clash[i] > 0)
        def _() -> None:
            read(i, "start")

        read(i, "wait")
        merge(i)
        write(i, "start")
        return done

    done = lax.fori_loop(0, num_granules, step, jnp.int32(0))
    wait_for_writes(done, num_granules)
