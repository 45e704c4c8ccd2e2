"""KV blocks: which sequences hold them, and which still contain a reusable prefix."""

from __future__ import annotations

import hashlib
import struct
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

_DIGEST_BYTES = 16  # 128 bits: the probability of a collision among 2**40 blocks is 2**-49


class BlockPool:
    """Allocates blocks, counts their owners, and finds blocks by their content.

    A block is *blank* (free, without content), *held* (one or more owners) or *idle* (no owner, but its content is
    registered, so a later prompt can reuse it until it is evicted, least recently used first). Blank and idle blocks
    are free. A full block is registered under a digest chained over all tokens from position 0, which is the same in
    every process; `salt` separates pools in which equal tokens have different KV. Every operation takes constant time
    per block.
    """

    def __init__(self, num_blocks: int, block_size: int, *, prefix_caching: bool = True, salt: bytes = b"") -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self.num_evictions = 0
        self._packer = struct.Struct(f"<{block_size}i")
        self._root = hashlib.blake2b(salt, digest_size=_DIGEST_BYTES).digest()
        self.reset()

    def reset(self) -> None:
        """Makes every block blank, whether or not it is held: all content is lost."""
        num_blocks = self.num_blocks
        self._owners = [0] * num_blocks
        self._digests: list[bytes | None] = [None] * num_blocks
        self._registered: dict[bytes, int] = {}
        self._blank = list(range(num_blocks - 1, -1, -1))  # a stack: block 0 is allocated first
        self._idle: OrderedDict[int, None] = OrderedDict()  # oldest first

    def forget_contents(self) -> None:
        """Removes every block from the prefix cache. Held blocks stay held."""
        self._blank.extend(reversed(self._idle))
        self._idle.clear()
        self._registered.clear()
        self._digests = [None] * self.num_blocks

    def settle(self, tables: Iterable[Sequence[int]]) -> None:
        """Makes the owners of all blocks those in `tables`, whatever an interrupted call left behind."""
        holders = Counter(block_id for table in tables for block_id in table)
        free = [block_id for block_id in range(self.num_blocks) if not holders[block_id]]
        idle = dict.fromkeys([*self._idle, *free])  # blocks that were idle keep their order
        digests = self._digests
        self._owners = [holders[block_id] for block_id in range(self.num_blocks)]
        self._idle = OrderedDict.fromkeys(i for i in idle if not holders[i] and digests[i] is not None)
        self._blank = [block_id for block_id in reversed(free) if digests[block_id] is None]
        self._registered = {digest: block_id for block_id, digest in enumerate(digests) if digest is not None}

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can return, by eviction if necessary."""
        return len(self._blank) + len(self._idle)

    def num_owners(self, block_id: int) -> int:
        """How many times the block is held."""
        return self._owners[block_id]

    def allocate(self, count: int) -> list[int]:
        """Allocates `count` blocks with one owner each, blank ones first.

        Raises:
            RuntimeError: fewer are free; check `num_free` first.
        """
        if count > self.num_free:
            raise RuntimeError(f"{count} blocks were requested but {self.num_free} of {self.num_blocks} are free")
        blank, owners = self._blank, self._owners
        block_ids = []
        for _ in range(count):
            if blank:
                block_id = blank.pop()
            else:
                block_id, _ = self._idle.popitem(last=False)
                self._forget(block_id)
                self.num_evictions += 1
            owners[block_id] = 1
            block_ids.append(block_id)
        return block_ids

    def share(self, block_ids: Iterable[int]) -> None:
        """Adds an owner to blocks that are held, or that `lookup` found."""
        for block_id in block_ids:
            if not self._owners[block_id]:
                del self._idle[block_id]
            self._owners[block_id] += 1

    def free(self, block_ids: Sequence[int]) -> None:
        """Removes one owner from each block of a sequence; `block_ids` is in table order.

        Raises:
            RuntimeError: a block has no owner.
        """
        owners, digests = self._owners, self._digests
        # From the end: a later block is useless without the earlier ones, so it should be evicted first.
        for block_id in reversed(block_ids):
            if not owners[block_id]:
                raise RuntimeError(f"block {block_id} is freed but has no owner")
            owners[block_id] -= 1
            if not owners[block_id]:
                if digests[block_id] is None:
                    self._blank.append(block_id)
                else:
                    self._idle[block_id] = None

    def discard(self, block_ids: Sequence[int]) -> None:
        """Removes one owner from each block, and the content of those that have none left."""
        owners = self._owners
        for block_id in block_ids:
            if owners[block_id] == 1:
                self._forget(block_id)
        self.free(block_ids)

    def root(self, salt: str = "") -> bytes:
        """The parent of the first block; a `salt` separates the prefixes of those who know it from all others."""
        return hashlib.blake2b(self._root + salt.encode(), digest_size=_DIGEST_BYTES).digest() if salt else self._root

    def digest(self, parent: bytes | None, token_ids: Sequence[int]) -> bytes:
        """The digest of a full block; `parent` is the digest of the block before it, None at position 0."""
        content = (parent or self._root) + self._packer.pack(*token_ids)
        return hashlib.blake2b(content, digest_size=_DIGEST_BYTES).digest()

    def register(self, block_id: int, digest: bytes) -> None:
        """Offers a held, full block for reuse. Among blocks with equal content only the first is registered."""
        if self.prefix_caching and digest not in self._registered and self._digests[block_id] is None:
            self._registered[digest] = block_id
            self._digests[block_id] = digest

    def has(self, digest: bytes) -> bool:
        """Whether a block with this content is registered."""
        return digest in self._registered

    def lookup(self, digests: Iterable[bytes]) -> list[int]:
        """The blocks of the longest registered prefix of `digests`."""
        block_ids = []
        for digest in digests:
            block_id = self._registered.get(digest)
            if block_id is None:
                break
            block_ids.append(block_id)
        return block_ids

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Checks that every block is exactly one of blank, idle and held, given the table of every sequence.

        Raises:
            RuntimeError: the first contradiction found.
        """
        holders = Counter(block_id for table in tables for block_id in table)
        for block_id, owners in enumerate(self._owners):
            if owners != holders[block_id]:
                raise RuntimeError(f"block {block_id} has {owners} owners but {holders[block_id]} sequences list it")
        blank = Counter(self._blank)
        for block_id, owners in enumerate(self._owners):
            digest = self._digests[block_id]
            places = blank[block_id] + (block_id in self._idle) + (owners > 0)
            if places != 1:
                raise RuntimeError(
                    f"block {block_id} is blank {blank[block_id]} times, "
                    f"idle {int(block_id in self._idle)} times and has {owners} owners; "
                    "exactly one of these must hold"
                )
            if digest is not None and self._registered.get(digest) != block_id:
                raise RuntimeError(f"block {block_id} has a digest that is registered for {self._registered.get(digest)}")
            if digest is None and block_id in self._idle:
                raise RuntimeError(f"block {block_id} is idle but has no digest")
            if digest is not None and blank[block_id]:
                raise RuntimeError(f"block {block_id} is blank but has a digest")
        num_digests = sum(digest is not None for digest in self._digests)
        if num_digests != len(self._registered):
            raise RuntimeError(f"{num_digests} blocks have a digest but {len(self._registered)} are registered")

    def _forget(self, block_id: int) -> None:
        digest = self._digests[block_id]
        if digest is not None:
            del self._registered[digest]
            self._digests[block_id] = None


