"""The roofline that plan and simulator share, and the table of devices behind it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from fastgen_jax.checkpoint import open_checkpoint
from fastgen_jax.devices import DEVICES, parse_topology
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.counts import count_params
from fastgen_jax.plan.estimate import PlannedStep, planned_step
from fastgen_jax.plan.roofline import PEAK, Efficiency, StepShape, decode_attended, roofline, step_shape
from fastgen_jax.simulation import MODELS, RooflineCost

LLAMA_7B = MODELS["llama-2-7b"]
SPARSE = Path(__file__).parents[1] / "reference" / "families" / "deepseek_v32" / "sparse"
PUBLISHED_IN_BOTH_DIRECTIONS = {
    "v5e": 400e9,
    "v5p": 1200e9,
    "v6e": 800e9,
    "tpu7x": 1200e9 / 2,  # a JAX device is half a chip
    "h100": 900e9,
    "h200": 900e9,
    "a100": 600e9,
    "l4": 64e9,
    "t4": 32e9,
}


@pytest.mark.parametrize(("kind", "both"), PUBLISHED_IN_BOTH_DIRECTIONS.items())
def test_link_bandwidth_is_that_of_one_direction(kind: str, both: float) -> None:
    assert DEVICES[kind].link_bytes_per_s == both / 2


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_every_device_names_its_source_and_has_figures_in_the_units_of_their_names(device) -> None:
    assert device.source.startswith(("https://", "NVIDIA"))
    assert 2**33 < device.memory_bytes < 2**38
    assert 1e11 < device.memory_bytes_per_s < 1e13
    assert 1e13 < device.flops_per_s < 1e16
    assert device.link_bytes_per_s < device.memory_bytes_per_s


def cost_of(num_devices: int, efficiency: Efficiency = PEAK, *, latency: bool = False):
    return roofline(
        LLAMA_7B,
        DEVICES["v5e"],
        num_devices,
        weight_bytes=2 * count_params(LLAMA_7B) / num_devices,
        kv_bytes_per_token=LLAMA_7B.kv_bytes_per_token(2) / num_devices,
        activation_bytes=2,
        efficiency=efficiency,
        latency=latency,
    )


def test_an_all_reduce_sends_each_number_almost_twice_in_one_direction() -> None:
    tokens = 1024
    numbers = 2 * 32 * tokens * 4096  # two all-reduces per layer
    time = cost_of(4).parts(StepShape(tokens, 0, 0, 0, 0))
    assert time.links == pytest.approx(numbers * 2 * 1.5 / 200e9)
    assert cost_of(1).parts(StepShape(tokens, 0, 0, 0, 0)).links == 0
    assert cost_of(4, latency=True).parts(StepShape(0, 0, 0, 0, 0)).links == pytest.approx(2 * 32 * 5e-6)


@pytest.mark.parametrize(
    "shape", [StepShape(1, 1, 4096, 0, 0), StepShape(512, 1, 0, 512 * 256, 512), StepShape(300, 31, 30_000, 80_000, 500)]
)
def test_a_step_takes_at_least_its_longest_part_and_at_most_the_sum_of_all(shape: StepShape) -> None:
    time = cost_of(4).parts(shape)
    assert time.seconds == cost_of(4)(shape)
    assert max(time.compute, time.memory) + time.links <= time.seconds <= time.compute + time.memory + time.links


def test_half_the_efficiency_takes_twice_the_time() -> None:
    shape = StepShape(300, 31, 30_000, 80_000, 500)
    half = Efficiency(matmul=0.5, attention=0.5, memory=0.5, links=0.5)
    assert cost_of(4, half)(shape) == pytest.approx(2 * cost_of(4)(shape))


@pytest.mark.parametrize("share", [0, -0.1, 1.1, float("nan")])
def test_an_efficiency_that_is_no_share_of_the_peak_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"efficiency memory is .*above 0 and at most 1"):
        Efficiency(memory=share)


def test_plan_and_simulator_give_the_same_seconds_for_the_same_step() -> None:
    planned = planned_step(
        LLAMA_7B,
        parse_topology("a100"),
        tokens=512,
        sequences=64,
        context=1000,
        itemsize=2,
        token_bytes=LLAMA_7B.kv_bytes_per_token(2),
    )
    simulated = RooflineCost(model=LLAMA_7B, device=DEVICES["a100"], efficiency=PEAK)
    assert planned.seconds == pytest.approx(simulated(StepShape(512, 65, 64_000, 448_000, 1000)))


@pytest.mark.parametrize("chunks", [[(0, 1)], [(9, 1), (3, 1)], [(0, 5), (20, 4)], [(2, 9), (30, 1), (0, 30)]])
def test_a_token_attends_to_no_more_than_the_window_of_each_layer(chunks: list[tuple[int, int]]) -> None:
    windows = (None, 4, 16)
    shape = step_shape(chunks, 1, windows)
    seen = {
        (start, length): [
            (
                sum(min(p + 1, w or p + 1) for p in range(start, start + length)),
                start + length - max(0, start + 1 - (w or 99)),
            )
            for w in windows
        ]
        for start, length in chunks
    }
    for is_prompt, name, index in ((False, "decode_attended", 0), (True, "prompt_attended", 0), (True, "prompt_context", 1)):
        sums = [sum(of[i][index] for (_, n), of in seen.items() if (n > 1) == is_prompt) for i in range(3)]
        assert getattr(shape, name) == pytest.approx(sum(sums) / 3), name
    singles = [start + 1 for start, length in chunks if length == 1]
    assert decode_attended(singles, windows) == shape.decode_attended
    assert step_shape(chunks, 1) == step_shape(chunks, 1, (None, None))


def test_planned_steps_charge_layers_with_a_window_for_no_more_than_it() -> None:
    def planned(context: int, windows: tuple[int | None, ...]) -> float:
        size = {"tokens": 64, "sequences": 64, "itemsize": 2, "token_bytes": LLAMA_7B.kv_bytes_per_token(2)}
        return planned_step(LLAMA_7B, parse_topology("a100"), context=context, windows=windows, **size).memory

    assert planned(8000, (128,)) == planned(128, (None,))
    assert planned(8000, (None, 128)) == pytest.approx((planned(8000, (None,)) + planned(128, (None,))) / 2)


def test_planned_steps_charge_chosen_tokens_and_the_scores_of_all() -> None:
    model = open_checkpoint(SPARSE).config
    assert model.mla is not None
    indexer = model.mla.indexer
    assert indexer is not None
    devices = parse_topology("h100")
    token_bytes, bandwidth = model.kv_bytes_per_token(2), devices.device.memory_bytes_per_s

    def planned(context: int, tokens: int = 4, model: ModelConfig = model) -> PlannedStep:
        size = {"tokens": tokens, "sequences": 4, "itemsize": 2, "token_bytes": token_bytes}
        return planned_step(model, devices, context=context, **size)

    dense = dataclasses.replace(model, mla=dataclasses.replace(model.mla, indexer=None))
    chosen, long = indexer.num_chosen, 100 * indexer.num_chosen
    pairs, values = 4 * long * len(indexer.layers), indexer.head_dim
    at_most = planned(chosen)
    assert planned(long).memory - at_most.memory == pytest.approx(pairs * values * 2 / bandwidth)
    scores = 2 * pairs * values * indexer.num_heads / devices.device.flops_per_s
    assert planned(long).compute - at_most.compute == pytest.approx(scores)
    assert planned(long).seconds < planned(long, model=dense).seconds
    # A chunk of a prompt reads every key once at most.
    more = planned(long, 304).memory - planned(long, 204).memory
    assert more < long * token_bytes / bandwidth / 1000
