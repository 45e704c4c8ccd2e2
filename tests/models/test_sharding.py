"""A step divided over several devices computes the same logits as on one device."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.moe_config import MoEConfig
from fastgen_jax.models.sharding import check_divisible

TINY = ModelConfig(
    family="llama",
    vocab_size=64,
    num_layers=2,
    embed_dim=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=48,
    max_context_len=64,
)
EXPERTS = dataclasses.replace(
    TINY,
    moe=MoEConfig(
        num_experts=4,
        experts_per_token=2,
        expert_dim=24,
        layers=(0, 1),
        shared_dim=16,
        shared_gate=True,
        expert_bias=True,
        swiglu_limit=3.0,
    ),
)


@pytest.mark.parametrize("model", [pytest.param("dense", marks=pytest.mark.slow), "experts"])
def test_a_step_divided_over_two_devices_gives_the_same_logits(model: str) -> None:
    # In another process: the number of devices is fixed when JAX starts.
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.models.programs.divided_step", model]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.strip().endswith("equal"), done.stderr


def test_a_model_that_cannot_be_divided_is_refused_with_the_possible_numbers() -> None:
    with pytest.raises(ValueError, match=r"num_kv_heads=2 cannot be divided over 4 devices; choose .* among 1, 2"):
        check_divisible(TINY, 4)
