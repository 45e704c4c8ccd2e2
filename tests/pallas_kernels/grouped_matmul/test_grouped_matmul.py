"""Grouped matmuls against NumPy, in every storage and implementation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import jax_versions, native
from pallas_kernels.grouped_matmul import IMPLEMENTATIONS, PackedGroups, grouped_matmul, grouped_swiglu, prepare
from pallas_kernels.matmul import Float8Weight, Int8Weight, quantize_float8
from tests.pallas_kernels.rounding import rounded
from tests.shape_checks import unchecked

TOO_OLD = jax_versions.too_old(jax_versions.GPU_KERNELS)
needs_native = pytest.mark.skipif(not native.available(), reason="no C++ compiler")

# More than a tile of rows, depths and widths that no vector length divides.
_T, _K, _N, _G = 70, 37, 45, 6
_SIZES = [[70, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 70], [1, 15, 0, 14, 29, 1], [0] * 6, [3, 0, 1, 0, 0, 2], [12] * 5 + [10]]


def _normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def _weights(w: np.ndarray, storage: str, *, platform: str = "cpu", gated: bool = False):
    if storage == "bfloat16":
        return prepare(jnp.asarray(w).astype(jnp.bfloat16), platform=platform, gated=gated)
    return prepare(w, quantize="int8" if storage == "int8" else None, platform=platform, gated=gated)


def _float8(w: np.ndarray) -> Float8Weight:
    values, scales = quantize_float8(w)
    return Float8Weight(values=jnp.asarray(values), scales=jnp.asarray(scales))


def _exact(w: np.ndarray, storage: str) -> np.ndarray:
    """float64: the weights that are stored."""
    if storage == "bfloat16":
        return np.asarray(jnp.asarray(w).astype(jnp.bfloat16), np.float64)
    if storage == "fp8":
        stored = _float8(w)
        return np.asarray(stored.values, np.float64).swapaxes(1, 2) * np.asarray(stored.scales, np.float64)[:, None]
    if storage == "int8":
        stored = prepare(w, quantize="int8", platform="tpu")
        assert isinstance(stored, Int8Weight)
        return np.asarray(stored.values, np.float64) * np.asarray(stored.scales, np.float64)[:, None]
    return w.astype(np.float64)


def _numpy(x: np.ndarray, w: np.ndarray, sizes, first: int = 0) -> np.ndarray:
    y, start = np.zeros((x.shape[0], w.shape[2])), 0
    for group, size in enumerate(sizes):
        y[start : start + size] = x[start : start + size].astype(np.float64) @ w[first + group]
        start += size
    return y


def _close(got, expected: np.ndarray) -> None:
    # float32 sums of _K products of size one
    np.testing.assert_allclose(got, expected, atol=1e-6 * _K, rtol=1e-5)


@needs_native
@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("sizes", _SIZES, ids=str)
def test_packed_groups_equal_numpy(sizes: list[int], storage: str):
    x, w = _normal(_T, _K), _normal(_G, _K, _N, seed=1)
    packed = _weights(w, storage)
    assert isinstance(packed, PackedGroups)
    assert packed.shape == w.shape
    expected = _numpy(rounded(x, storage), _exact(w, storage), sizes)
    _close(grouped_matmul(jnp.asarray(x), packed, jnp.asarray(sizes, jnp.int32)), expected)


@pytest.mark.parametrize("storage", ["float32", "int8", "fp8"])
@pytest.mark.parametrize(
    "implementation", [name for name in IMPLEMENTATIONS if name not in ("tpu", "gpu")]
)  # see test_tpu.py, test_hopper.py
def test_every_implementation_equals_numpy(implementation: str, storage: str):
    x, w = _normal(_T, _K), _normal(_G, _K, _N, seed=1)
    plain = _float8(w) if storage == "fp8" else _weights(w, storage, platform="tpu")
    run = jax.jit(lambda sizes: grouped_matmul(jnp.asarray(x), plain, sizes, implementation=implementation))
    for sizes in _SIZES:
        _close(run(jnp.asarray(sizes, jnp.int32)), _numpy(x, _exact(w, storage), sizes))


@pytest.mark.parametrize("implementation", ["reference", "tiles", "ragged_dot"])
def test_8_bit_floats_in_blocks_have_a_scale_for_each_128_inputs(implementation: str):
    x, w = _normal(_T, 256), _normal(_G, 256, _N, seed=1)
    values, _ = quantize_float8(w)
    scales = np.exp(_normal(_G, 2, _N, seed=2)) / 448
    stored = Float8Weight(values=jnp.asarray(values), scales=jnp.asarray(scales))
    exact = values.astype(np.float64).swapaxes(1, 2) * scales.repeat(128, axis=1)
    found = grouped_matmul(jnp.asarray(x), stored, jnp.asarray(_SIZES[0], jnp.int32), implementation=implementation)
    np.testing.assert_allclose(found, _numpy(x, exact, _SIZES[0]), atol=1e-3, rtol=1e-5)


_RUNS = {}


@needs_native
@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=_G, max_size=_G), st.integers(0, 20), st.integers(0, 2**32 - 1))
def test_any_sizes_equal_numpy(sizes: list[int], num_ungrouped: int, seed: int):
    while sum(sizes) + num_ungrouped > _T:
        sizes[int(np.argmax(sizes))] //= 2
        num_ungrouped //= 2
    x, w = _normal(_T, _K, seed=seed), _normal(_G, _K, _N, seed=1)
    x[sum(sizes) :] = np.nan  # rows of no group are never multiplied
    for storage in ("float32", "tiles"):
        if storage not in _RUNS:
            weights = _weights(w, "float32", platform="cpu" if storage == "float32" else "tpu")
            _RUNS[storage] = jax.jit(lambda x, sizes, weights=weights: grouped_matmul(x, weights, sizes))
        _close(_RUNS[storage](jnp.asarray(x), jnp.asarray(sizes, jnp.int32)), _numpy(x, w, sizes))


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("implementation", [None, "ragged_dot"])
def test_first_group_names_a_layer_of_a_stack(platform: str, implementation: str | None):
    x, w, sizes = _normal(20, _K), _normal(12, _K, _N, seed=1), [5, 0, 7]
    weights = _weights(w, "int8", platform=platform)
    if isinstance(weights, PackedGroups):
        implementation = None
    run = jax.jit(
        lambda first: grouped_matmul(
            jnp.asarray(x), weights, jnp.asarray(sizes, jnp.int32), first_group=first, implementation=implementation
        )
    )
    rows = rounded(x, "int8" if platform == "cpu" else "float32")
    for first in (0, 3, 9):
        _close(run(jnp.int32(first)), _numpy(rows, _exact(w, "int8"), sizes, first))


@needs_native
@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_grouped_swiglu_equals_numpy(platform: str, storage: str):
    x, w, sizes = _normal(20, _K), _normal(3, _K, 50, seed=1) / 4, [5, 0, 15]
    rows = rounded(x, storage if platform == "cpu" else "float32")
    gate, up = np.split(_numpy(rows, _exact(w, storage), sizes), 2, axis=1)
    weights = _weights(w, storage, platform=platform, gated=True)
    if isinstance(weights, jax.Array):  # on a TPU, bfloat16 weights are multiplied by bfloat16 activations
        weights = weights.astype(jnp.float32)
    _close(grouped_swiglu(jnp.asarray(x), weights, jnp.asarray(sizes, jnp.int32)), gate / (1 + np.exp(-gate)) * up)


@needs_native
@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8"])
def test_the_result_of_a_row_does_not_depend_on_other_rows(storage: str):
    depth = 2050  # more than the kernel processes in one pass
    x, w = jnp.asarray(_normal(60, depth)), _weights(_normal(2, depth, 70, seed=1), storage)
    run = jax.jit(lambda x, sizes: grouped_matmul(x, w, sizes))
    everything = np.asarray(run(x, jnp.asarray([0, 60], jnp.int32)))
    for alone in (1, 13, 14, 15, 31):  # the last rows: at another position, in another tile, with other rows
        mine = x[60 - alone :]
        padded = jnp.concatenate([mine, jnp.full((60 - alone, depth), 7.0)])
        for sizes in ([0, alone], [0, min(alone + 9, 60)]):
            got = np.asarray(run(padded, jnp.asarray(sizes, jnp.int32)))
            np.testing.assert_array_equal(got[:alone], everything[60 - alone :])


@needs_native
@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8"])
def test_a_layer_of_a_stack_multiplies_as_if_it_were_alone(storage: str):
    w = _normal(3, 4, 37, 50, seed=1)
    layers = [_weights(layer, storage) for layer in w]
    stack = jax.tree.map(lambda *rows: jnp.stack(rows), *layers)
    assert isinstance(stack, PackedGroups)
    assert (stack.shape, stack.at_layer(1).shape) == ((3, 4, 37, 50), (4, 37, 50))
    x, sizes = jnp.asarray(_normal(20, 37)), jnp.asarray([3, 9, 6], jnp.int32)

    def of_layer(_, layer):
        return None, grouped_matmul(x, stack.at_layer(layer), sizes, first_group=1)

    _, scanned = jax.lax.scan(of_layer, None, jnp.arange(3, dtype=jnp.int32))
    for layer in range(3):
        np.testing.assert_array_equal(scanned[layer], grouped_matmul(x, layers[layer], sizes, first_group=1))
    with pytest.raises(jax.errors.JaxRuntimeError, match="first_group is out of range"):
        jax.block_until_ready(grouped_matmul(x, stack.at_layer(3), sizes))


@needs_native
def test_the_compiled_program_does_not_copy_the_weights():
    w = _weights(_normal(4, 64, 96), "float32")
    assert isinstance(w, PackedGroups)
    program = jax.jit(grouped_matmul).lower(jnp.ones((8, 64)), w, jnp.ones(4, jnp.int32)).compile()
    assert program.memory_analysis().temp_size_in_bytes < w.panels.nbytes / 4
    assert program.as_text().count('custom_call_target="pallas_kernels_grouped_matmul"') == 1


def test_the_tile_loop_does_not_multiply_every_row_with_every_weight():
    w = jnp.asarray(_normal(64, 64, 96))
    run = jax.jit(lambda x, sizes: grouped_matmul(x, w, sizes, implementation="tiles"))
    cost = run.lower(jnp.ones((64, 64)), jnp.ones(64, jnp.int32)).compile().cost_analysis()
    # XLA counts the body of the loop once: it is a tile of 8 rows with one weight.
    assert cost is not None
    assert cost["flops"] < 2 * 8 * 64 * 96 * 1.5


@needs_native
def test_packed_groups_are_refused_for_other_platforms():
    packed = prepare(_normal(2, 8, 8), platform="cpu")
    with pytest.raises(ValueError, match=r"PackedGroups were lowered for platform 'tpu'.*prepare"):
        jax.jit(grouped_matmul).trace(jnp.ones((1, 8)), packed, jnp.ones(2, jnp.int32)).lower(lowering_platforms=("tpu",))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": (4, 7)}, r"x \[4, 7\] does not fit w \[3, 8, 6\]"),
        ({"sizes": (4,)}, "4 groups, but must have 1 to 3, the number of weights in w"),
        ({"sizes": (2, 2)}, r"must be int32\[X\]"),
        ({"first_group": 2}, r"must be in \[0, 1\]"),
        ({"implementation": "dense"}, "'dense' but must be one of 'reference'"),
    ],
)
def test_grouped_matmul_refuses_invalid_arguments(arguments: dict, message: str):
    shapes = {"x": (4, 8), "sizes": (2,), **arguments}
    options = {name: value for name, value in arguments.items() if name not in ("x", "sizes")}
    with unchecked(), pytest.raises(ValueError, match=message):
        grouped_matmul(jnp.ones(shapes["x"]), jnp.ones((3, 8, 6)), jnp.ones(shapes["sizes"], jnp.int32), **options)


@pytest.mark.parametrize(
    ("w", "options", "message"),
    [
        (np.zeros((3, 4), np.float32), {}, r"must be \[G, K, N\]"),
        (np.zeros((2, 3, 4), np.int8), {}, "dtype int8.*floating point"),
        (np.zeros((2, 3, 4), np.float32), {"quantize": "fp8"}, "'fp8'.*None, 'int8' or 'int4'"),
        (np.zeros((2, 3, 4), np.float32), {"platform": "metal"}, "'metal'"),
        (np.zeros((2, 3, 5), np.float32), {"gated": True}, "even, not 5"),
    ],
)
def test_prepare_refuses_what_it_cannot_store(w: np.ndarray, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        prepare(w, **{"platform": "cpu", **options})


@needs_native
def test_a_weight_is_refused_by_the_function_that_it_was_not_prepared_for():
    x, sizes = jnp.ones((2, 8)), jnp.ones(2, jnp.int32)
    with pytest.raises(ValueError, match="gated=True"):
        grouped_matmul(x, prepare(_normal(2, 8, 6), platform="cpu", gated=True), sizes)
    with pytest.raises(ValueError, match="gated=False"):
        grouped_swiglu(x, prepare(_normal(2, 8, 6), platform="cpu"), sizes)
    with pytest.raises(ValueError, match="have a single implementation"):
        grouped_matmul(x, prepare(_normal(2, 8, 6), platform="cpu"), sizes, implementation="tiles")


@needs_native
@pytest.mark.parametrize("layers", [(), (3,)], ids=["one", "stacked"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8])
def test_a_call_copies_no_weight(dtype: jnp.dtype, layers: tuple[int, ...]):
    # With one value per column and step, as on CPUs without bfloat16: reshaping such an array, XLA may copy it.
    groups, panels, steps, width = 4, 6, 48, 16
    scales = (*layers, groups, panels, width) if dtype == jnp.int8 else (0,)
    lowered = jax.jit(grouped_matmul).lower(
        jax.ShapeDtypeStruct((8, steps), jnp.float32),
        PackedGroups(
            panels=jax.ShapeDtypeStruct((*layers, groups, panels, steps, width, 1), dtype),
            scales=jax.ShapeDtypeStruct(scales, jnp.float32),
            num_inputs=steps,
            num_outputs=panels * width,
            gated=False,
            layer=jax.ShapeDtypeStruct((), jnp.int32) if layers else None,
        ),
        jax.ShapeDtypeStruct((groups,), jnp.int32),
    )
    assert "copy" not in lowered.compile().as_text()


@pytest.mark.skipif(TOO_OLD is not None, reason=f"the GPU kernel {TOO_OLD}")
def test_the_gpu_kernel_refuses_weights_that_are_not_whole_tiles():
    x, w = jnp.ones((8, 360), jnp.bfloat16), jnp.ones((2, 360, 128), jnp.bfloat16)
    with pytest.raises(
        ValueError, match=r"E and F multiples of 64 .*, but x is bfloat16 and w bfloat16\[2, 360, 128\]; pad w"
    ):
        grouped_matmul(x, w, jnp.asarray([4, 4], jnp.int32), implementation="gpu")
