"""Attention that rotates queries and new keys itself, if `Scoring.rotation` says so."""

from __future__ import annotations

import dataclasses

import jax

from pallas_kernels.ragged_attention.arguments import Attention, CacheLayer, RaggedIndex, Results, Scoring
from pallas_kernels.ragged_attention.quantized import Cache
from pallas_kernels.rotary import rotate


def rotated(q: jax.Array, k: jax.Array, scoring: Scoring) -> tuple[jax.Array, jax.Array, Scoring]:
    """q [T, H, D] and k [T, K, D] after the rotation that `scoring` asks for, and `scoring` without it."""
    if scoring.rotation is None:
        return q, k, scoring
    row = scoring.rotation_row
    cos, sin = scoring.rotation if row is None else (table[row] for table in scoring.rotation)
    return rotate(q, cos, sin), rotate(k, cos, sin), dataclasses.replace(scoring, rotation=None, rotation_row=None)


def rotating(attention: Attention) -> Attention:
    """`attention`, which knows of no rotation, with one in front of it."""

    def attend(
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        k_cache: Cache,
        v_cache: Cache | None,
        index: RaggedIndex,
        layer: CacheLayer,
        scoring: Scoring,
    ) -> Results:
        q, k, scoring = rotated(q, k, scoring)
        return attention(q, k, v, k_cache, v_cache, index, layer, scoring)

    return attend
