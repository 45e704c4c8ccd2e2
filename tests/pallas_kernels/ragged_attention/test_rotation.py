"""A rotation inside of attention is one in front of it; and the kernel for GPUs that rotates and writes."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.jax_versions import WRITE_KERNEL, AbstractGpu, too_old
from pallas_kernels.ragged_attention import QuantizedCache, ragged_attention, rotates_while_writing, with_spans
from pallas_kernels.ragged_attention.cpu import call as cpu
from pallas_kernels.rotary import rotate
from tests.pallas_kernels.ragged_attention.ragged_batches import make_batch

TOO_OLD = too_old(WRITE_KERNEL)
NUM_CASES = 11  # in `write_interpreter.ALL`


def angles(num_tokens: int, pairs: int) -> tuple[jax.Array, jax.Array]:
    angle = np.random.default_rng(2).normal(size=(num_tokens, pairs)).astype(np.float32)
    return jnp.cos(angle), jnp.sin(angle)


def rotated_first(arguments: dict[str, Any]) -> dict[str, Any]:
    cos, sin = arguments["scoring"].rotation
    turned = {name: rotate(arguments[name], cos, sin) for name in ("q", "k")}
    return arguments | turned | {"scoring": dataclasses.replace(arguments["scoring"], rotation=None)}


@pytest.mark.parametrize(
    "implementation",
    [None, "reference", "xla", pytest.param("cpu", marks=pytest.mark.skipif(not cpu.available(), reason="no C++ compiler"))],
)
def test_a_rotation_inside_of_attention_is_one_in_front_of_it(implementation: str | None) -> None:
    batch = make_batch([(5, 20), (1, 9), (0, 0)], num_kv_heads=2, group=2)
    arguments = batch.arguments(rotation=angles(len(batch.arrays["q"]), 6))
    found = ragged_attention(**arguments, implementation=implementation)
    expected = ragged_attention(**rotated_first(arguments), implementation=implementation)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_spans_attend_with_rotated_queries() -> None:
    batch = make_batch([(6, 20), (1, 9)], num_kv_heads=2, group=2)
    arguments = batch.arguments(rotation=angles(len(batch.arrays["q"]), 8))
    attend = with_spans(ragged_attention, jnp.asarray([[0, 1, 3, 3]], jnp.int32))
    found = attend(*arguments.values())
    np.testing.assert_array_equal(found[0], attend(*rotated_first(arguments).values())[0])


@pytest.mark.parametrize(
    ("rotation", "message"),
    [
        (angles(4, 8), r"rotation has shape \(4, 8\) but must be \[T, P\], T as in q, = \(8, 8\)"),
        ((angles(8, 8)[0], angles(8, 4)[0]), r"rotation has shape \(8, 4\) but must be the shape of the cosines"),
        (angles(8, 9), "rotation has 9 pairs but q has D = 16; pass at most 8 pairs"),
        (tuple(x.astype(jnp.bfloat16) for x in angles(8, 8)), "rotation has dtypes bfloat16 and bfloat16 but both must be"),
    ],
)
def test_a_rotation_that_does_not_fit_is_refused(rotation: Any, message: str) -> None:
    batch = make_batch([(5, 20), (1, 9)])
    with pytest.raises(ValueError, match=message):
        ragged_attention(**batch.arguments(rotation=rotation))


@pytest.mark.skipif(TOO_OLD is not None, reason=f"the GPU kernel {TOO_OLD}")
@pytest.mark.slow
@pytest.mark.parametrize("case", range(NUM_CASES))
def test_queries_and_keys_are_rotated_and_written_in_the_interpreter(case: int) -> None:
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    command = [sys.executable, "-m", "tests.pallas_kernels.ragged_attention.write_interpreter", str(case)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "equal: " in done.stdout


def test_a_hopper_rotates_while_it_writes_but_not_into_8_bits() -> None:
    shape: Any = jax.ShapeDtypeStruct((64, 2, 64, 64), jnp.bfloat16)
    eight = jax.eval_shape(lambda: QuantizedCache.zeros((64, 2, 64, 64), jnp.int8))
    assert not rotates_while_writing(shape, 8)
    for capability, expected in (("7.5", False), ("8.0", TOO_OLD is None), ("9.0", TOO_OLD is None)):
        device = AbstractGpu(device_kind="a GPU", num_cores=1, compute_capability=capability)
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
            assert rotates_while_writing(shape, 8) == expected
            assert not rotates_while_writing(eight, 8)
            assert not rotates_while_writing(shape, 8, implementation="xla")
            assert not rotates_while_writing(shape, 8, packed=True)
