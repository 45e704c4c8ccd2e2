"""Tile sizes of the GPU kernels: measured by `autotune` if it has been run, else modeled for the generation."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from pallas_kernels import gpu_target
from pallas_kernels.ragged_attention.arguments import Latents
from pallas_kernels.ragged_attention.gpu.softmax_tile import rows_of_query
from pallas_kernels.ragged_attention.gpu.support import AMPERE_SHORT, MAX_HEAD_DIM, WIDE_ROWS, parts_of
from pallas_kernels.ragged_attention.measured_tiles import Shape, measured
from pallas_kernels.ragged_attention.quantized import is_quantized


@dataclasses.dataclass(frozen=True, kw_only=True)
class GpuTiles:
    """How the GPU kernel divides its work. All choices give the same result; the compiler rejects sizes that do not fit."""

    chunk_keys: int  # keys per step of a chunk tile
    chunk_stages: int  # steps whose keys and values are in shared memory at the same time
    single_keys: int
    single_stages: int
    pieces: int  # pieces into which the contexts of all single queries are split, over all KV heads
    min_piece: int  # minimum keys per piece: splitting further costs more than it gains
    blocks: int  # thread blocks that share the tiles


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """What the model needs to know about a generation of GPUs."""

    multiprocessors: int  # if the device does not report it
    shared_bytes: int  # available to a thread block's buffers; barriers and the system use some more
    resident: int  # intended number of thread blocks that a multiprocessor holds at the same time


WIDE_SHARED_BYTES = {"hopper": 225 * 1024, "ampere": 162 * 1024}

GENERATIONS = {
    "hopper": Generation(multiprocessors=132, shared_bytes=225 * 1024, resident=1),  # H100 SXM: 227 KiB per block
    # A100: 163 KiB per block, 164 KiB in total, of which each block reserves 1 KiB. 8.6 and 8.9: 99 and 100 KiB.
    "ampere": Generation(multiprocessors=108, shared_bytes=81 * 1024, resident=2),
}


def choose(shape: Shape, generation: str, *, latents: Latents | None = None) -> GpuTiles:
    """The tiles measured for the target GPU and this class of shapes, or modeled tiles if there are none."""
    kind = gpu_target.device_kind()
    group = shape.num_heads // shape.num_kv_heads
    found = measured(shape, kind, GpuTiles) if kind else None
    return found or modeled(
        shape.head_dim,
        group,
        generation,
        quantized=is_quantized(shape.dtype),
        multiprocessors=gpu_target.multiprocessors(),
        latents=latents,
    )


def modeled(
    head_dim: int,
    group: int,
    generation: str,
    *,
    quantized: bool = False,
    multiprocessors: int | None = None,
    latents: Latents | None = None,
) -> GpuTiles:
    """Tiles for a head size, query heads per KV head and caches of 16 or 8 bits: as many stages as fit in shared memory."""
    gpu = GENERATIONS[generation]
    multiprocessors = multiprocessors or gpu.multiprocessors
    blocks = gpu.resident * multiprocessors
    # Eight per multiprocessor, so that one with an additional piece runs at most an eighth longer than the others.
    common = {"pieces": 8 * multiprocessors, "min_piece": 256, "blocks": blocks}
    if head_dim > MAX_HEAD_DIM:
        return _modeled_wide(head_dim, group, generation, multiprocessors=multiprocessors, latents=latents)
    if generation == "ampere":
        # Two steps of 64 keys fit beside the queries up to D=128. If a thread holds twice the results (D of 256, or tiles
        # of 128 rows), there are registers for only 32 keys.
        keys = 64 if head_dim <= 128 and group <= AMPERE_SHORT else 32
        return GpuTiles(chunk_keys=keys, chunk_stages=2, single_keys=keys, single_stages=2, **common)
    # With D above 128 the accumulator takes 128 registers per thread, which leaves room for fewer scores. With 8 bits, two
    # staged steps share the memory with the stages.
    keys = 128 if head_dim <= 128 and not quantized else 64
    staged = 4 * keys * (head_dim + 4) if quantized else 0

    def stages(rows: int) -> int:
        return max(2, min(4, (gpu.shared_bytes - 2 * head_dim * rows - staged) // (4 * head_dim * keys)))

    # Two warpgroups of 64 rows; for single queries one, whose float32 results take as much memory as two tiles of queries.
    return GpuTiles(chunk_keys=keys, chunk_stages=stages(128), single_keys=keys, single_stages=stages(192), **common)


def _modeled_wide(head_dim: int, group: int, generation: str, *, multiprocessors: int, latents: Latents | None) -> GpuTiles:
    """As `modeled`, for kernels of wide heads: one thread block per multiprocessor, as many keys in a step as rows."""
    keys, shared_bytes = WIDE_ROWS[generation], WIDE_SHARED_BYTES[generation]
    width, columns = (head_dim, 2 * head_dim) if latents is None else (latents.key_dim, latents.key_dim)
    parts = parts_of(group, generation) or 1

    def stages(rows: int) -> int:
        exchange = 4 * rows * keys if generation == "ampere" else 0  # of scores between warps
        return max(1, min(4, (shared_bytes - 2 * keys * width - exchange) // (2 * keys * columns)))

    return GpuTiles(
        chunk_keys=keys,
        chunk_stages=stages(keys),
        single_keys=keys,
        single_stages=stages(keys if rows_of_query(group // parts) > 16 else 16),
        # The float32 results of a piece are up to 128 KiB, as much as some 100 keys.
        pieces=2 * multiprocessors,
        min_piece=256,
        blocks=multiprocessors,
    )


def candidates(first: GpuTiles) -> Iterable[GpuTiles]:
    """`first`, then tiles that differ from it in one respect. The compiler rejects sizes that do not fit."""
    yield first
    changes = [
        {f"{kind}_keys": keys, f"{kind}_stages": stages}
        for kind in ("chunk", "single")
        for keys in (32, 64, 128)
        for stages in (2, 3, 4)
    ]
    changes += [{"pieces": pieces} for pieces in (first.pieces // 2, 2 * first.pieces, 4 * first.pieces)]
    changes += [{"min_piece": keys} for keys in (128, 512, 1024)]
    changes += [{"blocks": blocks} for blocks in (first.blocks // 2, 2 * first.blocks)]
    for change in changes:
        tiles = dataclasses.replace(first, **change)
        if tiles != first:
            yield tiles
