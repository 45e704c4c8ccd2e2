"""The declarations of weights, and that everything else follows them."""

from __future__ import annotations

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastgen_jax.checkpoint import open_checkpoint
from fastgen_jax.engine.config import EngineConfig
from fastgen_jax.engine.resolve import resolve
from fastgen_jax.engine.weights import host_leaf, prepare_leaf
from fastgen_jax.models import families
from fastgen_jax.models.mla import Expansions
from fastgen_jax.models.params import all_specs, head_spec, param_specs
from fastgen_jax.models.sharding import partition_leaf
from fastgen_jax.models.weight_spec import Kind, WeightSpec, bias, experts, matrix
from pallas_kernels import native
from pallas_kernels.grouped_matmul import PackedGroups
from pallas_kernels.matmul import BlockWeight, Float8Weight, Int8Weight, PackedWeight
from tests.models.parity import folder, variants

DEEPSEEK_V2 = {  # the sizes of the release
    "architectures": ["DeepseekV2ForCausalLM"],
    "vocab_size": 102_400,
    "num_hidden_layers": 60,
    "hidden_size": 5120,
    "num_attention_heads": 128,
    "intermediate_size": 12_288,
    "moe_intermediate_size": 1536,
    "n_routed_experts": 160,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "topk_method": "group_limited_greedy",
    "n_group": 8,
    "topk_group": 3,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}


@pytest.mark.parametrize(("family", "variant"), variants())
def test_each_declaration_is_complete_and_agrees_with_itself(family, variant):
    specs = all_specs(open_checkpoint(folder(family, variant)).config)
    for path, spec in specs.items():
        assert path == spec.path == (f"layers.{spec.name}" if spec.per_layer else spec.name)
        assert len(spec.shape) == len(spec.axes), path
        assert sum(spec.parts) in (0, spec.shape[-1]), path
        assert (spec.initial is None) == (spec.is_product or spec.kind in (Kind.TABLE, Kind.CONV)), (
            "random weights have a fan-in"
        )
        assert spec.is_product or spec.never_quantized is None, "only matrices can be quantized at all"
        assert (spec.kind is Kind.BIAS) == (spec.bias_of is not None)
        assert spec.owner_path in specs or spec.owner_path == "lm_head", "a bias belongs to a weight of the model"
        assert not spec.gated or len(spec.parts) == 2, "gate and up"


@pytest.mark.parametrize(
    ("of", "shape", "axes"),
    [
        (matrix("o", (6, 4), ("HD", "E")), (4,), ("E",)),
        (experts("expert_down", (3, 6, 4), ("X", "F", "E")), (3, 4), ("X", "E")),
    ],
)
def test_a_bias_has_the_outputs_of_its_weight(of, shape, axes):
    made = bias(of)
    assert (made.shape, made.axes, made.bias_of) == (shape, axes, of.name)


def deepseek_v2():
    return families.deepseek_v2.config_from_hf(DEEPSEEK_V2)


def test_matrices_are_quantized_except_where_the_declaration_gives_a_reason():
    kept = {path: spec.never_quantized for path, spec in all_specs(deepseek_v2()).items() if spec.is_product}
    assert {path for path, reason in kept.items() if reason} == {"layers.router", "layers.kv_b"}
    assert "absorbed" in str(kept["layers.kv_b"])
    shared = all_specs(open_checkpoint(folder("qwen2_moe", "default")).config)
    assert shared["layers.shared_gate"].never_quantized == shared["layers.router"].never_quantized


def test_the_unquantized_expansions_of_latent_attention_are_the_stated_share_of_deepseek_v2():
    specs = param_specs(deepseek_v2())
    share = 60 * math.prod(specs["layers"]["kv_b"].shape) / 235.7e9  # of the parameters of the release
    assert f"{100 * share:.1f} % in DeepSeek V2" in specs["layers"]["kv_b"].never_quantized


def test_latent_attentions_expansions_stay_in_floating_point_in_every_form_of_an_int8_engine():
    model = open_checkpoint(folder("deepseek_v2", "lite")).config
    spec = all_specs(model)["layers.kv_b"]
    array = np.asarray(jax.random.normal(jax.random.key(0), spec.shape))
    assert isinstance(host_leaf(spec, array, dtype="bfloat16", quantize="int8"), np.ndarray)
    for stack_layers in (False, True):
        config = resolve(EngineConfig(quantize="int8", num_blocks=8, stack_layers=stack_layers), model)
        leaf = prepare_leaf(spec, array, model, config)
        assert isinstance(leaf, Expansions) == native.available()
        assert all(jnp.issubdtype(part.dtype, jnp.floating) for part in jax.tree.leaves(leaf) if part.size)


