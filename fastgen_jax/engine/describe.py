"""An engine in one line, for its repr and that of a pipeline."""

from __future__ import annotations

import os

import jax
import jax.numpy as jnp

from fastgen_jax.core import scale_bytes, stored_head_dim
from fastgen_jax.engine.config import ResolvedConfig
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.counts import count_params


def describe(name: str, model: ModelConfig, config: ResolvedConfig) -> str:
    """Name, model, number formats, devices and the size of the KV cache."""
    name = f"{os.path.basename(name.rstrip('/'))!r}, " if name else ""
    weights = f"{config.dtype}, {config.quantize} weights" if config.quantize else config.dtype
    devices = jax.local_devices()[: config.tensor_parallel or 1]
    on = devices[0].device_kind if len(devices) == 1 else f"{len(devices)} x {devices[0].device_kind}"
    platform = jax.default_backend()
    cache_bytes = (
        config.num_blocks
        * config.block_size
        * model.kv_bytes_per_token(
            jnp.dtype(config.kv_dtype).itemsize,
            stored_head_dim=stored_head_dim(model.head_dim, platform),
            scale_bytes=scale_bytes(config.kv_dtype),
        )
    )
    return (
        f"{name}{model.family}, {_count(count_params(model))} parameters, {weights}, on {on}; "
        f"KV cache of {config.num_blocks * config.block_size:,} tokens, {config.kv_dtype}, {_size(cache_bytes)}; "
        f"context {config.max_context_len:,}"
    )


def _count(number: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def _size(num_bytes: int) -> str:
    for unit, power in (("GiB", 30), ("MiB", 20)):
        if num_bytes >= 1 << power:
            return f"{num_bytes / (1 << power):.1f} {unit}"
    return f"{num_bytes / 1024:.1f} KiB"
