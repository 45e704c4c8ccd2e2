"""Which programs a measured cost curve asks for, and how the choice is kept."""

from __future__ import annotations

import json

from fastgen_jax.engine.ladder import choose_budget, choose_ladder, load_choice, save_choice

CURVE = {1: 0.010, 16: 0.012, 64: 0.030, 256: 0.100, 512: 0.198}


def test_the_budget_is_the_smallest_that_is_nearly_as_cheap_a_token_as_the_best() -> None:
    assert choose_budget(CURVE, max_num_seqs=4) == 256


def test_the_budget_leaves_room_beside_generation() -> None:
    assert choose_budget(CURVE, max_num_seqs=100) == 512
    assert choose_budget(CURVE, max_num_seqs=1000) == 512  # the largest there is


def test_where_padding_costs_a_full_step_every_clearly_cheaper_program_is_kept() -> None:
    # 1 token takes 83 % of what it takes in the program of 16
    assert choose_ladder(CURVE, 256, seconds_within=lambda budget, num_tokens: CURVE[budget]) == (1, 16, 64, 256)


def test_where_padding_costs_nothing_one_program_does() -> None:
    assert choose_ladder(CURVE, 256, seconds_within=lambda budget, num_tokens: CURVE[num_tokens] + 1e-4) == (256,)


def test_a_choice_is_found_again_beside_others_and_damage_is_no_error(tmp_path) -> None:
    path = tmp_path / "folder" / "budgets.json"
    assert load_choice(path, "a") is None
    save_choice(path, "a", (16, 256), CURVE)
    save_choice(path, "b", (64,), CURVE)
    assert load_choice(path, "a") == (16, 256)
    assert load_choice(path, "b") == (64,)
    assert json.loads(path.read_text())["a"]["seconds"]["16"] == 0.012
    path.write_text("{")
    assert load_choice(path, "a") is None
    save_choice(path, "a", (1,), CURVE)
    assert load_choice(path, "a") == (1,)
