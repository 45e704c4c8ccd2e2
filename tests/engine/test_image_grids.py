"""Engines of Qwen2.5-VL and Qwen3-VL: images of several sizes, whose tokens have rows and columns, cut into chunks."""

from __future__ import annotations

import base64
import io
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from fastgen_jax import Engine
from tests.engine.test_images import MESSAGES, TEXT
from tests.models.vision.reference import NUM_GREEDY, QWEN, answer, pictures
from tests.tiny import drain, greedy, tokens_of

QWEN2_5, QWEN3 = QWEN[1:3]


@cache
def engine(folder: Path = QWEN3, **options: Any) -> Engine:
    """Kept, because compiling one takes longer than most tests; a test leaves its engine idle.

    Its steps are shorter than the first image.
    """
    sizes = {"token_budget": 16, "budget_ladder": (), "max_num_seqs": 8, "block_size": 4, "num_blocks": 96}
    settings = {**sizes, "background_compile": False, "compile_cache_dir": None, **options}
    return Engine.from_pretrained(folder, **settings)


def add(made: Engine, folder: Path = QWEN3, shown: list[Any] | None = None, new_tokens: int = NUM_GREEDY) -> str:
    return made.add(MESSAGES, greedy(new_tokens), images=pictures(folder) if shown is None else shown)


@pytest.mark.slow
@pytest.mark.parametrize("folder", [QWEN3, QWEN2_5], ids=lambda folder: folder.name)
def test_the_answer_is_that_of_transformers_alone_and_in_company(folder):
    made = engine(folder)
    made.reset_prefix_cache()
    alone = add(made, folder)
    assert tokens_of(drain(made)[alone]) == answer(folder)
    made.reset_prefix_cache()
    text = made.add(TEXT, greedy(20))
    both = [add(made, folder), add(made, folder, shown=pictures(folder)[::-1]), made.add(TEXT, greedy(20))]
    outputs = drain(made)
    assert tokens_of(outputs[both[0]]) == answer(folder)
    assert tokens_of(outputs[both[1]]) != answer(folder)
    assert tokens_of(outputs[text]) == tokens_of(outputs[both[2]])
    assert made.metrics.compiles_while_serving == 0


def test_a_prefix_that_ends_within_an_image_is_reused_by_its_content():
    made = engine()
    made.reset_prefix_cache()
    cached, answers = [], []
    first, second = pictures(QWEN3)
    for shown in ([first, second], [first, second], [first, first], [second, first]):
        request = add(made, shown=shown)
        outputs = drain(made)[request]
        cached.append(outputs[-1].num_cached_tokens)
        answers.append(tokens_of(outputs))
    assert answers[0] == answers[1] == answer(QWEN3)
    assert cached[0] == 0
    assert cached[1] > 72  # all but the last block
    assert 40 < cached[2] < 60  # the first image is the same
    assert 0 < cached[3] < 12  # only what is before it


@pytest.mark.slow
def test_a_preempted_request_goes_on_at_its_positions():
    made = engine()
    made.reset_prefix_cache()
    alone = add(made, new_tokens=40)
    want = tokens_of(drain(made)[alone])
    made.reset_prefix_cache()
    borrowed = made.exclusive(lambda: made.scheduler.borrow_blocks(made.config.num_blocks - 48))
    try:
        before = made.scheduler.stats.num_preemptions
        requests = [add(made, new_tokens=40), add(made, new_tokens=40), made.add(TEXT, greedy(60))]
        outputs = drain(made)
        assert made.scheduler.stats.num_preemptions > before
        assert [tokens_of(outputs[request]) for request in requests[:2]] == [want, want]
    finally:
        made.exclusive(lambda: made.scheduler.return_blocks(borrowed))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"overlap": False}, {"policy": "orca"}, {"token_budget": 96}], ids=str)
def test_policies_and_budgets_do_not_change_the_answer(options):
    made = engine(**options)
    requests = [made.add(TEXT, greedy(20)), add(made), add(made)]
    outputs = drain(made)
    assert [tokens_of(outputs[request]) for request in requests[1:]] == [answer(QWEN3)] * 2


@pytest.mark.slow
def test_without_images_the_text_model_gives_the_same_answers():
    made = engine(images=False)
    assert "rope_positions" not in made.runner.bucket(16).new_buffer()[1]
    plain, with_tower = made.add(TEXT, greedy(20)), engine().add(TEXT, greedy(20))
    assert tokens_of(drain(made)[plain]) == tokens_of(drain(engine())[with_tower])


def test_pictures_are_made_smaller_than_the_limit_of_the_engine_or_refused():
    made = engine()
    prompts = made.intake.need_images()
    photo = pictures(QWEN3)[0]
    assert prompts.pixels(photo.resize((1000, 900))).shape == (40, 48, 3)
    with pytest.raises(ValueError, match=r"images\[0\] has 402 x 2 pixels; the longer side may be at most 200 times"):
        made.intake.parts("What?", [photo.resize((402, 2))])


def test_a_marked_place_and_a_picture_in_a_message_mean_the_same():
    made = engine()
    file = io.BytesIO()
    pictures(QWEN3)[1].save(file, format="PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    part = {"type": "image_url", "image_url": {"url": url}}
    chat = made.intake.parts([{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}])
    text = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What?<|im_end|>\n<|im_start|>assistant\n"
    marked = made.intake.parts(text, [file.getvalue()])
    assert chat.token_ids == marked.token_ids
    assert [image.key for image in chat.images] == [image.key for image in marked.images]
    with pytest.raises(ValueError, match="stands for a part of an image"):
        made.intake.parts("a <|image_pad|>", [file.getvalue()])
