"""The block pool: owners, eviction, prefix lookup, and its integrity check."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgen_jax.scheduling import BlockLedger, BlockPool


def digests_of(pool: BlockPool, *blocks: tuple[int, ...]) -> list[bytes]:
    digests: list[bytes] = []
    for block in blocks:
        digests.append(pool.digest(digests[-1] if digests else None, block))
    return digests


def test_a_freed_registered_block_is_found_until_it_is_evicted() -> None:
    pool = BlockPool(2, 2)
    first, second = digests_of(pool, (1, 2), (3, 4))
    table = pool.allocate(2)
    pool.register(table[0], first)
    pool.register(table[1], second)
    pool.free(table)
    assert pool.num_free == 2
    assert pool.lookup([first, second]) == table
    pool.allocate(1)
    assert pool.lookup([first, second]) == table[:1], "the later block of a prefix is evicted first"
    assert pool.num_evictions == 1


def test_the_least_recently_used_prefix_is_evicted_first() -> None:
    pool = BlockPool(2, 1)
    (a,), (b,) = digests_of(pool, (1,)), digests_of(pool, (2,))
    blocks = pool.allocate(2)
    pool.register(blocks[0], a)
    pool.register(blocks[1], b)
    pool.free(blocks[:1])
    pool.free(blocks[1:])
    pool.share(blocks[:1])  # used again, so b is now the older one
    pool.free(blocks[:1])
    pool.allocate(1)
    assert pool.lookup([a]) == blocks[:1]
    assert pool.lookup([b]) == []


def test_blank_blocks_are_allocated_before_any_is_evicted() -> None:
    pool = BlockPool(3, 1)
    (digest,) = digests_of(pool, (1,))
    block = pool.allocate(1)
    pool.register(block[0], digest)
    pool.free(block)
    assert block[0] not in pool.allocate(2)


def test_a_shared_block_is_free_only_after_its_last_owner_left() -> None:
    pool = BlockPool(1, 1)
    table = pool.allocate(1)
    pool.register(table[0], digests_of(pool, (1,))[0])
    pool.share(table)
    pool.free(table)
    assert pool.num_free == 0
    pool.free(table)
    assert pool.num_free == 1


def test_equal_blocks_after_different_prefixes_have_different_digests() -> None:
    pool = BlockPool(1, 2)
    assert digests_of(pool, (1, 2), (3, 4))[1] != digests_of(pool, (2, 1), (3, 4))[1]


def test_digests_depend_on_the_salt_and_on_nothing_else() -> None:
    one, two, salted = BlockPool(1, 2), BlockPool(9, 2), BlockPool(1, 2, salt=b"other model")
    assert one.digest(None, (1, 2)) == two.digest(None, (1, 2)) != salted.digest(None, (1, 2))
    # A recorded value: a digest must be the same in every process.
    assert one.digest(None, (1, 2)).hex() == "995c06853284bbb846771fbc0096230b"


def test_without_prefix_caching_no_block_is_found() -> None:
    pool = BlockPool(1, 1, prefix_caching=False)
    digests = digests_of(pool, (1,))
    table = pool.allocate(1)
    pool.register(table[0], digests[0])
    assert pool.lookup(digests) == []


def test_allocating_too_much_and_freeing_twice_are_errors() -> None:
    pool = BlockPool(2, 1)
    with pytest.raises(RuntimeError, match="3 blocks were requested but 2 of 2 are free"):
        pool.allocate(3)
    with pytest.raises(RuntimeError, match="block 0 is freed but has no owner"):
        pool.free([0])


def test_the_integrity_check_says_what_is_wrong() -> None:
    pool = BlockPool(3, 1)
    table = pool.allocate(1)
    pool.check_integrity([table])
    with pytest.raises(RuntimeError, match="block 0 has 1 owners but 0 sequences list it"):
        pool.check_integrity([])
    pool._blank.append(table[0])
    with pytest.raises(RuntimeError, match="block 0 is blank 1 times, idle 0 times and has 1 owners"):
        pool.check_integrity([table])
    pool._blank.pop()
    pool._digests[0] = b"?"
    with pytest.raises(RuntimeError, match="block 0 has a digest that is registered for None"):
        pool.check_integrity([table])


@given(st.lists(st.tuples(st.sampled_from(["allocate", "free", "share"]), st.integers(0, 3)), max_size=60))
def test_the_ledger_predicts_the_free_blocks_of_the_pool(operations: list[tuple[str, int]]) -> None:
    pool = BlockPool(6, 1)
    tables: list[list[int]] = []
    done = 0
    for name, number in operations:
        ledger = BlockLedger(pool)
        before = pool.num_free
        if name == "allocate" and number <= pool.num_free:
            ledger.take(number)
            table = pool.allocate(number)
            for block_id in table:
                done += 1
                pool.register(block_id, pool.digest(None, (done,)))
            tables.append(table)
        elif name == "free" and tables:
            table = tables.pop(number % len(tables))
            ledger.free(table)
            assert pool.num_free == before, "the ledger does not change the pool"
            pool.free(table)
        elif name == "share" and pool._registered:
            cached = list(pool._registered.values())[: number + 1]
            cost = ledger.cost_of_sharing(cached)
            ledger.share(cached)
            assert ledger.available == before - cost
            pool.share(cached)
            tables.append(cached)
        assert ledger.available == pool.num_free
        pool.check_integrity(tables)
