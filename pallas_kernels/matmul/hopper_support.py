"""When the kernel of `hopper.py` may be used, and how it divides its work. Does not import Pallas."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from pallas_kernels import gpu_target, jax_versions

if TYPE_CHECKING:
    from jaxtyping import Array, Float

GRANULE = 8  # rows: TMA reads a matrix that is tiled in shared memory from multiples of this
DEPTH = 64  # inputs per step, if not of 8-bit floats
MATRIX, ROW, GRANULES = range(3)
NUM_COLUMNS = 3
"""Columns of a work list, i32[tiles + 1, NUM_COLUMNS]: the matrix of a tile, its first row (a multiple of 8), and how many
times 8 rows of its result are stored. The last row holds the number of tiles that have work."""
MULTIPROCESSORS = 132  # of an H100, if the device does not report it
SHARED_BYTES = 224 * 1024  # for buffers; a thread block has 227 KiB
MOST_STAGES, MOST_SPLITS = 8, 8
FLOAT8 = jnp.float8_e4m3fn
INT4 = jnp.uint8  # the bytes of an `Int4Weight`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """How the kernel divides its work. Only `splits` changes the order in which a result is summed."""

    rows: int  # of a tile, a multiple of 64
    columns: int  # that one of two warpgroups computes, a multiple of 64
    splits: int  # parts of the inputs, whose products are summed separately
    stages: int  # steps whose operands are in shared memory at the same time
    blocks: int  # thread blocks that share the tiles


def supported(
    shape: tuple[int, ...], stored: DTypeLike, dtype: DTypeLike, *, size: int | None = None, divided: bool = False
) -> bool:
    """Whether the program is for Hoppers, and the kernel supports activations of `dtype` and weights [G, K, N].

    `size` as for `fits`.

    XLA cannot divide the kernel over several devices: there it has to be inside a shard_map, or become `divided` later.
    """
    if gpu_target.generation() != "hopper" or jax_versions.too_old(jax_versions.HOPPER_PRODUCT):
        return False
    mesh = jax.sharding.get_abstract_mesh()
    if not divided and not mesh.empty and mesh.size > 1 and not mesh.manual_axes:
        return False
    return fits(shape, stored, dtype, size=size)


def fits(shape: tuple[int, ...], stored: DTypeLike, dtype: DTypeLike, *, size: int | None = None) -> bool:
    """Whether weights [G, K, N] consist of whole tiles, in dtypes that the kernel multiplies.

    `dtype` is that of the activations before they are rounded for 8-bit floats; `size` is how many inputs of int4 share a
    scale.
    """
    if dtype not in (jnp.bfloat16, jnp.float16) or stored not in (dtype, jnp.int8, INT4, FLOAT8):
        return False
    if size is not None and not whole_steps(shape[-2], size):
        return False
    # A swizzle of 128 bytes is 64 numbers of 16 bits; numbers of 8 bits are converted, from narrower ones too, or are stored
    # with their inputs adjacent.
    return shape[-2] % DEPTH == 0 and shape[-1] % (64 if stored == dtype else 32) == 0 and shape[-1] >= 128


def whole_steps(num_inputs: int, size: int) -> bool:
    """Whether each step of `DEPTH` inputs of int4 has one scale, or one for each half, if so many inputs share one."""
    return num_inputs % size == 0 and (size % DEPTH == 0 or 2 * size == DEPTH)


def depth_of(stored: DTypeLike, num_inputs: int) -> int:
    """Inputs per step: of 8-bit floats as many as fit into a swizzle of 128 bytes, if they divide the inputs."""
    return 2 * DEPTH if stored == FLOAT8 and num_inputs % (2 * DEPTH) == 0 else DEPTH


def one_matrix(x: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """(x filled up to whole granules or tiles of so many rows, the work list of all its rows with matrix 0)."""
    unit = GRANULE if x.shape[0] <= rows else rows
    x = jnp.pad(x, ((0, -x.shape[0] % unit), (0, 0)))
    first_row = np.arange(0, x.shape[0], rows)
    granules = np.minimum(x.shape[0] - first_row, rows) // GRANULE
    tile = np.stack([np.zeros_like(first_row), first_row, granules], axis=1)
    return x, jnp.asarray(np.concatenate([tile, np.full((1, NUM_COLUMNS), len(tile))]), jnp.int32)


def sum_of_splits(y: Float[Array, "splits P N"]) -> Float[Array, "P N"]:
    """The sum of the splits, in a form that XLA computes where the result is used, without a kernel of its own."""
    return functools.reduce(jnp.add, [y[split] for split in range(y.shape[0])])


def modeled(
    num_rows: int,
    num_tiles: int,
    shape: tuple[int, ...],
    stored: DTypeLike,
    *,
    rows: int,
    splits: int | None = None,
    blocks: int | None = None,
) -> Tiles:
    """The division with which the thread blocks read the fewest bytes in the longest of them.

    Weights of 8 and 4 bits are fewer bytes; rows of x come from the L2 cache, which is about twice as fast as memory, and
    so do the sums of splits, which are written and read.

    Args:
      num_rows: P, of the result.
      num_tiles: how many tiles are expected to have work.
      shape: [G, K, N].
      stored: the dtype of the weights.
      rows: of a tile.
      splits: how many parts the inputs have; None: as many as are best.
      blocks: how many thread blocks the device runs at the same time; None: the multiprocessors of the target.
    """
    depth, num_columns = shape[-2:]
    bits = bits_of(stored)
    blocks = blocks or gpu_target.multiprocessors() or MULTIPROCESSORS
    step = depth_of(stored, depth)
    steps = depth // step

    def cost(columns: int, splits: int) -> int:
        items = num_tiles * -(-num_columns // (2 * columns)) * splits
        per_item = -(-steps // splits) * step * (2 * columns * bits // 8 + rows)
        sums = 4 * splits * num_rows * num_columns if splits > 1 else 0
        return -(-items // blocks) * per_item * blocks + sums

    widths = [64, 128] if num_columns % 128 == 0 and num_columns >= 256 else [64]
    if stored == FLOAT8 and rows > 64:
        widths = [64]  # the sums of a step and those of all steps take registers
    # Every split must have a step.
    counts = [n for n in range(1, MOST_SPLITS + 1) if (n - 1) * -(-steps // n) < steps] if splits is None else [splits]
    columns, parts = min(itertools.product(widths, counts), key=lambda choice: cost(*choice))
    stages = min(MOST_STAGES, (SHARED_BYTES - _other_bytes(columns, stored)) // _stage_bytes(rows, columns, stored))
    return Tiles(rows=rows, columns=columns, splits=parts, stages=stages, blocks=blocks)


def _stage_bytes(rows: int, columns: int, stored: DTypeLike) -> int:
    """Of the operands of a step, for two warpgroups."""
    if stored == FLOAT8:
        return 2 * DEPTH * (rows + 2 * columns)
    # Of int4 at most two scales and two offsets of an output, in float32.
    factors = 2 * columns * 2 * 2 * 4 if stored == INT4 else 0
    return 2 * DEPTH * rows + 2 * DEPTH * columns * bits_of(stored) // 8 + factors


def bits_of(stored: DTypeLike) -> int:
    """Of a weight."""
    return 4 if stored == INT4 else 8 * jnp.dtype(stored).itemsize


def _other_bytes(columns: int, stored: DTypeLike) -> int:
    """Of the results on their way to memory, and of converted operands."""
    return 2 * 64 * 64 * 4 + (2 * 2 * DEPTH * columns * 2 if stored in (jnp.int8, INT4) else 0)


def shared_bytes(tiles: Tiles, stored: DTypeLike) -> int:
    """Bytes of the kernel's buffers, without barriers."""
    return tiles.stages * _stage_bytes(tiles.rows, tiles.columns, stored) + _other_bytes(tiles.columns, stored)
