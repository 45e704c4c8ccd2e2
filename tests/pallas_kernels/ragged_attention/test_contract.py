"""Invalid arguments are refused with a message that names them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import native
from pallas_kernels.ragged_attention import Latents, QuantizedCache, ragged_attention
from pallas_kernels.ragged_attention.cpu import call as cpu
from tests.pallas_kernels.ragged_attention.ragged_batches import Batch, make_batch
from tests.shape_checks import unchecked

needs_native = pytest.mark.skipif(not cpu.available(), reason="no C++ compiler here")


@pytest.fixture
def batch() -> Batch:
    return make_batch([(3, 20), (1, 5)], num_tokens=6, num_kv_heads=2)  # H=4, K=2, D=16, L=3


def zeros(*shape: int, dtype: type = jnp.float32) -> jax.Array:
    return jnp.zeros(shape, dtype)


def lowered(batch: Batch, platform: str = "cpu", **changes: object) -> str:
    """The program that `ragged_attention` becomes for a platform, before XLA."""
    # A new function each time: jit would reuse a trace made with native kernels.
    traced = jax.jit(lambda arguments: ragged_attention(**arguments)).trace(batch.arguments(**changes))
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": zeros(6, 16)}, r"q has shape \(6, 16\) but must have 3 axes \[T, H, D\]"),
        ({"q": zeros(6, 0, 16)}, r"q has shape \(6, 0, 16\); every axis of \[T, H, D\] must be at least 1"),
        ({"q": zeros(6, 3, 16)}, r"q has 3 heads, which is not a multiple of the 2 heads of k"),
        ({"q": zeros(6, 4, 16, dtype=jnp.int32)}, r"q has dtype int32 but must be one of float32, bfloat16, float16"),
        ({"k": zeros(5, 2, 16)}, r"k has shape \(5, 2, 16\) but must be \[T, K, D\]"),
        ({"v": zeros(6, 2, 8)}, r"v has shape \(6, 2, 8\) but must be the shape of k"),
        ({"k_cache": zeros(15, 2, 16, 8)}, r"k_cache has shape \(15, 2, 16, 8\) but must be \[L\*N, K, B, D\]"),
        ({"v_cache": zeros(15, 2, 4, 16)}, r"v_cache has shape .* but must be the shape of k_cache"),
        ({"k_cache": zeros(15, 2, 16, 16, dtype=jnp.int8)}, r"k_cache has dtype int8 but no scales; pass a QuantizedCache"),
        (
            {"k_cache": QuantizedCache(values=zeros(15, 2, 16, 16, dtype=jnp.int8), scales=zeros(15, 16, 2))},
            r"k_cache.scales has shape \(15, 16, 2\) but must be \[L\*N, K, B\], as its values, = \(15, 2, 16\)",
        ),
        (
            {"k_cache": QuantizedCache.zeros((15, 2, 16, 16), jnp.float16)},
            r"k_cache is a QuantizedCache of dtype float16 but must be one of int8, float8_e4m3fn",
        ),
        ({"kv_slots": zeros(5, dtype=jnp.int32)}, r"kv_slots has shape \(5,\) but must be \[T\] = \(6,\)"),
        ({"kv_slots": zeros(6)}, r"kv_slots has dtype float32 but must be int32"),
        ({"query_starts": zeros(2, dtype=jnp.int32)}, r"query_starts has shape \(2,\) but must be \[S\+1\]"),
        ({"context_lens": zeros(3, dtype=jnp.int32)}, r"context_lens has shape \(3,\) but must be \[S\]"),
        ({"block_tables": zeros(2, dtype=jnp.int32)}, r"block_tables has shape \(2,\) but must have 2 axes"),
        (
            {"latents": Latents(key_dim=20, value_dim=8)},
            r"latents have key_dim=20 and value_dim=8, but must have 1 <= value_dim <= key_dim <= D = 16",
        ),
        ({"latents": Latents(key_dim=8, value_dim=9)}, r"key_dim=8 and value_dim=9, but must"),
        (
            {"v_cache": None, "k_cache": zeros(15, 2, 16, 16)},
            r"k_cache has shape .* but must be \[L\*N, K, B, 2D\], because there is no v_cache, .* = \(15, 2, 16, 32\)",
        ),
        (
            {"v_cache": None, "k_cache": zeros(15, 2, 16, 32), "latents": Latents(key_dim=16, value_dim=8)},
            r"k_cache has shape \(15, 2, 16, 32\) but must be \[L\*N, K, B, D\]",
        ),
        (
            {"v_cache": None, "k_cache": zeros(15, 2, 16, 32), "implementation": "cpu"},
            r"implementation='cpu' needs keys and values in two caches but v_cache is None",
        ),
        ({"number": 3}, r"layer is 3 but must be in \[0, 3\)"),
        ({"number": zeros(1, dtype=jnp.int32)}, r"layer has shape \(1,\) but must be a scalar"),
        ({"num_blocks": 4}, r"num_blocks is 4 but must be at least 1 and divide the 15 blocks"),
        ({"scale": 0.0}, r"scale is 0.0 but must be positive and finite, usually D\*\*-0.5 = 0.25"),
        ({"sliding_window": 0}, r"sliding_window is 0 but must be at least 1"),
        ({"soft_cap": -1.0}, r"soft_cap is -1.0 but must be positive and finite"),
        ({"alibi_slopes": zeros(2)}, r"alibi_slopes has shape \(2,\) but must be \[H\] = \(4,\)"),
        ({"sinks": zeros(4, dtype=jnp.int32)}, r"sinks has dtype int32 but must be float32"),
        ({"implementation": "triton"}, r"implementation is 'triton' but must be one of 'reference', 'xla', 'cpu'"),
    ],
)
def test_an_invalid_argument_is_named(batch: Batch, changes: dict[str, object], message: str) -> None:
    with unchecked(), pytest.raises(ValueError, match=message):
        ragged_attention(**batch.arguments(**changes))


def test_the_native_kernel_refuses_a_half_precision_cache_that_it_cannot_read(batch: Batch) -> None:
    caches = {name: jnp.asarray(batch.arrays[name], jnp.float16) for name in ("k_cache", "v_cache")}
    with pytest.raises(ValueError, match="supports float32 and bfloat16 caches but k_cache has dtype float16"):
        ragged_attention(**batch.arguments(**caches), implementation="cpu")
    assert "pallas_kernels_ragged_attention" not in lowered(batch, **caches)  # the default picks another implementation


@needs_native
def test_by_default_the_native_kernel_runs_on_a_cpu(batch: Batch) -> None:
    assert "pallas_kernels_ragged_attention_f32" in lowered(batch)
    expected = ragged_attention(**batch.arguments(), implementation="cpu")[0]
    np.testing.assert_array_equal(ragged_attention(**batch.arguments())[0], expected)


def test_without_a_compiler_xla_is_used(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PALLAS_KERNELS_NATIVE", "0")
    assert not native.available()
    assert "pallas_kernels_ragged_attention" not in lowered(batch)
    with pytest.raises(ValueError, match="needs a native kernel, which is not available here"):
        ragged_attention(**batch.arguments(), implementation="cpu")


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_another_platform_gets_plain_xla(batch: Batch, platform: str) -> None:
    assert "pallas_kernels_ragged_attention" not in lowered(batch, platform)
