"""Tile sizes of the GPU kernels."""

from __future__ import annotations

import dataclasses

from pallas_kernels.ragged_attention.gpu_support import AMPERE_SHORT


@dataclasses.dataclass(frozen=True, kw_only=True)
class GpuTiles:
    """How the GPU kernel cuts its work. Any choice gives the same result; the compiler refuses what does not fit."""

    chunk_keys: int  # keys of a step of a chunk tile
    chunk_stages: int  # steps whose keys and values are in shared memory at once
    single_keys: int
    single_stages: int
    pieces: int  # that the contexts of all single queries are cut into, over all KV heads
    min_piece: int  # keys below which cutting costs more than it gives
    blocks: int  # thread blocks that share the tiles


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """What the model needs to know about a generation of GPUs."""

    multiprocessors: int
    shared_bytes: int  # that a thread block's buffers may take; barriers and the system take some on top
    resident: int  # thread blocks that a multiprocessor is to hold at the same time


GENERATIONS = {
    "hopper": Generation(multiprocessors=132, shared_bytes=225 * 1024, resident=1),  # H100 SXM: 227 KiB a block
    # A100: 163 KiB a block, 164 KiB in all, 1 KiB of which goes to each block. 8.6 and 8.9: 99 and 100 KiB.
    "ampere": Generation(multiprocessors=108, shared_bytes=81 * 1024, resident=2),
}


def modelled(head_dim: int, group: int, generation: str) -> GpuTiles:
    """Tiles for a head size and query heads a KV head: as many stages as fit in shared memory."""
    gpu = GENERATIONS[generation]
    blocks = gpu.resident * gpu.multiprocessors
    # Eight for each multiprocessor, so that one that got one more than others runs an eighth longer at most.
    common = {"pieces": 8 * gpu.multiprocessors, "min_piece": 256, "blocks": blocks}
    if generation == "ampere":
        # Two steps of 64 keys fit beside the queries up to D=128. Where a thread holds twice the results (D of 256, or tiles
        # of 128 rows), registers would not suffice for more than 32.
        keys = 64 if head_dim <= 128 and group <= AMPERE_SHORT else 32
        return GpuTiles(chunk_keys=keys, chunk_stages=2, single_keys=keys, single_stages=2, **common)
    # Beyond 128 the accumulator takes 128 registers a thread, and fewer scores fit beside it.
    keys = 128 if head_dim <= 128 else 64

    def stages(rows: int) -> int:
        return max(2, min(4, (gpu.shared_bytes - 2 * head_dim * rows) // (4 * head_dim * keys)))

    # Two warpgroups of 64 rows; of single queries one, whose float32 results take as much as two tiles of queries.
    return GpuTiles(chunk_keys=keys, chunk_stages=stages(128), single_keys=keys, single_stages=stages(192), **common)
