"""Steps whose masks are computed beside the layers: a token in every step, and the tokens of steps that do not overlap."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fastgen_jax import Engine, SamplingParams
from fastgen_jax.engine.engine import BackgroundCompiler
from fastgen_jax.engine.runner import Runner
from fastgen_jax.engine.samplers import SamplerPrograms, work_of
from fastgen_jax.text import filters
from fastgen_jax.text.grammar import Grammar
from tests.serving.tiny_server import engine, tokenizer
from tests.tiny import drain, greedy, tokens_of

LETTERS = Grammar(kind="regex", source="[a-f]{3,30}x")
NUMBERS = Grammar(kind="regex", source="([0-9]{2} ){9,}")  # does not end within LONG tokens
LONG = 24


def ready() -> Engine:
    """The shared engine, with the programs that its first grammar has compiled."""
    shared = engine()
    shared.add([5], greedy(1), grammar=LETTERS)
    drain(shared)
    shared.wait_until_compiled()
    assert shared.runner.samples_later
    return shared


def test_a_grammar_samples_a_token_in_every_step_like_free_requests() -> None:
    shared = ready()
    held = [shared.add([5, 6 + i], SamplingParams(max_new_tokens=LONG, seed=i), grammar=NUMBERS) for i in range(3)]
    free = [shared.add([7, 8 + i], greedy(LONG)) for i in range(3)]
    steps, first = shared.metrics.steps, shared.metrics.masks
    outputs = drain(shared)
    assert {len(tokens_of(outputs[i])) for i in (*held, *free)} == {LONG}
    # The last step computes the token of requests that have ended: it is not there without them.
    assert shared.metrics.steps - steps == LONG
    assert shared.metrics.masks - first == 3 * LONG
    assert shared.metrics.mask_seconds > 0
    assert shared.metrics.compiles_while_serving == 0


REQUESTS: list[tuple[list[int], dict[str, Any], Grammar | None]] = [
    ([5, 6, 7], {"do_sample": False}, LETTERS),
    ([5, 6, 7], {"seed": 4, "temperature": 1.3, "logprobs": 2}, NUMBERS),
    ([8] * 40, {"seed": 5, "top_k": 20, "frequency_penalty": 0.6, "repetition_penalty": 1.2}, NUMBERS),
    ([9] * 7, {"seed": 6, "logit_bias": {40: 4.0}, "prompt_logprobs": 1, "logprobs": 0}, LETTERS),
    ([9] * 7, {"seed": 6, "bad_words": ["ab", "7 "]}, None),
    ([10, 11], {"seed": 7, "bad_words": ["ab"], "stop": "e"}, LETTERS),
    ([12] * 33, {"seed": 8, "logprobs": 3, "prompt_logprobs": 0}, None),
    ([13], {"do_sample": False, "presence_penalty": 0.5}, None),
    ([14] * 12, {"seed": 9, "min_new_tokens": 9}, None),
]


def answers(shared: Engine) -> list[Any]:
    ids = []
    for prompt, options, grammar in REQUESTS:
        ids.append(shared.add(prompt, SamplingParams(max_new_tokens=LONG, **options), grammar=grammar))
        shared.step()
    outputs: dict[str, list[Any]] = {request_id: [] for request_id in ids}
    for request_id, rest in drain(shared).items():
        outputs[request_id] += rest
    return [[replace(o, request_id="", queue_seconds=0, num_cached_tokens=0) for o in outputs[i]] for i in ids]


def test_the_tokens_are_those_of_steps_that_wait_for_the_token_before(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = ready()
    beside = answers(shared)
    shared.reset_prefix_cache()
    monkeypatch.setattr(Runner, "samples_later", False)
    waited = answers(shared)
    assert [tokens_of(a) for a in beside] == [tokens_of(w) for w in waited]
    assert beside == waited


def test_an_engine_whose_sampler_cannot_be_compiled_answers_with_steps_that_do_not_overlap(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(self: SamplerPrograms, num_rows: int, work: str) -> None:
        raise RuntimeError("out of memory")

    shared = ready()
    want = shared.add([5, 6], SamplingParams(max_new_tokens=LONG, seed=1), grammar=NUMBERS)
    want = tokens_of(drain(shared)[want])
    monkeypatch.setattr(SamplerPrograms, "compile", failing)
    monkeypatch.setattr(shared.runner, "_samplers", {})
    samplers = shared.runner.samplers
    compiler = BackgroundCompiler(samplers, samplers.wanted(), shared._add_program, otherwise="they wait")
    monkeypatch.setattr(shared, "_sampler_compiler", compiler)
    request_id = shared.add([5, 6], SamplingParams(max_new_tokens=LONG, seed=1), grammar=NUMBERS)
    shared.wait_until_compiled()
    assert tokens_of(drain(shared)[request_id]) == want
    assert "8 rows of logits failed (RuntimeError: out of memory); they wait" in caplog.text


def test_masks_of_many_requests_are_filled_by_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = engine().intake._grammars
    assert compiler is not None
    matchers = [compiler.matcher(grammar) for grammar in (LETTERS, NUMBERS) * 6]
    for number, matcher in enumerate(matchers):
        for token_id in tokenizer().encode("abcdef"[: number // 2] if number % 2 == 0 else "", add_special_tokens=False):
            matcher.advance(token_id)
    alone, shared = np.zeros((2, len(matchers), 3), np.int32)
    filters.fill_masks(matchers, alone)
    with ThreadPoolExecutor(3) as pool:
        monkeypatch.setattr(filters, "_pool", lambda: pool)
        filters.fill_masks(matchers, shared)
    assert (alone == shared).all()
    assert len({tuple(row) for row in alone.tolist()}) > 1


def test_a_step_with_nothing_but_masks_needs_no_branches() -> None:
    shared = engine()
    bucket = shared.runner.bucket(8)
    for flags, expected in (((), "masked"), (("any_sampling",), "masked"), (("any_sampling", "any_bans"), "any")):
        packed, views = bucket.new_buffer()
        views["sampling.any_masks"][...] = 1
        for name in flags:
            views[f"sampling.{name}"][...] = 1
        before = packed.copy()
        sampling = bucket.take_sampling(packed)
        assert work_of(sampling, bucket.num_seqs) == expected
        assert bucket.work_of(packed) == "greedy", "the step itself samples nothing"
        assert (packed == bucket.new_buffer()[0]).all()
        assert (np.concatenate([packed[: -len(sampling)], sampling]) == before).all()
