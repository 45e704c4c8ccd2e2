"""User functions: on logits inside the step program, and as a policy."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from fastgen_jax import Engine, EngineConfig, Research, SamplingParams
from fastgen_jax.scheduling import splitfuse
from tests.tiny import drain, greedy, tiny_engine, tiny_model, tokens_of

SMALL = {"token_budget": 16, "budget_ladder": (), "max_num_seqs": 4, "block_size": 4, "num_blocks": 64}
PROMPTS = [np.random.default_rng(size).integers(3, 96, size).tolist() for size in (1, 5, 21)]


def engine_with(processor) -> Engine:
    params, model = tiny_model()
    return Engine(params, model, EngineConfig(**SMALL, logits_processor=processor))


def counting_up(logits, rows):
    """Allows only the token after the last one or, at positions that are multiples of 4, one that depends on the seed."""
    wanted = jnp.where(rows.positions % 4 == 0, (rows.seeds % 96).astype(jnp.int32), (rows.last_tokens + 1) % 96)
    return jnp.where(jnp.arange(logits.shape[1])[None, :] == wanted[:, None], logits, -jnp.inf)


def counted_up(prompt, seed, count):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append((seed if len(tokens) % 4 == 0 else tokens[-1] + 1) % 96)
    return tokens[len(prompt) :]


@pytest.fixture(scope="module")
def counting() -> Engine:
    return engine_with(counting_up)


@pytest.mark.parametrize("sampling", [{"do_sample": False}, {"temperature": 3.0}, {"temperature": 1.0, "top_p": 0.5}])
def test_a_processor_decides_what_every_way_of_sampling_sees(counting, sampling):
    params = SamplingParams(max_new_tokens=9, ignore_eos=True, **sampling)
    seeds = {}
    ids = [counting.add(prompt, params) for prompt in PROMPTS]
    for request_id in ids:
        seeds[request_id] = counting.scheduler._state.unfinished[request_id].request.seed
    outputs = drain(counting)
    for request_id, prompt in zip(ids, PROMPTS, strict=True):
        assert tokens_of(outputs[request_id]) == counted_up(prompt, seeds[request_id], 9)


class Anything:
    """A matcher that allows every token, but asks for a mask at each position."""

    error, is_static, is_complete = None, False, False

    def restarted(self):
        return Anything()

    def fill_mask(self, words):
        words[:] = -1

    def advance(self, token_id):
        return False


def test_a_program_that_only_samples_passes_the_processor_the_same(counting):
    params = SamplingParams(max_new_tokens=9, ignore_eos=True, temperature=3.0, seed=5)
    for _ in range(2):  # the first one waits for the token before
        request = counting.intake.request(counting.encode([10, 11, 12]), params, request_id="a", awaits_each_token=True)
        counting.add_request(request, Anything())
        assert tokens_of(drain(counting)["a"]) == counted_up([10, 11, 12], 5, 9)
        counting.wait_until_compiled()
    assert counting.runner.samples_later


def test_penalties_and_bias_follow_the_processor(counting):
    biased = greedy(3, logit_bias={7: 100.0})  # a bias cannot change the choice of the only token allowed
    request_id = counting.add([10], biased)
    assert tokens_of(drain(counting)[request_id]) == [11, 12, 13]


def test_log_probabilities_of_the_model_are_those_before_the_processor(counting):
    params = SamplingParams(max_new_tokens=3, do_sample=False, ignore_eos=True, logprobs=1)
    request_id = counting.add([10], params)
    entries = [entry for output in drain(counting)[request_id] for entry in output.logprobs]
    (logits,) = Research(counting).put(["a"], [[10]])
    Research(counting).flush("a")
    assert entries[0].logprob == pytest.approx(float(logits[11] - np.log(np.exp(logits).sum())), abs=1e-4)
    assert entries[0].token_id == 11
    assert entries[0].processed_logprob == 0
    assert np.argmax(logits) in entries[0].top


def test_a_config_with_functions_is_compared_hashed_and_shown():
    config = EngineConfig(**SMALL, logits_processor=counting_up, policy=last_first)
    assert config == dataclasses.replace(config)
    assert hash(config) == hash(dataclasses.replace(config))
    assert "counting_up" in repr(config)
    assert EngineConfig(policy=splitfuse).policy == "splitfuse"


def last_first(planner):
    planner.waiting = planner.waiting[::-1]
    return splitfuse(planner)._replace(bypassed=[])


def test_a_user_policy_gives_the_same_tokens():
    params, model = tiny_model()
    engine = Engine(params, model, EngineConfig(**{**SMALL, "max_num_seqs": 1}, policy=last_first))
    order = []
    ids = [engine.add(prompt, greedy(4)) for prompt in PROMPTS]
    outputs: dict[str, list] = {}
    while engine.has_work:
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
            order += [output.request_id] if output.finished else []
    assert order == ids[::-1]
    built_in = tiny_engine()
    for request_id, prompt in zip(ids, PROMPTS, strict=True):
        again = built_in.add(prompt, greedy(4))
        assert tokens_of(outputs[request_id]) == tokens_of(drain(built_in)[again])


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        ("relu", "logits_processor is 'relu'; pass a function f"),
        (lambda logits: logits, "cannot be compiled: TypeError: .*takes 1 positional argument but 2 were given"),
        (lambda logits, rows: logits[:, 1:], r"makes float32\[3, 95\] of float32\[3, 96\]"),
        (lambda logits, rows: logits.astype(jnp.bfloat16), r"makes bfloat16\[3, 96\] of float32"),
        (lambda logits, rows: (logits, rows), "makes tuple of"),
        (lambda logits, rows: logits if logits[0, 0] > 0 else -logits, "cannot be compiled: TracerBoolConversionError"),
        (lambda logits, rows: np.asarray(logits), "cannot be compiled: TracerArrayConversionError"),
        (lambda logits, rows: None, "makes NoneType of"),
    ],
)
def test_an_invalid_processor_is_refused_before_weights_are_loaded(processor, message):
    with pytest.raises(ValueError, match=message):
        engine_with(processor)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": lambda running, waiting: None}, "cannot be called with a planner"),
        ({"policy": 3}, "policy is 3; choose one of"),
        ({"policy": last_first, "promised_prompt_rate": 1.0}, "set both rates"),
        ({"policy": last_first, "promise_grace": 1.0}, "makes no promise"),
    ],
)
def test_an_invalid_policy_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        EngineConfig(**options)
