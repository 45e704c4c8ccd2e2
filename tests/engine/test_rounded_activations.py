"""Engines that round activations to 8 bits, too: which weights say so, and what the engine then computes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastgen_jax import Engine, EngineConfig, Research
from fastgen_jax.devices import DEVICES, FLOAT8_KINDS, INT8_KINDS
from fastgen_jax.engine import machine
from fastgen_jax.engine.footprint import quantization_of
from fastgen_jax.engine.programs import has_int8
from fastgen_jax.engine.resolve import resolve
from fastgen_jax.engine.weights import prepare_leaf, prepare_params
from fastgen_jax.models.division import divided_shape
from fastgen_jax.models.moe_config import MoEConfig
from fastgen_jax.models.params import all_specs
from fastgen_jax.models.weight_spec import Kind, WeightSpec
from pallas_kernels import gpu_target, native, tpu_target
from pallas_kernels.grouped_matmul import BlockGroups, grouped_matmul
from pallas_kernels.grouped_matmul.reference import grouped_matmul_reference
from pallas_kernels.matmul import Float8Weight, Int8Weight, halves, quantize_int8
from pallas_kernels.matmul.narrow import int8_rows
from tests.pallas_kernels.matmul.random_blocks import random_blocks
from tests.tiny import tiny_model, weights_config

SETTINGS: dict[str, Any] = {"token_budget": 16, "budget_ladder": (), "max_num_seqs": 4, "block_size": 4, "num_blocks": 64}


@pytest.fixture
def multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that passes for a device that multiplies int8 by int8: XLA computes the same there."""
    monkeypatch.setattr(machine, "multiplies_int8", lambda device: True)
    monkeypatch.setattr(native, "available", lambda: False)  # matrices are plain arrays


def experts_of(spec: WeightSpec) -> WeightSpec:
    return replace(spec, kind=Kind.EXPERTS, shape=(3, 256, 64), axes=("X", "E", "F"))


def test_the_two_tables_of_devices_agree() -> None:
    for kind, device in tpu_target.DEVICES.items():
        assert (kind in INT8_KINDS, kind in FLOAT8_KINDS) == ("int8" in device.multiplies, "fp8" in device.multiplies)
        assert {tpu_target.kind_of(name) for name in DEVICES[kind].reported_as} == {kind}


def test_only_matrices_of_layers_round_activations(multiplies: None) -> None:
    params, model = tiny_model("multi_head_tied", stack_layers=True)
    config = resolve(EngineConfig(**SETTINGS, quantize="w8a8", stack_layers=True), model)
    prepared = prepare_params(params, model, config)
    layers: Any = prepared["layers"]
    assert {name for name, leaf in layers.items() if isinstance(leaf, Int8Weight)} == {"qkv", "o", "gate_up", "down"}
    assert all(leaf.rounds_rows for leaf in layers.values() if isinstance(leaf, Int8Weight))
    head: Any = prepared["lm_head"]
    assert isinstance(head, Int8Weight)
    assert not head.rounds_rows
    assert not isinstance(prepared["embed"], Int8Weight)
    int8 = prepare_params(params, model, replace(config, quantize="int8"))
    again = prepare_params(int8, model, config)  # those of a snapshot in int8
    assert jax.tree.structure(again) == jax.tree.structure(prepared)
    assert jax.tree.structure(again) != jax.tree.structure(int8)
    jax.tree.map(np.testing.assert_array_equal, again, prepared)


def test_experts_have_the_formats_of_matrices() -> None:
    matrix = all_specs(tiny_model()[1])["layers.qkv"]
    experts = experts_of(matrix)
    forms = {
        (quantize, platform): tuple(
            quantization_of(spec, quantize, packed=False, platform=platform)
            for spec in (matrix, experts, replace(matrix, per_layer=False))
        )
        for quantize, platform in (("fp8", "tpu"), ("fp8", "gpu"), ("w8a8", "tpu"), ("int8", "tpu"))
    }
    assert forms == {
        ("fp8", "tpu"): ("fp8", "fp8", "fp8"),
        ("fp8", "gpu"): ("fp8", "fp8", "fp8"),
        ("w8a8", "tpu"): ("w8a8", "w8a8", "int8"),
        ("int8", "tpu"): ("int8", "int8", "int8"),
    }


