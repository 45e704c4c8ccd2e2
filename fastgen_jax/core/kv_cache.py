"""Keys and values of every token that a sequence may still attend to, in blocks."""

from __future__ import annotations

from dataclasses import field, replace
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.pytree import pytree, static
from pallas_kernels.ragged_attention.quantized import QuantizedCache, is_quantized

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int32, Shaped


@pytree
class KVCache:
    """K and V of all layers as one flat pool of LN = L * N blocks each, plain or as a `QuantizedCache`.

    Layer l owns blocks [l * N, (l + 1) * N). Block tables and KV slots name blocks within a layer. One flat array is
    the form that no compiler copies, neither as the carry of a layer scan nor as a donated argument. With cache groups, L
    is the number of layers of a group, and layers of different groups use different blocks of the same row.
    """

    k: Float[Array, "LN K B _"] | QuantizedCache
    v: Float[Array, "LN K B D"] | QuantizedCache | None
    """None: values are in the rows of `k`, beside their keys (see `packed`) or as parts of them (`values_in_keys`)."""
    states: dict[str, Float[Array, "_ ..."]] = field(default_factory=dict)
    """What sequences hold beside their blocks: see `core.states`. Empty for most models."""
    chosen: Int32[Array, "T C"] | None = None
    """While the layers of a step run: the positions that each token attends to in the current layer. None otherwise."""
    values_in_keys: bool = static(default=False)
    """Whether values are the first numbers of their keys, as in latent attention, so that there is no `v`."""

    @staticmethod
    def zeros(
        *,
        num_layers: int,
        num_blocks: int,
        num_kv_heads: int,
        block_size: int,
        head_dim: int,
        dtype: DTypeLike,
        platform: str = "cpu",
        values_in_keys: bool = False,
    ) -> KVCache:
        """An empty cache of `num_blocks` blocks per layer, `block_size` tokens each, for heads of `head_dim` numbers."""
        packed = not values_in_keys and packs_heads(head_dim, platform)
        stored = stored_head_dim(head_dim, platform, values_in_keys=values_in_keys)
        shape = (num_layers * num_blocks, num_kv_heads, block_size, 2 * stored if packed else stored)

        def zeros() -> jax.Array | QuantizedCache:
            if is_quantized(dtype):
                return QuantizedCache.zeros(shape, dtype, scales_per_row=2 if packed else 1)
            return jnp.zeros(shape, dtype)

        return KVCache(k=zeros(), v=None if packed or values_in_keys else zeros(), values_in_keys=values_in_keys)

    @property
    def packed(self) -> bool:
        """Whether each row of `k` is a key and its value; see `packs_heads`."""
        return self.v is None and not self.values_in_keys

    @property
    def head_dim(self) -> int:
        """Numbers that are stored for a head: those of the model, and zeros."""
        return self.k.shape[-1] // (2 if self.packed else 1)

    def with_states(self, **states: Float[Array, "_ ..."]) -> KVCache:
        """The cache with some of its states replaced."""
        return replace(self, states={**self.states, **states})


def copy_block(cache: KVCache, source: Int32[Array, ""], target: Int32[Array, ""], *, num_blocks: int) -> KVCache:
    """The cache with block `source` of each layer copied to block `target`. Donate it: it is then changed in place."""

    def copied(pool: Shaped[Array, "LN ..."]) -> Shaped[Array, "LN ..."]:
        layers = pool.reshape(-1, num_blocks, *pool.shape[1:])  # [L, N, K, B, ...]
        block = jax.lax.dynamic_index_in_dim(layers, source, axis=1)
        return jax.lax.dynamic_update_index_in_dim(layers, block, target, axis=1).reshape(pool.shape)

    return replace(cache, k=jax.tree.map(copied, cache.k), v=jax.tree.map(copied, cache.v))


def scale_bytes(dtype: DTypeLike) -> int:
    """Bytes of the scale that a cache of this dtype has for each token, head, and K or V; 0 if it has none."""
    return jnp.dtype(jnp.float32).itemsize if is_quantized(dtype) else 0


def stored_head_dim(head_dim: int, platform: str, *, values_in_keys: bool = False) -> int:
    """Numbers that the cache stores for a head of `head_dim`: on a TPU 64, or a multiple of its 128 lanes.

    XLA:TPU would pad the minor axis to 128 in memory anyway, or store the pool transposed and copy it in every step.
    """
    if platform != "tpu":
        return head_dim
    return 64 if packs_heads(head_dim, platform) and not values_in_keys else -(-head_dim // 128) * 128


def packs_heads(head_dim: int, platform: str) -> bool:
    """Whether the cache stores a key and its value in one row: on a TPU, if both fit into its 128 lanes."""
    return platform == "tpu" and head_dim <= 64
