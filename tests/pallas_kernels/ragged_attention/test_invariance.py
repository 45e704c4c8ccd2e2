"""Same request, same bits: a row of the native kernel's result depends on nothing else, and XLA's result stays close."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.ragged_attention import ragged_attention
from pallas_kernels.ragged_attention.cpu import call as cpu
from tests.pallas_kernels.programs.run import run
from tests.pallas_kernels.ragged_attention.ragged_batches import make_batch

needs_native = pytest.mark.skipif(not cpu.available(), reason="no C++ compiler here")
OPTIONS = [
    {},
    {"sliding_window": 100},
    {"soft_cap": 3.0, "alibi_slopes": jnp.linspace(0.01, 0.5, 6), "sinks": jnp.linspace(-1.0, 2.0, 6)},
]
HEADS = {"num_kv_heads": 2, "group": 3, "head_dim": 64}


@functools.cache
def compiled(implementation: str) -> Callable:
    return jax.jit(functools.partial(ragged_attention, implementation=implementation))


def run_in_chunks(lengths: list[int], *, implementation: str, block_size: int = 16, seed: int = 0, **options) -> np.ndarray:
    """Results of all tokens of one sequence, computed in chunks of these lengths, in each call with other sequences."""
    total = sum(lengths)
    rng = np.random.default_rng(1)  # the sequence itself is the same for every seed
    q = rng.standard_normal((total, 6, 64), dtype=np.float32)
    k, v = (rng.standard_normal((total, 2, 64), dtype=np.float32) for _ in range(2))
    caches, own, rows, done = None, None, [], 0
    for length in lengths:
        companions = [(1, 70), (9, 9)] if done % 2 else []
        # The last row is the sequence under test; make_batch assigns it blocks for all its tokens.
        batch = make_batch([*companions, (total, total)], block_size=block_size, seed=seed, num_blocks=200, **HEADS)
        arrays = batch.arrays
        start = int(arrays["query_starts"][-2])
        own = arrays["block_tables"][-1] if own is None else own
        if caches is None:
            caches = (arrays["k_cache"], arrays["v_cache"])
        for name, fresh in (("q", q), ("k", k), ("v", v)):
            arrays[name] = arrays[name][: start + length]
            arrays[name][start:] = fresh[done : done + length]
        positions = np.arange(done, done + length)
        arrays["kv_slots"] = arrays["kv_slots"][: start + length]
        arrays["kv_slots"][:start] = 2**30  # the other sequences only add load; their keys are not written
        arrays["kv_slots"][start:] = own[positions // block_size] * block_size + positions % block_size
        arrays["query_starts"][-1] = start + length
        arrays["context_lens"][-1] = done + length
        arrays["block_tables"] = np.zeros((len(companions) + 1, len(own)), np.int32)
        arrays["block_tables"][-1] = own
        arrays["k_cache"], arrays["v_cache"] = caches
        out, *new = compiled(implementation)(**batch.arguments(scale=0.125, **options))
        caches = tuple(np.asarray(cache) for cache in new)
        rows.append(np.asarray(out)[start:])
        done += length
    return np.concatenate(rows)


@needs_native
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "window", "cap, alibi, sinks"])
def test_chunking_and_other_sequences_do_not_change_a_bit(options: dict[str, object]) -> None:
    whole = run_in_chunks([350], implementation="cpu", **options)
    assert np.isfinite(whole).all()
    for lengths in ([64, 192, 94], [1, 62, 1, 1, 2, 180, 7, 1, 1, 1, 93], [349, 1]):
        np.testing.assert_array_equal(run_in_chunks(lengths, implementation="cpu", **options), whole)


@needs_native
def test_the_place_and_size_of_blocks_do_not_change_a_bit() -> None:
    whole = run_in_chunks([300], implementation="cpu")
    for block_size, seed in ((16, 5), (32, 0), (7, 3)):
        np.testing.assert_array_equal(
            run_in_chunks([290, 10], implementation="cpu", block_size=block_size, seed=seed), whole
        )


def test_chunking_hardly_changes_the_result_of_xla() -> None:
    whole = run_in_chunks([300], implementation="xla")
    # Rounding only: tiles of single rows and of chunks differ.
    np.testing.assert_allclose(run_in_chunks([299, 1], implementation="xla"), whole, atol=2e-6, rtol=0)


def last_row(chunks: list[tuple[int, int]]) -> np.ndarray:
    """The result of a row with 2000 keys, after the given chunks in the batch."""
    alone = make_batch([(1, 2000)], **HEADS, seed=3)
    keys, values = alone.histories[0]
    batch = make_batch([*chunks, (1, 2000)], **HEADS, seed=4)
    arrays = batch.arrays
    row = int(arrays["query_starts"][-2])
    positions = np.arange(2000)
    blocks = arrays["block_tables"][-1, positions // 16] + batch.layer * batch.num_blocks
    arrays["k_cache"][blocks, :, positions % 16], arrays["v_cache"][blocks, :, positions % 16] = keys, values
    arrays["q"][row], arrays["k"][row], arrays["v"][row] = alone.arrays["q"][0], keys[-1], values[-1]
    return np.asarray(ragged_attention(**batch.arguments(), implementation="cpu")[0])[row]


@needs_native
def test_a_context_that_is_split_over_threads_gives_the_same_bits() -> None:
    alone = last_row([])  # the only work: split
    np.testing.assert_array_equal(last_row([(1, 2000)] * 16), alone)  # a sixteenth of the work: not split
    np.testing.assert_array_equal(last_row([(64, 300), (0, 0), (1, 1)]), alone)


@needs_native
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs to bind a process to one core")
def test_the_number_of_threads_does_not_change_a_bit() -> None:
    alone = run("attention_on_one_core")
    assert bytes.fromhex(alone) == mixed_batch_result().tobytes()


def mixed_batch_result() -> np.ndarray:
    batch = make_batch([(1, 900), (40, 300), (1, 20), (5, 600)], **HEADS)
    return np.asarray(ragged_attention(**batch.arguments(), implementation="cpu")[0])


@needs_native
def test_the_bucket_does_not_change_a_bit() -> None:
    chunks = [(1, 40), (20, 90)]
    small = make_batch(chunks, num_tokens=21, num_blocks=20, max_blocks=6, **HEADS)
    large = make_batch([*chunks, (0, 0)], num_tokens=64, num_blocks=20, max_blocks=11, **HEADS)
    for name in ("q", "k", "v"):
        large.arrays[name][:21] = small.arrays[name]
    large.arrays["k_cache"], large.arrays["v_cache"] = small.arrays["k_cache"], small.arrays["v_cache"]
    large.arrays["block_tables"][:2, :6] = small.arrays["block_tables"]
    large.arrays["kv_slots"][:21] = small.arrays["kv_slots"]
    results = [np.asarray(ragged_attention(**b.arguments(), implementation="cpu")[0])[:21] for b in (small, large)]
    np.testing.assert_array_equal(*results)
