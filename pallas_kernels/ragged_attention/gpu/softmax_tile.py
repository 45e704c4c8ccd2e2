"""Shared by the GPU attention kernels: the work list, and the online softmax over the rows of a tile.

A q tile has 16 to 128 rows. A row is one query of one head; the G heads that share a KV head are adjacent, so that keys
and values are fetched once for all of them. Both kinds of tile run the same body:

  chunk tiles    Q consecutive queries of one sequence, Q * G rows; normalized results
  single tiles   one query, G rows, and a piece of its keys; partial results, to be combined by their log-sum-exp
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from pallas_kernels.pallas_types import Layout, Ref

GRANULE = 8  # rows: a TMA read of a matrix that is tiled in shared memory begins at a multiple of this
LOG2E = math.log2(math.e)
# Finite, so that a row without any visible key so far gets weights of exp2(-inf) = 0, not NaN.
NO_KEY = -1e30

# Columns of the work list, i32[tiles + 1, NUM_COLUMNS]; the last row holds the number of tiles that have work.
SEQUENCE, ROW, POSITION, FIRST, END, WINDOW, HAS_SINK = range(7)
NUM_COLUMNS = 7

# What a kernel is told of its layer, i32[1] or i32[3]: its number, and which part it reads of what is stacked for several
# kinds of layers.
LAYER, KIND, ROTATION = range(3)

State = TypeVar("State")


def of_layer(refs: Mapping[Any, Ref], name: str, number: int, ndim: int) -> Ref:
    """What a layer reads of a reference that may have one axis more than `ndim`, for kinds of layers."""
    return refs[name] if len(refs[name].shape) == ndim else refs[name].at[refs["numbers"][number]]


def rows_of_query(group: int) -> int:
    """Rows from a granule boundary to the last head of a query, in whole granules: the first head may come later."""
    aligned = GRANULE % group == 0 or group % GRANULE == 0
    return -(-(group if aligned else group + GRANULE - 1) // GRANULE) * GRANULE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """The static properties of a kernel."""

    group: int  # G, or a part of it; see `parts`
    head_dim: int  # D, without what is zero in all keys
    value_dim: int  # numbers of a value and of a result
    parts: int = 1  # into which the query heads of a KV head are divided; each is computed as if it had its own KV head
    values_in_keys: bool = False  # values are the first numbers of their keys
    block_size: int  # B, a power of two
    rows: int  # rows of a tile
    rows_in: int  # rows of queries that are read, at least `rows` or `rows_out`
    rows_out: int  # rows that are stored; for a single tile, at least those of a query
    keys: int  # keys per step, a power of two
    stages: int  # steps whose keys and values are in shared memory at the same time
    blocks: int  # thread blocks that share the tiles
    num_blocks: int  # N, blocks of the cache per layer
    scale: float
    soft_cap: float | None
    has_window: bool
    partial: bool  # produces float32 results and their log-sum-exp
    dtype: np.dtype  # dtype of q and of the operands of products
    cache_dtype: np.dtype  # `dtype`, or 8 bits: the kernel then rounds number times scale to `dtype` before it multiplies
    interpreted: bool  # runs in the Pallas interpreter, which lacks some constructs

    @property
    def queries(self) -> int:
        """Queries per chunk tile. A tile begins at a granule boundary, so rows of the previous query may come first."""
        return (self.rows - (GRANULE - 1 if self.group % GRANULE else 0)) // self.group

    @property
    def quantized(self) -> bool:
        return self.cache_dtype != self.dtype

    @property
    def copies(self) -> int:
        """Blocks (or parts of a block) that hold the keys of one step."""
        return max(1, self.keys // self.block_size)


class Tile:
    """A tile and a head, with the tile's entry in the work list."""

    def __init__(self, refs: dict[str, Ref], spec: Spec, ordinal: jax.Array) -> None:
        num_kv_heads = refs["k_cache"].shape[1] * spec.parts
        # The heads of a tile, whose keys are adjacent, are processed at the same time.
        self.index = lax.div(ordinal, jnp.int32(num_kv_heads))
        self.head = ordinal - self.index * num_kv_heads
        self.kv_head = self.head if spec.parts == 1 else lax.div(self.head, jnp.int32(spec.parts))  # of the cache
        self.columns = [refs["work"][self.index, column] for column in range(NUM_COLUMNS)]
        self.first_block = refs["numbers"][LAYER] * spec.num_blocks
        self.first, self.end = self.columns[FIRST], self.columns[END]
        self.num_steps = lax.div(self.end - self.first + (spec.keys - 1), jnp.int32(spec.keys))
        # A tile begins at a granule boundary, so its own first row may come later.
        self.skipped = lax.rem(self.columns[ROW], jnp.int32(GRANULE))


