"""`Engine.score`: the numbers that generation reports, for given tokens."""

from __future__ import annotations

import numpy as np
import pytest

from fastgen_jax import Engine, Research, SamplingParams
from fastgen_jax.engine.outputs import TokenLogprob
from pallas_kernels import native
from tests.tiny import drain, greedy, tiny_engine, tokens_of

to_the_last_bit = pytest.mark.skipif(
    not native.available(), reason="plain XLA picks the order of a sum by the number of rows"
)
LIMITS = [{}, {"top_k": 7}, {"top_p": 0.8}, {"min_p": 0.05}, {"top_k": 30, "top_p": 0.9, "logit_bias": {5: 2.0, 9: -3.0}}]


def rollouts(engine: Engine, seed: int, num: int) -> list[tuple[list[int], SamplingParams, list[TokenLogprob]]]:
    """Sampled answers, all at the same time: the prompt, the parameters, and an entry per token."""
    rng, found = np.random.default_rng(seed), {}
    for i in range(num):
        prompt = rng.integers(3, 96, int(rng.integers(1, 40))).tolist()
        params = SamplingParams(
            max_new_tokens=int(rng.integers(1, 20)),
            ignore_eos=True,
            temperature=(0.5, 1.0, 1.7)[i % 3],
            seed=i,
            logprobs=0,
            **LIMITS[i % len(LIMITS)],
        )
        found[engine.add(prompt, params)] = prompt, params
    return [
        (*found[request_id], [entry for output in outputs for entry in output.logprobs or ()])
        for request_id, outputs in drain(engine).items()
    ]


@to_the_last_bit
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_blocks": 40, "max_num_seqs": 16, "token_budget": 23, "budget_ladder": (7,)},  # odd sizes, preempts
        pytest.param({"max_num_seqs": 1}, marks=pytest.mark.slow),
        pytest.param({"prefix_caching": False, "overlap": False}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_scores_are_the_log_probabilities_of_the_rollout_to_the_last_bit(options):
    """Whatever runs beside them, however prompts are split, whether prefixes are cached or sequences preempted."""
    scoring = tiny_engine(**options)
    preempted = scoring.scheduler.stats.num_preemptions
    answers = rollouts(tiny_engine(), seed=1, num=10)
    for i in range(7):  # leave one row of logits per step
        scoring.add([5 + i], greedy(60, logprobs=0), request_id=f"beside {i}")
    for prompt, params, entries in answers:
        (alone,) = scoring.score([prompt + [e.token_id for e in entries]], params, start=len(prompt))
        assert alone.processed_logprobs is not None
        assert alone.log_kept_masses is not None
        assert alone.logprobs.tolist() == [entry.logprob for entry in entries]
        assert alone.ranks.tolist() == [entry.rank for entry in entries]
        assert alone.processed_logprobs.tolist() == [entry.processed_logprob for entry in entries]
        assert alone.log_kept_masses.tolist() == [entry.log_kept_mass for entry in entries]
    drain(scoring)
    sequences = [prompt + [entry.token_id for entry in entries] for prompt, _, entries in answers]
    together = scoring.score(sequences, start=[len(prompt) for prompt, _, _ in answers])
    assert [s.logprobs.tolist() for s in together] == [[e.logprob for e in entries] for _, _, entries in answers]
    assert all(s.processed_logprobs is None and s.log_kept_masses is None for s in together)
    assert "num_blocks" not in options or scoring.scheduler.stats.num_preemptions > preempted


def test_scores_are_those_of_the_logits():
    engine = tiny_engine()
    tokens = np.random.default_rng(2).integers(3, 96, 40).tolist()
    research = Research(engine)
    logits = np.array([research.put(["x"], [[token]])[0] for token in tokens[:-1]], np.float64)
    research.flush("x")
    expected = np.log(np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True))
    (scores,) = engine.score([tokens], num_top=3)
    np.testing.assert_allclose(scores.logprobs, expected[np.arange(39), tokens[1:]], atol=2e-5, rtol=0)
    assert (scores.start, len(scores.top), scores.weight_version) == (1, 39, engine.weight_version)
    best = np.argsort(-logits, axis=1)[:, :3]
    assert [[*top] for top in scores.top] == best.tolist()


