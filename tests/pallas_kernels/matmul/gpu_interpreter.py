"""Compares the GPU products, run in the Pallas Mosaic-GPU interpreter, with plain products, in a separate process:

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m tests.pallas_kernels.matmul.gpu_interpreter quick

As in `ragged_attention.gpu_interpreter`, which says why it is one.
"""

from __future__ import annotations

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from pallas_kernels.grouped_matmul.gpu import grouped_matmul_gpu
from pallas_kernels.grouped_matmul.reference import grouped_matmul_reference
from pallas_kernels.matmul import (
    FLOAT8_BLOCK,
    Float8Weight,
    Int4Weight,
    Int8Weight,
    ampere,
    ampere_support,
    hopper,
    hopper_support,
    quantize_float8,
    quantize_int8,
)
from pallas_kernels.matmul.narrow import float8_rows
from tests.pallas_kernels.matmul.random_int4 import random_int4
from tests.pallas_kernels.ragged_attention.gpu_interpreter import compile_once

LAYERS, LAYER = 3, 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    generation: str = "hopper"
    groups: tuple[int, ...] = ()
    """Rows of each group; none: a product of all rows with one matrix."""
    num_rows: int = 20
    depth: int = 256
    num_columns: int = 192
    stored: str = "int8"
    """The dtype of the weights, "" for that of the activations."""
    in_blocks: bool = False
    """Whether every 128 inputs have a scale."""
    size: int = 32
    """Inputs of int4 that share a scale."""
    scales: str = "float16"
    """The dtype of scales of int4."""
    offsets: bool = False
    dtype: str = "bfloat16"
    rows: int = 64
    columns: int = 64
    splits: int = 1
    stages: int = 2
    blocks: int = 3

    @property
    def tiles(self) -> hopper_support.Tiles | ampere_support.Tiles:
        if self.generation == "ampere":
            return ampere_support.Tiles(rows=self.rows, splits=self.splits, stages=self.stages)
        return hopper_support.Tiles(
            rows=self.rows, columns=self.columns, splits=self.splits, stages=self.stages, blocks=self.blocks
        )


QUICK = [Case(splits=3, depth=320), Case(groups=(5, 0, 70, 9), num_rows=90, stored="", num_columns=128)]
ALL = [
    *QUICK,
    Case(num_rows=200, rows=128, columns=128, num_columns=384, dtype="float16"),
    Case(num_rows=64, splits=4, blocks=20),
    Case(num_rows=1, blocks=1, stages=3, num_columns=160),
    Case(groups=(0, 130, 1), num_rows=131, rows=128, columns=128, num_columns=256, blocks=5),
    Case(groups=(0, 0, 0), num_rows=9),
    Case(groups=(1,) * 20, num_rows=24, depth=64, stored="", stages=4),
    Case(stored="float8_e4m3fn", splits=2, depth=384, stages=3),
    Case(stored="float8_e4m3fn", groups=(5, 0, 70, 9), num_rows=90, rows=128, depth=192),
    Case(stored="float8_e4m3fn", in_blocks=True, splits=2, depth=384, stages=3),
    Case(stored="float8_e4m3fn", in_blocks=True, groups=(5, 0, 70, 9), num_rows=90, rows=128, depth=256),
    Case(stored="int4", splits=3, depth=320, num_columns=160),
    Case(stored="int4", size=64, offsets=True, scales="float32", num_rows=90, rows=128, columns=128, num_columns=384),
    Case(stored="int4", size=128, groups=(5, 0, 70, 9), num_rows=90, dtype="float16", stages=3),
    Case(stored="int4", offsets=True, groups=(0, 130, 1), num_rows=131, rows=128, num_columns=128, blocks=5),
    Case(generation="ampere", num_rows=5, rows=16, splits=3, depth=320, num_columns=144),
    Case(generation="ampere", num_rows=40, rows=32, dtype="float16", stages=3, num_columns=304),
    Case(generation="ampere", num_rows=200, rows=128, num_columns=256),
    Case(generation="ampere", num_rows=64, splits=4, depth=256, stages=4, num_columns=128),
    Case(generation="ampere", groups=(5, 0, 21, 9), num_rows=40, rows=16, depth=192, num_columns=208),
    Case(generation="ampere", groups=(5, 0, 70, 9), num_rows=90, stored="", num_columns=160),
    Case(generation="ampere", groups=(0, 130, 1), num_rows=131, rows=128, stored="", dtype="float16", stages=3),
    Case(generation="ampere", groups=(0, 0, 0), num_rows=9, rows=16),
    Case(generation="ampere", stored="int4", num_rows=21, rows=32, splits=3, depth=384, num_columns=144, stages=3),
    Case(generation="ampere", stored="int4", num_rows=90, size=64, offsets=True, scales="float32", rows=128),
    Case(generation="ampere", stored="int4", size=128, groups=(5, 0, 70, 9), num_rows=90, dtype="float16", stages=4),
    Case(generation="ampere", stored="int4", offsets=True, groups=(1, 1, 30, 8), num_rows=40, rows=16),
]


