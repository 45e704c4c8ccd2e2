"""Gradients through the forward pass: against finite differences and the dense forward, or an error with the remedy."""

from __future__ import annotations

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastgen_jax.core import KVCache, RaggedBatch
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.decoder import Execution, forward
from fastgen_jax.models.dense import dense_forward
from fastgen_jax.models.params import unstack
from fastgen_jax.models.weight_spec import Params
from pallas_kernels import native
from pallas_kernels.ragged_attention import RaggedIndex
from tests.models.parity import load
from tests.tiny import random_params, tiny_engine, tiny_model

LENGTH, BLOCK, NUM_BLOCKS = 9, 4, 5
TOKENS = np.random.default_rng(0).integers(3, 60, LENGTH + 1)  # the smallest vocabulary has 64


def batch_of(start: int, stop: int) -> RaggedBatch:
    """Positions [start, stop) of one sequence, whose blocks are allocated from the last one backwards."""
    positions = jnp.arange(start, stop, dtype=jnp.int32)
    table = jnp.arange(NUM_BLOCKS - 1, -1, -1, dtype=jnp.int32)
    count = stop - start
    return RaggedBatch(
        token_ids=jnp.asarray(TOKENS[start:stop], jnp.int32),
        token_slots=jnp.ones(count, jnp.int32),
        positions=positions,
        rope_lengths=jnp.full(count, LENGTH, jnp.int32),
        index=RaggedIndex(
            kv_slots=table[positions // BLOCK] * BLOCK + positions % BLOCK,
            query_starts=jnp.asarray([0, count], jnp.int32),
            context_lens=jnp.asarray([stop], jnp.int32),
            block_tables=table[None],
        ),
        sample_rows=jnp.arange(count, dtype=jnp.int32),
        num_sample_rows=jnp.int32(count),
    )


def cross_entropy(logits: jax.Array) -> jax.Array:
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(TOKENS[1 : len(logits) + 1])[:, None], axis=1)
    return -jnp.mean(chosen)


def loss(
    params: Params, *, config: ModelConfig, attention: str | None = None, cut: int = LENGTH, dtype: str = "float32"
) -> jax.Array:
    """The loss of a text in two chunks; the second one reads the cache that the first has written."""
    cache = KVCache.zeros(
        num_layers=config.num_layers,
        num_blocks=NUM_BLOCKS,
        num_kv_heads=config.num_kv_heads,
        block_size=BLOCK,
        head_dim=config.head_dim,
        dtype=dtype,
    )
    parts = []
    for start, stop in ((0, cut), (cut, LENGTH)):
        if stop > start:
            logits, cache = forward(
                params, cache, batch_of(start, stop), config=config, execution=Execution(attention=attention)
            )
            parts.append(logits)
    return cross_entropy(jnp.concatenate(parts))


def dense_loss(params: Params, *, config: ModelConfig) -> jax.Array:
    return cross_entropy(dense_forward(params, jnp.asarray(TOKENS[None, :LENGTH], jnp.int32), config=config)[0])


def assert_alike(got: Params, want: Params) -> None:
    """Asserts equality up to float32 rounding in another order of summation."""
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max() + 1e-3), err_msg=jax.tree_util.keystr(path))


@cache
def dense_gradient(family: str) -> Params:
    params, config = load(family, "default", stack_layers=True)
    return jax.jit(jax.grad(partial(dense_loss, config=config)))(params)


@pytest.mark.parametrize(
    ("attention", "cut"),
    [
        pytest.param(None, 5, marks=pytest.mark.slow),
        pytest.param("xla", LENGTH, marks=pytest.mark.slow),
        ("reference", LENGTH),
    ],
)
def test_the_gradient_is_that_of_the_dense_forward_whatever_attention_computes(attention, cut):
    params, config = load("llama", "default", stack_layers=True)
    got = jax.jit(jax.grad(partial(loss, config=config, attention=attention, cut=cut)))(params)
    assert_alike(got, dense_gradient("llama"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["gpt_oss", "bloom", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen2_moe", "gemma2"))]
)
def test_sinks_experts_windows_caps_and_slopes_have_derivatives_too(family):
    params, config = load(family, "default", stack_layers=True)
    got = jax.jit(jax.grad(partial(loss, config=config)))(params)
    assert_alike(got, dense_gradient(family))


def test_the_gradient_is_the_slope_of_the_loss():
    params, config = load("llama", "default", stack_layers=True)
    direction = random_params(config)

    def along(step):
        return loss(jax.tree.map(lambda a, b: a + step * b, params, direction), config=config)

    step = 2e-3  # the loss has a rounding error near 1e-6, and a third derivative of order 1
    plain = jax.jit(along)
    measured = (plain(step) - plain(-step)) / (2 * step)
    got = jax.jit(lambda step: jax.jvp(along, (step,), (1.0,))[1])(0.0)  # forward mode; the other tests use reverse mode
    assert float(got) == pytest.approx(float(measured), rel=2e-2)


@pytest.mark.slow
def test_unstacked_layers_have_the_same_gradient():
    params, config = load("llama", "default")
    got = jax.jit(jax.grad(partial(loss, config=config)))(params)
    want = dense_gradient("llama")
    assert_alike(got, {**want, "layers": unstack(want["layers"], config)})


@pytest.mark.skipif(not native.available(), reason="no C++ compiler")
def test_packed_weights_have_no_derivative_and_the_error_names_the_remedy():
    _, config = tiny_model()
    engine = tiny_engine()
    packed = engine.params
    for what in (
        lambda scale: loss({**packed, "embed": packed["embed"] * scale}, config=config),
        lambda scale: loss({**packed, "final_norm": packed["final_norm"] * scale}, config=config),
    ):
        with pytest.raises(ValueError, match=r"PackedWeight has no derivative.*load_params\(\.\.\., prepare=None\)"):
            jax.grad(what)(1.0)
    with pytest.raises(ValueError, match="PackedWeight has no derivative"):
        jax.grad(partial(loss, config=config))(packed)


@pytest.mark.skipif(not native.available(), reason="no C++ compiler")
def test_packed_experts_have_no_derivative_either():
    from pallas_kernels.grouped_matmul import grouped_matmul
    from pallas_kernels.grouped_matmul import prepare as prepare_groups

    groups = prepare_groups(np.ones((2, 8, 4), np.float32), platform="cpu")
    sizes = jnp.asarray([1, 2], jnp.int32)
    with pytest.raises(ValueError, match=r"PackedGroups have no derivative.*prepare=None"):
        jax.grad(lambda x: grouped_matmul(x, groups, sizes).sum())(jnp.ones((3, 8)))


def test_a_cache_of_8_bits_has_no_derivative_rather_than_a_wrong_one():
    params, config = tiny_model()
    with pytest.raises(ValueError, match=r"a KV cache of int8 has no derivative.*float32 or bfloat16"):
        jax.grad(partial(loss, config=config, dtype="int8"))(params)


def test_gradients_pass_through_int8_weights():
    from pallas_kernels.matmul import Int8Weight, linear, quantize_int8

    plain = np.random.default_rng(1).normal(size=(8, 6)).astype(np.float32)
    values, scales = quantize_int8(plain)
    weight = Int8Weight(values=jnp.asarray(values), scales=jnp.asarray(scales))
    got = jax.grad(lambda x: linear(x, weight).sum())(jnp.ones((3, 8)))
    np.testing.assert_allclose(got, np.tile((values * scales).sum(axis=1), (3, 1)), rtol=1e-5)
