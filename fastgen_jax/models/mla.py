"""Multi-head latent attention: the cache holds one short vector per token that all heads share (arXiv:2405.04434).

A head's key is [k_up c | r] and its value v_up c, for the token's latent c and its rotated key r. Since
(q . k_up c) = (k_up' q) . c, queries are projected into the latent space instead of keys out of it, and the weighted
sum over tokens is expanded to values afterwards, once. The attention kernel sees one KV head, with the key [c | r] and a
value that begins with c:

    queries  [k_up' q | q_rot]   of H heads     cached  [c | r], one head     result  v_up (sum of p c)

The cache keeps [c | r] once, as the key. In models with an indexer it also keeps a value [c | index key]; see `sparse`.
Kernels that know of latents read one of the two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from fastgen_jax.models.layers import project
from fastgen_jax.models.moe_config import MLAConfig
from fastgen_jax.models.weight_spec import LayerWeights
from pallas_kernels.grouped_matmul import GroupedWeight, PackedGroups, PairedGroups, grouped_matmul
from pallas_kernels.norm import rms_norm
from pallas_kernels.pytree import pytree
from pallas_kernels.ragged_attention import Latents
from pallas_kernels.rotary import rotate

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

AnyArray = TypeVar("AnyArray", np.ndarray, jax.Array)
_NORM_EPS = 1e-6  # for the norms of latents, regardless of the model's other norms


def latents_of(config: MLAConfig | None) -> Latents | None:
    """What attention is told of keys and values that are parts of the same rows."""
    return None if config is None else Latents(key_dim=config.kv_rank + config.rope_dim, value_dim=config.kv_rank)


def latent_heads(
    x: Float[Array, "T E"],
    w: LayerWeights,
    turn: tuple[Float[Array, "T half"], Float[Array, "T half"]],
    *,
    config: MLAConfig,
    num_heads: int,
    num_tokens: Int[Array, ""],
) -> tuple[Float[Array, "T H D"], Float[Array, "T 1 D"], Float[Array, "T q_rank"] | None]:
    """Queries in the latent space, the vector to cache for each token, and the latents of queries if there are any.

    D is kv_rank + rope_dim. With an indexer it is wider, and the rest is zero. Tokens from `num_tokens` on are padding.
    """
    c, n = config, x.shape[0]
    q_latent = None
    if c.q_rank is None:
        q = project(x, w, "q", num_rows=num_tokens)
    else:
        q_latent = rms_norm(project(x, w, "q_a", num_rows=num_tokens), w["q_a_norm"], eps=_NORM_EPS, num_rows=num_tokens)
        q = project(q_latent, w, "q_b", num_rows=num_tokens)
    q = q.reshape(n, num_heads, c.nope_dim + c.rope_dim)
    in_latent = _by_head(q[..., : c.nope_dim], expansions(w["kv_b"], c, num_heads).k_up, num_tokens)
    q = [in_latent.astype(x.dtype), rotate(q[..., c.nope_dim :], *turn)]
    kv = project(x, w, "kv_a", num_rows=num_tokens)  # [T, kv_rank + rope_dim]
    latent = rms_norm(kv[:, : c.kv_rank], w["kv_a_norm"], eps=_NORM_EPS, num_rows=num_tokens)
    cached = [latent[:, None], rotate(kv[:, None, c.kv_rank :], *turn)]
    if c.beside_latent > c.rope_dim:
        q, cached = (
            [*parts, jnp.zeros((n, heads, c.beside_latent - c.rope_dim), x.dtype)]
            for parts, heads in ((q, num_heads), (cached, 1))
        )
    return jnp.concatenate(q, axis=-1), jnp.concatenate(cached, axis=-1), q_latent


def expand_values(
    out: Float[Array, "T H D"], w: LayerWeights, *, config: MLAConfig, num_tokens: Int[Array, ""]
) -> Float[Array, "T H v_dim"]:
    """The heads' values from the latent sums of attention, with which the D numbers of a head begin.

    Tokens from `num_tokens` on are padding.
    """
    v_up = expansions(w["kv_b"], config, out.shape[1]).v_up
    return _by_head(out[..., : config.kv_rank], v_up, num_tokens).astype(out.dtype)


@pytree
class Expansions:
    """The matrices between the latent space and the heads, one per head."""

    k_up: GroupedWeight | PairedGroups
    """[H, nope_dim, kv_rank], projects queries into the latent space."""
    v_up: GroupedWeight | PairedGroups
    """[H, kv_rank, v_dim], projects values out of it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the `kv_b` that they were made from: [kv_rank, H * (nope_dim + v_dim)], or a stack over layers."""
        *layers, heads, nope_dim, kv_rank = self.k_up.shape
        return *layers, kv_rank, heads * (nope_dim + self.v_up.shape[-1])


def expansions(kv_b: Float[Array, "rank columns"] | Expansions, config: MLAConfig, num_heads: int) -> Expansions:
    """The expansions in a checkpoint's `kv_b` [kv_rank, H * (nope_dim + v_dim)], or `kv_b` if it is `Expansions` already."""
    if isinstance(kv_b, Expansions):
        return kv_b
    k_up, v_up = split_by_head(kv_b, config, num_heads)
    return Expansions(k_up=k_up, v_up=v_up)


