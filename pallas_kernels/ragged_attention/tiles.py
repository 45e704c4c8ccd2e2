"""Tile sizes of the TPU kernel: modelled for each kind of device, or measured by `autotune`."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

KIB = 1024
MIB = 1024 * KIB


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """How the TPU kernel cuts its work. Any choice gives the same result; the compiler refuses what does not fit."""

    queries: int
    """Queries of one sequence that share a fetch of its keys. A power of two."""
    keys: int
    """Keys that are fetched together, of all sequences of a tile."""
    sequences: int
    """Sequences with a single query that run side by side."""
    cores: int
    """TensorCores that share the work: 2 where one device has two of them."""
    vmem_limit: int
    """Bytes of VMEM that the kernel may take."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """What the choice of tiles needs to know about a kind of TPU."""

    vmem_limit: int  # bytes
    cores: int  # TensorCores of one JAX device


# VMEM: 16 MiB a core on v4, 128 on v5e, v5p and v6e (half of it left to XLA's own prefetches), 64 on TPU7x.
DEVICES = {
    "v4": Device(vmem_limit=15 * MIB, cores=2),
    "v5e": Device(vmem_limit=48 * MIB, cores=1),
    "v5p": Device(vmem_limit=48 * MIB, cores=2),
    "v6e": Device(vmem_limit=48 * MIB, cores=1),
    "tpu7x": Device(vmem_limit=40 * MIB, cores=1),
}
_KINDS = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p",
          "TPU v6 lite": "v6e", "TPU v6e": "v6e", "TPU7x": "tpu7x"}  # fmt: skip


def device_kind() -> str | None:
    """The key of `DEVICES` for the TPU that is being lowered for; None where that is unknown."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    kind = getattr(device, "device_kind", None) or jax.devices()[0].device_kind
    return _KINDS.get(kind)


def choose(
    *, num_heads: int, num_kv_heads: int, head_dim: int, block_size: int, num_tokens: int, num_sequences: int,
    dtype: jnp.dtype, kind: str | None = None,
) -> Tiles:  # fmt: skip
    """The largest tiles that the model of VMEM admits; an unknown `kind` gets those of the smallest device."""
    device = DEVICES[kind or device_kind() or "v4"]
    item = jnp.dtype(dtype).itemsize
    row = num_kv_heads * head_dim * item  # bytes of one key
    keys = max(128, block_size)
    while keys < 1024 and 2 * keys * row * 4 <= device.vmem_limit // 4:  # K and V, two buffers
        keys *= 2
    sequences = 1
    while sequences * num_kv_heads < 8 and 2 * sequences <= min(8, num_sequences) and keys // (2 * sequences) >= 128:
        sequences *= 2
    queries = 8
    while queries < min(256, num_tokens) and (
        vmem_bytes(2 * queries, keys, num_heads, num_kv_heads, head_dim, item) <= device.vmem_limit
    ):
        queries *= 2
    return Tiles(
        queries=queries, keys=keys, sequences=sequences, cores=device.cores, vmem_limit=device.vmem_limit
    )


def vmem_bytes(queries: int, keys: int, num_heads: int, num_kv_heads: int, head_dim: int, item: int) -> int:
    """Bytes of VMEM that a chunk tile needs, the compiler's own temporaries included."""
    rows = queries * num_heads
    buffers = 4 * keys * num_kv_heads * head_dim * item
    tile = rows * (3 * head_dim * item + 4 * head_dim + 2 * 4 * 128)
    scores = 3 * 4 * (rows // num_kv_heads) * keys
    transposed = 2 * 4 * rows * head_dim
    return buffers + tile + max(scores, transposed)
