"""What requests add to their logits, forbid or penalize, before anything is drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp
from jax import lax

from fastgen_jax.engine.sampling import lanes
from fastgen_jax.engine.sampling.state import SamplerState
from fastgen_jax.engine.sampling.tables import SamplingBatch
from pallas_kernels import gpu_target

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float32, Int16


def adjusted(logits: Float32[Array, "R V"], state: SamplerState, batch: SamplingBatch) -> Float32[Array, "R V"]:
    """`logits` after penalties, bias, ban of stop tokens and token masks, as far as the flags of the batch ask for them."""

    def unchanged(logits: Float32[Array, "R V"], *_: object) -> Float32[Array, "R V"]:
        return logits

    logits = lax.cond(batch.any_penalties > 0, _penalized, unchanged, logits, state.token_counts, batch)
    logits = lax.cond(batch.any_bias > 0, _biased, unchanged, logits, state, batch)
    logits = lax.cond(batch.any_bans > 0, lambda x, _, b: _banned(x, b), unchanged, logits, state, batch)
    return lax.cond(batch.any_masks > 0, masked, unchanged, logits, state, batch)


def _penalized(
    logits: Float32[Array, "R V"], token_counts: Int16[Array, "S V"], batch: SamplingBatch
) -> Float32[Array, "R V"]:
    """Sources: CTRL (arXiv:1909.05858) for repetition, OpenAI's API for the other two."""
    counts = token_counts.at[batch.slots].get(mode="fill", fill_value=0)  # [R, V]
    penalty = batch.repetition_penalty[:, None]
    repeated = jnp.where(logits > 0, logits / penalty, logits * penalty)
    logits = jnp.where(counts > 0, repeated, logits)
    times = (counts >> 1).astype(jnp.float32)
    minus = batch.frequency_penalty[:, None] * times + batch.presence_penalty[:, None]
    return jnp.where(times > 0, logits - minus, logits)


def _biased(logits: Float32[Array, "R V"], state: SamplerState, batch: SamplingBatch) -> Float32[Array, "R V"]:
    slots = jnp.where(batch.has_bias > 0, batch.slots, state.bias_ids.shape[0])
    ids = state.bias_ids.at[slots].get(mode="fill", fill_value=logits.shape[1])
    values = state.bias_values.at[slots].get(mode="fill", fill_value=0)
    if gpu_target.platform() == "tpu":
        return lanes.add_at(logits, ids, values)
    rows = jnp.arange(logits.shape[0], dtype=jnp.int32)[:, None]
    return logits.at[rows, ids].add(values, mode="drop")


def _banned(logits: Float32[Array, "R V"], batch: SamplingBatch) -> Float32[Array, "R V"]:
    early = (batch.positions < batch.ban_before)[:, None]
    ids = jnp.where(early, batch.stop_ids, logits.shape[1])
    if gpu_target.platform() == "tpu":
        return jnp.where(lanes.is_any(ids, logits.shape[1]), -jnp.inf, logits)
    rows = jnp.arange(logits.shape[0], dtype=jnp.int32)[:, None]
    return logits.at[rows, ids].set(-jnp.inf, mode="drop")


def masked(logits: Float32[Array, "R V"], state: SamplerState, batch: SamplingBatch) -> Float32[Array, "R V"]:
    """`logits`, -inf for tokens that the mask of a row's sequence excludes."""
    slots = jnp.where(batch.has_mask > 0, batch.slots, state.token_masks.shape[0])
    words = state.token_masks.at[slots].get(mode="fill", fill_value=-1)  # [R, ceil(V / 32)]; all ones without a mask
    if gpu_target.platform() == "tpu":
        return jnp.where(lanes.bits(words, logits.shape[1]), logits, -jnp.inf)
    bits = (words[:, :, None] >> jnp.arange(32, dtype=jnp.int32)[None, None, :]) & 1  # [R, words, 32]
    return jnp.where(bits.reshape(logits.shape[0], -1)[:, : logits.shape[1]] > 0, logits, -jnp.inf)


def has_penalties(batch: SamplingBatch) -> Bool[Array, " R"]:
    return (batch.presence_penalty != 0) | (batch.frequency_penalty != 0) | (batch.repetition_penalty != 1)
