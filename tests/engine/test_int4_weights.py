"""Weights of 4 bits for accelerators: made from floating point, or the numbers of a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from fastgen_jax.engine.footprint import weight_bytes
from fastgen_jax.engine.kept_forms import Int4Form
from fastgen_jax.engine.weights import prepare_leaf
from fastgen_jax.models.division import divided_shape
from fastgen_jax.models.moe_config import MoEConfig
from fastgen_jax.models.params import all_specs
from fastgen_jax.models.weight_spec import Kind, WeightSpec
from pallas_kernels.grouped_matmul import BlockGroups
from pallas_kernels.matmul import Int4Weight, Int8Weight, quantize_int4
from tests.pallas_kernels.matmul.random_blocks import random_blocks
from tests.tiny import tiny_model, weights_config

CONFIG: Any = weights_config("int4")
MODEL = replace(tiny_model()[1], embed_dim=256, mlp_dim=96)  # 96 inputs of a down matrix are no whole pairs of blocks
Q4_1 = ("uint4", True, "float16")


def spec_of(name: str) -> WeightSpec:
    return replace(all_specs(MODEL)[name], shape=(256, 64))


def prepared(array: Any, spec: WeightSpec, form: Int4Form | None = None) -> Any:
    config = SimpleNamespace(**vars(CONFIG) | {"kept_forms": {} if form is None else {spec.path: form}})
    return prepare_leaf(spec, array, MODEL, config)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("size", [32, 128])
def test_the_numbers_of_a_checkpoint_stay(size: int) -> None:
    stored = random_blocks(256, 64, size, *Q4_1)
    leaf = prepared(stored, spec_of("layers.qkv"), Int4Form(size, True, "float32"))
    assert isinstance(leaf, Int4Weight)
    assert leaf.size == size
    np.testing.assert_allclose(leaf.dequantize(), stored.dequantize(), rtol=0, atol=1e-6)


def test_those_of_experts_stay_too() -> None:
    experts = [random_blocks(256, 64, 32, *Q4_1, seed=seed) for seed in range(3)]
    spec = replace(spec_of("layers.qkv"), kind=Kind.EXPERTS, shape=(3, 256, 64), axes=("X", "E", "F"))
    form = Int4Form(32, True, "float32")
    leaf = prepared(BlockGroups(shape=(3, 256, 64), read=experts.__getitem__), spec, form)
    assert isinstance(leaf, Int4Weight)
    np.testing.assert_allclose(leaf.dequantize(), np.stack([each.dequantize() for each in experts]), rtol=0, atol=1e-6)


def test_experts_of_a_file_are_as_wide_as_a_tpu_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    moe = MoEConfig(num_experts=3, experts_per_token=2, expert_dim=96, layers=(0, 1))
    model = replace(MODEL, moe=moe)
    spec = all_specs(model)["layers.expert_gate_up"]
    experts = [random_blocks(256, 192, 32, *Q4_1, seed=seed) for seed in range(3)]
    config: Any = SimpleNamespace(**vars(CONFIG) | {"kept_forms": {spec.path: Int4Form(32, True, "float32")}})
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    leaf: Any = prepare_leaf(spec, BlockGroups(shape=(3, 256, 192), read=experts.__getitem__), model, config)
    assert leaf.shape == divided_shape(spec, model, 1, "tpu") == (3, 256, 256)
    found = np.asarray(leaf.dequantize())
    exact = np.stack([each.dequantize() for each in experts])
    np.testing.assert_allclose(found[..., :96], exact[..., :96], rtol=0, atol=1e-6)
    np.testing.assert_allclose(found[..., 128:224], exact[..., 96:], rtol=0, atol=1e-6)
    assert not found[..., 96:128].any()
    assert not found[..., 224:].any()


def test_larger_groups_are_divided_for_a_kernel_that_does_not_take_them() -> None:
    stored = random_blocks(256, 64, 256, *Q4_1)
    leaf = prepared(stored, spec_of("layers.qkv"), Int4Form(64, True, "float32"))
    assert leaf.size == 64
    np.testing.assert_allclose(leaf.dequantize(), stored.dequantize(), rtol=0, atol=1e-6)


def test_numbers_that_are_not_those_that_the_headers_declare_are_refused() -> None:
    for declared in (Int4Form(32, False, "float16"), Int4Form(48, True, "float32")):
        with pytest.raises(ValueError, match=r"headers declare .* load it with quantize='none'"):
            prepared(random_blocks(256, 64, 32, *Q4_1), spec_of("layers.qkv"), declared)


@pytest.mark.parametrize(
    "form", [("uint4", True, "float16"), ("int8", False, "float16"), ("nf4", False, "float32")], ids=str
)
def test_other_blocks_are_quantized_again(form: tuple[str, bool, str]) -> None:
    stored = random_blocks(256, 64, 16, *form)
    leaf = prepared(stored, spec_of("layers.qkv"))
    np.testing.assert_array_equal(leaf.dequantize(), quantize_int4(stored.dequantize()).dequantize())


def test_the_head_and_what_whole_blocks_do_not_fill_have_8_bits() -> None:
    for stored in (random_blocks(256, 64, 32, *Q4_1), np.ones((256, 64), np.float32)):
        assert isinstance(prepared(stored, spec_of("lm_head")), Int8Weight)
    down = all_specs(MODEL)["layers.down"]
    assert isinstance(prepared(np.ones(down.shape, np.float32), down), Int8Weight)


def test_weights_take_the_memory_that_is_counted_for_them() -> None:
    specs = all_specs(MODEL)

    def held(spec: WeightSpec) -> int:
        leaf = prepared(np.ones(spec.shape, np.float32), spec)
        return (MODEL.num_layers if spec.per_layer else 1) * sum(part.nbytes for part in jax.tree.leaves(leaf))

    assert weight_bytes(MODEL, 1, 2, quantize="int4") == sum(map(held, specs.values()))
    assert weight_bytes(MODEL, 1, 2, quantize="int4", platform="tpu") > weight_bytes(MODEL, 1, 2, quantize="int4")
