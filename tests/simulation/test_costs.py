from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from fastgen_jax.devices import DEVICES, GIB
from fastgen_jax.models.counts import count_params, flops_per_token
from fastgen_jax.scheduling import Request, SamplingParams, Scheduler
from fastgen_jax.simulation import MODELS, Efficiency, MeasuredCost, RooflineCost, StepShape, load_cost
from fastgen_jax.simulation.costs import roofline_cost, shape_of

MEASURED = MeasuredCost(
    sizes=(8, 64),
    base=(0.01, 0.05),
    per_token=(0.0, 0.0005),
    per_row=0.001,
    per_decode_attended=1e-5,
    per_prompt_attended=2e-6,
    host_seconds=0.002,
    facts={"machine": "none"},
)
A100 = DEVICES["a100"]


def test_the_shape_of_a_step_counts_the_positions_that_each_token_attends_to() -> None:
    scheduler = Scheduler(
        num_blocks=64, block_size=4, token_budget=8, max_num_seqs=4, max_context_len=100, max_sample_rows=4
    )
    params = SamplingParams(max_new_tokens=4, ignore_eos=True)
    for name, length in (("a", 5), ("b", 9)):
        scheduler.add(Request(request_id=name, prompt_token_ids=(1,) * length, params=params, seed=0))
    first = scheduler.schedule()
    assert first is not None
    # a: 1 + ... + 5, b: 1 + 2 + 3.
    assert shape_of(first) == StepShape(8, 1, 0, 15 + 6, 5 + 3)
    scheduler.commit(first, [0])
    second = scheduler.schedule()
    assert second is not None
    # a generates its 6th position, b computes positions 3 to 8: 4 + ... + 9.
    assert shape_of(second) == StepShape(7, 2, 6, 39, 9)


def test_a_measured_step_is_padded_to_the_next_size() -> None:
    shape = StepShape(9, 3, 100, 1000, 50)
    assert MEASURED(shape) == pytest.approx(0.05 + 0.0045 + 0.003 + 0.001 + 0.002)
    assert MEASURED(StepShape(8, 0, 0, 0, 0)) == 0.01
    with pytest.raises(ValueError, match="a step of 65 tokens exceeds the largest measured one, 64"):
        MEASURED(StepShape(65, 0, 0, 0, 0))


def test_a_measured_cost_is_the_same_after_saving_and_loading(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    path.write_text(json.dumps(asdict(MEASURED)))
    assert load_cost(path) == MEASURED
    path.write_text("{}")
    with pytest.raises(ValueError, match="contains no step costs"):
        load_cost(path)


def test_a_small_step_is_bound_by_reading_the_weights_and_a_large_one_by_matrix_products() -> None:
    cost = RooflineCost(model=MODELS["llama-2-7b"], device=A100, efficiency=Efficiency(matmul=0.5))
    weights = 2 * count_params(MODELS["llama-2-7b"]) / A100.memory_bytes_per_s
    assert cost(StepShape(1, 1, 0, 0, 0)) == pytest.approx(weights)
    products = 4096 * flops_per_token(MODELS["llama-2-7b"], sampled=False) / (0.5 * A100.flops_per_s)
    assert cost(StepShape(4096, 0, 0, 0, 0)) == pytest.approx(products)


def test_generation_is_bound_by_reading_contexts_and_prompts_by_arithmetic() -> None:
    model = MODELS["llama-2-7b"]
    cost = RooflineCost(model=model, device=A100, efficiency=Efficiency(matmul=0.6))
    empty = cost(StepShape(64, 64, 0, 0, 0))
    read = cost(StepShape(64, 64, 64_000, 0, 0)) - empty
    assert read == pytest.approx(64_000 * model.kv_bytes_per_token(2) / A100.memory_bytes_per_s)
    multiplied = cost(StepShape(64, 64, 0, 10_000_000, 1000)) - empty
    assert multiplied == pytest.approx(10_000_000 * 4 * 32 * 32 * 128 / A100.flops_per_s)


def test_tensor_parallelism_divides_the_work_and_adds_the_all_reduces() -> None:
    one, four = (roofline_cost("llama-2-13b", "a100", n) for n in (1, 4))
    shape = StepShape(2048, 1, 0, 0, 0)
    reduces = 2 * 40 * (A100.all_reduce_latency_s + 2048 * 5120 * 2 * 1.5 / (0.7 * A100.link_bytes_per_s))
    assert four(shape) == pytest.approx(one(shape) / 4 + reduces)


def test_the_kv_cache_gets_the_memory_that_the_weights_leave() -> None:
    cost = roofline_cost("llama-2-70b", "a100", 4)
    free = 0.9 * 4 * 80 * GIB - 2 * count_params(MODELS["llama-2-70b"])
    assert cost.num_kv_tokens() == int(free / (2 * 80 * 8 * 128 * 2))
    with pytest.raises(ValueError, match="the weights take 128 GiB, but 1 devices have 72 GiB for them; use at least 2"):
        roofline_cost("llama-2-70b", "a100", 1).num_kv_tokens()


def test_known_models_have_their_published_sizes() -> None:
    sizes = {name: round(count_params(model) / 1e9, 2) for name, model in MODELS.items()}
    assert sizes == {
        "llama-2-7b": 6.74,
        "llama-2-13b": 13.02,
        "llama-2-70b": 68.98,
        "llama-3.1-8b": 8.03,
        "llama-3.1-70b": 70.55,
        "smollm2-135m": 0.13,
    }


def test_unknown_names_are_rejected_with_a_list_of_the_known_ones() -> None:
    with pytest.raises(ValueError, match="model is 'gpt'; choose one of llama-2-7b"):
        roofline_cost("gpt", "a100", 1)
    with pytest.raises(ValueError, match="hardware is 'b200'; choose one of v4, v5e"):
        roofline_cost("llama-2-7b", "b200", 1)
    with pytest.raises(ValueError, match="efficiency matmul is 2"):
        roofline_cost("llama-2-7b", "a100", 1, efficiency=Efficiency(matmul=2))
