"""An engine on several devices generates the tokens of an engine on one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from fastgen_jax import EngineConfig
from fastgen_jax.engine.resolve import resolve
from tests.tiny import tiny_model


def run(program: str, *arguments: str, **variables: str) -> None:
    """Runs a program of `divided_engine` in a separate process: the number of devices is fixed when JAX starts."""
    devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    environment = os.environ | devices | variables
    command = [sys.executable, "-m", "tests.engine.programs.divided_engine", program, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.strip().endswith("equal"), done.stderr


def test_tokens_do_not_depend_on_the_number_of_devices() -> None:
    # Native kernels may round activations that are multiplied by int8, plain XLA does not.
    run("in_8_bits", PALLAS_KERNELS_NATIVE="0")


@pytest.mark.slow
@pytest.mark.parametrize(
    "program",
    [
        "in_4_bits",
        "in_8_bit_floats_of_a_file",
        "tied_embeddings",
        "experts",
        "two_sizes_of_heads",
        "states",
        "replaced",
        "adapters",
        "images",
    ],
)
def test_tokens_of_other_models_do_not_depend_on_the_number_of_devices(program: str) -> None:
    run(program)


@pytest.mark.slow
@pytest.mark.parametrize("program", ["in_8_bits", "in_4_bits", "rounded_activations", "experts", "adapters"])
def test_tokens_are_the_same_if_devices_add_up_in_order(program: str) -> None:
    run(program, "deterministic", PALLAS_KERNELS_NATIVE="0")


@pytest.mark.slow
def test_tokens_do_not_depend_on_a_number_of_devices_that_divides_nothing() -> None:
    run("uneven", PALLAS_KERNELS_NATIVE="0")  # as above


@pytest.mark.slow
def test_each_device_rounds_its_part_of_the_activations() -> None:
    run("rounded_activations", PALLAS_KERNELS_NATIVE="0")
    run("in_halves", PALLAS_KERNELS_NATIVE="0")


def test_too_many_devices_are_refused_with_the_remedy() -> None:
    _, model = tiny_model()
    with pytest.raises(ValueError, match=r"tensor_parallel=2 but this process has 1 cpu device.*device_count=2"):
        resolve(EngineConfig(tensor_parallel=2), model)


def test_unstacked_layers_cannot_be_divided() -> None:
    _, model = tiny_model()
    with pytest.raises(ValueError, match="tensor_parallel=1 with stack_layers=False is not supported"):
        resolve(EngineConfig(tensor_parallel=1, stack_layers=False), model)