def for_each_tile(refs: dict[str, Ref], spec: Spec, work: Callable[[Tile, jax.Array], None]) -> jax.Array:
    """Calls `work` with every tile of this thread block and the number of steps before it; returns the number of all steps.

    A thread block processes every `blocks`-th pair of a tile and a head.
    """
    block, blocks = lax.axis_index("block"), spec.blocks
    num_tiles = refs["work"][refs["work"].shape[0] - 1, 0]
    num_pairs = num_tiles * refs["k_cache"].shape[1] * spec.parts

    def tile(i: jax.Array, steps_before: jax.Array) -> jax.Array:
        tile = Tile(refs, spec, block + i * blocks)
        work(tile, steps_before)
        return steps_before + tile.num_steps

    mine = lax.div(num_pairs - block + (blocks - 1), jnp.int32(blocks))
    return lax.fori_loop(0, mine, tile, jnp.int32(0))


def over_steps(tile: Tile, spec: Spec, step: Callable[[jax.Array, State, bool], State], state: State) -> State:
    """Carries `state` through `step(i, state, masked)`. Only steps at the window's start and at the diagonal are masked.

    | window | visible to all rows ... | diagonal |
    """
    position = tile.columns[POSITION]
    all_seen = lax.div(position + 1 - tile.first, jnp.int32(spec.keys))
    borders = [jnp.int32(0), jnp.minimum(all_seen, tile.num_steps), tile.num_steps]
    if spec.has_window:
        # The last query's window starts after this key; the query of a single tile may be past its piece of keys.
        before = jnp.maximum(tile.end - 1, position) - tile.columns[WINDOW] - tile.first
        inside = jnp.where(before < 0, 0, lax.div(before, jnp.int32(spec.keys)) + 1)
        borders.insert(1, jnp.minimum(inside, borders[1]))
    masked = [True, False, True] if spec.has_window else [False, True]
    for begin, end, compare in zip(borders, borders[1:], masked, strict=False):
        state = lax.fori_loop(begin, end, lambda i, state, compare=compare: step(i, state, compare), state)
    return state


def blocks_of(tile: Tile, i: jax.Array, refs: dict[str, Ref], spec: Spec) -> list[tuple[jax.Array, jax.Array | int]]:
    """The blocks of the pool, and the first key in them, that hold the keys of the tile's step i."""
    sequence, base = tile.columns[SEQUENCE], tile.first_block
    key = tile.first + i * spec.keys
    block = lax.div(key, jnp.int32(spec.block_size))
    if spec.keys <= spec.block_size:
        return [(base + refs["tables"][sequence, block], key - block * spec.block_size)]
    # There are no blocks after the last one: it is fetched again, from the L2 cache, and those keys are masked.
    last = lax.div(tile.end - 1, jnp.int32(spec.block_size))
    entries = [jnp.minimum(block + j, last) for j in range(spec.copies)]
    return [(base + refs["tables"][sequence, entry], 0) for entry in entries]


