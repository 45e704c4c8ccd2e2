"""Sums over four devices have the bits of a sum in the order of the devices, for every element; prints "equal" at the end.

XLA_FLAGS=--xla_force_host_platform_device_count=4 python -m tests.pallas_kernels.programs.ordered_sums
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from pallas_kernels.matmul import DividedArray, Division, Int8Weight, linear, quantize_int8
from pallas_kernels.ordered_sum import ordered_sum, ordered_sum_of_few

COUNT = 4
MESH = Mesh(np.array(jax.devices()[:COUNT]), ("devices",))
OF_DEVICES, WHOLE = PartitionSpec("devices"), PartitionSpec()
run = partial(jax.shard_map, mesh=MESH, check_vma=False)


def in_order(parts: np.ndarray) -> np.ndarray:
    total = parts[0].astype(np.float32)
    for part in parts[1:]:
        total = total + part.astype(np.float32)
    return total


def check_sums(rows: int, columns: int, dtype: str) -> None:
    """Whole shares of rows, of columns, or of neither, with and without a residual."""
    rng = np.random.default_rng(rows)
    # Beside the large ones, a single small one vanishes and two of them do not, so that each order gives other bits.
    sizes = np.where(rng.random((COUNT, rows, columns)) < 0.5, 2.0**19, 2.0**-5)
    parts = np.asarray(jnp.asarray(rng.standard_normal(sizes.shape) * sizes, dtype))
    residual = np.asarray(jnp.asarray(rng.standard_normal((rows, columns)), dtype))
    wanted = in_order(parts)
    assert (wanted != in_order(parts[::-1])).any(), "the test cannot fail: every order gives the same bits"

    def whole(parts: jax.Array, residual: jax.Array, dtype: str) -> tuple[jax.Array, jax.Array]:
        alone = ordered_sum(parts[0], "devices", COUNT, dtype=dtype)
        return alone, ordered_sum(parts[0], "devices", COUNT, residual=residual, dtype=dtype)

    for kept in {"float32", dtype}:
        function = run(partial(whole, dtype=kept), in_specs=(OF_DEVICES, WHOLE), out_specs=WHOLE)
        alone, added = jax.jit(function)(parts, residual)
        given = jnp.dtype(kept)
        assert alone.dtype == added.dtype == given
        np.testing.assert_array_equal(alone, np.asarray(jnp.asarray(wanted).astype(given)))
        np.testing.assert_array_equal(
            added, np.asarray((jnp.asarray(wanted) + jnp.asarray(residual, jnp.float32)).astype(given))
        )
    few = run(lambda parts: ordered_sum_of_few(parts[0], "devices"), in_specs=OF_DEVICES, out_specs=WHOLE)
    np.testing.assert_array_equal(jax.jit(few)(parts), wanted)


def check_products() -> None:
    """The products of parts of the inputs, of a plain weight and of one with scales, added to a residual."""
    rng = np.random.default_rng(0)
    x, w, residual = (rng.standard_normal(shape, np.float32) for shape in ((8, 64), (64, 12), (8, 12)))
    division = Division(mesh=MESH, axis="devices", of_inputs=True, in_order=True)
    values, scales = map(jnp.asarray, quantize_int8(w))
    for weight, plain in (
        (DividedArray(values=jnp.asarray(w), division=division), w),
        (Int8Weight(values=values, scales=scales, division=division), values.astype(jnp.float32) * scales[None, :]),
    ):
        wanted = x @ np.asarray(plain) + residual
        y = jax.jit(linear)(x.reshape(2, 4, 64), weight, residual=residual.reshape(2, 4, 12))
        np.testing.assert_allclose(y.reshape(8, 12), wanted, atol=2e-5)


check_sums(8, 6, "float32")
check_sums(7, 8, "bfloat16")
check_sums(5, 7, "float32")
check_products()
print("equal")