@functools.cache
def compiled(case: Case, grouped: bool):
    interpret = InterpretGPUParams(detect_races=True)
    multiply = {"hopper": hopper.multiply, "ampere": ampere.multiply}[case.generation]
    function = grouped_matmul_gpu if grouped else multiply
    return jax.jit(functools.partial(function, tiles=case.tiles, interpret=interpret))


def check_case(case: Case) -> None:
    rng = np.random.default_rng(0)
    dtype = jnp.dtype(case.dtype)
    x = jnp.asarray(rng.normal(size=(case.num_rows, case.depth)), dtype)
    num_groups = max(1, len(case.groups))
    plain = rng.normal(size=(LAYERS * num_groups, case.depth, case.num_columns)).astype(np.float32)
    w, of_reference = jnp.asarray(plain, dtype), x.astype(jnp.float32)
    if case.stored == "float8_e4m3fn":
        values, scales = quantize_float8(plain)
        if case.in_blocks:
            shape = (len(plain), case.depth // FLOAT8_BLOCK, case.num_columns)
            scales = (scales[:, None, :] * np.exp(rng.normal(size=shape))).astype(np.float32)
        w = Float8Weight(values=jnp.asarray(values), scales=jnp.asarray(scales))
        rounded, factors = float8_rows(x)  # by this function in the product, too
        of_reference = rounded.astype(jnp.float32) * factors
    elif case.stored == "int4":
        w = random_int4(
            len(plain), case.depth, case.num_columns, size=case.size, scales=case.scales, offsets=case.offsets, seed=1
        )
    elif case.stored:
        values, scales = quantize_int8(plain)
        w = Int8Weight(values=jnp.asarray(values), scales=jnp.asarray(scales))
    sizes = [jnp.asarray(case.groups, jnp.int32), jnp.int32(LAYER * num_groups)]
    interpret_pallas_call.reset_gpu_interpret_mode_state()
    if case.groups:
        rounded = w.dequantize().astype(dtype) if isinstance(w, Int4Weight) else w
        result, expected = compiled(case, True)(x, w, *sizes), grouped_matmul_reference(of_reference, rounded, *sizes)
    elif isinstance(w, Int4Weight):
        result = compiled(case, False)(x, w.at_layer(LAYER))
        expected = of_reference @ w.dequantize()[LAYER].astype(dtype).astype(jnp.float32)
    else:
        assert isinstance(w, Int8Weight | Float8Weight), "without groups, weights have scales"
        result = compiled(case, False)(x, w.at_layer(LAYER))
        values = w.values[LAYER].T if isinstance(w, Float8Weight) else w.values[LAYER]
        scales = w.scales[LAYER][None, :]
        if case.in_blocks:
            scales = jnp.repeat(w.scales[LAYER], FLOAT8_BLOCK, axis=0)
        expected = of_reference @ (values.astype(jnp.float32) * scales)
    assert not interpret_pallas_call.get_races().races_found
    # Both sum in float32, in different orders.
    np.testing.assert_allclose(np.asarray(result), np.asarray(expected), atol=2e-4, rtol=1e-5)


def main(which: str) -> None:
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    compile_once()
    for case in QUICK if which == "quick" else ALL if which == "all" else [ALL[int(which)]]:
        check_case(case)
        print(f"equal: {case}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
