"""Measures tile sizes on this machine's TPU or GPU and stores them in a JSON file.

    python -m pallas_kernels.ragged_attention.autotune --heads 32 --kv-heads 8 --tokens 2048 --sequences 64

The file, `~/.cache/pallas_kernels/tiles.json` or the value of PALLAS_KERNELS_TILES (a file, or an object such as
gs://bucket/tiles.json), has one entry per device kind and shape class; `tpu.tile_sizes.choose` and
`gpu.tile_sizes.choose` prefer it to their models of the device.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import jax.numpy as jnp

from pallas_kernels import gpu_target
from pallas_kernels.ragged_attention import measured_tiles
from pallas_kernels.ragged_attention.arguments import Attention, CacheLayer, RaggedIndex, Scoring
from pallas_kernels.ragged_attention.gpu import tile_sizes as gpu_tiles
from pallas_kernels.ragged_attention.gpu.tile_sizes import GpuTiles
from pallas_kernels.ragged_attention.measured_tiles import Shape, T
from pallas_kernels.ragged_attention.tpu import tile_sizes
from pallas_kernels.ragged_attention.tpu.tile_sizes import Tiles


def candidates(shape: Shape, kind: str) -> Iterable[Tiles]:
    """For TPUs: the model's choice first, then each of its sizes halved and doubled if the result fits in VMEM."""
    first = tile_sizes.modeled(shape, kind)
    yield first
    for queries, keys, sequences in itertools.product((1, 2, 4), (1, 2, 4), (1, 2, 4)):
        tiles = dataclasses.replace(
            first,
            queries=max(8, first.queries * queries // 2),
            keys=max(128, first.keys * keys // 2),
            sequences=max(1, first.sequences * sequences // 2),
        )
        if (
            tiles != first
            and tiles.keys // tiles.sequences >= 128
            and tile_sizes.vmem_bytes(tiles.queries, tiles.keys, shape) <= first.vmem_limit
        ):
            yield tiles


def autotune(
    shape: Shape,
    choices: Iterable[T],
    *,
    measure: Callable[[T], float],
    kind: str,
    path: Path | str | None = None,
    report: Callable[[str], object] = print,
) -> T:
    """Measures all choices, writes the fastest to the file (or reports why it cannot) and returns it.

    `measure` returns the seconds of one call with the given tiles; an exception means that these tiles do not work.
    Raises RuntimeError if no tiles work.
    """
    times: dict[T, float] = {}
    for tiles in choices:
        try:
            times[tiles] = measure(tiles)
        except Exception as error:  # compilers raise various exceptions; none ends the search
            report(f"{tiles}: {str(error).splitlines()[0][:100]}")
            continue
        report(f"{tiles}: {1e6 * times[tiles]:.0f} us")
    if not times:
        raise RuntimeError(f"no candidate works for {shape} on {kind}; the lines above say why")
    best = min(times, key=times.__getitem__)
    path = path or measured_tiles.measured_file()
    try:
        measured_tiles.save(shape, kind, best, seconds=times[best], path=path)
        report(f"{best} written to {path}")
    except OSError as error:  # an unwritable folder must not discard the measurements
        report(f"{best} is the fastest, but {path} cannot be written ({error}); name another file in PALLAS_KERNELS_TILES")
    return best


def time_call(attention: Attention, shape: Shape, *, context: int, repeats: int = 20) -> float:
    """Seconds per call on this machine: all sequences have `context` tokens, with as many prompt tokens as fit."""
    s, b = shape.num_sequences, shape.block_size
    max_blocks = -(-context // b)
    dtype = jnp.dtype(shape.dtype)
    lengths = jnp.ones((s,), jnp.int32).at[-1].set(max(1, min(shape.num_tokens - s + 1, context)))
    starts = jnp.concatenate([jnp.zeros((1,), jnp.int32), jnp.cumsum(lengths, dtype=jnp.int32)])
    cache = jnp.zeros((s * max_blocks, shape.num_kv_heads, b, shape.head_dim), dtype)
    new = jnp.zeros((shape.num_tokens, shape.num_kv_heads, shape.head_dim), dtype)
    q = jnp.zeros((shape.num_tokens, shape.num_heads, shape.head_dim), dtype)
    run = jax.jit(attention, donate_argnums=(3, 4))
    index = RaggedIndex(
        kv_slots=jnp.full((shape.num_tokens,), -1, jnp.int32),
        query_starts=starts,
        context_lens=jnp.full((s,), context, jnp.int32),
        block_tables=jnp.arange(s * max_blocks, dtype=jnp.int32).reshape(s, max_blocks),
    )
    others = (index, CacheLayer(number=0, num_blocks=s * max_blocks), Scoring(scale=0.1))
    caches = (cache, jnp.copy(cache))
    out, *caches = jax.block_until_ready(run(q, new, new, *caches, *others))  # compiles
    start = time.perf_counter()
    for _ in range(repeats):
        out, *caches = run(q, new, new, *caches, *others)
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / repeats


def tune(shape: Shape, *, context: int, path: Path | str | None = None) -> Tiles | GpuTiles:
    """Tunes the kernel of this machine's TPU or GPU; ValueError if there is none."""
    backend = jax.default_backend()
    if backend == "tpu":
        from pallas_kernels.ragged_attention.tpu.call import ragged_attention_tpu as attention

        kind = tile_sizes.device_kind() or jax.devices()[0].device_kind
        choices: Iterable[Tiles] | Iterable[GpuTiles] = candidates(shape, kind)
    elif backend == "gpu" and (generation := gpu_target.generation()):
        from pallas_kernels.ragged_attention.gpu.call import ragged_attention_gpu as attention

        kind = jax.devices()[0].device_kind
        choices = gpu_tiles.candidates(
            gpu_tiles.modeled(
                shape.head_dim,
                shape.num_heads // shape.num_kv_heads,
                generation,
                multiprocessors=gpu_target.multiprocessors(),
            )
        )
    else:
        device = jax.devices()[0].device_kind
        raise ValueError(f"tiles are measured on a TPU or a GPU of compute capability 8 or 9.0, but JAX runs on {device!r}")

    def measure(tiles: Tiles | GpuTiles) -> float:
        return time_call(functools.partial(attention, tiles=tiles), shape, context=context)

    return autotune(shape, choices, measure=measure, kind=kind, path=path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Finds the fastest tiles of ragged attention on this TPU or GPU.")
    for flag, default in (
        ("heads", 32),
        ("kv-heads", 8),
        ("head-dim", 128),
        ("block-size", 128),
        ("tokens", 512),
        ("sequences", 64),
        ("context", 4096),
    ):
        parser.add_argument(f"--{flag}", type=int, default=default)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    o = parser.parse_args(arguments)
    shape = Shape(
        num_heads=o.heads,
        num_kv_heads=o.kv_heads,
        head_dim=o.head_dim,
        block_size=o.block_size,
        num_tokens=o.tokens,
        num_sequences=o.sequences,
        dtype=o.dtype,
    )
    try:
        tune(shape, context=o.context)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
