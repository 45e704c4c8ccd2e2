"""Token sequences as one packed batch: what the trainable forward pass computes at a time."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fastgen_jax.core import RaggedBatch
from pallas_kernels.pytree import pytree
from pallas_kernels.ragged_attention import RaggedIndex


@pytree
class TrainingBatch:
    """Whole sequences, one after another, and the predictions that are wanted of them.

        tokens       [ a0 a1 a2 a3 | b0 b1 b2 | - ]      T = 8
        rows         [ a1 a2 b0 b1 - - ]                 R = 6: the prompts are a0 a1 and b0
        targets      [ a2 a3 b1 b2 - - ]
        sequences    [  0  0  1  1 2 2 ]                 S = 2, also the number of padding

    Numbers for each predicted token, such as an advantage, are arrays [R]; see `per_row`.
    """

    ragged: RaggedBatch
    """The tokens, and in `sample_rows` the rows whose next tokens are predicted."""
    targets: jax.Array
    """i32[R]: the tokens to predict."""
    sequences: jax.Array
    """i32[R]: the sequence of each row; S for padding, which comes last."""

    @property
    def is_used(self) -> jax.Array:
        """bool[R]: False for padding."""
        return jnp.arange(self.targets.shape[0]) < self.ragged.num_sample_rows

    @property
    def num_sequences(self) -> int:
        """S, including unused ones."""
        return self.ragged.index.context_lens.shape[0]

    def sums(self, values: jax.Array) -> jax.Array:
        """f32[S]: the sums over each sequence's rows of `values` f32[R]."""
        # Not a scatter-add, whose order of summation is not defined on every platform.
        mine = self.sequences[None, :] == jnp.arange(self.num_sequences, dtype=jnp.int32)[:, None]
        return jnp.sum(jnp.where(mine, values[None, :], 0.0), axis=1)


def pack(
    sequences: Sequence[Sequence[int]],
    prompt_lengths: Sequence[int] | None = None,
    *,
    num_tokens: int | None = None,
    num_rows: int | None = None,
    num_sequences: int | None = None,
) -> TrainingBatch:
    """A batch of `sequences` that predicts each one's tokens after its prompt, or all but the first without prompts.

    `num_tokens`, `num_rows` and `num_sequences` are the sizes T, R and S to pad to, so that batches of different lengths
    share one compiled program. Raises ValueError if a sequence is empty, a prompt is not shorter than its sequence or empty,
    or something does not fit.
    """
    prompts = [1] * len(sequences) if prompt_lengths is None else list(map(int, prompt_lengths))
    if not sequences or len(prompts) != len(sequences):
        raise ValueError(
            f"{len(sequences)} sequences and {len(prompts)} prompt lengths; pass at least one, and one length each"
        )
    for i, (tokens, prompt) in enumerate(zip(sequences, prompts, strict=True)):
        if not 1 <= prompt <= len(tokens):
            raise ValueError(
                f"prompt_lengths[{i}] is {prompt}, but sequences[{i}] has {len(tokens)} tokens; a prompt has at least "
                "one token and is part of its sequence"
            )
    lengths = np.array([len(tokens) for tokens in sequences], np.int32)
    answers = lengths - np.array(prompts, np.int32)
    sizes = {
        "num_tokens": (num_tokens, int(lengths.sum())),
        "num_rows": (num_rows, int(answers.sum())),
        "num_sequences": (num_sequences, len(sequences)),
    }
    for name, (size, needed) in sizes.items():
        if size is not None and size < needed:
            raise ValueError(f"{name} is {size}, but these sequences need {needed}; increase it or pass fewer sequences")
    t, r, s = (max(needed if size is None else size, 1) for size, needed in sizes.values())

    def padded(values: np.ndarray, size: int, fill: int = 0) -> np.ndarray:
        return np.concatenate([values, np.full(size - len(values), fill)]).astype(np.int32)

    starts = np.cumsum(lengths) - lengths
    token_ids = np.concatenate([np.asarray(tokens, np.int32) for tokens in sequences])
    of_token = np.repeat(np.arange(len(sequences)), lengths)
    positions = np.arange(len(token_ids)) - starts[of_token]
    is_row = (positions + 1 >= np.array(prompts)[of_token]) & (positions + 1 < lengths[of_token])
    rows = np.flatnonzero(is_row)
    # As the engine does it: see `engine.packing`.
    rope_lengths = np.maximum(positions + 1, np.array(prompts)[of_token])
    arrays = (
        padded(token_ids, t),
        padded(positions, t),
        padded(rope_lengths, t),
        padded(np.append(starts, len(token_ids)), s + 1, fill=len(token_ids)),
        padded(rows, r),
    )
    ragged = _ragged(*map(jnp.asarray, arrays), num_rows=jnp.asarray(len(rows), jnp.int32))
    return TrainingBatch(
        ragged=ragged,
        targets=jnp.asarray(padded(token_ids[rows + 1], r)),
        sequences=jnp.asarray(padded(of_token[rows], r, fill=s)),
    )


def padded_batch(token_ids: jax.Array) -> TrainingBatch:
    """A batch of `token_ids` i32[S, P], rows padded on the right, that predicts all tokens but the first ones.

    Predictions are in the order of the rows: R = S * (P - 1). Those of padding have no meaning; give them no weight.
    (They cost time: `pack` leaves padding out.) It may be called within a program.
    """
    s, p = token_ids.shape
    position = jnp.tile(jnp.arange(p, dtype=jnp.int32), s)
    start = jnp.arange(s + 1, dtype=jnp.int32) * p
    rows = (start[:-1, None] + jnp.arange(p - 1, dtype=jnp.int32)[None, :]).reshape(-1)
    num_rows = jnp.asarray(s * (p - 1), jnp.int32)
    return TrainingBatch(
        ragged=_ragged(token_ids.reshape(-1).astype(jnp.int32), position, position + 1, start, rows, num_rows=num_rows),
        targets=token_ids[:, 1:].reshape(-1).astype(jnp.int32),
        sequences=jnp.repeat(jnp.arange(s, dtype=jnp.int32), p - 1),
    )


def per_row(values: Sequence[Sequence[float]] | np.ndarray, batch: TrainingBatch) -> jax.Array:
    """f32[R]: numbers for the predicted tokens of each sequence, in the rows of `batch`; a single number is repeated."""
    counts = np.bincount(np.asarray(batch.sequences), minlength=len(values))
    parts = [np.broadcast_to(np.asarray(x, np.float32), (counts[i],)) for i, x in enumerate(values)]
    row = np.zeros(batch.targets.shape[0], np.float32)
    flat = np.concatenate(parts)
    row[: len(flat)] = flat
    return jnp.asarray(row)


def _ragged(
    token_ids: jax.Array,
    positions: jax.Array,
    rope_lengths: jax.Array,
    query_starts: jax.Array,
    rows: jax.Array,
    *,
    num_rows: jax.Array,
) -> RaggedBatch:
    """The engine's batch, without a cache: no block tables, and no tokens that wait on the device."""
    nothing = jnp.zeros_like(token_ids)
    return RaggedBatch(
        token_ids=token_ids,
        token_slots=nothing,
        positions=positions,
        rope_lengths=rope_lengths,
        index=RaggedIndex(
            kv_slots=nothing,
            query_starts=query_starts,
            context_lens=query_starts[1:] - query_starts[:-1],
            block_tables=jnp.zeros((query_starts.shape[0] - 1, 0), jnp.int32),
        ),
        sample_rows=rows,
        num_sample_rows=num_rows,
    )
