"""The types that travel to the device: plain frozen pytrees of arrays."""

from fastgen_jax.core.batch import RaggedBatch
from fastgen_jax.core.images import StepImages
from fastgen_jax.core.kv_cache import KVCache, copy_block, packs_heads, scale_bytes, stored_head_dim
from fastgen_jax.core.states import StateShapes

__all__ = [
    "KVCache",
    "RaggedBatch",
    "StateShapes",
    "StepImages",
    "copy_block",
    "packs_heads",
    "scale_bytes",
    "stored_head_dim",
]
