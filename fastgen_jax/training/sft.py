"""Supervised fine-tuning."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.weight_spec import Params
from fastgen_jax.training.batch import TrainingBatch
from fastgen_jax.training.forward import DEFAULTS, Options, logprobs
from fastgen_jax.training.update import Metrics


def sft_loss(
    params: Params,
    batch: TrainingBatch,
    weights: jax.Array | None = None,
    *,
    config: ModelConfig,
    options: Options = DEFAULTS,
) -> tuple[jax.Array, Metrics]:
    """Cross-entropy in nats per predicted token of `batch`, averaged with `weights` f32[R] (None: all the same)."""
    share = batch.is_used.astype(jnp.float32) if weights is None else jnp.where(batch.is_used, weights, 0.0)
    share = share / jnp.maximum(jnp.sum(share), 1e-9)
    loss = -jnp.sum(share * logprobs(params, batch, config=config, options=options))
    return loss, {"perplexity": jnp.exp(loss)}