@pytest.mark.skipif(not native.available(), reason="no C++ compiler")
def test_packing_follows_the_kind_and_not_the_name():
    model = open_checkpoint(folder("qwen2_moe", "default")).config
    config = resolve(EngineConfig(num_blocks=8, dtype="bfloat16", quantize="int8"), model)

    def prepared(spec: WeightSpec):
        return prepare_leaf(spec, np.ones(spec.shape, np.float32), model, config)

    fused = prepared(matrix("x", (8, 16), ("E", "F"), parts=(8, 8), gated=True))
    assert isinstance(fused, PackedWeight)
    assert fused.gated
    assert fused.panels.dtype == jnp.int8
    plain = prepared(matrix("gate_up", (8, 16), ("E", "F"), never_quantized="a reason"))
    assert isinstance(plain, PackedWeight)
    assert not plain.gated
    assert plain.panels.dtype == jnp.bfloat16
    assert isinstance(prepared(experts("y", (2, 8, 16), ("X", "E", "F"))), PackedGroups)


def test_a_number_format_follows_the_rule_of_the_declaration():
    model = open_checkpoint(folder("deepseek_v3", "default")).config
    config = resolve(EngineConfig(num_blocks=8, dtype="bfloat16", stack_layers=True), model)
    specs = all_specs(model)
    for path, dtype, in_snapshots in (
        ("embed", "bfloat16", "bfloat16"),
        ("layers.attn_norm", config.activation_dtype, "bfloat16"),
        ("layers.choice_bias", "float32", "float32"),
    ):
        array = np.zeros(specs[path].shape, np.float32)
        assert prepare_leaf(specs[path], array, model, config).dtype == jnp.dtype(dtype)
        stored = host_leaf(specs[path], array, dtype="bfloat16", quantize=None)
        assert stored.dtype == jnp.dtype(in_snapshots)


def test_a_sharding_follows_the_logical_axes_and_scales_follow_the_columns():
    spec = matrix("anything", (8, 16), ("HD", "E"))
    assert tuple(partition_leaf(spec, jnp.zeros((3, 8, 16)))) == (None, "tensor", None)
    int8 = Int8Weight(values=jnp.zeros((8, 16), jnp.int8), scales=jnp.ones(16))
    of_rows = partition_leaf(spec, int8)
    assert (tuple(of_rows.values), tuple(of_rows.scales)) == (("tensor", None), (None,))
    of_columns = partition_leaf(matrix("anything", (8, 16), ("E", "HD")), int8)
    assert (tuple(of_columns.values), tuple(of_columns.scales)) == ((None, "tensor"), ("tensor",))
    float8 = Float8Weight(values=jnp.zeros((16, 8), jnp.float8_e4m3fn), scales=jnp.ones(16))  # [out, in]
    of_rows = partition_leaf(spec, float8)
    assert (tuple(of_rows.values), tuple(of_rows.scales)) == ((None, "tensor"), (None,))


@pytest.mark.parametrize("is_per_output", [True, False])
def test_8_bit_floats_of_a_checkpoint_stay_as_they_are_with_one_scale_for_each_output(is_per_output: bool) -> None:
    rng = np.random.default_rng(0)
    spec = matrix("anything", (64, 48), ("E", "F"))
    scales = rng.uniform(0.5, 2.0, (48, 1 if is_per_output else 2)).astype(np.float32)
    values = rng.normal(size=(48, 64)).astype(jnp.float8_e4m3fn)
    blocks = BlockWeight(values=values, scales=np.repeat(scales, 2 // scales.shape[1], axis=1))
    stored = host_leaf(spec, blocks, dtype="bfloat16", quantize="fp8")
    assert isinstance(stored, Float8Weight)
    if is_per_output:
        np.testing.assert_array_equal(np.asarray(stored.values, np.float32), values.astype(np.float32))
    as_matrix = np.asarray(stored.values, np.float32).T * np.asarray(stored.scales)
    largest = np.abs(blocks.dequantize()).max(axis=0)
    assert (np.abs(as_matrix - blocks.dequantize()) <= (0 if is_per_output else 2.0**-4) * largest).all()
    plain = host_leaf(replace(spec, never_quantized="a test"), blocks, dtype="float32", quantize="fp8")
    np.testing.assert_array_equal(plain, blocks.dequantize())


def test_the_spec_of_a_tied_head_is_that_of_a_head_stored_apart():
    tied, apart = (open_checkpoint(folder("llama", name)).config for name in ("multi_head_tied", "default"))
    assert "lm_head" not in all_specs(tied)
    assert all_specs(apart)["lm_head"] == head_spec(apart)
    assert head_spec(tied).shape == all_specs(tied)["embed"].shape[::-1]
