"""Which programs are chosen for measured step costs, and how the choice is saved."""

from __future__ import annotations

import json
import logging

import pytest

from fastgen_jax import devices
from fastgen_jax.engine import ladder
from fastgen_jax.engine.ladder import (
    CostModel,
    choose_budget,
    choose_ladder,
    cost_model,
    load_choice,
    modeled_ladder,
    save_choice,
)
from fastgen_jax.engine.resolve import MEASURED_BUDGETS
from fastgen_jax.models.config import ModelConfig

SMOLLM2 = ModelConfig(
    family="llama",
    vocab_size=49152,
    num_layers=30,
    embed_dim=576,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    mlp_dim=1536,
    max_context_len=8192,
    tie_embeddings=True,
)
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


# Steps of SmolLM2-135M in float32 with native kernels, two cores, milliseconds by tokens; docs/log/engine-cpu.md.
MEASURED = {"Zen 5": {1: 15.0, 32: 22.9, 256: 131.0}, "Xeon": {16: 31.05, 256: 222.0}}


@pytest.mark.parametrize("machine", MEASURED)
def test_the_modeled_cost_of_steps_is_near_the_measured_one(machine) -> None:
    measured, cost = MEASURED[machine], smollm2_on(None)
    smallest = min(measured)
    for tokens, milliseconds in measured.items():
        modeled = cost(tokens, within=tokens) / cost(smallest, within=smallest)
        assert modeled == pytest.approx(milliseconds / measured[smallest], rel=0.2)


def test_on_a_cpu_with_native_kernels_two_programs_are_chosen_as_the_measurement_did() -> None:
    assert modeled_ladder(smollm2_on(None), MEASURED_BUDGETS, max_num_seqs=64) == (16, 256)


@pytest.mark.parametrize("factor", [0.5, 2.0])
@pytest.mark.parametrize("skips_padding", [False, True])
def test_a_cpu_with_another_balance_gets_the_same_budget_and_nearly_the_same_ladder(factor, skips_padding) -> None:
    usual = smollm2_on(None, skips_padding=skips_padding)
    other = CostModel(knee=factor * usual.knee, skips_padding=skips_padding)
    a, b = (modeled_ladder(cost, MEASURED_BUDGETS, max_num_seqs=64) for cost in (usual, other))
    assert a[-1] == b[-1]
    assert abs(len(a) - len(b)) <= 1


def test_an_accelerator_gets_a_program_for_each_size_that_is_clearly_cheaper() -> None:
    # Reading the weights takes as long as multiplying 300 tokens. The program of 16 is for few rows of logits.
    assert modeled_ladder(smollm2_on("TPU v5 lite"), MEASURED_BUDGETS, max_num_seqs=64) == (16, 128, 256, 512)
    assert modeled_ladder(smollm2_on("a new one"), MEASURED_BUDGETS, max_num_seqs=64)[-1] == 512


def test_weights_of_fewer_bytes_make_the_knee_proportionally_smaller() -> None:
    whole, small = smollm2_on(None), smollm2_on(None, bytes_per_weight=1)
    assert small.knee == pytest.approx(whole.knee / 4)


def test_the_ladder_never_exceeds_the_candidates() -> None:
    assert modeled_ladder(smollm2_on(None), (1, 4), max_num_seqs=64) == (4,)


def smollm2_on(
    device_kind: str | None, *, bytes_per_weight: float | None = None, skips_padding: bool | None = None
) -> CostModel:
    on_cpu = device_kind is None
    return cost_model(
        SMOLLM2,
        bytes_per_weight=bytes_per_weight or (4 if on_cpu else 2),
        device_kind=device_kind,
        skips_padding=on_cpu if skips_padding is None else skips_padding,
    )


@pytest.mark.parametrize(
    ("device_kind", "row"),
    [
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "tpu7x"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA L4", "l4"),
        ("Tesla T4", "t4"),
        ("NVIDIA L40S", None),
    ],
)
def test_a_device_is_found_by_the_name_that_jax_reports(device_kind, row) -> None:
    assert devices.reported(device_kind) == (devices.DEVICES[row] if row else None)


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
