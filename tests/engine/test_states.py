"""Models with states in the engine: the same tokens in every composition of steps, and after every interruption."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastgen_jax import Engine, EngineConfig, Research, SamplingParams
from fastgen_jax.api.pooling import pool
from fastgen_jax.engine.footprint import state_bytes
from fastgen_jax.models.dense import dense_forward
from fastgen_jax.models.division import check_num_devices
from tests.models.parity import expected, load
from tests.tiny import drain, greedy, random_params, tokens_of

RNG = np.random.default_rng(7)
PROMPTS = [RNG.integers(3, 64, size).tolist() for size in (1, 2, 5, 16, 17, 34, 55, 40, 3, 31)]
# A delta net, then gated attention; the models that transformers computed are slow tests.
QUICK = ("qwen3_5", "two layers")
MODELS = [
    QUICK,
    *(
        pytest.param(family, variant, marks=pytest.mark.slow)
        for family, variant in (
            ("lfm2", "bias"),
            ("qwen3_5", "default"),
            ("granitemoehybrid", "experts"),
            ("qwen3_next", "dense_first"),
            ("falcon_h1", "norm"),
            ("nemotron_h", "default"),
            ("nemotron_h", "experts"),
        )
    ),
]
# Seven tokens cut the pieces of `models.state_scan`; 18 blocks hold no more than the longest prompt and its answer.
SMALL = {"token_budget": 7, "budget_ladder": (), "num_blocks": 18}
LARGE = {"token_budget": 32, "budget_ladder": (8,), "num_blocks": 64}


def engine_of(family: str, variant: str, **options: Any) -> Engine:
    settings = {**SMALL, "max_num_seqs": 8, "block_size": 4, **options}
    engine = _engine(family, variant, tuple(sorted(settings.items())))
    assert not engine.has_work, "another test left requests behind"
    return engine


@cache
def _engine(family: str, variant: str, settings: tuple[tuple[str, Any], ...]) -> Engine:
    if (family, variant) != QUICK:
        return Engine(*load(family, variant), EngineConfig(**dict(settings)))
    config = load("qwen3_5", "default")[1]
    assert config.state is not None
    config = replace(config, num_layers=2, attention_layers=(1,), state=replace(config.state, layers=(0,)))
    return Engine(random_params(config), config, EngineConfig(**dict(settings)))


def generate(engine: Engine, prompts: list[list[int]] = PROMPTS, params: SamplingParams | None = None) -> list[list[int]]:
    ids = [engine.add(prompt, params or greedy(12)) for prompt in prompts]
    outputs = drain(engine)
    engine.scheduler.check_integrity()
    assert engine.metrics.compiles_while_serving == 0
    return [tokens_of(outputs[request_id]) for request_id in ids]


@cache
def alone(family: str, variant: str) -> list[list[int]]:
    """Each prompt alone."""
    engine = engine_of(family, variant)
    return [generate(engine, [prompt])[0] for prompt in PROMPTS]


@pytest.mark.parametrize(("family", "variant"), MODELS)
def test_tokens_are_those_of_transformers_and_do_not_depend_on_the_steps(family, variant):
    engine = engine_of(family, variant)
    if (family, variant) != QUICK:
        tokens, _, length = expected(family, variant)
        assert generate(engine, [tokens[:length].tolist()], greedy(10)) == [tokens[length:].tolist()]
    preemptions = engine.scheduler.stats.num_preemptions
    want = alone(family, variant)
    assert engine.scheduler.stats.num_preemptions == preemptions
    assert generate(engine) == want
    assert engine.scheduler.stats.num_preemptions > preemptions, "the cache was meant to be too small"


@pytest.mark.slow
@pytest.mark.parametrize(("family", "variant"), MODELS)
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(LARGE, id="two programs"),
        pytest.param(LARGE | {"overlap": False}, id="no overlap"),
        pytest.param({"token_budget": 1}, id="one token at a time"),
        pytest.param(LARGE | {"token_budget": 64, "budget_ladder": ()}, id="one large program"),
        pytest.param(LARGE | {"policy": "prompts_first"}, id="prompts first"),
        pytest.param({"stack_layers": False}, id="unrolled layers"),
    ],
)
def test_tokens_do_not_depend_on_how_the_engine_runs_them(family, variant, options):
    assert generate(engine_of(family, variant, **options)) == alone(family, variant)


def test_cancelled_requests_leave_nothing_behind_in_their_slots():
    """Requests come and go at random: those that stay generate what they do alone."""
    engine, chance = engine_of(*QUICK), random.Random(3)
    waiting, running, outputs = list(range(len(PROMPTS))) * 2, {}, {}
    while waiting or engine.has_work:
        if waiting and chance.random() < 0.4:
            number = waiting.pop()
            running[engine.add(PROMPTS[number], greedy(12))] = number
        if running and chance.random() < 0.1:
            engine.abort(chance.choice(list(running)))
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
    done = {request: found for request, found in outputs.items() if found[-1].finish_reason == "length"}
    assert 5 < len(done) < 2 * len(PROMPTS), "some were meant to be cancelled"
    for request, found in done.items():
        assert tokens_of(found) == alone(*QUICK)[running[request]]
    engine.scheduler.check_integrity()


def test_requests_continue_after_their_memory_was_released_and_what_was_in_it_is_never_read():
    engine = engine_of(*QUICK)
    ids = [engine.add(prompt, greedy(12)) for prompt in PROMPTS[:6]]
    outputs = {request: [] for request in ids}
    for _ in range(3):
        for output in engine.step():
            outputs[output.request_id].append(output)
    engine.pause()
    engine.release_memory()
    engine.restore_memory()
    cache = engine.runner.kv_cache
    engine.runner.kv_cache = jax.tree.map(lambda x: x.at[...].set(np.nan), cache)
    engine.resume()
    for request, more in drain(engine).items():
        outputs[request] += more
    assert [tokens_of(outputs[request]) for request in ids] == alone(*QUICK)[:6]


def test_a_repeated_prompt_is_computed_again():
    engine = engine_of(*QUICK)
    assert not engine.config.prefix_caching
    first, second = (engine.add(PROMPTS[6], greedy(2)) for _ in range(2))
    outputs = drain(engine)
    assert [outputs[request][-1].num_cached_tokens for request in (first, second)] == [0, 0]


def test_bytes_of_the_states_are_counted_as_they_are_allocated():
    engine = engine_of(*QUICK)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(engine.runner.kv_cache.states))
    assert held == state_bytes(engine.model, jax.default_backend(), engine.config.max_num_seqs) > 0


def test_what_has_no_place_for_a_state_is_refused():
    engine = engine_of(*QUICK)
    with pytest.raises(ValueError, match="Research is not supported for a qwen3_5 model"):
        Research(engine)
    with pytest.raises(ValueError, match="an embedding is not supported for a qwen3_5 model"):
        pool(engine, [(3, 4)], "last")
    with pytest.raises(ValueError, match=r"heads of its states cannot be divided over 3 devices.*a divisor of"):
        check_num_devices(engine.model, 3)
    with pytest.raises(ValueError, match="dense_forward is not supported for a qwen3_5 model"):
        dense_forward(engine.params, jnp.ones((1, 2), jnp.int32), config=engine.model)
