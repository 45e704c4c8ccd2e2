"""Grouped matmul on a Hopper or Ampere GPU: each group's rows times its matrix, which is read in the stack of all layers.

TMA reads and writes rows from multiples of 8 on, so every group gets whole granules of 8 rows; tiles of rows never cross
from one group to the next:

    rows      | a a a a a a a a a a a | b b | c c c |
    granules  | a a a a a a a a | a a a . . . . . | b b . . . . . . | c c c . . . . . |
    tiles     | 0                                 | 1               | 2               |
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import gpu_target
from pallas_kernels.matmul import Float8Weight, ScaledWeight, ampere, ampere_support, hopper, hopper_support
from pallas_kernels.matmul.hopper_support import GRANULE, sum_of_splits
from pallas_kernels.matmul.int4 import size_of
from pallas_kernels.matmul.narrow import float8_rows

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


class Plan(NamedTuple):
    """Where the rows of groups are, and the work list of `multiply_tiles`."""

    work: jax.Array
    """i32[tiles + 1, columns]"""
    source: jax.Array
    """i32[P]: the row of x in each row of granules."""
    place: jax.Array
    """i32[T]: the row of granules of each row of x."""
    is_used: jax.Array
    """bool[T]: whether a row belongs to a group."""


def grouped_matmul_gpu(
    x: Float[Array, "T E"],
    w: Float[Array, "G E F"] | ScaledWeight,
    group_sizes: Int[Array, " X"],
    first_group: Int[Array, ""],
    *,
    tiles: hopper_support.Tiles | ampere_support.Tiles | None = None,
    interpret: Any = False,
) -> Float[Array, "T F"]:
    """float32[T, F]; see `pallas_kernels.grouped_matmul.grouped_matmul`. A `Float8Weight` also rounds rows to 8 bits.

    If `tiles` is None, they are modeled for the GPU that the program is lowered for; their type chooses the kernel.
    `interpret` is passed to it. Raises ValueError if it does not support `w`.
    """
    num_rows, num_groups = x.shape[0], group_sizes.shape[0]
    stored = w.values.dtype if isinstance(w, ScaledWeight) else w.dtype
    is_ampere = gpu_target.generation() == "ampere" if tiles is None else isinstance(tiles, ampere_support.Tiles)
    support = ampere_support if is_ampere else hopper_support
    if not support.fits(w.shape, stored, x.dtype, size=size_of(w)):
        raise ValueError(
            f"implementation='gpu' multiplies bfloat16 or float16 by weights of that dtype, 8 or 4 bits, [G, E, F] with E "
            f"and F multiples of 64 (F of 32 for 8 and 4 bits), F at least 128, and scales of int4 for 32 inputs or for a "
            f"multiple of 64, but x is {x.dtype} and w {stored}{list(w.shape)}; pad w with zeros, or pass "
            f"implementation='tiles'"
        )
    if tiles is None:
        rows = 64 if num_rows <= 96 * num_groups else 128  # tiles of 128 rows only if most of them are full
        if is_ampere:
            rows = ampere_support.tile_rows(-(-4 * num_rows // (3 * num_groups)))
        most = -(-num_rows // rows) + min(num_groups, num_rows)
        # One split: the sums of several would have to be gathered by row.
        if is_ampere:
            tiles = ampere_support.modeled(most, w.shape, stored, rows=rows, splits=1)
        else:
            tiles = hopper_support.modeled(num_rows, most, w.shape, stored, rows=rows, splits=1)
    plan = plan_groups(group_sizes, first_group, num_rows=num_rows, rows=tiles.rows)
    factors = None
    if isinstance(w, Float8Weight):
        x, factors = float8_rows(x)
    rows = jnp.take(x, plan.source, axis=0, mode="clip")
    multiply_tiles = ampere.multiply_tiles if isinstance(tiles, ampere_support.Tiles) else hopper.multiply_tiles
    y = multiply_tiles(rows, w, plan.work, jnp.int32(0), tiles=tiles, interpret=interpret)  # pyright: ignore[reportArgumentType]
    y = sum_of_splits(y)
    y = jnp.take(y, plan.place, axis=0, mode="clip")
    y = y if factors is None else y * factors
    return jnp.where(plan.is_used[:, None], y, 0.0)


def plan_groups(group_sizes: Int[Array, " X"], first_group: Int[Array, ""], *, num_rows: int, rows: int) -> Plan:
    """The plan for T = `num_rows` rows in tiles of `rows`."""
    num_groups = group_sizes.shape[0]
    with_rows = min(num_groups, num_rows)  # at most so many groups have any
    num_tiles = num_rows // rows + with_rows
    ends = jnp.cumsum(group_sizes, dtype=jnp.int32)
    granules = -(-group_sizes // GRANULE)
    granule_ends = jnp.cumsum(granules, dtype=jnp.int32)
    tiles = -(-group_sizes // rows)
    tile_ends = jnp.cumsum(tiles, dtype=jnp.int32)
    first_row = GRANULE * (granule_ends - granules)
    shift = first_row - (ends - group_sizes)  # from a row of x to its row of granules

    def group_of(index: jax.Array, ends: jax.Array) -> jax.Array:
        return jnp.minimum(jnp.sum(ends[None, :] <= index[:, None], axis=1, dtype=jnp.int32), num_groups - 1)

    i = jnp.arange(num_tiles, dtype=jnp.int32)
    group = group_of(i, tile_ends)
    ordinal = i - (tile_ends - tiles)[group]  # of the tile in its group
    left = granules[group] - ordinal * (rows // GRANULE)
    columns = [
        first_group + group,
        first_row[group] + ordinal * rows,
        jnp.minimum(left, rows // GRANULE),
    ]
    work = jnp.where((i < tile_ends[-1])[:, None], jnp.stack(columns, axis=1), 0)
    work = jnp.concatenate([work, jnp.full((1, len(columns)), tile_ends[-1], jnp.int32)])

    # A tile is read whole, so the last one may extend beyond the granules.
    size = -(-num_rows // GRANULE) * GRANULE + with_rows * GRANULE + rows - GRANULE
    place = jnp.arange(size, dtype=jnp.int32)
    source = place - shift[group_of(place, GRANULE * granule_ends)]
    row = jnp.arange(num_rows, dtype=jnp.int32)
    return Plan(
        work=work,
        source=jnp.clip(source, 0, num_rows - 1),
        place=jnp.minimum(row + shift[group_of(row, ends)], size - 1),
        is_used=row < ends[-1],
    )
