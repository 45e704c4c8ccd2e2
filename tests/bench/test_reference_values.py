"""The stored reference values are complete and consistent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

FILE = Path(__file__).parent.parent / "reference" / "smollm2_greedy.json"


@pytest.fixture(scope="module")
def reference() -> dict:
    return json.loads(FILE.read_text(encoding="utf-8"))


def test_every_generation_has_64_tokens_with_scores(reference: dict) -> None:
    assert len(reference["generations"]) == 24
    for entry in reference["generations"]:
        assert len(entry["token_ids"]) == len(entry["logprobs"]) == len(entry["top2_gaps"]) == 64, entry["name"]
        assert max(entry["logprobs"]) <= 0
        assert min(entry["top2_gaps"]) > 0, "an exact tie has no right answer; change the prompt"


def test_prompts_range_from_one_token_to_hundreds(reference: dict) -> None:
    lengths = [len(entry["prompt_token_ids"]) for entry in reference["generations"]]
    assert (min(lengths), max(lengths)) == (1, 700)


def test_prompt_scores_cover_every_token_but_the_first(reference: dict) -> None:
    assert len(reference["prompt_logprobs"]) == 2
    for entry in reference["prompt_logprobs"]:
        first, *rest = entry["logprobs"]
        assert first is None
        assert len(rest) == len(entry["token_ids"]) - 1
        assert all(value < 0 for value in rest)


def test_chat_prompts_end_where_the_assistant_starts(reference: dict) -> None:
    assert len(reference["chats"]) == 3
    for chat in reference["chats"]:
        assert chat["prompt"] == chat["without_generation_prompt"] + "<|im_start|>assistant\n"


def test_the_file_stays_small() -> None:
    assert FILE.stat().st_size < 400_000
