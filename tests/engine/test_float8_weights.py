"""FP8 checkpoints stay what they are on GPUs that multiply 8-bit floats."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from fastgen_jax.engine.weights import prepare_leaf
from fastgen_jax.models.weight_spec import WeightSpec
from pallas_kernels.grouped_matmul import BlockGroups
from pallas_kernels.matmul import BlockWeight, Float8Weight
from tests.pallas_kernels.matmul.random_blocks import random_blocks
from tests.tiny import tiny_model, weights_config

CONFIG: Any = weights_config("fp8")


def blocks(size: int) -> BlockWeight:
    return random_blocks(256, 64, size, "float8_e4m3fn", False, "float32")


def prepared(array: BlockWeight | BlockGroups, spec: WeightSpec) -> Float8Weight:
    leaf = prepare_leaf(spec, array, tiny_model()[1], CONFIG)
    assert isinstance(leaf, Float8Weight)
    return leaf


def spec_of(name: str) -> WeightSpec:
    from fastgen_jax.models.params import all_specs

    return replace(all_specs(tiny_model()[1])[name], shape=(256, 64))


def bits(values: Any) -> np.ndarray:
    return np.asarray(values).view(np.uint8)


def test_scales_of_128_inputs_stay_so_that_no_number_is_rounded_again() -> None:
    stored = blocks(128)
    leaf = prepared(stored, spec_of("layers.qkv"))
    np.testing.assert_array_equal(bits(leaf.values), bits(stored.values))
    np.testing.assert_array_equal(leaf.scales, stored.scales.T)
    assert leaf.in_blocks


def test_one_scale_for_each_output_stays() -> None:
    stored = blocks(256)
    leaf = prepared(stored, spec_of("layers.qkv"))
    np.testing.assert_array_equal(bits(leaf.values), bits(stored.values))
    np.testing.assert_array_equal(leaf.scales, stored.scales[:, 0])


def test_other_blocks_are_rounded_to_one_scale_for_each_output() -> None:
    stored = blocks(32)
    leaf = prepared(stored, spec_of("layers.qkv"))
    assert not leaf.in_blocks
    found = np.asarray(leaf.values, np.float32).T * np.asarray(leaf.scales)
    exact = stored.dequantize()
    assert np.abs(found - exact).max() <= 2.0**-4 * np.abs(exact).max()
