"""`linear` and `swiglu`: every storage of a weight against NumPy in float64."""

from __future__ import annotations

import concurrent.futures

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import gpu_target, native, tpu_target
from pallas_kernels.matmul import (
    Float8Weight,
    Int8Weight,
    PackedWeight,
    cpu,
    linear,
    prepare,
    quantize_float8,
    quantize_int8,
    swiglu,
)
from pallas_kernels.matmul.narrow import float8_rows, int8_rows
from tests.pallas_kernels.rounding import rounded
from tests.shape_checks import unchecked

needs_native = pytest.mark.skipif(not native.available(), reason=str(native.unavailable_reason()))

# A chain of K float32 additions of terms near 1 is off by less than K / 2 ulp; far less in practice.
_ULP = 2.0**-23
# Shapes [M, K, N] with everything odd; 2049 and 4100 are more than one part of the contraction axis.
_RAGGED = [
    (1, 1, 1),
    (2, 33, 7),
    (7, 577, 50),
    (13, 64, 31),
    (14, 65, 32),
    (15, 100, 333),
    (29, 2049, 95),
    (70, 4100, 33),
]


def _normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def _exact(w: np.ndarray, storage: str) -> np.ndarray:
    """float64 of what is stored for `w`."""
    if storage == "int8":
        values, scales = quantize_int8(w)
        return values.astype(np.float64) * scales
    return w.astype(jnp.bfloat16).astype(np.float64) if storage == "bfloat16" else w.astype(np.float64)


def _prepare(w: np.ndarray, storage: str, *, platform: str = "cpu", gated: bool = False):
    if storage == "bfloat16":
        w = w.astype(jnp.bfloat16)
    return prepare(w, quantize="int8" if storage == "int8" else None, platform=platform, gated=gated)


@jax.jit
def linear_each(inputs: list[jax.Array], w: PackedWeight) -> list[jax.Array]:
    """All products in one program, since each number of rows alone would be a program."""
    return [linear(x, w) for x in inputs]


def _close(actual: jax.Array, expected: np.ndarray, depth: int) -> None:
    scale = np.abs(expected).max() + np.sqrt(depth)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=4 * _ULP * scale * np.sqrt(depth))


@needs_native
@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(("m", "k", "n"), _RAGGED)
def test_packed_linear_equals_numpy(m: int, k: int, n: int, storage: str):
    x, w, residual = _normal(m, k), _normal(k, n, seed=1), _normal(m, n, seed=2)
    packed = _prepare(w, storage)
    assert isinstance(packed, PackedWeight)
    assert packed.shape == (k, n)
    expected = rounded(x, storage) @ _exact(w, storage)
    plain, added = jax.jit(lambda x, w, residual: (linear(x, w), linear(x, w, residual=residual)))(x, packed, residual)
    _close(plain, expected, k)
    _close(added, expected + residual, k)


@needs_native
@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8"])
def test_packed_linear_equals_numpy_for_every_small_number_of_rows(storage: str):
    w = _normal(37, 45, seed=1)
    packed, exact = _prepare(w, storage), _exact(w, storage)
    inputs = [_normal(m, 37, seed=m) for m in range(1, 71)]
    for x, y in zip(inputs, linear_each(inputs, packed), strict=True):
        _close(y, rounded(x, storage) @ exact, 37)


@needs_native
@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("f", [1, 16, 50])
def test_swiglu_equals_numpy_in_every_storage(f: int, platform: str, storage: str):
    x, w = _normal(17, 65), _normal(65, 2 * f, seed=1) / 8
    gate, up = np.split(rounded(x, storage if platform == "cpu" else "float32") @ _exact(w, storage), 2, axis=1)
    prepared = _prepare(w, storage, platform=platform, gated=True)
    # On a TPU, bfloat16 weights are multiplied by bfloat16 activations; this test covers only the storage.
    if isinstance(prepared, jax.Array):
        prepared = prepared.astype(jnp.float32)
    _close(swiglu(jnp.asarray(x), prepared), gate / (1 + np.exp(-gate)) * up, 65)


