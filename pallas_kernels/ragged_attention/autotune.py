"""Tiles measured on the device at hand, kept in a file that people can read.

    python -m pallas_kernels.ragged_attention.autotune --heads 32 --kv-heads 8 --tokens 2048 --sequences 64

The file, `~/.cache/pallas_kernels/tiles.json` or what PALLAS_KERNELS_TILES names, holds one entry for each device kind
and shape class; `tiles.choose` prefers it to its model of the device.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.ragged_attention import tiles as tile_sizes
from pallas_kernels.ragged_attention.tiles import Shape, Tiles


def candidates(shape: Shape, kind: str) -> Iterable[Tiles]:
    """The model's choice first, then half and double of each of its sizes, as far as VMEM admits."""
    first = tile_sizes.modelled(shape, kind)
    yield first
    for queries, keys, sequences in itertools.product((1, 2, 4), (1, 2, 4), (1, 2, 4)):
        tiles = dataclasses.replace(
            first, queries=max(8, first.queries * queries // 2), keys=max(128, first.keys * keys // 2),
            sequences=max(1, first.sequences * sequences // 2),
        )
        if tiles != first and tiles.keys // tiles.sequences >= 128 and tile_sizes.vmem_bytes(
            tiles.queries, tiles.keys, shape
        ) <= first.vmem_limit:  # fmt: skip
            yield tiles


def autotune(
    shape: Shape,
    *,
    measure: Callable[[Tiles], float],
    kind: str,
    path: Path | None = None,
    report: Callable[[str], object] = print,
) -> Tiles:
    """Measures all candidates, writes the fastest to the file and returns it.

    `measure` gives the seconds of one call with certain tiles; what it raises means that these do not work. Raises
    RuntimeError if none does.
    """
    times: dict[Tiles, float] = {}
    for tiles in candidates(shape, kind):
        try:
            times[tiles] = measure(tiles)
        except Exception as error:  # the compiler refuses in several ways, none of which ends the search
            report(f"{tiles}: {str(error).splitlines()[0][:100]}")
            continue
        report(f"{tiles}: {1e6 * times[tiles]:.0f} us")
    if not times:
        raise RuntimeError(f"no candidate works for {shape} on {kind}; the lines above say why")
    best = min(times, key=times.__getitem__)
    tile_sizes.save(shape, kind, best, seconds=times[best], path=path)
    return best


def time_call(shape: Shape, *, context: int, tiles: Tiles, repeats: int = 20) -> float:
    """Seconds of one call on this machine's TPU: all sequences with `context` tokens, as many prompt tokens as fit."""
    from pallas_kernels.ragged_attention.tpu import ragged_attention_tpu

    s, b = shape.num_sequences, shape.block_size
    max_blocks = -(-context // b)
    dtype = jnp.dtype(shape.dtype)
    lengths = jnp.ones((s,), jnp.int32).at[-1].set(max(1, min(shape.num_tokens - s + 1, context)))
    starts = jnp.concatenate([jnp.zeros((1,), jnp.int32), jnp.cumsum(lengths, dtype=jnp.int32)])
    cache = jnp.zeros((s * max_blocks, shape.num_kv_heads, b, shape.head_dim), dtype)
    new = jnp.zeros((shape.num_tokens, shape.num_kv_heads, shape.head_dim), dtype)
    q = jnp.zeros((shape.num_tokens, shape.num_heads, shape.head_dim), dtype)
    run = jax.jit(
        functools.partial(ragged_attention_tpu, layer=0, num_blocks=s * max_blocks, scale=0.1, tiles=tiles),
        donate_argnums=(3, 4),
    )
    index: dict[str, Any] = {
        "kv_slots": jnp.full((shape.num_tokens,), -1, jnp.int32), "query_starts": starts,
        "context_lens": jnp.full((s,), context, jnp.int32),
        "block_tables": jnp.arange(s * max_blocks, dtype=jnp.int32).reshape(s, max_blocks),
    }  # fmt: skip
    caches = (cache, jnp.copy(cache))
    out, *caches = jax.block_until_ready(run(q, new, new, *caches, **index))  # compiles
    start = time.perf_counter()
    for _ in range(repeats):
        out, *caches = run(q, new, new, *caches, **index)
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / repeats


def main() -> None:
    parser = argparse.ArgumentParser(description="Finds the fastest tiles of ragged attention on this TPU.")
    for flag, default in (("heads", 32), ("kv-heads", 8), ("head-dim", 128), ("block-size", 128), ("tokens", 512),
                          ("sequences", 64), ("context", 4096)):
        parser.add_argument(f"--{flag}", type=int, default=default)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    o = parser.parse_args()
    if jax.default_backend() != "tpu":
        parser.error(f"this machine's JAX runs on {jax.default_backend()!r}; tiles are measured on a TPU")
    shape = Shape(
        num_heads=o.heads, num_kv_heads=o.kv_heads, head_dim=o.head_dim, block_size=o.block_size, num_tokens=o.tokens,
        num_sequences=o.sequences, dtype=o.dtype,
    )
    kind = tile_sizes.device_kind() or jax.devices()[0].device_kind
    best = autotune(shape, kind=kind, measure=lambda tiles: time_call(shape, context=o.context, tiles=tiles))
    print(f"{best} written to {tile_sizes.measured_file()}")


if __name__ == "__main__":
    main()
