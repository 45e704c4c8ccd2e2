"""Engines whose KV cache and weights have different number formats."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from fastgen_jax import Engine, Research
from fastgen_jax.core import scale_bytes
from tests.engine.test_engine import PROMPTS, generate
from tests.tiny import expected, tiny_engine


@pytest.fixture(scope="module")
def alone() -> list[list[int]]:
    """Each prompt alone over an int8 cache, in an otherwise idle engine."""
    engine = tiny_engine(kv_dtype="int8", overlap=False, prefix_caching=False, budget_ladder=())
    return [generate(engine, [prompt])[0] for prompt in PROMPTS]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"token_budget": 7}, id="prompts split at 7 tokens", marks=pytest.mark.slow),
        pytest.param({"num_blocks": 18}, id="preempted, with prefix cache"),
    ],
)
def test_tokens_over_an_int8_cache_do_not_depend_on_how_the_engine_runs_them(alone: list[list[int]], options: dict) -> None:
    engine = tiny_engine(kv_dtype="int8", budget_ladder=(), **options)
    assert generate(engine) == alone
    assert (engine.scheduler.stats.num_preemptions > 0) == ("num_blocks" in options)
    assert generate(engine, PROMPTS[6:8]) == alone[6:8]  # their prefixes are cached by now


@pytest.mark.parametrize(
    ("kv_dtype", "tolerance"), [pytest.param("int8", 0.06, marks=pytest.mark.slow), ("float8_e4m3fn", 0.25)]
)
def test_logits_over_a_narrow_cache_are_near_those_over_float32(kv_dtype: str, tolerance: float) -> None:
    """Close, relative to the scale of the logits, but not equal: equality would mean that the option has no effect."""
    token_ids = expected()["token_ids"].tolist()
    narrow = tiny_engine(kv_dtype=kv_dtype, token_budget=7, budget_ladder=())
    exact = tiny_engine(token_budget=7, budget_ladder=())
    logits = [Research(engine).put(["x"], [token_ids]) for engine in (narrow, exact)]
    for engine in (narrow, exact):
        Research(engine).flush("x")
    error = np.abs(logits[0] - logits[1]).max() / np.abs(logits[1]).max()
    assert 0 < error < tolerance


def test_a_token_takes_the_bytes_that_the_model_reports() -> None:
    def bytes_per_token(engine: Engine) -> float:
        cache = engine.runner.kv_cache
        return sum(leaf.nbytes for leaf in jax.tree.leaves(cache)) / (engine.config.num_blocks * engine.config.block_size)

    for engine in (
        tiny_engine(kv_dtype="int8", overlap=False, prefix_caching=False, budget_ladder=()),
        tiny_engine(kv_dtype="float8_e4m3fn", token_budget=7, budget_ladder=()),
    ):
        told = engine.model.kv_bytes_per_token(1, scale_bytes=scale_bytes(engine.config.kv_dtype))
        assert bytes_per_token(engine) == told
