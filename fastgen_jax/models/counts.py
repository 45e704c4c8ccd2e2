"""Number of parameters of a model, and its arithmetic per token."""

from __future__ import annotations

import math

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.params import head_spec, layer_specs, model_specs
from fastgen_jax.models.weight_spec import Kind


def count_params(config: ModelConfig) -> int:
    """Number of parameters; a tied embedding counts once."""
    layers = [spec for i in range(config.num_layers) for spec in layer_specs(config, i).values()]
    return sum(math.prod(spec.shape) for spec in (*model_specs(config).values(), *layers))


def count_products(config: ModelConfig, *, sampled: bool) -> int:
    """Multiplications of one token with weight matrices; the vocabulary head counts only if the token is `sampled`."""
    total = math.prod(head_spec(config).shape) if sampled else 0
    if config.embed_proj_dim is not None:
        total += config.embed_dim * config.embed_proj_dim * (1 + sampled)
    for layer in range(config.num_layers):
        for spec in layer_specs(config, layer).values():
            if spec.kind is Kind.EXPERTS:
                assert config.moe is not None, "only a model with experts has a stack of them"
                total += math.prod(spec.shape) * config.moe.experts_per_token // config.moe.num_experts
            elif spec.is_product:
                total += math.prod(spec.shape)
    return total


def flops_per_token(config: ModelConfig, *, context_len: int = 0, sampled: bool = True) -> float:
    """Floating-point operations of one token: matrix products, attention, and the row of logits if `sampled`."""
    attention = 2 * context_len * config.num_heads * config.head_dim
    return 2.0 * (count_products(config, sampled=sampled) + len(config.attending_layers) * attention)
