"""Models whose layers have sliding windows: the same tokens, while blocks behind the windows are used again."""

from __future__ import annotations

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastgen_jax import Engine, EngineConfig, Research
from fastgen_jax.models.cache_groups import cache_groups, choose_groups
from fastgen_jax.models.dense import dense_forward
from tests.models.parity import load
from tests.tiny import drain, greedy, tokens_of

LENGTH, NEW_TOKENS = 112, 24
RNG = np.random.default_rng(5)
SHARED = RNG.integers(3, 64, 44).tolist()
PROMPTS = [
    [*SHARED[:n], *RNG.integers(3, 64, m).tolist()] for n, m in ((0, 3), (44, 9), (44, 40), (30, 1), (44, 9), (0, 70))
]


@cache
def naive(family: str, variant: str) -> list[list[int]]:
    """What each prompt generates, computed from all tokens at once, without a cache."""
    params, config = load(family, variant, stack_layers=True)
    run = jax.jit(lambda tokens: dense_forward(params, tokens, config=config))
    tokens = np.zeros((len(PROMPTS), LENGTH), np.int32)
    lengths = np.array([len(prompt) for prompt in PROMPTS])
    for row, prompt in zip(tokens, PROMPTS, strict=True):
        row[: len(prompt)] = prompt
    for _ in range(NEW_TOKENS):
        logits = np.asarray(run(jnp.asarray(tokens)))
        rows = np.arange(len(PROMPTS))
        tokens[rows, lengths] = logits[rows, lengths - 1].argmax(-1)
        lengths += 1
    return [row[n - NEW_TOKENS : n].tolist() for row, n in zip(tokens, lengths, strict=True)]


@cache
def make(family: str, variant: str = "default", **options) -> Engine:
    params, config = load(family, variant)
    settings = {"token_budget": 32, "budget_ladder": (), "max_num_seqs": 6, "block_size": 4, "num_blocks": 200}
    return Engine(params, config, EngineConfig(**(settings | options)))


def generate(engine: Engine) -> list[list[int]]:
    """All prompts, the first half a few steps before the others, so that these find a prefix."""
    half = len(PROMPTS) // 2
    ids = [engine.add(prompt, greedy(NEW_TOKENS)) for prompt in PROMPTS[:half]]
    early = {}
    for _ in range(8):
        for output in engine.step():
            early.setdefault(output.request_id, []).append(output)
    ids += [engine.add(prompt, greedy(NEW_TOKENS)) for prompt in PROMPTS[half:]]
    outputs = drain(engine)
    engine.scheduler.check_integrity()
    assert engine.scheduler.num_free_blocks == engine.config.num_blocks
    return [tokens_of([*early.get(i, []), *outputs.get(i, [])]) for i in ids]


@pytest.mark.parametrize(
    ("family", "variant", "windows", "options"),
    [
        ("gemma3", "default", (None, 16, 16, 16), {}),
        ("gemma3", "default", (None, 16, 16, 16), {"num_blocks": 76, "token_budget": 7, "overlap": False}),
        pytest.param("gpt_oss", "default", (None, 16, 16), {"num_blocks": 90}, marks=pytest.mark.slow),
        ("mistral", "window", (16,), {"num_blocks": 18}),
        pytest.param("gemma2", "default", (None, 16, 16), {"stack_layers": True}, marks=pytest.mark.slow),
        pytest.param("gemma3", "default", (None, 16, 16, 16), {"attention": "xla", "block_size": 8}, marks=pytest.mark.slow),
        pytest.param("qwen2", "upper_window", (None, 16, 16), {"kv_dtype": "bfloat16"}, marks=pytest.mark.slow),
    ],
)
def test_tokens_equal_those_of_a_model_without_cache(family, variant, windows, options) -> None:
    engine = make(family, variant, **options)
    assert engine.config.windows == windows
    got, want = generate(engine), naive(family, variant)
    assert got == want or "kv_dtype" in options
    assert engine.scheduler.stats.num_prefix_hit_tokens > 0
    if "num_blocks" in options and len(windows) > 1:  # a sequence with windows alone hardly grows
        assert engine.scheduler.stats.num_preemptions > 0, "the cache was meant to be too small"
    assert generate(engine) == got, "now with the prefixes of whole prompts"


@pytest.mark.slow
def test_sequences_that_the_caller_controls_can_be_forked_and_cut_back() -> None:
    engine = make("gemma3")
    params, config = load("gemma3", "default", stack_layers=True)
    tokens = [*PROMPTS[5], *SHARED[:21]]

    def naive_logits(ids: list[int]) -> np.ndarray:
        return np.asarray(dense_forward(params, jnp.asarray([ids]), config=config))[0, -1]

    research = Research(engine)
    research.put(["a"], [tokens])
    research.fork("a", "b")
    research.rollback("b", 50)  # to a place long behind the window
    got = research.put(["a", "b"], [[7, 8], [9]])
    np.testing.assert_allclose(got[0], naive_logits([*tokens, 7, 8]), atol=1e-4)
    np.testing.assert_allclose(got[1], naive_logits([*tokens[:-50], 9]), atol=1e-4)
    assert research.query("b").num_blocks == 4 * -(-(len(tokens) - 49) // 4)
    research.flush("a")
    research.flush("b")
    assert engine.scheduler.num_free_blocks == engine.config.num_blocks


def test_four_times_as_many_sequences_fit_into_the_same_memory() -> None:
    engine = make("gemma3")
    assert engine.runner.kv_cache.k.shape[0] == 200, "as much as 50 blocks of all four layers: one sequence of 112 tokens"
    before = engine.scheduler.stats.num_preemptions
    ids = [engine.add([3 + i] * (LENGTH - NEW_TOKENS), greedy(NEW_TOKENS)) for i in range(4)]
    num_tokens = 0
    while engine.has_work:
        engine.step()
        num_tokens = max(num_tokens, sum(sequence.num_computed for sequence in engine.scheduler._state.running))
    assert num_tokens > 2 * 200
    assert engine.scheduler.num_free_blocks == 200, f"{len(ids)} sequences ended"
    assert engine.scheduler.stats.num_preemptions == before


def test_layers_are_divided_so_that_long_sequences_take_little_memory() -> None:
    _, config = load("gemma3", "default")
    groups = choose_groups(config, 128)
    assert groups.num_rows == 1
    assert groups.places == ((1, 0), (2, 0), (0, 0), (3, 0))
    assert cache_groups(config, 4) == groups
    two = cache_groups(config, 2)
    assert (two.windows, two.num_rows, two.places) == ((None, 16), 3, ((1, 0), (1, 1), (0, 0), (1, 2)))
    assert choose_groups(config, 16).windows == (None,), "no key leaves a window of the whole context"
    assert choose_groups(load("mistral", "window")[1], 128).windows == (16,)
    with pytest.raises(ValueError, match="num_groups is 5"):
        cache_groups(config, 5)
