"""Times `ragged_attention`: `python -m pallas_kernels.ragged_attention.bench --implementation cpu xla`.

Each case runs once per layer inside one program, over a pool of many layers, so that the CPU caches are cold as in a
model. Prints the median milliseconds per layer, and the resulting GB/s of keys and values and GFLOP/s.

`--scaling` varies pool, contexts and padding instead: time must grow only with the contexts in the batch.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.ragged_attention import IMPLEMENTATIONS, CacheLayer, RaggedIndex, Scoring, ragged_attention


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One shape: chunks of (query length, context length), and the model's heads (default: SmolLM2-135M's)."""

    chunks: tuple[tuple[int, int], ...]
    num_kv_heads: int = 3
    group: int = 3
    head_dim: int = 64
    block_size: int = 16
    num_layers: int = 12
    spare_blocks: int = 0
    spare_tokens: int = 0
    table_width: int = 0
    """Entries per block table; 0 means as many as the longest context needs."""


CASES = {
    "decode S=32 ctx 300": Case(chunks=((1, 300),) * 32),
    "decode S=32 ctx 512": Case(chunks=((1, 512),) * 32),
    "decode S=32 ctx 512, 4 x pool": Case(chunks=((1, 512),) * 32, num_layers=6, spare_blocks=3072),
    "decode S=32 ctx 512, B=64": Case(chunks=((1, 512),) * 32, block_size=64),
    "decode S=32 ctx 1024": Case(chunks=((1, 1024),) * 32, num_layers=8),
    "decode S=32 ctx 100..900": Case(chunks=tuple((1, 100 + 800 * i // 31) for i in range(32))),
    "decode S=32 MHA H=9": Case(chunks=((1, 512),) * 32, num_kv_heads=9, group=1, num_layers=4),
    "decode S=1 ctx 256": Case(chunks=((1, 256),), num_layers=64),
    "decode S=1 ctx 4096": Case(chunks=((1, 4096),), num_layers=24),
    "prompt 256 ctx 256": Case(chunks=((256, 256),)),
    "prompt 256 ctx 512": Case(chunks=((256, 512),)),
    "prompt 256 ctx 1000": Case(chunks=((256, 1000),)),
    "prompt 256 ctx 1000 in T=512": Case(chunks=((256, 1000),), spare_tokens=256),
    "mixed 31 x ctx 300 + 225/1000": Case(chunks=((1, 300),) * 31 + ((225, 1000),)),
}

DECODE = Case(chunks=((1, 512),) * 32, num_layers=4)
SCALING = {
    "blocks in the pool, per layer": {
        str(1024 + spare): dataclasses.replace(DECODE, spare_blocks=spare) for spare in (0, 1024, 3072, 7168)
    },
    "context of 32 sequences": {
        str(context): dataclasses.replace(DECODE, chunks=((1, context),) * 32) for context in (256, 512, 1024, 2048, 4096)
    },
    "rows of the program, 32 of them used": {
        str(32 + spare): dataclasses.replace(DECODE, spare_tokens=spare) for spare in (0, 32, 224, 992)
    },
    "longest context the tables allow": {
        str(longest): dataclasses.replace(DECODE, table_width=longest // DECODE.block_size) for longest in (512, 4096, 32768)
    },
}


def time_case(case: Case, implementation: str, *, repeats: int = 15, dtype: str = "float32") -> float:
    """Median seconds per layer."""
    rng = np.random.default_rng(0)
    starts = np.cumsum([0, *(query for query, _ in case.chunks)])
    num_tokens = int(starts[-1]) + case.spare_tokens
    needed = [-(-context // case.block_size) for _, context in case.chunks]
    num_blocks = sum(needed) + case.spare_blocks
    blocks = rng.permutation(num_blocks)
    tables = np.zeros((len(case.chunks), case.table_width or max(needed)), np.int32)
    slots = np.full(num_tokens, num_blocks * case.block_size, np.int32)
    for s, (query, context) in enumerate(case.chunks):
        own, blocks = blocks[: needed[s]], blocks[needed[s] :]
        tables[s, : len(own)] = own
        positions = np.arange(context - query, context)
        first = own[positions // case.block_size] * case.block_size
        slots[starts[s] : starts[s] + query] = first + positions % case.block_size
    index = RaggedIndex(
        kv_slots=jnp.asarray(slots),
        query_starts=jnp.asarray(starts, jnp.int32),
        context_lens=jnp.asarray([context for _, context in case.chunks], jnp.int32),
        block_tables=jnp.asarray(tables),
    )
    scoring = Scoring(scale=case.head_dim**-0.5)
    heads = case.num_kv_heads * case.group
    q = jnp.asarray(rng.standard_normal((num_tokens, heads, case.head_dim), np.float32))
    k = jnp.asarray(rng.standard_normal((num_tokens, case.num_kv_heads, case.head_dim), np.float32))
    shape = (case.num_layers * num_blocks, case.num_kv_heads, case.block_size, case.head_dim)
    caches = tuple(jax.random.normal(jax.random.key(i), shape, jnp.float32).astype(dtype) for i in range(2))

    def program(q, k, caches, index):
        def one_layer(state, layer):
            q, caches = state
            out, *caches = ragged_attention(
                q,
                k,
                k,
                *caches,
                index=index,
                layer=CacheLayer(number=layer, num_blocks=num_blocks),
                scoring=scoring,
                implementation=implementation,
            )
            return (out, tuple(caches)), None

        (q, caches), _ = jax.lax.scan(one_layer, (q, caches), jnp.arange(case.num_layers, dtype=jnp.int32))
        return q, caches

    step = jax.jit(program, donate_argnums=2)
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        out, caches = step(q, k, caches, index)
        out.block_until_ready()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:]) / case.num_layers


def print_scaling(implementation: str, *, repeats: int, dtype: str) -> None:
    """Prints the milliseconds per layer of each series in `SCALING`, and their ratio to the series' first."""
    print(f"{implementation}, decode of 32 sequences at context 512 except for the quantity that varies:")
    for what, cases in SCALING.items():
        times = [time_case(case, implementation, repeats=repeats, dtype=dtype) for case in cases.values()]
        columns = (f"{label}: {t * 1e3:.3f} ms (x{t / times[0]:.2f})" for label, t in zip(cases, times, strict=True))
        print(f"  {what}: {', '.join(columns)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--implementation", nargs="+", default=["cpu", "xla"], choices=sorted(IMPLEMENTATIONS))
    parser.add_argument("--case", nargs="+", default=list(CASES), help="names of cases, or parts of them")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="dtype of the cache")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--scaling", action="store_true", help="vary pool, context and padding instead of running --case")
    arguments = parser.parse_args()
    if arguments.scaling:
        for implementation in arguments.implementation:
            print_scaling(implementation, repeats=arguments.repeats, dtype=arguments.dtype)
        return
    for name, case in CASES.items():
        if not any(part in name for part in arguments.case):
            continue
        per_key = case.num_kv_heads * case.head_dim * 2
        moved = sum(context for _, context in case.chunks) * per_key * jnp.dtype(arguments.dtype).itemsize
        scores = sum(query * context - query * (query - 1) // 2 for query, context in case.chunks)
        flops = scores * case.num_kv_heads * case.group * case.head_dim * 4
        for implementation in arguments.implementation:
            seconds = time_case(case, implementation, repeats=arguments.repeats, dtype=arguments.dtype)
            print(
                f"{name:32} {implementation:10} {seconds * 1e3:8.3f} ms  {moved / seconds / 1e9:6.1f} GB/s"
                f"  {flops / seconds / 1e9:6.1f} GFLOP/s",
                flush=True,
            )


if __name__ == "__main__":
    main()
