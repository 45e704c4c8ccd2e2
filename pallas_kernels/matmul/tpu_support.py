"""When the TPU kernel of `tpu.py` may be used, and how it divides weights of 4 bits. Does not import Pallas."""

from __future__ import annotations

import dataclasses
from typing import TypeGuard

import jax
import jax.numpy as jnp

from pallas_kernels.jax_versions import TPU_KERNELS, platform_of, too_old
from pallas_kernels.matmul.int4 import INT4_ROWS, Int4Weight
from pallas_kernels.tpu_target import MIB, Device

LANES, SUBLANES = 128, 8
_LARGEST_DEPTH = 4096  # a tile of float32 weights with so many inputs has 2 MiB
_LARGEST_SIZE = 256  # inputs that share a scale: a step has whole tiles of 8 rows of scales
_SMALLEST_ROWS, _MOST_ROWS = 16, 512  # of a tile; a bfloat16 tile of memory has 16, one of float32 8, one of 8 bits 32
_WEIGHT_TILE_BYTES = 2 << 20  # two are in flight: copies of a few MiB come close to the full memory bandwidth
_MANY_TILES = 8  # nothing is computed while the first is copied
_WEIGHTS_OF_STEP = 2**21  # a longer step begins and ends less often, but takes longer to compile


def may_be_lowered(*, divided: bool = False) -> bool:
    """Whether the program being traced may be for a single TPU, and this jax is new enough for the kernel.

    XLA partitions its own kernel over the devices of a mesh, but not this one, which needs a shard_map there, or becomes
    `divided` later.
    """
    if too_old(TPU_KERNELS):
        return False
    mesh = jax.sharding.get_abstract_mesh()
    if not divided and not mesh.empty and mesh.size > 1 and not mesh.manual_axes:
        return False
    return platform_of(mesh.abstract_device) == "tpu" or jax.default_backend() == "tpu"


def supports(shape: tuple[int, ...]) -> bool:
    """Whether the kernel reads weights [G, E, F] where they are.

    Otherwise the compiler first copies all of them to another layout, if F is no multiple of the lanes, or E can neither be
    divided into tiles nor fits into one.
    """
    return shape[2] % LANES == 0 and (shape[1] % LANES == 0 or shape[1] <= _LARGEST_DEPTH)


def fits_int4(w: Int4Weight, shape: tuple[int, ...]) -> bool:
    """Whether the kernel multiplies with a part of `w` that has this shape."""
    return w.scales.dtype == jnp.float32 and fits_sizes(shape, w.size)


def fits_sizes(shape: tuple[int, ...], size: int) -> bool:
    """Whether numbers of 4 bits of this shape, of which so many inputs share a scale, are whole tiles."""
    depth, columns = shape[-2:]
    whole = depth % max(2 * INT4_ROWS, size) == 0 and columns % LANES == 0
    return whole and size <= _LARGEST_SIZE and _LARGEST_SIZE % size == 0


def multiplies(w: object, shape: tuple[int, ...], *, divided: bool = False) -> TypeGuard[Int4Weight]:
    """Whether the program may be for a TPU, and `linear` uses the kernel there for a part of `w` that has this shape."""
    return isinstance(w, Int4Weight) and fits_int4(w, shape) and may_be_lowered(divided=divided)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """How the kernel divides its work."""

    rows: int
    depth: int
    """Inputs of a tile of weights."""
    columns: int
    step: int
    """Inputs of a tile that are unpacked, if they have to be, and multiplied together."""


def modeled(
    shape: tuple[int, ...],
    itemsize: int,
    row_itemsize: int = 2,
    *,
    num_rows: int,
    num_groups: int,
    tile_rows: int | None = None,
) -> Tiles:
    """The division of a product with weights [G, K, N] in 8 bits or more.

    Args:
      shape: [G, K, N].
      itemsize: bytes of a weight.
      row_itemsize: bytes of a number of x.
      num_rows: of all groups.
      num_groups: of which the product reads the weights.
      tile_rows: if it has been decided.
    """
    depth, columns = shape[-2:]
    tile_depth, width = _weight_tile(depth, columns, itemsize)
    smallest = _SMALLEST_ROWS * (2 if row_itemsize == 1 else 1)
    rows = tile_rows or _tile_rows(num_rows, num_groups, smallest=smallest)
    return Tiles(rows=rows, depth=tile_depth, columns=width, step=tile_depth)


def modeled_int4(
    shape: tuple[int, ...],
    size: int,
    itemsize: int,
    *,
    num_rows: int,
    num_groups: int,
    device: Device,
    tile_rows: int | None = None,
) -> Tiles:
    """The same for an `Int4Weight`: tiles of all inputs that fit into VMEM, and are so many that the first hardly counts.

    Args:
      shape: [G, K, N].
      size: inputs that share a scale.
      itemsize: bytes of an activation.
      num_rows: as for `modeled`.
      num_groups: as for `modeled`.
      device: whose memory it is.
      tile_rows: as for `modeled`.
    """
    depth, columns = shape[-2:]
    small = device.vmem_limit < 32 * MIB
    rows = tile_rows or _tile_rows(num_rows, num_groups)
    while tile_rows is None and rows > _SMALLEST_ROWS and rows * depth * itemsize > (2 if small else 14) * MIB:
        rows = max(rows // 2 // _SMALLEST_ROWS, 1) * _SMALLEST_ROWS
    width = LANES
    for width in (width for width in (1024, 512, 256, LANES) if width <= columns):
        if depth // 2 * width <= _WEIGHT_TILE_BYTES // (2 if small else 1) and columns // width * num_groups >= _MANY_TILES:
            break
    unit = max(2 * LANES, SUBLANES * size)  # so that the scales of a step begin with a whole tile
    weights = _WEIGHTS_OF_STEP if rows <= LANES else _WEIGHTS_OF_STEP // 4
    limit = max(weights // width // unit, 1) * unit
    even = [step for step in range(unit, limit + 1, unit) if depth % step == 0 and 4 * step >= limit]
    return Tiles(rows=rows, depth=depth, columns=width, step=min(even[-1] if even else limit, depth))


def _tile_rows(num_rows: int, num_groups: int, *, smallest: int = _SMALLEST_ROWS) -> int:
    """Rows per tile: about one group's share, so that few rows are wasted; in [smallest, 512]."""
    share = -(-num_rows // num_groups)
    wanted = min(max(1 << (share - 1).bit_length(), smallest), _MOST_ROWS)
    return min(wanted, -(-num_rows // smallest) * smallest)


def _weight_tile(depth: int, columns: int, itemsize: int) -> tuple[int, int]:
    """(depth, columns) of a tile of the weights: a divisor of the depth, and as many columns as the size allows."""
    widths = [width for width in (512, 256, LANES) if width <= columns] or [columns]
    for width in widths:
        if depth * width * itemsize <= _WEIGHT_TILE_BYTES:  # the whole depth: tiles of one group share the weights
            return depth, width
    width = widths[0]
    fitting = [
        part for part in range(LANES, depth, LANES) if depth % part == 0 and part * width * itemsize <= _WEIGHT_TILE_BYTES
    ]
    return (fitting[-1] if fitting else depth), width
