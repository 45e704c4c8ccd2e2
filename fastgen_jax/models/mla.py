"""Multi-head latent attention: what is cached of a token is one short vector that all heads share (arXiv:2405.04434).

A head's key is [k_up c | r] and its value v_up c, for the token's latent c and its rotated key r. Since
(q . k_up c) = (k_up' q) . c, the queries are taken to the latent space instead of the keys out of it, and the sum over
tokens is expanded to values once, afterwards. To the attention kernel it is one KV head, whose key is [c | r] and
whose value begins with c:

    queries  [k_up' q | q_rot]   of H heads     cached  [c | r], one head     result  v_up (sum of p c)

The cache keeps [c | r] as key and as value: twice what MLA needs, and a small part of what the expanded heads would.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fastgen_jax.models.layers import project, rms_norm
from fastgen_jax.models.moe_config import MLAConfig
from pallas_kernels.rotary import rotate

_NORM_EPS = 1e-6  # of the norms of latents, whatever the model's other norms use


def latent_heads(
    x: jax.Array,
    w: Mapping[str, Any],
    turn: tuple[jax.Array, jax.Array],
    *,
    config: MLAConfig,
    num_heads: int,
    num_tokens: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Queries [T, H, kv_rank + rope_dim] in the latent space, and what is cached of each token, [T, 1, ...] alike.

    Tokens from `num_tokens` on are padding.
    """
    c, n = config, x.shape[0]
    if c.q_rank is None:
        q = project(x, w, "q", num_rows=num_tokens)
    else:
        q = rms_norm(project(x, w, "q_a", num_rows=num_tokens), w["q_a_norm"], eps=_NORM_EPS)
        q = project(q, w, "q_b", num_rows=num_tokens)
    q = q.reshape(n, num_heads, c.nope_dim + c.rope_dim)
    k_up, _ = _expansions(w, config, num_heads)
    in_latent = jnp.einsum("thn,lhn->thl", q[..., : c.nope_dim], k_up, preferred_element_type=jnp.float32)
    q = jnp.concatenate([in_latent.astype(x.dtype), rotate(q[..., c.nope_dim :], *turn)], axis=-1)
    kv = project(x, w, "kv_a", num_rows=num_tokens)  # [T, kv_rank + rope_dim]
    latent = rms_norm(kv[:, : c.kv_rank], w["kv_a_norm"], eps=_NORM_EPS)
    return q, jnp.concatenate([latent[:, None], rotate(kv[:, None, c.kv_rank :], *turn)], axis=-1)


def expand_values(out: jax.Array, w: Mapping[str, Any], *, config: MLAConfig) -> jax.Array:
    """The heads' values [T, H, v_dim] from what attention summed up, [T, H, kv_rank + rope_dim]."""
    _, v_up = _expansions(w, config, out.shape[1])
    summed = out[..., : config.kv_rank]
    return jnp.einsum("thl,lhv->thv", summed, v_up, preferred_element_type=jnp.float32).astype(out.dtype)


def _expansions(w: Mapping[str, Any], config: MLAConfig, num_heads: int) -> tuple[jax.Array, jax.Array]:
    """k_up [kv_rank, H, nope_dim] and v_up [kv_rank, H, v_dim]."""
    both = w["kv_b"].reshape(config.kv_rank, num_heads, config.nope_dim + config.v_dim)
    return both[..., : config.nope_dim], both[..., config.nope_dim :]