def on_a_tpu(monkeypatch: pytest.MonkeyPatch, quantize: str) -> Any:
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    return weights_config(quantize)


def test_an_fp8_checkpoint_on_a_tpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """One scale for an output stays; blocks of 128 inputs become one, also of experts."""
    model, config = tiny_model()[1], on_a_tpu(monkeypatch, "fp8")
    spec = all_specs(model)["layers.qkv"]
    monkeypatch.setattr("fastgen_jax.engine.weights.divided_shape", lambda spec, *_: spec.shape)
    for size in (128, 256):
        groups = [random_blocks(256, 64, size, "float8_e4m3fn", False, "float32", seed=seed) for seed in range(3)]
        exact = np.stack([each.dequantize() for each in groups])
        matrix: Any = prepare_leaf(replace(spec, shape=(256, 64)), groups[0], model, config)
        experts: Any = prepare_leaf(
            experts_of(spec), BlockGroups(shape=(3, 256, 64), read=groups.__getitem__), model, config
        )
        for leaf, wanted in ((matrix, exact[0]), (experts, exact)):
            assert isinstance(leaf, Float8Weight)
            assert not leaf.in_blocks
            found = np.asarray(leaf.values, np.float32).swapaxes(-1, -2) * np.asarray(leaf.scales)[..., None, :]
            if size == 256:
                np.testing.assert_array_equal(found, wanted)
            else:
                assert np.abs(found - wanted).max() <= 2.0**-4 * np.abs(wanted).max()


