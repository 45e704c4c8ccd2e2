"""Prefix caching for a sequence: finds cached blocks before it runs, and registers its full blocks."""

from __future__ import annotations

from typing import NamedTuple

from fastgen_jax.scheduling.block_pool import BlockPool
from fastgen_jax.scheduling.groups import BlockGroups
from fastgen_jax.scheduling.images import content_of
from fastgen_jax.scheduling.sequence import NEVER, Sequence


class Prefix(NamedTuple):
    """The registered blocks that a waiting sequence can start after: `num_blocks` blocks of positions.

    `tables` has the blocks of each cache group; of a windowed group only the last ones, which later queries can see.
    Empty if nothing is cached.
    """

    num_blocks: int = 0
    tables: tuple[list[int], ...] = ()

    @property
    def block_ids(self) -> list[int]:
        """The blocks of all groups."""
        return self.tables[0] if len(self.tables) == 1 else [block_id for table in self.tables for block_id in table]


def cached_prefix(sequence: Sequence, pool: BlockPool, groups: BlockGroups, *, unit: int = 1) -> Prefix:
    """The longest cached prefix: of known tokens, before the first position whose logits are needed, in `unit`s of blocks.

    Groups without a window must have all blocks of it, the others those that a query after it can see.
    """
    if not pool.prefix_caching:
        return Prefix()
    # Tokens in flight have no digest yet.
    stop = min(sequence.first_row, sequence.num_known_tokens, sequence.num_shareable) // pool.block_size
    digests = (_digest(sequence, pool, i) for i in range(stop))
    if not groups.is_windowed:
        found = pool.lookup(digests)
        found = found[: len(found) - len(found) % unit]
        return Prefix(len(found), (found,)) if found else Prefix()

    full = {group for group, window in enumerate(groups.windows) if window is None}
    length = len(pool.lookup(digests)) if 0 in full else len(list(digests))
    length -= length % unit
    while (missing := _missing(sequence, pool, groups, length)) is not None:
        length = missing - missing % unit  # every longer prefix needs this block, too
    if not length:
        return Prefix()
    tables = []
    for group, window in enumerate(groups.windows):
        first = groups.first_block(window, length * pool.block_size)
        keys = [group_key(sequence.block_digests[i], group) for i in range(first, length)]
        tables.append(pool.lookup(keys))
    return Prefix(length, tuple(tables))


def _missing(sequence: Sequence, pool: BlockPool, groups: BlockGroups, length: int) -> int | None:
    """The last block that a prefix of `length` blocks lacks in some group; None if it is complete."""
    for group, window in enumerate(groups.windows):
        if window is None and group == 0:
            continue  # looked up before
        for index in range(length - 1, groups.first_block(window, length * pool.block_size) - 1, -1):
            if not pool.has(group_key(sequence.block_digests[index], group)):
                return index
    return None


def register_blocks(sequence: Sequence, pool: BlockPool) -> None:
    """Registers the full blocks whose tokens are known and whose KV is dispatched."""
    size = pool.block_size
    stop = min(sequence.num_computed, sequence.num_known_tokens, sequence.num_shareable)
    while sequence.next_block_end <= stop:
        index = sequence.next_block_end // size - 1
        digest = _digest(sequence, pool, index)
        for group, (table, freed) in enumerate(zip(sequence.tables, sequence.num_freed, strict=True)):
            if index >= freed:
                pool.register(table[index], group_key(digest, group))
        sequence.next_block_end += size
    if sequence.next_block_end > sequence.num_shareable:
        sequence.next_block_end = NEVER


def group_key(digest: bytes, group: int) -> bytes:
    """What the block of a cache group with this content is registered under."""
    return digest + bytes((group,)) if group else digest


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
