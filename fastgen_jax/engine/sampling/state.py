"""The sampler's state for each sequence between steps, kept on the device and written by a few compiled programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from fastgen_jax.scheduling.request import MAX_LOGIT_BIAS_ENTRIES
from pallas_kernels.pytree import pytree

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float32, Int16, Int32

MASKS_PER_CALL = 8  # rows of token masks in one call, enough for a typical load
HISTORY_PIECE = 2048  # tokens of a history in one call: one or two calls for most prompts, 0.3 ms each on a CPU
MAX_TIMES = 2**14 - 1  # counts stop here: 2 * MAX_TIMES + 1 is the largest int16


@pytree
class SamplerState:
    """The sampler's state for each sequence, on the device; donated to every step."""

    last_tokens: Int32[Array, " S"]
    """The token sampled last."""
    token_counts: Int16[Array, "S V"]
    """Twice the number of times a token was generated, plus 1 if the prompt contains it. Maintained for rows with
    penalties."""
    bias_ids: Int32[Array, "S 300"]
    """Tokens with a logit bias; V in unused entries."""
    bias_values: Float32[Array, "S 300"]
    token_masks: Int32[Array, "S words"]
    """Bit v % 32 of word v // 32 is 1 if token v may come next. Read for rows with a mask."""


def init_state(max_num_seqs: int, vocab_size: int, *, on_host: bool = False) -> SamplerState:
    """The state of `max_num_seqs` unused slots; 2.125 * vocab_size + 2404 bytes each.

    `on_host` makes it without compiling anything, which takes longer than copying it to a device.
    """
    xp: Any = np if on_host else jnp
    state = SamplerState(
        last_tokens=xp.zeros(max_num_seqs, jnp.int32),
        token_counts=xp.zeros((max_num_seqs, vocab_size), jnp.int16),
        bias_ids=xp.full((max_num_seqs, MAX_LOGIT_BIAS_ENTRIES), vocab_size, jnp.int32),
        bias_values=xp.zeros((max_num_seqs, MAX_LOGIT_BIAS_ENTRIES), jnp.float32),
        token_masks=xp.zeros((max_num_seqs, -(-vocab_size // 32)), jnp.int32),
    )
    return jax.device_put(state) if on_host else state


def set_masks(state: SamplerState, slots: Sequence[int], masks: Int32[np.ndarray, "n words"]) -> SamplerState:
    """The state with new token masks for n slots; donates `state`.

    They apply until they are set again. One compiled program serves any n, `MASKS_PER_CALL` rows per call.
    """
    for start in range(0, len(slots), MASKS_PER_CALL):
        rows = np.full(MASKS_PER_CALL, state.token_masks.shape[0], np.int32)
        words = np.zeros((MASKS_PER_CALL, state.token_masks.shape[1]), np.int32)
        part = slots[start : start + MASKS_PER_CALL]
        rows[: len(part)], words[: len(part)] = part, masks[start : start + MASKS_PER_CALL]
        state = _write_masks(state, rows, words)
    return state


@partial(jax.jit, donate_argnums=0)
def _write_masks(state: SamplerState, slots: Int32[Array, " n"], masks: Int32[Array, "n words"]) -> SamplerState:
    return replace(state, token_masks=state.token_masks.at[slots].set(masks, mode="drop"))


def reset_slot(
    state: SamplerState,
    slot: int,
    *,
    prompt_ids: Sequence[int],
    output_ids: Sequence[int],
    logit_bias: Sequence[tuple[int, float]],
) -> SamplerState:
    """The state with the history and the logit bias of the sequence that gets `slot`; donates `state`.

    Needed only for a sequence with penalties or bias, each time it gets a slot; `output_ids` are the tokens that it
    generated before a preemption. One compiled program serves any lengths, `HISTORY_PIECE` tokens per call.
    """
    vocab_size = state.token_counts.shape[1]
    bias_ids = np.full(MAX_LOGIT_BIAS_ENTRIES, vocab_size, np.int32)
    bias_values = np.zeros(MAX_LOGIT_BIAS_ENTRIES, np.float32)
    bias_ids[: len(logit_bias)] = [token_id for token_id, _ in logit_bias]
    bias_values[: len(logit_bias)] = [bias for _, bias in logit_bias]
    for start in range(0, max(len(prompt_ids), len(output_ids), 1), HISTORY_PIECE):
        prompt, output = np.full((2, HISTORY_PIECE), vocab_size, np.int32)
        for piece, ids in ((prompt, prompt_ids), (output, output_ids)):
            part = ids[start : start + HISTORY_PIECE]
            piece[: len(part)] = part
        is_first = np.bool_(start == 0)
        state = _add_history(state, np.int32(slot), prompt, output, bias_ids, bias_values, is_first)
    return state


@partial(jax.jit, donate_argnums=0)
def _add_history(
    state: SamplerState,
    slot: Int32[Array, ""],
    prompt_ids: Int32[Array, " n"],
    output_ids: Int32[Array, " n"],
    bias_ids: Int32[Array, " 300"],
    bias_values: Float32[Array, " 300"],
    is_first: Bool[Array, ""],
) -> SamplerState:
    vocab_size = state.token_counts.shape[1]
    before = jnp.where(is_first, jnp.int16(0), state.token_counts[slot])
    in_prompt = jnp.zeros(vocab_size, jnp.int16).at[prompt_ids].set(1, mode="drop")
    times = jnp.zeros(vocab_size, jnp.int32).at[output_ids].add(2, mode="drop")
    counts = (before | in_prompt).astype(jnp.int32)
    counts = jnp.minimum(counts + times, 2 * MAX_TIMES + (counts & 1))
    return replace(
        state,
        token_counts=state.token_counts.at[slot].set(counts.astype(jnp.int16)),
        bias_ids=state.bias_ids.at[slot].set(bias_ids),
        bias_values=state.bias_values.at[slot].set(bias_values),
    )
