"""The pipeline: forms of prompts, order of responses, refused options."""

from __future__ import annotations

import pytest

from fastgen_jax import Pipeline
from tests.tiny import tiny_engine

OPTIONS = {"max_new_tokens": 4, "do_sample": False, "ignore_eos": True}


@pytest.fixture
def pipe() -> Pipeline:
    return Pipeline(tiny_engine())


def test_one_prompt_and_a_list_of_it_return_the_same_response(pipe):
    assert pipe([5, 6, 7], **OPTIONS)[0].token_ids == pipe([[5, 6, 7]], **OPTIONS)[0].token_ids


def test_responses_come_in_the_order_of_the_prompts(pipe):
    prompts = [[5], [6, 7, 8, 9, 10], [11, 12]]
    together = pipe(prompts, **OPTIONS)
    assert [r.prompt_length for r in together] == [1, 5, 2]
    assert [r.token_ids for r in together] == [pipe([p], **OPTIONS)[0].token_ids for p in prompts]


def test_echo_puts_the_prompt_before_the_tokens(pipe):
    (plain,), (echoed,) = pipe([5, 6], **OPTIONS), pipe([5, 6], echo=True, **OPTIONS)
    assert echoed.token_ids == (5, 6, *plain.token_ids)
    assert echoed.generated_length == 4


def test_streams_return_the_tokens_of_the_response_and_leaving_early_frees_the_request(pipe):
    (whole,) = pipe([5, 6], **OPTIONS)
    assert tuple(t for out in pipe.stream([5, 6], **OPTIONS) for t in out.new_token_ids) == whole.token_ids
    pairs = list(pipe([[5, 6], [7]], stream=True, **OPTIONS))
    assert {index for index, _ in pairs} == {0, 1}
    assert tuple(t for index, out in pairs if index == 0 for t in out.new_token_ids) == whole.token_ids
    stream = pipe.stream([5, 6], **OPTIONS)
    next(stream)
    stream.close()
    while pipe.engine.has_work:
        pipe.engine.step()
    assert pipe.engine.num_running == 0
    pipe.engine.scheduler.check_integrity()


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        (
            [5],
            {"max_tokens": 4},
            "unknown option 'max_tokens'; use 'max_new_tokens'; generation options: adapter, ",
        ),
        ([5], {"temperature": -1.0}, "temperature"),
        ([5], {"do_sample": False, "top_p": 0.5}, "top_p"),
        ([], {}, "no prompts"),
        ([[5], []], {}, "prompt is empty"),
        ([[5], [96]], {}, "token id 96"),
        ([5], {"stream": True, "echo": True}, "apply to complete responses"),
    ],
)
def test_a_wrong_call_is_refused_and_nothing_runs(pipe, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        pipe(prompts, **options)
    assert not pipe.engine.has_work