@needs_native
@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8"])
def test_the_result_of_a_row_does_not_depend_on_other_rows(storage: str):
    x = _normal(130, 2050)
    packed = _prepare(_normal(2050, 70, seed=1), storage)
    gated = _prepare(_normal(2050, 140, seed=2), storage, gated=True)
    everything, everything_gated = np.asarray(linear(jnp.asarray(x), packed)), np.asarray(swiglu(jnp.asarray(x), gated))
    rows = range(0, 130, 7)
    for i, y in zip(rows, linear_each([x[i : i + 1] for i in rows], packed), strict=True):
        np.testing.assert_array_equal(y[0], everything[i])
    # The last m rows: each is now at a different position.
    counts = (1, 2, 3, 5, 8, 13, 14, 15, 16, 17, 28, 29, 31, 32, 33, 64, 65, 127, 128, 129)
    for m, y in zip(counts, linear_each([x[-m:] for m in counts], packed), strict=True):
        np.testing.assert_array_equal(y, everything[-m:])
    counts = (1, 2, 14, 15, 64, 129)
    gated_each = jax.jit(lambda inputs, w: [swiglu(x, w) for x in inputs])
    for m, y in zip(counts, gated_each([x[-m:] for m in counts], gated), strict=True):
        np.testing.assert_array_equal(y, everything_gated[-m:])


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_int8_is_off_by_at_most_half_a_scale_for_each_weight(platform: str):
    x, w = _normal(9, 200), _normal(200, 40, seed=1)
    w[:, 3] = 0
    half_a_scale = np.abs(w).max(axis=0) / 254
    bound = np.abs(x).sum(axis=1)[:, None] * half_a_scale
    y = linear(jnp.asarray(x), prepare(w, quantize="int8", platform=platform))
    error = np.abs(np.asarray(y) - rounded(x, "int8" if platform == "cpu" else "float32") @ w)
    assert (error <= bound * 1.001 + 1e-5).all()
    assert (np.asarray(y)[:, 3] == 0).all()


def test_on_other_platforms_a_weight_stays_a_plain_array_or_becomes_int8():
    w = _normal(20, 30)
    assert isinstance(prepare(w, platform="tpu"), jax.Array)
    quantized = prepare(w, quantize="int8", platform="cuda")
    assert isinstance(quantized, Int8Weight)
    assert quantized.shape == (20, 30)
    x = jnp.asarray(_normal(2, 3, 20))
    _close(linear(x, quantized), np.asarray(x, np.float64) @ _exact(w, "int8"), 20)


def test_8_bit_floats_are_multiplied_as_the_numbers_that_they_are():
    w = _normal(64, 32)
    values, scales = quantize_float8(w)
    exact = values.astype(np.float64).T * scales
    assert (np.abs(exact - w) <= 2.0**-4 * np.abs(w).max(axis=0)).all()
    stack = Float8Weight(values=jnp.asarray(values)[None], scales=jnp.asarray(scales)[None])
    x = _normal(3, 64)
    assert stack.shape == (1, 64, 32)
    _close(linear(jnp.asarray(x), stack.at_layer(0)), x.astype(np.float64) @ exact, 64)
    rows, factors = float8_rows(jnp.asarray(x) * jnp.float32([[0.0], [1e-30], [1e30]]))
    assert rows.dtype == jnp.float8_e4m3fn
    error = np.abs(np.asarray(rows, np.float64) * np.asarray(factors) - x.astype(np.float64) * [[0.0], [1e-30], [1e30]])
    assert (error <= 2.0**-4 * np.abs(x) * [[0.0], [1e-30], [1e30]] + 448 * 2.0**-19 * np.asarray(factors)).all()


def test_8_bit_floats_in_blocks_are_multiplied_with_the_scale_of_each_128_inputs():
    w = _normal(256, 32)
    values, _ = quantize_float8(w)
    scales = np.exp(_normal(2, 32, seed=1))
    exact = values.astype(np.float64).T * scales.repeat(128, axis=0)
    stack = Float8Weight(values=jnp.asarray(values)[None], scales=jnp.asarray(scales)[None])
    assert stack.in_blocks
    assert stack.shape == (1, 256, 32)
    x = _normal(3, 256)
    # The numbers are up to 448 and scales up to e^3.
    got = linear(jnp.asarray(x), stack.at_layer(0))
    np.testing.assert_allclose(got, x.astype(np.float64) @ exact, atol=1e-5 * np.abs(exact).max(), rtol=1e-5)


