"""Times grouped matmuls on this device, or reports how the TPU compiler handles them.

    python -m pallas_kernels.grouped_matmul.bench                   # milliseconds, on a CPU
    python -m pallas_kernels.grouped_matmul.bench --tpu v5e:2x2     # temporaries of compiled programs; needs only libtpu

The second form shows whether weights are copied or dequantized in memory: if so, temporaries are as large as the weights.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from pallas_kernels.grouped_matmul import BlockGroups, GroupedWeight, grouped_matmul, prepare
from pallas_kernels.matmul import INT4_BLOCK, BlockWeight, Int8Weight, linear

MIB = 2**20
# tokens, experts per token, experts, width, width of an expert
CASES = {
    "1 token, 4 of 60 (Qwen1.5-MoE)": (1, 4, 60, 2048, 1408),
    "16 tokens, 4 of 60": (16, 4, 60, 2048, 1408),
    "256 tokens, 4 of 60": (256, 4, 60, 2048, 1408),
    "64 tokens, 2 of 8": (64, 2, 8, 1024, 3584),
}
# experts, width, width of an expert, layers: the share of one of four devices
MODELS = {"Mixtral-8x7B": (8, 4096, 3584, 4), "Qwen3-30B-A3B": (128, 2048, 768, 8)}


def measure(repeats: int) -> None:
    """Prints the median milliseconds per product for every implementation that supports the weights."""
    columns = ("packed", "packed int8", "packed int4", "tiles", "ragged_dot")
    print(f"{'case':34}" + "".join(f"{name:>14}" for name in columns) + f"{'packed GB/s':>14}{'GFLOP/s':>10}")
    for name, (tokens, chosen, experts, width, hidden) in CASES.items():
        rng = np.random.default_rng(0)
        w = rng.standard_normal((experts, width, hidden), np.float32)
        x = jnp.asarray(rng.standard_normal((tokens * chosen, width), np.float32))
        picks = np.stack([rng.permutation(experts)[:chosen] for _ in range(tokens)])
        sizes = jnp.asarray(np.bincount(picks.ravel(), minlength=experts), jnp.int32)
        forms: dict[str, tuple[GroupedWeight, str | None]] = {
            "packed": (prepare(w, platform="cpu"), None),
            "packed int8": (prepare(w, platform="cpu", quantize="int8"), None),
            "packed int4": (prepare(_int4(experts, width, hidden), platform="cpu"), None),
            "tiles": (jnp.asarray(w), "tiles"),
            "ragged_dot": (jnp.asarray(w), "ragged_dot"),
        }
        seconds = {}
        for form, (weights, implementation) in forms.items():
            run = jax.jit(functools.partial(grouped_matmul, implementation=implementation))
            seconds[form] = _median(run, (x, weights, sizes), 3 if form == "ragged_dot" else repeats)
        read = int((sizes > 0).sum()) * width * hidden * 4
        print(
            f"{name:34}"
            + "".join(f"{1e3 * seconds[form]:14.2f}" for form in columns)
            + f"{read / seconds['packed'] / 1e9:14.1f}{2 * x.shape[0] * width * hidden / seconds['packed'] / 1e9:10.0f}"
        )


def _int4(experts: int, width: int, hidden: int) -> BlockGroups:
    """Random weights in 4 bits: quantizing others takes long, and the time of a product does not depend on values."""
    rng = np.random.default_rng(0)
    block = BlockWeight(
        values=rng.integers(0, 16, (hidden, width), np.uint8),
        scales=rng.standard_normal((hidden, width // INT4_BLOCK)).astype(np.float16),
    )
    return BlockGroups(shape=(experts, width, hidden), read=lambda _: block)


def _median(run: Callable[..., jax.Array], arguments: tuple[object, ...], repeats: int) -> float:
    run(*arguments).block_until_ready()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run(*arguments).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def ask_tpu_compiler(topology: str) -> None:
    """Prints the temporaries of int8 products and of experts inside a scan over layers, next to the weights' size."""
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    devices = np.array(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[:1])
    mesh = Mesh(devices, ("one",))

    def array(shape: tuple[int, ...], dtype: DTypeLike) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    def weight(shape: tuple[int, ...], int8: bool) -> jax.ShapeDtypeStruct | Int8Weight:
        if not int8:
            return array(shape, jnp.bfloat16)
        return Int8Weight(values=array(shape, jnp.int8), scales=array((*shape[:-2], shape[-1]), jnp.float32))  # pyright: ignore[reportArgumentType] (shapes in place of arrays)

    def report(name: str, program: Callable[..., object], *arguments: object) -> None:
        start = time.perf_counter()
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            memory = jax.jit(program).lower(*arguments).compile().memory_analysis()
        seconds = time.perf_counter() - start
        assert memory is not None, "the TPU compiler analyzes memory"
        print(
            f"{name:64}{memory.argument_size_in_bytes / MIB:10.0f}{memory.temp_size_in_bytes / MIB:12.2f}{seconds:9.1f}",
            flush=True,
        )

    print(f"{topology:64}{'arguments':>10}{'temporaries':>12}{'seconds':>9}    MiB")
    for tokens in (8, 512):
        report(
            f"int8 matmul, {tokens} rows of 8192, weight [8192, 28672]",
            linear,
            array((tokens, 8192), jnp.bfloat16),
            weight((8192, 28672), True),
        )
    for model, (experts, width, hidden, layers) in MODELS.items():
        for int8 in (False, True):
            for implementation in ("ragged_dot", None):
                name = f"{model}, {layers} layers of {experts} experts, {'int8' if int8 else 'bfloat16'}"
                program = functools.partial(_layers, num_experts=experts, implementation=implementation)
                report(
                    f"{name}, {implementation or 'tpu'}",
                    program,
                    array((512, width), jnp.bfloat16),
                    weight((layers * experts, width, hidden), int8),
                    weight((layers * experts, hidden, width), int8),
                    array((experts,), jnp.int32),
                )


def _layers(
    x: jax.Array, up: GroupedWeight, down: GroupedWeight, sizes: jax.Array, *, num_experts: int, implementation: str | None
) -> jax.Array:
    def body(x: jax.Array, first: jax.Array) -> tuple[jax.Array, None]:
        hidden = grouped_matmul(x, up, sizes, first_group=first, implementation=implementation)
        return x + grouped_matmul(hidden, down, sizes, first_group=first, implementation=implementation), None

    return jax.lax.scan(body, x, jnp.arange(0, up.shape[0], num_experts, dtype=jnp.int32))[0]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15, help="timed calls per case (default: %(default)s)")
    parser.add_argument("--tpu", metavar="TOPOLOGY", help="compile for this topology, such as v5e:2x2, instead of running")
    options = parser.parse_args()
    if options.tpu:
        ask_tpu_compiler(options.tpu)
    else:
        measure(options.repeats)
