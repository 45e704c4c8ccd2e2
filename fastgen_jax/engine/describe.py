"""An engine in one line, for its repr and that of a pipeline."""

from __future__ import annotations

import os

import jax

from fastgen_jax.engine import footprint, kept_forms
from fastgen_jax.engine.resolve import ResolvedConfig
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.counts import count_params


def describe(name: str, model: ModelConfig, config: ResolvedConfig) -> str:
    """Name, model, number formats, devices and the size of the KV cache."""
    name = f"{os.path.basename(name.rstrip('/'))!r}, " if name else ""
    weights = f"{config.dtype}, {config.quantize} weights" if config.quantize else config.dtype
    if config.kept_forms:
        forms = tuple(config.kept_forms.items())
        kept = kept_forms.counted(forms, model)
        weights += f", {kept_forms.people(kept)} weights in the {kept_forms.numbers_of(forms)} of the file"
    elif config.kept:
        weights += ", matrices in the blocks of the file"
    devices = jax.local_devices()[: config.tensor_parallel or 1]
    on = devices[0].device_kind if len(devices) == 1 else f"{len(devices)} x {devices[0].device_kind}"
    cache_bytes = config.num_blocks * footprint.block_bytes(
        model,
        jax.default_backend(),
        kv_dtype=config.kv_dtype,
        block_size=config.block_size,
        num_groups=len(config.windows),
        num_devices=config.tensor_parallel or 1,
    )
    return (
        f"{name}{model.family}, {kept_forms.people(count_params(model))} parameters, {weights}, on {on}; "
        f"KV cache of {config.cache_tokens:,} tokens, {config.kv_dtype}, {footprint.size(cache_bytes)}; "
        f"context {config.max_context_len:,}"
    )