def test_a_processed_score_is_minus_infinity_where_truncation_excludes_the_token():
    engine = tiny_engine()
    prompt = np.random.default_rng(3).integers(3, 96, 20).tolist()
    request_id = engine.add(prompt, greedy(8))
    likely = tokens_of(drain(engine)[request_id])
    (scores,) = engine.score([prompt + likely], SamplingParams(top_k=1))
    assert scores.processed_logprobs is not None
    assert scores.log_kept_masses is not None
    is_best = scores.ranks == 1
    assert is_best[-8:].all()
    assert not is_best.all()
    np.testing.assert_array_equal(scores.processed_logprobs, np.where(is_best, 0, -np.inf))
    np.testing.assert_array_equal(scores.log_kept_masses[is_best], scores.logprobs[is_best])


def test_a_start_lets_the_cache_provide_what_precedes_it():
    engine = tiny_engine()
    engine.reset_prefix_cache()
    tokens = np.random.default_rng(4).integers(3, 96, 61).tolist()
    (whole,) = engine.score([tokens])
    hits, computed = engine.scheduler.stats.num_prefix_hit_tokens, engine.scheduler.stats.num_tokens
    parts = engine.score([tokens, tokens, tokens], start=[60, 41, 0])
    assert [part.start for part in parts] == [60, 41, 1]
    assert [len(part.logprobs) for part in parts] == [1, 20, 60]
    for part in parts:
        np.testing.assert_allclose(part.logprobs, whole.logprobs[part.start - 1 :], atol=2e-5, rtol=0)
    assert engine.scheduler.stats.num_prefix_hit_tokens - hits == 56 + 40
    assert engine.scheduler.stats.num_tokens - computed == 4 + 20 + 60


def test_a_sequence_that_fills_the_context_can_be_scored():
    engine = tiny_engine()
    tokens = np.random.default_rng(5).integers(3, 96, engine.config.max_context_len).tolist()
    (scores,) = engine.score([tokens])
    assert len(scores.logprobs) == engine.config.max_context_len - 1
    with pytest.raises(ValueError, match="max_context_len"):
        engine.score([[*tokens, 5]])
    assert not engine.has_work


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        ("abc", {}, r"tokens is 'abc'; pass a list of sequences"),
        ([[5]], {}, r"tokens\[0\] has 1 token, which follows nothing"),
        ([[5, 96]], {}, r"tokens\[0\].*96"),
        ([[5, 6], [7, 8]], {"start": [1]}, r"start has 1 positions for 2 sequences"),
        ([[5, 6]], {"start": 2}, r"start of tokens\[0\] is 2; it must be an int in \[0, 1\]"),
        ([[5, 6]], {"params": SamplingParams(temperature=0)}, "requires a temperature above 0"),
        ([[5, 6]], {"params": SamplingParams(presence_penalty=1)}, r"presence_penalty is 1, which depends on the tokens"),
        ([[5, 6]], {"num_top": 21}, "logprobs is 21"),
    ],
)
def test_what_cannot_be_scored_is_refused(tokens, options, message):
    engine = tiny_engine()
    with pytest.raises(ValueError, match=message):
        engine.score(tokens, **options)
    assert not engine.has_work


def test_options_of_log_probabilities_are_checked():
    with pytest.raises(ValueError, match="logprobs_mode is 'cooked'; choose one of raw, processed"):
        SamplingParams(logprobs_mode="cooked")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="prompt_logprobs_start is -1"):
        SamplingParams(prompt_logprobs_start=-1)
    with pytest.raises(ValueError, match="prompt_logprobs_start is 4 but the prompt has 3 tokens"):
        tiny_engine().add([5, 6, 7], greedy(1, prompt_logprobs=0, prompt_logprobs_start=4))
    SamplingParams(logprobs_mode="processed", presence_penalty=1)  # no prompt is scored


def test_a_score_that_is_interrupted_leaves_nothing_behind(monkeypatch):
    engine = tiny_engine()

    def interrupted(box=None):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.score([[5, 6, 7], [8, 9]])
    assert not engine.request_ids
    drain(engine)
