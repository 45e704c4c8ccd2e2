"""Rotary position embeddings and the scalings that extend them to longer contexts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from fastgen_jax.models.config import RopeConfig

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Float32, Int

Rotation = tuple[jax.Array, jax.Array]
"""Cosines and sines f32[T, R/2]."""


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Float32[np.ndarray, " half"]:
    """Radians per position of each rotated pair, f32[R/2], for every scaling that does not depend on the length.

    R is `rope.dim`, or all of `head_dim`. Sources: RoPE (arXiv:2104.09864), position interpolation (arXiv:2306.15595)
    for `linear`, YaRN (arXiv:2309.00071), and the Llama 3.1 release for `llama3`. The kinds that depend on the length
    return the unscaled values.
    """
    head_dim = rope.dim or head_dim
    exponent = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    base = 1.0 / rope.theta**exponent
    if rope.kind == "linear":
        base = base / rope.factor
    elif rope.kind == "llama3":
        base = _llama3(base, rope)
    elif rope.kind == "yarn":
        base = _yarn(base, rope, head_dim)
    if rope.unrotated:
        base[-rope.unrotated :] = 0.0
    return base.astype(np.float32)


def rotation(
    positions: Int[Array, " T"] | Int[Array, "3 T"], rope_lengths: Int[Array, " T"], *, rope: RopeConfig, head_dim: int
) -> tuple[Float[Array, "T half"], Float[Array, "T half"]]:
    """Cosines and sines in float32 of the angles at `positions`, for each rotated pair of a head.

    With three streams of positions, a pair takes the one of its section. `rope_lengths` matters only to the scalings that
    depend on the length. It is the length of the sequence as the request states it, so the angles do not depend on how a
    prompt is split.
    """
    # float32 until after sin and cos: bfloat16 has 8 significant bits, so angles would collide from position 257 on.
    if positions.ndim == 1:
        position = positions.astype(jnp.float32)[:, None]
    else:
        position = positions.astype(jnp.float32)[streams(rope, head_dim)].T
    if rope.kind in ("dynamic", "stepped_ntk"):
        frequency = _stretched_theta(rope_lengths, rope, rope.dim or head_dim)  # [T, R/2]
    elif rope.kind == "longrope":
        frequency = _longrope(rope_lengths, rope, head_dim)  # [T, R/2]
    else:
        frequency = jnp.asarray(inverse_frequencies(rope, head_dim))[None, :]
    angle = position * frequency
    scale = attention_factor(rope)
    return jnp.cos(angle) * scale, jnp.sin(angle) * scale


def streams(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Which of time (0), row (1) and column (2) rotates each pair of a head.

    Raises ValueError if the sections of `rope` are not those of three streams.
    """
    half, sections = (rope.dim or head_dim) // 2, rope.sections
    if len(sections) != 3 or sum(sections) != half:
        raise ValueError(
            f"mrope_section is {list(sections)}; for images it must have three numbers whose sum is the {half} rotated "
            "pairs of a head; images=False loads the text model"
        )
    if not rope.sections_interleaved:
        return np.repeat(np.arange(3), sections)
    found = np.zeros(half, np.int64)
    for stream in (1, 2):
        found[stream : 3 * sections[stream] : 3] = stream
    return found


def attention_factor(rope: RopeConfig) -> float:
    """Factor of cos and sin that sharpens attention over a longer context in YaRN and LongRoPE; 1.0 for other kinds."""
    if rope.kind not in ("yarn", "longrope"):
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.kind == "longrope":
        assert rope.original_max_position is not None  # checked by RopeConfig
        return math.sqrt(1.0 + math.log(rope.factor) / math.log(rope.original_max_position))

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(rope.factor) + 1.0 if rope.factor > 1.0 else 1.0

    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)


def _stretched_theta(lengths: Int[Array, " T"], rope: RopeConfig, dim: int) -> Float[Array, "T half"]:
    """NTK-aware scaling: theta grows with the length, smoothly (`dynamic`) or each time it doubles (`stepped_ntk`, Qwen)."""
    original = rope.original_max_position
    assert original is not None  # checked by RopeConfig
    if rope.kind == "dynamic":
        length = jnp.maximum(lengths, original).astype(jnp.float32)
        growth = rope.factor * length / original - (rope.factor - 1.0)
    else:  # 1 up to the original length, 3 up to twice that length, 7 up to four times, ...
        limits = np.array([limit for k in range(31) if (limit := original << k) <= np.iinfo(np.int32).max], np.int32)
        doublings = jnp.sum(lengths[:, None] > limits[None, :], axis=1)
        growth = 2.0 ** (doublings + 1).astype(jnp.float32) - 1.0
    theta = rope.theta * growth ** (dim / (dim - 2))  # [T]
    exponent = jnp.arange(0, dim, 2, dtype=jnp.float32) / dim
    return theta[:, None] ** -exponent[None, :]


def _longrope(lengths: Int[Array, " T"], rope: RopeConfig, head_dim: int) -> Float[Array, "T half"]:
    """One divisor per frequency, from one of two tables (arXiv:2402.13753)."""
    assert rope.original_max_position is not None
    base = inverse_frequencies(rope, head_dim)
    short, long = (jnp.asarray(base / np.asarray(factor), jnp.float32) for factor in (rope.short_factor, rope.long_factor))
    return jnp.where((lengths > rope.original_max_position)[:, None], long[None, :], short[None, :])


def _llama3(base: np.ndarray, rope: RopeConfig) -> np.ndarray:
    """Long wavelengths are stretched by `factor`, short ones are kept, those in between are interpolated."""
    assert rope.original_max_position is not None
    turns = rope.original_max_position * base / (2 * math.pi)  # over the original context
    low, high = rope.low_freq_factor, rope.high_freq_factor
    blend = np.clip((turns - low) / (high - low), 0.0, 1.0) if high > low else np.where(turns > low, 1.0, 0.0)
    return base * (blend + (1.0 - blend) / rope.factor)


def _yarn(base: np.ndarray, rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Like llama3, but interpolated over the index of the dimension instead of its number of rotations."""
    assert rope.original_max_position is not None
    original = rope.original_max_position

    def dimension_with(turns: float) -> float:
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension_with(rope.beta_fast), dimension_with(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # a step instead of a ramp, without dividing by zero
    stretched = np.clip((np.arange(head_dim // 2) - low) / (high - low), 0.0, 1.0)
    return base * (1.0 - stretched) + base / rope.factor * stretched
