"""Whether a step copies the KV cache: step time and memory against the number of allocated KV blocks.

    fastgen bench kv-blocks                  # times on this device
    fastgen bench kv-blocks --tpu v5e:2x2    # memory of the compiled TPU program; needs libtpu but no TPU

A program that copies the cache takes time or temporary memory in proportion to its size.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Sequence

from fastgen_jax.flags import add_model_flag

MIB = 2**20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's flags."""
    add_model_flag(parser)
    parser.add_argument(
        "--blocks", type=int, nargs="+", default=[64, 256, 1024, 2048], help="cache sizes (default: 64 256 1024 2048)"
    )
    parser.add_argument("--budgets", type=int, nargs="+", default=[1, 32, 256], help="tokens per step (default: 1 32 256)")
    parser.add_argument("--repeats", type=int, default=15, help="timed steps for each combination (default: %(default)s)")
    parser.add_argument(
        "--tpu", metavar="TOPOLOGY", help="compile for this TPU topology, such as v5e:2x2, instead of running"
    )


def run(args: argparse.Namespace) -> int:
    """Prints the table and returns the exit code."""
    if args.tpu:
        return _tpu(args.tpu, args.blocks, args.budgets)
    return _measured(args.model, args.blocks, args.budgets, args.repeats)


def _measured(model: str, blocks: Sequence[int], budgets: Sequence[int], repeats: int) -> int:
    import jax

    from fastgen_jax.engine import Engine

    engines = {
        n: Engine.from_pretrained(
            model, token_budget=max(budgets), budget_ladder=tuple(budgets), num_blocks=n, background_compile=False
        )
        for n in blocks
    }
    times: dict[tuple[int, int], list[float]] = {(n, t): [] for n in blocks for t in budgets}
    for _ in range(repeats):  # interleaved, so that changes of the machine's speed affect every size equally
        for n, engine in engines.items():
            for t in budgets:
                times[n, t].append(engine.measure_step(t))
    print(f"{'KV blocks':>10} {'cache MiB':>10} " + " ".join(f"{f'{t} tokens, ms':>16}" for t in budgets))
    for n, engine in engines.items():
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(engine.runner.kv_cache)) / MIB
        row = " ".join(f"{1e3 * statistics.median(times[n, t]):16.2f}" for t in budgets)
        print(f"{n:10d} {size:10.1f} {row}")
    return 0


def _tpu(topology_name: str, blocks: Sequence[int], budgets: Sequence[int]) -> int:
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from fastgen_jax.core import KVCache
    from fastgen_jax.engine.packing import Bucket
    from fastgen_jax.engine.programs import step_program
    from fastgen_jax.engine.sampling.state import init_state
    from fastgen_jax.models.config import ModelConfig
    from fastgen_jax.models.counts import count_params
    from fastgen_jax.models.params import init_params

    # A Llama of 1.1 billion parameters, so that a copied cache stands out against small buffers.
    model = ModelConfig(
        family="llama",
        vocab_size=32_000,
        num_layers=22,
        embed_dim=2048,
        num_heads=32,
        num_kv_heads=4,
        head_dim=64,
        mlp_dim=5632,
        max_context_len=4096,
    )
    block_size, max_num_seqs = 64, 64
    device = topologies.get_topology_desc(platform="tpu", topology_name=topology_name).devices[0]
    mesh = Mesh([device], ("one",))
    place = NamedSharding(mesh, PartitionSpec())

    def abstract(tree):  # shapes on the device that is not attached
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)

    params = abstract(jax.eval_shape(lambda: init_params(model, jax.random.key(0), dtype=jnp.bfloat16)))
    state = abstract(jax.eval_shape(lambda: init_state(max_num_seqs, model.vocab_size)))
    print(f"{topology_name}, {count_params(model) / 1e9:.1f} billion bfloat16 parameters, layers scanned; MiB")
    print(f"{'KV blocks':>10} {'tokens':>8} {'cache':>9} {'aliased':>9} {'temporary':>10}")
    for num_blocks in blocks:
        cache = abstract(
            jax.eval_shape(
                lambda n=num_blocks: KVCache.zeros(
                    num_layers=model.num_layers,
                    num_blocks=n,
                    num_kv_heads=model.num_kv_heads,
                    block_size=block_size,
                    head_dim=model.head_dim,
                    dtype=jnp.bfloat16,
                    platform="tpu",
                    values_in_keys=model.values_in_keys,
                )
            )
        )
        for budget in budgets:
            bucket = Bucket(
                budget,
                max_num_seqs=max_num_seqs,
                max_blocks=model.max_context_len // block_size,
                num_slots=num_blocks * block_size,
                vocab_size=model.vocab_size,
            )
            packed = jax.ShapeDtypeStruct((bucket.layout.size,), jnp.int32, sharding=place)
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                program = step_program(model, bucket, device=device)
                lowered = program.lower(params, cache, state, packed)
            memory = lowered.compile().memory_analysis()
            assert memory is not None  # the TPU compiler always reports it
            size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
            print(
                f"{num_blocks:10d} {budget:8d} {size / MIB:9.1f} {memory.alias_size_in_bytes / MIB:9.1f} "
                f"{memory.temp_size_in_bytes / MIB:10.1f}"
            )
    return 0
