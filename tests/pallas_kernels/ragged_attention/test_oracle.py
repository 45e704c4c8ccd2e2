"""The reference equals a loop in NumPy; every implementation equals the reference."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import gpu_target
from pallas_kernels.ragged_attention import QUANTIZED_DTYPES, Latents, ragged_attention
from pallas_kernels.ragged_attention.cpu import call as cpu
from pallas_kernels.ragged_attention.quantized import gather_blocks, is_quantized, quantize
from tests.pallas_kernels.ragged_attention.ragged_batches import Batch, as_cache, make_batch, make_latent

NUM_SEQUENCES, NUM_TOKENS, MAX_CONTEXT = 5, 72, 330  # more than one segment (256 keys) of the native kernel
# Scores are sums of D products of float32: a few units in the last place of values near 1, more for a long head.
TOLERANCE = 2e-5

needs_native = pytest.mark.skipif(not cpu.available(), reason="no C++ compiler here")
IMPLEMENTATIONS = ["xla", pytest.param("cpu", marks=needs_native)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    num_kv_heads: int
    group: int
    head_dim: int
    block_size: int
    soft_cap: float | None = None
    alibi: bool = False
    sinks: bool = False
    dtype: str = "float32"

    def options(self) -> dict[str, object]:
        heads = self.num_kv_heads * self.group
        options: dict[str, object] = {"soft_cap": self.soft_cap}
        if self.alibi:
            options["alibi_slopes"] = jnp.asarray(2.0 ** -np.linspace(1, 8, heads), jnp.float32)
        if self.sinks:
            options["sinks"] = jnp.asarray(np.linspace(-3, 6, heads), jnp.float32)
        return options


SHAPES = [
    Shape(num_kv_heads=3, group=3, head_dim=64, block_size=16),
    Shape(num_kv_heads=2, group=4, head_dim=80, block_size=8, soft_cap=2.0, alibi=True),
    Shape(num_kv_heads=2, group=3, head_dim=96, block_size=5, soft_cap=5.0, sinks=True),
    Shape(num_kv_heads=2, group=3, head_dim=20, block_size=1),
    Shape(num_kv_heads=2, group=2, head_dim=64, block_size=16, dtype="bfloat16"),
    Shape(num_kv_heads=2, group=3, head_dim=64, block_size=16, dtype="int8", sinks=True),
]
MORE_SHAPES = [  # the same code with other numbers
    Shape(num_kv_heads=1, group=1, head_dim=16, block_size=16),
    Shape(num_kv_heads=1, group=71, head_dim=64, block_size=16, sinks=True, alibi=True),
    Shape(num_kv_heads=1, group=4, head_dim=128, block_size=32, sinks=True),
    Shape(num_kv_heads=2, group=1, head_dim=256, block_size=128),
    Shape(num_kv_heads=1, group=2, head_dim=20, block_size=5, dtype="float8_e4m3fn", alibi=True),
]


@st.composite
def ragged_chunks(draw: st.DrawFn) -> list[tuple[int, int]]:
    chunks, room = [], NUM_TOKENS
    for _ in range(NUM_SEQUENCES):
        query = draw(st.sampled_from([0, 1, 1, 2, 5, 16, 40]).filter(lambda n: n <= room))  # noqa: B023
        old = draw(st.one_of(st.sampled_from([0, 15, 16, 63, 64, 255, 256]), st.integers(0, MAX_CONTEXT - 40)))
        chunks.append((query, query + old if query else 0))
        room -= query
    return chunks


@functools.cache
def compiled(implementation: str):
    return jax.jit(functools.partial(ragged_attention, implementation=implementation))


def run(batch: Batch, implementation: str, **options: object) -> list[np.ndarray]:
    arguments = batch.arguments(**options)
    return [np.asarray(x, np.float32) for x in jax.tree.leaves(compiled(implementation)(**arguments))]


def loop_in_numpy(batch: Batch, *, window: int, soft_cap: float | None, alibi_slopes=None, sinks=None) -> np.ndarray:
    """One score at a time, in float64, from the histories: no cache, no blocks."""
    q, starts = batch.arrays["q"].astype(np.float64), batch.arrays["query_starts"]
    out = np.zeros_like(q)
    for s, (keys, values) in enumerate(batch.histories):
        group = q.shape[1] // keys.shape[1]
        for t in range(starts[s], starts[s + 1]):
            p = len(keys) - starts[s + 1] + t
            seen = np.arange(max(0, p - window + 1), p + 1)
            for h in range(q.shape[1]):
                scores = keys[seen, h // group].astype(np.float64) @ q[t, h] * q.shape[2] ** -0.5
                if soft_cap is not None:
                    scores = soft_cap * np.tanh(scores / soft_cap)
                if alibi_slopes is not None:
                    scores = scores + float(alibi_slopes[h]) * (seen - p)
                total = np.exp(scores).sum() + (np.exp(float(sinks[h])) if sinks is not None else 0.0)
                out[t, h] = np.exp(scores) @ values[seen, h // group] / total
    return out


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_reference_equals_a_loop_over_every_score(shape: Shape) -> None:
    batch = make_batch(
        [(1, 33), (0, 0), (7, 7), (3, 20)],
        num_kv_heads=shape.num_kv_heads,
        group=shape.group,
        head_dim=shape.head_dim,
        block_size=shape.block_size,
    )
    out, k_cache, v_cache = run(batch, "reference", sliding_window=9, **shape.options())
    expected = loop_in_numpy(batch, window=9, **shape.options())
    np.testing.assert_allclose(out, expected, atol=TOLERANCE, rtol=0)
    for s, (keys, values) in enumerate(batch.histories):
        positions = np.arange(len(keys))
        block = batch.arrays["block_tables"][s, positions // shape.block_size] + batch.layer * batch.num_blocks
        np.testing.assert_array_equal(k_cache[block, :, positions % shape.block_size], keys)
        np.testing.assert_array_equal(v_cache[block, :, positions % shape.block_size], values)


@pytest.mark.parametrize(
    "shape", [*SHAPES, *(pytest.param(shape, marks=pytest.mark.slow) for shape in MORE_SHAPES)], ids=str
)
def test_implementations_equal_the_reference(shape: Shape) -> None:
    max_blocks = -(-MAX_CONTEXT // shape.block_size)
    names = ["xla", "cpu"] if cpu.available() and not is_quantized(shape.dtype) else ["xla"]

    @settings(max_examples=6, deadline=None, derandomize=True, database=None)
    @given(chunks=ragged_chunks(), window=st.sampled_from([1, 10, 64, 100, 2**31 - 1]), layer=st.integers(0, 2))
    def check(chunks: list[tuple[int, int]], window: int, layer: int) -> None:
        batch = make_batch(
            chunks,
            num_kv_heads=shape.num_kv_heads,
            group=shape.group,
            head_dim=shape.head_dim,
            block_size=shape.block_size,
            layer=layer,
            num_tokens=NUM_TOKENS,
            max_blocks=max_blocks,
            num_blocks=NUM_SEQUENCES * max_blocks,
            dtype=jnp.dtype(shape.dtype),
        )
        options = shape.options() | {"sliding_window": jnp.asarray(window, jnp.int32)}
        expected = run(batch, "reference", **options)
        assert np.isfinite(expected[0]).all()
        for name in names:
            out, *caches = run(batch, name, **options)
            np.testing.assert_allclose(out, expected[0], atol=TOLERANCE, rtol=0, err_msg=name)
            for cache, expected_cache in zip(caches, expected[1:], strict=True):
                np.testing.assert_array_equal(cache, expected_cache, err_msg=name)

    check()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("chunks", [[(20, 300), (1, 200), (1, 5), (0, 0)], [(1, 40)]])
def test_latents_give_the_results_of_separate_values(implementation: str, chunks: list[tuple[int, int]]) -> None:
    latents = Latents(key_dim=40, value_dim=32)
    batch = make_batch(chunks, group=5, head_dim=48)
    make_latent(batch, latents)
    expected = run(batch, "reference")[0][..., :32]
    out, k_cache, _ = run(batch, implementation, latents=latents)
    np.testing.assert_allclose(out[..., :32], expected, atol=TOLERANCE)
    assert np.isfinite(out).all()
    if implementation == "xla":  # reads them with the keys
        batch.arrays["v_cache"][...] = np.nan
        again, same_keys, _ = run(batch, implementation, v=jnp.full_like(batch.arrays["v"], jnp.nan), latents=latents)
        np.testing.assert_array_equal(again, out)
        np.testing.assert_array_equal(same_keys, k_cache)
        assert not out[..., 32:].any()
    once = run(batch, implementation, v_cache=None, v=jnp.full_like(batch.arrays["v"], jnp.nan), latents=latents)
    np.testing.assert_array_equal(once[0][..., :32], out[..., :32])
    np.testing.assert_array_equal(once[1], k_cache)
    assert np.isfinite(once[0]).all()
    assert len(once) == 2


@pytest.mark.parametrize("dtype", QUANTIZED_DTYPES)
def test_8_bit_latents_without_a_cache_of_values_have_one_scale_for_both(dtype: str) -> None:
    latents = Latents(key_dim=40, value_dim=32)
    batch = make_batch([(20, 300), (1, 200), (0, 0)], group=5, head_dim=48, unused_kv=0.0)
    make_latent(batch, latents)
    plain = batch.arrays["k_cache"]
    batch.arrays["k_cache"] = as_cache(plain, jnp.dtype(dtype))
    expected = run(batch, "reference", v_cache=None, latents=latents)
    out, *caches = run(batch, "xla", v_cache=None, latents=latents)
    np.testing.assert_allclose(out[..., :32], expected[0][..., :32], atol=TOLERANCE)
    for cache, expected_cache in zip(caches, expected[1:], strict=True):
        np.testing.assert_array_equal(cache, expected_cache)
    batch.arrays["k_cache"] = plain
    np.testing.assert_allclose(out[..., :32], run(batch, "xla", v_cache=None, latents=latents)[0][..., :32], atol=0.1)


@pytest.mark.parametrize("dtype", QUANTIZED_DTYPES)
def test_an_8_bit_cache_is_attended_to_as_the_numbers_that_it_represents(dtype: str) -> None:
    batch = make_batch([(1, 33), (7, 7), (3, 20)], dtype=jnp.dtype(dtype), group=3, num_kv_heads=2)
    out, *caches = compiled("reference")(**batch.arguments())
    plain = [gather_blocks(cache, jnp.arange(cache.shape[0])) for cache in caches]
    written = {"k_cache": plain[0], "v_cache": plain[1], "kv_slots": np.full_like(batch.arrays["kv_slots"], 2**30)}
    expected, *_ = compiled("reference")(**batch.arguments(**written))
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize(("dtype", "largest_error"), [("int8", 0.5 / 127), ("float8_e4m3fn", 2.0**-4)])
def test_a_quantized_number_is_off_by_at_most_half_a_step_of_its_largest_neighbor(dtype: str, largest_error: float) -> None:
    x = np.random.default_rng(0).standard_normal((50, 3, 64), dtype=np.float32) * np.logspace(-20, 10, 50)[:, None, None]
    x = x.astype(np.float32)
    values, scales = jax.jit(quantize, static_argnums=1)(x, dtype)
    error = np.abs(np.asarray(values, np.float32) * np.asarray(scales)[..., None] - x)
    assert (error <= np.abs(x).max(axis=-1, keepdims=True) * largest_error * 1.001).all()
    zeros, ones = quantize(jnp.zeros((2, 8)), dtype)
    assert not np.asarray(zeros, np.float32).any()
    np.testing.assert_array_equal(ones, 1.0)


def small_batch(chunks: list[tuple[int, int]], **changes: object) -> Batch:
    """Three sequences in shapes that are the same for every test, so that each implementation compiles once."""
    return make_batch(chunks, num_tokens=48, num_blocks=50, max_blocks=20, **changes)


def run_small(batch: Batch, implementation: str, *, window: int = 2**31 - 1) -> list[np.ndarray]:
    return run(batch, implementation, soft_cap=None, sliding_window=jnp.asarray(window, jnp.int32))


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
def test_padding_is_dropped_and_its_rows_are_zero(implementation: str) -> None:
    batch = small_batch([(3, 20), (0, 0), (1, 5)], unused_kv=7.0)
    out, k_cache, v_cache = run_small(batch, implementation)
    np.testing.assert_array_equal(out[4:], 0.0)
    layer = slice(batch.num_blocks, 2 * batch.num_blocks)
    for new, name in ((k_cache.copy(), "k_cache"), (v_cache.copy(), "v_cache")):
        old = batch.arrays[name].copy()
        assert (new[layer] != old[layer]).sum() == 4 * old.shape[1] * old.shape[3]  # the four real tokens
        new[layer] = old[layer] = 0
        np.testing.assert_array_equal(new, old)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_blocks_before_the_window_are_never_read(implementation: str) -> None:
    batch = small_batch([(1, 200), (4, 100), (40, 300)])
    expected = run_small(batch, "reference", window=20)
    tables = batch.arrays["block_tables"]
    for s, first_seen in enumerate([200 - 20, 97 - 20, 261 - 20]):
        freed = tables[s, : first_seen // 16]
        for cache in ("k_cache", "v_cache"):
            batch.arrays[cache][batch.layer * batch.num_blocks + freed] = np.nan
        tables[s, : first_seen // 16] = 2**30
    out = run_small(batch, implementation, window=20)[0]
    np.testing.assert_allclose(out, expected[0], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_scores_far_from_zero_neither_overflow_nor_vanish(implementation: str) -> None:
    batch = small_batch([(1, 90), (30, 300), (0, 0)])
    batch.arrays["q"] *= 300.0  # scores of several hundred: exp of them is infinite in float32
    expected = run_small(batch, "reference")[0]
    assert np.isfinite(expected).all()
    # The scores themselves have an error of 1e-4 here, which the softmax propagates.
    np.testing.assert_allclose(run_small(batch, implementation)[0], expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    ("implementation", "dtype"), [("xla", jnp.float16), pytest.param("cpu", jnp.bfloat16, marks=needs_native)]
)
def test_half_precision_queries_give_half_precision_results(implementation: str, dtype: type) -> None:
    batch = make_batch([(1, 30), (5, 40)])
    arguments = batch.arguments()
    for name in ("q", "k", "v", "k_cache", "v_cache"):
        arguments[name] = arguments[name].astype(dtype)
    out, k_cache, _ = compiled(implementation)(**arguments)
    expected, _, _ = compiled("reference")(**arguments)
    assert out.dtype == k_cache.dtype == dtype
    # One rounding to 8 bits of values of order 1, twice.
    np.testing.assert_allclose(np.asarray(out, np.float32), np.asarray(expected, np.float32), atol=2e-2, rtol=0)


@pytest.mark.slow
def test_on_a_gpu_plain_xla_multiplies_in_the_dtype_of_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_target, "is_gpu", lambda: True)
    batch = make_batch([(1, 90), (1, 700), (5, 40)], dtype=jnp.dtype("float16"))
    arguments = batch.arguments()
    out, *caches = jax.jit(functools.partial(ragged_attention, implementation="xla"))(**arguments)
    expected, *expected_caches = compiled("reference")(**arguments)
    # Queries and weights are rounded to 11 bits.
    np.testing.assert_allclose(out, expected, atol=2e-3, rtol=0)
    jax.tree.map(np.testing.assert_array_equal, caches, expected_caches)
