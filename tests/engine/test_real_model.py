"""SmolLM2-135M-Instruct from its GGUF file: the tokens of transformers, in all configurations of the engine."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from fastgen_jax import Engine, Pipeline, SamplingParams
from pallas_kernels import native
from tests.tiny import drain, greedy, tokens_of

# Each has a twin on a tiny model, in test_engine.py and tests/api.
pytestmark = pytest.mark.slow

REFERENCE = json.loads((Path(__file__).parent.parent / "reference" / "smollm2_greedy.json").read_text())
GENERATIONS = REFERENCE["generations"]
# Float32 through 30 layers, summed in another order than in torch; a quarter of the reference's tolerance.
LOGPROB_TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.from_pretrained(
        "smollm2-135m-instruct",
        token_budget=128,
        budget_ladder=(1, 32),
        num_blocks=600,
        max_context_len=2048,
        background_compile=False,
    )


def run(engine: Engine, items, params, *, num_companions: int = 0) -> dict[str, tuple[list[int], np.ndarray]]:
    """Tokens and log-probabilities of all items, run together and among other requests."""
    rng = np.random.default_rng(11)
    companions = (rng.integers(0, 49152, int(rng.integers(1, 200))).tolist() for _ in range(num_companions))
    ids = {}
    for item in items:
        ids[item["name"]] = engine.add(item["prompt_token_ids"], params)
        for prompt in itertools.islice(companions, 2):
            engine.add(prompt, greedy(48))
    outputs = drain(engine)
    engine.scheduler.check_integrity()
    assert engine.metrics.compiles_while_serving == 0
    return {
        name: (
            tokens_of(outputs[request_id]),
            np.array([entry.logprob for output in outputs[request_id] for entry in output.logprobs or ()]),
        )
        for name, request_id in ids.items()
    }


@pytest.fixture(scope="module")
def together(engine) -> dict[str, tuple[list[int], np.ndarray]]:
    return run(engine, GENERATIONS, greedy(64, logprobs=0))


def test_greedy_tokens_and_logprobs_equal_those_of_transformers(together):
    assert len(GENERATIONS) >= 20
    for item in GENERATIONS:
        tokens, logprobs = together[item["name"]]
        assert tokens == item["token_ids"], item["name"]
        np.testing.assert_allclose(logprobs, item["logprobs"], atol=LOGPROB_TOLERANCE, err_msg=item["name"])


def test_prompt_logprobs_equal_those_of_transformers(engine):
    for item in REFERENCE["prompt_logprobs"]:
        request_id = engine.add(item["token_ids"], greedy(1, prompt_logprobs=0))
        got = drain(engine)[request_id][0].prompt_logprobs
        assert got is not None
        np.testing.assert_allclose([entry.logprob for entry in got], item["logprobs"][1:], atol=LOGPROB_TOLERANCE)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"max_num_seqs": 1, "prefix_caching": False}, id="alone"),
        pytest.param({"token_budget": 1, "budget_ladder": ()}, id="budget 1"),
        pytest.param({"token_budget": 7, "budget_ladder": ()}, id="budget 7"),
        pytest.param({"token_budget": 32, "budget_ladder": ()}, id="budget 32"),
        pytest.param({"token_budget": 64, "budget_ladder": (16,)}, id="budget 64"),
        pytest.param({"token_budget": 512, "budget_ladder": ()}, id="budget 512"),
        pytest.param({"num_blocks": 60}, id="preempted"),
        pytest.param({"prefix_caching": False}, id="no prefix cache"),
        pytest.param({"overlap": False}, id="no overlap"),
        pytest.param({"block_size": 16, "num_blocks": 1200}, id="small blocks"),
    ],
)
@pytest.mark.parametrize(
    "params",
    [
        pytest.param(greedy(64, logprobs=0), id="greedy"),
        pytest.param(
            SamplingParams(max_new_tokens=64, ignore_eos=True, seed=3, temperature=0.8, top_p=0.9, logprobs=0), id="sampled"
        ),
    ],
)
def test_tokens_do_not_depend_on_how_the_engine_runs_them(engine, options, params):
    want = run(engine, GENERATIONS, params, num_companions=64 - len(GENERATIONS))  # each among 63 others
    settings = {"token_budget": 128, "budget_ladder": (1, 32), "num_blocks": 600, "max_context_len": 2048, **options}
    other = Engine.from_pretrained("smollm2-135m-instruct", background_compile=False, **settings)
    got = run(other, GENERATIONS, params)
    if settings["num_blocks"] == 60:
        assert other.scheduler.stats.num_preemptions > 0
    for name, (tokens, logprobs) in want.items():
        assert got[name][0] == tokens, name
        if native.available():  # otherwise XLA chooses the order of a sum by the number of rows
            np.testing.assert_array_equal(got[name][1], logprobs, err_msg=name)


def test_nothing_is_compiled_while_60_mixed_requests_are_served(engine):
    rng = np.random.default_rng(5)
    for number in range(60):
        prompt = rng.integers(0, 49152, int(rng.integers(1, 40))).tolist()
        kinds = [
            greedy(3),
            SamplingParams(max_new_tokens=4, temperature=0.7, top_k=20, seed=number),
            SamplingParams(max_new_tokens=3, top_p=0.8, min_p=0.02, repetition_penalty=1.2, presence_penalty=0.3),
            SamplingParams(max_new_tokens=2, logit_bias={7: 5.0}, min_new_tokens=2, stop_token_ids=(5,)),
            SamplingParams(max_new_tokens=2, logprobs=5, prompt_logprobs=3),
            SamplingParams(max_new_tokens=4, stop=("the", "\n")),
        ]
        engine.add(prompt, kinds[number % len(kinds)])
        if number % 9 == 0:
            engine.step()
    drain(engine)
    assert engine.metrics.compiles_while_serving == 0
    engine.scheduler.check_integrity()


def test_chat_answers_and_streams_the_same_text(engine):
    pipe = Pipeline(engine)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    (response,) = pipe(messages, max_new_tokens=24, do_sample=False)
    assert "Paris" in response.generated_text
    assert response.finish_reason == "stop"
    assert "".join(output.text for output in pipe.stream(messages, max_new_tokens=24, do_sample=False)) == str(response)


def test_a_stop_string_ends_across_token_borders(engine):
    pipe = Pipeline(engine)
    prompt = GENERATIONS[5]["prompt_token_ids"]
    (whole,) = pipe([prompt], max_new_tokens=40, do_sample=False, ignore_eos=True)
    text = whole.generated_text
    middle = text[len(text) // 2 : len(text) // 2 + 9]
    (cut,) = pipe([prompt], max_new_tokens=40, do_sample=False, ignore_eos=True, stop=[middle, "never to be seen"])
    assert cut.generated_text == text[: text.index(middle)]
    assert cut.finish_reason == "stop"
    assert cut.generated_length <= whole.generated_length
    assert engine.num_running == 0


def test_n_samples_differ_and_repeat_with_their_seed(engine):
    pipe = Pipeline(engine)
    options = {"max_new_tokens": 12, "n": 3, "seed": 4, "temperature": 1.2}
    first = pipe("Once upon a time", **options)
    assert len({response.token_ids for response in first}) == 3
    assert [r.token_ids for r in pipe("Once upon a time", **options)] == [r.token_ids for r in first]
    (single,) = pipe("Once upon a time", max_new_tokens=12, seed=4, temperature=1.2)
    assert single.token_ids == first[0].token_ids
