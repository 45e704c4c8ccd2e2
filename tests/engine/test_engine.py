"""The engine on a tiny model: its tokens equal those of a naive loop, under all kinds of load."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastgen_jax import Engine, EngineConfig, Research, SamplingParams
from tests.tiny import VARIANTS, drain, expected, greedy, tiny_engine, tiny_model, tokens_of

RNG = np.random.default_rng(7)
PROMPTS = [tuple(RNG.integers(3, 96, size).tolist()) for size in (1, 2, 5, 8, 13, 21, 34, 55, 40, 3)]


def generate(engine: Engine, prompts=PROMPTS, params=None) -> list[list[int]]:
    ids = [engine.add(prompt, params or greedy(12)) for prompt in prompts]
    outputs = drain(engine)
    engine.scheduler.check_integrity()
    assert engine.metrics.compiles_while_serving == 0
    return [tokens_of(outputs[request_id]) for request_id in ids]


@pytest.fixture(scope="module")
def alone() -> list[list[int]]:
    """Each prompt alone in an otherwise idle engine."""
    engine = tiny_engine(overlap=False, prefix_caching=False)
    return [generate(engine, [prompt])[0] for prompt in PROMPTS]


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_tokens_equal_those_of_transformers(variant):
    want = expected(variant)
    # One program each: changes between programs are tested with the first variant.
    engine = tiny_engine() if variant == "default" else tiny_engine(variant, budget_ladder=())
    (got,) = generate(engine, [want["token_ids"].tolist()], greedy(len(want["greedy"])))
    assert got == want["greedy"].tolist()


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="together"),
        pytest.param({"overlap": False}, id="no overlap"),
        pytest.param({"token_budget": 7, "budget_ladder": ()}, id="prompts split at 7 tokens"),
        pytest.param({"token_budget": 64, "budget_ladder": ()}, id="one large program"),
        pytest.param({"token_budget": 1, "budget_ladder": ()}, id="one token at a time"),
        pytest.param({"num_blocks": 18, "prefix_caching": False}, id="preempted because no blocks were free"),
        pytest.param({"num_blocks": 18, "block_size": 4, "prefix_caching": True}, id="preempted, with prefix cache"),
        pytest.param({"policy": "prompts_first"}, id="prompts first"),
        pytest.param({"policy": "orca"}, id="orca", marks=pytest.mark.slow),
        pytest.param({"policy": "sla", "promised_prompt_rate": 1e-3, "promised_generation_rate": 1e-3}, id="sla"),
        pytest.param({"block_size": 16, "num_blocks": 16}, id="large blocks", marks=pytest.mark.slow),
        pytest.param({"stack_layers": True, "budget_ladder": ()}, id="scanned layers"),
        pytest.param({"attention": "xla", "budget_ladder": ()}, id="portable attention"),
    ],
)
def test_tokens_do_not_depend_on_how_the_engine_runs_them(alone, options):
    engine = tiny_engine(**options)
    assert generate(engine) == alone
    if options.get("num_blocks") == 18:  # the smallest that holds the longest of them
        assert engine.scheduler.stats.num_preemptions > 0, "the cache was meant to be too small"


def test_sampled_tokens_depend_on_the_seed_alone():
    params = SamplingParams(max_new_tokens=10, temperature=1.5, top_p=0.95, top_k=40, seed=11, ignore_eos=True)
    engine = tiny_engine(overlap=False, prefix_caching=False)
    alone = [generate(engine, [prompt], params)[0] for prompt in PROMPTS]
    assert generate(tiny_engine(), PROMPTS, params) == alone
    assert generate(tiny_engine(num_blocks=18), PROMPTS, params) == alone
    assert generate(tiny_engine(token_budget=7, budget_ladder=()), PROMPTS, params) == alone
    other = SamplingParams(max_new_tokens=10, temperature=1.5, top_p=0.95, top_k=40, seed=12, ignore_eos=True)
    assert generate(tiny_engine(), PROMPTS, other) != alone


def test_penalized_tokens_survive_a_preemption():
    params = SamplingParams(
        max_new_tokens=12,
        do_sample=False,
        ignore_eos=True,
        repetition_penalty=1.7,
        presence_penalty=0.5,
        frequency_penalty=0.4,
        logit_bias={5: 3.0, 9: -100.0},
    )
    engine = tiny_engine(overlap=False, prefix_caching=False)
    alone = [generate(engine, [prompt], params)[0] for prompt in PROMPTS]
    assert alone != [generate(engine, [prompt], greedy(12))[0] for prompt in PROMPTS]
    assert generate(tiny_engine(num_blocks=18), PROMPTS, params) == alone


def test_a_cached_prefix_costs_no_forward_tokens():
    engine = tiny_engine()
    engine.reset_prefix_cache()
    prompt = PROMPTS[7]
    first = generate(engine, [prompt])
    tokens = engine.metrics.tokens
    request_id = engine.add(prompt, greedy(12))
    outputs = drain(engine)[request_id]
    # 55 prompt tokens: the 13 full blocks of 4 are found, the last 3 tokens are computed
    assert outputs[-1].num_cached_tokens == 52
    assert tokens_of(outputs) == first[0]
    assert engine.metrics.tokens - tokens == 3 + 11


def test_an_end_of_sequence_token_ends_unless_ignored_or_too_early():
    engine = tiny_engine()
    (free_running,) = generate(engine, [PROMPTS[4]])
    stop = free_running[3]
    first = free_running.index(stop)

    def run(**options):
        request_id = engine.add(PROMPTS[4], SamplingParams(max_new_tokens=12, do_sample=False, **options))
        outputs = drain(engine)[request_id]
        return tokens_of(outputs), outputs[-1].finish_reason

    assert run(stop_token_ids=(stop,)) == (free_running[: first + 1], "stop")
    assert run(ignore_eos=True) == (free_running, "length")
    tokens, _ = run(stop_token_ids=(stop,), min_new_tokens=6)
    assert len(tokens) >= 6
    assert stop not in tokens[:6]


def test_max_length_counts_the_prompt():
    engine = tiny_engine()
    request_id = engine.add(PROMPTS[4], SamplingParams(max_length=20, do_sample=False, ignore_eos=True))
    assert len(tokens_of(drain(engine)[request_id])) == 20 - len(PROMPTS[4])


def test_logprobs_are_those_of_the_reference_logits():
    want = expected()
    prompt, logits = want["token_ids"].tolist(), want["logits"].astype(np.float64)
    log_softmax = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for options in ({}, {"num_blocks": 24, "budget_ladder": ()}, {"token_budget": 7, "budget_ladder": ()}):
        engine = tiny_engine(**options)
        engine.add(PROMPTS[5], greedy(8))  # other requests
        request_id = engine.add(prompt, greedy(3, logprobs=4, prompt_logprobs=2))
        outputs = drain(engine)[request_id]
        got = outputs[0].prompt_logprobs
        assert got is not None
        assert [entry.token_id for entry in got] == prompt[1:]
        np.testing.assert_allclose(
            [entry.logprob for entry in got], log_softmax[np.arange(len(prompt) - 1), prompt[1:]], atol=1e-3
        )
        for entry, row in zip(got, log_softmax, strict=False):
            order = np.argsort(-row, kind="stable")
            assert list(entry.top) == order[:2].tolist()
            assert entry.rank == order.tolist().index(entry.token_id) + 1
        first = outputs[0].logprobs
        assert first is not None
        assert len(first[0].top) == 4
        assert first[0].rank == 1
        assert first[0].logprob == pytest.approx(log_softmax[-1].max(), abs=1e-3)


def test_an_aborted_request_frees_its_blocks_and_affects_no_other(alone):
    engine = tiny_engine(overlap=False, prefix_caching=False)
    keep = [engine.add(prompt, greedy(12)) for prompt in PROMPTS[:4]]
    drop = [engine.add(prompt, greedy(12)) for prompt in PROMPTS[4:]]
    outputs: dict[str, list] = {}
    for number in range(3):
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
        if number == 1:
            assert engine.abort(drop[0])
    for request_id in drop[1:]:
        assert engine.abort(request_id)
    assert not engine.abort(drop[0])
    for request_id, more in drain(engine).items():
        outputs.setdefault(request_id, []).extend(more)
    assert [tokens_of(outputs[request_id]) for request_id in keep] == alone[:4]
    engine.scheduler.check_integrity()
    assert engine.scheduler.num_free_blocks == engine.config.num_blocks


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ((), greedy(1), "prompt is empty"),
        ((96,), greedy(1), r"token id 96 is outside the vocabulary, 0\.\.95"),
        ((1.5,), greedy(1), "prompt contains 1.5"),
        ((5,) * 200, greedy(1), "200"),
        ("text", greedy(1), "requires a tokenizer"),
        ((5,), greedy(4, stop=("x",)), "require a tokenizer"),
        ((5,), SamplingParams(n=2, max_new_tokens=1), "n is 2"),
        ((5,), greedy(1, logit_bias={96: 1.0}), "96"),
    ],
)
def test_a_refused_request_disturbs_nothing(alone, prompt, params, message):
    engine = tiny_engine()
    ids = [engine.add(p, greedy(12)) for p in PROMPTS]
    engine.step()
    with pytest.raises(ValueError, match=message):
        engine.add(prompt, params)
    outputs = drain(engine)
    assert [tokens_of(outputs[request_id]) for request_id in ids if request_id in outputs][1:] == alone[1:]
    engine.scheduler.check_integrity()


def test_a_request_id_in_use_is_refused():
    engine = tiny_engine()
    engine.add(PROMPTS[0], greedy(4), request_id="mine")
    with pytest.raises(ValueError, match="'mine' is already in use"):
        engine.add(PROMPTS[0], greedy(4), request_id="mine")
    drain(engine)


def test_put_returns_the_reference_logits_and_shares_the_cache_with_requests(alone):
    want = expected()
    tokens, logits = want["token_ids"].tolist(), want["logits"]
    engine = tiny_engine()
    research = Research(engine)
    ids = [engine.add(prompt, greedy(12)) for prompt in PROMPTS[:5]]
    outputs: dict[str, list] = {}

    def step():
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)

    step()
    np.testing.assert_allclose(research.put(["a", 7], [tokens[:40], tokens[:3]]), logits[[39, 2]], atol=1e-3)
    step()
    np.testing.assert_allclose(research.put([7, "a"], [tokens[3:4], tokens[40:75]]), logits[[3, 74]], atol=1e-3)
    assert research.query("a").num_tokens == 75
    assert research.query("a").num_blocks == 19
    assert research.query("unknown").num_tokens == 0
    assert research.can_schedule(["a"], [4])
    assert not research.can_schedule(["a"], [54])  # 129 tokens, and the model's limit is 128
    with pytest.raises(ValueError, match="129 tokens but max_context_len is 128"):
        research.put(["a"], [[1] * 54])
    research.flush("a")
    research.flush(7)
    with pytest.raises(ValueError, match="no sequence 'a'"):
        research.flush("a")
    for request_id, more in drain(engine).items():
        outputs.setdefault(request_id, []).extend(more)
    assert [tokens_of(outputs[request_id]) for request_id in ids] == alone[:5]
    assert engine.scheduler.num_free_blocks == engine.config.num_blocks
    engine.scheduler.check_integrity()


def test_a_request_whose_promise_cannot_be_kept_is_refused_and_says_so():
    # A billion prompt tokens per second: a request that is not planned within nanoseconds is late.
    engine = tiny_engine(policy="sla", promised_prompt_rate=1e9, promised_generation_rate=1.0, promise_grace=0.0)
    refused_before = engine.metrics.refused
    ids = [engine.add(prompt, greedy(4)) for prompt in PROMPTS[:3]]
    outputs = drain(engine)
    for request_id in ids:
        (output,) = outputs[request_id]
        assert (output.finished, output.finish_reason, output.new_token_ids) == (True, "refused", ())
    assert engine.metrics.refused - refused_before == 3
    assert engine.abort(ids[0]) is False, "nothing is left of it"
    assert engine.scheduler.num_free_blocks == engine.config.num_blocks


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "sla", "promised_prompt_rate": 5.0}, "set both rates with policy sla, and with no other"),
        ({"promise_grace": 5.0}, "policy 'splitfuse' makes no promise"),
        ({"promised_generation_rate": 5.0}, "policy is 'splitfuse', promised_prompt_rate None"),
        ({"policy": "sla", "promised_prompt_rate": -5.0, "promised_generation_rate": 1.0}, "prompt_rate is -5.0"),
        ({"token_budget": 0}, "token_budget is 0"),
        ({"max_num_seqs": True}, "max_num_seqs is True"),
        ({"dtype": "int4"}, "dtype is 'int4'; choose one of float32"),
        ({"quantize": "fp8"}, r"quantize='fp8' needs an H100 or H200 and jax .* but this is cpu .*; use quantize='int8'"),
        ({"quantize": "w8a8"}, r"quantize='w8a8' needs a TPU v5e or v6e, .* but this is cpu; use quantize='int8'"),
        ({"policy": "fifo"}, "policy is 'fifo'; choose one of 'splitfuse'"),
        ({"budget_ladder": (64,), "token_budget": 32}, "outside 1..32"),
        ({"budget_ladder": "16,64", "token_budget": 128}, r"budget_ladder is '16,64'; pass a list of integers"),
        ({"budget_ladder": 16, "token_budget": 128}, "budget_ladder is 16; pass a list of integers"),
        ({"max_context_len": 4096}, "max_context_len=4096 exceeds the model's 128"),
    ],
)
def test_an_impossible_engine_config_is_refused(options, message):
    params, model = tiny_model()
    with pytest.raises(ValueError, match=message):
        Engine(params, model, EngineConfig(**{"num_blocks": 8, **options}))


def test_an_unknown_engine_option_is_refused_by_name():
    with pytest.raises(ValueError, match="unknown option 'tensor_paralel'; did you mean 'tensor_parallel'"):
        EngineConfig.from_options({"tensor_paralel": 2})


@pytest.mark.parametrize(
    "kv_dtype", [None, pytest.param("float16", marks=pytest.mark.slow), pytest.param("int8", marks=pytest.mark.slow)]
)
def test_no_answer_depends_on_what_the_cache_contained_before(kv_dtype) -> None:
    """Its memory is not written when it is allocated."""
    engine = tiny_engine(kv_dtype=kv_dtype)
    answers = []
    for value in (0, jnp.nan):
        engine.reset_prefix_cache()

        def fill(value=value) -> None:
            cache = engine.runner.kv_cache
            filled = jax.tree.map(lambda x: jnp.full_like(x, -128 if x.dtype == jnp.int8 and value else value), cache)
            engine.runner.kv_cache = filled

        engine.exclusive(fill)
        request_id = engine.add([5, 6, 7], greedy(6, logprobs=1))
        answers.append([(output.new_token_ids, output.logprobs) for output in drain(engine)[request_id]])
    assert answers[0] == answers[1]
