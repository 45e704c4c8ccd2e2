"""Which programs are chosen for measured step costs, and how the choice is saved."""

from __future__ import annotations

import json
import logging

import pytest

from fastgen_jax.engine import ladder
from fastgen_jax.engine.ladder import choose_budget, choose_ladder, load_choice, save_choice

CURVE = {1: 0.010, 16: 0.012, 64: 0.030, 256: 0.100, 512: 0.198}


def test_the_budget_is_the_smallest_with_nearly_the_best_cost_per_token() -> None:
    assert choose_budget(CURVE, max_num_seqs=4) == 256


def test_the_budget_leaves_room_for_prompts() -> None:
    assert choose_budget(CURVE, max_num_seqs=100) == 512
    assert choose_budget(CURVE, max_num_seqs=1000) == 512  # the largest one measured


def test_every_clearly_cheaper_program_is_kept_if_padding_costs_a_full_step() -> None:
    # 1 token takes 83% of what it takes in the program of 16
    assert choose_ladder(CURVE, 256, seconds_within=lambda budget, num_tokens: CURVE[budget]) == (1, 16, 64, 256)


def test_one_program_is_enough_if_padding_is_free() -> None:
    assert choose_ladder(CURVE, 256, seconds_within=lambda budget, num_tokens: CURVE[num_tokens] + 1e-4) == (256,)


def test_a_choice_is_found_again_shown_and_removed(tmp_path, caplog) -> None:
    path = tmp_path / ladder.FILE
    assert load_choice(path, "a") is None
    save_choice(path, "a", (16, 256), CURVE, model="one")
    save_choice(path, "b", (64,), CURVE, model="two")
    with caplog.at_level(logging.INFO):
        assert load_choice(path, "a") == (16, 256)
    assert "step sizes 16, 256, measured 20" in caplog.text
    assert "remeasure=True measures again" in caplog.text
    assert load_choice(path, "b") == (64,)
    one, two = sorted(ladder.known(str(tmp_path)), key=lambda m: m.model)
    assert (one.model, one.ladder, one.seconds) == ("one", (16, 256), CURVE)
    assert (two.model, two.ladder) == ("two", (64,))
    assert ladder.forget(str(tmp_path)) == 2
    assert load_choice(path, "a") is None
    assert ladder.known(str(tmp_path)) == []
    assert ladder.known("") == []


@pytest.mark.parametrize(
    "damage",
    [
        {"ladder": None},
        {"ladder": []},
        {"ladder": [0, 4]},
        {"ladder": [4, 4]},
        {"ladder": [64, 16]},
        {"ladder": ["x"]},
        {"ladder": 5},
        {"seconds": [1]},
        {"seconds": {"a": 1}},
        {"seconds": {"1": None}},
    ],
)
def test_a_damaged_entry_is_ignored(tmp_path, damage) -> None:
    path = tmp_path / ladder.FILE
    save_choice(path, "a", (16, 256), CURVE, model="one")
    entries = json.loads(path.read_text())
    for entry in entries.values():
        entry.update(damage)
    path.write_text(json.dumps(entries))
    assert load_choice(path, "a") is None
    assert ladder.known(str(tmp_path)) == []