def split_by_head(kv_b: AnyArray, config: MLAConfig, num_heads: int) -> tuple[AnyArray, AnyArray]:
    """The `k_up` and `v_up` of `Expansions` in a checkpoint's `kv_b` [kv_rank, H * (nope_dim + v_dim)]."""
    both = kv_b.reshape(config.kv_rank, num_heads, config.nope_dim + config.v_dim)
    k_up, v_up = both[..., : config.nope_dim], both[..., config.nope_dim :]
    return k_up.transpose(1, 2, 0), v_up.transpose(1, 0, 2)


def _by_head(x: Float[Array, "T H M"], w: GroupedWeight | PairedGroups, num_tokens: Int[Array, ""]) -> Float[Array, "T H N"]:
    """In float32: `x` times the matrix of each head [H, M, N]."""
    if isinstance(w, PairedGroups):
        return _paired_by_head(x, w, num_tokens)
    if isinstance(w, PackedGroups):
        return _packed_by_head(x, w, num_tokens)
    assert isinstance(w, jax.Array), "it is never quantized"
    return _plain_by_head(x, w)


def _plain_by_head(x: Float[Array, "T H M"], w: Float[Array, "H M N"]) -> Float[Array, "T H N"]:
    return jnp.einsum("thm,hmn->thn", x, w, preferred_element_type=jnp.float32)


@jax.custom_jvp
def _paired_by_head(x: Float[Array, "T H M"], w: PairedGroups, num_tokens: Int[Array, ""]) -> Float[Array, "T H N"]:
    """The packed product, with the derivative of the plain one, which is cheaper than that of a grouped product."""
    return _packed_by_head(x, w.packed, num_tokens)


@_paired_by_head.defjvp
def _paired_derivative(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    x, w, _ = primals
    plain = w.plain.astype(x.dtype)
    tangent = jax.jvp(_plain_by_head, (x, plain), (tangents[0], tangents[1].plain.astype(x.dtype)))[1]
    return _paired_by_head(*primals), tangent


def _packed_by_head(x: Float[Array, "T H M"], w: PackedGroups, num_tokens: Int[Array, ""]) -> Float[Array, "T H N"]:
    tokens, heads, width = x.shape
    # Rows sorted by head, without padding:  t0 t1 of head 0 | t0 t1 of head 1 | ...
    row = jnp.arange(tokens * heads, dtype=jnp.int32)
    used = jnp.maximum(num_tokens, 1)
    rows = jnp.take(x.reshape(-1, width), row % used * heads + row // used, axis=0, mode="clip")
    y = grouped_matmul(rows, w, jnp.full(heads, num_tokens, jnp.int32), out_dtype=jnp.float32)
    back = row % heads * used + row // heads
    return jnp.take(y, back, axis=0, mode="clip").reshape(tokens, heads, -1)
