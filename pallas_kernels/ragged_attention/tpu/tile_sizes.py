"""Tile sizes of the TPU kernel: measured by `autotune` if it has been run, else modeled for the kind of device."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from pallas_kernels.ragged_attention.measured_tiles import Shape, measured
from pallas_kernels.tpu_target import DEVICES, device_kind


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """How the TPU kernel divides its work. All choices give the same result; the compiler rejects sizes that do not fit."""

    queries: int
    """Queries of one sequence that share each fetch of its keys. A power of two."""
    keys: int
    """Keys that are fetched together, over all sequences of a tile. A power of two."""
    sequences: int
    """Sequences with a single query that share a tile. A power of two."""
    cores: int
    """TensorCores that share the work: 2 if a device has two of them."""
    vmem_limit: int
    """Bytes of VMEM that the kernel may use."""


def choose(shape: Shape, kind: str | None = None) -> Tiles:
    """The tiles measured for this device and shape class, or modeled tiles if there are none.

    An unknown `kind` gets the tiles of the smallest device.
    """
    kind = kind or device_kind() or "v4"
    return measured(shape, kind, Tiles) or modeled(shape, kind)


def modeled(shape: Shape, kind: str) -> Tiles:
    """The largest tiles that fit in the modeled VMEM: with more queries per tile, the same keys are fetched less often."""
    device = DEVICES.get(kind, DEVICES["v4"])
    row = shape.num_kv_heads * shape.head_dim * jnp.dtype(shape.dtype).itemsize  # bytes of one key
    keys = max(128, shape.block_size)
    while keys < 1024 and 2 * keys * row * 4 <= device.vmem_limit // 4:  # K and V, two buffers
        keys *= 2
    # Each KV head of each sequence is a chain of dependent products: eight of them hide each other's latency.
    sequences = 1
    while (
        sequences * shape.num_kv_heads < 8
        and 2 * sequences <= shape.num_sequences
        and keys // (2 * sequences) >= max(128, shape.block_size)
    ):
        sequences *= 2
    queries = 8
    while queries < min(256, shape.num_tokens) and vmem_bytes(2 * queries, keys, shape) <= device.vmem_limit:
        queries *= 2
    return Tiles(queries=queries, keys=keys, sequences=sequences, cores=device.cores, vmem_limit=device.vmem_limit)


def vmem_bytes(queries: int, keys: int, shape: Shape) -> int:
    """Bytes of VMEM that a chunk tile needs, including the compiler's own temporaries."""
    item = jnp.dtype(shape.dtype).itemsize
    wide = max(item, 2)  # queries and results are not stored in 8 bits
    rows = queries * shape.num_heads
    width = max(shape.head_dim, 128)  # of the rows of a packed cache, which have smaller heads
    buffers = 4 * keys * shape.num_kv_heads * shape.head_dim * item
    tile = rows * (3 * width * wide + 4 * width + 2 * 4 * 128)
    scores = 3 * 4 * (rows // shape.num_kv_heads) * keys
    return buffers + tile + scores
