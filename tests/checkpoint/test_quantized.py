"""Quantized safetensors compared with the libraries of their formats; whole models are in tests/models."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from fastgen_jax.checkpoint.quantized import unpack
from fastgen_jax.checkpoint.quantized.compressed_tensors import integer_values
from fastgen_jax.checkpoint.quantized.floats import fp8_values, mxfp4_values
from fastgen_jax.checkpoint.quantized.integers import awq_values, gptq_values
from fastgen_jax.checkpoint.quantized.numbers import unpack_bits
from fastgen_jax.checkpoint.tensor_files import read_safetensors
from tests.checkpoint.quantized_files import GROUPS, INT4, INT8, MATRICES, SETTINGS, settings_of, tensors_of

# What the libraries round themselves: scales to bfloat16, scales times zero points to float16, and the last bit of 1/127.
ROUNDED = {"nvfp4": 2.0**-8, "gemv_fast": 2.0**-11, "bnb_int8": 2.0**-23}


@pytest.mark.parametrize("case", SETTINGS)
def test_a_matrix_has_the_values_that_the_library_of_its_format_gives_it(case):
    want = read_safetensors(MATRICES)[f"{case}/="].map()
    found = unpack(tensors_of(case, "m"), settings_of(case))
    assert found.keys() == {"m.weight"}
    assert found["m.weight"].shape == want.shape
    got = np.float32(found["m.weight"].map().astype(want.dtype))
    np.testing.assert_allclose(got, np.float32(want), rtol=0, atol=ROUNDED.get(case, 0) * float(abs(want).max()))


@pytest.mark.parametrize("bits", range(1, 9))
def test_numbers_of_any_size_are_unpacked_across_words(bits):
    numbers = np.random.default_rng(bits).integers(0, 2**bits, (3, 71))
    whole = [sum(int(number) << (bits * i) for i, number in enumerate(row)) for row in numbers]
    words = -(-71 * bits // 32)
    stored = np.array([[value >> (32 * word) & 0xFFFFFFFF for word in range(words)] for value in whole], np.uint32)
    np.testing.assert_array_equal(unpack_bits(stored.view(np.int32), bits, 71), numbers)


def test_awq_gives_the_values_of_autoawq():
    got = awq_values(INT4["awq_weight"], INT4["awq_zeros"], INT4["scales"])
    np.testing.assert_array_equal(got.values(), INT4["values"].T)
    np.testing.assert_array_equal(got.blocks().dequantize(), INT4["values"])


def test_gptq_gives_the_values_of_autoawq_in_its_layout():
    got = gptq_values(INT4["gptq_weight"], INT4["gptq_zeros"], INT4["scales"], GROUPS, bits=4, offset=1, inputs=64)
    np.testing.assert_array_equal(got.values(), INT4["values"].T)


def test_gptq_without_g_idx_has_consecutive_groups():
    parts = [INT4[name] for name in ("gptq_weight", "gptq_zeros", "scales")]
    got = gptq_values(*parts, None, bits=4, offset=1, inputs=64)
    np.testing.assert_array_equal(got.values(), INT4["values"].T)


@pytest.mark.parametrize("packed_zeros", [True, False])
def test_older_compressed_tensors_pack_whole_numbers_into_words_and_order_inputs(packed_zeros):
    # Ten 3-bit numbers in each word; `weight_g_idx` is the group of each input.
    rng = np.random.default_rng(0)
    numbers, zeros = rng.integers(0, 8, (20, 64)), rng.integers(0, 8, (20, 2))
    scales, group = rng.random((20, 2)).astype(np.float32), rng.permutation(GROUPS)

    def words(rows):
        padded = np.zeros((len(rows), -(-rows.shape[1] // 10) * 10), np.int64)
        padded[:, : rows.shape[1]] = rows
        return (padded.reshape(len(rows), -1, 10) << (3 * np.arange(10))).sum(-1).astype(np.int32)

    stored = np.ascontiguousarray(words(zeros.T).T) if packed_zeros else (zeros - 4).astype(np.int8)
    got = integer_values(words(numbers), scales, stored, group, bits=3, shape=(20, 64)).values()
    want = [[np.float32(numbers[i, j] - zeros[i, group[j]]) * scales[i, group[j]] for j in range(64)] for i in range(20)]
    np.testing.assert_array_equal(got, want)


def test_bitsandbytes_blocks_may_be_longer_than_a_row(tmp_path):
    rng = np.random.default_rng(0)
    codes, largest = rng.integers(0, 16, 3 * 50), rng.random(2).astype(np.float32)  # the second block is incomplete
    table = rng.standard_normal(16).astype(np.float32)
    state = json.dumps({"quant_type": "nf4", "blocksize": 128, "shape": [3, 50], "dtype": "float32"})
    parts = {
        "m.weight": (codes[::2] << 4 | codes[1::2]).astype(np.uint8)[:, None],
        "m.weight.absmax": largest,
        "m.weight.quant_map": table,
        "m.weight.quant_state.bitsandbytes__nf4": np.frombuffer(state.encode(), np.uint8),
    }
    save_file(parts, tmp_path / "a.safetensors")
    got = unpack(read_safetensors(tmp_path / "a.safetensors"), {"quant_method": "bitsandbytes"})["m.weight"].map()
    np.testing.assert_array_equal(got, (table[codes] * np.repeat(largest, 128)[:150]).reshape(3, 50))


def test_each_module_has_the_bits_that_its_rule_says():
    both = tensors_of("gptq4", "model.layers.0.mlp.up_proj") | tensors_of("gptq8", "model.layers.1.mlp.up_proj")
    rules = {"-:.*lm_head": {}, r"+:.*\.1\.mlp": {"bits": 8}, r".*\.0\.": {"bits": 4}}
    settings = {"quant_method": "gptq", "bits": 2, "group_size": 32, "dynamic": rules}
    got = unpack(both, settings)
    want = read_safetensors(MATRICES)
    np.testing.assert_array_equal(got["model.layers.0.mlp.up_proj.weight"].map(), want["gptq4/="].map())
    np.testing.assert_array_equal(got["model.layers.1.mlp.up_proj.weight"].map(), want["gptq8/="].map())
    with pytest.raises(ValueError, match=r"'model.layers.0.mlp.up_proj.scales' has shape \(2, 32\).*require \(4, 32\)"):
        unpack(both, settings | {"dynamic": {}})
    extra = {
        "quant_method": "auto-round",
        "bits": 2,
        "group_size": 32,
        "extra_config": {"model.layers.0.mlp.up_proj": {"bits": 4}, ".*1": {"bits": 8}},
    }
    got = unpack(both, extra)
    assert [got[f"model.layers.{layer}.mlp.up_proj.weight"].dtype for layer in (0, 1)] == ["GPTQ4", "GPTQ8"]


def test_each_module_has_the_settings_of_its_group():
    modules = {
        "model.layers.0.mlp.up_proj": "int4_groups",
        "model.layers.0.mlp.down_proj": "int8_channels",
        "lm_head": "nvfp4",
    }
    tensors = {name: tensor for module, case in modules.items() for name, tensor in tensors_of(case, module).items()}
    groups = {case: dict(SETTINGS[case]["config_groups"]["group_0"]) for case in modules.values()}
    groups["int4_groups"] |= {"targets": [r"re:.*up_proj$"]}
    groups["int8_channels"] |= {"targets": ["Linear"]}
    groups["nvfp4"] |= {"targets": ["lm_head"]}
    settings = {"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": groups}
    got = unpack(tensors, settings)
    for module, case in modules.items():
        np.testing.assert_array_equal(
            got[f"{module}.weight"].map(), unpack(tensors_of(case, "m"), settings_of(case))["m.weight"].map()
        )
    groups["int8_channels"]["targets"] = ["lm_head"]
    with pytest.raises(
        ValueError, match=r"'model.layers.0.mlp.down_proj' .* in no group .*config_groups, whose targets are"
    ):
        unpack(tensors, settings)


def test_mlx_has_settings_of_single_modules():
    tensors = tensors_of("mlx4", "model.a") | tensors_of("mlx6", "model.b")
    got = unpack(tensors, {"quant_method": "mlx", "group_size": 32, "bits": 4, "model.b": {"bits": 6, "group_size": 32}})
    assert [got[f"model.{name}.weight"].dtype for name in "ab"] == ["MLX4", "MLX6"]


@pytest.mark.parametrize(("layer", "name"), [("mlp", "up_proj"), ("block_sparse_moe", "w3")])
def test_mlx_stacks_experts(tmp_path, layer, name):
    first = {end: np.array(tensor.map()) for end, tensor in tensors_of("mlx4", "").items()}
    experts = [first, {end: array[::-1] for end, array in first.items()}]
    stacked = {f"a.{layer}.switch_mlp.up_proj{end}": np.stack([each[end] for each in experts]) for end in first}
    save_file(stacked, tmp_path / "a.safetensors")
    settings = {
        "quant_method": "mlx",
        "group_size": 64,
        "bits": 8,
        f"a.{layer}.switch_mlp.up_proj": {"bits": 4, "group_size": 32},
    }
    got = unpack(read_safetensors(tmp_path / "a.safetensors"), settings)
    want = read_safetensors(MATRICES)["mlx4/="].map()
    assert got.keys() == {f"a.{layer}.experts.{expert}.{name}.weight" for expert in range(2)}
    np.testing.assert_array_equal(got[f"a.{layer}.experts.0.{name}.weight"].map(), want)
    np.testing.assert_array_equal(got[f"a.{layer}.experts.1.{name}.weight"].map(), want[::-1])


@pytest.mark.parametrize(
    ("case", "settings"),
    [
        ("nf4", {"load_in_4bit": True}),
        ("bnb_int8", {"load_in_8bit": True}),
        ("int8_channels", {"config_groups": INT8["config_groups"]}),
        ("gptq4_v2", {"quant_method": "gptq", "method": "gptq", "format": "gptq_v2", "bits": 4, "group_size": 32}),
        ("gemv", {"quant_method": "awq", "checkpoint_format": "gemv", "bits": 4, "group_size": 64, "sym": False}),
        ("modelopt_nvfp4", {"quant_method": "modelopt_fp4", "quant_algo": "nvfp4_awq"}),
        ("int4_groups", SETTINGS["int4_groups"] | {"quant_method": "compressed_tensors"}),
    ],
)
def test_other_names_for_the_same_settings_are_known(case, settings):
    want = unpack(tensors_of(case, "m"), settings_of(case))["m.weight"].map()
    np.testing.assert_array_equal(unpack(tensors_of(case, "m"), settings)["m.weight"].map(), want)


def test_scales_of_activations_and_caches_are_not_used():
    extra = {f"m.{name}": tensor for name, tensor in read_safetensors(MATRICES).items() if name == "nvfp4/="}
    stored = tensors_of("fp8_tensor", "m")
    for name in ("m.input_scale", "attn.k_scale", "attn.v_scale", "m.output_scale", "m.input_global_scale"):
        stored[name] = next(iter(extra.values()))
    assert unpack(stored, settings_of("fp8_tensor")).keys() == {"m.weight"}


def test_mxfp4_is_exact_for_every_byte_and_every_exponent_that_bfloat16_has():
    blocks = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(16, 1, 16), (1, 16, 250, 16))
    scales = np.broadcast_to(np.arange(2, 252, dtype=np.uint8), (1, 16, 250))
    got = mxfp4_values(blocks, scales)
    assert got.shape == (1, 250 * 32, 16)
    number = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    number += [-value for value in number]
    for row, group, pair in ((0, 0, 1), (7, 100, 9), (15, 249, 15), (8, 125, 0)):
        byte = 16 * row + pair
        want = [np.ldexp(number[byte & 15], group + 2 - 127), np.ldexp(number[byte >> 4], group + 2 - 127)]
        np.testing.assert_array_equal(np.float64(got[0, 32 * group + 2 * pair :][:2, row]), want)


def test_fp8_scales_every_block_and_those_at_the_edges():
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((20, 37)).astype(ml_dtypes.float8_e4m3fn)
    scales = rng.random((3, 3)).astype(np.float32)
    want = [[np.float32(weight[i, j]) * scales[i // 8, j // 16] for j in range(37)] for i in range(20)]
    np.testing.assert_array_equal(fp8_values(weight, scales, block=(8, 16)).values(), want)


def _compressed(**settings) -> dict:
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", **settings}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "quip"}, r"quant_method is 'quip'; supported: .*gptq"),
        (_compressed(format="marlin-24"), r"format='marlin-24'; supported: pack-quantized"),
        (_compressed(config_groups={"g": {"format": "marlin-24"}}), r"format='marlin-24'; supported"),
        (_compressed(sparsity_config={"format": "sparse-24-bitmask"}), r"sparsity_config.format='sparse-24-bitmask'"),
        (_compressed(transform_config={"config_groups": {"R1": {}}}), "transform_config.*rotates activations"),
        ({"quant_method": "awq", "bits": 4, "version": "v9"}, r"version='v9'; supported: gemm, exllama, gemv"),
        ({"quant_method": "awq", "bits": 8}, r"bits=8; supported: 4"),
        ({"quant_method": "auto-round", "bits": 4, "packing_format": "x"}, r"packing_format='x'; supported: "),
        ({"quant_method": "auto-round", "bits": 4, "data_type": "mx_fp"}, r"data_type='mx_fp'; supported: 'int'"),
    ],
)
def test_other_settings_are_refused_with_those_that_are_supported_and_a_remedy(settings, message):
    with pytest.raises(ValueError, match=message + r".*; otherwise pass the original checkpoint"):
        unpack({}, settings)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"num_bits": 4, "strategy": "tensor_group", "group_size": 32}, r"strategy='tensor_group'; supported: 'tensor'"),
        ({"num_bits": 9, "strategy": "channel"}, r"num_bits=9 for 'm'; supported: 'int' with 2 to 8 bits"),
        ({"num_bits": 4, "type": "posit"}, r"type='posit' and weights.num_bits=4"),
        (
            {"num_bits": 4, "strategy": "channel"},
            r"'m.weight_scale' has shape \(.*the matrix and quantization_config require",
        ),
    ],
)
def test_weights_of_compressed_tensors_that_are_not_understood_are_refused(weights, message):
    case = next(case for case in SETTINGS if SETTINGS[case].get("format") == "pack-quantized")
    group = {"targets": ["Linear"], "weights": weights}
    with pytest.raises(ValueError, match=message):
        unpack(tensors_of(case, "m"), _compressed(config_groups={"group_0": group}))["m.weight"].map()
