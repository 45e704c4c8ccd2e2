"""Models whose layers share a cache in ways of their own: what engines generate, and what their caches hold.

In Gemma 3n and 4 the last layers read the keys and values of earlier ones; in Gemma 4 layers have heads of two sizes.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from fastgen_jax import Engine, EngineConfig
from fastgen_jax.models.cache_groups import choose_groups
from fastgen_jax.models.dense import dense_forward
from tests.models.parity import error, expected, load
from tests.tiny import drain, greedy, tokens_of

TOLERANCE = 1e-4  # of the largest logit: two float32 programs that sum in different orders
MANY = {"num_blocks": 140}  # blocks of a single row


@pytest.mark.parametrize(
    ("family", "variant", "options"),
    [
        ("gemma3n", "default", {}),
        pytest.param("gemma4", "default", MANY, marks=pytest.mark.slow),
        pytest.param("gemma4", "experts", MANY, marks=pytest.mark.slow),
        pytest.param("gemma3n", "default", {"stack_layers": True, "attention": "xla"}, marks=pytest.mark.slow),
        pytest.param("gemma4", "default", MANY | {"stack_layers": True, "attention": "xla"}, marks=pytest.mark.slow),
        pytest.param("gemma4", "experts", MANY | {"stack_layers": True, "attention": "xla"}, marks=pytest.mark.slow),
    ],
)
def test_engines_generate_what_transformers_does_with_few_blocks(family, variant, options) -> None:
    params, config = load(family, variant)
    tokens, _, length = expected(family, variant)
    prompt, answer = tokens[:length].tolist(), tokens[length:].tolist()
    settings = {"token_budget": 16, "budget_ladder": (), "max_num_seqs": 4, "block_size": 4, "num_blocks": 80}
    engine = Engine(params, config, EngineConfig(**(settings | options)))
    groups = choose_groups(config, engine.config.max_context_len)
    assert engine.config.windows == groups.windows
    assert engine.runner.kv_cache.k.shape[0] == engine.config.num_blocks * groups.num_rows
    assert len(groups.windows) * groups.num_rows < config.num_layers
    # Together they need more blocks than there are, so some are preempted; the last finds a prefix of the others.
    first = [engine.add(prompt[i:] if i else prompt, greedy(len(answer))) for i in range(3)]
    outputs = drain(engine)
    again = engine.add(prompt, greedy(len(answer)))
    outputs |= drain(engine)
    assert tokens_of(outputs[first[0]]) == tokens_of(outputs[again]) == answer
    assert engine.scheduler.stats.num_prefix_hit_tokens > 0
    assert engine.scheduler.num_free_blocks == engine.config.num_blocks


@pytest.mark.parametrize(
    ("family", "variant", "stack_layers"),
    [
        ("gemma3n", "default", True),
        pytest.param("gemma4", "default", True, marks=pytest.mark.slow),
        pytest.param("gemma4", "default", False, marks=pytest.mark.slow),
        pytest.param("gemma4", "experts", True, marks=pytest.mark.slow),
    ],
)
def test_logits_without_a_cache_are_those_of_transformers(family, variant, stack_layers) -> None:
    params, config = load(family, variant, stack_layers=stack_layers)
    tokens, want, _ = expected(family, variant)
    got = dense_forward(params, jnp.asarray(tokens[None]), config=config)[0]
    assert error(np.asarray(got), want) < TOLERANCE