def test_int8_is_multiplied_by_rows_in_int8_exactly():
    x, w = _normal(2, 5, 200) * np.float32([[[1e-3]], [[1e20]]]), _normal(2, 200, 40, seed=1)
    x[0, 1] = 0
    values, scales = quantize_int8(w)
    stack = Int8Weight(values=jnp.asarray(values), scales=jnp.asarray(scales), rounds_rows=True)
    rows, factors = int8_rows(jnp.asarray(x))
    assert rows.dtype == jnp.int8
    assert (np.abs(np.asarray(rows) * np.asarray(factors) - x) <= np.abs(x).max(axis=-1, keepdims=True) / 254 * 1.0001).all()
    largest = np.abs(np.asarray(rows, np.int32)).max(axis=-1)
    np.testing.assert_array_equal(largest, np.where(x.any(axis=-1), 127, 0))
    sums = np.asarray(rows, np.int64) @ values[1].astype(np.int64)
    expected = sums * np.asarray(factors, np.float64) * scales[1]
    y = linear(jnp.asarray(x), stack.at_layer(1))
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=0)
    np.testing.assert_allclose(linear(jnp.asarray(x), jax.tree.map(lambda part: part[1], stack)), y, rtol=1e-6)
    added = linear(jnp.asarray(x[0]), stack.at_layer(1), residual=jnp.ones((5, 40), jnp.float32))
    np.testing.assert_allclose(added, expected[0] + 1, rtol=1e-5)
    gate, up = np.split(expected[0], 2, axis=-1)
    np.testing.assert_allclose(swiglu(jnp.asarray(x[0]), stack.at_layer(1)), gate / (1 + np.exp(-gate)) * up, atol=1e-9)


def test_rounded_rows_differ_from_those_of_weight_only_int8_as_much_as_one_expects():
    x, w = _normal(8, 512), _normal(512, 64, seed=1)
    values, scales = (jnp.asarray(part) for part in quantize_int8(w))
    only, both = (
        linear(jnp.asarray(x), Int8Weight(values=values, scales=scales, rounds_rows=rounds)) for rounds in (False, True)
    )
    error = np.sqrt(np.mean(np.square(np.asarray(both - only))) / np.mean(np.square(np.asarray(only))))
    assert 0.003 < error < 0.015  # a step of a row is its largest number / 127: 3.2 / 127 / sqrt(12) of its deviation


def test_8_bit_floats_are_multiplied_by_rows_in_8_bits_on_a_tpu_that_can(monkeypatch: pytest.MonkeyPatch):
    w, x = _normal(256, 32), jnp.asarray(_normal(3, 256, seed=1))
    values, scales = quantize_float8(w)
    weight = Float8Weight(values=jnp.asarray(values), scales=jnp.asarray(scales))
    plain = linear(x, weight)
    monkeypatch.setattr(tpu_target, "device_kind", lambda: "tpu7x")
    rows, factors = float8_rows(x)
    expected = np.asarray(rows, np.float64) @ values.astype(np.float64).T * np.asarray(factors, np.float64) * scales
    y = linear(x, weight)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(np.asarray(y) - np.asarray(plain)).max() > 1e-2
    in_blocks = Float8Weight(values=weight.values, scales=jnp.broadcast_to(weight.scales, (2, 32)))
    np.testing.assert_allclose(linear(x, in_blocks), plain, rtol=1e-5, atol=1e-5)  # activations are as they were
    monkeypatch.setattr(tpu_target, "device_kind", lambda: "v6e")
    np.testing.assert_array_equal(linear(x, weight), plain)


def test_stacked_int8_layers_can_be_scanned():
    w = _normal(3, 8, 8)
    values, scales = quantize_int8(w)
    stacked = Int8Weight(values=jnp.asarray(values), scales=jnp.asarray(scales))
    x = jnp.asarray(_normal(4, 8))
    result, _ = jax.lax.scan(lambda y, layer: (linear(y, layer), None), x, stacked)
    expected = np.asarray(x, np.float64)
    for layer in values.astype(np.float64) * scales[:, None, :]:
        expected = expected @ layer
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-4)


