"""The TPU compiler's estimate of the cycles of a product with weights in each form.

    python -m tests.gate.product_cycles --kinds v5e v6e tpu7x

Nothing is executed. The estimates contain copies from memory. There is none for XLA's product with int8; memory bounds it by
half of that of bfloat16.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

FORMS = ("bfloat16", "int4, 32 inputs", "int4, 128 inputs", "int4, 32 inputs, offsets")
SECONDS = 120  # for a program, on a busy machine


def compile_one(kind: str, form: str, shape: tuple[int, int, int]) -> None:
    """Compiles the product of x [T, K] with a layer of a stack [2, K, N]; `shape` is (T, K, N)."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from fastgen_jax.devices import parse_topology
    from fastgen_jax.plan.program import deviceless_mesh, lowering_for
    from pallas_kernels.matmul import Int4Weight, linear
    from tests.gate.tpu_check import TOPOLOGIES

    mesh = deviceless_mesh(parse_topology(TOPOLOGIES[kind]), num_devices=1)
    rows, depth, columns = shape

    def array(shape: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    def product(x: Any, w: Any, layer: Any) -> Any:
        if isinstance(w, Int4Weight):
            return linear(x, w.at_layer(layer))
        return linear(x, jax.lax.dynamic_index_in_dim(w, layer, keepdims=False))

    w: Any = array((2, depth, columns), jnp.bfloat16)
    if form.startswith("int4"):
        scales = array((2, depth // int(form.split()[1]), columns), jnp.float32)
        values = array((2, depth // 2, columns), jnp.uint8)
        w = Int4Weight(values=values, scales=scales, offsets=scales if "offsets" in form else None)
    with lowering_for(mesh):
        jax.jit(product).lower(array((rows, depth), jnp.bfloat16), w, array((), jnp.int32)).compile()


def cycles_of(kind: str, form: str, shape: tuple[int, int, int]) -> int:
    """Of the operation that takes longest."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_static_llo_profile_to={folder}"
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "LIBTPU_INIT_ARGS": flags}
        command = [sys.executable, "-m", "tests.gate.product_cycles", "--one", kind, form, *map(str, shape)]
        # After it has written the estimates, the compiler aborts (TPU7x) or goes on for minutes.
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(command, env=environment, capture_output=True, timeout=SECONDS)
        texts = [path.read_text() for path in Path(folder).glob("*static_llo_profile.textproto")]
        cycles = [int(number) for text in texts for number in re.findall(r"estimated_cycles: (\d+)", text)]
        if not cycles:
            raise RuntimeError(f"no estimate for {form} on {kind}, in {SECONDS} s; {' '.join(command)} shows why")
        return max(cycles)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore[reportOptionalMemberAccess]
    parser.add_argument("--kinds", nargs="+", default=["v5e", "v6e", "tpu7x"])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--shapes", nargs="+", default=["4096x28672", "14336x4096"], help="inputs x outputs")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        kind, form, *shape = options.one
        rows, depth, columns = map(int, shape)
        compile_one(kind, form, (rows, depth, columns))
        return 0
    for kind in options.kinds:
        for name in options.shapes:
            depth, columns = map(int, name.split("x"))
            for form in options.forms:
                cycles = cycles_of(kind, form, (options.rows, depth, columns))
                print(f"| {kind} | {options.rows} rows, {name} | {form} | {cycles:,} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