class Rows:
    """Some rows of a tile: which keys they see, and the online softmax over them. Scores are in units of log2."""

    def __init__(
        self, tile: Tile, refs: dict[str, Ref], spec: Spec, *, first: jax.Array | int, count: int, layout: Layout
    ) -> None:
        """`count` rows of the tile, starting at row `first`; `layout` is the register layout of the scores."""
        self.tile, self.spec, self.count, self._layout = tile, spec, count, layout
        heads = pl.ds(GRANULE - tile.skipped + first, count)

        def of_heads(name: str) -> jax.Array | None:
            return self._row_vector(refs[name].at[tile.head, heads]) * LOG2E if name in refs else None

        # The last key visible to a row, relative to the first key of the tile.
        row = self.iota((count,), 0) + (first - tile.skipped)
        self.last_seen = lax.div(row, jnp.int32(spec.group)) + (tile.columns[POSITION] - tile.first)
        self.slope, self.sink = of_heads("slopes"), of_heads("sinks")

    def start(self) -> tuple[jax.Array, jax.Array]:
        """(largest score, sum of weights), f32[count] each, before any key."""
        top, total = self.full((self.count,), NO_KEY), self.full((self.count,), 0.0)
        if self.sink is not None:  # one additional logit, included in the first piece of a context
            has_sink = self.tile.columns[HAS_SINK] > 0
            top, total = jnp.where(has_sink, self.sink, top), jnp.where(has_sink, total + 1.0, total)
        return top, total

    def weigh(
        self, scores: jax.Array, i: jax.Array, top: jax.Array, total: jax.Array, *, masked: bool
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """The weights f32[count, keys] of step i, the factor for rescaling earlier results, and the new top and total.

        `scores` are products of queries and keys. Weights are relative to the largest score so far.
        """
        spec, shape = self.spec, scores.shape
        factor = spec.scale * LOG2E
        last_seen = self.last_seen - i * spec.keys  # relative to the first key of the step
        if spec.soft_cap is not None:
            # tanh(x) = 1 - 2 / (exp(2 x) + 1): the hardware's tanh has an error of 5e-4, times the cap.
            power = jnp.exp2(scores * (2.0 * LOG2E * spec.scale / spec.soft_cap))
            scores, factor = (1.0 - 2.0 / (power + 1.0)) * (spec.soft_cap * LOG2E), 1.0
        if self.slope is not None:
            scores, factor = scores * factor, 1.0
            distance = self.iota(shape, 1) - self.along_rows(last_seen, shape)
            scores = scores + self.along_rows(self.slope, shape) * distance.astype(jnp.float32)
        if masked:
            key = self.iota(shape, 1)
            seen = key <= self.along_rows(last_seen, shape)
            if spec.has_window:
                seen = seen & (key > self.along_rows(last_seen - self.tile.columns[WINDOW], shape))
            scores = jnp.where(seen, scores, -jnp.inf)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1) * factor)
        weights = jnp.exp2(scores * factor - self.along_rows(new_top, shape))
        keep = jnp.exp2(top - new_top)
        return weights, keep, new_top, total * keep + jnp.sum(weights, axis=1)

    def along_rows(self, x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """[rows] -> `shape` [rows, ...], a value for each row."""
        return self._cast(lax.broadcast_in_dim(x, shape, [0]))

    def iota(self, shape: tuple[int, ...], axis: int) -> jax.Array:
        return self._cast(lax.broadcasted_iota(jnp.int32, shape, axis))

    def full(self, shape: tuple[int, ...], value: float) -> jax.Array:
        return self._cast(jnp.full(shape, value, jnp.float32))

    def _cast(self, x: jax.Array) -> jax.Array:
        if self.spec.interpreted:  # the interpreter has no layouts
            return x
        return plgpu.layout_cast(x, self._layout if x.ndim == 2 else self._layout.reduce(1))

    def _row_vector(self, ref: Ref) -> jax.Array:
        if self.spec.interpreted:
            return ref[...]
        return _load(ref, self._layout.reduce(1))  # from global memory, a few bytes per thread, once per tile


def _load(ref: Ref, layout: Layout) -> jax.Array:
    index = [()] if "idx" in inspect.signature(plgpu.load).parameters else []  # newer versions of JAX have no such parameter
    return plgpu.load(ref, *index, layout=layout, optimized=False)


DEQUANTIZED_ROWS = 64  # rows per call of `dequantize`


def dequantize(values: Ref, scales: Ref, target: Ref, spec: Spec, *, by_way_of: DTypeLike) -> None:
    """Writes 8-bit numbers [64, D] times their rows' scales f32[64] to shared memory, in `spec.dtype`.

    `by_way_of` is an intermediate dtype that represents all these numbers and to which the hardware can convert them.
    """
    if spec.interpreted:
        target[...] = (values[...].astype(jnp.float32) * scales[...][:, None]).astype(spec.dtype)
        return
    layout = plgpu.Layout.WGMMA_UPCAST_2X  # four numbers of a row per thread
    numbers = _load(values, layout).astype(by_way_of).astype(jnp.float32)
    factors = lax.broadcast_in_dim(_load(scales, layout.reduce(1)), numbers.shape, [0])
    target[...] = (numbers * plgpu.layout_cast(factors, layout)).astype(spec.dtype)
