"""The rows of a chunk have the same bits alone and among others, in arrays of one shape: what `deterministic` relies on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ragged_attention.tpu.call import ragged_attention_tpu
from pallas_kernels.ragged_attention.tpu.tile_sizes import Tiles
from pallas_kernels.ragged_attention.xla import ragged_attention_xla
from tests.pallas_kernels.ragged_attention.ragged_batches import Batch, make_batch

NUM_TOKENS, NUM_BLOCKS, BLOCK = 40, 100, 16
CHUNKS = [(1, 290), (11, 211), (1, 5), (16, 280), (1, 140)]  # contexts of several pieces; other lengths in each tile
TILES = Tiles(queries=8, keys=256, sequences=2, cores=1, vmem_limit=2**24)
IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "xla": ragged_attention_xla,
    "tpu": functools.partial(ragged_attention_tpu, tiles=TILES, interpret=pltpu.InterpretParams(dma_execution_mode="eager")),
}


def alone(batch: Batch, s: int) -> dict[str, jax.Array]:
    """The arrays of `batch` that change if sequence `s` has the only chunk, which then has the first rows."""
    start, stop = batch.arrays["query_starts"][s : s + 2]
    rows = np.r_[start:stop, 0:start, stop:NUM_TOKENS]
    slots = np.full(NUM_TOKENS, NUM_BLOCKS * BLOCK, np.int32)
    slots[: stop - start] = batch.arrays["kv_slots"][start:stop]
    contexts = np.where(np.arange(len(CHUNKS)) == s, batch.arrays["context_lens"], 0)
    starts = np.where(np.arange(len(CHUNKS) + 1) > s, stop - start, 0)
    changed = {name: batch.arrays[name][rows] for name in ("q", "k", "v")}
    changed |= {"kv_slots": slots, "context_lens": contexts, "query_starts": starts.astype(np.int32)}
    return {name: jnp.asarray(array) for name, array in changed.items()}


@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("name", ["xla", pytest.param("tpu", marks=pytest.mark.slow)])
def test_other_chunks_change_no_bit_of_a_result(name: str, window: int | None) -> None:
    attend = jax.jit(IMPLEMENTATIONS[name])
    shape: dict[str, Any] = {"num_kv_heads": 2, "group": 3, "head_dim": 128, "num_tokens": NUM_TOKENS}
    batch = make_batch(CHUNKS, **shape, block_size=BLOCK, max_blocks=20, num_blocks=NUM_BLOCKS)
    options = {} if window is None else {"sliding_window": jnp.asarray(window, jnp.int32)}
    among = np.asarray(attend(**batch.arguments(**options))[0])
    for s in range(len(CHUNKS)):
        start, stop = batch.arrays["query_starts"][s : s + 2]
        out = np.asarray(attend(**batch.arguments(**options, **alone(batch, s)))[0])
        np.testing.assert_array_equal(out[: stop - start], among[start:stop])
