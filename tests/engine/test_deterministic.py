"""`deterministic`: no answer depends on other requests where rounding depends on the shape of a step."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from fastgen_jax import EngineConfig
from fastgen_jax.devices import parse_topology
from fastgen_jax.engine.machine import Machine
from fastgen_jax.engine.memory import Memory
from fastgen_jax.engine.resolve import resolve
from fastgen_jax.models.families import family_of
from fastgen_jax.plan.ahead import resolve_for
from pallas_kernels import native
from tests.gate.models import LLAMA_3_8B
from tests.models.parity import load
from tests.tiny import tiny_engine, tiny_model

GPU = Machine(platform="gpu", kind="NVIDIA H100 80GB HBM3", memory=Memory(limit=70 * 2**30))


def resolved(**options: Any):
    return resolve(EngineConfig(deterministic=True, **options), tiny_model()[1], machine=GPU)


def run(*arguments: str, program: str = "deterministic") -> None:
    devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    environment = {**os.environ, **devices, "PALLAS_KERNELS_NATIVE": "0", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", f"tests.engine.programs.{program}", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_other_requests_preemption_and_cached_prefixes_change_no_bit_without_native_kernels() -> None:
    run("tiny", "24")  # also requires that some change without the option


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ("qwen2_moe",),
        ("mixtral",),
        ("gemma3",),
        ("gpt_oss",),
        ("deepseek_v3",),
        *(("tiny", x) for x in ("kv_dtype=int8", "dtype=bfloat16")),
    ],
    ids=" ".join,
)
def test_the_same_holds_for_experts_windows_latents_and_narrow_numbers(arguments: tuple[str, ...]) -> None:
    run(arguments[0], "12", *arguments[1:])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["granitemoehybrid", "qwen3_next"])
def test_the_same_holds_for_layers_with_a_state(family: str) -> None:
    run(family, "8")
    run(family, "8", "together=8")  # sequences whose pieces are computed at the same time, as on an accelerator


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [("tiny", "devices=4"), ("mixtral", "devices=4"), ("granitemoehybrid", "devices=2")], ids=" ".join
)
def test_the_same_holds_on_several_devices(arguments: tuple[str, ...]) -> None:
    run(arguments[0], "8", *arguments[1:])


@pytest.mark.slow
def test_devices_that_add_up_in_a_ring_change_answers() -> None:
    run("tiny", "8", "devices=4", "order=ring")  # requires that some are others


@pytest.mark.skipif(not native.available(), reason="needs native kernels")
def test_native_kernels_are_exact_so_that_the_option_changes_nothing() -> None:
    plain, engine = tiny_engine(), tiny_engine(deterministic=True)
    assert engine.config.chunk_size is None
    assert engine.config.budget_ladder == plain.config.budget_ladder


def test_a_gpu_has_one_step_size_with_room_for_prompts() -> None:
    config = resolved(token_budget=128)
    assert config.budget_ladder == (128,)
    assert config.chunk_size == 64  # 2 blocks of 32 beside 63 other sequences
    assert not resolve(EngineConfig(token_budget=128), tiny_model()[1], machine=GPU).fixed_chunks


@pytest.mark.parametrize(("topology", "budget"), [("h100:1", 256), ("a100:1", 128), ("v6e:1x1", 512)])
def test_the_step_size_is_the_largest_whose_products_take_no_longer_than_the_weights(topology: str, budget: int) -> None:
    model = family_of("LlamaForCausalLM").config_from_hf(LLAMA_3_8B)
    config = resolve_for(EngineConfig(deterministic=True, dtype="bfloat16"), model, parse_topology(topology))
    assert config.budget_ladder == (budget,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token_budget": 64}, "choose at least 95, or a smaller max_num_seqs"),
        ({"token_budget": 128, "budget_ladder": (8,)}, "all steps have one size; omit budget_ladder"),
        ({"remeasure": True}, "pass token_budget"),
        ({"policy": "sla", "promised_prompt_rate": 9.0, "promised_generation_rate": 9.0}, "choose policy='splitfuse'"),
    ],
    ids=str,
)
def test_what_would_make_answers_depend_on_others_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^deterministic=True.*{message}"):
        resolved(**options)


def test_a_step_has_room_for_an_image_that_one_step_must_compute() -> None:
    vision: Any = SimpleNamespace(is_whole=True, most_tokens=250, in_grid=False)
    config = resolved(vision=vision)
    assert min(config.budget_ladder) == 512
    assert resolved(vision=vision, token_budget=319).chunk_size == 256  # 8 blocks of 32 beside 63 sequences
    with pytest.raises(ValueError, match=r"hold the blocks of an image beside .* choose at least 319.*or images=False"):
        resolved(vision=vision, token_budget=318)
    may_be_cut: Any = SimpleNamespace(is_whole=False, most_tokens=250, in_grid=False)
    assert resolved(vision=may_be_cut, token_budget=128).chunk_size == 64


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [("gemma3", "9"), ("qwen3_vl", "9"), ("gemma3", "9", "devices=2")], ids=" ".join)
def test_requests_with_and_without_images_change_no_bit_of_one_another(arguments: tuple[str, ...]) -> None:
    run(*arguments, program="deterministic_images")


def test_models_whose_layers_have_a_state_are_accepted() -> None:
    _, model = load("lfm2", "default")
    assert resolve(EngineConfig(deterministic=True), model, machine=GPU).fixed_chunks