@needs_native
def test_leading_axes_and_narrow_activations_keep_shape_and_dtype():
    w = _normal(24, 18, seed=1)
    x = jnp.asarray(_normal(2, 3, 24)).astype(jnp.bfloat16)
    for weight in (prepare(w, platform="cpu"), jnp.asarray(w).astype(jnp.bfloat16)):
        y = linear(x, weight, residual=jnp.ones((2, 3, 18), jnp.bfloat16))
        assert y.shape == (2, 3, 18)
        assert y.dtype == jnp.bfloat16
        # bfloat16 has 8 significant bits, and the second weight is rounded to it.
        np.testing.assert_allclose(y.astype(jnp.float32), np.asarray(x, np.float64) @ w + 1, rtol=0.02, atol=0.1)
    assert linear(x[:0], prepare(w, platform="cpu")).shape == (0, 3, 18)


def test_plain_weights_are_differentiable():
    x, w = jnp.asarray(_normal(5, 6)), jnp.asarray(_normal(6, 7, seed=1))
    gradient = jax.grad(lambda w: linear(x, w).sum())(w)
    np.testing.assert_allclose(gradient, jnp.repeat(x.sum(0)[:, None], 7, axis=1), rtol=1e-5)


@needs_native
def test_eight_threads_may_call_at_the_same_time():
    w = _normal(300, 200, seed=1)
    packed = prepare(w, platform="cpu")
    run = jax.jit(lambda x: linear(linear(x, packed)[:, :100] @ jnp.ones((100, 300)), packed))
    inputs = [jnp.asarray(_normal(m, 300, seed=m)) for m in (1, 2, 30, 31, 64, 65, 100, 7)]
    expected = [np.asarray(run(x)) for x in inputs]

    def repeat(i: int) -> bool:
        return all(np.array_equal(run(inputs[i]), expected[i]) for _ in range(20))

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(repeat, range(8)))


@needs_native
def test_the_compiled_program_does_not_copy_the_weight():
    packed = [prepare(_normal(64, 96, seed=i), quantize=q, platform="cpu") for i, q in enumerate((None, "int8"))]
    program = jax.jit(lambda x, ws: [linear(x, w) for w in ws]).lower(jnp.ones((1, 64)), packed).compile()
    text = program.as_text()
    assert text.count('custom_call_target="pallas_kernels_matmul"') == 2
    for w in packed:
        shape = ",".join(map(str, w.panels.shape))
        uses = [line for line in text.splitlines() if f"[{shape}]" in line and " parameter(" not in line]
        assert uses
        others = [line for line in uses if not any(word in line for word in ("pallas_kernels_matmul", "ENTRY", "HloModule"))]
        assert others == []


def _packed_stack(w: np.ndarray, storage: str, *, gated: bool = False) -> PackedWeight:
    return jax.tree.map(lambda *rows: jnp.stack(rows), *(_prepare(layer, storage, gated=gated) for layer in w))


@needs_native
@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8"])
def test_a_layer_of_a_stack_multiplies_as_if_it_were_alone(storage: str):
    w = _normal(3, 37, 50, seed=1)
    stacks = {gated: _packed_stack(w, storage, gated=gated) for gated in (False, True)}
    assert stacks[False].shape == (3, 37, 50)
    assert stacks[False].at_layer(1).shape == (37, 50)
    with unchecked(), pytest.raises(ValueError, match="does not fit"):
        linear(jnp.ones((1, 37)), stacks[False])
    for m in (1, 17):
        x, residual = jnp.asarray(_normal(m, 37)), jnp.asarray(_normal(m, 50, seed=2))

        def of_layer(_, layer, x=x, residual=residual):
            y = linear(x, stacks[False].at_layer(layer), residual=residual)
            return None, (y, swiglu(x, stacks[True].at_layer(layer)))

        _, (plain, gated) = jax.lax.scan(of_layer, None, jnp.arange(3, dtype=jnp.int32))
        for layer in range(3):
            alone = linear(x, _prepare(w[layer], storage), residual=residual)
            np.testing.assert_array_equal(plain[layer], alone)
            np.testing.assert_array_equal(linear(x, stacks[False].at_layer(layer), residual=residual), alone)
            np.testing.assert_array_equal(gated[layer], swiglu(x, _prepare(w[layer], storage, gated=True)))


