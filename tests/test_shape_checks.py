from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from tests import shape_checks
from tests.programs import shapes_example


@pytest.fixture(scope="module")
def checked_example():
    """`shapes_example` imported a second time, with its shapes checked."""
    name = shapes_example.__name__
    unchecked = sys.modules.pop(name)
    finders = list(sys.meta_path)
    try:
        shape_checks.install([name])
        yield importlib.import_module(name)
    finally:
        sys.meta_path[:] = finders
        sys.modules[name] = unchecked


def test_right_shapes_pass(checked_example):
    assert checked_example.weighted(jnp.ones((3, 4)), jnp.ones(4)).shape == (3, 4)


def test_two_sizes_for_one_axis_letter_raise(checked_example):
    with pytest.raises(TypeCheckError, match="weight"):
        checked_example.weighted(jnp.ones((3, 4)), jnp.ones(1))


def test_a_wrong_dtype_raises(checked_example):
    with pytest.raises(TypeCheckError, match="weight"):
        checked_example.weighted(jnp.ones((3, 4)), jnp.ones(4, jnp.int32))


def test_a_wrong_result_raises(checked_example):
    with pytest.raises(TypeCheckError, match="return"):
        checked_example.first_rows(jnp.ones((3, 4)))


def test_shapes_are_checked_under_jit_and_custom_jvp(checked_example):
    value, tangent = jax.jvp(checked_example.doubled, (jnp.ones(3),), (jnp.ones(3),))
    assert value.tolist() == tangent.tolist() == [2, 2, 2]
    with pytest.raises(TypeCheckError, match="x"):
        jax.jit(checked_example.doubled)(jnp.ones((3, 1)))


def test_a_function_without_shapes_is_not_changed(checked_example):
    assert not hasattr(checked_example.plain, "__wrapped__")
    assert hasattr(checked_example.weighted, "__wrapped__")


def test_checks_can_be_switched_off(checked_example):
    with shape_checks.unchecked():
        assert checked_example.first_rows(jnp.ones((3, 4))).shape == (1, 4)
    with pytest.raises(TypeCheckError):
        checked_example.first_rows(jnp.ones((3, 4)))


def test_a_name_that_does_not_exist_at_run_time_raises(checked_example):
    with pytest.raises(NameError, match="Mapping"):
        checked_example.with_a_missing_name(jnp.ones(3), {})


def test_a_module_that_is_loaded_already_cannot_be_checked():
    with pytest.raises(ValueError, match="before"):
        shape_checks.install([shapes_example.__name__])


def test_production_does_not_load_jaxtyping():
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.programs.loaded_modules",
            "pallas_kernels.ragged_attention",
            "fastgen_jax",
            "fastgen_jax.engine",
        ],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = result.stdout.split()
    assert "pallas_kernels.ragged_attention" in loaded
    assert not {"jaxtyping", "beartype"} & set(loaded)
