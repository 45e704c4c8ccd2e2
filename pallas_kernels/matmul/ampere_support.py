"""When the kernel of `ampere.py` may be used, and how it divides its work. Does not import Pallas."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels import gpu_target, jax_versions
from pallas_kernels.matmul.hopper_support import INT4, bits_of, whole_steps

DEPTH = 64  # inputs per step
MULTIPROCESSORS = 108  # of an A100, if the device does not report it
SHARED_BYTES = 96 * 1024  # of 99 KiB on GPUs of compute capability 8.6 and 8.9
MOST_STAGES, MOST_SPLITS = 4, 8
LARGEST_ROWS = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """How the kernel divides its work. Only `splits` changes the order in which a result is summed."""

    rows: int  # of a tile, a power of two of at least 16
    columns: int  # of a program of the grid, likewise
    splits: int  # parts of the inputs, whose products are summed separately
    stages: int  # steps whose operands are in shared memory at the same time
    warps: int
    depth: int = DEPTH


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
    return shape[-2] % DEPTH == 0 and shape[-1] % 16 == 0


def modeled(num_tiles: int, shape: tuple[int, ...], stored: DTypeLike, *, rows: int, splits: int | None = None) -> Tiles:
    """Two programs for each multiprocessor, if the inputs can be split into so many parts, and as many stages as fit.

    Args:
      num_tiles: how many tiles are expected to have work.
      shape: [G, K, N].
      stored: the dtype of the weights.
      rows: of a tile.
      splits: how many parts the inputs have; None: as many as are best.
    """
    columns = 128 if rows == LARGEST_ROWS else 64
    steps = shape[-2] // DEPTH
    if splits is None:
        wanted = 2 * (gpu_target.multiprocessors() or MULTIPROCESSORS)
        programs = num_tiles * -(-shape[-1] // columns)
        splits = max(1, min(-(-wanted // programs), MOST_SPLITS, steps // MOST_STAGES))
    stages = min(MOST_STAGES, SHARED_BYTES // stage_bytes(rows, columns, stored))
    return Tiles(rows=rows, columns=columns, splits=splits, stages=stages, warps=8 if rows == LARGEST_ROWS else 4)


def tile_rows(num_rows: int) -> int:
    """Rows of a tile for so many of one matrix: tensor cores multiply 16 at a time."""
    return next((rows for rows in (16, 32, 64) if num_rows <= rows), LARGEST_ROWS)


def stage_bytes(rows: int, columns: int, stored: DTypeLike) -> int:
    """Of shared memory, for the operands of a step."""
    # Of int4 at most two scales and two offsets of an output, in float32.
    factors = columns * 2 * 2 * 4 if stored == INT4 else 0
    return DEPTH * (2 * rows + columns * bits_of(stored) // 8) + factors
