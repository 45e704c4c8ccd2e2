"""Direct preference optimization (arXiv:2305.18290)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.weight_spec import Params
from fastgen_jax.training.batch import TrainingBatch
from fastgen_jax.training.forward import DEFAULTS, Options, logprobs
from fastgen_jax.training.update import Metrics


def dpo_loss(
    params: Params,
    batch: TrainingBatch,
    reference: jax.Array,
    *,
    config: ModelConfig,
    beta: float = 0.1,
    options: Options = DEFAULTS,
) -> tuple[jax.Array, Metrics]:
    """The loss of pairs of answers: sequences 0, 2, 4, ... of `batch` are preferred to the ones after them.

    `reference` f32[R] is what `logprobs` returns for the batch and the weights of before the training. `beta` is the
    strength with which these are held on to.
    """
    s = batch.num_sequences
    if s % 2:
        raise ValueError(
            f"the batch has {s} sequences, but needs pairs; pass the preferred and the rejected answer in turns"
        )
    change = batch.sums(logprobs(params, batch, config=config, options=options) - reference)
    preferred, rejected = jnp.moveaxis(change.reshape(s // 2, 2), 1, 0)
    is_pair = batch.ragged.index.context_lens[::2] > 0
    count = jnp.maximum(jnp.sum(is_pair, dtype=jnp.float32), 1.0)
    margins = beta * (preferred - rejected)
    loss = -jnp.sum(jnp.where(is_pair, jax.nn.log_sigmoid(margins), 0.0)) / count
    return loss, {
        "accuracy": jnp.sum(is_pair & (margins > 0), dtype=jnp.float32) / count,
        "margin": jnp.sum(jnp.where(is_pair, margins, 0.0)) / count,
    }
