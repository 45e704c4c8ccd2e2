"""Requests with images through an engine: the tokens of transformers, in any company, cut in any way, cached or not."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastgen_jax import Engine, SamplingParams
from fastgen_jax.api.pipeline import Pipeline
from fastgen_jax.checkpoint import load_params, open_checkpoint
from fastgen_jax.training import merge_lora
from pallas_kernels import native
from tests.adapters import random_lora
from tests.models.vision import reference
from tests.models.vision.reference import GEMMA3, NUM_GREEDY, PHOTO, expected
from tests.tiny import drain, greedy, tokens_of

TEXT = [{"role": "user", "content": "What is in a name?"}]
MESSAGES = [
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "This"},
            {"type": "image"},
            {"type": "text", "text": "and"},
            {"type": "image"},
            {"type": "text", "text": "differ."},
        ],
    }
]


@cache
def engine(**options: Any) -> Engine:
    """Kept, because compiling one takes longer than most tests; a test leaves its engine idle."""
    sizes = {"token_budget": 24, "budget_ladder": (), "max_num_seqs": 8, "block_size": 4, "num_blocks": 96}
    settings = {**sizes, "background_compile": False, "compile_cache_dir": None, **options}
    return Engine.from_pretrained(GEMMA3, **settings)


def images() -> list[Image.Image]:
    return reference.pictures(GEMMA3)


def answer() -> list[int]:
    """What transformers generates."""
    return reference.answer(GEMMA3)


def add(made: Engine, params: SamplingParams | None = None, shown: list[Any] | None = None, **options: Any) -> str:
    return made.add(MESSAGES, params or greedy(NUM_GREEDY), images=images() if shown is None else shown, **options)


def test_the_prompt_has_the_tokens_of_transformers():
    parts = engine().intake.parts(MESSAGES, images())
    assert list(parts.token_ids) == expected()["token_ids"][:-NUM_GREEDY].tolist()


def test_the_answer_is_that_of_transformers_alone_and_in_company():
    made = engine()
    made.reset_prefix_cache()
    alone = add(made)
    assert tokens_of(drain(made)[alone]) == answer()
    made.reset_prefix_cache()
    text = made.add(TEXT, greedy(20))
    both = [add(made), add(made, shown=images()[::-1]), made.add(TEXT, greedy(20))]
    outputs = drain(made)
    assert tokens_of(outputs[both[0]]) == answer()
    assert tokens_of(outputs[both[1]]) != answer()
    assert tokens_of(outputs[text]) == tokens_of(outputs[both[2]])
    assert made.metrics.compiles_while_serving == 0


@pytest.mark.slow
@pytest.mark.skipif(not native.available(), reason="the weights are not packed")
def test_an_adapter_reads_images_and_disturbs_no_request_beside_it():
    """Prompts with the same images share no prefix across adapters."""
    made = engine(max_adapters=1, stack_layers=True)
    lora = random_lora(made.model, 0)
    made.load_adapter("x", lora, scale=0.5)
    plain, adapted = add(made), add(made, greedy(NUM_GREEDY, adapter="x"))
    text = made.add(TEXT, greedy(20, adapter="x"))
    outputs = drain(made)
    assert tokens_of(outputs[plain]) == answer()
    assert outputs[adapted][-1].num_cached_tokens == 0
    assert tokens_of(outputs[adapted]) != answer()
    again = add(made, greedy(NUM_GREEDY, adapter="x"))
    repeated = drain(made)[again]
    assert repeated[-1].num_cached_tokens > 0
    assert tokens_of(repeated) == tokens_of(outputs[adapted])
    with pytest.raises(ValueError, match="is a PackedWeight, the form in which an engine multiplies; merge into"):
        merge_lora(made.params, lora, scale=0.5)
    params = load_params(open_checkpoint(GEMMA3), dtype="float32", stack_layers=True)
    made.update_params(merge_lora(params, lora, scale=0.5))
    requests = {"image": add(made), "text": made.add(TEXT, greedy(20))}
    merged = drain(made)
    assert tokens_of(merged[requests["image"]]) == tokens_of(outputs[adapted])
    assert tokens_of(merged[requests["text"]]) == tokens_of(outputs[text])


def test_a_prefix_with_images_is_cached_by_their_content():
    made = engine()
    made.reset_prefix_cache()
    cached, answers = [], []
    for shown in (images(), images(), [images()[0]] * 2, images()[::-1], images()):
        request = add(made, shown=shown)
        outputs = drain(made)[request]
        cached.append(outputs[-1].num_cached_tokens)
        answers.append(tokens_of(outputs))
    assert answers[0] == answers[1] == answers[4] == answer()
    assert cached[0] == 0
    assert cached[1] > 64
    assert cached[4] > 0
    assert 0 < cached[2] < 64  # the first image is the same
    assert 0 < cached[3] < 16  # only what is before it


def test_samples_of_one_prompt_are_those_of_separate_requests():
    made = engine()
    made.reset_prefix_cache()
    sampled = [SamplingParams(max_new_tokens=6, seed=seed, ignore_eos=True) for seed in (3, 4)]
    alone = []
    for params in sampled:
        request = add(made, params)
        alone.append(tokens_of(drain(made)[request]))
    made.reset_prefix_cache()
    together = [add(made, params) for params in sampled]
    outputs = drain(made)
    assert [tokens_of(outputs[request]) for request in together] == alone


def test_a_preempted_request_computes_its_images_again():
    made = engine()
    made.reset_prefix_cache()
    # Room for one sequence and a part of the next.
    borrowed = made.exclusive(lambda: made.scheduler.borrow_blocks(made.config.num_blocks - 48))
    try:
        before = made.scheduler.stats.num_preemptions
        requests = [add(made, greedy(40)), add(made, greedy(40)), made.add(TEXT, greedy(60))]
        outputs = drain(made)
        assert made.scheduler.stats.num_preemptions > before
        assert tokens_of(outputs[requests[0]])[:NUM_GREEDY] == answer()
        assert tokens_of(outputs[requests[0]]) == tokens_of(outputs[requests[1]])
    finally:
        made.exclusive(lambda: made.scheduler.return_blocks(borrowed))


def test_a_request_that_is_aborted_in_its_prompt_leaves_no_trace():
    made = engine()
    made.reset_prefix_cache()
    gone, stays = add(made), add(made)
    made.step()
    made.step()
    assert made.abort(gone)
    assert tokens_of(drain(made)[stays]) == answer()
    made.scheduler.check_integrity()
    assert made.scheduler.num_free_blocks == made.config.num_blocks


def test_an_engine_that_slept_reads_its_tower_again():
    made = engine()
    made.release_memory(weights="dropped")
    request = add(made)
    assert tokens_of(drain(made)[request]) == answer()


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"overlap": False}, {"policy": "orca"}, {"policy": "prompts_first"}], ids=str)
def test_policies_and_overlap_do_not_change_the_answer(options):
    made = engine(**options)
    requests = [made.add(TEXT, greedy(20)), add(made), add(made)]
    outputs = drain(made)
    assert [tokens_of(outputs[request]) for request in requests[1:]] == [answer()] * 2


@pytest.mark.slow
def test_without_images_the_text_model_is_the_same_and_says_why_it_reads_none():
    made = engine(images=False)
    assert made.runner.tower is None
    requests = [made.add(TEXT, greedy(20)), None]
    with_tower = engine().add(TEXT, greedy(20))
    assert tokens_of(drain(made)[requests[0]]) == tokens_of(drain(engine())[with_tower])
    with pytest.raises(ValueError, match="started with images=False"):
        add(made)


def test_the_pipeline_takes_images_beside_prompts_and_within_messages():
    pipe = Pipeline(engine())
    try:
        options = {"max_new_tokens": NUM_GREEDY, "do_sample": False, "ignore_eos": True}
        (beside,) = pipe(MESSAGES, images=images(), **options)
        assert list(beside.token_ids) == answer()
        parts = iter(images())
        within = [
            {"type": "image", "image": np.asarray(next(parts))} if part["type"] == "image" else part
            for part in MESSAGES[0]["content"]
        ]
        responses = pipe([[{"role": "user", "content": within}], "plain"], **options)
        assert list(responses[0].token_ids) == answer()
        (text,) = pipe("<start_of_turn>user\nWhat is it?", images=str(PHOTO), **options)
        (marked,) = pipe("<start_of_image><start_of_turn>user\nWhat is it?", images=[PHOTO], **options)
        assert text.token_ids == marked.token_ids
        assert "".join(output.text for output in pipe.stream(MESSAGES, images=images(), **options)) == beside.generated_text
        for wrong, message in (
            ({"prompts": ["a", "b"], "images": [PHOTO]}, "a list with a list of images for each prompt"),
            ({"prompts": [5, 6], "images": [PHOTO]}, "need a prompt of text or chat messages"),
            ({"prompts": "a <image_soft_token>", "images": [PHOTO]}, "stands for a part of an image"),
            ({"prompts": "<start_of_image> <start_of_image>", "images": [PHOTO]}, "2 places for images"),
            ({"prompts": "a", "images": [PHOTO], "prompt_logprobs": 0}, "prompt_logprobs are not available"),
        ):
            with pytest.raises(ValueError, match=message):
                pipe(**wrong)  # type: ignore[arg-type]
    finally:
        pipe._shared._thread.close()


def test_too_small_a_step_is_refused_with_the_least_size():
    with pytest.raises(ValueError, match=r"token_budget=20 is too small for the 16 tokens of an image .* at least 24"):
        Engine.from_pretrained(GEMMA3, token_budget=20, max_num_seqs=8, block_size=4, num_blocks=32)


def test_a_checkpoint_says_that_it_reads_images():
    opened = open_checkpoint(GEMMA3)
    assert len(opened.around_text) == 39