@pytest.mark.parametrize("quantize", ["fp8", "w8a8"])
def test_experts_are_filled_up_to_whole_tiles(quantize: str, monkeypatch: pytest.MonkeyPatch) -> None:
    moe = MoEConfig(num_experts=2, experts_per_token=1, expert_dim=24, layers=(0,))
    model, config = replace(tiny_model()[1], moe=moe), on_a_tpu(monkeypatch, quantize)
    for name in ("expert_gate_up", "expert_down"):
        spec = all_specs(model)[f"layers.{name}"]
        whole = np.random.default_rng(0).standard_normal(spec.shape, np.float32)
        leaf: Any = prepare_leaf(spec, whole, model, config)
        assert leaf.shape == divided_shape(spec, model, 1, "tpu") != whole.shape
        if isinstance(leaf, Float8Weight):
            values = np.asarray(leaf.values, np.float32).swapaxes(-1, -2)
        else:
            assert leaf.rounds_rows
            values = np.asarray(leaf.values, np.float32)
        found = values * np.asarray(leaf.scales)[:, None, :]
        if name == "expert_gate_up":  # each half is filled up by itself
            found = np.concatenate([half[..., : whole.shape[-1] // 2] for half in np.split(found, 2, axis=-1)], axis=-1)
        found = found[:, : whole.shape[1], : whole.shape[2]]
        step = np.abs(whole).max(axis=1, keepdims=True) * (1 / 254 if quantize == "w8a8" else 2.0**-4)
        assert (np.abs(found - whole) <= step * 1.001).all()


def test_rows_of_experts_are_rounded() -> None:
    """Where the kernel does not run, the products are those of the numbers that the 8 bits stand for."""
    rng = np.random.default_rng(0)
    x, w = jnp.asarray(rng.standard_normal((12, 64), np.float32)), rng.standard_normal((3, 64, 32), np.float32)
    values, scales = map(jnp.asarray, quantize_int8(w))
    stored, sizes = Int8Weight(values=values, scales=scales, rounds_rows=True), jnp.asarray([5, 0, 4], jnp.int32)
    rows, factors = int8_rows(x)
    rounded = rows.astype(jnp.float32) * factors
    wanted = grouped_matmul_reference(rounded, stored, sizes, jnp.int32(0))
    for implementation in (None, "reference", "tiles", "ragged_dot"):
        found = grouped_matmul(x, stored, sizes, implementation=implementation)
        np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert 1e-3 < np.abs(np.asarray(wanted) - grouped_matmul_reference(x, stored, sizes, jnp.int32(0))).max() < 1


@pytest.fixture
def on_a_t4(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU whose int8 matrices are stored, and multiplied, as on a GPU of compute capability 7.5."""
    monkeypatch.setattr(gpu_target, "compute_capability", lambda: halves.CAPABILITY)
    monkeypatch.setattr(native, "available", lambda: False)


@pytest.mark.parametrize("stack_layers", [True, False])
def test_int8_matrices_of_a_t4_have_their_inputs_last(stack_layers: bool, on_a_t4: None) -> None:
    params, model = tiny_model("multi_head_tied", stack_layers=stack_layers)
    config = resolve(EngineConfig(**SETTINGS, quantize="int8", stack_layers=stack_layers), model)
    prepared = prepare_params(params, model, config)
    layers: Any = prepared["layers"] if stack_layers else prepared["layers"][0]
    plain: Any = params["layers"] if stack_layers else params["layers"][0]
    assert {name for name, leaf in layers.items() if isinstance(leaf, Int8Weight)} == {"qkv", "o", "gate_up", "down"}
    for name, leaf in layers.items():
        if isinstance(leaf, Int8Weight):
            assert leaf.inputs_last
            assert leaf.shape == plain[name].shape
            values, scales = quantize_int8(np.asarray(plain[name]))
            np.testing.assert_array_equal(leaf.inputs_first, values)
            np.testing.assert_array_equal(leaf.scales, scales)
    head: Any = prepared["lm_head"]
    assert head.inputs_last
    assert not has_int8(prepared), "the options of products apply"
    as_saved = prepare_params(params, model, replace(config, quantize="int8"))
    again = prepare_params(_with_inputs_first(as_saved), model, config)  # those of a snapshot in int8
    assert jax.tree.structure(again) == jax.tree.structure(prepared)
    jax.tree.map(np.testing.assert_array_equal, again, prepared)


def _with_inputs_first(params: Any) -> Any:
    def in_order(leaf: Any) -> Any:
        return replace(leaf, values=leaf.inputs_first, inputs_last=False) if isinstance(leaf, Int8Weight) else leaf

    return jax.tree.map(in_order, params, is_leaf=lambda leaf: isinstance(leaf, Int8Weight))


def test_experts_of_a_t4_are_as_elsewhere(on_a_t4: None) -> None:
    moe = MoEConfig(num_experts=2, experts_per_token=1, expert_dim=24, layers=(0,))
    model = replace(tiny_model()[1], moe=moe)
    config: Any = resolve(EngineConfig(**SETTINGS, quantize="int8", stack_layers=True), model)
    spec = all_specs(model)["layers.expert_down"]
    leaf: Any = prepare_leaf(spec, np.random.default_rng(0).standard_normal(spec.shape, np.float32), model, config)
    assert isinstance(leaf, Int8Weight)
    assert not leaf.inputs_last
    assert has_int8({"experts": leaf})


@pytest.mark.slow
def test_an_engine_answers_as_on_a_t4(on_a_t4: None, monkeypatch: pytest.MonkeyPatch) -> None:
    params, model = tiny_model(stack_layers=True)
    logits = []
    for capability in (halves.CAPABILITY, "8.0"):
        monkeypatch.setattr(gpu_target, "compute_capability", lambda known=capability: known)
        engine = Engine(params, model, EngineConfig(**SETTINGS, quantize="int8", stack_layers=True))
        logits.append(Research(engine).put(["a", "b"], [[5, 6, 7, 8], [9, 10, 11]]))
    assert 0 < np.abs(logits[0] - logits[1]).max() < 1e-3 * np.abs(logits[1]).max()


@pytest.mark.slow
def test_an_engine_answers_with_rounded_activations(multiplies: None) -> None:
    params, model = tiny_model(stack_layers=True)
    tokens = [[5, 6, 7, 8], [9, 10, 11]]
    logits = {}
    for quantize in ("int8", "w8a8"):
        engine = Engine(params, model, EngineConfig(**SETTINGS, quantize=quantize, stack_layers=True))
        research = Research(engine)
        logits[quantize] = research.put(["a", "b"], tokens)
        alone = research.put(["c"], tokens[1:])
        np.testing.assert_allclose(alone[0], logits[quantize][1], rtol=1e-4, atol=1e-4)
    error = np.abs(logits["w8a8"] - logits["int8"]).max() / np.abs(logits["int8"]).max()
    assert 1e-4 < error < 0.1
