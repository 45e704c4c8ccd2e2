"""When the kernel of `hopper.py` may be used, and how it divides its work. Does not import Pallas."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels import gpu_target, jax_versions

GRANULE = 8  # rows: TMA reads a matrix that is tiled in shared memory from multiples of this
DEPTH = 64  # inputs per step
MULTIPROCESSORS = 132  # of an H100, if the device does not report it
SHARED_BYTES = 224 * 1024  # for buffers; a thread block has 227 KiB
MOST_STAGES, MOST_SPLITS = 8, 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """How the kernel divides its work. Only `splits` changes the order in which a result is summed."""

    rows: int  # of a tile, a multiple of 64
    columns: int  # that one of two warpgroups computes, a multiple of 64
    splits: int  # parts of the inputs, whose products are summed separately
    stages: int  # steps whose operands are in shared memory at the same time
    blocks: int  # thread blocks that share the tiles


def supported(shape: tuple[int, ...], stored: DTypeLike, dtype: DTypeLike, *, divided: bool = False) -> bool:
    """Whether the program is for Hoppers, and the kernel supports activations of `dtype` and weights [G, K, N].

    XLA cannot divide the kernel over several devices: there it has to be inside a shard_map, or become `divided` later.
    """
    if gpu_target.generation() != "hopper" or jax_versions.too_old(jax_versions.HOPPER_PRODUCT):
        return False
    mesh = jax.sharding.get_abstract_mesh()
    if not divided and not mesh.empty and mesh.size > 1 and not mesh.manual_axes:
        return False
    return fits(shape, stored, dtype)


def fits(shape: tuple[int, ...], stored: DTypeLike, dtype: DTypeLike) -> bool:
    """Whether weights [G, K, N] consist of whole tiles, in dtypes that the kernel multiplies."""
    if dtype not in (jnp.bfloat16, jnp.float16) or stored not in (dtype, jnp.int8):
        return False
    # A swizzle of 128 bytes is 64 numbers of 16 bits; numbers of 8 bits are converted, from narrower ones too.
    return shape[-2] % DEPTH == 0 and shape[-1] % (32 if stored == jnp.int8 else 64) == 0 and shape[-1] >= 128


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

    Weights of 8 bits are half as many bytes; rows of x come from the L2 cache, which is about twice as fast as memory, and
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
    itemsize = jnp.dtype(stored).itemsize
    blocks = blocks or gpu_target.multiprocessors() or MULTIPROCESSORS
    steps = depth // DEPTH

    def cost(columns: int, splits: int) -> int:
        items = num_tiles * -(-num_columns // (2 * columns)) * splits
        per_item = -(-steps // splits) * DEPTH * (2 * columns * itemsize + rows)
        sums = 4 * splits * num_rows * num_columns if splits > 1 else 0
        return -(-items // blocks) * per_item * blocks + sums

    widths = [64, 128] if num_columns % 128 == 0 and num_columns >= 256 else [64]
    # Every split must have a step.
    counts = [n for n in range(1, MOST_SPLITS + 1) if (n - 1) * -(-steps // n) < steps] if splits is None else [splits]
    columns, parts = min(itertools.product(widths, counts), key=lambda choice: cost(*choice))
    return Tiles(rows=rows, columns=columns, splits=parts, stages=_stages(rows, columns, itemsize), blocks=blocks)


def _stages(rows: int, columns: int, itemsize: int) -> int:
    stage = 2 * DEPTH * rows + 2 * DEPTH * columns * itemsize
    return min(MOST_STAGES, (SHARED_BYTES - _other_bytes(columns, itemsize)) // stage)


def _other_bytes(columns: int, itemsize: int) -> int:
    """Of the results on their way to memory, and of converted operands."""
    return 2 * 64 * 64 * 4 + (2 * 2 * DEPTH * columns * 2 if itemsize == 1 else 0)


def shared_bytes(tiles: Tiles, stored: DTypeLike) -> int:
    """Bytes of the kernel's buffers, without barriers."""
    itemsize = jnp.dtype(stored).itemsize
    stage = 2 * DEPTH * tiles.rows + 2 * DEPTH * tiles.columns * itemsize
    return tiles.stages * stage + _other_bytes(tiles.columns, itemsize)
