"""Prefix caching for a sequence: finds cached blocks before it runs, and registers its full blocks."""

from __future__ import annotations

from fastgen_jax.scheduling.block_pool import BlockPool
from fastgen_jax.scheduling.images import content_of
from fastgen_jax.scheduling.sequence import Sequence


def cached_prefix(sequence: Sequence, pool: BlockPool) -> list[int]:
    """The registered blocks that it can start after: of known tokens, before the first position whose logits are needed."""
    if not pool.prefix_caching:
        return []
    stop = min(sequence.first_row, sequence.num_known_tokens)  # tokens in flight have no digest yet
    return pool.lookup(_digest(sequence, pool, i) for i in range(stop // pool.block_size))


def register_blocks(sequence: Sequence, pool: BlockPool) -> None:
    """Registers the full blocks whose tokens are known and whose KV is dispatched."""
    size = pool.block_size
    stop = min(sequence.num_computed, sequence.num_known_tokens)
    while sequence.next_block_end <= stop:
        index = sequence.next_block_end // size - 1
        pool.register(sequence.block_ids[index], _digest(sequence, pool, index))
        sequence.next_block_end += size


def _digest(sequence: Sequence, pool: BlockPool, index: int) -> bytes:
    """The digest of a full block of known tokens. Ask for the digests in order."""
    digests, size = sequence.block_digests, pool.block_size
    if index == len(digests):
        parent = digests[-1] if digests else pool.root(sequence.request.cache_salt)
        start, stop = index * size, (index + 1) * size
        images = sequence.request.images
        shown = content_of(images, start, stop) if images else b""
        digests.append(pool.digest(parent, sequence.token_ids(start, stop), shown))
    return digests[index]