class BlockLedger:
    """Counts the blocks that would be free after the plan so far, without changing the pool.

    `available` is the number of blocks that can still be taken.
    """

    __slots__ = ("_owners", "_pool", "available")

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._owners: dict[int, int] = {}  # only of blocks that the plan changes
        self.available = pool.num_free

    def copy(self) -> BlockLedger:
        """An independent ledger with the same plan so far."""
        ledger = BlockLedger(self._pool)
        ledger._owners, ledger.available = dict(self._owners), self.available
        return ledger

    def take(self, count: int) -> None:
        """Plans to allocate `count` blocks."""
        self.available -= count

    def cost_of_sharing(self, block_ids: Iterable[int]) -> int:
        """How many of these registered blocks are free now and would no longer be."""
        return sum(not self._num_owners(block_id) for block_id in block_ids)

    def share(self, block_ids: Iterable[int]) -> None:
        """Plans to add an owner to each of these blocks."""
        for block_id in block_ids:
            owners = self._num_owners(block_id)
            self.available -= not owners
            self._owners[block_id] = owners + 1

    def free(self, block_ids: Iterable[int]) -> None:
        """Plans to remove an owner from each of these blocks."""
        for block_id in block_ids:
            owners = self._num_owners(block_id) - 1
            self.available += not owners
            self._owners[block_id] = owners

    def _num_owners(self, block_id: int) -> int:
        owners = self._owners.get(block_id)
        return self._pool.num_owners(block_id) if owners is None else owners