@needs_native
@pytest.mark.parametrize("layer", [-1, 3])
def test_a_layer_outside_the_stack_is_an_error(layer: int):
    stack = _packed_stack(_normal(3, 8, 8), "float32")
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"layer {layer} of a weight with 3 layers"):
        jax.block_until_ready(linear(jnp.ones((1, 8)), stack.at_layer(layer)))


@needs_native
def test_a_packed_weight_is_refused_for_other_platforms():
    packed = prepare(_normal(8, 8), platform="cpu")
    with pytest.raises(ValueError, match=r"PackedWeight was lowered for platform 'tpu'.*prepare"):
        jax.jit(linear).trace(jnp.ones((1, 8)), packed).lower(lowering_platforms=("tpu",))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"w": np.zeros((2, 3, 4), np.float32), "platform": "cpu"}, r"shape \(2, 3, 4\).*one by one"),
        ({"w": np.zeros((3, 4), np.int8), "platform": "cpu"}, "dtype int8.*floating point"),
        (
            {"w": np.zeros((3, 4), np.float32), "platform": "cpu", "quantize": "int2"},
            "'int2'.*None, 'int8' or 'int4'",
        ),
        ({"w": np.zeros((3, 4), np.float32), "platform": "metal"}, "'metal'"),
        ({"w": np.zeros((3, 5), np.float32), "platform": "tpu", "gated": True}, "even, not 5"),
        ({"w": np.full((3, 5), np.nan, np.float32), "platform": "tpu", "quantize": "int8"}, "NaN"),
    ],
)
def test_prepare_refuses_what_it_cannot_store(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        prepare(**arguments)


@needs_native
def test_linear_and_swiglu_refuse_invalid_arguments():
    w = _normal(8, 6)
    plain, gated = prepare(w, platform="cpu"), prepare(w, platform="cpu", gated=True)
    x = jnp.ones((2, 8))
    with unchecked(), pytest.raises(ValueError, match="gated=True"):
        linear(x, gated)
    with unchecked(), pytest.raises(ValueError, match="gated=False"):
        swiglu(x, plain)
    with unchecked(), pytest.raises(ValueError, match="does not fit"):
        linear(jnp.ones((2, 7)), plain)
    with unchecked(), pytest.raises(ValueError, match="residual is"):
        linear(x, plain, residual=jnp.ones((2, 5)))
    with unchecked(), pytest.raises(ValueError, match="a multiple of 2, not 5"):
        swiglu(x, jnp.ones((8, 5)))


@needs_native
@pytest.mark.parametrize("layers", [(), (3,)], ids=["one", "stacked"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8])
def test_a_call_copies_no_weight(dtype: jnp.dtype, layers: tuple[int, ...]):
    # With one value per column and step, as on CPUs without bfloat16: reshaping such an array, XLA may copy it.
    panels = jax.ShapeDtypeStruct((*layers, 6, 48, 16, 1), dtype)
    scales = jax.ShapeDtypeStruct((*layers, 6, 16), jnp.float32) if dtype == jnp.int8 else None
    x = jax.ShapeDtypeStruct((8, 48), jnp.float32)
    layer = jax.ShapeDtypeStruct((), jnp.int32) if layers else None
    lowered = cpu.multiply.lower(x, panels, scales, layer, None, None, num_outputs=96, gated=False)
    assert "copy" not in lowered.compile().as_text()


def test_on_a_gpu_float32_rows_of_any_size_are_multiplied_with_float16_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_target, "is_gpu", lambda: True)
    w = _normal(96, 40, seed=1).astype(np.float16)
    x = _normal(6, 96) * np.float32([[1e-30], [1e-3], [1.0], [1e5], [1e30], [0.0]])
    assert f"f32[{w.shape[0]},{w.shape[1]}]" not in str(jax.make_jaxpr(linear)(x, w))  # no copy of the weight
    expected = x.astype(np.float64) @ w.astype(np.float64)
    error = np.abs(np.asarray(jax.jit(linear)(x, w)) - expected).max(axis=1)
    assert (error <= 2.0**-11 * np.abs(x).max(axis=1) * np.abs(w.astype(np.float32)).sum(axis=0).max()).all()
