"""When the kernel of `ampere.py` may be used, and how it divides its work. Does not import Pallas."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels import gpu_target, jax_versions
from pallas_kernels.matmul.hopper_support import INT4, bits_of, whole_steps

DEPTH = 64  # inputs per step
COLUMNS = 128  # of a thread block
MULTIPROCESSORS = 108  # of an A100, if the device does not report it
SHARED_BYTES = {"8.0": 164 * 1024, "8.7": 164 * 1024}  # of a multiprocessor
LEAST_SHARED_BYTES = 100 * 1024  # of one of another compute capability
RESERVED_BYTES = 1024  # of them, for each thread block
ALONE = 1.35  # how much longer a step takes, estimated, if no other block computes while one waits
MOST_STAGES, MOST_SPLITS = 4, 8
FUSED_SPLITS = 4  # whose sum XLA computes in the kernel that uses it, such as a norm; of more it makes a kernel
LARGEST_ROWS = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """How the kernel divides its work. Only `splits` changes the order in which a result is summed."""

    rows: int  # of a tile: 16, 32, 64 or 128
    splits: int  # parts of the inputs, whose products are summed separately
    stages: int  # steps whose operands are in shared memory at the same time


def supported(
    shape: tuple[int, ...], stored: DTypeLike, dtype: DTypeLike, *, size: int | None = None, divided: bool = False
) -> bool:
    """Whether the program is for Amperes, and the kernel supports activations of `dtype` and weights [G, K, N].

    `size` and `divided` as for `hopper_support.supported`.
    """
    if gpu_target.generation() != "ampere" or jax_versions.too_old(jax_versions.AMPERE_PRODUCT):
        return False
    mesh = jax.sharding.get_abstract_mesh()
    if not divided and not mesh.empty and mesh.size > 1 and not mesh.manual_axes:
        return False
    return fits(shape, stored, dtype, size=size)


def fits(shape: tuple[int, ...], stored: DTypeLike, dtype: DTypeLike, *, size: int | None = None) -> bool:
    """Whether weights [G, K, N] have whole steps and aligned rows, in dtypes that the kernel multiplies.

    `size` as for `hopper_support.fits`.
    """
    if dtype not in (jnp.bfloat16, jnp.float16) or stored not in (dtype, jnp.int8, INT4):
        return False
    if size is not None and not whole_steps(shape[-2], size):
        return False
    return shape[-2] % DEPTH == 0 and shape[-1] % 16 == 0 and shape[-1] >= COLUMNS


def modeled(num_tiles: int, shape: tuple[int, ...], stored: DTypeLike, *, rows: int, splits: int | None = None) -> Tiles:
    """The division with which the thread blocks read the fewest bytes in the longest of them, as `hopper_support.modeled`.

    Args:
      num_tiles: how many tiles are expected to have work.
      shape: [G, K, N].
      stored: the dtype of the weights.
      rows: of a tile.
      splits: how many parts the inputs have; None: as many as are best.
    """
    depth, num_columns = shape[-2:]
    steps, bits = depth // DEPTH, bits_of(stored)
    multiprocessors = gpu_target.multiprocessors() or MULTIPROCESSORS
    parts = num_tiles * -(-num_columns // COLUMNS)

    def cost(splits: int) -> float:
        per_item = -(-steps // splits) * DEPTH * (COLUMNS * bits // 8 + rows)
        longest = max(ALONE, -(-parts * splits // multiprocessors))
        sums = 4 * splits * num_tiles * rows * num_columns if splits > 1 else 0
        return longest * per_item * multiprocessors + 2 * sums

    if splits is None:
        most = MOST_SPLITS if parts * FUSED_SPLITS < multiprocessors else FUSED_SPLITS
        # Every split must have a step.
        splits = min((n for n in range(1, most + 1) if (n - 1) * -(-steps // n) < steps), key=cost)
    shared = SHARED_BYTES.get(gpu_target.compute_capability() or "8.0", LEAST_SHARED_BYTES)
    together = min(blocks_together(rows), -(-parts * splits // multiprocessors))
    stages = (shared // together - RESERVED_BYTES) // stage_bytes(rows, stored)
    return Tiles(rows=rows, splits=splits, stages=max(2, min(MOST_STAGES, stages)))


def blocks_together(rows: int) -> int:
    """How many thread blocks of a multiprocessor hide each other's latency: as many as their registers allow."""
    return 2 if rows == LARGEST_ROWS else 3


def tile_rows(num_rows: int) -> int:
    """Rows of a tile for so many of one matrix: tensor cores multiply 16 at a time."""
    return next((rows for rows in (16, 32, 64) if num_rows <= rows), LARGEST_ROWS)


def stage_bytes(rows: int, stored: DTypeLike) -> int:
    """Of shared memory, for the operands of a step."""
    return DEPTH * (2 * rows + COLUMNS * bits_of(stored) // 8)
